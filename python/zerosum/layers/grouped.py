"""Products of rows that are sorted by expert with the experts' matrices: ``grouped_mm(x, weight, offs=offs)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zerosum.layers.site import Site
from zerosum.provenance import Uncovered
from zerosum.tracking import Ref
from zerosum.uses import Piece, Product

if TYPE_CHECKING:
    from zerosum.capture import Capture

FUNCTIONS = tuple(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None)


def rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, weight, offs, rest = _arguments(*args, **kwargs)
    ref = capture.ref(weight)
    if ref is None or capture.ref(x) is not None or x.ndim != 2 or weight.ndim != 3 or offs is None or rest:
        raise Uncovered("operands other than rows, experts' matrices and offsets")
    site, tensors = Site.of(capture, capture.provenance.layout(x, 1), "grouped_mm", weight)
    return _Grouped.apply(x, *tensors, offs, func, site)


def _arguments(
    input: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **names: Any,
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    return input, mat2, names.get("offs", offs), bias is not None or out_dtype is not None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offs: Tensor, func: Any, site: Site) -> Tensor:
        ctx.site = site
        ctx.save_for_backward(x, weight, offs)
        return func(x, weight, offs=offs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offs = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            site = ctx.site
            ref, plain = site.ref(), site.plain()
            parts, grads, start = [], [], 0
            for expert, end in enumerate(offs.tolist()):
                mine = slice(start, end)
                if end > start:
                    parts.append(grad[mine] @ weight[expert].mT)
                    if ref is not None:
                        size, stride, offset = ref.piece
                        piece = Piece(size[1:], stride[1:], offset + expert * stride[0])
                        left, ids = site.layout.slice(x.detach(), mine)
                        right, _ = site.layout.slice(grad.detach(), mine)
                        Ref(ref.source, piece).leave(site.pass_number, Product(left, right, ids))
                if plain:
                    grads.append(x[mine].mT @ grad[mine])
                start = max(start, end)
            parts.append(torch.zeros_like(x[start:]))  # rows of no expert
            return torch.cat(parts), torch.stack(grads) if plain else None, None, None, None
