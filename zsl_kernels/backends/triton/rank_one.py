"""Algorithm "rank-one": the sums of the gradients g_i = b_i a_iᵀ of examples with a single position, which factorize::

    grad_sum = b.T @ a
    abs_sum  = b.abs().T @ a.abs()
    sq_sum   = b.square().T @ a.square()

The kernel reads ``a`` (N, K) and ``b`` (N, O) once and computes three products with each pair of loaded tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsl_kernels.backends.triton.tiles import add_parts, add_tile, config_for, multiply, parts_of, precision, tile_of
from zsl_kernels.planning.choose import Plan

# Examples per run. The matrix units add up a run, and an addition adds it to the totals, because it rounds more accurately.
RUN = 256


@triton.jit(do_not_specialize=["N", "per_part"])
def rank_one_kernel(
    a_ptr,
    b_ptr,
    grad_ptr,  # (parts, O, K) like the other two sums
    abs_ptr,
    sq_ptr,
    N,
    K,
    O,
    per_part,
    stride_an,
    stride_ak,
    stride_bn,
    stride_bo,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """Compute the three sums. ``SQUARES`` is the precision for the squares, which are float32: a bfloat16 square has 16 bits."""
    tile_row, tile_col = tile_of(tl.program_id(0), tl.cdiv(O, ROWS), tl.cdiv(K, COLS))
    part = tl.program_id(1)
    o_o = (tile_row * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_k = (tile_col * COLS + tl.arange(0, COLS)).to(tl.int64)
    m_o = o_o < O
    m_k = o_k < K
    first = part * per_part
    last = tl.minimum(first + per_part, N)
    for run in tl.range(first, last, RUN, disable_licm=True):
        grad_sum = tl.zeros((ROWS, COLS), tl.float32)
        abs_sum = tl.zeros((ROWS, COLS), tl.float32)
        sq_sum = tl.zeros((ROWS, COLS), tl.float32)
        end = tl.minimum(run + RUN, last)
        for n in range(run, end, DEPTH):
            o_n = n + tl.arange(0, DEPTH)
            m_n = o_n < end
            i = o_n.to(tl.int64)
            # (DEPTH, COLS)
            a = tl.load(a_ptr + i[:, None] * stride_an + o_k[None, :] * stride_ak, mask=m_n[:, None] & m_k[None, :], other=0.0)
            # (ROWS, DEPTH)
            b = tl.load(b_ptr + o_o[:, None] * stride_bo + i[None, :] * stride_bn, mask=m_o[:, None] & m_n[None, :], other=0.0)
            grad_sum = multiply(b, a, grad_sum, PRECISION)
            abs_sum = multiply(tl.abs(b), tl.abs(a), abs_sum, PRECISION)
            a = a.to(tl.float32)
            b = b.to(tl.float32)
            sq_sum = multiply(b * b, a * a, sq_sum, SQUARES)
        mask = m_o[:, None] & m_k[None, :]
        # (ROWS, COLS)
        o_sum = (part.to(tl.int64) * O + o_o[:, None]) * K + o_k[None, :]
        add_tile(grad_ptr + o_sum, grad_sum, mask, run > first)
        add_tile(abs_ptr + o_sum, abs_sum, mask, run > first)
        add_tile(sq_ptr + o_sum, sq_sum, mask, run > first)


def sums(plan: Plan, a: Tensor, b: Tensor) -> list[Tensor]:
    """Return the three sums (O, K) for ``a`` (N, K) and ``b`` (N, O)."""
    (N, K), O = a.shape, b.shape[1]
    if 0 in (N, O, K):
        return [a.new_zeros(O, K, dtype=torch.float32) for _ in range(3)]
    a, b = a.resolve_neg(), b.resolve_neg()
    config = config_for(plan, "rank_one", a, b)
    parts, per_part = parts_of(N, plan.chosen.splits)
    totals = [a.new_empty(parts, O, K, dtype=torch.float32) for _ in range(3)]
    rank_one_kernel[(triton.cdiv(O, config.rows) * triton.cdiv(K, config.cols), parts)](
        a,
        b,
        *totals,
        N,
        K,
        O,
        per_part,
        *a.stride(),
        *b.stride(),
        ROWS=config.rows,
        COLS=config.cols,
        DEPTH=config.depth,
        RUN=RUN,
        PRECISION=precision(a.dtype),
        SQUARES=precision(torch.float32),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return [add_parts(x) for x in totals]
