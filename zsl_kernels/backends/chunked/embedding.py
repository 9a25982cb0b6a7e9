"""embedding_interference in plain PyTorch: it lists the pairs of a touched row and an example that touches it.

All sizes follow from shapes if possible. On the CPU, or if the caller needs the number of touched rows, they are read from the
device once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsl_kernels.backends.chunked.groups import counts_of, sum_by, sum_groups
from zsl_kernels.planning.cpu_cost import CHUNKED_BYTES
from zsl_kernels.types import Cotangents, EmbeddingSums, sum_dtype


class Pairs(NamedTuple):
    """The nonzero rows of all gradients, sorted by row, then by example. Pair q is the row rows[row[q]] of example[q].

    The tensors can be longer than the number of pairs. The last entry collects the positions that are skipped. It and the unused
    entries have row U and example N.
    """

    rows: Tensor  # (U,) ascending, padded with -1
    row: Tensor  # (Q,)
    row_counts: Tensor  # (U + 1,) the number of pairs of each row
    example: Tensor  # (Q,)
    place: Tensor  # (P,) positions sorted by their pair
    of_place: Tensor  # (P,) the pair of each sorted position
    counts: Tensor  # (Q,) the number of positions of each pair

    def gradients(self, b: Tensor) -> Tensor:
        """Return the gradient row of each pair, (Q, K)."""
        flat = b.reshape(b.shape[0] * b.shape[1], b.shape[2]).to(sum_dtype(b.dtype))
        g = sum_groups(flat, self.place, self.counts)
        g[-1] = 0
        return g


def pairs_of(
    ids: Tensor, T: int, example_ids: Tensor | None, num_examples: int, num_embeddings: int, padding_idx: int, exact: bool
) -> Pairs:
    """Return the pairs of these ids.

    ``T`` is the number of positions of an example; it is used without ``example_ids``. With ``exact`` the tensors have no unused
    entries, which needs a synchronization with the device.
    """
    ids = ids.reshape(-1)
    P, N, device = ids.shape[0], num_examples, ids.device
    example = torch.arange(P, device=device) // max(T, 1) if example_ids is None else example_ids
    taken = (ids >= 0) & (ids < num_embeddings) & (ids != padding_idx) & (example >= 0) & (example < N)
    none = num_embeddings * N
    key, place = torch.where(taken, ids * N + example, none).sort(stable=True)
    row_of = torch.where(key == none, num_embeddings, key // max(N, 1))
    pair, row = (F.pad(x.diff() != 0, (1, 0)).cumsum(0)[:P] for x in (key, row_of))
    U, Q = min(num_embeddings, P), P
    if exact and P:
        last = key[-1] == none
        U, Q = (torch.stack((row[-1], pair[-1])) + torch.where(last, 0, 1)).tolist()
    of_place = torch.where(key == none, Q, pair)
    pair_key = key.new_full((Q + 1,), none).scatter_(0, of_place, key)
    rows = key.new_full((U + 1,), -1).scatter_(0, torch.where(key == none, U, row), torch.where(key == none, -1, row_of))[:U]
    row = row.new_full((Q + 1,), U).scatter_(0, of_place, torch.where(key == none, U, row))
    example = torch.where(pair_key == none, N, pair_key % max(N, 1))
    return Pairs(rows, row, counts_of(row, U + 1), example, place, of_place, counts_of(of_place, Q + 1))


def _slabs(pairs: Pairs, num_examples: int, K: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of slabs, such that (N, rows, K) has bounded size."""
    U, rows = pairs.rows.shape[0], max(1, CHUNKED_BYTES // max(1, num_examples * K * dtype.itemsize))
    return ((first, min(rows, U - first)) for first in range(0, U, rows))


def _places(pairs: Pairs, first: int, rows: int, num_examples: int) -> tuple[Tensor, Tensor]:
    """Return which pairs are in a slab, and their indices in (N · rows). The index of other pairs is N · rows."""
    inside = (pairs.row >= first) & (pairs.row < first + rows)
    return inside, torch.where(inside, pairs.example * rows + pairs.row - first, num_examples * rows)


def _spread(pairs: Pairs, g: Tensor, first: int, rows: int, num_examples: int) -> Tensor:
    """Return the slab's rows of every example, including zeros, (N, rows · K)."""
    _, places = _places(pairs, first, rows, num_examples)
    Q = g.shape[0]
    numbers = torch.arange(Q, device=g.device)
    pair = numbers.new_full((num_examples * rows + 1,), Q - 1).scatter_(0, places, numbers)[:-1]
    return g[pair].view(num_examples, rows * g.shape[1])


def embedding_interference(
    ids: Tensor,
    b: Tensor,
    example_ids: Tensor | None,
    num_examples: int,
    num_embeddings: int,
    padding_idx: int,
    direction: Tensor | None,
    gram: bool,
    max_rows: int | None,
) -> EmbeddingSums:
    N, exact = num_examples, max_rows is None or b.device.type == "cpu"
    pairs = pairs_of(ids, b.shape[1], example_ids, N, num_embeddings, padding_idx, exact)
    g, dtype = pairs.gradients(b), sum_dtype(b.dtype)
    size, square = g.abs(), g.square()
    terms = [size, square]
    if direction is not None:
        # Padding (-1) may read any row, because its products belong to no example.
        u = direction.index_select(0, pairs.rows.clamp(min=0)).to(dtype) if num_embeddings else direction.to(dtype)
        p = g * F.pad(u, (0, 0, 0, 1))[pairs.row]
        terms += [p, p.abs()]
    scalars = torch.stack([term.sum(1, dtype=torch.float64) for term in terms], 1)
    # Clone: the outputs of an op must not share storage.
    l1, sq_norm, *along = (x.clone() for x in sum_by(scalars, pairs.example, N + 1)[:N].to(dtype).unbind(1))
    dot, abs_dot = along or (None, None)
    total = None
    if gram:
        total = g.new_zeros(N, N, dtype=torch.float64)
        for slab in _slabs(pairs, N, g.shape[1], dtype):
            spread = _spread(pairs, g, *slab, N)
            total += spread @ spread.T
        total = total.to(dtype)
    U = pairs.rows.shape[0]
    grad_sum, abs_sum, sq_sum = (sum_groups(x, None, pairs.row_counts)[:U] for x in (g, size, square))
    return EmbeddingSums(pairs.rows, grad_sum, abs_sum, sq_sum, l1, sq_norm, dot, abs_dot, total).with_rows(max_rows)


def embedding_backward(
    ids: Tensor,
    b: Tensor,
    example_ids: Tensor | None,
    num_examples: int,
    num_embeddings: int,
    padding_idx: int,
    direction: Tensor | None,
    c: Cotangents,
    mix: Tensor | None,
    want: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the derivatives with respect to b and the direction that ``want`` requests.

    db at a position is the derivative of its pair plus Σ_m mix_im g_m. The derivative with respect to a row of the direction is
    Σ_i c_dot_i g_i + sign(u) Σ_i c_absdot_i |g_i|.
    """
    N = num_examples
    pairs = pairs_of(ids, b.shape[1], example_ids, N, num_embeddings, padding_idx, exact=True)
    g, dtype, U = pairs.gradients(b), sum_dtype(b.dtype), pairs.rows.shape[0]
    u = None if direction is None else F.pad(direction.index_select(0, pairs.rows).to(dtype), (0, 0, 0, 1))

    def each(x: Tensor) -> Tensor:
        return F.pad(x.to(dtype), (0, 1))[pairs.example, None]

    def of_pair(x: Tensor) -> Tensor:
        return F.pad(x[:U], (0, 0, 0, 1))[pairs.row]

    db = du = None
    if want[0]:
        s = c.at(of_pair).derivative(g, None if u is None else u[pairs.row], each)
        if mix is not None:
            for first, rows in _slabs(pairs, N, g.shape[1], dtype):
                mixed = (mix.to(dtype) @ _spread(pairs, g, first, rows, N)).view(N * rows, g.shape[1])
                s += F.pad(mixed, (0, 0, 0, 1))[_places(pairs, first, rows, N)[1]]
        db = b.new_empty(b.shape[0] * b.shape[1], b.shape[2])
        db[pairs.place] = s.to(b.dtype)[pairs.of_place]
        db = db.view(b.shape)
    if want[1] and direction is not None and u is not None:
        total = torch.zeros_like(u[:-1])
        if c.dot is not None:
            total += sum_groups(each(c.dot) * g, None, pairs.row_counts)[:U]
        if c.abs_dot is not None:
            total += u[:-1].sign() * sum_groups(each(c.abs_dot) * g.abs(), None, pairs.row_counts)[:U]
        du = torch.zeros(direction.shape, dtype=direction.dtype, device=direction.device)
        du[pairs.rows] = total.to(direction.dtype)
    return db, du
