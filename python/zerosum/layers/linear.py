"""``F.linear(x, weight, bias)``, ``x @ weight`` and ``addmm(bias, x, weight)``, on rows (N, K), (N, T, K), (N·T, K), …"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zerosum.layers.broadcast import bias_gradients
from zerosum.layers.site import Site
from zerosum.provenance import Uncovered
from zerosum.uses import Dense, Product

if TYPE_CHECKING:
    from zerosum.capture import Capture


def rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _apply(capture, *_linear_arguments(*args, **kwargs), "linear")


def matmul_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, weight = _matmul_arguments(*args, **kwargs)
    if capture.ref(x) is not None or weight.ndim != 2 or x.ndim < 2:
        raise Uncovered("operands other than rows and a matrix")
    return _apply(capture, x, weight.mT, None, "matmul")


def addmm_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    bias, x, weight, scaled = _addmm_arguments(*args, **kwargs)
    if capture.ref(x) is not None or bias.ndim != 1 or scaled:
        raise Uncovered("operands other than a bias, rows and a matrix")
    return _apply(capture, x, weight.mT, bias, "addmm")


def _apply(capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None, how: str) -> Tensor:
    if capture.ref(x) is not None and capture.ref(weight) is not None:
        raise Uncovered("an input that is a weight")
    if weight.ndim != 2:
        raise Uncovered(f"a weight of {weight.ndim} dimensions")
    if (ref := capture.ref(weight)) is not None and ref.piece.repeats:
        raise Uncovered("a weight that repeats its entries")
    layout = capture.provenance.layout(x, 1)
    site, tensors = Site.of(capture, layout, how, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        # Outside of the function: what is kept for the backward pass is then of the lower precision, as it is without a probe.
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x if x.dtype == torch.float64 else x.to(dtype)
        tensors = [y if y is None or y.dtype == torch.float64 else y.to(dtype) for y in tensors]
    return _Linear.apply(x, *tensors, site)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Binds F.linear's positional and keyword arguments."""
    return input, weight, bias


def _matmul_arguments(input: Tensor, other: Tensor | None = None, mat2: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return input, other if other is not None else mat2  # type: ignore[return-value]


def _addmm_arguments(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> tuple[Tensor, Tensor, Tensor, bool]:
    return input, mat1, mat2, beta != 1 or alpha != 1


class _Linear(torch.autograd.Function):
    """F.linear whose backward leaves the weight's and the bias's parts of the gradient with them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: Site) -> Tensor:
        ctx.site = site
        ctx.save_for_backward(x, weight)
        y = F.linear(x, weight, bias)
        # A view cannot be modified in place after a custom function, and the product of more than two dimensions is one.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # (With torch functions on: a checkpoint computes the saved tensors again here, and the mode must see it.)
        x, weight = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            site, layout = ctx.site, ctx.site.layout
            needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
            grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if needs_x else None
            grad_weight = grad_bias = None
            if needs_weight:
                a, b = x.to(grad.dtype), grad
                site.leave(lambda: Product(layout.rows(b.detach()), layout.rows(a.detach()), layout.row_ids(a)))
                if site.plain():
                    grad_weight = (b.reshape(-1, b.shape[-1]).mT @ a.reshape(-1, a.shape[-1])).to(weight.dtype)
            if needs_bias:
                site.leave(lambda: Dense(bias_gradients(layout, grad.detach())), 1)
                if site.plain(1):
                    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
            return grad_x, grad_weight, grad_bias, None
