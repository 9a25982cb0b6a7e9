"""The rules for a weight that is scaled, added or otherwise broadcast against activations.

The rule first expands the weight to the result's shape, which copies nothing and changes no result. Autograd's gradient of the
expanded weight then has one part for each row, and so for each example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import zsl_kernels as zk
from zerosum.probe.contributions import Contribution, Dense, DiagonalRows, Piece, RowGather
from zerosum.probe.layout import Layout, Uncovered
from zerosum.probe.parameters import Ref
from zerosum.probe.rules.site import RuleContext, Site, elements

# Functions that broadcast their tensor operands against one another.
FUNCTIONS: tuple[Callable[..., Any], ...] = (
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__),
    *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, torch.rsub, Tensor.sub_, Tensor.__isub__, torch.subtract),
    *(torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__, torch.true_divide, Tensor.div_, Tensor.__itruediv__),
    *(Tensor.mul_, Tensor.__imul__, torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__rpow__),
    *(torch.where, Tensor.where, torch.lerp, Tensor.lerp, torch.addcmul, Tensor.addcmul, torch.addcdiv, Tensor.addcdiv),
    *(torch.maximum, torch.minimum, Tensor.maximum, Tensor.minimum),
)


def rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    shape = torch.broadcast_shapes(*(x.shape for x in operands))

    def lifted(x: Any) -> Any:
        ref = context.ref(x)
        return x if ref is None else lift(context, ref, shape, func.__name__)

    return func(*map(lifted, args), **{key: lifted(x) for key, x in kwargs.items()})


def scale_rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Handle ``weight * x`` with a vector along the last dimension, as in a norm; handle other shapes as any broadcast."""
    x, y = args[0], args[1] if len(args) > 1 else kwargs["other"]
    weight, x = (x, y) if context.ref(x) is not None else (y, x)
    ref = context.ref(weight)
    if ref is None or context.ref(x) is not None or not isinstance(x, Tensor):
        raise Uncovered("operands other than a weight and an activation")
    if weight.ndim != 1 or x.ndim < 2 or x.shape[-1] != weight.shape[0] or not x.is_floating_point():
        return rule(context, func, args, kwargs)
    ref.covered_by("scale")
    return _Scale.apply(x, ref.tensor(), context.anchor, Site(context, "scale", (ref,), x.shape[:-1]))


def prelu_rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Handle ``F.prelu(input, weight)``, with one slope for all features or one slope for each feature along dimension 1."""
    x, weight = _prelu_arguments(*args, **kwargs)
    ref = context.ref(weight)
    if ref is None or context.ref(x) is not None:
        raise Uncovered("operands other than an activation and a weight")
    if x.dtype != weight.dtype or weight.ndim != 1 or (len(weight) > 1 and (x.ndim < 2 or x.shape[1] != len(weight))):
        raise Uncovered("operands that torch refuses, or that autocast converts")
    if len(weight) == 1:
        return torch._prelu_kernel(x, lift(context, ref, x.shape, "prelu"))
    x = x.movedim(1, -1)  # the dimension along which a vector broadcasts
    return torch._prelu_kernel(x, lift(context, ref, x.shape, "prelu")).movedim(-1, 1)


def _prelu_arguments(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return input, weight


def lift(context: RuleContext, ref: Ref, shape: torch.Size, how: str) -> Tensor:
    """Expand the weight to the result's shape."""
    ref.covered_by(how)
    return _Lift.apply(ref.tensor(), shape, context.anchor, Site(context, how, (ref,), shape, elements))


def contribution(layout: Layout, grad: Tensor, shape: torch.Size, piece: Piece) -> Contribution:
    """Return the contribution of an expanded weight's gradient to the weight, which has this shape."""
    first = (1,) * (grad.ndim - len(shape)) + tuple(shape)
    if layout.is_diagonal(shape, grad.ndim):
        return DiagonalRows(grad.sum_to_size(shape))  # the weight was repeated for the examples
    if layout.positions and grad.ndim == 3 and layout.plain and first[:2] == (1, layout.positions):
        # One row for each position: these are rows of a table.
        at = torch.arange(layout.positions, device=grad.device).repeat(layout.sequences)
        return RowGather(at[:, None], grad.reshape(layout.examples, 1, -1), layout.positions)
    return Dense(layout.per_example(grad, shape))


class _Lift(torch.autograd.Function):
    """``weight.expand(shape)``; its backward pass stores each example's gradient with the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shape: torch.Size, anchor: Tensor, site: Site) -> Tensor:
        ctx.site, ctx.shape = site, weight.shape
        return weight.detach().expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        site, shape = ctx.site, ctx.shape
        with torch._C.DisableTorchFunction():
            if site.named(grad):
                return None, None, None, None
            plain = grad.sum_to_size(shape) if site.plain() else None
            site.leave(lambda layout: contribution(layout, grad.detach(), shape, site.refs[0].piece))
            return plain, None, None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, anchor: Tensor, site: Site) -> Tensor:
        ctx.site = site
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        site: Site = ctx.site
        with torch._C.DisableTorchFunction():
            grad_x = (grad * weight).to(x.dtype) if ctx.needs_input_grad[0] else None
            if site.named(grad):
                return grad_x, None, None, None
            grad_weight = (grad * x).flatten(0, -2).sum(0).to(weight.dtype) if site.plain() else None
            site.leave(lambda layout: Dense(scale_gradients(layout, x.detach(), grad.detach())))
            return grad_x, grad_weight, None, None


def scale_gradients(layout: Layout, x: Tensor, grad: Tensor) -> Tensor:
    """Return each example's gradient (E, K) of a vector that scales every row of ``x``."""
    return zk.scale_grad(layout.rows(x), layout.rows(grad), **layout.ragged(grad.device))
