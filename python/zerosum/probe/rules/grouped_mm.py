"""The rule for ``grouped_mm(x, weight, offs=offs)``: products of rows, sorted by expert, with the experts' matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zerosum.probe.contributions import OuterProduct, Piece
from zerosum.probe.layout import Uncovered
from zerosum.probe.parameters import Ref
from zerosum.probe.rules.site import RuleContext, Site

FUNCTIONS = tuple(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None)


def rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, weight, offs, rest = _arguments(*args, **kwargs)
    ref = context.ref(weight)
    if ref is None or context.ref(x) is not None or x.ndim != 2 or weight.ndim != 3 or offs is None or rest:
        raise Uncovered("operands other than rows, experts' matrices and offsets")
    site, (matrices,) = Site.of(context, "grouped_mm", x.shape[:-1], weight, alone=False)
    return _Grouped.apply(x, matrices, offs, func, context.anchor, site)


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, offs: Tensor, func: Any, anchor: Tensor, site: Site) -> Tensor:
        ctx.site = site
        ctx.save_for_backward(x, weight, offs)
        return func(x, weight, offs=offs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offs = ctx.saved_tensors
        site: Site = ctx.site
        with torch._C.DisableTorchFunction():
            naming = site.named(grad)
            ref, plain = (None, False) if naming else (site.ref(), site.plain())
            parts, grads, start = [], [], 0
            for expert, end in enumerate(offs.tolist()):
                mine = slice(start, end)
                if end > start:
                    parts.append(grad[mine] @ weight[expert].mT)
                    if ref is not None and site.layout is not None:
                        size, stride, offset = ref.piece
                        piece = Piece(size[1:], stride[1:], offset + expert * stride[0])
                        left, ids = site.layout.slice(x.detach(), mine)
                        right, _ = site.layout.slice(grad.detach(), mine)
                        Ref(ref.source, piece).leave(OuterProduct(left, right, ids))
                if plain:
                    grads.append(x[mine].mT @ grad[mine])
                start = max(start, end)
            parts.append(torch.zeros_like(x[start:]))  # rows that belong to no expert
            return torch.cat(parts), torch.stack(grads) if plain else None, *[None] * 4
