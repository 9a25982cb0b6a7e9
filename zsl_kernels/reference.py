"""The executable specification, in plain PyTorch.

Every function here materializes all per-example gradients and is differentiable by autograd. It imports no backend, runs on any
device, and is what the tests compare every other implementation with.

Letters, the same in the whole library: N examples, T positions, K input features, O output features; ``a`` (N, T, K) are a
layer's inputs, ``b`` (N, T, O) the gradients of the summed loss with respect to its outputs, and g_i = b_iᵀ a_i (O, K) is
example i's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsl_kernels.types import InterferenceSums, sum_dtype


def per_example_grad(a: Tensor, b: Tensor) -> Tensor:
    """``torch.einsum("nto,ntk->nok", b, a)`` in float32 (float64 for float64 inputs): shape (N, O, K)."""
    dtype = sum_dtype(a.dtype)
    return torch.einsum("nto,ntk->nok", b.to(dtype), a.to(dtype))


def interference(a: Tensor, b: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
    g = per_example_grad(a, b)
    dot = abs_dot = None
    if direction is not None:
        p = g * direction.to(g.dtype)
        dot, abs_dot = p.sum((1, 2)), p.abs().sum((1, 2))
    return InterferenceSums(
        grad_sum=g.sum(0),
        abs_sum=g.abs().sum(0),
        sq_sum=g.square().sum(0),
        l1=g.abs().sum((1, 2)),
        sq_norm=g.square().sum((1, 2)),
        dot=dot,
        abs_dot=abs_dot,
        gram=torch.einsum("iok,jok->ij", g, g) if gram else None,
    )


def gram(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    return torch.einsum("iok,jok->ij", per_example_grad(a, b), per_example_grad(a2, b2))


def dot(a: Tensor, b: Tensor, direction: Tensor) -> Tensor:
    g = per_example_grad(a, b)
    return (g * direction.to(g.dtype)).sum((1, 2))


def sq_norm(a: Tensor, b: Tensor) -> Tensor:
    return per_example_grad(a, b).square().sum((1, 2))


def weighted_grad(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    g = per_example_grad(a, b)
    return torch.einsum("n,nok->ok", weights.to(g.dtype), g)
