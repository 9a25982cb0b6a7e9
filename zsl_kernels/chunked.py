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
from zsl_kernels.types import Cotangents, InterferenceSums, sum_dtype


def _widen(x: Tensor) -> Tensor:
    return x.to(sum_dtype(x.dtype))


def _like(a: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The others in the dtype of ``a``."""
    return [None if x is None else x.to(a.dtype) for x in others]


def _slabs(a: Tensor, b: Tensor, examples: int) -> Iterator[slice]:
    O = b.shape[2]
    rows = chunk_rows(examples, O, a.shape[2], a.element_size())
    for start in range(0, O, rows):
        yield slice(start, min(start + rows, O))


def _gradients(a: Tensor, b: Tensor, slab: slice, out: Tensor | None = None) -> Tensor:
    """g_i for the output rows of the slab: (N, rows, K)."""
    return torch.bmm(b[:, :, slab].transpose(1, 2), a, out=out)


def interference(a: Tensor, b: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
    a, b = _widen(a), _widen(b)
    (u,) = _like(a, direction)
    if a.shape[1] == 1:
        return _interference_rank_one(a, b, u, gram)
    N, _, K = a.shape
    O = b.shape[2]
    grad_sum, abs_sum, sq_sum = (a.new_empty(O, K) for _ in range(3))
    l1, sq_norm, dot, abs_dot = (a.new_zeros(N, dtype=torch.float64) for _ in range(4))
    pairs = a.new_zeros((N, N) if gram else (0, 0), dtype=torch.float64)
    workspace = scratch = a.new_empty(0)
    for slab in _slabs(a, b, N):
        rows = slab.stop - slab.start
        if workspace.shape[1:2] != (rows,):
            workspace, scratch = a.new_empty(N, rows, K), a.new_empty(N, rows, K)
        g = _gradients(a, b, slab, out=workspace)
        torch.sum(g, 0, out=grad_sum[slab])
        if gram:
            pairs += torch.mm(g.flatten(1), g.flatten(1).T)
        torch.abs(g, out=scratch)
        torch.sum(scratch, 0, out=abs_sum[slab])
        l1 += scratch.sum((1, 2))
        torch.square(g, out=scratch)
        torch.sum(scratch, 0, out=sq_sum[slab])
        sq_norm += scratch.sum((1, 2))
        if u is not None:
            torch.mul(g, u[slab], out=scratch)
            dot += scratch.sum((1, 2))
            abs_dot += scratch.abs_().sum((1, 2))
    results = (x.to(a.dtype) for x in (l1, sq_norm, dot, abs_dot, pairs))
    return InterferenceSums(grad_sum, abs_sum, sq_sum, *results).asked_for(u, gram)


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
    a, b = _widen(a), _widen(b)
    itself = a2 is None or b2 is None
    a2, b2 = (a, b) if a2 is None or b2 is None else (_widen(a2), _widen(b2))
    if a.shape[1] == 1:
        return (a.squeeze(1) @ a2.squeeze(1).T) * (b.squeeze(1) @ b2.squeeze(1).T)
    total = a.new_zeros(a.shape[0], a2.shape[0], dtype=torch.float64)
    for slab in _slabs(a, b, a.shape[0] + (0 if itself else a2.shape[0])):
        g = _gradients(a, b, slab).flatten(1)
        total += g @ (g if itself else _gradients(a2, b2, slab).flatten(1)).T
    return total.to(a.dtype)


def sq_norm(a: Tensor, b: Tensor) -> Tensor:
    a, b = _widen(a), _widen(b)
    if a.shape[1] == 1:
        return b.square().sum((1, 2)) * a.square().sum((1, 2))
    total = a.new_zeros(a.shape[0], dtype=torch.float64)
    for slab in _slabs(a, b, a.shape[0]):
        total += _gradients(a, b, slab).square_().sum((1, 2))
    return total.to(a.dtype)


def dot(a: Tensor, b: Tensor, direction: Tensor) -> Tensor:
    a, b, u = _widen(a), _widen(b), direction.to(sum_dtype(a.dtype))
    if b.shape[2] <= a.shape[2]:
        return (b * (a @ u.T)).sum((1, 2), dtype=torch.float64).to(a.dtype)
    return (a * (b @ u)).sum((1, 2), dtype=torch.float64).to(a.dtype)


def weighted_grad(
    a: Tensor, b: Tensor, weights: Tensor, abs_weights: Tensor | None = None, direction: Tensor | None = None
) -> Tensor:
    """Σ_i w_i g_i + sign(u) Σ_i v_i |g_i|, the second term with ``abs_weights`` v and ``direction`` u."""
    a, b = _widen(a), _widen(b)
    v, u = _like(a, abs_weights, direction)
    total = (b * weights.to(a.dtype)[:, None, None]).flatten(0, 1).T @ a.flatten(0, 1)
    if v is not None and u is not None:
        for slab in _slabs(a, b, a.shape[0]):
            total[slab] += torch.einsum("n,nok->ok", v, _gradients(a, b, slab).abs_()) * u[slab].sign()
    return total


def backward(
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    c: Cotangents,
    mix: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    want: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """da_i = b_i s_i and db_i = a_i s_iᵀ, where s_i is the derivative with respect to g_i and mix (N, M) weighs the gradients of
    a second set of examples in it (csrc/cpu/kernels.h has the formula)."""
    dtypes = a.dtype, b.dtype
    a, b, a2, b2 = map(_widen, (a, b, a2, b2))
    u, mix = _like(a, direction, mix)
    da = torch.zeros(a.shape, dtype=a.dtype, device=a.device) if want[0] else None
    db = torch.empty(b.shape, dtype=b.dtype, device=b.device) if want[1] else None
    for slab in _slabs(a, b, 2 * a.shape[0] + a2.shape[0]):
        s = _derivative(_gradients(a, b, slab), None if u is None else u[slab], c, slab)
        if mix is not None:
            s += (mix @ _gradients(a2, b2, slab).flatten(1)).view_as(s)
        if da is not None:
            da.baddbmm_(b[:, :, slab], s)
        if db is not None:
            db[:, :, slab] = torch.bmm(a, s.transpose(1, 2))
    return (None if da is None else da.to(dtypes[0])), (None if db is None else db.to(dtypes[1]))


def _derivative(g: Tensor, u: Tensor | None, c: Cotangents, slab: slice) -> Tensor:
    """s_i for the slab, without the mixed gradients: (N, rows, K)."""

    def each(x: Tensor) -> Tensor:
        return x[:, None, None]

    s = torch.zeros_like(g)
    if c.grad_sum is not None:
        s += c.grad_sum[slab]
    if c.abs_sum is not None:
        s += g.sign() * c.abs_sum[slab]
    if c.l1 is not None:
        s += g.sign() * each(c.l1)
    if c.sq_sum is not None:
        s += 2 * g * c.sq_sum[slab]
    if c.sq_norm is not None:
        s += 2 * g * each(c.sq_norm)
    if c.dot is not None and u is not None:
        s += each(c.dot) * u
    if c.abs_dot is not None and u is not None:
        s += each(c.abs_dot) * g.sign() * u.abs()
    return s


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
