"""The rules for the scales and shifts of normalization layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zsl_kernels as zk
from zerosum.probe.contributions import Dense
from zerosum.probe.layout import Layout, Uncovered
from zerosum.probe.parameters import Ref
from zerosum.probe.rules.broadcast import scale_gradients
from zerosum.probe.rules.linear import bias_gradients
from zerosum.probe.rules.site import Rows, RuleContext, Site
from zsl_kernels.weight_uses import recorded


def layer_norm_rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, shape, weight, bias, eps = layer_norm_arguments(*args, **kwargs)
    if len(shape) != 1 or torch.is_autocast_enabled(x.device.type):
        call = _Call(lambda x, weight, bias: F.layer_norm(x, shape, weight, bias, eps), len(shape), False)
        return _normalize(context, call, x, weight, bias, "layer_norm")
    site, tensors = _site(context, x, x.shape[:-1], weight, bias, "layer_norm")
    return _LayerNorm.apply(x, *tensors, list(shape), eps, context.anchor, site)


def rms_norm_rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, shape, weight, eps = rms_norm_arguments(*args, **kwargs)
    call = _Call(
        lambda x, weight, bias: F.rms_norm(x, shape, weight, eps),
        len(shape),
        False,
        lambda x: rms_norm_by_parts(x, shape, eps=eps),
    )
    return _normalize(context, call, x, weight, None, "rms_norm")


def group_norm_rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, groups, weight, bias, eps = _group_norm_arguments(*args, **kwargs)
    call = _Call(lambda x, weight, bias: F.group_norm(x, groups, weight, bias, eps), x.ndim - 1, True)
    return _normalize(context, call, x, weight, bias, "group_norm")


@dataclass(frozen=True)
class _Call:
    """A normalization as a function of input, weight and bias. Weight and bias may be None."""

    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    ndim: int  # number of trailing dimensions that are normalized together
    channels: bool  # whether the weight lies along dimension 1 instead of all normalized dimensions
    alone: Callable[[Tensor], Tensor] | None = None  # the form without weight and bias, if `function` has no vectorized derivative

    def again(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the normalized input, to be differentiated. Under vmap, ``grad`` is batched over several examples."""
        if self.alone is not None and torch._C._functorch.is_batchedtensor(grad):
            return self.alone(x)
        return self.function(x, None, None)

    def rows(self, y: Tensor) -> Tensor:
        """Move the weight's entries into one last dimension."""
        return y.movedim(1, -1) if self.channels else y.flatten(-self.ndim)

    def lead(self, x: Tensor) -> Sequence[int]:
        """Return the dimensions of the rows."""
        return (x.shape[0], *x.shape[2:]) if self.channels else x.shape[: x.ndim - self.ndim]

    def use(self, g: Tensor, ref: Ref | None) -> Dense:
        """Return each example's gradient (E, entries) of the weight."""
        assert ref is not None
        return Dense(g.view(-1, *ref.piece.size))

    def weight_shaped(self, rows: Tensor, y: Tensor) -> Tensor:
        """Return the sum of rows, in the weight's shape."""
        total = rows.reshape(-1, rows.shape[-1]).sum(0)
        return total if self.channels else total.view(y.shape[y.ndim - self.ndim :])

    def per_row(self, p: Tensor, y: Tensor) -> Tensor:
        """Reshape the weight so that it broadcasts against ``y``."""
        return p.view(-1, *[1] * (y.ndim - 2)) if self.channels else p


def _site(
    context: RuleContext,
    x: Tensor,
    lead: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    how: str,
    rows_of: Rows | None = None,
) -> tuple[Site, list[Tensor | None]]:
    if context.ref(x) is not None:
        raise Uncovered("an input that is a weight")
    return Site.of(context, how, lead, weight, bias, rows_of=rows_of)


def _normalize(context: RuleContext, call: _Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, how: str) -> Tensor:
    site, tensors = _site(context, x, call.lead(x), weight, bias, how, call.rows)
    return _Normalize.apply(x, *tensors, call, context.anchor, site)


def layer_norm_arguments(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, list[int], Tensor | None, Tensor | None, float]:
    """Bind F.layer_norm's positional and keyword arguments."""
    return input, normalized_shape, weight, bias, eps


def rms_norm_arguments(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, list[int], Tensor | None, float | None]:
    return input, normalized_shape, weight, eps


def rms_norm_by_parts(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Compute F.rms_norm from operations that have vectorized derivatives, as torch does where it has no fused kernel.

    Under vmap, the derivative of the fused kernel runs once for each example, and torch warns about it.
    """
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    squares = wide.square().mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)
    normed = wide * (squares + (torch.finfo(wide.dtype).eps if eps is None else eps)).rsqrt()
    normed = normed if weight is None else normed * weight
    return normed.to(input.dtype)


def _group_norm_arguments(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, int, Tensor | None, Tensor | None, float]:
    return input, num_groups, weight, bias, eps


class _Normalize(torch.autograd.Function):
    """Any normalization. Its backward pass normalizes again, without weight and bias, and differentiates the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: _Call, anchor: Tensor, site: Site) -> Tensor:
        ctx.site, ctx.call = site, call
        ctx.save_for_backward(x, weight)
        return call.function(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        call, site = ctx.call, ctx.site
        grads: list[Tensor | None] = [None] * 3
        with torch._C.DisableTorchFunction():
            b = call.rows(grad)
            naming = site.named(grad)
            differentiable = torch.is_grad_enabled()
            # (There is one input, even if gradients for several examples come at once.)
            with torch.enable_grad(), site.context.unbatched():
                x = x if differentiable else x.detach().requires_grad_()
                y = call.again(x, grad)
            if ctx.needs_input_grad[0]:
                through = grad if weight is None else grad * call.per_row(weight, grad)
                (grads[0],) = torch.autograd.grad(y, x, through.to(y.dtype), create_graph=differentiable)
            if ctx.needs_input_grad[1] and not naming:
                normed = call.rows(y if differentiable else y.detach())
                grads[1] = call.weight_shaped(b * normed, grad) if site.plain() else None
                own = site.leave(lambda layout: call.use(scale_gradients(layout, normed.detach(), b.detach()), site.refs[0]))
                grads[1] = grads[1] if own is None else own
            if ctx.needs_input_grad[2] and not naming:
                grads[2] = call.weight_shaped(b, grad) if site.plain(1) else None
                own = site.leave(lambda layout: call.use(bias_gradients(layout, b.detach()), site.refs[1]), 1)
                grads[2] = grads[2] if own is None else own
        return *grads, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float, anchor: Tensor, site: Site
    ) -> Tensor:
        ctx.site = site
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *layer_norm_backward(ctx.site, grad, ctx.saved_tensors, ctx.needs_input_grad[:3]), None, None, None, None


def layer_norm_backward(
    site: Site, grad: Tensor, saved: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, scale and shift that are needed, from the tensors that the call saved."""
    x, weight, bias, mean, rstd = saved
    assert x is not None
    assert mean is not None
    assert rstd is not None
    with torch._C.DisableTorchFunction():
        naming = site.named(grad)
        plain = [needs[0], *(needs[k] and not naming and site.plain(k - 1) for k in (1, 2))]
        found = torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, weight, bias, plain)
        grads = [g if p else None for g, p in zip(found, plain, strict=True)]
        if not naming:
            scale, shift = (needs[k] and site.ref(k - 1) is not None for k in (1, 2))
            if scale:
                # One pass computes both. An unused bias gradient adds almost no cost.
                each = _layer_norm_gradients(site.layout, x.detach(), grad.detach(), mean, rstd)
                once = 0
                for k in range(1 + shift):
                    if (source := site.at_once(k)) is not None:
                        grads[k + 1] = source.gradient_of_dense(each[k])
                        once += 1
                    elif (own := site.leave(partial(_found, each[k]), k)) is not None:
                        grads[k + 1] = own
                if site.known is not None and once == len(site.sources):
                    _plan(site, x, grad, mean, rstd)
            elif shift:
                own = site.leave(lambda layout: Dense(bias_gradients(layout, grad.detach())), 1)
                grads[2] = grads[2] if own is None else own
        return grads[0], grads[1], grads[2]


def _plan(site: Site, x: Tensor, grad: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Record for a known call how its next backward pass runs without Python on a device. (The CPU needs no plan.)"""
    known, layout = site.known, site.layout
    if layout is None or not layout.plain or known.planned(layout.examples):
        return
    wanted = [None if ref is None else (ref.source.flat_direction, ref.source.gram) for ref in site.refs]
    mean, rstd = (layout.rows(y).squeeze(-1) for y in (mean, rstd))
    known.record(layout.examples, None, recorded.of_norm(layout.rows(x), layout.rows(grad), mean, rstd, *wanted))


def scale_backward(site: Site, grad: Tensor, y: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of scale and shift that are needed and measured. ``y`` is already normalized."""
    of_scale = of_shift = None
    with torch._C.DisableTorchFunction():
        if needs[0]:
            of_scale = site.leave(lambda layout: Dense(scale_gradients(layout, y, grad)))
        if needs[1]:
            of_shift = site.leave(lambda layout: Dense(bias_gradients(layout, grad)), 1)
    return of_scale, of_shift


def _found(g: Tensor, layout: Layout) -> Dense:
    return Dense(g)


def _layer_norm_gradients(layout: Layout | None, x: Tensor, grad: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (E, K) gradients of the scale and of the shift."""
    assert layout is not None
    moments: dict[str, Any] = {name: layout.rows(y).squeeze(-1) for name, y in (("mean", mean), ("rstd", rstd))}
    return zk.scale_bias_grad(layout.rows(x), layout.rows(grad), **moments, **layout.ragged(grad.device))
