"""The registered ops: schema, implementation, fake and autograd of each. Imports torch and, lazily, the backends.

A result that was not asked for is an empty tensor here, since an op's schema has no optional results; the public functions turn it
into None. Every derivative is an op too (``interference_backward``), so nothing is materialized on the way back either. They
can be differentiated once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import backends, chunked
from zsl_kernels.types import Cotangents, InterferenceSums, sum_dtype

_library = torch.library.Library("zsl", "DEF")

Grads = tuple[Tensor | None, ...]


def _define(schema: str, implementation: Callable, fake: Callable) -> None:
    name = f"zsl::{schema.split('(')[0]}"
    _library.define(schema)
    torch.library.impl(name, "CompositeExplicitAutograd", implementation, lib=_library)
    torch.library.register_fake(name, fake, lib=_library)


def _autograd(name: str, setup: Callable, backward: Callable) -> None:
    torch.library.register_autograd(f"zsl::{name}", backward, setup_context=setup, lib=_library)


def _empty(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=sum_dtype(x.dtype))


# interference ------------------------------------------------------------------------------------------------------------------


def _interference(a: Tensor, b: Tensor, direction: Tensor | None, gram: bool, impl: str) -> tuple[Tensor, ...]:
    plan = backends.plan_call("interference", a, b, impl=impl, gram=gram)
    if plan.impl == "cpu":
        sums = backends.cpu.interference(plan, a, b, direction, gram)
    else:
        sums = chunked.interference(a, b, direction, gram)
    return tuple(_empty(a, 0) if x is None else x for x in sums)


def _interference_fake(a: Tensor, b: Tensor, direction: Tensor | None, gram: bool, impl: str) -> tuple[Tensor, ...]:
    N, O, K = a.shape[0], b.shape[2], a.shape[2]
    along = (0,) if direction is None else (N,)
    shapes = [(O, K)] * 3 + [(N,)] * 2 + [along] * 2 + [(N, N) if gram else (0,)]
    return tuple(_empty(a, *shape) for shape in shapes)


def interference(a: Tensor, b: Tensor, direction: Tensor | None, gram: bool, impl: str) -> InterferenceSums:
    """The op with None for what was not asked for."""
    return InterferenceSums(*torch.ops.zsl.interference(a, b, direction, gram, impl)).asked_for(direction, gram)


def _interference_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, direction, ctx.gram, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, direction)


def _interference_grad(ctx: Any, *cotangents: Tensor | None) -> Grads:
    a, b, u = ctx.saved_tensors
    *c_sums, c_gram = cotangents
    c = Cotangents(*c_sums)
    if u is None:
        c = c._replace(dot=None, abs_dot=None)
    mix = c_gram + c_gram.T if ctx.gram and c_gram is not None else None
    da, db = _input_gradients(ctx.needs_input_grad[:2], a, b, u, c, mix, a, b, ctx.impl)
    du = None
    if ctx.needs_input_grad[2] and (c.dot is not None or c.abs_dot is not None):
        w = a.new_zeros(a.shape[0], dtype=torch.float64) if c.dot is None else c.dot
        du = torch.ops.zsl.weighted_grad(a, b, w, c.abs_dot, u, ctx.impl).to(u.dtype)
    return da, db, du, None, None


def _input_gradients(
    want: tuple[bool, bool],
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    c: Cotangents,
    mix: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    impl: str,
) -> tuple[Tensor | None, Tensor | None]:
    """da and db, as far as they are wanted and depend on anything."""
    if not any(want) or (mix is None and all(x is None for x in c)):
        return None, None
    da, db = torch.ops.zsl.interference_backward(a, b, direction, *c, mix, a2, b2, *want, impl)
    return da if want[0] else None, db if want[1] else None


def _interference_backward(a: Tensor, b: Tensor, direction: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *cotangents, mix, a2, b2, want_a, want_b, impl = rest
    plan = backends.plan_call("interference", a, b, impl=impl, gram=mix is not None)
    arguments = (a, b, direction, Cotangents(*cotangents), mix, a2, b2, (want_a, want_b))
    da, db = backends.cpu.backward(plan, *arguments) if plan.impl == "cpu" else chunked.backward(*arguments)
    return a.new_empty(0) if da is None else da, b.new_empty(0) if db is None else db


def _interference_backward_fake(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    want_a, want_b = rest[-3:-1]
    return a.new_empty(a.shape if want_a else (0,)), b.new_empty(b.shape if want_b else (0,))


_define(
    "interference(Tensor a, Tensor b, Tensor? direction, bool gram, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _interference,
    _interference_fake,
)
_autograd("interference", _interference_setup, _interference_grad)
_define(
    "interference_backward(Tensor a, Tensor b, Tensor? direction, Tensor? c_grad, Tensor? c_abs, Tensor? c_sq, Tensor? c_l1, "
    "Tensor? c_sqn, Tensor? c_dot, Tensor? c_absdot, Tensor? mix, Tensor a2, Tensor b2, bool want_a, bool want_b, str impl) -> "
    "(Tensor, Tensor)",
    _interference_backward,
    _interference_backward_fake,
)


def _refuse_second_derivative(ctx: Any, *cotangents: Tensor | None) -> Grads:
    raise NotImplementedError("zsl_kernels: these ops can be differentiated once; use impl='reference' for second derivatives")


_autograd("interference_backward", lambda ctx, inputs, output: None, _refuse_second_derivative)


# gram --------------------------------------------------------------------------------------------------------------------------


def _gram(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, impl: str) -> Tensor:
    plan = backends.plan_call("gram", a, b, impl=impl, a2=a2)
    return backends.cpu.gram(plan, a, b, a2, b2) if plan.impl == "cpu" else chunked.gram(a, b, a2, b2)


def _gram_fake(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, impl: str) -> Tensor:
    return _empty(a, a.shape[0], a.shape[0] if a2 is None else a2.shape[0])


def _gram_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _gram_grad(ctx: Any, c: Tensor) -> Grads:
    a, b, a2, b2 = ctx.saved_tensors
    needs, none = ctx.needs_input_grad, Cotangents()
    if a2 is None:
        return *_input_gradients(needs[:2], a, b, None, none, c + c.T, a, b, ctx.impl), None, None, None
    first = _input_gradients(needs[:2], a, b, None, none, c, a2, b2, ctx.impl)
    second = _input_gradients(needs[2:4], a2, b2, None, none, c.T, a, b, ctx.impl)
    return *first, *second, None


_define("gram(Tensor a, Tensor b, Tensor? a2, Tensor? b2, str impl) -> Tensor", _gram, _gram_fake)
_autograd("gram", _gram_setup, _gram_grad)


# sq_norm -----------------------------------------------------------------------------------------------------------------------


def _sq_norm(a: Tensor, b: Tensor, impl: str) -> Tensor:
    plan = backends.plan_call("sq_norm", a, b, impl=impl)
    return backends.cpu.sq_norm(plan, a, b) if plan.impl == "cpu" else chunked.sq_norm(a, b)


def _sq_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, ctx.impl = inputs
    ctx.save_for_backward(a, b)


def _sq_norm_grad(ctx: Any, c: Tensor) -> Grads:
    a, b = ctx.saved_tensors
    return *_input_gradients(ctx.needs_input_grad[:2], a, b, None, Cotangents(sq_norm=c), None, a, b, ctx.impl), None


_define("sq_norm(Tensor a, Tensor b, str impl) -> Tensor", _sq_norm, lambda a, b, impl: _empty(a, a.shape[0]))
_autograd("sq_norm", _sq_norm_setup, _sq_norm_grad)


# dot and weighted_grad, each other's derivatives ----------------------------------------------------------------------------------


def _scaled_product(c: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """c_i x_i matrix, in x's dtype."""
    return ((x.to(matrix.dtype) @ matrix) * c.to(matrix.dtype)[:, None, None]).to(x.dtype)


def _dot(a: Tensor, b: Tensor, direction: Tensor, impl: str) -> Tensor:
    plan = backends.plan_call("dot", a, b, impl=impl)
    return backends.cpu.dot(plan, a, b, direction) if plan.impl == "cpu" else chunked.dot(a, b, direction)


def _dot_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, direction, ctx.impl = inputs
    ctx.save_for_backward(a, b, direction)


def _dot_grad(ctx: Any, c: Tensor) -> Grads:
    a, b, u = ctx.saved_tensors
    da = _scaled_product(c, b, u.to(c.dtype)) if ctx.needs_input_grad[0] else None
    db = _scaled_product(c, a, u.to(c.dtype).T) if ctx.needs_input_grad[1] else None
    du = torch.ops.zsl.weighted_grad(a, b, c, None, None, ctx.impl).to(u.dtype) if ctx.needs_input_grad[2] else None
    return da, db, du, None


_define("dot(Tensor a, Tensor b, Tensor direction, str impl) -> Tensor", _dot, lambda a, b, direction, impl: _empty(a, a.shape[0]))
_autograd("dot", _dot_setup, _dot_grad)


def _weighted_grad(
    a: Tensor, b: Tensor, weights: Tensor, abs_weights: Tensor | None, direction: Tensor | None, impl: str
) -> Tensor:
    plan = backends.plan_call("weighted_grad", a, b, impl=impl)
    if plan.impl == "cpu":
        return backends.cpu.weighted_grad(plan, a, b, weights, abs_weights, direction)
    return chunked.weighted_grad(a, b, weights, abs_weights, direction)


def _weighted_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, weights, abs_weights, _, ctx.impl = inputs
    ctx.signed = abs_weights is not None  # a derivative itself
    ctx.save_for_backward(a, b, weights)


def _weighted_grad_grad(ctx: Any, c: Tensor) -> Grads:
    if ctx.signed:
        return _refuse_second_derivative(ctx, c)
    a, b, w = ctx.saved_tensors
    da = _scaled_product(w, b, c) if ctx.needs_input_grad[0] else None
    db = _scaled_product(w, a, c.T) if ctx.needs_input_grad[1] else None
    dw = torch.ops.zsl.dot(a, b, c, ctx.impl).to(w.dtype) if ctx.needs_input_grad[2] else None
    return da, db, dw, None, None, None


_define(
    "weighted_grad(Tensor a, Tensor b, Tensor weights, Tensor? abs_weights, Tensor? direction, str impl) -> Tensor",
    _weighted_grad,
    lambda a, b, weights, abs_weights, direction, impl: _empty(a, b.shape[2], a.shape[2]),
)
_autograd("weighted_grad", _weighted_grad_setup, _weighted_grad_grad)


# coordinate_sums ---------------------------------------------------------------------------------------------------------------


def _coordinate_sums(grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, direction: Tensor | None, impl: str) -> Tensor:
    form = backends.cpu if "cpu" in backends.impls_for(grad_sum.device, impl) else chunked
    return form.coordinate_sums(grad_sum, abs_sum, sq_sum, direction)


_define(
    "coordinate_sums(Tensor grad_sum, Tensor abs_sum, Tensor sq_sum, Tensor? direction, str impl) -> Tensor",
    _coordinate_sums,
    lambda grad_sum, abs_sum, sq_sum, direction, impl: grad_sum.new_empty(8, dtype=torch.float64),
)
