"""The registered ops of zsl_kernels/small.py: schema, implementation, fake and autograd of each.

As in zsl_kernels/ops.py, a result that was not asked for is an empty tensor. Derivatives are plain PyTorch: these gradients are
small or sparse, and so are theirs. What depends on the values of ids is checked here, where they have values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import backends, cpu, small_chunked
from zsl_kernels.checks import check_range
from zsl_kernels.ops import Grads, _autograd, _define, _empty, _outside_autocast, _refuse_second_derivative
from zsl_kernels.shortcut import below_autograd
from zsl_kernels.types import Cotangents, EmbeddingSums, InterferenceSums, sum_dtype


def _form(op: str, x: Tensor, impl: str) -> Any:
    """The backend that owns the op for tensors like x."""
    owner = backends.impls_for(x.device, impl, op, x.dtype)[0]
    return small_chunked if owner == "chunked" else backends.module(owner)


def _long(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.long()


# dense_interference --------------------------------------------------------------------------------------------------------------


def _dense(g: Tensor, direction: Tensor | None, gram: bool, impl: str) -> tuple[Tensor, ...]:
    sums = _form("dense_interference", g, impl).dense_interference(g, direction, gram)
    return tuple(_empty(g, 0) if x is None else x for x in sums)


def _dense_fake(g: Tensor, direction: Tensor | None, gram: bool, impl: str) -> tuple[Tensor, ...]:
    N, shape = g.shape[0], g.shape[1:]
    along = (0,) if direction is None else (N,)
    return tuple(_empty(g, *size) for size in [shape] * 3 + [(N,)] * 2 + [along] * 2 + [(N, N) if gram else (0,)])


def dense_interference(g: Tensor, direction: Tensor | None, gram: bool, impl: str) -> InterferenceSums:
    """The op with None for what was not asked for."""
    return InterferenceSums(*torch.ops.zsl.dense_interference(g, direction, gram, impl)).asked_for(direction, gram)


def dense_call(g: Tensor, gram: bool, impl: str) -> Callable[..., InterferenceSums]:
    """What the op comes to for gradients like g: a function of them and of the direction."""
    form = _form("dense_interference", g, impl)
    if form is cpu:
        kernel = torch.ops.zsl_cpu.dense_interference.default
        return lambda g, direction: InterferenceSums._make(kernel(g, direction, gram))
    return below_autograd(_outside_autocast(lambda g, direction: form.dense_interference(g, direction, gram)))


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


_define(
    "dense_interference(Tensor g, Tensor? direction, bool gram, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _dense,
    _dense_fake,
)
_autograd("dense_interference", _dense_setup, _dense_grad)


# embedding_interference ----------------------------------------------------------------------------------------------------------


def _embedding(
    ids: Tensor,
    b: Tensor,
    example_ids: Tensor | None,
    num_examples: int,
    num_embeddings: int,
    padding_idx: int,
    direction: Tensor | None,
    gram: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    form = _form("embedding_interference", b, impl)
    if form is cpu:  # checks the ids' values itself, as it reads them
        found = form.embedding_interference(ids, b, example_ids, num_examples, num_embeddings, padding_idx, direction, gram)
    else:
        check_range("ids", ids, num_embeddings, negative=True)
        check_range("example_ids", example_ids, num_examples)
        found = form.embedding_interference(ids.long(), b, _long(example_ids), num_examples, padding_idx, direction, gram)
    rows, *sums = found
    # The integers come last: torch's own checks of ops add results up, in the dtype of the first.
    return *(_empty(b, 0) if x is None else x for x in sums), rows


def _embedding_fake(ids: Tensor, b: Tensor, example_ids: Tensor | None, num_examples: int, *rest: Any) -> tuple[Tensor, ...]:
    *_, direction, gram, _ = rest
    U, N = torch.library.get_ctx().new_dynamic_size(), num_examples
    along = (0,) if direction is None else (N,)
    shapes = [(U, b.shape[2])] * 3 + [(N,)] * 2 + [along] * 2 + [(N, N) if gram else (0,)]
    return *(_empty(b, *shape) for shape in shapes), ids.new_empty(U, dtype=torch.int64)


def embedding_interference(*arguments: Any) -> EmbeddingSums:
    """The op, of its schema's arguments, with None for what was not asked for."""
    *_, direction, gram, _ = arguments
    *sums, rows = torch.ops.zsl.embedding_interference(*arguments)
    return EmbeddingSums(rows, *InterferenceSums(*sums).asked_for(direction, gram))


def embedding_call(N: int, V: int, padding_idx: int, gram: bool) -> Callable[..., EmbeddingSums]:
    """What the op comes to on the CPU, where examples are a dimension: a function of ids, b and the direction."""
    kernel = torch.ops.zsl_cpu.embedding_interference.default

    def call(ids: Tensor, b: Tensor, direction: Tensor | None) -> EmbeddingSums:
        if b.ndim != 3:
            b = b.reshape(N, math.prod(ids.shape[1:]), b.shape[-1])
        return EmbeddingSums._make(kernel(ids, b, None, N, V, padding_idx, direction, gram))

    return call


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ids, b, example_ids, ctx.num_examples, _, ctx.padding_idx, direction, ctx.gram, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(ids, b, example_ids, direction)


def _embedding_grad(ctx: Any, *cotangents: Tensor | None) -> Grads:
    ids, b, example_ids, u = ctx.saved_tensors
    *c_sums, c_gram, _ = cotangents
    c = Cotangents(*c_sums)
    if u is None:
        c = c._replace(dot=None, abs_dot=None)
    mix = c_gram + c_gram.T if ctx.gram and c_gram is not None else None
    want_b = ctx.needs_input_grad[1] and (mix is not None or any(x is not None for x in c))
    want_u = ctx.needs_input_grad[6] and (c.dot is not None or c.abs_dot is not None)
    db = du = None
    if want_b or want_u:
        db, du = torch.ops.zsl.embedding_backward(
            ids, b, example_ids, ctx.num_examples, ctx.padding_idx, u, *c, mix, want_b, want_u
        )
    return None, db if want_b else None, None, None, None, None, du if want_u else None, None, None


def _embedding_backward(ids: Tensor, b: Tensor, example_ids: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    num_examples, padding_idx, direction, *cotangents, mix, want_b, want_u = rest
    arguments = (ids.long(), b, _long(example_ids), num_examples, padding_idx, direction, Cotangents(*cotangents), mix)
    db, du = small_chunked.embedding_backward(*arguments, (want_b, want_u))
    return b.new_empty(0) if db is None else db, b.new_empty(0) if du is None else du


def _embedding_backward_fake(ids: Tensor, b: Tensor, example_ids: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    direction, (want_b, want_u) = rest[2], rest[-2:]
    du = torch.empty_like(direction, memory_format=torch.contiguous_format) if want_u else b.new_empty(0)
    return b.new_empty(b.shape if want_b else (0,)), du


_define(
    "embedding_interference(Tensor ids, Tensor b, Tensor? example_ids, SymInt num_examples, SymInt num_embeddings, "
    "SymInt padding_idx, Tensor? direction, bool gram, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _embedding,
    _embedding_fake,
)
_autograd("embedding_interference", _embedding_setup, _embedding_grad)
_define(
    "embedding_backward(Tensor ids, Tensor b, Tensor? example_ids, SymInt num_examples, SymInt padding_idx, Tensor? direction, "
    "Tensor? c_grad, Tensor? c_abs, Tensor? c_sq, Tensor? c_l1, Tensor? c_sqn, Tensor? c_dot, Tensor? c_absdot, Tensor? mix, "
    "bool want_b, bool want_u) -> (Tensor, Tensor)",
    _embedding_backward,
    _embedding_backward_fake,
)
_autograd("embedding_backward", lambda ctx, inputs, output: None, _refuse_second_derivative)


# scale_bias_grad -----------------------------------------------------------------------------------------------------------------


def _sum_like(x: Tensor | None, b: Tensor) -> Tensor:
    """Which of the two has the dtype that the sums follow."""
    return x if x is not None and x.dtype == torch.float64 else b


def _scale_bias(
    x: Tensor | None, b: Tensor, mean: Tensor | None, rstd: Tensor | None, example_ids: Tensor | None, num_examples: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    bias, impl = rest
    form = _form("scale_bias_grad", b, impl)
    if form is not cpu:  # which checks the ids' values itself, as it reads them
        check_range("example_ids", example_ids, num_examples)
        example_ids = _long(example_ids)
    scale, total = form.scale_bias_grad(x, b, mean, rstd, example_ids, num_examples, bias)
    like = _sum_like(x, b)
    return _empty(like, 0, 0) if scale is None else scale, _empty(like, 0, 0) if total is None else total


def _scale_bias_fake(x: Tensor | None, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, num_examples, bias, _ = rest
    like, size = _sum_like(x, b), (num_examples, b.shape[2])
    return _empty(like, *(size if x is not None else (0, 0))), _empty(like, *(size if bias else (0, 0)))


def scale_bias_call(b: Tensor, bias: bool, impl: str) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    """What the op comes to for tensors like b, where examples are a dimension: a function of b, x, mean and rstd."""
    N, form = b.shape[0], _form("scale_bias_grad", b, impl)
    if form is cpu:
        kernel = torch.ops.zsl_cpu.scale_bias_grad.default
        return lambda b, x, mean, rstd: kernel(x, b, mean, rstd, None, N, bias)

    def call(b: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        mean, rstd = (y.squeeze(2) if y is not None and y.ndim == 3 else y for y in (mean, rstd))
        return form.scale_bias_grad(x, b, mean, rstd, None, N, bias)

    return below_autograd(_outside_autocast(call))


def _scale_bias_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, b, mean, rstd, example_ids, _, ctx.bias, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, b, mean, rstd, example_ids)


def _scale_bias_grad(ctx: Any, c_scale: Tensor | None, c_bias: Tensor | None) -> Grads:
    x, b, mean, rstd, example_ids = ctx.saved_tensors
    need_x, need_b, need_mean, need_rstd = ctx.needs_input_grad[:4]

    def at_positions(c: Tensor) -> Tensor:
        return c.unsqueeze(1) if example_ids is None else c.index_select(0, example_ids.long()).unsqueeze(0)

    dx = db = dmean = drstd = None
    if x is not None and c_scale is not None:
        dtype = c_scale.dtype
        c = at_positions(c_scale)
        centered = x.to(dtype) if mean is None else x.to(dtype) - mean.to(dtype).unsqueeze(-1)
        factor = None if rstd is None else rstd.to(dtype).unsqueeze(-1)
        cb = c * b.to(dtype)
        d_centered = cb if factor is None else cb * factor
        if need_x:
            dx = d_centered.to(x.dtype)
        if need_mean:
            dmean = -d_centered.sum(-1).to(mean.dtype)
        if need_rstd:
            drstd = (cb * centered).sum(-1).to(rstd.dtype)
        if need_b:
            db = c * (centered if factor is None else centered * factor)
    if need_b and ctx.bias and c_bias is not None:
        own = at_positions(c_bias).expand(b.shape)
        db = own if db is None else db + own
    return dx, None if db is None else db.to(b.dtype), dmean, drstd, None, None, None, None


_define(
    "scale_bias_grad(Tensor? x, Tensor b, Tensor? mean, Tensor? rstd, Tensor? example_ids, SymInt num_examples, bool bias, "
    "str impl) -> (Tensor, Tensor)",
    _scale_bias,
    _scale_bias_fake,
)
_autograd("scale_bias_grad", _scale_bias_setup, _scale_bias_grad)
