"""linear_cross_entropy: a classification head and its losses; its backward pass computes the statistics of the head's weight."""

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

    Let c (N, T) be the derivatives with respect to the losses, ``p = torch.softmax(h @ weight.T, -1)`` and
    ``b = (p - F.one_hot(targets, V)) * c[..., None]``, with b = 0 at ignored positions. Each backward pass

    - computes ``h.grad = b @ weight`` and ``weight.grad = zk.interference(h, b).grad_sum``;
    - calls ``statistics(zk.interference(h, b, direction=direction, gram=gram))`` once. Its ``grad_sum`` is the same tensor that
      becomes the weight's gradient if the dtypes agree. Without ``statistics``, the weight's gradient is a plain matrix product.

    The logits and b are never materialized: only ``vocabulary_chunk`` of their columns exist at a time. Cost: the three matrix
    products of a plain head and one more. With ``statistics``, the sums replace the product for the weight's gradient.

    Precision:

    - float32 and float64 inputs use the same matrix products as PyTorch.
    - The products of bfloat16 and float16 inputs are accumulated in float32. Unlike in a plain head, the logits are not rounded to
      the inputs' dtype. Softmax and losses are computed in float32. b is rounded to the inputs' dtype, as in a plain head under
      autocast. The gradients are summed over the vocabulary in float32 and rounded once, at the end.
    - Under autocast, the inputs are cast like those of ``F.linear``, the weight one chunk at a time. The weight's gradient is not
      rounded to the lower precision.

    ``torch.compile`` breaks the graph at this function; ``fullgraph=True`` raises an error. A ``TorchFunctionMode`` sees one call.

    Args:
        h: (N, T, K) inputs of the head.
        weight: (V, K), with the dtype of ``h``; under autocast any dtype except float64.
        targets: (N, T) classes of any integer dtype, each in [0, V) or equal to ``ignore_index``. The function checks their values,
            which synchronizes with a CUDA device.
        ignore_index: positions with this target have loss 0 and no gradient.
        statistics: called with the :class:`InterferenceSums` of the weight's per-example gradients, even if ``weight`` does not
            require a gradient. The backward pass must reach the losses.
        direction, gram: as in :func:`interference`. Only valid with ``statistics``.
        vocabulary_chunk: columns of the logits computed at a time. By default the buffers of a chunk take at most 32 MiB.
        impl: the implementation of the statistics, as in :func:`interference`. "reference" is not available.

    Returns: (N, T) losses in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype, or ``statistics`` is not callable.
        ValueError: an argument has the wrong shape or device, a target is out of range, ``direction`` or ``gram`` is given without
            ``statistics``, or ``impl`` is unknown.
        RuntimeError: the named ``impl`` is not available on this machine. The message gives the reason.
        NotImplementedError: in backward, if ``create_graph`` asks for a second derivative.
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
        raise ValueError("impl: expected 'auto', 'chunked' or 'cpu' for linear_cross_entropy, got 'reference'")
    impls_for(h.device, impl)
    if vocabulary_chunk is None:
        vocabulary_chunk = default_chunk(h.shape[0] * h.shape[1], weight.shape[0], h.dtype)
    elif not isinstance(vocabulary_chunk, int) or vocabulary_chunk < 1:
        raise ValueError(f"vocabulary_chunk: expected a positive integer or None, got {vocabulary_chunk!r}")
    # Cast h here, where autograd records it. The weight is cast chunk by chunk, so that no full copy of it exists.
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
            raise NotImplementedError("linear_cross_entropy: can be differentiated once only; expected create_graph=False")
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


@torch._disable_dynamo  # Dynamo would unroll the chunks and save their logits. torch.compiler.disable would import Dynamo
def _apply(*arguments: Any) -> Tensor:
    return _LinearCrossEntropy.apply(*arguments)


def _check_statistics(
    weight: Tensor, statistics: Callable[[InterferenceSums], object] | None, direction: Tensor | None, gram: bool
) -> None:
    if statistics is None:
        for name, given in (("direction", direction is not None), ("gram", gram)):
            if given:
                raise ValueError(f"{name}: only valid with statistics, got {name} without statistics")
        return
    if not callable(statistics):
        raise TypeError(f"statistics: expected a callable or None, got {type(statistics).__name__}")
    if direction is None:
        return
    check_tensor("direction", direction)
    if direction.shape != weight.shape:
        raise ValueError(f"direction: expected the shape of the weight, {tuple(weight.shape)}, got {tuple(direction.shape)}")
    if direction.device != weight.device:
        raise ValueError(f"direction: expected a tensor on {weight.device}, the device of h, got one on {direction.device}")
