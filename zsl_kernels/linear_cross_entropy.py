"""A classification head that never holds its logits: the losses, both gradients, and the statistics of the weight's per-example
gradients, a chunk of the vocabulary at a time.

Letters as everywhere, with V for the vocabulary, which is O of :func:`zsl_kernels.interference`: h (N, T, K) is a head's input,
weight (V, K) its weight, and a chunk is some columns [lo, hi) of the logits h @ weight.T. What a chunk needs is one buffer of
(N·T, hi − lo), which holds its logits, then their softmax, then the gradient b_c of the losses with respect to them, and then
those of the next chunk. The logits are thus computed twice, once on the way forward for their logsumexp and once on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import backends, ops
from zsl_kernels.checks import check_tensor
from zsl_kernels.plan import TILE_O
from zsl_kernels.rows import Embedding
from zsl_kernels.types import InterferenceSums, sum_dtype

# For the buffers of a chunk, unless so many rows meet that one tile of columns needs more.
CHUNK_BYTES = 32 << 20
# Of an operand that is widened for its product, where there is no product of its dtype with wider results.
_WIDENED_ROWS = 256


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    *,
    statistics: Callable[[InterferenceSums], object] | None = None,
    direction: Tensor | None = None,
    gram: bool = False,
    vocabulary_chunk: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """The losses of a linear classification head, and in the backward pass the statistics of its weight's gradients::

        F.cross_entropy((h @ weight.T).movedim(-1, 1), targets, ignore_index=ignore_index, reduction="none")  # (N, T)

    With the losses' derivatives c (N, T), ``p = torch.softmax(h @ weight.T, -1)`` and ``b = (p - F.one_hot(targets, V)) *
    c[..., None]``, 0 where ignored, the backward pass gives ``h.grad = b @ weight`` and ``weight.grad = zk.interference(h,
    b).grad_sum``, and calls ``statistics(zk.interference(h, b, direction=direction, gram=gram))``, once in each backward pass. The
    ``grad_sum`` there is the very tensor that becomes the weight's gradient, if it has the weight's dtype. Without ``statistics``
    the weight's gradient is the plain product.

    Neither the logits nor b are ever held, only ``vocabulary_chunk`` columns of them. Time: that of the three products of a plain
    head and of one more, with the sums in place of the product for the weight's gradient.

    What is rounded, and where: the products of float32 and float64 inputs are those of PyTorch. The products of bfloat16 and
    float16 inputs are accumulated in float32 and the logits are not rounded to the inputs' dtype, which a plain head does; softmax
    and losses are computed in float32; b is rounded to the inputs' dtype, as in a plain head under autocast; the gradients are
    summed over the vocabulary in float32 and rounded once, at the end. Under autocast the inputs are cast as those of
    ``F.linear`` are, the weight a chunk at a time, and its gradient is not rounded to the lower precision.

    ``torch.compile`` leaves it out of its graphs (``fullgraph=True`` refuses it). A ``TorchFunctionMode`` sees one call of it.

    Args:
        h: (N, T, K) inputs of the head.
        weight: (V, K), of the dtype of ``h``, or any but float64 under autocast.
        targets: (N, T) int64 classes, in [0, V) or ``ignore_index``. That they are is read from them: a CUDA device is waited for.
        ignore_index: positions with this target have loss 0 and no gradient.
        statistics: called with the :class:`InterferenceSums` of the weight's per-example gradients, whether or not ``weight``
            itself requires a gradient. The backward pass must reach the losses.
        direction, gram: as in :func:`interference`, with ``statistics`` only.
        vocabulary_chunk: columns of the logits handled at a time; by default what keeps the buffers of a chunk within 32 MiB.
        impl: of the statistics, as in :func:`interference`, but for "reference", which this has none of.

    Returns: (N, T) losses in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a tensor, or has another dtype; ``statistics`` cannot be called.
        ValueError: an argument has another shape or device, a target is out of range, ``direction`` or ``gram`` came without
            ``statistics``, or ``impl`` is unknown.
        RuntimeError: the named ``impl`` is not available on this machine; the message says why.
        NotImplementedError: on the way back, when it is to be differentiated again (``create_graph``).
    """
    if torch.overrides.has_torch_function((h, weight, targets)):
        return torch.overrides.handle_torch_function(
            linear_cross_entropy,
            (h, weight, targets),
            h,
            weight,
            targets,
            ignore_index,
            statistics=statistics,
            direction=direction,
            gram=gram,
            vocabulary_chunk=vocabulary_chunk,
            impl=impl,
        )
    check_operands(h, weight, targets, ignore_index)
    _check_statistics(weight, statistics, direction, gram)
    if impl == "reference":
        raise ValueError("impl: linear_cross_entropy has no reference of its own; expected 'auto', 'chunked' or 'cpu'")
    backends.impls_for(h.device, impl)
    if vocabulary_chunk is None:
        vocabulary_chunk = default_chunk(h.shape[0] * h.shape[1], weight.shape[0], h.dtype)
    elif not isinstance(vocabulary_chunk, int) or vocabulary_chunk < 1:
        raise ValueError(f"vocabulary_chunk: expected a positive integer or None, got {vocabulary_chunk!r}")
    # Of h here, where autograd sees it; of the weight chunk by chunk, so that no copy of it is held.
    h = h.to(_product_dtype(h))
    return _apply(h, weight, targets, ignore_index, vocabulary_chunk, statistics, direction, bool(gram), impl)


def default_chunk(rows: int, V: int, dtype: torch.dtype) -> int:
    """Columns of a chunk for N·T rows: as many as fit ``CHUNK_BYTES``, in whole tiles of the kernels and in about equal chunks."""
    rounded = 0 if dtype == sum_dtype(dtype) else dtype.itemsize
    tile_bytes = TILE_O * max(rows, 1) * (sum_dtype(dtype).itemsize + rounded)
    limit = TILE_O * max(1, CHUNK_BYTES // tile_bytes)
    chunks = max(1, -(-V // limit))
    return TILE_O * max(1, -(-V // (chunks * TILE_O)))


# The pieces, outside of autograd --------------------------------------------------------------------------------------------------


def _kernels(h: Tensor, impl: str) -> ModuleType | None:
    """The GPU's kernels for the passes over the logits, where a call has them. ``impl`` names the statistics' owner, which need not
    have any."""
    owner = backends.impls_for(h.device, backends.derivative_impl(impl, "linear_cross_entropy"), "linear_cross_entropy", h.dtype)[0]
    return backends.module("triton").linear_cross_entropy if owner == "triton" else None


def forward(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """``F.cross_entropy(logits.movedim(-1, 1), targets, ignore_index=..., reduction="none")`` and ``logits.logsumexp(-1)``.

    The losses are (N, T) of the sum dtype, the logsumexp is (N, T) float64: its error would be that of every probability. The
    products are those of ``h``'s dtype, whatever the weight's. Arguments are not checked; call it without grad mode.
    """
    target = _columns(targets, ignore_index)
    kernels = _kernels(h, impl)
    highest, total, at_target = _reduced(h, weight, target, chunk) if kernels is None else kernels.forward(h, weight, target)
    log_total = total.log_()
    # Not lse − at_target: large logits would cancel.
    losses = torch.where(target < 0, 0, highest.double() - at_target.double() + log_total).to(highest.dtype)
    return losses.view(targets.shape), (highest.double() + log_total).view(targets.shape)


def _reduced(h: Tensor, weight: Tensor, target: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The highest logit, Σ exp(logit − highest) and the target's logit, or any: (N·T, 1)."""
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
    if (kernels := _kernels(h, impl)) is not None:
        for lo, hi, b in kernels.output_gradients(h, weight, target, shift, scale, c.to(dtype), chunk):
            yield lo, hi, b.view(*targets.shape, hi - lo)
        return
    minus_c = c.neg().to(dtype)
    rounded = None
    for lo, hi, x in _logits(h, weight, chunk):
        x.sub_(shift).exp_().mul_(scale)
        inside, column = _within(target, lo, hi)
        x.scatter_add_(1, column, torch.where(inside, minus_c, 0))
        if dtype != h.dtype:
            rounded = torch.empty_like(x, dtype=h.dtype) if rounded is None else rounded
            x = rounded.flatten()[: x.numel()].view(x.shape).copy_(x)
        yield lo, hi, x.view(*targets.shape, hi - lo)


def _logits(h: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """``(lo, hi, logits[:, lo:hi])`` of the flattened rows (N·T, hi − lo) in the sum dtype, in one buffer that may be changed."""
    rows, V = h.flatten(0, 1), weight.shape[0]
    buffer = h.new_empty(rows.shape[0] * min(chunk, V), dtype=sum_dtype(h.dtype))
    for lo in range(0, V, chunk):
        hi = min(lo + chunk, V)
        x = buffer[: rows.shape[0] * (hi - lo)].view(rows.shape[0], hi - lo)
        yield lo, hi, _product(rows, weight[lo:hi].to(h.dtype).T, x)


def _columns(targets: Tensor, ignore_index: int) -> Tensor:
    """The targets as (N·T, 1), −1 where ignored."""
    return targets.masked_fill(targets == ignore_index, -1).reshape(-1, 1)


def _within(target: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Whether the target is in the chunk, and its column there, or any."""
    return (target >= lo) & (target < hi), (target - lo).clamp_(0, hi - lo - 1)


def _product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """``x @ y`` of one dtype, accumulated and returned in that of ``out``. Autocast leaves products with ``out`` alone."""
    if x.dtype == out.dtype:
        return torch.mm(x, y, out=out)
    if x.device.type == "cuda":
        return torch.mm(x, y, out_dtype=out.dtype, out=out)
    if x.device.type == "cpu" and backends.why_not("cpu") is None:
        # The product is the gradient of one example.
        plan = backends.plan_call("weighted_grad", y.unsqueeze(0), x.T.unsqueeze(0), impl="cpu")
        backends.cpu.product(plan, x, y, out)
        return out
    y = y.to(out.dtype)
    for rows, result in zip(x.split(_WIDENED_ROWS), out.split(_WIDENED_ROWS), strict=True):
        torch.mm(rows.to(out.dtype), y, out=result)
    return out


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
        with torch.autocast(h.device.type, enabled=False) if _autocasts(h.device) else nullcontext():
            for lo, hi, b in chunks:
                if grad_h is not None:
                    _add_product(b.flatten(0, 1), weight[lo:hi].to(h.dtype), grad_h)
                if sums is not None:
                    sums.add(lo, hi, b)
                elif grad_weight is not None:
                    _product(b.flatten(0, 1).T, rows, grad_weight[lo:hi])
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
        part = ops.interference(self._h, b, u, self._gram, self._impl, embedding=embedding)
        for total, x in zip(self._sums, part[:3], strict=True):
            total[lo:hi] = x
        for scalar, y in zip(self._scalars, part[3:], strict=True):
            if y is not None:
                scalar += y

    def result(self) -> InterferenceSums:
        scalars = (x.to(self._sums[0].dtype) for x in self._scalars)
        return InterferenceSums(*self._sums, *scalars).asked_for(self._direction, self._gram)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        chunk: int,
        statistics: Callable[[InterferenceSums], object] | None,
        direction: Tensor | None,
        gram: bool,
        impl: str,
    ) -> Tensor:
        losses, lse = forward(h, weight, targets, ignore_index, chunk, impl)
        ctx.save_for_backward(h, weight, targets, lse, direction)
        ctx.ignore_index, ctx.chunk, ctx.statistics, ctx.gram, ctx.impl = ignore_index, chunk, statistics, gram, impl
        return losses

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("linear_cross_entropy: it can be differentiated once; expected create_graph=False")
        h, weight, targets, lse, direction = ctx.saved_tensors
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        sums = None if ctx.statistics is None else HeadSums(h, weight.shape[0], direction, ctx.gram, ctx.impl)
        chunks = output_gradients(h, weight, targets, lse, c, ctx.ignore_index, ctx.chunk, ctx.impl)
        grad_h, grad_weight = backward(h, weight, chunks, wants_h, wants_weight, sums)
        if sums is not None:
            found = sums.result()
            ctx.statistics(found)
            grad_weight = found.grad_sum.to(weight.dtype) if wants_weight else None
        return grad_h, grad_weight, None, None, None, None, None, None, None


@torch._disable_dynamo  # it would unroll the chunks and keep what is to be recomputed; torch.compiler.disable imports it
def _apply(*arguments: Any) -> Tensor:
    return _LinearCrossEntropy.apply(*arguments)


def _add_product(x: Tensor, y: Tensor, total: Tensor) -> None:
    """``total += x @ y``, accumulated in the dtype of ``total``."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    else:
        total += _product(x, y, torch.empty_like(total))


# Checks ---------------------------------------------------------------------------------------------------------------------------


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _product_dtype(x: Tensor) -> torch.dtype:
    """As autocast has it, which leaves float64 alone."""
    if x.dtype == torch.float64 or not _autocasts(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def check_operands(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> None:
    for name, x, ndim, letters in (("h", h, 3, "N, T, K"), ("weight", weight, 2, "V, K")):
        check_tensor(name, x)
        if x.ndim != ndim:
            raise ValueError(f"{name}: expected a {ndim}-D tensor ({letters}), got shape {tuple(x.shape)}")
    if _product_dtype(weight) != _product_dtype(h):
        raise TypeError(f"weight: expected {h.dtype} as h, got {weight.dtype}")
    if weight.shape[1] != h.shape[2]:
        raise ValueError(f"weight: expected shape (V, {h.shape[2]}) to go with h, got {tuple(weight.shape)}")
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a torch.Tensor, got {type(targets).__name__}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    if targets.shape != h.shape[:2]:
        raise ValueError(f"targets: expected shape {tuple(h.shape[:2])} to go with h, got {tuple(targets.shape)}")
    for name, x in (("weight", weight), ("targets", targets)):
        if x.device != h.device:
            raise ValueError(f"{name}: expected a tensor on {h.device} as h, got one on {x.device}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if h.device.type == "meta":
        return
    wrong = ((targets < 0) | (targets >= weight.shape[0])) & (targets != ignore_index)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        expected = f"classes in [0, {weight.shape[0]}) or ignore_index = {ignore_index}"
        raise ValueError(f"targets: expected {expected}, got {targets[at].item()} at {at}")


def _check_statistics(
    weight: Tensor, statistics: Callable[[InterferenceSums], object] | None, direction: Tensor | None, gram: bool
) -> None:
    if statistics is None:
        for name, given in (("direction", direction is not None), ("gram", gram)):
            if given:
                raise ValueError(f"{name}: expected with statistics only, got it without")
        return
    if not callable(statistics):
        raise TypeError(f"statistics: expected a callable or None, got {type(statistics).__name__}")
    if direction is None:
        return
    check_tensor("direction", direction)
    if direction.shape != weight.shape:
        raise ValueError(f"direction: expected shape {tuple(weight.shape)}, that of the weight, got {tuple(direction.shape)}")
    if direction.device != weight.device:
        raise ValueError(f"direction: expected a tensor on {weight.device} as h, got one on {direction.device}")
