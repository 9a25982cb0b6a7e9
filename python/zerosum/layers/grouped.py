"""Products of rows that are sorted by expert with the experts' matrices: ``grouped_mm(x, weight, offs=offs)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zerosum.provenance import Layout, Uncovered
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
    layout = capture.provenance.layout(x, 1)
    for t in ref.source.parameters:
        t.covered_by("grouped_mm")
    return _Grouped.apply(x, ref.tensor(), offs, func, ref, layout, capture, capture.pass_number)


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
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, offs: Tensor, func: Any, ref: Ref, layout: Layout, capture: Capture, pass_number: int
    ) -> Tensor:
        ctx.ref, ctx.layout, ctx.capture, ctx.pass_number = ref, layout, capture, pass_number
        ctx.save_for_backward(x, weight, offs)
        return func(x, weight, offs=offs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offs = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            ids = ctx.layout.row_ids(x)
            if ids is None:
                ids = torch.arange(ctx.layout.examples, device=x.device).repeat_interleave(len(x) // max(ctx.layout.examples, 1))
            plain = not ctx.capture.open or torch.is_grad_enabled()
            grad_x = torch.zeros_like(x)
            grads = []
            start = 0
            _, K, O = weight.shape
            E, s, r = ctx.ref.piece.stride
            for e, end in enumerate(offs.tolist()):
                mine = slice(start, end)
                if end > start:
                    grad_x[mine] = grad[mine] @ weight[e].mT
                    if ctx.capture.open:
                        piece = Piece((K, O), (s, r), ctx.ref.piece.offset + e * E)
                        use = Product(x[mine].detach(), grad[mine].detach(), ids[mine])
                        Ref(ctx.ref.source, piece).leave(ctx.pass_number, use)
                if plain:
                    grads.append(x[mine].mT @ grad[mine])
                start = max(start, end)
            return grad_x, torch.stack(grads) if plain else None, *[None] * 6
