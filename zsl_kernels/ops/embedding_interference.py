"""embedding_interference: the statistics of an embedding's per-example gradients, which are nonzero in few rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import call_cache
from zsl_kernels.backends import cpu, dispatch, reference
from zsl_kernels.backends.chunked import embedding
from zsl_kernels.backends.dispatch import backend_for
from zsl_kernels.ops.registration import Grads, define, differentiable, differentiable_never, empty, sums_like
from zsl_kernels.types import Cotangents, EmbeddingSums, InterferenceSums
from zsl_kernels.validation import (
    check_device,
    check_elements,
    check_examples,
    check_integers,
    check_range,
    check_size,
    check_tensor,
    long,
)


def embedding_interference(
    ids: Tensor,
    b: Tensor,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    direction: Tensor | None = None,
    gram: bool = False,
    max_rows: int | None = None,
    impl: str = "auto",
) -> EmbeddingSums:
    """All sums and scalars of an embedding's per-example gradients. With ``onehot = F.one_hot(ids, V).to(b.dtype)``::

        g = torch.einsum("ntv,ntk->nvk", onehot, b)     # (N, V, K), never formed
        rows = ids.unique()                             # (U,)
        grad_sum, abs_sum, sq_sum = g.sum(0)[rows], g.abs().sum(0)[rows], g.square().sum(0)[rows]
        l1, sq_norm, dot, abs_dot, gram                 # the same as in interference

    Work and memory scale with the touched rows and not with ``num_embeddings``. Positions whose id is ``padding_idx`` or negative
    are ignored. The function is differentiable once in ``b`` and ``direction``; the derivative of ``direction`` is dense.

    The number U of touched rows depends on the values of ``ids``. Without ``max_rows``,

    - the call synchronizes with the device to read U;
    - ``torch.compile(fullgraph=True)`` needs ``torch._dynamo.config.capture_dynamic_output_shape_ops``.

    With ``max_rows`` the results always have that many rows, and compiled graphs need no such setting. ``impl="cuda"``, the default
    on a device if the CUDA kernels are built, then never synchronizes and can be captured in a CUDA graph. The derivative always
    synchronizes.

    Args:
        ids: (N, *positions), of any integer dtype.
        b: (N, *positions, K), the gradients with respect to the embedding's output; float32, bfloat16, float16 or float64.
        num_embeddings: V, the rows of the weight.
        padding_idx: from -V to V - 1, as in torch.nn.Embedding.
        example_ids, num_examples: for ragged rows: ids (R,), b (R, K), example_ids (R,) of any integer dtype.
        direction: (V, K), any floating dtype. Only its touched rows are read.
        gram: whether to compute the pairwise inner products.
        max_rows: the number of rows of the results. Unused entries of ``rows`` are -1, and their sums are zero and do not affect
            derivatives. On the CPU it must be at least the number of touched rows. On a device, where reading that number would
            synchronize, it must be at least the largest possible number: the smaller of V and the number of positions.
        impl: see the package's documentation.

    Raises:
        TypeError: an argument is not a tensor or number, or has an unsupported dtype.
        ValueError: an argument has the wrong shape or device, ``max_rows`` is too small, or ``impl`` is unknown.
        IndexError: an id is not below ``num_embeddings``, or an example id is out of range (checked on the CPU only).
        RuntimeError: the named ``impl`` is not available on this machine.
    """
    kind, sizes = None, (num_embeddings, padding_idx, max_rows)
    # Check the types: another object may compare equal to a size, as 7.0 does, or be unhashable.
    if example_ids is None and num_examples is None and all(size is None or type(size) is int for size in sizes):
        kind = call_cache.kind_of("embedding", impl, (*sizes, bool(gram)), b, ids, direction)
        if kind is not None and (call := call_cache.find(kind)) is not None:
            return call(ids, b, direction)
    check_tensor("b", b)
    check_integers("ids", ids)
    V = check_size("num_embeddings", num_embeddings)
    if ids.ndim == 0 or (example_ids is not None and ids.ndim != 1):
        wanted = "(N, ...)" if example_ids is None else "(R,) because example_ids is given"
        raise ValueError(f"ids: expected shape {wanted}, got {tuple(ids.shape)}")
    if b.shape[:-1] != ids.shape or b.ndim == 1:
        raise ValueError(f"b: expected the shape of ids, {tuple(ids.shape)}, followed by K, got {tuple(b.shape)}")
    check_device("ids", ids, "b", b)
    check_elements("b", *b.shape)
    if b.device.type == "meta":
        raise ValueError("b: expected a tensor with data because the touched rows depend on values, got one on meta")
    if padding_idx is not None and not isinstance(padding_idx, int | torch.SymInt):
        raise TypeError(f"padding_idx: expected None or an integer, got {type(padding_idx).__name__}")
    if padding_idx is not None and not -V <= padding_idx < V:
        raise ValueError(f"padding_idx: expected None or a row from {-V} to {V - 1}, got {padding_idx}")
    if direction is not None:
        check_tensor("direction", direction)
        if direction.shape != (V, b.shape[-1]):
            raise ValueError(f"direction: expected the shape of the weight, ({V}, {b.shape[-1]}), got {tuple(direction.shape)}")
        check_device("direction", direction, "b", b)
    N = check_examples(ids, "ids", example_ids, num_examples)
    _check_keys(V, N)
    if gram:
        check_elements("gram", N, N)
    if max_rows is not None:
        check_elements("max_rows", check_size("max_rows", max_rows), b.shape[-1])
        if b.device.type != "cpu" and max_rows < min(V, ids.numel()):
            most = min(V, ids.numel())
            raise ValueError(f"max_rows: expected at least {most} on {b.device}, the most rows that can be touched, got {max_rows}")
    dispatch.impls_for(b.device, impl)
    row = -1 if padding_idx is None else padding_idx % V
    if kind is not None and dispatch.impls_for(b.device, impl)[0] == "cpu":
        return call_cache.keep(kind, _call(N, V, row, bool(gram), max_rows))(ids, b, direction)
    lead = (N, math.prod(ids.shape[1:])) if example_ids is None else (1, ids.shape[0])
    arguments = (
        ids.reshape(lead),
        b.reshape(*lead, b.shape[-1]),
        example_ids,
        N,
        V,
        row,
        direction,
        bool(gram),
    )
    if impl == "reference":
        return reference.embedding_interference(*arguments).with_rows(max_rows)
    return _run(*arguments, impl, max_rows)


def _check_keys(num_embeddings: int, num_examples: int) -> None:
    """Check that a row and an example can be encoded together in one int64 key."""
    if not torch.compiler.is_compiling() and num_embeddings * max(num_examples, 1) >= 1 << 63:
        raise ValueError(
            f"num_embeddings: expected num_embeddings * num_examples < 2^63 for {num_examples} examples, got {num_embeddings}"
        )


def _run(*arguments: Any) -> EmbeddingSums:
    """Call the op with its schema's arguments and replace results that were not requested by None."""
    *_, direction, gram, _, _ = arguments
    *sums, rows = op(*arguments)
    return EmbeddingSums(rows, *InterferenceSums(*sums).asked_for(direction, gram))


def _call(N: int, V: int, padding_idx: int, gram: bool, max_rows: int | None) -> Callable[..., EmbeddingSums]:
    """Return the function of (ids, b, direction) that the op runs on the CPU if examples are a dimension."""
    kernel = cpu.kernels.embedding_interference.default

    def call(ids: Tensor, b: Tensor, direction: Tensor | None) -> EmbeddingSums:
        if b.ndim != 3:
            b = b.reshape(N, math.prod(ids.shape[1:]), b.shape[-1])
        return EmbeddingSums._make(kernel(ids, b, None, N, V, padding_idx, direction, gram)).with_rows(max_rows)

    return call


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
    max_rows: int | None = None,
) -> tuple[Tensor, ...]:
    backend = backend_for("embedding_interference", b.device, impl, b.dtype)
    if not backend.checks_ids:
        _check_keys(num_embeddings, num_examples)
        check_range("ids", ids, num_embeddings, negative=True)
        check_range("example_ids", example_ids, num_examples)
        ids, example_ids = ids.long(), long(example_ids)
    arguments = (ids, b, example_ids, num_examples, num_embeddings, padding_idx, direction, gram, max_rows)
    rows, *sums = backend.embedding_interference(*arguments)
    # The integer result comes last: the op checks of PyTorch add up the results in the dtype of the first.
    return *(empty(b, 0) if x is None else x for x in sums), rows


def _embedding_fake(ids: Tensor, b: Tensor, example_ids: Tensor | None, num_examples: int, *rest: Any) -> tuple[Tensor, ...]:
    *_, direction, gram, _, max_rows = (*rest, None)[:6]
    U = torch.library.get_ctx().new_dynamic_size() if max_rows is None else max_rows
    return *sums_like(b, (U, b.shape[2]), num_examples, direction, gram), ids.new_empty(U, dtype=torch.int64)


op = define(
    "embedding_interference(Tensor ids, Tensor b, Tensor? example_ids, SymInt num_examples, SymInt num_embeddings, "
    "SymInt padding_idx, Tensor? direction, bool gram, str impl, SymInt? max_rows=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _embedding,
    _embedding_fake,
)


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ids, b, example_ids, ctx.num_examples, ctx.num_embeddings, ctx.padding_idx, direction, ctx.gram, _, _ = inputs
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
        sizes = (ctx.num_examples, ctx.num_embeddings, ctx.padding_idx)
        db, du = op_backward(ids, b, example_ids, *sizes, u, *c, mix, want_b, want_u)
    return None, db if want_b else None, None, None, None, None, du if want_u else None, None, None, None


differentiable(op, _embedding_setup, _embedding_grad)


def _embedding_backward(ids: Tensor, b: Tensor, example_ids: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    num_examples, num_embeddings, padding_idx, direction, *cotangents, mix, want_b, want_u = rest
    sizes = (num_examples, num_embeddings, padding_idx)
    check_range("ids", ids, num_embeddings, negative=True)
    check_range("example_ids", example_ids, num_examples)
    arguments = (ids.long(), b, long(example_ids), *sizes, direction, Cotangents(*cotangents), mix)
    db, du = embedding.embedding_backward(*arguments, (want_b, want_u))
    return b.new_empty(0) if db is None else db, b.new_empty(0) if du is None else du


def _embedding_backward_fake(ids: Tensor, b: Tensor, example_ids: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    direction, (want_b, want_u) = rest[3], rest[-2:]
    du = torch.empty_like(direction, memory_format=torch.contiguous_format) if want_u else b.new_empty(0)
    return b.new_empty(b.shape if want_b else (0,)), du


op_backward = define(
    "embedding_backward(Tensor ids, Tensor b, Tensor? example_ids, SymInt num_examples, SymInt num_embeddings, SymInt padding_idx, "
    "Tensor? direction, Tensor? c_grad, Tensor? c_abs, Tensor? c_sq, Tensor? c_l1, Tensor? c_sqn, Tensor? c_dot, "
    "Tensor? c_absdot, Tensor? mix, bool want_b, bool want_u) -> (Tensor, Tensor)",
    _embedding_backward,
    _embedding_backward_fake,
)
differentiable_never(op_backward)
