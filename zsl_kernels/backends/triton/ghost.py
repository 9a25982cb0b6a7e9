"""Algorithm "ghost": inner products of gradients without computing the gradients, ⟨g_i, g_k⟩ = Σ_ts (a_it·a_ks)(b_it·b_ks).

The kernel is tiled like attention. A program combines a block of positions of some examples with a block of positions of others. It
computes the two small matrices of inner products on the matrix units, multiplies them entry by entry, and adds up the entries of
each pair of examples. A block can contain several short examples, each padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsl_kernels.backends.triton.tiles import multiply, precision
from zsl_kernels.planning.choose import Plan
from zsl_kernels.planning.devices import Gpu
from zsl_kernels.planning.tiles import Config

# If there are fewer programs per multiprocessor, several programs share the positions of a pair of blocks.
_PROGRAMS = 4


@triton.jit(do_not_specialize=["N", "M", "parts"])
def ghost_kernel(
    p_a,
    p_b,
    p_a2,
    p_b2,
    p_out,
    N,
    M,
    T,
    S,
    K,
    O,
    parts,
    stride_an,
    stride_at,
    stride_ak,
    stride_bn,
    stride_bt,
    stride_bo,
    stride_a2n,
    stride_a2t,
    stride_a2k,
    stride_b2n,
    stride_b2t,
    stride_b2o,
    ITSELF: tl.constexpr,
    NORMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS_EACH: tl.constexpr,
    COLS_EACH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute inner products (parts, N, M), or (parts, N) with ``NORMS``; each part covers every ``parts``-th block of positions.

    A program combines ``ROWS`` positions of the first set with ``COLS`` of the second, of which ``ROWS_EACH`` and ``COLS_EACH``
    belong to one example. With ``ITSELF``, only blocks on or above the diagonal are computed.
    """
    EXAMPLES: tl.constexpr = ROWS // ROWS_EACH
    OTHERS: tl.constexpr = COLS // COLS_EACH
    part = tl.program_id(0) % parts
    pair = tl.program_id(0) // parts
    if NORMS:
        block_i = pair
        block_k = pair
    else:
        block_i = pair // tl.cdiv(M, OTHERS)
        block_k = pair % tl.cdiv(M, OTHERS)
    if ITSELF and (block_k + 1) * OTHERS <= block_i * EXAMPLES:
        return
    # (ROWS,) and (COLS,): the example, and the position in its block
    i = block_i * EXAMPLES + tl.arange(0, ROWS) // ROWS_EACH
    k = block_k * OTHERS + tl.arange(0, COLS) // COLS_EACH
    at_t = tl.arange(0, ROWS) % ROWS_EACH
    at_s = tl.arange(0, COLS) % COLS_EACH
    o_depth = tl.arange(0, DEPTH)
    # int64: an offset may exceed 2^31 elements
    p_a += i.to(tl.int64)[:, None] * stride_an
    p_b += i.to(tl.int64)[:, None] * stride_bn
    p_a2 += k.to(tl.int64)[None, :] * stride_a2n
    p_b2 += k.to(tl.int64)[None, :] * stride_b2n
    # If blocks contain several examples, each example has a single block. Then the total has one term and float32 suffices.
    TOTAL: tl.constexpr = tl.float32 if EXAMPLES > 1 and OTHERS > 1 else tl.float64
    total = tl.zeros((EXAMPLES, OTHERS), TOTAL)
    for block_t in range(part, tl.cdiv(T, ROWS_EACH), parts):
        t = block_t * ROWS_EACH + at_t
        m_t = (i < N) & (t < T)
        p_at = p_a + t.to(tl.int64)[:, None] * stride_at
        p_bt = p_b + t.to(tl.int64)[:, None] * stride_bt
        # The matrices of an example with itself are symmetric, so norms need only block_s ≥ block_t.
        for block_s in range(block_t if NORMS else 0, tl.cdiv(S, COLS_EACH)):
            s = block_s * COLS_EACH + at_s
            m_s = (k < M) & (s < S)
            p_as = p_a2 + s.to(tl.int64)[None, :] * stride_a2t
            p_bs = p_b2 + s.to(tl.int64)[None, :] * stride_b2t
            x = tl.zeros((ROWS, COLS), tl.float32)
            for start in range(0, K, DEPTH):
                o_k = start + o_depth
                # (ROWS, DEPTH) and (DEPTH, COLS)
                left = tl.load(p_at + o_k.to(tl.int64)[None, :] * stride_ak, mask=m_t[:, None] & (o_k < K)[None, :], other=0.0)
                right = tl.load(p_as + o_k.to(tl.int64)[:, None] * stride_a2k, mask=(o_k < K)[:, None] & m_s[None, :], other=0.0)
                x = multiply(left, right, x, PRECISION)
            y = tl.zeros((ROWS, COLS), tl.float32)
            for start in range(0, O, DEPTH):
                o_o = start + o_depth
                # (ROWS, DEPTH) and (DEPTH, COLS)
                left = tl.load(p_bt + o_o.to(tl.int64)[None, :] * stride_bo, mask=m_t[:, None] & (o_o < O)[None, :], other=0.0)
                right = tl.load(p_bs + o_o.to(tl.int64)[:, None] * stride_b2o, mask=(o_o < O)[:, None] & m_s[None, :], other=0.0)
                y = multiply(left, right, y, PRECISION)
            # Padding is zero, but zero times an infinity in the other operand is NaN.
            products = tl.where(m_t[:, None] & m_s[None, :], x * y, 0.0)
            tile = tl.sum(tl.sum(tl.reshape(products, (EXAMPLES, ROWS_EACH, OTHERS, COLS_EACH)), 3), 1)
            if NORMS:
                tile *= tl.where(block_s == block_t, 1.0, 2.0)
            total += tile.to(TOTAL)
    # (EXAMPLES,) and (OTHERS,)
    i = block_i * EXAMPLES + tl.arange(0, EXAMPLES)
    k = block_k * OTHERS + tl.arange(0, OTHERS)
    if NORMS:
        norms = tl.sum(tl.where(i[:, None] == k[None, :], total, 0.0), 1)
        tl.store(p_out + part.to(tl.int64) * N + i, norms, mask=i < N)
    else:
        o_pair = (part.to(tl.int64) * N + i)[:, None] * M + k[None, :]
        tl.store(p_out + o_pair, total, mask=(i < N)[:, None] & (k < M)[None, :])


def _partials(tile: Config, gpu: Gpu, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, itself: bool, norms: bool) -> Tensor:
    """Return partial inner products, (parts, N, M) or (parts, N) in float64. The caller sums over the parts."""
    N, T, K = a.shape
    M, S, O = a2.shape[0], a2.shape[1], b.shape[2]
    rows_each, cols_each = min(triton.next_power_of_2(T), tile.rows), min(triton.next_power_of_2(S), tile.cols)
    blocks = triton.cdiv(N, tile.rows // rows_each)
    pairs = blocks if norms else blocks * triton.cdiv(M, tile.cols // cols_each)
    parts = min(triton.cdiv(T, rows_each), triton.cdiv(_PROGRAMS * gpu.sms, pairs))
    out = a.new_empty((parts, N) if norms else (parts, N, M), dtype=torch.float64)
    with torch.cuda.device_of(a):
        ghost_kernel[(pairs * parts,)](
            a,
            b,
            a2,
            b2,
            out,
            N,
            M,
            T,
            S,
            K,
            O,
            parts,
            *a.stride(),
            *b.stride(),
            *a2.stride(),
            *b2.stride(),
            ITSELF=itself,
            NORMS=norms,
            ROWS=tile.rows,
            COLS=tile.cols,
            DEPTH=tile.depth,
            ROWS_EACH=rows_each,
            COLS_EACH=cols_each,
            PRECISION=precision(a.dtype),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def gram(plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None) -> Tensor:
    """``torch.einsum("ntk,msk,nto,mso->nm", a, a2, b, b2)``, with a2 = a and b2 = b if there is no second set.

    Work: 2 N M T S (K + O) operations, or half of this for one set. Memory: the result in float64, several times if there are few
    examples.
    """
    itself = a2 is None or b2 is None
    a2, b2 = (a, b) if a2 is None or b2 is None else (a2, b2)
    tile, gpu = plan.chosen.config, plan.call.gpu
    assert tile is not None
    assert gpu is not None
    if not (a.numel() and b.numel() and a2.numel() and b2.numel()):
        return a.new_zeros(a.shape[0], a2.shape[0], dtype=torch.float32)
    # Entries below the diagonal that were not computed are uninitialized; triu ignores them.
    total = _partials(tile, gpu, a, b, a2, b2, itself, False).sum(0).float()
    return total.triu() + total.triu(1).T if itself else total


def sq_norm(plan: Plan, a: Tensor, b: Tensor) -> Tensor:
    """``torch.einsum("ntk,nsk,nto,nso->n", a, a, b, b)``: the diagonal of :func:`gram`, with each pair of positions once."""
    tile, gpu = plan.chosen.config, plan.call.gpu
    assert tile is not None
    assert gpu is not None
    if not (a.numel() and b.numel()):
        return a.new_zeros(a.shape[0], dtype=torch.float32)
    # Rounding can make the sum negative, because it is not computed as a sum of squares.
    return _partials(tile, gpu, a, b, a, b, True, True).sum(0).float().clamp_(min=0)
