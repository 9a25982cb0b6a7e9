"""dense_interference: the statistics of per-example gradients that are already materialized."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from zsl_kernels import call_cache
from zsl_kernels.backends import cpu, dispatch, reference
from zsl_kernels.backends.dispatch import CPU, backend_for
from zsl_kernels.ops.registration import Grads, define, differentiable, empty, outside_autocast, sums_like
from zsl_kernels.types import Cotangents, InterferenceSums, sum_dtype
from zsl_kernels.validation import check_device, check_elements, check_tensor


def dense_interference(g: Tensor, *, direction: Tensor | None = None, gram: bool = False, impl: str = "auto") -> InterferenceSums:
    """``g.sum(0)``, ``g.abs().sum(0)`` and the other fields of :func:`zsl_kernels.interference`, for given gradients ``g``.

    Use it for parameters whose per-example gradients fit in memory, such as biases and scales. It reads ``g`` once and is
    differentiable in ``g`` and ``direction``.

    Args:
        g: (N, *shape), one gradient for each example.
        direction: (*shape), any floating dtype.
        gram: whether to compute the pairwise inner products.
        impl: see the package's documentation.

    Raises: the same errors as :func:`zsl_kernels.embedding_interference`.
    """
    kind = call_cache.kind_of("dense", impl, bool(gram), g, direction)
    if kind is not None and (call := call_cache.find(kind)) is not None:
        return call(g, direction)
    check_tensor("g", g)
    if g.ndim == 0:
        raise ValueError("g: expected a tensor (N, ...), one gradient for each example, got a scalar")
    check_elements("g", *g.shape)
    if gram:
        check_elements("gram", g.shape[0], g.shape[0])
    if direction is not None:
        check_tensor("direction", direction)
        if direction.shape != g.shape[1:]:
            raise ValueError(f"direction: expected the shape of one gradient, {tuple(g.shape[1:])}, got {tuple(direction.shape)}")
        check_device("direction", direction, "g", g)
    dispatch.impls_for(g.device, impl)
    if impl == "reference":
        return reference.interference_of(g.to(reference.sum_dtype(g.dtype)), direction, gram)
    if kind is not None:
        return call_cache.keep(kind, _call(g, bool(gram), impl))(g, direction)
    return InterferenceSums(*op(g, direction, bool(gram), impl)).asked_for(direction, gram)


def _call(g: Tensor, gram: bool, impl: str) -> Callable[..., InterferenceSums]:
    """Return the function of (g, direction) that the op runs for gradients like g."""
    backend = backend_for("dense_interference", g.device, impl, g.dtype)
    if backend is CPU:
        kernel = cpu.kernels.dense_interference.default
        return lambda g, direction: InterferenceSums._make(kernel(g, direction, gram))
    call = call_cache.below_autograd(outside_autocast(lambda g, direction: backend.dense_interference(g, direction, gram)))
    return backend.prepare(call, InterferenceSums._make)


def _dense(g: Tensor, direction: Tensor | None, gram: bool, impl: str) -> tuple[Tensor, ...]:
    sums = backend_for("dense_interference", g.device, impl, g.dtype).dense_interference(g, direction, gram)
    return tuple(empty(g, 0) if x is None else x for x in sums)


def _dense_fake(g: Tensor, direction: Tensor | None, gram: bool, impl: str) -> tuple[Tensor, ...]:
    return sums_like(g, g.shape[1:], g.shape[0], direction, gram)


op = define(
    "dense_interference(Tensor g, Tensor? direction, bool gram, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _dense,
    _dense_fake,
)


def _dense_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    g, direction, ctx.gram, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(g, direction)


def _dense_grad(ctx: Any, *cotangents: Tensor | None) -> Grads:
    g, u = ctx.saved_tensors
    *c_sums, c_gram = cotangents
    c = Cotangents(*c_sums)
    dtype = sum_dtype(g.dtype)
    wide, wide_u = g.to(dtype), None if u is None else u.to(dtype)

    def each(x: Tensor) -> Tensor:
        return x.reshape(x.shape + (1,) * (g.ndim - 1))

    dg = du = None
    if ctx.needs_input_grad[0]:
        s = c.derivative(wide, wide_u, each)
        if ctx.gram and c_gram is not None:
            flat = wide.reshape(g.shape[0], math.prod(g.shape[1:]))
            s = s + ((c_gram + c_gram.T) @ flat).view(g.shape)
        dg = s.to(g.dtype)
    if ctx.needs_input_grad[1] and wide_u is not None:
        terms = []
        if c.dot is not None:
            terms.append((each(c.dot) * wide).sum(0))
        if c.abs_dot is not None:
            terms.append((each(c.abs_dot) * wide.abs()).sum(0) * wide_u.sign())
        du = sum(terms[1:], terms[0]).to(u.dtype) if terms else None
    return dg, du, None, None


differentiable(op, _dense_setup, _dense_grad)
