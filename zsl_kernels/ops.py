"""The registered ops: schema, implementation, fake and autograd of each. Imports torch and, lazily, the backends.

A result that was not asked for is an empty tensor here, since an op's schema has no optional results; the public functions turn it
into None. Every derivative is an op too (``interference_backward``), so nothing is materialized on the way back either. They
can be differentiated once.

The last arguments are for ragged rows, ``example_ids`` and ``num_examples`` (rows.py), and for the embedding's part of a tied
weight. Ragged ``a`` and ``b`` are 2-D.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import backends, chunked, shortcut
from zsl_kernels.plan import Plan
from zsl_kernels.rows import Embedding, Groups, group
from zsl_kernels.types import CoordinateSums, Cotangents, InterferenceSums, sum_dtype

_library = torch.library.Library("zsl", "DEF")

Grads = tuple[Tensor | None, ...]


def _outside_autocast(function: Callable) -> Callable:
    """The operands' dtypes are meant: autocast would round those of PyTorch's own products, and the results."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*arguments)
        device = next((x.device.type for x in arguments if isinstance(x, Tensor)), None)
        # A backward whose results have no cotangents has no tensor, and nothing to compute.
        if device is None or not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


def _define(schema: str, implementation: Callable, fake: Callable) -> None:
    name = f"zsl::{schema.split('(')[0]}"
    _library.define(schema)
    torch.library.impl(name, "CompositeExplicitAutograd", _outside_autocast(implementation), lib=_library)
    torch.library.register_fake(name, fake, lib=_library)


def _autograd(name: str, setup: Callable, backward: Callable) -> None:
    torch.library.register_autograd(f"zsl::{name}", _outside_autocast(backward), setup_context=setup, lib=_library)


def _empty(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=sum_dtype(x.dtype))


_RAGGED = "Tensor? example_ids=None, SymInt num_examples=0"
_EMBEDDING = "Tensor? embedding_ids=None, Tensor? embedding_grads=None, Tensor? embedding_example_ids=None"


def _examples(a: Tensor, example_ids: Tensor | None, num_examples: int) -> int:
    """N."""
    return a.shape[0] if example_ids is None else num_examples


def _grouped(
    a: Tensor, b: Tensor, example_ids: Tensor | None, num_examples: int
) -> tuple[Tensor, Tensor, Tensor | None, Groups | None]:
    """a and b as the backends want them, and with ragged rows their offsets and how they were grouped."""
    if example_ids is None:
        return a, b, None, None
    groups = group(example_ids, num_examples)
    return groups.gather(a), groups.gather(b), groups.begin, groups


def _embedding(ids: Tensor | None = None, grads: Tensor | None = None, example_ids: Tensor | None = None) -> Embedding | None:
    return None if ids is None or grads is None or example_ids is None else Embedding(ids, grads, example_ids)


def _run(plan: Plan, name: str, *arguments: Any) -> Any:
    """The function ``name`` of the backend that the plan chose."""
    if plan.impl == "chunked":
        return getattr(chunked, name)(*arguments)
    return getattr(backends.module(plan.impl), name)(plan, *arguments)


# interference ------------------------------------------------------------------------------------------------------------------


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
    a, b, begin, _ = _grouped(a, b, example_ids, num_examples)
    tied = _embedding(*embedding)
    added = tied and tied.added(_examples(a, example_ids, num_examples), b.shape[-1], a.dtype)
    plan = backends.plan_call("interference", a, b, impl=impl, gram=gram, num_examples=num_examples, added=added is not None)
    sums = _run(plan, "interference", a, b, direction, gram, begin, added)
    return tuple(_empty(a, 0) if x is None else x for x in sums)


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
    N, O, K = _examples(a, example_ids, num_examples), b.shape[-1], a.shape[-1]
    along = (0,) if direction is None else (N,)
    shapes = [(O, K)] * 3 + [(N,)] * 2 + [along] * 2 + [(N, N) if gram else (0,)]
    return tuple(_empty(a, *shape) for shape in shapes)


def interference(
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    gram: bool,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
    embedding: Embedding | None = None,
) -> InterferenceSums:
    """The op with None for what was not asked for."""
    sums = torch.ops.zsl.interference(a, b, direction, gram, impl, example_ids, num_examples, *(embedding or ()))
    return InterferenceSums(*sums).asked_for(direction, gram)


def interference_call(a: Tensor, b: Tensor, gram: bool, impl: str) -> Callable[..., InterferenceSums]:
    """What the op comes to for operands like these, neither ragged nor tied: a function of a, b and the direction."""
    plan = backends.plan_call("interference", a, b, impl=impl, gram=gram)
    if plan.impl == "cpu":
        kernel, (rows, cols) = torch.ops.zsl_cpu.interference.default, plan.tile
        return lambda a, b, direction: InterferenceSums._make(kernel(a, b, direction, gram, rows, cols))

    def call(a: Tensor, b: Tensor, direction: Tensor | None) -> InterferenceSums:
        return _run(plan, "interference", a, b, direction, gram)

    return shortcut.below_autograd(_outside_autocast(call))


def _interference_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, direction, ctx.gram, ctx.impl, example_ids, ctx.num_examples, *embedding = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, direction, example_ids, *embedding)


def _interference_grad(ctx: Any, *cotangents: Tensor | None) -> Grads:
    a, b, u, example_ids, *embedding = ctx.saved_tensors
    N = _examples(a, example_ids, ctx.num_examples)
    *c_sums, c_gram = cotangents
    c = Cotangents(*c_sums)
    if u is None:
        c = c._replace(dot=None, abs_dot=None)
    mix = c_gram + c_gram.T if ctx.gram and c_gram is not None else None
    needs, tied = ctx.needs_input_grad, embedding[0] is not None
    da, db, *de = _input_gradients(
        needs[:2], a, b, u, c, mix, a, b, ctx.impl, example_ids, ctx.num_examples, tuple(embedding), tied and needs[8]
    )
    du = None
    if ctx.needs_input_grad[2] and (c.dot is not None or c.abs_dot is not None):
        if tied:
            raise NotImplementedError("zsl_kernels: with embedding=, interference has no derivative along direction")
        w = a.new_zeros(N, dtype=torch.float64) if c.dot is None else c.dot
        impl = backends.derivative_impl(ctx.impl, "weighted_grad")
        du = torch.ops.zsl.weighted_grad(a, b, w, c.abs_dot, u, impl, example_ids, ctx.num_examples).to(u.dtype)
    return da, db, du, None, None, None, None, None, *de, None


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
    example_ids: Tensor | None = None,
    num_examples: int = 0,
    embedding: tuple[Tensor | None, ...] = (None, None, None),
    want_e: bool = False,
) -> tuple[Tensor | None, ...]:
    """da, db and, with ``embedding``, that of its gradients, as far as they are wanted and depend on anything."""
    wants = (*want, want_e)[: 2 if embedding[0] is None else 3]
    if not any(wants) or (mix is None and all(x is None for x in c)):
        return (None,) * len(wants)
    arguments = (a, b, direction, *c, mix, a2, b2, *want, want_e, impl, example_ids, num_examples, *embedding)
    found = torch.ops.zsl.interference_backward(*arguments)
    return tuple(x if wanted else None for x, wanted in zip(found, wants, strict=False))


def _interference_backward(a: Tensor, b: Tensor, direction: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *cotangents, mix, a2, b2, want_a, want_b, want_e, impl, example_ids, num_examples = rest[:16]
    tied = _embedding(*rest[16:])
    a, b, begin, groups = _grouped(a, b, example_ids, num_examples)
    if groups is not None:
        a2, b2 = a, b  # ragged rows have no second set but themselves
    added = tied and tied.added(_examples(a, example_ids, num_examples), b.shape[-1], a.dtype)
    impl = backends.derivative_impl(impl, "interference_backward")
    plan = backends.plan_call(
        "interference_backward", a, b, impl=impl, gram=mix is not None, num_examples=num_examples, added=added is not None
    )
    arguments = (a, b, direction, Cotangents(*cotangents), mix, a2, b2, (want_a, want_b, want_e), begin, added)
    da, db, d_added = _run(plan, "backward", *arguments)
    if groups is not None:
        da, db = (None if x is None else groups.scatter(x) for x in (da, db))
    de = added.each_row(d_added).to(tied.grads.dtype) if added and tied and d_added is not None else None
    return tuple(a.new_empty(0) if x is None else x for x in (da, db, de))


def _interference_backward_fake(a: Tensor, b: Tensor, direction: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    want_a, want_b, want_e = rest[10:13]
    e = rest[17] if want_e else a
    return tuple(x.new_empty(x.shape if want else (0,)) for x, want in ((a, want_a), (b, want_b), (e, want_e)))


_define(
    f"interference(Tensor a, Tensor b, Tensor? direction, bool gram, str impl, {_RAGGED}, {_EMBEDDING}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _interference,
    _interference_fake,
)
_autograd("interference", _interference_setup, _interference_grad)
_define(
    "interference_backward(Tensor a, Tensor b, Tensor? direction, Tensor? c_grad, Tensor? c_abs, Tensor? c_sq, Tensor? c_l1, "
    "Tensor? c_sqn, Tensor? c_dot, Tensor? c_absdot, Tensor? mix, Tensor a2, Tensor b2, bool want_a, bool want_b, bool want_e, "
    "str impl, Tensor? example_ids, SymInt num_examples, Tensor? embedding_ids, Tensor? embedding_grads, "
    "Tensor? embedding_example_ids) -> (Tensor, Tensor, Tensor)",
    _interference_backward,
    _interference_backward_fake,
)


def _refuse_second_derivative(ctx: Any, *cotangents: Tensor | None) -> Grads:
    raise NotImplementedError("zsl_kernels: these ops can be differentiated once; use impl='reference' for second derivatives")


_autograd("interference_backward", lambda ctx, inputs, output: None, _refuse_second_derivative)


# gram --------------------------------------------------------------------------------------------------------------------------


def _gram(
    a: Tensor,
    b: Tensor,
    a2: Tensor | None,
    b2: Tensor | None,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
) -> Tensor:
    a, b, begin, _ = _grouped(a, b, example_ids, num_examples)
    plan = backends.plan_call("gram", a, b, impl=impl, a2=a2, num_examples=num_examples)
    return _run(plan, "gram", a, b, a2, b2, begin)


def _gram_fake(
    a: Tensor,
    b: Tensor,
    a2: Tensor | None,
    b2: Tensor | None,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
) -> Tensor:
    N = _examples(a, example_ids, num_examples)
    return _empty(a, N, N if a2 is None else a2.shape[0])


def _gram_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.impl, example_ids, ctx.num_examples = inputs
    ctx.save_for_backward(*tensors, example_ids)


def _gram_grad(ctx: Any, c: Tensor) -> Grads:
    a, b, a2, b2, ids = ctx.saved_tensors
    needs, none = ctx.needs_input_grad, Cotangents()
    if a2 is None:
        own = _input_gradients(needs[:2], a, b, None, none, c + c.T, a, b, ctx.impl, ids, ctx.num_examples)
        return *own, None, None, None, None, None
    first = _input_gradients(needs[:2], a, b, None, none, c, a2, b2, ctx.impl)
    second = _input_gradients(needs[2:4], a2, b2, None, none, c.T, a, b, ctx.impl)
    return *first, *second, None, None, None


_define(f"gram(Tensor a, Tensor b, Tensor? a2, Tensor? b2, str impl, {_RAGGED}) -> Tensor", _gram, _gram_fake)
_autograd("gram", _gram_setup, _gram_grad)


# sq_norm -----------------------------------------------------------------------------------------------------------------------


def _sq_norm(a: Tensor, b: Tensor, impl: str, example_ids: Tensor | None = None, num_examples: int = 0) -> Tensor:
    a, b, begin, _ = _grouped(a, b, example_ids, num_examples)
    plan = backends.plan_call("sq_norm", a, b, impl=impl, num_examples=num_examples)
    return _run(plan, "sq_norm", a, b, begin)


def _sq_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, ctx.impl, example_ids, ctx.num_examples = inputs
    ctx.save_for_backward(a, b, example_ids)


def _sq_norm_grad(ctx: Any, c: Tensor) -> Grads:
    a, b, ids = ctx.saved_tensors
    needs, c_norm = ctx.needs_input_grad[:2], Cotangents(sq_norm=c)
    return *_input_gradients(needs, a, b, None, c_norm, None, a, b, ctx.impl, ids, ctx.num_examples), None, None, None


_define(
    f"sq_norm(Tensor a, Tensor b, str impl, {_RAGGED}) -> Tensor",
    _sq_norm,
    lambda a, b, impl, ids=None, N=0: _empty(a, _examples(a, ids, N)),
)
_autograd("sq_norm", _sq_norm_setup, _sq_norm_grad)


# dot and weighted_grad, each other's derivatives ----------------------------------------------------------------------------------


def _scaled_product(c: Tensor, x: Tensor, matrix: Tensor, example_ids: Tensor | None) -> Tensor:
    """c_i x_i matrix, in x's dtype."""
    c = c.to(matrix.dtype)
    c = c[:, None, None] if example_ids is None else c[example_ids.long(), None]
    return ((x.to(matrix.dtype) @ matrix) * c).to(x.dtype)


def _dot(a: Tensor, b: Tensor, direction: Tensor, impl: str, example_ids: Tensor | None = None, num_examples: int = 0) -> Tensor:
    a, b, begin, _ = _grouped(a, b, example_ids, num_examples)
    plan = backends.plan_call("dot", a, b, impl=impl, num_examples=num_examples)
    return _run(plan, "dot", a, b, direction, begin)


def _dot_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, direction, ctx.impl, example_ids, ctx.num_examples = inputs
    ctx.save_for_backward(a, b, direction, example_ids)


def _dot_grad(ctx: Any, c: Tensor) -> Grads:
    a, b, u, ids = ctx.saved_tensors
    da = _scaled_product(c, b, u.to(c.dtype), ids) if ctx.needs_input_grad[0] else None
    db = _scaled_product(c, a, u.to(c.dtype).T, ids) if ctx.needs_input_grad[1] else None
    du = None
    if ctx.needs_input_grad[2]:
        du = torch.ops.zsl.weighted_grad(a, b, c, None, None, ctx.impl, ids, ctx.num_examples).to(u.dtype)
    return da, db, du, None, None, None


_define(
    f"dot(Tensor a, Tensor b, Tensor direction, str impl, {_RAGGED}) -> Tensor",
    _dot,
    lambda a, b, direction, impl, ids=None, N=0: _empty(a, _examples(a, ids, N)),
)
_autograd("dot", _dot_setup, _dot_grad)


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
    a, b, begin, _ = _grouped(a, b, example_ids, num_examples)
    plan = backends.plan_call("weighted_grad", a, b, impl=impl, num_examples=num_examples)
    return _run(plan, "weighted_grad", a, b, weights, abs_weights, direction, begin)


def _weighted_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, weights, abs_weights, _, ctx.impl, example_ids, ctx.num_examples = inputs
    ctx.signed = abs_weights is not None  # a derivative itself
    ctx.save_for_backward(a, b, weights, example_ids)


def _weighted_grad_grad(ctx: Any, c: Tensor) -> Grads:
    if ctx.signed:
        return _refuse_second_derivative(ctx, c)
    a, b, w, ids = ctx.saved_tensors
    da = _scaled_product(w, b, c, ids) if ctx.needs_input_grad[0] else None
    db = _scaled_product(w, a, c.T, ids) if ctx.needs_input_grad[1] else None
    dw = torch.ops.zsl.dot(a, b, c, ctx.impl, ids, ctx.num_examples).to(w.dtype) if ctx.needs_input_grad[2] else None
    return da, db, dw, None, None, None, None, None


_define(
    f"weighted_grad(Tensor a, Tensor b, Tensor weights, Tensor? abs_weights, Tensor? direction, str impl, {_RAGGED}) -> Tensor",
    _weighted_grad,
    lambda a, b, weights, abs_weights, direction, impl, ids=None, N=0: _empty(a, b.shape[-1], a.shape[-1]),
)
_autograd("weighted_grad", _weighted_grad_setup, _weighted_grad_grad)


# coordinate_sums ---------------------------------------------------------------------------------------------------------------


def _coordinate_form(like: Tensor, impl: str) -> Any:
    owner = backends.impls_for(like.device, impl, "coordinate_sums", like.dtype)[0]
    return chunked if owner == "chunked" else backends.module(owner)


def _coordinate_sums(grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, direction: Tensor | None, impl: str) -> Tensor:
    return _coordinate_form(grad_sum, impl).coordinate_sums(grad_sum, abs_sum, sq_sum, direction)


def _coordinate_sums_of_many(
    grad_sums: Sequence[Tensor],
    abs_sums: Sequence[Tensor],
    sq_sums: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    impl: str,
) -> Tensor:
    if not grad_sums:  # on no device
        if impl not in backends.IMPLS:
            raise ValueError(f"impl: expected one of {', '.join(backends.IMPLS)}, got {impl!r}")
        return torch.empty(0, len(CoordinateSums._fields), dtype=torch.float64)
    lists = grad_sums, abs_sums, sq_sums, directions or [None] * len(grad_sums)
    forms = {x.dtype: _coordinate_form(x, impl) for x in grad_sums}
    if len(set(forms.values())) == 1:
        return forms[grad_sums[0].dtype].coordinate_sums_of_many(*lists)
    # Of some dtypes one implementation has no kernel. The rows are put together without an index, which would wait for a device.
    rows: dict[int, Tensor] = {}
    for form in set(forms.values()):
        places = [w for w, x in enumerate(grad_sums) if forms[x.dtype] is form]
        found = form.coordinate_sums_of_many(*([x[w] for w in places] for x in lists))
        rows.update(zip(places, found.unbind(), strict=True))
    return torch.stack([rows[w] for w in range(len(grad_sums))])


def _coordinate_sums_of_many_fake(grad_sums: Sequence[Tensor], *rest: Any) -> Tensor:
    size = (len(grad_sums), len(CoordinateSums._fields))
    return grad_sums[0].new_empty(size, dtype=torch.float64) if grad_sums else torch.empty(size, dtype=torch.float64)


def coordinates_at_once(impl: str, *lists: list[Any]) -> Tensor | None:
    """coordinate_sums_of_many on the CPU without the registered op. None where that is not the way, or something is wrong with the
    arguments: to look for it takes longer than the sums."""
    if impl not in ("auto", "cpu") or backends.why_not("cpu") is not None or not shortcut.plain(*lists):
        return None
    if lists[0] and (lists[0][0] is None or not lists[0][0].is_cpu):
        return None
    try:
        return torch.ops.zsl_cpu.coordinate_sums_of_many.default(*lists)
    except RuntimeError:
        return None


_define(
    "coordinate_sums(Tensor grad_sum, Tensor abs_sum, Tensor sq_sum, Tensor? direction, str impl) -> Tensor",
    _coordinate_sums,
    lambda grad_sum, abs_sum, sq_sum, direction, impl: grad_sum.new_empty(8, dtype=torch.float64),
)
_define(
    "coordinate_sums_of_many(Tensor[] grad_sums, Tensor[] abs_sums, Tensor[] sq_sums, Tensor?[] directions, str impl) -> Tensor",
    _coordinate_sums_of_many,
    _coordinate_sums_of_many_fake,
)
