"""gram: the pairwise inner products of per-example gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zsl_kernels.backends import reference
from zsl_kernels.backends.dispatch import BACKENDS, plan_call
from zsl_kernels.ops.interference_backward import input_gradients
from zsl_kernels.ops.operands import RAGGED, check_pair, count, grouped
from zsl_kernels.ops.registration import Grads, define, differentiable, empty
from zsl_kernels.types import Cotangents
from zsl_kernels.validation import check_elements


def gram(
    a: Tensor,
    b: Tensor,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """``torch.einsum("iok,jok->ij", g, g2)``: pairwise inner products of per-example gradients.

    The result is (N, N) for one set of examples, or (N, M) between it and a second set.

    There are two algorithms, and :func:`plan` shows which one a call uses:

    - "direct" computes each tile of each gradient once;
    - "ghost" evaluates Σ_ts (a_it·a2_js)(b_it·b2_js) and computes no gradient. It is faster for short sequences in wide layers.

    Args:
        a, b: (N, T, K) and (N, T, O), or (R, K) and (R, O) with ``example_ids``.
        a2, b2: the second set, (M, T, K) and (M, T, O). Pass both or neither; neither with ``example_ids``.
        example_ids, num_examples, impl: as :func:`interference`.

    Raises: as :func:`interference`.
    """
    N = check_pair("a", a, "b", b, impl, example_ids, num_examples)
    if example_ids is not None and (a2 is not None or b2 is not None):
        raise ValueError("a2, b2: expected none with example_ids, which allow one set only; got a second set")
    if (a2 is None) != (b2 is None):
        raise ValueError(f"a2, b2: expected both or neither, got {'b2' if a2 is None else 'a2'} alone")
    if a2 is not None and b2 is not None:
        check_pair("a2", a2, "b2", b2, impl)
        for name, x, like in (("a2", a2, a), ("b2", b2, b)):
            if x.dtype != like.dtype or x.device != like.device:
                raise TypeError(f"{name}: expected {like.dtype} on {like.device}, the same as a and b, got {x.dtype} on {x.device}")
            if x.shape[1:] != like.shape[1:]:
                raise ValueError(f"{name}: expected (M, {like.shape[1]}, {like.shape[2]}) to match a and b, got {tuple(x.shape)}")
    check_elements("gram", N, N if a2 is None else a2.shape[0])
    if impl == "reference":
        return reference.gram(a, b, a2, b2, example_ids, N)
    return op(a, b, a2, b2, impl, example_ids, N)


def _gram(
    a: Tensor,
    b: Tensor,
    a2: Tensor | None,
    b2: Tensor | None,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
) -> Tensor:
    a, b, begin, _ = grouped(a, b, example_ids, num_examples)
    plan = plan_call("gram", a, b, impl=impl, a2=a2, num_examples=num_examples)
    return BACKENDS[plan.impl].gram(plan, a, b, a2, b2, begin)


def _gram_fake(
    a: Tensor,
    b: Tensor,
    a2: Tensor | None,
    b2: Tensor | None,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
) -> Tensor:
    N = count(a, example_ids, num_examples)
    return empty(a, N, N if a2 is None else a2.shape[0])


op = define(f"gram(Tensor a, Tensor b, Tensor? a2, Tensor? b2, str impl, {RAGGED}) -> Tensor", _gram, _gram_fake)


def _gram_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.impl, example_ids, ctx.num_examples = inputs
    ctx.save_for_backward(*tensors, example_ids)


def _gram_grad(ctx: Any, c: Tensor) -> Grads:
    a, b, a2, b2, ids = ctx.saved_tensors
    needs, none = ctx.needs_input_grad, Cotangents()
    if a2 is None:
        own = input_gradients(needs[:2], a, b, None, none, c + c.T, a, b, ctx.impl, ids, ctx.num_examples)
        return *own, None, None, None, None, None
    first = input_gradients(needs[:2], a, b, None, none, c, a2, b2, ctx.impl)
    second = input_gradients(needs[2:4], a2, b2, None, none, c.T, a, b, ctx.impl)
    return *first, *second, None, None, None


differentiable(op, _gram_setup, _gram_grad)
