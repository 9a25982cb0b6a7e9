"""Helpers that the kernels share: the tile of a program, a matrix product over positions, sums in memory, and configurations.

Triton compiles a kernel separately for an integer argument that is 1, a multiple of 16, or anything else. Each compilation takes
seconds, so the kernels list counts that vary between batches or slabs in ``do_not_specialize``. Strides and sizes of rows are not
in these lists, because Triton emits wide loads if they are multiples of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsl_kernels.planning.choose import Plan
from zsl_kernels.planning.devices import Gpu
from zsl_kernels.planning.tiles import CONFIGS, UNALIGNED, Config, kind

# The interpreter stores a bfloat16 number as an integer of its bits and would multiply these integers.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def precision(dtype: torch.dtype) -> str:
    """Return the precision of ``tl.dot``.

    float32 operands use three tf32 products, which are as accurate as float32, or one if the fp32_precision setting of torch allows
    tf32. Products of half-precision operands are always exact.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def config_for(plan: Plan, kernel: str, *operands: Tensor) -> Config:
    """Return the plan's configuration, or another one if an operand is not aligned, for example permuted or of odd size."""
    config = plan.chosen.config
    assert config is not None
    return config if all(map(_aligned, operands)) else UNALIGNED[kernel]


def config_of(gpu: Gpu, kernel: str, dtype: torch.dtype, rows: int, cols: int) -> Config:
    """Return the tile that covers ``rows`` × ``cols`` with the least padding. Ties go to the larger one, which is listed first."""

    def padded(tile: Config) -> int:
        return -(-rows // tile.rows) * tile.rows * -(-cols // tile.cols) * tile.cols

    return min(CONFIGS[gpu.arch][kernel][kind(str(dtype).removeprefix("torch."))], key=padded)


def _aligned(x: Tensor) -> bool:
    # The conditions under which Triton emits vector loads: multiples of 16, in elements or bytes.
    return x.stride(-1) == 1 and x.shape[-1] % 16 == 0 and all(s % 16 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0


def parts_of(N: int, parts: int) -> tuple[int, int]:
    """Return (parts, examples per part): at most ``parts``, and no empty one."""
    per_part = triton.cdiv(N, parts)
    return triton.cdiv(N, per_part), per_part


def add_parts(totals: Tensor) -> Tensor:
    """Sum over the parts, (parts, …) to (…)."""
    return totals[0] if totals.shape[0] == 1 else totals.sum(0)


@triton.jit
def tile_of(pid, num_rows, num_cols, GROUP: tl.constexpr = 8):
    """Return the row and column of a program's tile. Concurrent programs form a block and share operands in the L2 cache."""
    group = pid // (GROUP * num_cols)
    size = tl.minimum(num_rows - group * GROUP, GROUP)
    inside = pid - group * GROUP * num_cols
    return group * GROUP + inside % size, inside // size


@triton.jit
def add_tile(p_total, x, mask, stored):
    """Compute p_total += x, or p_total = x if nothing is ``stored`` yet, because new memory is uninitialized."""
    tl.store(p_total, x + tl.load(p_total, mask=mask & stored, other=0.0), mask=mask)


@triton.jit
def multiply(x, y, total, PRECISION: tl.constexpr):
    """Return total + x @ y."""
    if _INTERPRETED:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision=PRECISION)


@triton.jit
def gradient_tile(
    p_a,
    p_b,
    m_a,
    m_b,
    length,
    stride_at,
    stride_bt,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return Σ_{t < length} b_t a_tᵀ (ROWS, COLS). p_b (ROWS,) and p_a (COLS,) point to position 0."""
    g = tl.zeros((ROWS, COLS), tl.float32)
    for t in range(0, length, DEPTH):
        o_t = t + tl.arange(0, DEPTH)
        m_t = o_t < length
        # (DEPTH, COLS)
        a = tl.load(p_a[None, :] + o_t.to(tl.int64)[:, None] * stride_at, mask=m_t[:, None] & m_a[None, :], other=0.0)
        # (ROWS, DEPTH)
        b = tl.load(p_b[:, None] + o_t.to(tl.int64)[None, :] * stride_bt, mask=m_t[None, :] & m_b[:, None], other=0.0)
        g = multiply(b, a, g, PRECISION)
    return g
