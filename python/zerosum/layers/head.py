"""``zk.linear_cross_entropy(h, weight, targets)``: a head that never holds logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zerosum.layers.site import Site
from zerosum.provenance import Uncovered
from zerosum.uses import Head, Sums
from zsl_kernels.linear_cross_entropy import HeadSums, backward, check_operands, default_chunk, forward

if TYPE_CHECKING:
    from zerosum.capture import Capture


def rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    h, weight, targets, ignore_index, statistics, chunk = _arguments(*args, **kwargs)
    check_operands(h, weight, targets, ignore_index)
    ref = capture.ref(weight)
    if ref is None or capture.ref(h) is not None or statistics is not None:
        raise Uncovered("operands other than activations and a weight, or with statistics of its own")
    layout = capture.provenance.layout(h, 1)
    if layout.ids is not None or h.ndim != 3:
        raise Uncovered("rows that are not (N, T, ·)")
    site, tensors = Site.of(capture, layout, "linear_cross_entropy", weight)
    device = h.device.type
    if torch.is_autocast_enabled(device):
        h = h.to(torch.get_autocast_dtype(device))
    chunk = chunk or default_chunk(h.shape[0] * h.shape[1], weight.shape[0], h.dtype)
    return _Head.apply(h, *tensors, targets, ignore_index, chunk, site)


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
    """Binds the call's positional and keyword arguments."""
    return h, weight, targets, ignore_index, statistics, vocabulary_chunk


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int, site: Site) -> Tensor:
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
        with torch._C.DisableTorchFunction():
            site, rows = ctx.site, ctx.site.layout.rows
            # One example for each row of (E, T, ·): positions are examples of one row.
            a = rows(h)
            target, log_total, scale = (rows(x.unsqueeze(-1)).squeeze(-1) for x in (targets, lse, c))
            use = Head(a, weight, target, log_total, scale, ctx.ignore_index, ctx.chunk)
            ref = site.ref()
            asked = None if ref is None else ref.source.sole(site.pass_number, ref.piece)
            sums = None if asked is None else HeadSums(a, weight.shape[0], asked.direction, asked.gram)
            wants_h, wants_weight = ctx.needs_input_grad[:2]
            grad_h, grad_weight = backward(a, weight, use.chunks(), wants_h, wants_weight and site.plain(), sums)
            if sums is not None:
                use.sums = Sums(*sums.result())
            site.leave(lambda: use)
            return None if grad_h is None else grad_h.view(h.shape), grad_weight, *[None] * 4
