"""The pieces of a classification head that never materializes its logits. :func:`zsl_kernels.linear_cross_entropy` uses them.

Notation: h (N, T, K) is the head's input and weight (V, K) its weight, where V, the vocabulary size, is the O of
:func:`zsl_kernels.interference`. A chunk is a range [lo, hi) of columns of the logits h @ weight.T.

A chunk needs one buffer of (N·T, hi − lo). The buffer contains the chunk's logits, then their softmax, then the gradient b of the
losses with respect to them. The next chunk overwrites it. The logits are therefore computed twice: in the forward pass for their
logsumexp, and again in the backward pass.

To use them with a loss of your own, call :func:`check_operands` and :func:`forward`, then :func:`output_gradients` and
:func:`backward`. The last three do not check their arguments and do not interact with autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from zsl_kernels.backends.base import Backend
from zsl_kernels.backends.chunked.linear_cross_entropy import product
from zsl_kernels.backends.dispatch import backend_for, derivative_impl
from zsl_kernels.ops import interference
from zsl_kernels.planning.cpu_cost import TILE_O
from zsl_kernels.tied import Embedding
from zsl_kernels.types import InterferenceSums, sum_dtype
from zsl_kernels.validation import check_elements, check_integers, check_tensor

# Limit of a chunk's buffers. A chunk has at least one tile of columns, which exceeds the limit if there are very many rows.
CHUNK_BYTES = 32 << 20


def default_chunk(rows: int, V: int, dtype: torch.dtype) -> int:
    """Return the columns of a chunk for N·T rows: whole tiles of the kernels within ``CHUNK_BYTES``, in chunks of similar size."""
    rounded = 0 if dtype == sum_dtype(dtype) else dtype.itemsize
    tile_bytes = TILE_O * max(rows, 1) * (sum_dtype(dtype).itemsize + rounded)
    limit = TILE_O * max(1, CHUNK_BYTES // tile_bytes)
    chunks = max(1, -(-V // limit))
    return TILE_O * max(1, -(-V // (chunks * TILE_O)))


def _backend(h: Tensor, impl: str) -> Backend:
    """Return the backend that computes the logits. ``impl`` is the statistics' backend, which may lack these kernels."""
    impl = derivative_impl(impl, "linear_cross_entropy", h.device)
    return backend_for("linear_cross_entropy", h.device, impl, h.dtype)


def forward(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """``F.cross_entropy(logits.movedim(-1, 1), targets, ignore_index=..., reduction="none")`` and ``logits.logsumexp(-1)``.

    The losses are (N, T) in the sum dtype. The logsumexp is (N, T) in float64, because its error affects every probability. The
    weight is cast to the dtype of ``h``. The arguments are not checked. Call it with grad mode disabled.
    """
    target = _columns(targets, ignore_index)
    highest, total, at_target = _backend(h, impl).linear_cross_entropy_forward(h, weight, target, chunk)
    log_total = total.log_()
    # lse − at_target would cancel for large logits.
    losses = torch.where(target < 0, 0, highest.double() - at_target.double() + log_total).to(highest.dtype)
    return losses.view(targets.shape), (highest.double() + log_total).view(targets.shape)


def output_gradients(
    h: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, c: Tensor, ignore_index: int, chunk: int, impl: str = "auto"
) -> Iterator[tuple[int, int, Tensor]]:
    """``b = (torch.softmax(logits, -1) - F.one_hot(targets, V)) * c[..., None]``, 0 where ignored, one chunk of columns at a time.

    Yields ``(lo, hi, b[:, :, lo:hi])`` in the dtype of ``h``, contiguous, in a buffer that the next chunk overwrites. ``lse`` is a
    result of :func:`forward`, and ``c`` is (N, T) of any floating dtype. The arguments are not checked. Iterate with grad mode
    disabled.
    """
    dtype = sum_dtype(h.dtype)
    target = _columns(targets, ignore_index)
    c = c.reshape(target.shape).double().masked_fill(target < 0, 0)
    # exp(x − lse) = exp(x − shift) · exp(shift − lse): the second factor needs no extra pass over the logits.
    shift = lse.reshape(target.shape).to(dtype)
    scale = (c * (shift.double() - lse.reshape(target.shape)).exp_()).to(dtype)
    backend = _backend(h, impl)
    for lo, hi, b in backend.linear_cross_entropy_gradients(h, weight, target, shift, scale, c.to(dtype), chunk):
        yield lo, hi, b.view(*targets.shape, hi - lo)


def _columns(targets: Tensor, ignore_index: int) -> Tensor:
    """Return the targets as (N·T, 1), with −1 where ignored."""
    targets = targets.long()  # first, because a narrower dtype would also narrow ignore_index in the comparison
    return targets.masked_fill(targets == ignore_index, -1).reshape(-1, 1)


def backward(
    h: Tensor,
    weight: Tensor,
    chunks: Iterator[tuple[int, int, Tensor]],
    wants_h: bool,
    wants_weight: bool,
    sums: HeadSums | None,
) -> tuple[Tensor | None, Tensor | None]:
    """``b @ weight`` and ``b.T @ h`` in the dtypes of ``h`` and ``weight``, from the chunks of :func:`output_gradients`.

    With ``sums``, the weight's gradient is one of the statistics and is not computed here.
    """
    rows, dtype = h.flatten(0, 1), sum_dtype(h.dtype)
    grad_h = h.new_zeros(rows.shape, dtype=dtype) if wants_h else None
    grad_weight = h.new_empty(weight.shape, dtype=dtype) if wants_weight and sums is None else None
    if wants_h or wants_weight or sums is not None:
        with torch.autocast(h.device.type, enabled=False) if autocasts(h.device) else nullcontext():
            for lo, hi, b in chunks:
                if grad_h is not None:
                    _add_product(b.flatten(0, 1), weight[lo:hi].to(h.dtype), grad_h)
                if sums is not None:
                    sums.add(lo, hi, b)
                elif grad_weight is not None:
                    product(b.flatten(0, 1).T, rows, grad_weight[lo:hi])
    dh = None if grad_h is None else grad_h.view(h.shape).to(h.dtype)
    return dh, None if grad_weight is None else grad_weight.to(weight.dtype)


class HeadSums:
    """Accumulates the statistics of the head's weight, one chunk of its rows at a time."""

    def __init__(self, h: Tensor, V: int, direction: Tensor | None, gram: bool, impl: str = "auto") -> None:
        self._h, self._direction, self._gram, self._impl = h, direction, gram, impl
        N, _, K = h.shape
        self._sums = [h.new_empty(V, K, dtype=sum_dtype(h.dtype)) for _ in range(3)]
        shapes = [(N,)] * 4 + [(N, N) if gram else (0, 0)]
        self._scalars = [h.new_zeros(shape, dtype=torch.float64) for shape in shapes]

    def add(self, lo: int, hi: int, b: Tensor, embedding: Embedding | None = None) -> None:
        """Add the weight's rows [lo, hi), including the lookups of a tied embedding in this range."""
        u = None if self._direction is None else self._direction[lo:hi]
        if embedding is not None:
            inside = (embedding.ids >= lo) & (embedding.ids < hi)
            embedding = Embedding(embedding.ids[inside] - lo, embedding.grads[inside], embedding.example_ids[inside])
        part = interference.run(self._h, b, u, self._gram, self._impl, embedding=embedding)
        for total, x in zip(self._sums, part[:3], strict=True):
            total[lo:hi] = x
        for scalar, y in zip(self._scalars, part[3:], strict=True):
            if y is not None:
                scalar += y

    def result(self) -> InterferenceSums:
        scalars = (x.to(self._sums[0].dtype) for x in self._scalars)
        return InterferenceSums(*self._sums, *scalars).asked_for(self._direction, self._gram)


def _add_product(x: Tensor, y: Tensor, total: Tensor) -> None:
    """Compute ``total += x @ y``, accumulated in the dtype of ``total``."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    else:
        total += product(x, y, torch.empty_like(total))


def autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which ``x`` is multiplied: autocast's, if it is enabled, except for float64."""
    if x.dtype == torch.float64 or not autocasts(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def check_operands(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> None:
    for name, x, ndim, letters in (("h", h, 3, "N, T, K"), ("weight", weight, 2, "V, K")):
        check_tensor(name, x)
        if x.ndim != ndim:
            raise ValueError(f"{name}: expected a {ndim}-D tensor ({letters}), got shape {tuple(x.shape)}")
        check_elements(name, *x.shape)
    if product_dtype(weight) != product_dtype(h):
        raise TypeError(f"weight: expected {h.dtype}, the dtype of h, got {weight.dtype}")
    if weight.shape[1] != h.shape[2]:
        raise ValueError(f"weight: expected shape (V, {h.shape[2]}) to match h, got {tuple(weight.shape)}")
    check_integers("targets", targets)
    if targets.shape != h.shape[:2]:
        raise ValueError(f"targets: expected shape {tuple(h.shape[:2])} to match h, got {tuple(targets.shape)}")
    for name, x in (("weight", weight), ("targets", targets)):
        if x.device != h.device:
            raise ValueError(f"{name}: expected a tensor on {h.device}, the device of h, got one on {x.device}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index: expected an integer that fits in 64 bits, got {ignore_index}")
    if h.device.type == "meta":
        return
    wide = targets.long()
    ignored = wide == ignore_index
    if targets.dtype == torch.uint64:  # values beyond the range of int64 have become negative
        ignored &= wide >= 0
    wrong = ((wide < 0) | (wide >= weight.shape[0])) & ~ignored
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        expected = f"classes in [0, {weight.shape[0]}) or ignore_index = {ignore_index}"
        raise ValueError(f"targets: expected {expected}, got {targets[at].item()} at {at}")
