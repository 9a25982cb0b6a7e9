"""sq_norm: the squared norm of each per-example gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zsl_kernels.backends import reference
from zsl_kernels.backends.dispatch import BACKENDS, plan_call
from zsl_kernels.ops.interference_backward import input_gradients
from zsl_kernels.ops.operands import RAGGED, check_pair, count, grouped
from zsl_kernels.ops.registration import Grads, define, differentiable, empty
from zsl_kernels.types import Cotangents


def sq_norm(
    a: Tensor, b: Tensor, *, example_ids: Tensor | None = None, num_examples: int | None = None, impl: str = "auto"
) -> Tensor:
    """``g.square().sum((1, 2))``: the squared norm of each example's gradient.

    Returns (N,). The arguments and errors are those of :func:`interference`.
    """
    N = check_pair("a", a, "b", b, impl, example_ids, num_examples)
    if impl == "reference":
        return reference.sq_norm(a, b, example_ids, N)
    return op(a, b, impl, example_ids, N)


def _sq_norm(a: Tensor, b: Tensor, impl: str, example_ids: Tensor | None = None, num_examples: int = 0) -> Tensor:
    a, b, begin, _ = grouped(a, b, example_ids, num_examples)
    plan = plan_call("sq_norm", a, b, impl=impl, num_examples=num_examples)
    return BACKENDS[plan.impl].sq_norm(plan, a, b, begin)


def _sq_norm_fake(a: Tensor, b: Tensor, impl: str, example_ids: Tensor | None = None, num_examples: int = 0) -> Tensor:
    return empty(a, count(a, example_ids, num_examples))


op = define(f"sq_norm(Tensor a, Tensor b, str impl, {RAGGED}) -> Tensor", _sq_norm, _sq_norm_fake)


def _sq_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, ctx.impl, example_ids, ctx.num_examples = inputs
    ctx.save_for_backward(a, b, example_ids)


def _sq_norm_grad(ctx: Any, c: Tensor) -> Grads:
    a, b, ids = ctx.saved_tensors
    needs, c_norm = ctx.needs_input_grad[:2], Cotangents(sq_norm=c)
    return *input_gradients(needs, a, b, None, c_norm, None, a, b, ctx.impl, ids, ctx.num_examples), None, None, None


differentiable(op, _sq_norm_setup, _sq_norm_grad)
