"""The rule for ``zk.linear_cross_entropy(h, weight, targets)``, a head that never holds all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zerosum.probe.contributions import OuterProduct, StreamedHead, Sums
from zerosum.probe.layout import Layout, Uncovered
from zerosum.probe.rules.site import RuleContext, Site, elements
from zsl_kernels.streamed_head import HeadSums, backward, check_operands, default_chunk, forward


def rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    h, weight, targets, ignore_index, statistics, chunk = _arguments(*args, **kwargs)
    check_operands(h, weight, targets, ignore_index)
    ref = context.ref(weight)
    if ref is None or context.ref(h) is not None or statistics is not None:
        raise Uncovered("operands other than activations and a weight, or with statistics of its own")
    if h.ndim < 2:
        raise Uncovered("a single row")
    site, (matrix,) = Site.of(context, "linear_cross_entropy", targets.shape, weight, rows_of=elements)
    device = h.device.type
    if torch.is_autocast_enabled(device):
        h = h.to(torch.get_autocast_dtype(device))
    chunk = chunk or default_chunk(targets.numel(), weight.shape[0], h.dtype)
    return _Head.apply(h, matrix, targets, ignore_index, chunk, context.anchor, site)


def _arguments(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    *,
    statistics: Any = None,
    vocabulary_chunk: int | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor, int, Any, int | None]:
    """Bind the call's positional and keyword arguments."""
    return h, weight, targets, ignore_index, statistics, vocabulary_chunk


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int, anchor: Tensor, site: Site
    ) -> Tensor:
        ctx.site, ctx.ignore_index, ctx.chunk = site, ignore_index, chunk
        with torch.autocast(h.device.type, enabled=False):
            losses, lse = forward(h, weight, targets, ignore_index, chunk)
        ctx.save_for_backward(h, weight, targets, lse)
        return losses

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("linear_cross_entropy: it can be differentiated once; expected create_graph=False")
        h, weight, targets, lse = ctx.saved_tensors
        site: Site = ctx.site
        with torch._C.DisableTorchFunction():
            wants_h, wants_weight = ctx.needs_input_grad[:2]
            naming = site.named(c)
            ref = None if naming else site.ref()
            layout = _one_sequence(h) if ref is None or site.layout is None else site.layout
            ids = None if ref is None else layout.ids
            if ids is not None:
                layout = _one_sequence(h)
            # Each row of (E, T, ·) is one example. With ids, all positions lie in one row, and the ids name their examples.
            a = layout.rows(h)
            target, log_total, scale = (layout.rows(x.unsqueeze(-1)).squeeze(-1) for x in (targets, lse, c))
            head = StreamedHead(a, weight, target, log_total, scale, ctx.ignore_index, ctx.chunk)
            use: StreamedHead | OuterProduct = head
            request = None if ref is None or ids is not None else ref.source.sole(ref.piece)
            sums = None if request is None else HeadSums(a, weight.shape[0], request.direction, request.gram)
            plain = wants_weight and not naming and site.plain()
            grad_h, grad_weight = backward(a, weight, head.chunks(), wants_h, plain, sums)
            if ids is not None:
                # Sums of rows in an irregular order need the whole gradient of the logits. The chunks reuse one buffer, so each is
                # copied.
                b = a.new_empty(*a.shape[:-1], weight.shape[0])
                for first, last, part in head.chunks():
                    b[..., first:last] = part
                use = OuterProduct(b.flatten(0, 1), a.flatten(0, 1), ids)
            elif sums is not None:
                head.sums = Sums(*sums.result())
            if ref is not None:
                own = site.leave(lambda layout: use)
                grad_weight = grad_weight if own is None else own
            return None if grad_h is None else _back(layout, grad_h, h), grad_weight, *[None] * 5


def _one_sequence(h: Tensor) -> Layout:
    return Layout(1, inner=h.shape[0])


def _back(layout: Layout, rows: Tensor, h: Tensor) -> Tensor:
    """Apply the inverse of ``layout.rows`` to the gradient of ``h``."""
    if layout.plain:
        return rows.view(h.shape)
    number = layout.rows(torch.arange(h.shape[:-1].numel(), device=h.device).view(*h.shape[:-1], 1)).flatten()
    return torch.empty_like(h).flatten(0, -2).index_copy_(0, number, rows.flatten(0, -2)).view(h.shape)
