"""``F.linear(x, weight, bias)``, with and without bias, on rows (N, K), (N, T, K), (N, H, W, K), …"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from zerosum.probe import Capture
    from zerosum.tracking import Tracked


def rule(capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The instrumented call, or None to leave the call as it is."""
    x, weight, bias = _arguments(*args, **kwargs)
    tracked_weight, tracked_bias = capture.tracked(weight), capture.tracked(bias)
    if tracked_weight is None and tracked_bias is None:
        return None
    capture.begin_use()
    tracked = [(t, how) for t, how in ((tracked_weight, "linear"), (tracked_bias, "linear bias")) if t is not None]
    if problem := capture.examples_problem(x.shape[:-1]):
        for t, _ in tracked:
            t.refuse(f"used by linear on {problem}")
        return None
    for t, how in tracked:
        t.uses += 1
        t.how = how
    return _Linear.apply(x, weight, bias, tracked_weight, tracked_bias, capture)


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Binds F.linear's positional and keyword arguments."""
    return input, weight, bias


def _examples(x: Tensor) -> Tensor:
    """(N, …, F) as (N, T, F); one position for each example where there is no dimension in between."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


class _Linear(torch.autograd.Function):
    """F.linear whose backward takes the statistics in the same pass as the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tw: Tracked | None, tb: Tracked | None, capture: Capture
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tracked, ctx.capture, ctx.ran = (tw, tb), capture, False
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tw, tb = (t if ctx.capture.open else None for t in ctx.tracked)
        for t in (tw, tb):
            if t is not None and ctx.ran:
                t.refuse("the backward pass went through it twice")
        ctx.ran = ctx.capture.backward_began = True
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Under autocast the product ran in a lower precision than the saved tensors have.
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if needs_x else None
        grad_weight = _weight_gradient(x.to(grad.dtype), grad, weight, tw) if needs_weight else None
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        if tb is not None and needs_bias:
            b = _examples(grad.detach())
            tb.add_per_example(b.sum(1, dtype=torch.float64 if b.dtype == torch.float64 else torch.float32))
        return grad_x, grad_weight, grad_bias, None, None, None


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, tracked: Tracked | None) -> Tensor:
    """The weight's gradient, in one pass with the statistics where it can be."""
    a, b = _examples(x.detach()), _examples(grad.detach())
    # With create_graph the gradient itself must stay differentiable: then the plain product, and the statistics beside it.
    plain = torch.is_grad_enabled()
    if tracked is not None and tracked.fused:
        with torch.no_grad():
            fused = tracked.weight_gradient(a, b)
        if not plain:
            return fused.to(weight.dtype)
    elif tracked is not None:
        tracked.add_use(a, b)
    return (grad.flatten(0, -2).mT @ x.flatten(0, -2)).to(weight.dtype)
