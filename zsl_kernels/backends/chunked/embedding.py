"""The statistics of an embedding: the pairs of a touched row and an example that touches it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zsl_kernels.backends.chunked.groups import sum_by, sum_groups
from zsl_kernels.planning.cpu_cost import CHUNKED_BYTES
from zsl_kernels.types import Cotangents, EmbeddingSums, sum_dtype


class Pairs(NamedTuple):
    """The nonzero rows of all gradients: pair q is row rows[row[q]] of example[q]. Sorted by row, then by example."""

    rows: Tensor  # (U,)
    row: Tensor  # (Q,)
    row_counts: Tensor  # (U,) pairs of each row
    example: Tensor  # (Q,)
    place: Tensor  # (P',) positions that are not skipped, sorted by their pair
    of_place: Tensor  # (P',) their pairs
    counts: Tensor  # (Q,) positions of each pair

    def gradients(self, b: Tensor) -> Tensor:
        """(Q, K)"""
        flat = b.reshape(b.shape[0] * b.shape[1], b.shape[2]).to(sum_dtype(b.dtype))
        return sum_groups(flat, self.place, self.counts)


def pairs_of(ids: Tensor, T: int, example_ids: Tensor | None, num_examples: int, padding_idx: int) -> Pairs:
    """T: positions of an example, without ``example_ids``."""
    N = max(num_examples, 1)
    ids = ids.reshape(-1)
    place = ((ids >= 0) & (ids != padding_idx)).nonzero().squeeze(1)
    example = place // max(T, 1) if example_ids is None else example_ids[place]
    key, order = (ids[place] * N + example).sort(stable=True)
    place = place[order]
    pair, of_place, counts = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    rows, row, row_counts = torch.unique_consecutive(pair // N, return_inverse=True, return_counts=True)
    return Pairs(rows, row, row_counts, pair % N, place, of_place, counts)


def row_slabs(counts: Tensor, num_examples: int, K: int, dtype: torch.dtype) -> list[tuple[slice, int, int]]:
    """What counts (U,) count, some rows at a time, with the first row and the number of rows: (N, rows, K) is of bounded size."""
    U, rows = counts.shape[0], max(1, CHUNKED_BYTES // max(1, num_examples * K * dtype.itemsize))
    ends = counts.cumsum(0)
    starts = torch.cat(((ends - counts)[::rows], ends[-1:])).tolist()  # one wait for a device
    return [(slice(a, b), r, min(rows, U - r)) for a, b, r in zip(starts, starts[1:], range(0, U, rows), strict=False)]


def _spread(pairs: Pairs, g: Tensor, slab: slice, first: int, rows: int, num_examples: int) -> Tensor:
    """The slab's rows of every example, zeros included: (N, rows · K)."""
    spread = g.new_zeros(num_examples, rows, g.shape[1])
    spread[pairs.example[slab], pairs.row[slab] - first] = g[slab]
    return spread.flatten(1)


def embedding_interference(
    ids: Tensor,
    b: Tensor,
    example_ids: Tensor | None,
    num_examples: int,
    padding_idx: int,
    direction: Tensor | None,
    gram: bool,
) -> EmbeddingSums:
    pairs = pairs_of(ids, b.shape[1], example_ids, num_examples, padding_idx)
    g, dtype = pairs.gradients(b), sum_dtype(b.dtype)
    size, square = g.abs(), g.square()
    terms = [size, square]
    if direction is not None:
        p = g * direction.index_select(0, pairs.rows).to(dtype)[pairs.row]
        terms += [p, p.abs()]
    scalars = torch.stack([term.sum(1, dtype=torch.float64) for term in terms], 1)
    # Clones: an op's outputs may not share storage.
    l1, sq_norm, *along = (x.clone() for x in sum_by(scalars, pairs.example, num_examples).to(dtype).unbind(1))
    dot, abs_dot = along or (None, None)
    total = None
    if gram:
        total = g.new_zeros(num_examples, num_examples, dtype=torch.float64)
        for slab in row_slabs(pairs.row_counts, num_examples, g.shape[1], dtype):
            spread = _spread(pairs, g, *slab, num_examples)
            total += spread @ spread.T
        total = total.to(dtype)
    grad_sum, abs_sum, sq_sum = (sum_groups(x, None, pairs.row_counts) for x in (g, size, square))
    return EmbeddingSums(pairs.rows, grad_sum, abs_sum, sq_sum, l1, sq_norm, dot, abs_dot, total)


def embedding_backward(
    ids: Tensor,
    b: Tensor,
    example_ids: Tensor | None,
    num_examples: int,
    padding_idx: int,
    direction: Tensor | None,
    c: Cotangents,
    mix: Tensor | None,
    want: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """db at a position is its pair's derivative plus Σ_m mix_im g_m; the direction's row gets
    Σ_i c_dot_i g_i + sign(u) Σ_i c_absdot_i |g_i|."""
    pairs = pairs_of(ids, b.shape[1], example_ids, num_examples, padding_idx)
    g, dtype = pairs.gradients(b), sum_dtype(b.dtype)
    u = None if direction is None else direction.index_select(0, pairs.rows).to(dtype)

    def each(x: Tensor) -> Tensor:
        return x.to(dtype)[pairs.example, None]

    db = du = None
    if want[0]:
        s = c.at(lambda x: x[pairs.row]).derivative(g, None if u is None else u[pairs.row], each)
        if mix is not None:
            for slab, first, rows in row_slabs(pairs.row_counts, num_examples, g.shape[1], dtype):
                mixed = (mix.to(dtype) @ _spread(pairs, g, slab, first, rows, num_examples)).view(num_examples, rows, g.shape[1])
                s[slab] += mixed[pairs.example[slab], pairs.row[slab] - first]
        flat = b.new_zeros(b.shape[0] * b.shape[1], b.shape[2])
        flat[pairs.place] = s.to(b.dtype)[pairs.of_place]
        db = flat.view(b.shape)
    if want[1] and direction is not None and u is not None:
        total = torch.zeros_like(u)
        if c.dot is not None:
            total += sum_groups(each(c.dot) * g, None, pairs.row_counts)
        if c.abs_dot is not None:
            total += u.sign() * sum_groups(each(c.abs_dot) * g.abs(), None, pairs.row_counts)
        du = torch.zeros(direction.shape, dtype=direction.dtype, device=direction.device)
        du[pairs.rows] = total.to(direction.dtype)
    return db, du
