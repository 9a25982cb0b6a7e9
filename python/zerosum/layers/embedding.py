"""``F.embedding(ids, weight)`` and ``weight[ids]``, where the ids are the examples' own.

(Ids that are the same for all examples make a function of the weight alone.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zerosum.layers.site import Site
from zerosum.provenance import Uncovered
from zerosum.tracking import Ref
from zerosum.uses import Lookup, Piece

if TYPE_CHECKING:
    from zerosum.capture import Capture


def plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call only looks rows up, and its gradient is dense."""
    _, _, _, max_norm, scale_grad_by_freq, sparse = _arguments(*args, **kwargs)
    return max_norm is None and not scale_grad_by_freq and not sparse


def rows(*args: Any, **kwargs: Any) -> Tensor:
    """The rows that a call looks up; -1 for those that get no gradient."""
    ids, weight, padding_idx, *_ = _arguments(*args, **kwargs)
    return ids if padding_idx is None else torch.where(ids == padding_idx % weight.shape[0], -1, ids)


def rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    ids, weight, *_ = _arguments(*args, **kwargs)
    ref = capture.ref(weight)
    if ref is None or not plain(args, kwargs):
        raise Uncovered("max_norm, scale_grad_by_freq or sparse gradients")
    site, tensors = Site.of(capture, capture.provenance.layout(ids, 0), "embedding", weight)
    return _Embedding.apply(*tensors, ids, rows(*args, **kwargs), site)


def getitem_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``weight[ids]``: an entry of dimension 0 for each id, of any shape."""
    weight, ids = args
    ref = capture.ref(weight)
    if ref is None or not isinstance(ids, Tensor) or ids.dtype == torch.bool or ids.ndim == 0:
        raise Uncovered("an index other than a tensor of integers")
    size, stride, offset = ref.piece
    entry = math.prod(size[1:])
    if Piece(size[1:], stride[1:], 0) != Piece.of(torch.empty(size[1:], device="meta")):
        raise Uncovered("a weight whose entries are not contiguous")
    layout = capture.provenance.layout(ids, 0)
    ref.covered_by("index")
    flat = Ref(ref.source, Piece((size[0], entry), (stride[0], 1), offset))
    at = torch.where(ids < 0, ids + size[0], ids)
    y = _Embedding.apply(flat.tensor(), at, at, Site(capture, capture.pass_number, layout, (flat,)))
    return y.view(*ids.shape, *size[1:])


def _arguments(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Tensor, int | None, float | None, bool, bool]:
    """Binds F.embedding's positional and keyword arguments."""
    return input, weight, padding_idx, max_norm, scale_grad_by_freq, sparse


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, rows: Tensor, site: Site) -> Tensor:
        ctx.site, ctx.num_rows, ctx.dtype = site, weight.shape[0], weight.dtype
        ctx.save_for_backward(rows)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            layout, at = ctx.site.layout, ids.unsqueeze(-1)
            e = layout.rows(grad.detach())
            ctx.site.leave(lambda: Lookup(layout.rows(at).squeeze(-1), e, ctx.num_rows, layout.row_ids(at)))
            if not ctx.site.plain():
                return (None,) * 4
            padded = torch.where(ids < 0, ctx.num_rows, ids)
            total = grad.new_zeros(ctx.num_rows + 1, grad.shape[-1]).index_add(0, padded.flatten(), grad.flatten(0, -2))
            return total[:-1].to(ctx.dtype), None, None, None
