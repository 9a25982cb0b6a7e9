"""interference_backward: the derivative of interference, gram and sq_norm. It does not materialize per-example gradients either."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zsl_kernels.backends.dispatch import BACKENDS, derivative_impl, plan_call
from zsl_kernels.ops.operands import count, embedding_of, grouped
from zsl_kernels.ops.registration import define, differentiable_never
from zsl_kernels.types import Cotangents


def input_gradients(
    want: tuple[bool, bool],
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    c: Cotangents,
    mix: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
    embedding: tuple[Tensor | None, ...] = (None, None, None),
    want_e: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the derivatives with respect to a, b and, with ``embedding``, the embedding's gradients.

    A derivative that is not wanted, or that no cotangent contributes to, is None.
    """
    wants = (*want, want_e)[: 2 if embedding[0] is None else 3]
    if not any(wants) or (mix is None and all(x is None for x in c)):
        return (None,) * len(wants)
    arguments = (a, b, direction, *c, mix, a2, b2, *want, want_e, impl, example_ids, num_examples, *embedding)
    found = op(*arguments)
    return tuple(x if wanted else None for x, wanted in zip(found, wants, strict=False))


def _interference_backward(a: Tensor, b: Tensor, direction: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *cotangents, mix, a2, b2, want_a, want_b, want_e, impl, example_ids, num_examples = rest[:16]
    tied = embedding_of(*rest[16:])
    a, b, begin, groups = grouped(a, b, example_ids, num_examples)
    if groups is not None:
        a2, b2 = a, b  # with ragged rows the second set is always the first
    added = tied and tied.added(count(a, example_ids, num_examples), b.shape[-1], a.dtype)
    impl = derivative_impl(impl, "interference_backward", a.device)
    plan = plan_call(
        "interference_backward", a, b, impl=impl, gram=mix is not None, num_examples=num_examples, added=added is not None
    )
    arguments = (a, b, direction, Cotangents(*cotangents), mix, a2, b2, (want_a, want_b, want_e), begin, added)
    da, db, d_added = BACKENDS[plan.impl].interference_backward(plan, *arguments)
    if groups is not None:
        da, db = (None if x is None else groups.scatter(x) for x in (da, db))
    de = added.each_row(d_added).to(tied.grads.dtype) if added and tied and d_added is not None else None
    return tuple(a.new_empty(0) if x is None else x for x in (da, db, de))


def _interference_backward_fake(a: Tensor, b: Tensor, direction: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    want_a, want_b, want_e = rest[10:13]
    e = rest[17] if want_e else a
    return tuple(x.new_empty(x.shape if want else (0,)) for x, want in ((a, want_a), (b, want_b), (e, want_e)))


op = define(
    "interference_backward(Tensor a, Tensor b, Tensor? direction, Tensor? c_grad, Tensor? c_abs, Tensor? c_sq, Tensor? c_l1, "
    "Tensor? c_sqn, Tensor? c_dot, Tensor? c_absdot, Tensor? mix, Tensor a2, Tensor b2, bool want_a, bool want_b, bool want_e, "
    "str impl, Tensor? example_ids, SymInt num_examples, Tensor? embedding_ids, Tensor? embedding_grads, "
    "Tensor? embedding_example_ids) -> (Tensor, Tensor, Tensor)",
    _interference_backward,
    _interference_backward_fake,
)
differentiable_never(op)
