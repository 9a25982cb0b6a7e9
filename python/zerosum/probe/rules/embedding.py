"""The rules for ``F.embedding(ids, weight)`` and ``weight[ids]`` where each example has its own ids.

(If the ids are the same for all examples, the result is a function of the weight alone.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zerosum.probe.contributions import Piece, RowGather
from zerosum.probe.layout import Layout, Uncovered
from zerosum.probe.parameters import Ref
from zerosum.probe.rules.site import RuleContext, Site


def plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call only looks up rows and its gradient is dense."""
    _, _, _, max_norm, scale_grad_by_freq, sparse = lookup_arguments(*args, **kwargs)
    return max_norm is None and not scale_grad_by_freq and not sparse


def rows(*args: Any, **kwargs: Any) -> Tensor:
    """Return the rows that a call looks up, with -1 for rows that get no gradient."""
    ids, weight, padding_idx, *_ = lookup_arguments(*args, **kwargs)
    return ids if padding_idx is None else torch.where(ids == padding_idx % weight.shape[0], -1, ids)


def rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    ids, weight, *_ = lookup_arguments(*args, **kwargs)
    if context.ref(weight) is None or context.ref(ids) is not None or not plain(args, kwargs):
        raise Uncovered("max_norm, scale_grad_by_freq or sparse gradients")
    return lookup(context, weight, ids, rows(*args, **kwargs))


def lookup(context: RuleContext, weight: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """Compute ``F.embedding(ids, weight)``. The rows that ``counted`` lists get a gradient; negative entries get none."""
    site, (table,) = Site.of(context, "embedding", ids.shape, weight)
    return _Embedding.apply(table, ids, counted, context.anchor, site)


def getitem_rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Handle ``weight[ids]``: one entry of dimension 0 for each id; ``ids`` has any shape."""
    weight, ids = args
    ref = context.ref(weight)
    if ref is None or not isinstance(ids, Tensor) or ids.dtype == torch.bool or ids.ndim == 0:
        raise Uncovered("an index other than a tensor of integers")
    size, stride, offset = ref.piece
    entry = math.prod(size[1:])
    if Piece(size[1:], stride[1:], 0) != Piece.of(torch.empty(size[1:], device="meta")):
        raise Uncovered("a weight whose entries are not contiguous")
    ref.covered_by("index")
    flat = Ref(ref.source, Piece((size[0], entry), (stride[0], 1), offset))
    at = torch.where(ids < 0, ids + size[0], ids)
    y = _Embedding.apply(flat.tensor(), at, at, context.anchor, Site(context, "index", (flat,), ids.shape))
    return y.view(*ids.shape, *size[1:])


def lookup_arguments(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Tensor, int | None, float | None, bool, bool]:
    """Bind F.embedding's positional and keyword arguments."""
    return input, weight, padding_idx, max_norm, scale_grad_by_freq, sparse


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, rows: Tensor, anchor: Tensor, site: Site) -> Tensor:
        ctx.site, ctx.num_rows, ctx.dtype = site, weight.shape[0], weight.dtype
        ctx.save_for_backward(rows)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return backward(ctx.site, grad, ids, ctx.num_rows, ctx.dtype), None, None, None, None


def backward(site: Site, grad: Tensor, ids: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor | None:
    """Return the weight's gradient if autograd needs it. Negative ``ids`` get no gradient."""
    with torch._C.DisableTorchFunction():
        if site.named(grad):
            return None
        total = None
        if site.plain():
            padded = torch.where(ids < 0, num_rows, ids)
            total = grad.new_zeros(num_rows + 1, grad.shape[-1]).index_add(0, padded.flatten(), grad.flatten(0, -2))
            total = total[:-1].to(dtype)
        own = site.leave(lambda layout: _gathered(layout, ids, grad.detach(), num_rows))
        return total if own is None else own


def _gathered(layout: Layout, ids: Tensor, grad: Tensor, num_rows: int) -> RowGather:
    return RowGather(layout.rows(ids.unsqueeze(-1)).squeeze(-1), layout.rows(grad), num_rows, layout.ids)
