"""The executable specification, in plain PyTorch.

Every function materializes all per-example gradients and is differentiable by autograd. The module imports no backend and runs on
any device. The tests compare every other implementation with it.

Notation, as in the whole library: N examples, T positions, K input features and O output features. ``a`` (N, T, K) contains a
layer's inputs and ``b`` (N, T, O) the gradients of the summed loss with respect to its outputs. g_i = b_iᵀ a_i (O, K) is the
gradient of example i. With ``example_ids`` (R,), the rows are (R, ·), and the ids give the example of each row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zsl_kernels.tied import Embedding
from zsl_kernels.types import EmbeddingSums, InterferenceSums, sum_dtype
from zsl_kernels.validation import check_range


def per_example_grad(
    a: Tensor, b: Tensor, example_ids: Tensor | None = None, num_examples: int = 0, embedding: Embedding | None = None
) -> Tensor:
    """``torch.einsum("nto,ntk->nok", b, a)`` in float32 (float64 for float64 inputs), (N, O, K)."""
    dtype = sum_dtype(a.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if example_ids is None:
        g = torch.einsum("nto,ntk->nok", b, a)
    else:
        check_range("example_ids", example_ids, num_examples)
        each = torch.einsum("ro,rk->rok", b, a)
        g = each.new_zeros(num_examples, *each.shape[1:]).index_add(0, example_ids.long(), each)
    if embedding is None:
        return g
    embedding.check(*g.shape[:2])
    ids = embedding.ids.long()
    used = ids >= 0
    places = embedding.example_ids.long()[used], ids[used]
    return g.index_put(places, embedding.grads[used].to(dtype), accumulate=True)


def interference_of(g: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
    """Return all sums and scalars of materialized gradients g (N, *shape)."""
    flat = g.reshape(g.shape[0], math.prod(g.shape[1:]))
    p = None if direction is None else flat * direction.to(g.dtype).reshape(-1)
    return InterferenceSums(
        grad_sum=g.sum(0),
        abs_sum=g.abs().sum(0),
        sq_sum=g.square().sum(0),
        l1=flat.abs().sum(1),
        sq_norm=flat.square().sum(1),
        dot=None if p is None else p.sum(1),
        abs_dot=None if p is None else p.abs().sum(1),
        gram=flat @ flat.T if gram else None,
    )


def interference(
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    gram: bool,
    example_ids: Tensor | None = None,
    num_examples: int = 0,
    embedding: Embedding | None = None,
) -> InterferenceSums:
    return interference_of(per_example_grad(a, b, example_ids, num_examples, embedding), direction, gram)


def gram(
    a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, example_ids: Tensor | None = None, num_examples: int = 0
) -> Tensor:
    g = per_example_grad(a, b, example_ids, num_examples)
    return torch.einsum("iok,jok->ij", g, g if a2 is None or b2 is None else per_example_grad(a2, b2))


def dot(a: Tensor, b: Tensor, direction: Tensor, example_ids: Tensor | None = None, num_examples: int = 0) -> Tensor:
    g = per_example_grad(a, b, example_ids, num_examples)
    return (g * direction.to(g.dtype)).sum((1, 2))


def sq_norm(a: Tensor, b: Tensor, example_ids: Tensor | None = None, num_examples: int = 0) -> Tensor:
    return per_example_grad(a, b, example_ids, num_examples).square().sum((1, 2))


def weighted_grad(a: Tensor, b: Tensor, weights: Tensor, example_ids: Tensor | None = None, num_examples: int = 0) -> Tensor:
    g = per_example_grad(a, b, example_ids, num_examples)
    return torch.einsum("n,nok->ok", weights.to(g.dtype), g)


def embedding_interference(
    ids: Tensor,
    b: Tensor,
    example_ids: Tensor | None,
    num_examples: int,
    num_embeddings: int,
    padding_idx: int,
    direction: Tensor | None,
    gram: bool,
) -> EmbeddingSums:
    """Take ids (N, T) and b (N, T, K), or with ``example_ids`` (T,) ids (1, T) and b (1, T, K)."""
    check_range("ids", ids, num_embeddings, negative=True)
    check_range("example_ids", example_ids, num_examples)
    flat_ids, flat_b = ids.reshape(-1).long(), b.to(sum_dtype(b.dtype)).reshape(ids.numel(), b.shape[2])
    if example_ids is None:
        example_ids = torch.arange(num_examples, device=ids.device).repeat_interleave(ids.shape[1])
    used = (flat_ids >= 0) & (flat_ids != padding_idx)
    rows, row = torch.unique(flat_ids[used], return_inverse=True)
    g = flat_b.new_zeros(num_examples, rows.shape[0], b.shape[2])
    g = g.index_put((example_ids.long()[used], row), flat_b[used], accumulate=True)
    u = None if direction is None else direction.index_select(0, rows)
    return EmbeddingSums(rows, *interference_of(g, u, gram))


def scale_bias_grad(
    x: Tensor | None,
    b: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    example_ids: Tensor | None,
    num_examples: int,
) -> tuple[Tensor | None, Tensor]:
    """Take x and b (N, T, K), mean and rstd (N, T), or with ``example_ids`` (T,) tensors (1, T, K) and (1, T)."""
    check_range("example_ids", example_ids, num_examples)
    dtype = sum_dtype(b.dtype) if x is None else sum_dtype(torch.promote_types(x.dtype, b.dtype))
    b = b.to(dtype)

    def per_example(g: Tensor) -> Tensor:
        if example_ids is None:
            return g.sum(1)
        return g.new_zeros(num_examples, g.shape[2]).index_add(0, example_ids.long(), g.squeeze(0))

    if x is None:
        return None, per_example(b)
    normed = x.to(dtype)
    if mean is not None:
        normed = normed - mean.to(dtype).unsqueeze(-1)
    if rstd is not None:
        normed = normed * rstd.to(dtype).unsqueeze(-1)
    return per_example(b * normed), per_example(b)
