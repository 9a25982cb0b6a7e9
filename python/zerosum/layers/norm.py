"""Scales and shifts of normalizations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zsl_kernels as zk
from zerosum.layers.broadcast import bias_gradients, scale_gradients
from zerosum.layers.site import Site
from zerosum.provenance import Uncovered
from zerosum.tracking import Ref
from zerosum.uses import Dense

if TYPE_CHECKING:
    from zerosum.capture import Capture


def layer_norm_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, shape, weight, bias, eps = _layer_norm_arguments(*args, **kwargs)
    if len(shape) != 1 or torch.is_autocast_enabled(x.device.type):
        call = _Call(lambda x, weight, bias: F.layer_norm(x, shape, weight, bias, eps), len(shape), False)
        return _normalize(capture, call, x, weight, bias, "layer_norm")
    site, tensors = _site(capture, x, 1, weight, bias, "layer_norm")
    return _LayerNorm.apply(x, *tensors, list(shape), eps, site)


def rms_norm_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, shape, weight, eps = _rms_norm_arguments(*args, **kwargs)
    call = _Call(lambda x, weight, bias: F.rms_norm(x, shape, weight, eps), len(shape), False)
    return _normalize(capture, call, x, weight, None, "rms_norm")


def group_norm_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, groups, weight, bias, eps = _group_norm_arguments(*args, **kwargs)
    call = _Call(lambda x, weight, bias: F.group_norm(x, groups, weight, bias, eps), x.ndim - 1, True)
    return _normalize(capture, call, x, weight, bias, "group_norm")


def batch_norm_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if kwargs.get("training", args[5] if len(args) > 5 else False):
        raise RuntimeError(
            "zerosum.Probe: batch_norm in training mode couples the examples: none of them has a gradient of its own. Call "
            "model.eval(), or use another normalization"
        )
    raise Uncovered("running statistics")


@dataclass(frozen=True)
class _Call:
    """A normalization as a function of input, weight and bias, either of which may be None."""

    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    ndim: int  # trailing dimensions that are normalized together
    channels: bool  # whether the weight is along dimension 1 instead of all of them

    def rows(self, y: Tensor) -> Tensor:
        """With the weight's entries in one last dimension."""
        return y.movedim(1, -1) if self.channels else y.flatten(-self.ndim)

    def use(self, g: Tensor, ref: Ref | None) -> Dense:
        """Each example's gradient (E, entries) of the weight."""
        assert ref is not None
        return Dense(g.view(-1, *ref.piece.size))

    def weight_shaped(self, rows: Tensor, y: Tensor) -> Tensor:
        """The sum of rows, in the weight's shape."""
        total = rows.reshape(-1, rows.shape[-1]).sum(0)
        return total if self.channels else total.view(y.shape[y.ndim - self.ndim :])

    def per_row(self, p: Tensor, y: Tensor) -> Tensor:
        """The weight, to be broadcast against ``y``."""
        return p.view(-1, *[1] * (y.ndim - 2)) if self.channels else p


def _site(
    capture: Capture, x: Tensor, features: int, weight: Tensor | None, bias: Tensor | None, how: str
) -> tuple[Site, list[Tensor | None]]:
    if capture.ref(x) is not None:
        raise Uncovered("an input that is a weight")
    return Site.of(capture, capture.provenance.layout(x, features), how, weight, bias)


def _normalize(capture: Capture, call: _Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, how: str) -> Tensor:
    site, tensors = _site(capture, x, call.ndim, weight, bias, how)
    return _Normalize.apply(x, *tensors, call, site)


def _layer_norm_arguments(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, list[int], Tensor | None, Tensor | None, float]:
    """Binds F.layer_norm's positional and keyword arguments."""
    return input, normalized_shape, weight, bias, eps


def _rms_norm_arguments(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, list[int], Tensor | None, float | None]:
    return input, normalized_shape, weight, eps


def _group_norm_arguments(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, int, Tensor | None, Tensor | None, float]:
    return input, num_groups, weight, bias, eps


class _Normalize(torch.autograd.Function):
    """Any normalization. Its backward normalizes again, without weight and bias, and differentiates that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: _Call, site: Site) -> Tensor:
        ctx.site, ctx.call = site, call
        ctx.save_for_backward(x, weight)
        return call.function(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        call, site, layout = ctx.call, ctx.site, ctx.site.layout
        grads: list[Tensor | None] = [None] * 3
        with torch._C.DisableTorchFunction():
            differentiable = torch.is_grad_enabled()
            # (The input is one, also where gradients come for several examples at once.)
            with torch.enable_grad(), site.capture.provenance.unbatched():
                x = x if differentiable else x.detach().requires_grad_()
                y = call.function(x, None, None)
            b = call.rows(grad)
            if ctx.needs_input_grad[0]:
                through = grad if weight is None else grad * call.per_row(weight, grad)
                (grads[0],) = torch.autograd.grad(y, x, through.to(y.dtype), create_graph=differentiable)
            if ctx.needs_input_grad[1]:
                normed = call.rows(y if differentiable else y.detach())
                site.leave(lambda: call.use(scale_gradients(layout, normed.detach(), b.detach()), site.refs[0]))
                grads[1] = call.weight_shaped(b * normed, grad) if site.plain() else None
            if ctx.needs_input_grad[2]:
                site.leave(lambda: call.use(bias_gradients(layout, b.detach()), site.refs[1]), 1)
                grads[2] = call.weight_shaped(b, grad) if site.plain(1) else None
        return *grads, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float, site: Site
    ) -> Tensor:
        ctx.site, ctx.shape = site, shape
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            site, layout = ctx.site, ctx.site.layout
            needs = ctx.needs_input_grad[:3]
            plain = [needs[0], needs[1] and site.plain(), needs[2] and site.plain(1)]
            grads = torch.ops.aten.native_layer_norm_backward(grad, x, ctx.shape, mean, rstd, weight, bias, plain)
            b = layout.rows(grad.detach())
            if needs[1] and site.ref() is not None:
                # One pass for both; a bias that is not wanted costs nothing to speak of.
                moments = (layout.rows(y).squeeze(-1) for y in (mean, rstd))
                operands = dict(zip(("mean", "rstd"), moments, strict=True)) | layout.ragged(grad)
                scale, shift = zk.scale_bias_grad(layout.rows(x.detach()), b, **operands)
                site.leave(lambda: Dense(scale))
            elif needs[2] and site.ref(1) is not None:
                shift = bias_gradients(layout, grad.detach())
            if needs[2]:
                site.leave(lambda: Dense(shift), 1)
            return *(g if p else None for g, p in zip(grads, plain, strict=True)), None, None, None
