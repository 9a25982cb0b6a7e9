"""The portable form, in plain PyTorch, for any device: a slab of output rows at a time.

The gradients of all examples for one slab are formed by ``bmm`` in a reused workspace of bounded size, folded into the results
and overwritten by the next slab's. Rank-one examples (T = 1) factorize and need no slab at all: |b_i a_iᵀ| = |b_i| |a_i|ᵀ. The
derivatives are computed slab by slab too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zsl_kernels.plan import chunk_rows
from zsl_kernels.types import InterferenceSums, sum_dtype


def _widen(a: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Everything in the dtype that the results will have."""
    dtype = sum_dtype(a.dtype)
    return [a.to(dtype), *(None if x is None else x.to(dtype) for x in others)]


def _slabs(a: Tensor, b: Tensor, examples: int) -> Iterator[slice]:
    O = b.shape[2]
    rows = chunk_rows(examples, O, a.shape[2], a.element_size())
    for start in range(0, O, rows):
        yield slice(start, min(start + rows, O))


def _gradients(a: Tensor, b: Tensor, slab: slice, out: Tensor | None = None) -> Tensor:
    """g_i for the output rows of the slab: (N, rows, K)."""
    return torch.bmm(b[:, :, slab].transpose(1, 2), a, out=out)


def interference(a: Tensor, b: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
    a, b, u = _widen(a, b, direction)
    if a.shape[1] == 1:
        return _interference_rank_one(a, b, u, gram)
    N, _, K = a.shape
    O = b.shape[2]
    sums = [a.new_empty(O, K) for _ in range(3)]
    scalars = a.new_zeros(4, N, dtype=torch.float64)
    gram_sum = a.new_zeros(N, N, dtype=torch.float64) if gram else None
    workspace = scratch = a.new_empty(0)
    for slab in _slabs(a, b, N):
        rows = slab.stop - slab.start
        if workspace.shape[1:2] != (rows,):
            workspace, scratch = a.new_empty(N, rows, K), a.new_empty(N, rows, K)
        g = _gradients(a, b, slab, out=workspace)
        torch.sum(g, 0, out=sums[0][slab])
        if gram:
            gram_sum += torch.mm(g.flatten(1), g.flatten(1).T)
        torch.abs(g, out=scratch)
        torch.sum(scratch, 0, out=sums[1][slab])
        scalars[0] += scratch.sum((1, 2))
        torch.square(g, out=scratch)
        torch.sum(scratch, 0, out=sums[2][slab])
        scalars[1] += scratch.sum((1, 2))
        if u is not None:
            torch.mul(g, u[slab], out=scratch)
            scalars[2] += scratch.sum((1, 2))
            scalars[3] += scratch.abs_().sum((1, 2))
    l1, sq, dot, abs_dot = scalars.to(a.dtype).unbind()
    return InterferenceSums(
        *sums,
        l1=l1.clone(),
        sq_norm=sq.clone(),
        dot=None if u is None else dot.clone(),
        abs_dot=None if u is None else abs_dot.clone(),
        gram=None if gram_sum is None else gram_sum.to(a.dtype),
    )


def _interference_rank_one(a: Tensor, b: Tensor, u: Tensor | None, gram: bool) -> InterferenceSums:
    a, b = a.squeeze(1), b.squeeze(1)
    return InterferenceSums(
        grad_sum=b.T @ a,
        abs_sum=b.abs().T @ a.abs(),
        sq_sum=b.square().T @ a.square(),
        l1=b.abs().sum(1) * a.abs().sum(1),
        sq_norm=b.square().sum(1) * a.square().sum(1),
        dot=None if u is None else ((b @ u) * a).sum(1),
        abs_dot=None if u is None else ((b.abs() @ u.abs()) * a.abs()).sum(1),
        gram=(a @ a.T) * (b @ b.T) if gram else None,
    )


def gram(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None) -> Tensor:
    a, b, a2, b2 = _widen(a, b, a2, b2)
    other_a, other_b = (a, b) if a2 is None else (a2, b2)
    if a.shape[1] == 1 and other_a.shape[1] == 1:
        return (a.squeeze(1) @ other_a.squeeze(1).T) * (b.squeeze(1) @ other_b.squeeze(1).T)
    total = a.new_zeros(a.shape[0], other_a.shape[0], dtype=torch.float64)
    for slab in _slabs(a, b, a.shape[0] + (0 if a2 is None else a2.shape[0])):
        g = _gradients(a, b, slab).flatten(1)
        total += g @ (g if a2 is None else _gradients(a2, b2, slab).flatten(1)).T
    return total.to(a.dtype)


def sq_norm(a: Tensor, b: Tensor) -> Tensor:
    a, b = _widen(a, b)
    if a.shape[1] == 1:
        return b.square().sum((1, 2)) * a.square().sum((1, 2))
    total = a.new_zeros(a.shape[0], dtype=torch.float64)
    for slab in _slabs(a, b, a.shape[0]):
        total += _gradients(a, b, slab).square_().sum((1, 2))
    return total.to(a.dtype)


def dot(a: Tensor, b: Tensor, direction: Tensor) -> Tensor:
    a, b, u = _widen(a, b, direction)
    if b.shape[2] <= a.shape[2]:
        return (b * (a @ u.T)).sum((1, 2), dtype=torch.float64).to(a.dtype)
    return (a * (b @ u)).sum((1, 2), dtype=torch.float64).to(a.dtype)


def weighted_grad(a: Tensor, b: Tensor, weights: Tensor, abs_weights: Tensor | None = None, direction: Tensor | None = None) -> Tensor:
    """Σ_i w_i g_i + sign(u) Σ_i v_i |g_i|, the second term with ``abs_weights`` v and ``direction`` u."""
    a, b, w, v, u = _widen(a, b, weights, abs_weights, direction)
    total = (b * w[:, None, None]).flatten(0, 1).T @ a.flatten(0, 1)
    if v is not None:
        for slab in _slabs(a, b, a.shape[0]):
            total[slab] += torch.einsum("n,nok->ok", v, _gradients(a, b, slab).abs_()) * u[slab].sign()
    return total


def backward(
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    c_grad: Tensor | None,
    c_abs: Tensor | None,
    c_sq: Tensor | None,
    c_l1: Tensor | None,
    c_sqn: Tensor | None,
    c_dot: Tensor | None,
    c_absdot: Tensor | None,
    mix: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    want: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """da_i = b_i s_i and db_i = a_i s_iᵀ; s_i is the derivative with respect to g_i (csrc/cpu/kernels.h has the formula)."""
    dtypes = a.dtype, b.dtype
    a, b, u, a2, b2 = _widen(a, b, direction, a2, b2)
    da = torch.zeros(a.shape, dtype=a.dtype, device=a.device) if want[0] else None
    db = torch.empty(b.shape, dtype=b.dtype, device=b.device) if want[1] else None

    def each(c: Tensor | None) -> Tensor | float:
        return 0.0 if c is None else c[:, None, None]

    for slab in _slabs(a, b, 2 * a.shape[0] + a2.shape[0]):
        g = _gradients(a, b, slab)
        s = torch.zeros_like(g)
        if c_grad is not None:
            s += c_grad[slab]
        if c_abs is not None or c_l1 is not None:
            s += g.sign() * (each(c_l1) + (0.0 if c_abs is None else c_abs[slab]))
        if c_sq is not None or c_sqn is not None:
            s += 2 * g * (each(c_sqn) + (0.0 if c_sq is None else c_sq[slab]))
        if c_dot is not None:
            s += each(c_dot) * u[slab]
        if c_absdot is not None:
            s += each(c_absdot) * g.sign() * u[slab].abs()
        if mix is not None:
            s += (mix.to(g.dtype) @ _gradients(a2, b2, slab).flatten(1)).view_as(s)
        if da is not None:
            da.baddbmm_(b[:, :, slab], s)
        if db is not None:
            db[:, :, slab] = torch.bmm(a, s.transpose(1, 2))
    return (None if da is None else da.to(dtypes[0])), (None if db is None else db.to(dtypes[1]))


# Coordinates handled at a time: the temporaries stay in cache.
_COORDINATES = 1 << 16


def coordinate_sums(grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, direction: Tensor | None) -> Tensor:
    total = grad_sum.new_zeros(8, dtype=torch.float64)
    given = () if direction is None else (direction.to(grad_sum.dtype).reshape(-1),)
    slices = [x.reshape(-1).split(_COORDINATES) for x in (grad_sum, abs_sum, sq_sum, *given)]
    for grad, size, sq, *u in zip(*slices, strict=True):
        touched = size != 0
        safe = torch.where(touched, size, 1)
        root, grad_abs = sq.sqrt(), grad.abs()
        parts = [touched, grad_abs / safe, root / safe, grad.square(), sq]
        if u:
            step = u[0].abs()
            parts += [grad_abs * step, size * step, root * step]
        total[: len(parts)] += torch.stack([part.sum(dtype=torch.float64) for part in parts])
    return total
