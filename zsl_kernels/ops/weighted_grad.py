"""weighted_grad: a weighted sum of per-example gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zsl_kernels.backends import reference
from zsl_kernels.backends.dispatch import BACKENDS, plan_call
from zsl_kernels.ops.operands import RAGGED, check_pair, grouped
from zsl_kernels.ops.registration import Grads, define, differentiable, empty, refuse_second_derivative
from zsl_kernels.validation import check_device, check_tensor


def weighted_grad(
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    *,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """``torch.einsum("n,nok->ok", weights, g)``: the weighted sum of the examples' gradients, for ``weights`` (N,).

    Returns (O, K), which is the gradient that per-example clipping and example reweighting need. The other arguments and the
    errors are those of :func:`interference`.
    """
    N = check_pair("a", a, "b", b, impl, example_ids, num_examples)
    check_tensor("weights", weights)
    if weights.shape != (N,):
        raise ValueError(f"weights: expected shape ({N},), one weight for each example, got {tuple(weights.shape)}")
    check_device("weights", weights, "a", a)
    if impl == "reference":
        return reference.weighted_grad(a, b, weights, example_ids, N)
    return op(a, b, weights, None, None, impl, example_ids, N)


def _weighted_grad(
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    abs_weights: Tensor | None,
    direction: Tensor | None,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
) -> Tensor:
    a, b, begin, _ = grouped(a, b, example_ids, num_examples)
    plan = plan_call("weighted_grad", a, b, impl=impl, num_examples=num_examples)
    return BACKENDS[plan.impl].weighted_grad(plan, a, b, weights, abs_weights, direction, begin)


def _weighted_grad_fake(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return empty(a, b.shape[-1], a.shape[-1])


op = define(
    f"weighted_grad(Tensor a, Tensor b, Tensor weights, Tensor? abs_weights, Tensor? direction, str impl, {RAGGED}) -> Tensor",
    _weighted_grad,
    _weighted_grad_fake,
)


def _weighted_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, weights, abs_weights, _, ctx.impl, example_ids, ctx.num_examples = inputs
    ctx.signed = abs_weights is not None  # then this call is itself a derivative
    ctx.save_for_backward(a, b, weights, example_ids)


def _weighted_grad_grad(ctx: Any, c: Tensor) -> Grads:
    if ctx.signed:
        return refuse_second_derivative(ctx, c)
    from zsl_kernels.ops import dot  # imported here: the two modules are each other's derivative

    a, b, w, ids = ctx.saved_tensors
    da = scaled_product(w, b, c, ids) if ctx.needs_input_grad[0] else None
    db = scaled_product(w, a, c.T, ids) if ctx.needs_input_grad[1] else None
    dw = dot.op(a, b, c, ctx.impl, ids, ctx.num_examples).to(w.dtype) if ctx.needs_input_grad[2] else None
    return da, db, dw, None, None, None, None, None


def scaled_product(c: Tensor, x: Tensor, matrix: Tensor, example_ids: Tensor | None) -> Tensor:
    """Return c_i x_i @ matrix for every example i, in the dtype of x."""
    c = c.to(matrix.dtype)
    c = c[:, None, None] if example_ids is None else c[example_ids.long(), None]
    return ((x.to(matrix.dtype) @ matrix) * c).to(x.dtype)


differentiable(op, _weighted_grad_setup, _weighted_grad_grad)
