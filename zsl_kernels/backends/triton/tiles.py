"""What the kernels share: which tile a program has, a product over positions, sums in memory.

Triton compiles a kernel anew for an integer of 1, for a multiple of 16 and for any other: seconds, which counts that differ from
batch to batch or from slab to slab would take again and again. ``do_not_specialize`` names these, and leaves those whose multiples
of 16 make wide loads: strides and sizes of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsl_kernels.planning.choose import Plan
from zsl_kernels.planning.devices import Gpu
from zsl_kernels.planning.tiles import CONFIGS, UNALIGNED, Config, kind

# The interpreter holds a bfloat16 number as its bits, and multiplies these.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def precision(dtype: torch.dtype) -> str:
    """How the matrix units multiply: float32 as three products of its halves, which is as good as float32's own, or rounded to
    tf32 where torch is told that this will do. Half precision operands are exact in any case."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def config_for(plan: Plan, kernel: str, *operands: Tensor) -> Config:
    """The plan's, unless operands do not come in aligned vectors: those of odd sizes, permuted and sliced ones."""
    config = plan.chosen.config
    assert config is not None
    return config if all(map(_aligned, operands)) else UNALIGNED[kernel]


def config_of(gpu: Gpu, kernel: str, dtype: torch.dtype, rows: int, cols: int) -> Config:
    """The shipped tile that fills up ``rows`` × ``cols`` with the least waste; the larger of equals, which are listed first."""

    def padded(tile: Config) -> int:
        return -(-rows // tile.rows) * tile.rows * -(-cols // tile.cols) * tile.cols

    return min(CONFIGS[gpu.arch][kernel][kind(str(dtype).removeprefix("torch."))], key=padded)


def _aligned(x: Tensor) -> bool:
    # What Triton looks for: multiples of 16, in elements or bytes.
    return x.stride(-1) == 1 and x.shape[-1] % 16 == 0 and all(s % 16 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0


def parts_of(N: int, parts: int) -> tuple[int, int]:
    """How many parts of how many examples each: at most ``parts``, none of them empty."""
    per_part = triton.cdiv(N, parts)
    return triton.cdiv(N, per_part), per_part


def add_parts(totals: Tensor) -> Tensor:
    """(parts, …) to (…)."""
    return totals[0] if totals.shape[0] == 1 else totals.sum(0)


@triton.jit
def tile_of(pid, num_rows, num_cols, GROUP: tl.constexpr = 8):
    """Row and column of a program's tile: programs of one time form a block of the weight and share operands in the L2 cache."""
    group = pid // (GROUP * num_cols)
    size = tl.minimum(num_rows - group * GROUP, GROUP)
    inside = pid - group * GROUP * num_cols
    return group * GROUP + inside % size, inside // size


@triton.jit
def add_tile(p_total, x, mask, stored):
    """p_total += x, or = x where nothing is ``stored`` yet: new memory is not zero."""
    tl.store(p_total, x + tl.load(p_total, mask=mask & stored, other=0.0), mask=mask)


@triton.jit
def multiply(x, y, total, PRECISION: tl.constexpr):
    """total + x @ y."""
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
    """(ROWS, COLS): Σ_{t < length} b_t a_tᵀ, from pointers p_b (ROWS,) and p_a (COLS,) to position zero."""
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
