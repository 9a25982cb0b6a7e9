"""linear_cross_entropy in plain PyTorch: both passes over the logits, one chunk of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zsl_kernels.backends import cpu
from zsl_kernels.backends.chunked.groups import long_product
from zsl_kernels.types import sum_dtype

# Rows of an operand that are converted at a time if there is no product of its dtype with a wider result.
_WIDENED_ROWS = 256


def forward(h: Tensor, weight: Tensor, target: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    highest = h.new_full(target.shape, torch.finfo(sum_dtype(h.dtype)).min, dtype=sum_dtype(h.dtype))  # finite: −inf − −inf is NaN
    total = h.new_zeros(target.shape, dtype=torch.float64)  # Σ exp(logit − highest)
    at_target = torch.zeros_like(highest)
    for lo, hi, x in _logits(h, weight, chunk):
        inside, column = _within(target, lo, hi)
        at_target = torch.where(inside, x.gather(1, column), at_target)
        before, highest = highest, torch.maximum(highest, x.amax(1, keepdim=True))
        total *= (before - highest).double().exp_()
        total += x.sub_(highest).exp_().sum(1, keepdim=True)
    return highest, total, at_target


def output_gradients(
    h: Tensor, weight: Tensor, target: Tensor, shift: Tensor, scale: Tensor, c: Tensor, chunk: int
) -> Iterator[tuple[int, int, Tensor]]:
    minus_c, rounded = c.neg(), None
    for lo, hi, x in _logits(h, weight, chunk):
        x.sub_(shift).exp_().mul_(scale)
        inside, column = _within(target, lo, hi)
        x.scatter_add_(1, column, torch.where(inside, minus_c, 0))
        if x.dtype != h.dtype:
            rounded = torch.empty_like(x, dtype=h.dtype) if rounded is None else rounded
            x = rounded.flatten()[: x.numel()].view(x.shape).copy_(x)
        yield lo, hi, x


def _logits(h: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(lo, hi, logits[:, lo:hi])`` of the flattened rows in the sum dtype, in a buffer that the caller may modify."""
    rows, V = h.flatten(0, 1), weight.shape[0]
    buffer = h.new_empty(rows.shape[0] * min(chunk, V), dtype=sum_dtype(h.dtype))
    for lo in range(0, V, chunk):
        hi = min(lo + chunk, V)
        x = buffer[: rows.shape[0] * (hi - lo)].view(rows.shape[0], hi - lo)
        yield lo, hi, product(rows, weight[lo:hi].to(h.dtype).T, x)


def _within(target: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Return whether the target is in the chunk, and its column there (arbitrary if it is not)."""
    return (target >= lo) & (target < hi), (target - lo).clamp_(0, hi - lo - 1)


def product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Compute ``x @ y`` in the dtype of ``out``, for operands of one dtype. Autocast does not affect products with ``out``."""
    if x.dtype == out.dtype:
        return long_product(x, y, out)
    if x.device.type == "cuda":
        return torch.mm(x, y, out_dtype=out.dtype, out=out)
    if x.device.type == "cpu" and cpu.MISSING is None:
        cpu.product(x, y, out)
        return out
    y = y.to(out.dtype)
    for rows, result in zip(x.split(_WIDENED_ROWS), out.split(_WIDENED_ROWS), strict=True):
        torch.mm(rows.to(out.dtype), y, out=result)
    return out
