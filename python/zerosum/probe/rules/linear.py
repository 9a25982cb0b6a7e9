"""The rules for products of rows with a matrix: ``F.linear``, ``x @ w``, ``mm`` and ``addmm``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zsl_kernels as zk
from zerosum.probe.contributions import Dense, OuterProduct
from zerosum.probe.layout import Layout, Uncovered
from zerosum.probe.rules.site import RuleContext, Site
from zsl_kernels.weight_uses import recorded


def rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _apply(context, *linear_arguments(*args, **kwargs), "linear")


def matmul_rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, weight = _matmul_arguments(*args, **kwargs)
    if context.ref(x) is None and x.ndim >= 2:
        if weight.ndim == 2:
            return _apply(context, x, weight, None, "matmul", _matmul, True)
        if weight.ndim == 3 and x.ndim >= 3 and weight.stride(0) == 0 and func.__name__ in ("bmm", "matmul", "__matmul__"):
            # One matrix that is expanded over a batch.
            return _apply(context, x, weight[0].mT, None, "matmul", lambda x, w, b: func(x, w.mT.expand(weight.shape)))
    elif context.ref(weight) is None and x.ndim == 2 and weight.ndim >= 2:
        return _apply(context, weight.mT, x, None, "matmul", lambda x, w, b: func(w, x.mT).mT).mT  # w x = (xᵀ wᵀ)ᵀ
    raise Uncovered("operands other than rows and a matrix")


def addmm_rule(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    bias, x, weight, scaled = addmm_arguments(*args, **kwargs)
    if context.ref(x) is not None or bias.ndim != 1 or scaled:
        raise Uncovered("operands other than a bias, rows and a matrix")
    return _apply(context, x, weight, bias, "addmm", _addmm, True)


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight


def _addmm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is not None
    return torch.addmm(bias, x, weight)


def _apply(
    context: RuleContext,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: str,
    product: Product = F.linear,
    transposed: bool = False,
) -> Tensor:
    """Compute the product of rows x with a matrix (O, K), or (K, O) if ``transposed``.

    The result is bitwise equal to the original call's.
    """
    ref = context.ref(weight)
    if ref is not None and context.ref(x) is not None:
        raise Uncovered("an input that is a weight")
    if weight.ndim != 2:
        raise Uncovered(f"a weight of {weight.ndim} dimensions")
    if ref is not None and ref.piece.repeats:
        raise Uncovered("a weight that repeats its entries")
    if context.ref(x) is not None or (bias is not None and bias.ndim != 1):
        raise Uncovered("operands other than rows, a matrix and a vector")
    # Under autocast, a gradient in the lower precision would be rounded on its way to the weight. The gathering node passes the
    # full one.
    autocast = torch.is_autocast_enabled(x.device.type)
    site, (w, bias) = Site.of(context, how, x.shape[:-1], weight, bias, alone=not autocast)
    if autocast:
        # The cast is outside of the function, so the backward pass keeps tensors in the lower precision, as it does without a
        # probe.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, bias = (y if y is None or y.dtype == torch.float64 else y.to(dtype) for y in (x, w, bias))  # type: ignore[assignment]
    return _Linear.apply(x, w, bias, product, transposed, context.anchor, site)


def linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bind F.linear's positional and keyword arguments."""
    return input, weight, bias


def _matmul_arguments(input: Tensor, other: Tensor | None = None, mat2: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return input, other if other is not None else mat2  # type: ignore[return-value]


def addmm_arguments(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> tuple[Tensor, Tensor, Tensor, bool]:
    return input, mat1, mat2, beta != 1 or alpha != 1


def bias_gradients(layout: Layout | None, grad: Tensor) -> Tensor:
    """Return each example's gradient (E, O) of a vector that is added to every row."""
    assert layout is not None
    return zk.bias_grad(layout.rows(grad), **layout.ragged(grad.device))


class _Linear(torch.autograd.Function):
    """F.linear; its backward pass stores the contributions to the gradients of weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product: Product,
        transposed: bool,
        anchor: Tensor,
        site: Site,
    ) -> Tensor:
        ctx.site, ctx.transposed = site, transposed
        ctx.save_for_backward(x, weight)
        y = product(x, weight, bias)
        # A view cannot be modified in place after a custom function, and a product of more than two dimensions is a view.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # (Torch functions stay on: a checkpoint recomputes the saved tensors here, and the mode must see it.)
        saved = ctx.saved_tensors
        grads = _backward(ctx.site, grad, saved, ctx.needs_input_grad[:3], ctx.transposed)
        return *grads, None, None, None, None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def backward(site: Site, grad: Tensor, saved: Sequence[Tensor], needs: Sequence[bool]) -> Gradients:
    """Return the gradients of rows, matrix and bias that are needed, from the tensors that the call saved."""
    return _backward(site, grad, saved, needs, False)


def addmm_backward(site: Site, grad: Tensor, saved: Sequence[Tensor], needs: Sequence[bool]) -> Gradients:
    """Like :func:`backward`, for a transposed matrix."""
    return _backward(site, grad, saved, needs, True)


def _backward(site: Site, grad: Tensor, saved: Sequence[Tensor], needs: Sequence[bool], transposed: bool) -> Gradients:
    x, weight = saved
    needs_x, needs_weight, needs_bias = needs
    with torch._C.DisableTorchFunction():
        grad_x = None
        if needs_x:
            matrix = weight.mT if transposed else weight
            grad_x = grad @ matrix if matrix.dtype == grad.dtype else grad @ matrix.to(grad.dtype)
            if grad_x.dtype != x.dtype:
                grad_x = grad_x.to(x.dtype)
        if site.named(grad):
            return grad_x, None, None
        grad_weight = grad_bias = of_product = of_bias = None
        if needs_weight:
            left, right = (x, grad) if transposed else (grad, x)
            if (source := site.at_once(product=True)) is not None:
                b, a = site.rows(left, grad.dtype), site.rows(right, grad.dtype)
                grad_weight = source.gradient_of_product(b, a)
                of_product = a, b
            else:
                grad_weight = _product_of(site, left, right, grad.dtype, weight.dtype)
        if needs_bias:
            if (source := site.at_once(1)) is not None:
                of_bias = site.rows(grad, grad.dtype)
                grad_bias = source.gradient_of_dense(bias_gradients(site.layout, grad))
            else:
                if site.plain(1):
                    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
                own = site.leave(lambda layout: Dense(bias_gradients(layout, grad.detach())), 1)
                grad_bias = grad_bias if own is None else own
        if site.known is not None and (needs_weight, needs_bias) == (of_product is not None, of_bias is not None):
            _plan(site, of_product, of_bias)
        return grad_x, grad_weight, grad_bias


def _plan(site: Site, of_product: tuple[Tensor, Tensor] | None, of_bias: Tensor | None) -> None:
    """Tell a known call how to run its next backward pass without Python.

    On a device it runs the calls recorded here. On the CPU it runs the direct kernel, if that algorithm is chosen.
    """
    known, layout = site.known, site.layout
    if layout is None or not layout.plain or known.planned(N := layout.examples):
        return
    product = vectors = None
    if of_product is not None:
        source = site.sources[0]
        product = recorded.product(*of_product, source.direction, source.gram)
    if of_bias is not None:
        source = site.sources[-1]
        vectors = recorded.of_bias(of_bias, source.flat_direction, source.gram)
    if product is not None or vectors is not None or of_product is None or not of_product[0].is_cpu:
        known.record(N, product, vectors)
        return
    a, b = of_product
    gram = site.sources[0].gram
    plan = zk.plan("interference", N=N, T=a.shape[1], K=a.shape[2], O=b.shape[2], gram=gram, dtype=a.dtype)
    known.plan(N, *(plan.tile if plan.impl == "cpu" else (0, 0)))


def _product_of(site: Site, left: Tensor, right: Tensor, dtype: torch.dtype, of: torch.dtype) -> Tensor | None:
    """Store the outer products of rows with the weight. Return the weight's gradient if autograd needs it."""
    plain = None
    if site.plain():
        a, b = (y.to(dtype).reshape(-1, y.shape[-1]) for y in (left, right))
        plain = (a.mT @ b).to(of)
    own = site.leave(lambda layout: _outer(layout, left.detach(), right.detach(), dtype))
    return plain if own is None else own


def _outer(layout: Layout, left: Tensor, right: Tensor, dtype: torch.dtype) -> OuterProduct:
    return OuterProduct(layout.rows(left.to(dtype)), layout.rows(right.to(dtype)), layout.ids)
