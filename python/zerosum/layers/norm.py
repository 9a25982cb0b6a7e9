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
from zerosum.provenance import Layout, Uncovered
from zerosum.tracking import Ref
from zerosum.uses import Dense

if TYPE_CHECKING:
    from zerosum.capture import Capture


def layer_norm_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, shape, weight, bias, eps = _layer_norm_arguments(*args, **kwargs)
    if len(shape) != 1 or torch.is_autocast_enabled(x.device.type):
        call = _Call(lambda x, weight, bias: F.layer_norm(x, shape, weight, bias, eps), len(shape), False)
        return _normalize(capture, call, x, weight, bias, "layer_norm")
    layout, refs = _prepare(capture, x, 1, weight, bias, "layer_norm")
    weight, bias = (p if ref is None else ref.tensor() for p, ref in zip((weight, bias), refs, strict=True))
    return _LayerNorm.apply(x, weight, bias, list(shape), eps, *refs, layout, capture, capture.pass_number)


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

    def per_row(self, p: Tensor, y: Tensor) -> Tensor:
        """The weight, to be broadcast against ``y``."""
        return p.view(-1, *[1] * (y.ndim - 2)) if self.channels else p


def _prepare(
    capture: Capture, x: Tensor, features: int, weight: Tensor | None, bias: Tensor | None, how: str
) -> tuple[Layout, list[Ref | None]]:
    if capture.ref(x) is not None:
        raise Uncovered("an input that is a weight")
    layout = capture.provenance.layout(x, features)
    refs = [None if p is None else capture.ref(p) for p in (weight, bias)]
    for ref, covers in zip(refs, (how, f"{how} bias"), strict=True):
        for t in ref.source.parameters if ref is not None else ():
            t.covered_by(covers)
    return layout, refs


def _normalize(capture: Capture, call: _Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, how: str) -> Tensor:
    layout, refs = _prepare(capture, x, call.ndim, weight, bias, how)
    weight, bias = (p if ref is None else ref.tensor() for p, ref in zip((weight, bias), refs, strict=True))
    return _Normalize.apply(x, weight, bias, call, refs[0], refs[1], layout, capture, capture.pass_number)


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
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        call: _Call,
        weight_ref: Ref | None,
        bias_ref: Ref | None,
        layout: Layout,
        capture: Capture,
        pass_number: int,
    ) -> Tensor:
        ctx.refs, ctx.layout, ctx.capture, ctx.pass_number, ctx.call = (weight_ref, bias_ref), layout, capture, pass_number, call
        ctx.save_for_backward(x, weight)
        return call.function(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        call, layout = ctx.call, ctx.layout
        refs = ctx.refs if ctx.capture.open else (None, None)
        grads: list[Tensor | None] = [None] * 3
        with torch._C.DisableTorchFunction():
            differentiable = torch.is_grad_enabled()
            with torch.enable_grad():
                x = x if differentiable else x.detach().requires_grad_()
                y = call.function(x, None, None)
            if ctx.needs_input_grad[0]:
                b = grad if weight is None else grad * call.per_row(weight, grad)
                (grads[0],) = torch.autograd.grad(y, x, b.to(y.dtype), create_graph=differentiable)
            for k, factor in ((1, y if differentiable else y.detach()), (2, None)):
                if not ctx.needs_input_grad[k]:
                    continue
                ref, b = refs[k - 1], call.rows(grad)
                if ref is not None:
                    rows = None if factor is None else call.rows(factor).detach()
                    g = bias_gradients(layout, b.detach()) if rows is None else scale_gradients(layout, rows, b.detach())
                    ref.leave(ctx.pass_number, Dense(g.view(-1, *ref.piece.size)))
                if ref is None or differentiable:
                    p = b if factor is None else b * call.rows(factor)
                    plain = p.reshape(-1, p.shape[-1]).sum(0)
                    grads[k] = plain if call.channels else plain.view(grad.shape[grad.ndim - call.ndim :])
        return *grads, *[None] * 6


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: list[int],
        eps: float,
        weight_ref: Ref | None,
        bias_ref: Ref | None,
        layout: Layout,
        capture: Capture,
        pass_number: int,
    ) -> Tensor:
        ctx.refs, ctx.layout, ctx.capture, ctx.pass_number, ctx.shape = (weight_ref, bias_ref), layout, capture, pass_number, shape
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            refs = ctx.refs if ctx.capture.open else (None, None)
            needs = list(ctx.needs_input_grad[:3])
            plain = [
                needs[0],
                *(need and (ref is None or torch.is_grad_enabled()) for need, ref in zip(needs[1:], refs, strict=True)),
            ]
            grads = torch.ops.aten.native_layer_norm_backward(grad, x, ctx.shape, mean, rstd, weight, bias, plain)
            b = grad.detach()
            stats = (mean, rstd)
            if needs[1] and refs[0] is not None and needs[2] and refs[1] is not None:
                scale, shift = _gradients(zk.scale_bias_grad, ctx.layout, x.detach(), b, *stats)
                refs[0].leave(ctx.pass_number, Dense(scale))
                refs[1].leave(ctx.pass_number, Dense(shift))
            elif needs[1] and refs[0] is not None:
                refs[0].leave(ctx.pass_number, Dense(_gradients(zk.scale_grad, ctx.layout, x.detach(), b, *stats)))
            elif needs[2] and refs[1] is not None:
                refs[1].leave(ctx.pass_number, Dense(bias_gradients(ctx.layout, b)))
            return *(g if p else None for g, p in zip(grads, plain, strict=True)), *[None] * 7


def _gradients(function: Any, layout: Layout, x: Tensor, b: Tensor, mean: Tensor, rstd: Tensor) -> Any:
    ids = layout.row_ids(b)
    ragged = {} if ids is None else {"example_ids": ids, "num_examples": layout.examples}
    rows = [layout.rows(y) for y in (x, b, mean, rstd)]
    mean, rstd = (y.squeeze(-1) for y in rows[2:])
    return function(rows[0], rows[1], mean=mean, rstd=rstd, **ragged)
