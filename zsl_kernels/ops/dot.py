"""dot: the inner product of each per-example gradient with a direction."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zsl_kernels.backends import reference
from zsl_kernels.backends.dispatch import BACKENDS, plan_call
from zsl_kernels.ops import weighted_grad
from zsl_kernels.ops.operands import RAGGED, check_direction, check_pair, count, grouped
from zsl_kernels.ops.registration import Grads, define, differentiable, empty
from zsl_kernels.ops.weighted_grad import scaled_product


def dot(
    a: Tensor,
    b: Tensor,
    direction: Tensor,
    *,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """``(g * direction).sum((1, 2))``: the inner product of each example's gradient with ``direction`` (O, K).

    Returns (N,). The arguments and errors are those of :func:`interference`.
    """
    N = check_pair("a", a, "b", b, impl, example_ids, num_examples)
    check_direction(direction, a, b)
    if impl == "reference":
        return reference.dot(a, b, direction, example_ids, N)
    return op(a, b, direction, impl, example_ids, N)


def _dot(a: Tensor, b: Tensor, direction: Tensor, impl: str, example_ids: Tensor | None = None, num_examples: int = 0) -> Tensor:
    a, b, begin, _ = grouped(a, b, example_ids, num_examples)
    plan = plan_call("dot", a, b, impl=impl, num_examples=num_examples)
    return BACKENDS[plan.impl].dot(plan, a, b, direction, begin)


def _dot_fake(
    a: Tensor, b: Tensor, direction: Tensor, impl: str, example_ids: Tensor | None = None, num_examples: int = 0
) -> Tensor:
    return empty(a, count(a, example_ids, num_examples))


op = define(f"dot(Tensor a, Tensor b, Tensor direction, str impl, {RAGGED}) -> Tensor", _dot, _dot_fake)


def _dot_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, direction, ctx.impl, example_ids, ctx.num_examples = inputs
    ctx.save_for_backward(a, b, direction, example_ids)


def _dot_grad(ctx: Any, c: Tensor) -> Grads:
    a, b, u, ids = ctx.saved_tensors
    da = scaled_product(c, b, u.to(c.dtype), ids) if ctx.needs_input_grad[0] else None
    db = scaled_product(c, a, u.to(c.dtype).T, ids) if ctx.needs_input_grad[1] else None
    du = None
    if ctx.needs_input_grad[2]:
        du = weighted_grad.op(a, b, c, None, None, ctx.impl, ids, ctx.num_examples).to(u.dtype)
    return da, db, du, None, None, None


differentiable(op, _dot_setup, _dot_grad)
