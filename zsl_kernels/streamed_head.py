"""The pieces of a classification head that never holds its logits: what :func:`zsl_kernels.linear_cross_entropy` is made of.

Letters as everywhere, with V for the vocabulary, which is O of :func:`zsl_kernels.interference`: h (N, T, K) is a head's input,
weight (V, K) its weight, and a chunk is some columns [lo, hi) of the logits h @ weight.T. What a chunk needs is one buffer of
(N·T, hi − lo), which holds its logits, then their softmax, then the gradient b_c of the losses with respect to them, and then
those of the next chunk. The logits are thus computed twice, once on the way forward for their logsumexp and once on the way back.

A trainer with a loss of its own calls :func:`check_operands` and :func:`forward`, then :func:`output_gradients` and
:func:`backward`. These check nothing, and know nothing of autograd.
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

# For the buffers of a chunk, unless so many rows meet that one tile of columns needs more.
CHUNK_BYTES = 32 << 20


def default_chunk(rows: int, V: int, dtype: torch.dtype) -> int:
    """Columns of a chunk for N·T rows: as many as fit ``CHUNK_BYTES``, in whole tiles of the kernels and in about equal chunks."""
    rounded = 0 if dtype == sum_dtype(dtype) else dtype.itemsize
    tile_bytes = TILE_O * max(rows, 1) * (sum_dtype(dtype).itemsize + rounded)
    limit = TILE_O * max(1, CHUNK_BYTES // tile_bytes)
    chunks = max(1, -(-V // limit))
    return TILE_O * max(1, -(-V // (chunks * TILE_O)))


def _backend(h: Tensor, impl: str) -> Backend:
    """Whose passes over the logits a call takes. ``impl`` is that of the statistics, which need not have any."""
    impl = derivative_impl(impl, "linear_cross_entropy", h.device)
    return backend_for("linear_cross_entropy", h.device, impl, h.dtype)


def forward(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """``F.cross_entropy(logits.movedim(-1, 1), targets, ignore_index=..., reduction="none")`` and ``logits.logsumexp(-1)``.

    The losses are (N, T) of the sum dtype, the logsumexp is (N, T) float64: its error would be that of every probability. The
    products are those of ``h``'s dtype, whatever the weight's. Arguments are not checked; call it without grad mode.
    """
    target = _columns(targets, ignore_index)
    highest, total, at_target = _backend(h, impl).linear_cross_entropy_forward(h, weight, target, chunk)
    log_total = total.log_()
    # Not lse − at_target: large logits would cancel.
    losses = torch.where(target < 0, 0, highest.double() - at_target.double() + log_total).to(highest.dtype)
    return losses.view(targets.shape), (highest.double() + log_total).view(targets.shape)


def output_gradients(
    h: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, c: Tensor, ignore_index: int, chunk: int, impl: str = "auto"
) -> Iterator[tuple[int, int, Tensor]]:
    """``b = (torch.softmax(logits, -1) - F.one_hot(targets, V)) * c[..., None]``, 0 where ignored, a chunk of columns at a time.

    Yields ``(lo, hi, b[:, :, lo:hi])`` in ``h``'s dtype, contiguous and in one buffer that the next chunk overwrites. ``lse`` is
    that of :func:`forward`, ``c`` (N, T) of any floating dtype. Arguments are not checked; iterate without grad mode.
    """
    dtype = sum_dtype(h.dtype)
    target = _columns(targets, ignore_index)
    c = c.reshape(target.shape).double().masked_fill(target < 0, 0)
    # exp(x − lse) = exp(x − shift) · exp(shift − lse): the second factor costs no pass of its own.
    shift = lse.reshape(target.shape).to(dtype)
    scale = (c * (shift.double() - lse.reshape(target.shape)).exp_()).to(dtype)
    backend = _backend(h, impl)
    for lo, hi, b in backend.linear_cross_entropy_gradients(h, weight, target, shift, scale, c.to(dtype), chunk):
        yield lo, hi, b.view(*targets.shape, hi - lo)


def _columns(targets: Tensor, ignore_index: int) -> Tensor:
    """The targets as (N·T, 1), −1 where ignored."""
    targets = targets.long()  # first: narrower ones would be compared with a narrowed ignore_index
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

    Where ``sums`` gather the statistics, the weight's gradient is among them and not computed here.
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
    """The statistics, a chunk of the weight's rows at a time."""

    def __init__(self, h: Tensor, V: int, direction: Tensor | None, gram: bool, impl: str = "auto") -> None:
        self._h, self._direction, self._gram, self._impl = h, direction, gram, impl
        N, _, K = h.shape
        self._sums = [h.new_empty(V, K, dtype=sum_dtype(h.dtype)) for _ in range(3)]
        shapes = [(N,)] * 4 + [(N, N) if gram else (0, 0)]
        self._scalars = [h.new_zeros(shape, dtype=torch.float64) for shape in shapes]

    def add(self, lo: int, hi: int, b: Tensor, embedding: Embedding | None = None) -> None:
        """Adds rows [lo, hi), with the lookups of a tied embedding that fall into them."""
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
    """``total += x @ y``, accumulated in the dtype of ``total``."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    else:
        total += product(x, y, torch.empty_like(total))


def autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """As autocast has it, which leaves float64 alone."""
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
        raise TypeError(f"weight: expected {h.dtype} as h, got {weight.dtype}")
    if weight.shape[1] != h.shape[2]:
        raise ValueError(f"weight: expected shape (V, {h.shape[2]}) to go with h, got {tuple(weight.shape)}")
    check_integers("targets", targets)
    if targets.shape != h.shape[:2]:
        raise ValueError(f"targets: expected shape {tuple(h.shape[:2])} to go with h, got {tuple(targets.shape)}")
    for name, x in (("weight", weight), ("targets", targets)):
        if x.device != h.device:
            raise ValueError(f"{name}: expected a tensor on {h.device} as h, got one on {x.device}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index: expected an integer of 64 bits, got {ignore_index}")
    if h.device.type == "meta":
        return
    wide = targets.long()
    ignored = wide == ignore_index
    if targets.dtype == torch.uint64:  # past what int64 holds they are negative
        ignored &= wide >= 0
    wrong = ((wide < 0) | (wide >= weight.shape[0])) & ~ignored
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        expected = f"classes in [0, {weight.shape[0]}) or ignore_index = {ignore_index}"
        raise ValueError(f"targets: expected {expected}, got {targets[at].item()} at {at}")
