"""A classification head and its losses, with the statistics of the head's weight in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsl_kernels.backends.dispatch import impls_for
from zsl_kernels.streamed_head import HeadSums, backward, check_operands, default_chunk, forward, output_gradients, product_dtype
from zsl_kernels.types import InterferenceSums
from zsl_kernels.validation import check_tensor


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
        targets: (N, T) classes of any integer dtype, in [0, V) or ``ignore_index``. That they are is read from them: a CUDA device
            is waited for.
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
    impls_for(h.device, impl)
    if vocabulary_chunk is None:
        vocabulary_chunk = default_chunk(h.shape[0] * h.shape[1], weight.shape[0], h.dtype)
    elif not isinstance(vocabulary_chunk, int) or vocabulary_chunk < 1:
        raise ValueError(f"vocabulary_chunk: expected a positive integer or None, got {vocabulary_chunk!r}")
    # Of h here, where autograd sees it; of the weight chunk by chunk, so that no copy of it is held.
    h = h.to(product_dtype(h))
    return _apply(h, weight, targets, ignore_index, vocabulary_chunk, statistics, direction, bool(gram), impl)


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
