"""A weight that is scaled, added or otherwise broadcast against activations.

The weight is first expanded over the examples, which copies nothing and changes no result: autograd's gradient of the expanded
weight is then each example's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zsl_kernels as zk
from zerosum.layers.site import Site
from zerosum.provenance import Layout, Uncovered, flatten
from zerosum.tracking import Ref
from zerosum.uses import Dense, Lookup, Own, Piece, Use

if TYPE_CHECKING:
    from zerosum.capture import Capture

# Functions whose tensor operands broadcast against one another.
FUNCTIONS: tuple[Callable[..., Any], ...] = (
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__),
    *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, torch.rsub, Tensor.sub_, Tensor.__isub__, torch.subtract),
    *(torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__, torch.true_divide, Tensor.div_, Tensor.__itruediv__),
    *(Tensor.mul_, Tensor.__imul__, torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__rpow__),
    *(torch.where, Tensor.where, torch.lerp, Tensor.lerp, torch.addcmul, Tensor.addcmul, torch.addcdiv, Tensor.addcdiv),
    *(torch.maximum, torch.minimum, Tensor.maximum, Tensor.minimum, F.scaled_dot_product_attention),
)


def rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in flatten((*args, *kwargs.values())) if isinstance(x, Tensor)]
    activations = [x for x in tensors if capture.ref(x) is None]
    # The result's rows are those of the activation with the most dimensions; a mask may have none.
    like = max((x for x in activations if not capture.provenance.is_constant(x)), key=lambda x: (x.ndim, x.requires_grad))
    ndim = max(x.ndim for x in tensors)
    if like.ndim < ndim and func is not F.scaled_dot_product_attention:
        raise Uncovered(f"an input of {like.ndim} dimensions, fewer than the weight has")
    layout = capture.provenance.layout(like, 0)

    def lifted(x: Any) -> Any:
        ref = capture.ref(x)
        return x if ref is None else lift(capture, ref, x, like, layout, func.__name__)

    return func(*map(lifted, args), **{key: lifted(x) for key, x in kwargs.items()})


def scale_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``weight * x`` with a vector along the last dimension, as in a norm; else as any broadcast."""
    x, y = args[0], args[1] if len(args) > 1 else kwargs["other"]
    weight, x = (x, y) if capture.ref(x) is not None else (y, x)
    ref = capture.ref(weight)
    if ref is None or capture.ref(x) is not None or not isinstance(x, Tensor):
        raise Uncovered("operands other than a weight and an activation")
    if weight.ndim != 1 or x.ndim < 2 or x.shape[-1] != weight.shape[0] or not x.is_floating_point():
        return rule(capture, func, args, kwargs)
    return scale(capture, x, ref, "scale")


def scale(capture: Capture, x: Tensor, ref: Ref, how: str) -> Tensor:
    """``x * weight`` along the last dimension."""
    site = Site(capture, capture.pass_number, capture.provenance.layout(x, 1), (ref,))
    ref.covered_by(how)
    return _Scale.apply(x, ref.tensor(), site)


def cat_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.cat`` of a weight that was repeated for the examples, such as a class token, with activations."""
    tensors = args[0] if args else kwargs["tensors"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    like = next(x for x in tensors if capture.ref(x) is None)
    if dim % like.ndim == 0:
        raise Uncovered("the dimension of examples")
    layout = capture.provenance.layout(like, 0)

    def lifted(x: Tensor) -> Tensor:
        ref = capture.ref(x)
        if ref is None:
            return x
        if x.shape[0] != like.shape[0] or layout.lead != 1 or layout.per is not None or layout.ids is not None:
            raise Uncovered("a weight that was not repeated for the examples")
        return lift(capture, ref, x, x, layout, "cat")

    return torch.cat([lifted(x) for x in tensors], dim)


def lift(capture: Capture, ref: Ref, weight: Tensor, like: Tensor, layout: Layout, how: str) -> Tensor:
    """The weight, expanded over the rows of ``like`` that are examples."""
    if layout.axis:
        raise Uncovered("rows whose examples are not the first dimension")
    lead = like.shape[: layout.lead]
    shape = (1,) * (like.ndim - weight.ndim) + tuple(weight.shape)
    own = weight.ndim == like.ndim and shape[0] == lead[0] != 1
    if own and (
        layout.lead != 1
        or layout.per is not None
        or layout.ids is not None
        or capture.provenance.inseparable
        or weight is ref.source.tensor is ref.source.parameters[0].tensor
    ):
        raise Uncovered("a weight whose first dimension would be the examples")
    if own:
        return lift_repeated(capture, ref, how)
    ref.covered_by(how)
    rest = tuple(shape[layout.lead :])
    if layout.lead == 2 and shape[1] != 1:  # one row for each position
        T = shape[1]

        def lookup(grad: Tensor) -> Use:
            at = torch.arange(T, device=grad.device).repeat(lead[0])
            return Lookup(at[:, None], grad.reshape(lead[0] * T, 1, -1), T)

        if math.prod(rest) != math.prod(weight.shape) // T or len(rest) != 1:
            raise Uncovered("a weight with rows of several dimensions for the positions")
        table = Ref(ref.source, Piece((T, rest[0]), ref.piece.stride[-2:], ref.piece.offset))
        return _Lift.apply(ref.tensor(), shape, (*lead, *rest), lookup, Site(capture, capture.pass_number, layout, (table,)))

    def dense(grad: Tensor) -> Use:
        g = layout.per_example(grad, layout.lead)
        return Dense(g.reshape(g.shape[0], *weight.shape))

    return _Lift.apply(ref.tensor(), shape, (*lead, *rest), dense, Site(capture, capture.pass_number, layout, (ref,)))


def lift_repeated(capture: Capture, ref: Ref, how: str) -> Tensor:
    """A weight that was expanded over the examples, as a tensor of theirs."""
    ref.covered_by(how)
    shape = ref.piece.size
    site = Site(capture, capture.pass_number, Layout(shape[0], 1), (ref,))
    return _Lift.apply(ref.tensor(), shape, shape, Own, site)


class _Lift(torch.autograd.Function):
    """``weight.view(shape).expand(expanded)``, whose backward leaves each example's gradient with the weight."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, shape: tuple[int, ...], expanded: tuple[int, ...], use: Callable[[Tensor], Use], site: Site
    ) -> Tensor:
        ctx.use, ctx.site, ctx.shape = use, site, weight.shape
        return weight.detach().reshape(shape).expand(expanded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch._C.DisableTorchFunction():
            ctx.site.leave(lambda: ctx.use(grad.detach()))
            return grad.sum_to_size(ctx.shape) if ctx.site.plain() else None, *[None] * 4


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, site: Site) -> Tensor:
        ctx.site = site
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            ctx.site.leave(lambda: Dense(scale_gradients(ctx.site.layout, x.detach(), grad.detach())))
            grad_x = (grad * weight).to(x.dtype) if ctx.needs_input_grad[0] else None
            grad_weight = (grad * x).flatten(0, -2).sum(0).to(weight.dtype) if ctx.site.plain() else None
            return grad_x, grad_weight, None


def scale_gradients(layout: Layout, x: Tensor, grad: Tensor) -> Tensor:
    """(E, K): each example's gradient of a vector that scales every row of ``x``."""
    return zk.scale_grad(layout.rows(x), layout.rows(grad), **layout.ragged(grad))


def bias_gradients(layout: Layout, grad: Tensor) -> Tensor:
    """(E, O): each example's gradient of a vector that is added to every row."""
    return zk.bias_grad(layout.rows(grad), **layout.ragged(grad))
