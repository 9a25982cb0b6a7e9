"""Per-example gradient inner products and destructive-interference sums, without materializing every per-example gradient.

Letters, the same everywhere: N examples, T positions, K input features, O output features; ``a`` (N, T, K) are a layer's inputs,
``b`` (N, T, O) the gradients of Σ_i ℓ_i with respect to its outputs, and g_i = b_iᵀ a_i (O, K) is the gradient of example i.

All functions take float32, bfloat16, float16 or float64 inputs of any strides (an ``a`` expanded over the examples is read once),
accumulate in float32 or better, and return float32 (float64 for float64 inputs). They are differentiable once in every tensor
argument, and trace under ``torch.compile(fullgraph=True)``, but for :func:`linear_cross_entropy`. ``impl`` names an implementation
("reference", "chunked", "cpu", "triton", "cuda"); "auto" follows :func:`plan`. A named one never falls back.

Where the rows of a batch are not (N, T, ·), like those that reach one expert of a mixture, each names its example: with
``example_ids`` (R,), integers in any order, and ``num_examples`` N, ``a`` is (R, K), ``b`` (R, O) and
g_i = Σ_{r: example_ids[r] = i} b_r a_rᵀ, zero for an example without rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import ops, reference, shortcut
from zsl_kernels.backends import build_info, impls_for, plan
from zsl_kernels.checks import check_device, check_examples, check_integers, check_tensor
from zsl_kernels.linear_cross_entropy import linear_cross_entropy
from zsl_kernels.rows import Embedding
from zsl_kernels.small import bias_grad, dense_interference, embedding_interference, scale_bias_grad, scale_grad
from zsl_kernels.types import INPUT_DTYPES, CoordinateSums, EmbeddingSums, InterferenceSums

__all__ = [
    "CoordinateSums",
    "EmbeddingSums",
    "InterferenceSums",
    "bias_grad",
    "build_info",
    "coordinate_sums",
    "coordinate_sums_of_many",
    "dense_interference",
    "dot",
    "embedding_interference",
    "gram",
    "interference",
    "linear_cross_entropy",
    "plan",
    "scale_bias_grad",
    "scale_grad",
    "sq_norm",
    "weighted_grad",
]
__version__ = "0.1.0"


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

    The scalars over all coordinates are accumulated in float64. Time: about that of ``grad_sum`` alone. Memory: the results and one
    tile for each thread, whatever N and T are (with ``gram``, one tile of each example, bounded).

    Args:
        a: (N, T, K) inputs; (R, K) with ``example_ids``.
        b: (N, T, O) output gradients, of the dtype and device of ``a``; (R, O) with ``example_ids``.
        direction: (O, K), any floating dtype, for example a parameter's update.
        gram: whether to compute the pairwise inner products.
        example_ids: (R,) integers in [0, num_examples), the example of each row, in any order.
        num_examples: N, with ``example_ids``.
        embedding: (ids, e) of a weight that is an embedding's table too: ids (N, S), integers below O, and the gradients of what
            was looked up, e (N, S, K) of any floating dtype; then g_i = b_iᵀ a_i + Σ_s onehot(ids_is) e_isᵀ. Negative ids are
            skipped. With ``example_ids``: ids (Q,), e (Q, K) and the example of each, (Q,).
        impl: see the module's documentation.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: an argument has another shape or device, or ``impl`` is unknown.
        IndexError: an id is out of range (on the CPU; elsewhere looking would wait).
        RuntimeError: the named ``impl`` is not available on this machine; the message says why.
        NotImplementedError: in backward, for the derivative along ``direction`` with ``embedding``.
    """
    kind = None
    if example_ids is None and num_examples is None and embedding is None:
        kind = shortcut.kind_of("interference", impl, bool(gram), a, b, direction)
        if kind is not None and (call := shortcut.find(kind)) is not None:
            return call(a, b, direction)
    N = _check_pair("a", a, "b", b, impl, example_ids, num_examples)
    if direction is not None:
        _check_direction(direction, a, b)
    if kind is not None:
        return shortcut.keep(kind, ops.interference_call(a, b, bool(gram), impl))(a, b, direction)
    tied = None if embedding is None else _check_embedding(embedding, a, b, N, example_ids is not None)
    if impl == "reference":
        return reference.interference(a, b, direction, gram, example_ids, N, tied)
    return ops.interference(a, b, direction, bool(gram), impl, example_ids, N, tied)


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
    """``torch.einsum("iok,jok->ij", g, g2)``: inner products of gradients, (N, N) of one set with itself or (N, M) with a second.

    The direct way forms each gradient tile once; the ghost way, Σ_ts (a_it·a2_js)(b_it·b2_js), forms none and wins for short
    sequences in wide layers. :func:`plan` says which.

    Args:
        a, b: (N, T, K) and (N, T, O), or (R, K) and (R, O) with ``example_ids``.
        a2, b2: (M, T, K) and (M, T, O), both or neither; not with ``example_ids``.
        example_ids, num_examples, impl: as :func:`interference`.

    Raises: as :func:`interference`.
    """
    N = _check_pair("a", a, "b", b, impl, example_ids, num_examples)
    if example_ids is not None and (a2 is not None or b2 is not None):
        raise ValueError("a2, b2: expected none with example_ids, the gram of one set with itself, got a second set")
    if (a2 is None) != (b2 is None):
        raise ValueError(f"a2, b2: expected both or neither, got {'b2' if a2 is None else 'a2'} alone")
    if a2 is not None and b2 is not None:
        _check_pair("a2", a2, "b2", b2, impl)
        for name, x, like in (("a2", a2, a), ("b2", b2, b)):
            if x.dtype != like.dtype or x.device != like.device:
                raise TypeError(f"{name}: expected {like.dtype} on {like.device} as a and b, got {x.dtype} on {x.device}")
            if x.shape[1:] != like.shape[1:]:
                raise ValueError(f"{name}: expected (M, {like.shape[1]}, {like.shape[2]}) to go with a and b, got {tuple(x.shape)}")
    if impl == "reference":
        return reference.gram(a, b, a2, b2, example_ids, N)
    return torch.ops.zsl.gram(a, b, a2, b2, impl, example_ids, N)


def dot(
    a: Tensor,
    b: Tensor,
    direction: Tensor,
    *,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """``(g * direction).sum((1, 2))``: each example's gradient along ``direction`` (O, K); (N,).

    Arguments and errors as :func:`interference`.
    """
    N = _check_pair("a", a, "b", b, impl, example_ids, num_examples)
    _check_direction(direction, a, b)
    if impl == "reference":
        return reference.dot(a, b, direction, example_ids, N)
    return torch.ops.zsl.dot(a, b, direction, impl, example_ids, N)


def sq_norm(
    a: Tensor, b: Tensor, *, example_ids: Tensor | None = None, num_examples: int | None = None, impl: str = "auto"
) -> Tensor:
    """``g.square().sum((1, 2))``: each example's squared gradient norm; (N,).

    Arguments and errors as :func:`interference`.
    """
    N = _check_pair("a", a, "b", b, impl, example_ids, num_examples)
    if impl == "reference":
        return reference.sq_norm(a, b, example_ids, N)
    return torch.ops.zsl.sq_norm(a, b, impl, example_ids, N)


def weighted_grad(
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    *,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """``torch.einsum("n,nok->ok", weights, g)``: the weighted sum of the examples' gradients, (O, K); ``weights`` is (N,).

    Per-example clipping and reweighting need no other gradient. Arguments and errors as :func:`interference`.
    """
    N = _check_pair("a", a, "b", b, impl, example_ids, num_examples)
    check_tensor("weights", weights)
    if weights.shape != (N,):
        raise ValueError(f"weights: expected shape ({N},), one for each example, got {tuple(weights.shape)}")
    check_device("weights", weights, "a", a)
    if impl == "reference":
        return reference.weighted_grad(a, b, weights, example_ids, N)
    return torch.ops.zsl.weighted_grad(a, b, weights, None, None, impl, example_ids, N)


def coordinate_sums(
    grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, *, direction: Tensor | None = None, impl: str = "auto"
) -> CoordinateSums:
    """``(grad_sum.abs() / abs_sum).sum()`` and its kin (:class:`CoordinateSums`) in one pass over the sums, with 0/0 as 0.

    Reads the results of :func:`interference`: float32 or float64 tensors of one shape, any. Returns Python floats, accumulated in
    float64, and is not differentiable.
    """
    _check_sums((grad_sum, abs_sum, sq_sum, direction))
    _check_coordinate_impl(impl)
    with torch.no_grad():
        return CoordinateSums(*torch.ops.zsl.coordinate_sums(grad_sum, abs_sum, sq_sum, direction, impl).tolist())


def coordinate_sums_of_many(
    grad_sums: Sequence[Tensor],
    abs_sums: Sequence[Tensor],
    sq_sums: Sequence[Tensor],
    directions: Sequence[Tensor | None] | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """``torch.stack([(G.abs() / A).sum(), …])`` of many weights in one call: row w has the fields of :func:`coordinate_sums` of
    ``grad_sums[w]``, ``abs_sums[w]``, ``sq_sums[w]`` and ``directions[w]``, the same bits as if it were alone.

    Nothing waits for a device: the result stays where the sums are. Not differentiable.

    Args:
        grad_sums, abs_sums, sq_sums: W tensors each, float32 or float64, on one device; those of one weight have one shape, any.
        directions: of each weight one of its shape, any floating dtype, or None; None for none at all.
        impl: see the module's documentation.

    Returns: (W, 8) float64, the columns in the order of ``CoordinateSums._fields``; those of a direction are 0 without one.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: an argument has another length, shape or device, or ``impl`` is unknown.
        RuntimeError: the named ``impl`` is not available on this machine.
    """
    us = [None] * len(grad_sums) if directions is None else directions
    lists: list[list[Any]] = [list(x) for x in (grad_sums, abs_sums, sq_sums, us)]
    with torch.no_grad():
        if (sums := ops.coordinates_at_once(impl, *lists)) is not None:
            return sums
        _check_sums_of_many(*lists)
        _check_coordinate_impl(impl)
        return torch.ops.zsl.coordinate_sums_of_many(*lists, impl)


_SUM_NAMES = ("grad_sum", "abs_sum", "sq_sum", "direction")
_SUM_DTYPES = (torch.float32, torch.float64)


def _check_sums_of_many(*lists: list[Any]) -> None:
    for name, found in zip(_SUM_NAMES, lists, strict=True):
        if len(found) != len(lists[0]):
            raise ValueError(f"{name}s: expected {len(lists[0])}, one for each of grad_sums, got {len(found)}")
    for w, tensors in enumerate(zip(*lists, strict=True)):
        _check_sums(tensors, w)
        device, first = tensors[0].device, lists[0][0].device
        if device != first:
            raise ValueError(f"grad_sums[{w}]: expected a tensor on {first} as grad_sums[0], got one on {device}")


def _check_sums(tensors: tuple[Any, ...], w: int | None = None) -> None:
    """Of the weight at place ``w`` of many."""
    like = tensors[0]
    for i, x in enumerate(tensors if tensors[3] is not None else tensors[:3]):
        dtypes = INPUT_DTYPES if i == 3 else _SUM_DTYPES
        good = isinstance(x, Tensor) and x.dtype in dtypes and x.shape == like.shape and x.device == like.device
        if good and x.device.type != "meta":
            continue
        name, like_name = (n if w is None else f"{n}s[{w}]" for n in (_SUM_NAMES[i], _SUM_NAMES[0]))
        check_tensor(name, x)
        if x.shape != like.shape:
            raise ValueError(f"{name}: expected shape {tuple(like.shape)} as {like_name}, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}")
        raise ValueError(f"{name}: expected a tensor with data on {like.device} as {like_name}, got one on {x.device}")


def _check_coordinate_impl(impl: str) -> None:
    if impl == "reference":
        raise ValueError("impl: coordinate_sums has no reference of its own; expected 'auto', 'chunked', 'cpu' or 'triton'")


def _check_pair(
    a_name: str,
    a: Tensor,
    b_name: str,
    b: Tensor,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
) -> int:
    """Also gives N."""
    ragged = example_ids is not None
    for name, x, last in ((a_name, a, "K"), (b_name, b, "O")):
        check_tensor(name, x)
        if x.ndim != (2 if ragged else 3):
            hint = "; for one position for each example, unsqueeze(1); for rows of any example, example_ids" if x.ndim == 2 else ""
            expected = f"a 2-D tensor (R, {last}) with example_ids" if ragged else f"a 3-D tensor (N, T, {last})"
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(x.shape)}{hint}")
    if b.dtype != a.dtype:
        raise TypeError(f"{b_name}: expected {a.dtype} as {a_name}, got {b.dtype}")
    check_device(b_name, b, a_name, a)
    if b.shape[:-1] != a.shape[:-1]:
        sizes = ", ".join(map(str, a.shape[:-1]))
        raise ValueError(f"{b_name}: expected shape ({sizes}, O) to go with {a_name}, got {tuple(b.shape)}")
    impls_for(a.device, impl)
    return check_examples(a, a_name, example_ids, num_examples)


def _check_embedding(embedding: tuple[Tensor, ...], a: Tensor, b: Tensor, N: int, ragged: bool) -> Embedding:
    """In the form that the ops take: one row after another, each with its example."""
    names = "ids (Q,), e (Q, K), example ids (Q,)" if ragged else "ids (N, S), e (N, S, K)"
    if not isinstance(embedding, tuple | list) or len(embedding) != (3 if ragged else 2):
        got = f"{len(embedding)} items" if isinstance(embedding, tuple | list) else type(embedding).__name__
        raise TypeError(f"embedding: expected a tuple ({names}), got {got}")
    ids, e = embedding[:2]
    check_tensor("embedding: e", e)
    K = a.shape[-1]
    if e.ndim != (2 if ragged else 3) or e.shape[-1] != K or (not ragged and e.shape[0] != N):
        raise ValueError(f"embedding: e: expected shape {f'(Q, {K})' if ragged else f'({N}, S, {K})'}, got {tuple(e.shape)}")
    check_device("embedding: e", e, "a", a)
    named = {"ids": (ids, e.shape[:-1])} | ({"example ids": (embedding[2], e.shape[:1])} if ragged else {})
    for name, (x, shape) in named.items():
        check_integers(f"embedding: {name}", x)
        if x.shape != shape:
            raise ValueError(f"embedding: {name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
        check_device(f"embedding: {name}", x, "a", a)
    if ragged:
        return Embedding(ids, e, embedding[2])
    examples = torch.arange(N, device=a.device).unsqueeze(1).expand(N, e.shape[1])
    return Embedding(ids.flatten(), e.flatten(0, 1), examples.flatten())


def _check_direction(direction: Tensor, a: Tensor, b: Tensor) -> None:
    check_tensor("direction", direction)
    if direction.shape != (b.shape[-1], a.shape[-1]):
        raise ValueError(
            f"direction: expected shape ({b.shape[-1]}, {a.shape[-1]}), that of the weight, got {tuple(direction.shape)}"
        )
    check_device("direction", direction, "a", a)
