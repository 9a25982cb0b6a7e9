"""embedding_interference on the CUDA backend (csrc/cuda/embedding.cuh).

The positions are sorted by row and example, divided into windows, and added up window by window. The sizes of all launches follow
from shapes. Without ``max_rows``, the host must read the number of touched rows, which synchronizes with the device. With
``max_rows`` nothing synchronizes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zsl_kernels.backends.cuda.module import ELEMENTS, compiled, guard, pointer, stream, strided, written
from zsl_kernels.backends.cuda.slabs import UNIT, SlabGram
from zsl_kernels.backends.gpu import multiprocessors
from zsl_kernels.types import EmbeddingSums

# The gradients of some rows for all examples, from which the Gram matrix is computed.
SLAB_BYTES = 128 << 20
# Places and segments are 31-bit numbers, and the number of a segment is twice that of a row.
MOST_POSITIONS = 1 << 30
_THREADS = 256  # of the kernels that order the positions
_PIECES = 8  # rows that a window stores for groups that cross its bounds
_DIRECTIONS = {**ELEMENTS, torch.float64: 3}


class _Places(NamedTuple):
    """The sorted positions, and the arguments of the kernels that describe them."""

    positions: tuple[int, int, int, int, int, int, int]
    tensors: tuple[Tensor, ...]  # kept alive while the kernels are queued, because they may be copies of the caller's ids
    places: Tensor
    rows: Tensor  # the touched rows, followed by uninitialized values
    touched: Tensor  # (1,) the number of touched rows


def _order(
    ids: Tensor, b: Tensor, example_ids: Tensor | None, num_examples: int, num_embeddings: int, padding_idx: int, most_rows: int
) -> _Places:
    ids = written(ids).reshape(-1).contiguous()
    examples = None if example_ids is None else written(example_ids).contiguous()
    P, T = ids.shape[0], max(b.shape[1], 1)
    positions = (pointer(ids), pointer(examples), P, T, num_examples, num_embeddings, padding_idx)
    keys = torch.empty_like(ids)
    compiled().embedding_keys(positions, keys.data_ptr(), stream(b))
    ordered, order = keys.sort(stable=True)
    # At most 1024 blocks, because each adds up the counts of all blocks before it.
    chunk = _THREADS * max(4, -(-P // (1024 * _THREADS)))
    blocks = -(-P // chunk)
    counts = ids.new_empty(blocks) if blocks > 1 else None
    places, touched = ids.new_empty(P, 2), ids.new_empty(1)
    rows = ids.new_empty(most_rows)
    out = (ordered, order, counts, places, rows, touched)
    compiled().embedding_places(positions, strided(b), chunk, *map(pointer, out), stream(b))
    return _Places(positions, (ids,) if examples is None else (ids, examples), places, rows, touched)


def window_of(positions: int) -> int:
    """Return the places per window: a power of two, at most half of the square root of ``positions``, but at least 16.

    If all positions have the same row, its sum needs steps within windows and then steps over windows. The total is smallest if
    both numbers are similar.
    """
    half = math.isqrt(positions) // 2
    return max(16, 1 << half.bit_length() >> 1)


def embedding_interference(
    ids: Tensor,
    b: Tensor,
    example_ids: Tensor | None,
    num_examples: int,
    num_embeddings: int,
    padding_idx: int,
    direction: Tensor | None,
    gram: bool,
    max_rows: int | None = None,
) -> EmbeddingSums:
    """Compute the statistics for int64 ids. With ``max_rows`` (at least min(V, P)) nothing synchronizes with the device."""
    N, K, P = num_examples, b.shape[2], ids.numel()
    if P >= MOST_POSITIONS:
        raise ValueError(f"ids: expected fewer than {MOST_POSITIONS} positions for impl='cuda', got {P}; use 'chunked'")
    if N * num_embeddings >= 1 << 63:
        raise ValueError(f"num_embeddings: expected num_embeddings * num_examples < 2^63 for {N} examples, got {num_embeddings}")
    b, u = written(b), None if direction is None else written(direction)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=b.device)

    most = min(num_embeddings, P)
    pairs: Tensor | None = None
    with guard(b):
        if P and N:
            order = _order(ids, b, example_ids, N, num_embeddings, padding_idx, most if max_rows is None else max_rows)
            rows, touched = order.rows, order.touched
            positions, places = order.positions, order.places
        else:
            rows = torch.empty(max_rows or 0, dtype=torch.int64, device=b.device)
            touched, positions, places = torch.zeros(1, dtype=torch.int64, device=b.device), (0, 0, 0, 1, N, 0, -1), None
        if max_rows is None:
            most = int(touched) if places is not None else 0
            rows = rows[:most].clone()
        grad_sum, abs_sum, sq_sum = (empty(rows.shape[0], K) for _ in range(3))
        groups, fields = -(-K // (32 * 16 // b.element_size())) if P and N else 0, 2 if u is None else 4
        scalars = empty(groups, P, fields)
        if places is not None and groups:
            window = window_of(P)
            windows = -(-P // window)
            pieces, open_pairs = empty(windows, _PIECES, K), empty(windows, dtype=torch.int32)
            tensors = (places, rows, pieces, open_pairs, scalars, grad_sum, abs_sum, sq_sum)
            along = (0, 0, 0, 0) if u is None else (u.data_ptr(), _DIRECTIONS[u.dtype], *u.stride())

            def add_up(slab: tuple[int, int, int]) -> None:
                out = tuple(map(pointer, tensors))
                compiled().embedding(positions, ELEMENTS[b.dtype], strided(b), K, window, out, along, slab, stream(b))

            if not gram or not most:
                add_up((0, 0, 0))
            else:
                # Choose the number of rows so that a slab's row length is a multiple of UNIT.
                unit = UNIT // math.gcd(K, UNIT)
                held = -(-max(1, min(most, SLAB_BYTES // (4 * N * K))) // unit) * unit
                slab = empty(N, held * K)
                products = SlabGram(slab, multiprocessors(b.device), N, None, held * K)
                for first in range(0, most, held):
                    compiled().embedding_clear((slab.data_ptr(), first, held), slab.numel(), touched.data_ptr(), stream(b))
                    add_up((slab.data_ptr(), first, held))
                    products.add(slab)
                pairs = products.result()
        results = [empty(N) for _ in range(fields)]
        begin = member = None
        if example_ids is not None:
            by_example, member = written(example_ids).sort(stable=True)
            begin = torch.searchsorted(by_example, torch.arange(N + 1, device=b.device))
        filling = 0 if max_rows is None else min(1024, -(-max_rows * max(K, 1) // 4096))
        if N or filling:
            ends = tuple(map(pointer, (*results, *[None] * (4 - fields))))
            compiled().embedding_finish(
                positions,
                (scalars.data_ptr(), groups, fields, pointer(begin), pointer(member), ends),
                (*map(pointer, (rows, grad_sum, abs_sum, sq_sum)), max_rows or 0, K, filling),
                touched.data_ptr(),
                stream(b),
            )
    if gram and pairs is None:
        pairs = empty(N, N).zero_()
    l1, sq_norm, *rest = results
    dot, abs_dot = rest or (None, None)
    return EmbeddingSums(rows, grad_sum, abs_sum, sq_sum, l1, sq_norm, dot, abs_dot, pairs)
