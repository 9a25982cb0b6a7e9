"""linear_cross_entropy: the two passes of zsl_kernels/streamed_head.py over the logits. No logit is written to memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsl_kernels.backends.gpu import gpu_of
from zsl_kernels.backends.triton.tiles import config_of, multiply, precision

# If there are fewer programs per multiprocessor, several programs share the vocabulary of a block of rows.
_PROGRAMS = 4


@triton.jit
def _logits(
    p_h, p_w, o_v, m_row, V, K, stride_hk, stride_wv, stride_wk, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):
    """Return a tile (ROWS, COLS) of the logits in float32, for the rows at ``p_h`` (ROWS, 1) and the classes ``o_v`` (COLS,)."""
    x = tl.zeros((m_row.shape[0], COLS), tl.float32)
    m_v = o_v < V
    p_w += o_v.to(tl.int64)[None, :] * stride_wv
    for start in range(0, K, DEPTH):
        o_k = start + tl.arange(0, DEPTH)
        m_k = o_k < K
        # (ROWS, DEPTH) and (DEPTH, COLS)
        left = tl.load(p_h + o_k.to(tl.int64)[None, :] * stride_hk, mask=m_row[:, None] & m_k[None, :], other=0.0)
        right = tl.load(p_w + o_k.to(tl.int64)[:, None] * stride_wk, mask=m_k[:, None] & m_v[None, :], other=0.0)
        x = multiply(left, right.to(left.dtype), x, PRECISION)
    return x


@triton.jit(do_not_specialize=["R", "parts"])
def linear_cross_entropy_kernel(
    p_h,
    p_w,
    p_target,
    p_highest,
    p_total,
    p_at_target,
    R,
    T,
    V,
    K,
    parts,
    stride_hn,
    stride_ht,
    stride_hk,
    stride_wv,
    stride_wk,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the highest logit, Σ exp(logit − highest), and the target's logit or 0, for every ``parts``-th vocabulary block.

    The results are (parts, R). The sum is float64, and the others are float32.
    """
    # Neighboring programs have the same part, so they share its columns of the weight in the cache.
    blocks = tl.cdiv(R, ROWS)
    part = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    m_row = row < R
    p_h += ((row // T).to(tl.int64) * stride_hn + (row % T).to(tl.int64) * stride_ht)[:, None]
    # (ROWS,)
    target = tl.load(p_target + row, mask=m_row, other=-1)
    highest = tl.full((ROWS,), -3.4028234663852886e38, tl.float32)  # finite: −inf − −inf is NaN
    total = tl.zeros((ROWS,), tl.float64)
    at_target = tl.zeros((ROWS,), tl.float32)
    for block in range(part, tl.cdiv(V, COLS), parts):
        o_v = block * COLS + tl.arange(0, COLS)
        x = _logits(p_h, p_w, o_v, m_row, V, K, stride_hk, stride_wv, stride_wk, COLS, DEPTH, PRECISION)
        at_target += tl.sum(tl.where(o_v[None, :] == target[:, None], x, 0.0), 1)
        x = tl.where((o_v < V)[None, :], x, float("-inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(x, 1))
        total = total * tl.exp((before - highest).to(tl.float64)) + tl.sum(tl.exp(x - highest[:, None]), 1).to(tl.float64)
    o_out = part.to(tl.int64) * R + row
    tl.store(p_highest + o_out, highest, mask=m_row)
    tl.store(p_total + o_out, total, mask=m_row)
    tl.store(p_at_target + o_out, at_target, mask=m_row)


@triton.jit(do_not_specialize=["R"])
def linear_cross_entropy_backward_kernel(
    p_h,
    p_w,
    p_target,
    p_shift,
    p_scale,
    p_c,
    p_out,
    R,
    T,
    V,
    K,
    stride_hn,
    stride_ht,
    stride_hk,
    stride_wv,
    stride_wk,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute exp(logit − shift) · scale, minus c at the target, (R, V), for one chunk. Targets are relative to the chunk."""
    blocks = tl.cdiv(R, ROWS)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    o_v = tl.program_id(0) // blocks * COLS + tl.arange(0, COLS)
    m_row = row < R
    p_h += ((row // T).to(tl.int64) * stride_hn + (row % T).to(tl.int64) * stride_ht)[:, None]
    x = _logits(p_h, p_w, o_v, m_row, V, K, stride_hk, stride_wv, stride_wk, COLS, DEPTH, PRECISION)
    # (ROWS,)
    target = tl.load(p_target + row, mask=m_row, other=-1)
    shift = tl.load(p_shift + row, mask=m_row, other=0.0)
    scale = tl.load(p_scale + row, mask=m_row, other=0.0)
    c = tl.load(p_c + row, mask=m_row, other=0.0)
    b = tl.exp(x - shift[:, None]) * scale[:, None]
    b = tl.where(o_v[None, :] == target[:, None], b - c[:, None], b)
    p_out += row.to(tl.int64)[:, None] * V + o_v[None, :]
    tl.store(p_out, b.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_v < V)[None, :])


def forward(h: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``logits.amax(1)``, ``(logits - amax).exp().sum(1)`` and ``logits.gather(1, target)``.

    Here ``logits = h.flatten(0, 1) @ weight.T``. The results are (N·T, 1), the second in float64. Where ``target`` (N·T, 1) is −1,
    the last result is arbitrary.
    """
    # The kernels read memory directly and would miss a pending negation.
    h, weight = h.resolve_neg(), weight.resolve_neg()
    N, T, K = h.shape
    R, V, gpu = N * T, weight.shape[0], gpu_of(h.device)
    tile = config_of(gpu, "linear_cross_entropy", h.dtype, R, V)
    blocks = triton.cdiv(R, tile.rows)
    parts = min(max(triton.cdiv(V, tile.cols), 1), triton.cdiv(_PROGRAMS * gpu.sms, max(blocks, 1)))
    highest, at_target = (h.new_empty(parts, R, dtype=torch.float32) for _ in range(2))
    total = h.new_empty(parts, R, dtype=torch.float64)
    if blocks:
        with torch.cuda.device_of(h):
            linear_cross_entropy_kernel[(blocks * parts,)](
                h,
                weight,
                target.contiguous(),
                highest,
                total,
                at_target,
                R,
                T,
                V,
                K,
                parts,
                *h.stride(),
                *weight.stride(),
                ROWS=tile.rows,
                COLS=tile.cols,
                DEPTH=tile.depth,
                PRECISION=precision(h.dtype),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    of_all = highest.amax(0)
    total = (total * (highest - of_all).double().exp_()).sum(0)
    return of_all[:, None], total[:, None], at_target.sum(0)[:, None]


def output_gradients(
    h: Tensor, weight: Tensor, target: Tensor, shift: Tensor, scale: Tensor, c: Tensor, chunk: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(lo, hi, b[:, lo:hi])`` with ``b = (logits - shift).exp() * scale``, minus ``c`` at the target.

    b has the dtype of ``h``. The next chunk overwrites its buffer. ``target``, ``shift``, ``scale`` and ``c`` are (N·T, 1).
    """
    # The kernels read memory directly and would miss a pending negation.
    h, weight = h.resolve_neg(), weight.resolve_neg()
    N, T, K = h.shape
    R, V, gpu = N * T, weight.shape[0], gpu_of(h.device)
    buffer = h.new_empty(R * min(chunk, V))
    tile = config_of(gpu, "linear_cross_entropy", h.dtype, R, min(chunk, V))
    for lo in range(0, V, chunk):
        hi = min(lo + chunk, V)
        b = buffer[: R * (hi - lo)].view(R, hi - lo)
        if R:
            with torch.cuda.device_of(h):
                linear_cross_entropy_backward_kernel[(triton.cdiv(R, tile.rows) * triton.cdiv(hi - lo, tile.cols),)](
                    h,
                    weight[lo:hi],
                    target - lo,
                    shift,
                    scale,
                    c,
                    b,
                    R,
                    T,
                    hi - lo,
                    K,
                    *h.stride(),
                    *weight.stride(),
                    ROWS=tile.rows,
                    COLS=tile.cols,
                    DEPTH=tile.depth,
                    PRECISION=precision(h.dtype),
                    num_warps=tile.warps,
                    num_stages=tile.stages,
                )
        yield lo, hi, b
