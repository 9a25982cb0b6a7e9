"""Per-example gradients of parameters that are small or sparse: embeddings, biases, scales of norms, and whatever is held already.

The rules are those of the package: inputs of any strides, accumulation in float32 or better, results in float32 (float64 for
float64 inputs), scalars accumulated in float64, a named ``impl`` never falls back. Examples that are no dimension of their own are
given by ``example_ids`` (R,), the example of each of R rows in any order, with ``num_examples``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import reference, shortcut, small_ops
from zsl_kernels.backends import impls_for
from zsl_kernels.checks import check_device, check_examples, check_integers, check_size, check_tensor
from zsl_kernels.types import EmbeddingSums, InterferenceSums


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
    impl: str = "auto",
) -> EmbeddingSums:
    """All sums and scalars of an embedding's per-example gradients. With ``onehot = F.one_hot(ids, V).to(b.dtype)``::

        g = torch.einsum("ntv,ntk->nvk", onehot, b)     # (N, V, K), never formed
        rows = ids.unique()                             # (U,)
        grad_sum, abs_sum, sq_sum = g.sum(0)[rows], g.abs().sum(0)[rows], g.square().sum(0)[rows]
        l1, sq_norm, dot, abs_dot, gram                 # as interference has them

    Work and memory follow the touched rows, whatever ``num_embeddings`` is. Positions whose id is ``padding_idx`` or negative
    count as absent. Differentiable once in ``b`` and ``direction`` (whose derivative is dense). As the number of touched rows
    depends on values, ``torch.compile(fullgraph=True)`` needs ``torch._dynamo.config.capture_dynamic_output_shape_ops``.

    Args:
        ids: (N, *positions), of any integer dtype.
        b: (N, *positions, K), the gradients with respect to the embedding's output; float32, bfloat16, float16 or float64.
        num_embeddings: V, the rows of the weight.
        padding_idx: as torch.nn.Embedding has it: from -V to V - 1.
        example_ids, num_examples: rows of mixed examples: ids (R,), b (R, K), example_ids (R,) of any integer dtype.
        direction: (V, K), any floating dtype; only its touched rows are read.
        gram: whether to compute the pairwise inner products.
        impl: see the package's documentation.

    Raises:
        TypeError: an argument is not a tensor or number, or has another dtype.
        ValueError: an argument has another shape or device, or ``impl`` is unknown.
        IndexError: an id is not below ``num_embeddings``, or an example id is not in range (on the CPU).
        RuntimeError: the named ``impl`` is not available on this machine.
    """
    kind = None
    if example_ids is None and num_examples is None:
        kind = shortcut.kind_of("embedding", impl, (num_embeddings, padding_idx, bool(gram)), b, ids, direction)
        if kind is not None and (call := shortcut.find(kind)) is not None:
            return call(ids, b, direction)
    check_tensor("b", b)
    check_integers("ids", ids)
    V = check_size("num_embeddings", num_embeddings)
    if ids.ndim == 0 or (example_ids is not None and ids.ndim != 1):
        wanted = "(N, ...)" if example_ids is None else "(R,), as example_ids are given"
        raise ValueError(f"ids: expected shape {wanted}, got {tuple(ids.shape)}")
    if b.shape[:-1] != ids.shape or b.ndim == 1:
        raise ValueError(f"b: expected {tuple(ids.shape)}, the shape of ids, and a K behind, got {tuple(b.shape)}")
    check_device("ids", ids, "b", b)
    if b.device.type == "meta":
        raise ValueError("b: expected a tensor with data, for the touched rows depend on it; got one on meta")
    if padding_idx is not None and not -V <= padding_idx < V:
        raise ValueError(f"padding_idx: expected None or a row from {-V} to {V - 1}, got {padding_idx}")
    if direction is not None:
        check_tensor("direction", direction)
        if direction.shape != (V, b.shape[-1]):
            raise ValueError(f"direction: expected shape ({V}, {b.shape[-1]}), that of the weight, got {tuple(direction.shape)}")
        check_device("direction", direction, "b", b)
    N = check_examples(ids, "ids", example_ids, num_examples)
    impls_for(b.device, impl)
    row = -1 if padding_idx is None else padding_idx % V
    if kind is not None and impls_for(b.device, impl)[0] == "cpu":
        return shortcut.keep(kind, small_ops.embedding_call(N, V, row, bool(gram)))(ids, b, direction)
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
        return reference.embedding_interference(*arguments)
    return small_ops.embedding_interference(*arguments, impl)


def bias_grad(b: Tensor, *, example_ids: Tensor | None = None, num_examples: int | None = None, impl: str = "auto") -> Tensor:
    """``b.sum(1)``: each example's gradient of a bias, (N, O), accumulated in float32 or better.

    Differentiable in ``b``.

    Args:
        b: (N, T, O), the gradients with respect to the biased output; with example_ids (R, O).
        example_ids, num_examples: rows of mixed examples: ``zeros(N, O).index_add(0, example_ids, b)``.
        impl: see the package's documentation.

    Raises: as :func:`embedding_interference`.
    """
    kind = None
    if example_ids is None and num_examples is None:
        kind = shortcut.kind_of("bias", impl, None, b)
        if kind is not None and (call := shortcut.find(kind)) is not None:
            return call(b, None, None, None)[1]
    N = _check_positions("b", b, example_ids, num_examples, impl)
    _, bias = _scale_bias(None, b, None, None, example_ids, N, True, impl, kind)
    return bias


def scale_grad(
    x: Tensor,
    b: Tensor,
    *,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """``(b * (x - mean) * rstd).sum(1)``: each example's gradient of a norm's elementwise scale, (N, K).

    A LayerNorm has both ``mean`` and ``rstd``, an RMSNorm has no mean, a plain scale has neither. One pass over ``x`` and ``b``.
    Differentiable in all four.

    Args:
        x: (N, T, K), the norm's inputs; with example_ids (R, K).
        b: of the shape of ``x``, the gradients with respect to the scaled output; may have another dtype than ``x``.
        mean, rstd: (N, T) or (N, T, 1); with example_ids (R,) or (R, 1). Any floating dtype.
        example_ids, num_examples: rows of mixed examples.
        impl: see the package's documentation.

    Raises: as :func:`embedding_interference`.
    """
    kind = None
    if example_ids is None and num_examples is None:
        kind = shortcut.kind_of("scale", impl, None, b, x, mean, rstd)
        if kind is not None and (call := shortcut.find(kind)) is not None:
            return call(b, x, mean, rstd)[0]
    N = _check_scale(x, b, mean, rstd, example_ids, num_examples, impl)
    scale, _ = _scale_bias(x, b, mean, rstd, example_ids, N, False, impl, kind)
    return scale


def scale_bias_grad(
    x: Tensor,
    b: Tensor,
    *,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``(b * (x - mean) * rstd).sum(1), b.sum(1)``: :func:`scale_grad` and :func:`bias_grad` in one pass over ``x`` and ``b``."""
    kind = None
    if example_ids is None and num_examples is None:
        kind = shortcut.kind_of("scale and bias", impl, None, b, x, mean, rstd)
        if kind is not None and (call := shortcut.find(kind)) is not None:
            return call(b, x, mean, rstd)
    N = _check_scale(x, b, mean, rstd, example_ids, num_examples, impl)
    return _scale_bias(x, b, mean, rstd, example_ids, N, True, impl, kind)


def dense_interference(g: Tensor, *, direction: Tensor | None = None, gram: bool = False, impl: str = "auto") -> InterferenceSums:
    """The fields of :func:`zsl_kernels.interference` for gradients that are held: ``g.sum(0)``, ``g.abs().sum(0)``, and so on.

    For small parameters, whose per-example gradients fit: biases, scales, and what a fallback computed. One pass over ``g``.
    Differentiable in ``g`` and ``direction``.

    Args:
        g: (N, *shape), one gradient for each example.
        direction: of that shape, any floating dtype.
        gram: whether to compute the pairwise inner products.
        impl: see the package's documentation.

    Raises: as :func:`embedding_interference`.
    """
    kind = shortcut.kind_of("dense", impl, bool(gram), g, direction)
    if kind is not None and (call := shortcut.find(kind)) is not None:
        return call(g, direction)
    check_tensor("g", g)
    if g.ndim == 0:
        raise ValueError("g: expected a tensor (N, ...), one gradient for each example, got a scalar")
    if direction is not None:
        check_tensor("direction", direction)
        if direction.shape != g.shape[1:]:
            raise ValueError(f"direction: expected shape {tuple(g.shape[1:])}, that of one gradient, got {tuple(direction.shape)}")
        check_device("direction", direction, "g", g)
    impls_for(g.device, impl)
    if impl == "reference":
        return reference.interference_of(g.to(reference.sum_dtype(g.dtype)), direction, gram)
    if kind is not None:
        return shortcut.keep(kind, small_ops.dense_call(g, bool(gram), impl))(g, direction)
    return small_ops.dense_interference(g, direction, bool(gram), impl)


def _scale_bias(
    x: Tensor | None,
    b: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    example_ids: Tensor | None,
    N: int,
    bias: bool,
    impl: str,
    kind: shortcut.Kind | None,
) -> tuple[Any, Any]:
    """With a ``kind`` the call is one of it, and kept."""
    if kind is not None:
        return shortcut.keep(kind, small_ops.scale_bias_call(b, bias, impl))(b, x, mean, rstd)
    if example_ids is not None:
        b = b.unsqueeze(0)
        x, mean, rstd = (None if y is None else y.unsqueeze(0) for y in (x, mean, rstd))
    mean, rstd = (y.squeeze(2) if y is not None and y.ndim == 3 else y for y in (mean, rstd))
    if impl == "reference":
        return reference.scale_bias_grad(x, b, mean, rstd, example_ids, N)
    return torch.ops.zsl.scale_bias_grad(x, b, mean, rstd, example_ids, N, bias, impl)


def _check_positions(name: str, x: Tensor, example_ids: Tensor | None, num_examples: int | None, impl: str) -> int:
    check_tensor(name, x)
    if x.ndim != (3 if example_ids is None else 2):
        wanted = "a 3-D tensor (N, T, K)" if example_ids is None else "a 2-D tensor (R, K), as example_ids are given"
        raise ValueError(f"{name}: expected {wanted}, got shape {tuple(x.shape)}")
    impls_for(x.device, impl)
    return check_examples(x, name, example_ids, num_examples)


def _check_scale(
    x: Tensor,
    b: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    example_ids: Tensor | None,
    num_examples: int | None,
    impl: str,
) -> int:
    N = _check_positions("x", x, example_ids, num_examples, impl)
    check_tensor("b", b)
    if b.shape != x.shape:
        raise ValueError(f"b: expected shape {tuple(x.shape)} as x, got {tuple(b.shape)}")
    check_device("b", b, "x", x)
    for name, y in (("mean", mean), ("rstd", rstd)):
        if y is None:
            continue
        check_tensor(name, y)
        if y.shape not in (x.shape[:-1], (*x.shape[:-1], 1)):
            raise ValueError(f"{name}: expected shape {tuple(x.shape[:-1])} or with a 1 behind, got {tuple(y.shape)}")
        check_device(name, y, "x", x)
    return N
