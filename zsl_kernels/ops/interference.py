"""interference: all sums and scalars of a weight's per-example gradients, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import call_cache
from zsl_kernels.backends import cpu, reference
from zsl_kernels.backends.dispatch import BACKENDS, derivative_impl, plan_call
from zsl_kernels.ops import weighted_grad
from zsl_kernels.ops.interference_backward import input_gradients
from zsl_kernels.ops.operands import EMBEDDING, RAGGED, check_direction, check_embedding, check_pair, count, embedding_of, grouped
from zsl_kernels.ops.registration import Grads, define, differentiable, empty, outside_autocast, sums_like
from zsl_kernels.tied import Embedding
from zsl_kernels.types import Cotangents, InterferenceSums
from zsl_kernels.validation import check_elements


def interference(
    a: Tensor,
    b: Tensor,
    *,
    direction: Tensor | None = None,
    gram: bool = False,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    embedding: tuple[Tensor, ...] | None = None,
    impl: str = "auto",
) -> InterferenceSums:
    """All sums and scalars of the per-example gradients in one pass. With ``g = torch.einsum("nto,ntk->nok", b, a)``::

        grad_sum = g.sum(0)             # (O, K), the weight gradient
        abs_sum  = g.abs().sum(0)       # (O, K)
        sq_sum   = g.square().sum(0)    # (O, K)
        l1       = g.abs().sum((1, 2))          # (N,)
        sq_norm  = g.square().sum((1, 2))       # (N,)
        dot      = (g * direction).sum((1, 2))          # (N,), with a direction
        abs_dot  = (g * direction).abs().sum((1, 2))    # (N,), with a direction
        gram     = torch.einsum("iok,jok->ij", g, g)    # (N, N), with gram=True

    The per-example scalars are accumulated in float64.

    Cost: about the time of computing ``grad_sum`` alone. Memory: the results and one tile per thread, independent of N and T. With
    ``gram``, each thread also stores one tile of every example, up to a fixed limit.

    Args:
        a: (N, T, K) inputs; (R, K) with ``example_ids``.
        b: (N, T, O) output gradients, of the dtype and device of ``a``; (R, O) with ``example_ids``.
        direction: (O, K), any floating dtype, for example a parameter's update.
        gram: whether to compute the pairwise inner products.
        example_ids: (R,) integers in [0, num_examples), in any order: the example of each row.
        num_examples: N. Required with ``example_ids``, otherwise None.
        embedding: a tuple (ids, e), for a weight that is also the table of an embedding. ``ids`` (N, S) are the looked-up rows,
            integers below O, and ``e`` (N, S, K), of any floating dtype, are the gradients with respect to the embedding's output.
            Then g_i = b_iᵀ a_i + Σ_s onehot(ids_is) e_isᵀ. Negative ids are skipped. With ``example_ids``, pass a tuple of three:
            ids (Q,), e (Q, K) and the example of each lookup (Q,).
        impl: see the package's documentation.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: an argument has the wrong shape or device, or ``impl`` is unknown.
        IndexError: an id is out of range. Only the CPU checks this: on other devices the check would need a synchronization.
        RuntimeError: the named ``impl`` is not available on this machine. The message gives the reason.
        NotImplementedError: in backward, if the derivative with respect to ``direction`` is needed together with ``embedding``.
    """
    kind = None
    if example_ids is None and num_examples is None and embedding is None:
        kind = call_cache.kind_of("interference", impl, bool(gram), a, b, direction)
        if kind is not None and (call := call_cache.find(kind)) is not None:
            return call(a, b, direction)
    N = check_pair("a", a, "b", b, impl, example_ids, num_examples)
    if direction is not None:
        check_direction(direction, a, b)
    if gram:
        check_elements("gram", N, N)
    if kind is not None:
        return call_cache.keep(kind, _call(a, b, direction, bool(gram), impl))(a, b, direction)
    tied = None if embedding is None else check_embedding(embedding, a, b, N, example_ids is not None)
    if impl == "reference":
        return reference.interference(a, b, direction, gram, example_ids, N, tied)
    return run(a, b, direction, bool(gram), impl, example_ids, N, tied)


def run(
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    gram: bool,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
    embedding: Embedding | None = None,
) -> InterferenceSums:
    """Call the op and replace results that were not requested by None."""
    sums = op(a, b, direction, gram, impl, example_ids, num_examples, *(embedding or ()))
    return InterferenceSums(*sums).asked_for(direction, gram)


def _call(a: Tensor, b: Tensor, direction: Tensor | None, gram: bool, impl: str) -> Callable[..., InterferenceSums]:
    """Return the function of (a, b, direction) that the op runs for operands like these, which are neither ragged nor tied."""
    plan = plan_call("interference", a, b, impl=impl, gram=gram)
    if plan.impl == "cpu":
        kernel, (rows, cols) = cpu.kernels.interference.default, plan.tile
        return lambda a, b, direction: InterferenceSums._make(kernel(a, b, direction, gram, rows, cols))
    backend = BACKENDS[plan.impl]
    call = call_cache.below_autograd(outside_autocast(lambda a, b, direction: backend.interference(plan, a, b, direction, gram)))
    return backend.prepare_interference(plan, a, b, direction, call)


def _interference(
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    gram: bool,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
    *embedding: Tensor | None,
) -> tuple[Tensor, ...]:
    a, b, begin, _ = grouped(a, b, example_ids, num_examples)
    tied = embedding_of(*embedding)
    added = tied and tied.added(count(a, example_ids, num_examples), b.shape[-1], a.dtype)
    plan = plan_call("interference", a, b, impl=impl, gram=gram, num_examples=num_examples, added=added is not None)
    sums = BACKENDS[plan.impl].interference(plan, a, b, direction, gram, begin, added)
    return tuple(empty(a, 0) if x is None else x for x in sums)


def _interference_fake(
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    gram: bool,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
    *embedding: Tensor | None,
) -> tuple[Tensor, ...]:
    return sums_like(a, (b.shape[-1], a.shape[-1]), count(a, example_ids, num_examples), direction, gram)


op = define(
    f"interference(Tensor a, Tensor b, Tensor? direction, bool gram, str impl, {RAGGED}, {EMBEDDING}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _interference,
    _interference_fake,
)


def _interference_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, direction, ctx.gram, ctx.impl, example_ids, ctx.num_examples, *embedding = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, direction, example_ids, *embedding)


def _interference_grad(ctx: Any, *cotangents: Tensor | None) -> Grads:
    a, b, u, example_ids, *embedding = ctx.saved_tensors
    N = count(a, example_ids, ctx.num_examples)
    *c_sums, c_gram = cotangents
    c = Cotangents(*c_sums)
    if u is None:
        c = c._replace(dot=None, abs_dot=None)
    mix = c_gram + c_gram.T if ctx.gram and c_gram is not None else None
    needs, tied = ctx.needs_input_grad, embedding[0] is not None
    da, db, *de = input_gradients(
        needs[:2], a, b, u, c, mix, a, b, ctx.impl, example_ids, ctx.num_examples, tuple(embedding), tied and needs[8]
    )
    du = None
    if ctx.needs_input_grad[2] and (c.dot is not None or c.abs_dot is not None):
        if tied:
            raise NotImplementedError("zsl_kernels: interference with embedding has no derivative with respect to direction")
        w = a.new_zeros(N, dtype=torch.float64) if c.dot is None else c.dot
        impl = derivative_impl(ctx.impl, "weighted_grad", a.device)
        du = weighted_grad.op(a, b, w, c.abs_dot, u, impl, example_ids, ctx.num_examples).to(u.dtype)
    return da, db, du, None, None, None, None, None, *de, None


differentiable(op, _interference_setup, _interference_grad)
