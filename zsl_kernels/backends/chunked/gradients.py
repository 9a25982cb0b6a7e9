"""The ops of layer inputs a and output gradients b in plain PyTorch, one slab of output rows at a time.

- ``bmm`` computes the gradients of all examples for one slab in a workspace of bounded size. They are folded into the results. The
  next slab overwrites them. Derivatives are also computed slab by slab.
- Rank-one gradients (T = 1) factorize, |b_i a_iᵀ| = |b_i| |a_i|ᵀ, and need no slab.
- Ragged rows (R, ·) are sorted by example and have offsets ``begin`` (N + 1,). Examples with 2^k to 2^(k+1) − 1 rows are padded
  with zeros to the same length and go into one ``bmm``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsl_kernels.backends.chunked.groups import long_product
from zsl_kernels.planning.cpu_cost import chunk_rows
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import Cotangents, InterferenceSums, sum_dtype


def _widen(x: Tensor) -> Tensor:
    return x.to(sum_dtype(x.dtype))


def _like(a: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Convert ``others`` to the dtype of ``a``."""
    return [None if x is None else x.to(a.dtype) for x in others]


def _slabs(a: Tensor, b: Tensor, examples: int) -> Iterator[slice]:
    O = b.shape[-1]
    rows = chunk_rows(examples, O, a.shape[-1], a.element_size())
    for start in range(0, O, rows):
        yield slice(start, min(start + rows, O))


class _Part(NamedTuple):
    """Examples that are padded to the same number of rows."""

    examples: Tensor | slice
    rows: Tensor | None  # (n, L), the indices of the ragged rows; R for padding
    a: Tensor  # (n, L, K)
    b: Tensor  # (n, L, O)

    def gradients(self, slab: slice, out: Tensor | None = None) -> Tensor:
        """Return g_i for the output rows of the slab, (n, rows, K)."""
        return long_product(self.b[:, :, slab].transpose(1, 2), self.a, out)


def _parts(a: Tensor, b: Tensor, begin: Tensor | None) -> list[_Part]:
    """Return (N, T, ·) as one part, or ragged rows by length, padded to less than twice their size. Empty examples are left out."""
    if begin is None:
        return [_Part(slice(None), None, a, b)]
    R, lengths, parts = a.shape[0], begin.diff(), []
    a, b = F.pad(a, (0, 0, 0, 1)), F.pad(b, (0, 0, 0, 1))
    longest = int(lengths.max()) if lengths.numel() else 0
    for doubling in range(longest.bit_length()):
        examples = ((lengths >= 1 << doubling) & (lengths < 2 << doubling)).nonzero().squeeze(1)
        if examples.numel():
            position = torch.arange(int(lengths[examples].max()), device=a.device)
            rows = torch.where(position < lengths[examples, None], begin[examples, None] + position, R)
            parts.append(_Part(examples, rows, a[rows], b[rows]))
    return parts


def _gradients(parts: list[_Part], added: AddedRows | None, slab: slice, out: Tensor) -> Tensor:
    """Write all g_i for the output rows of the slab into ``out`` (N, rows, K)."""
    if len(parts) == 1 and parts[0].rows is None:
        parts[0].gradients(slab, out)
    else:
        out.zero_()
        for part in parts:
            out[part.examples] = part.gradients(slab)
    if added is not None:
        added.add_to(out, slab)
    return out


def _new_gradients(a: Tensor, parts: list[_Part], slab: slice, examples: int, added: AddedRows | None = None) -> Tensor:
    return _gradients(parts, added, slab, a.new_empty(examples, slab.stop - slab.start, a.shape[-1]))


def _count(a: Tensor, begin: Tensor | None) -> int:
    """Return N."""
    return a.shape[0] if begin is None else begin.shape[0] - 1


def interference(
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    gram: bool,
    begin: Tensor | None = None,
    added: AddedRows | None = None,
) -> InterferenceSums:
    a, b = _widen(a), _widen(b)
    (u,) = _like(a, direction)
    if begin is None and added is None and a.shape[1] == 1:
        return rank_one(a, b, u, gram)
    N, K, O, parts = _count(a, begin), a.shape[-1], b.shape[-1], _parts(a, b, begin)
    grad_sum, abs_sum, sq_sum = (a.new_empty(O, K) for _ in range(3))
    l1, sq_norm, dot, abs_dot = (a.new_zeros(N, dtype=torch.float64) for _ in range(4))
    pairs = a.new_zeros((N, N) if gram else (0, 0), dtype=torch.float64)
    workspace = scratch = a.new_empty(0)
    for slab in _slabs(a, b, N):
        rows = slab.stop - slab.start
        if workspace.shape[1:2] != (rows,):
            workspace, scratch = a.new_empty(N, rows, K), a.new_empty(N, rows, K)
        g = _gradients(parts, added, slab, workspace)
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


def rank_one(a: Tensor, b: Tensor, u: Tensor | None, gram: bool, sums: Sequence[Tensor] | None = None) -> InterferenceSums:
    """Compute interference for a (N, 1, K) and b (N, 1, O). ``sums``: the three sums (O, K), if they are already known."""
    a, b = _widen(a.squeeze(1)), _widen(b.squeeze(1))
    (u,) = _like(a, u)
    if sums is None:
        sums = [long_product(y.T, x) for x, y in ((a, b), (a.abs(), b.abs()), (a.square(), b.square()))]
    grad_sum, abs_sum, sq_sum = sums
    return InterferenceSums(
        grad_sum,
        abs_sum,
        sq_sum,
        l1=b.abs().sum(1) * a.abs().sum(1),
        sq_norm=b.square().sum(1) * a.square().sum(1),
        dot=None if u is None else ((b @ u) * a).sum(1),
        abs_dot=None if u is None else ((b.abs() @ u.abs()) * a.abs()).sum(1),
        gram=long_product(a, a.T) * long_product(b, b.T) if gram else None,
    )


def gram(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
    a, b = _widen(a), _widen(b)
    itself = a2 is None or b2 is None
    a2, b2 = (a, b) if a2 is None or b2 is None else (_widen(a2), _widen(b2))
    if begin is None and a.shape[1] == 1:
        return long_product(a.squeeze(1), a2.squeeze(1).T) * long_product(b.squeeze(1), b2.squeeze(1).T)
    N, M, parts, parts2 = _count(a, begin), _count(a2, begin), _parts(a, b, begin), _parts(a2, b2, begin)
    total = a.new_zeros(N, M, dtype=torch.float64)
    for slab in _slabs(a, b, N + (0 if itself else M)):
        g = _new_gradients(a, parts, slab, N).flatten(1)
        total += g @ (g if itself else _new_gradients(a, parts2, slab, M).flatten(1)).T
    return total.to(a.dtype)


def sq_norm(a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
    a, b = _widen(a), _widen(b)
    if begin is None and a.shape[1] == 1:
        return b.square().sum((1, 2)) * a.square().sum((1, 2))
    N, parts = _count(a, begin), _parts(a, b, begin)
    total = a.new_zeros(N, dtype=torch.float64)
    for slab in _slabs(a, b, N):
        total += _new_gradients(a, parts, slab, N).square_().sum((1, 2))
    return total.to(a.dtype)


def dot(a: Tensor, b: Tensor, direction: Tensor, begin: Tensor | None = None) -> Tensor:
    a, b, u = _widen(a), _widen(b), direction.to(sum_dtype(a.dtype))
    products = b * (a @ u.T) if b.shape[-1] <= a.shape[-1] else a * (b @ u)
    total = a.new_zeros(_count(a, begin), dtype=torch.float64)
    if begin is not None:
        total += (u * 0).sum()  # 0 · u of an example without rows is NaN if the direction is not finite
    for part in _parts(products, products, begin):
        total[part.examples] = part.a.sum((1, 2), dtype=torch.float64)
    return total.to(a.dtype)


def weighted_grad(
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    abs_weights: Tensor | None = None,
    direction: Tensor | None = None,
    begin: Tensor | None = None,
) -> Tensor:
    """Return Σ_i w_i g_i + sign(u) Σ_i v_i |g_i|. The second term needs ``abs_weights`` v and ``direction`` u."""
    a, b = _widen(a), _widen(b)
    v, u = _like(a, abs_weights, direction)
    w = weights.to(a.dtype)
    w = w[:, None, None] if begin is None else w.repeat_interleave(begin.diff(), output_size=a.shape[0])[:, None]
    total = long_product((b * w).flatten(0, -2).T, a.flatten(0, -2))
    if v is not None and u is not None:
        N, parts = _count(a, begin), _parts(a, b, begin)
        for slab in _slabs(a, b, N):
            total[slab] += torch.einsum("n,nok->ok", v, _new_gradients(a, parts, slab, N).abs_()) * u[slab].sign()
    return total


def interference_backward(
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    c: Cotangents,
    mix: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    want: tuple[bool, bool, bool],
    begin: Tensor | None = None,
    added: AddedRows | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the derivatives slab by slab; see :class:`zsl_kernels.backends.base.Backend`."""
    dtypes = a.dtype, b.dtype
    a, b, a2, b2 = map(_widen, (a, b, a2, b2))
    u, mix = _like(a, direction, mix)
    N, M, parts, parts2 = _count(a, begin), _count(a2, begin), _parts(a, b, begin), _parts(a2, b2, begin)
    das = [torch.zeros(x.a.shape, dtype=a.dtype, device=a.device) for x in parts] if want[0] else []
    dbs = [torch.empty(x.b.shape, dtype=b.dtype, device=b.device) for x in parts] if want[1] else []
    d_added = torch.empty_like(added.values) if added is not None and want[2] else None
    for slab in _slabs(a, b, 2 * N + M):
        g = _new_gradients(a, parts, slab, N, added)
        s = c.at(itemgetter(slab)).derivative(g, None if u is None else u[slab], lambda x: x[:, None, None])
        if mix is not None:
            s += (mix @ _new_gradients(a, parts2, slab, M, added).flatten(1)).view_as(s)
        for part, piece in zip(parts, das, strict=False):
            piece.baddbmm_(part.b[:, :, slab], s[part.examples])
        for part, piece in zip(parts, dbs, strict=False):
            piece[:, :, slab] = torch.bmm(part.a, s[part.examples].transpose(1, 2))
        if added is not None and d_added is not None and N:
            inside, places = added.inside(slab)
            d_added = torch.where(inside, s.flatten(0, 1)[places], d_added)
    da = _whole(a, parts, das).to(dtypes[0]) if want[0] else None
    db = _whole(b, parts, dbs).to(dtypes[1]) if want[1] else None
    return da, db, d_added


def _whole(x: Tensor, parts: list[_Part], pieces: list[Tensor]) -> Tensor:
    """Combine the results of the parts into a tensor of the shape of x."""
    if x.ndim == 3:
        return pieces[0]
    whole = x.new_empty(x.shape[0] + 1, x.shape[1])
    for part, piece in zip(parts, pieces, strict=True):
        whole[part.rows] = piece
    return whole[:-1]
