"""The statistics of an embedding's per-example gradients: segments of rows, which are added up without being written to memory.

A pair is a row of the weight and an example that touches it; its gradient is the sum of b over its places. A program takes a run of
pairs of one row, so that a frequent row goes to many, whose sums a second stage adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsl_kernels.backends.chunked.embedding import Pairs, pairs_of, row_slabs
from zsl_kernels.backends.chunked.groups import sum_by, sum_groups
from zsl_kernels.backends.gpu import gpu_of
from zsl_kernels.backends.triton.tiles import config_of
from zsl_kernels.types import EmbeddingSums


@triton.jit(do_not_specialize=["first_task", "first_row", "num_rows", "Q"])
def embedding_interference_kernel(
    p_b,
    p_place,
    p_place_begin,
    p_pair_begin,
    p_row,
    p_rows,
    p_example,
    p_u,
    p_grad,
    p_abs,
    p_sq,
    p_scalars,
    p_gradients,
    first_task,
    first_row,
    num_rows,
    T,
    K,
    Q,
    stride_bn,
    stride_bt,
    stride_bk,
    stride_uv,
    stride_uk,
    PLACES: tl.constexpr,
    COLS: tl.constexpr,
):
    """The tasks from ``first_task`` on, a run of pairs of one row each, for a block of the columns.

    The task's sums go to (tasks, K); the pairs' Σ|g|, Σg² and, with a direction u (V, K), Σgu and Σ|gu| to (2 or 4, blocks, Q). For
    a Gram the gradients go to ``p_gradients`` (N, num_rows, K), those of the rows from ``first_row`` on. What is not there is None.
    """
    task = (first_task + tl.program_id(0)).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    o_k = block * COLS + tl.arange(0, COLS)
    m_k = o_k < K
    row = tl.load(p_row + task)
    if p_u is not None:
        o_u = tl.load(p_rows + row).to(tl.int64) * stride_uv + o_k * stride_uk
        u = tl.load(p_u + o_u, mask=m_k, other=0.0).to(tl.float32)
    # (COLS,)
    grad_sum = tl.zeros((COLS,), tl.float32)
    abs_sum = tl.zeros((COLS,), tl.float32)
    sq_sum = tl.zeros((COLS,), tl.float32)
    for pair in range(tl.load(p_pair_begin + task), tl.load(p_pair_begin + task + 1)):
        end = tl.load(p_place_begin + pair + 1)
        g = tl.zeros((COLS,), tl.float32)
        for start in range(tl.load(p_place_begin + pair), end, PLACES):
            # (PLACES,)
            o_place = start + tl.arange(0, PLACES)
            m_place = o_place < end
            place = tl.load(p_place + o_place, mask=m_place, other=0)
            o_b = (place // T * stride_bn + place % T * stride_bt)[:, None] + o_k[None, :] * stride_bk
            # (PLACES, COLS)
            g += tl.sum(tl.load(p_b + o_b, mask=m_place[:, None] & m_k[None, :], other=0.0).to(tl.float32), 0)
        size = tl.abs(g)
        grad_sum += g
        abs_sum += size
        sq_sum += g * g
        o_scalar = block * Q + pair
        step = tl.num_programs(1).to(tl.int64) * Q
        tl.store(p_scalars + o_scalar, tl.sum(size))
        tl.store(p_scalars + step + o_scalar, tl.sum(g * g))
        if p_u is not None:
            tl.store(p_scalars + 2 * step + o_scalar, tl.sum(g * u))
            tl.store(p_scalars + 3 * step + o_scalar, tl.sum(size * tl.abs(u)))
        if p_gradients is not None:
            o_row = tl.load(p_example + pair).to(tl.int64) * num_rows + row - first_row
            tl.store(p_gradients + o_row * K + o_k, g, mask=m_k)
    tl.store(p_grad + task * K + o_k, grad_sum, mask=m_k)
    tl.store(p_abs + task * K + o_k, abs_sum, mask=m_k)
    tl.store(p_sq + task * K + o_k, sq_sum, mask=m_k)


def embedding_interference(
    ids: Tensor,
    b: Tensor,
    example_ids: Tensor | None,
    num_examples: int,
    padding_idx: int,
    direction: Tensor | None,
    gram: bool,
) -> EmbeddingSums:
    """``chunked.embedding.embedding_interference``, of which the pairs' gradients are never held; for the Gram those of some rows."""
    pairs = pairs_of(ids, b.shape[1], example_ids, num_examples, padding_idx)
    N, T, K, Q = num_examples, b.shape[1], b.shape[2], pairs.row.shape[0]
    tile = config_of(gpu_of(b.device), "embedding_interference", b.dtype, 1, K)
    runs, task_row, pair_begin = _tasks(pairs, tile.rows)
    sums = [b.new_empty(task_row.shape[0], K, dtype=torch.float32) for _ in range(3)]
    blocks = triton.cdiv(K, tile.cols)
    scalars = b.new_empty(2 if direction is None else 4, blocks, Q, dtype=torch.float32)
    place_begin = _begin(pairs.counts)

    def launch(tasks: slice, gradients: Tensor | None = None, first_row: int = 0) -> None:
        if tasks.stop > tasks.start and blocks:
            with torch.cuda.device_of(b):
                embedding_interference_kernel[(tasks.stop - tasks.start, blocks)](
                    b,
                    pairs.place,
                    place_begin,
                    pair_begin,
                    task_row,
                    pairs.rows,
                    pairs.example,
                    direction,
                    *sums,
                    scalars,
                    gradients,
                    tasks.start,
                    first_row,
                    0 if gradients is None else gradients.shape[1],
                    T,
                    K,
                    Q,
                    *b.stride(),
                    *((0, 0) if direction is None else direction.stride()),
                    PLACES=tile.depth,
                    COLS=tile.cols,
                    num_warps=tile.warps,
                    num_stages=tile.stages,
                )

    total = None
    if gram:
        total = b.new_zeros(N, N, dtype=torch.float64)
        for tasks, first_row, rows in row_slabs(runs, N, K, torch.float32):
            gradients = b.new_zeros(N, rows, K, dtype=torch.float32)
            launch(tasks, gradients, first_row)
            total += gradients.flatten(1) @ gradients.flatten(1).T
        total = total.float()
    else:
        launch(slice(0, task_row.shape[0]))
    each = sum_by(scalars.sum(1, dtype=torch.float64).T, pairs.example, N).float()
    # Clones: an op's outputs may not share storage.
    l1, sq_norm, *along = (x.clone() for x in each.unbind(1))
    dot, abs_dot = along or (None, None)
    if task_row.shape[0] > runs.shape[0]:
        sums = [sum_groups(x, None, runs) for x in sums]
    grad_sum, abs_sum, sq_sum = sums
    return EmbeddingSums(pairs.rows, grad_sum, abs_sum, sq_sum, l1, sq_norm, dot, abs_dot, total)


def _begin(counts: Tensor) -> Tensor:
    """Where each group starts and the last one ends."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _tasks(pairs: Pairs, run: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of at most ``run`` pairs of one row: (U,) how many for each row, (tasks,) the row and (tasks + 1,) the first pair."""
    runs = (pairs.row_counts + run - 1).div(run, rounding_mode="floor")
    row = torch.arange(runs.shape[0], device=runs.device).repeat_interleave(runs)
    in_row = torch.arange(row.shape[0], device=runs.device) - _begin(runs)[row]
    first = _begin(pairs.row_counts)[row] + run * in_row
    return runs, row, torch.nn.functional.pad(first, (0, 1), value=pairs.row.shape[0])
