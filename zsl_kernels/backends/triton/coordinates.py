"""coordinate_sums: the sums over the coordinates of many weights, in two launches for any number of weights.

In the first kernel, one program per part of a weight sums its coordinates lane by lane in float64. The second kernel adds up the
parts of a weight. The division into parts and the order of additions depend only on the size of the weight. The sums are therefore
bitwise identical on every run, and independent of the other weights in the call. Each weight is read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsl_kernels.types import CoordinateSums

# Coordinates per step, four per thread: the eight sums of a thread leave registers for several programs on a multiprocessor.
BLOCK, WARPS = 512, 4
PART = 4 * BLOCK  # the fewest coordinates per program ...
PROGRAMS = 512  # ... and the most programs per weight: one weight fills the largest device
_FIELDS = len(CoordinateSums._fields)
_ENTRIES = tl.constexpr(6)  # table entries per weight: pointers to its sums and direction, coordinates, programs


@triton.jit
def coordinate_parts_kernel(p_table, p_parts, BLOCK: tl.constexpr):
    """Compute the partial sums (weights, programs, 8). The pointer of a missing direction is 0."""
    weight = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1).to(tl.int64)
    p_weight = p_table + weight * _ENTRIES
    programs = tl.load(p_weight + 5)
    if program < programs:
        p_grad = tl.load(p_weight).to(tl.pointer_type(tl.float32))
        p_abs = tl.load(p_weight + 1).to(tl.pointer_type(tl.float32))
        p_sq = tl.load(p_weight + 2).to(tl.pointer_type(tl.float32))
        directed = tl.load(p_weight + 3) != 0
        p_u = tl.load(p_weight + 3).to(tl.pointer_type(tl.float32))
        count = tl.load(p_weight + 4)
        blocks = (count + BLOCK - 1) // BLOCK
        # (BLOCK,)
        touched = tl.zeros((BLOCK,), tl.float64)
        ratio = tl.zeros((BLOCK,), tl.float64)
        root_ratio = tl.zeros((BLOCK,), tl.float64)
        grad_sq = tl.zeros((BLOCK,), tl.float64)
        sq_total = tl.zeros((BLOCK,), tl.float64)
        p_sum = tl.zeros((BLOCK,), tl.float64)
        p_size = tl.zeros((BLOCK,), tl.float64)
        p_root = tl.zeros((BLOCK,), tl.float64)
        for block in range(blocks * program // programs, blocks * (program + 1) // programs):
            o = block * BLOCK + tl.arange(0, BLOCK)
            mask = o < count
            grad = tl.abs(tl.load(p_grad + o, mask=mask, other=0.0))
            size = tl.load(p_abs + o, mask=mask, other=0.0)
            sq = tl.load(p_sq + o, mask=mask, other=0.0)
            step = tl.abs(tl.load(p_u + o, mask=mask & directed, other=0.0))
            root = tl.sqrt_rn(sq)
            safe = tl.where(size != 0, size, 1.0)
            touched += (size != 0).to(tl.float64)
            ratio += tl.div_rn(grad, safe).to(tl.float64)
            root_ratio += tl.div_rn(root, safe).to(tl.float64)
            grad_sq += (grad * grad).to(tl.float64)
            sq_total += sq.to(tl.float64)
            # Without a direction step is 0, but 0 times an infinite sum would be NaN.
            p_sum += tl.where(directed, grad * step, 0.0).to(tl.float64)
            p_size += tl.where(directed, size * step, 0.0).to(tl.float64)
            p_root += tl.where(directed, root * step, 0.0).to(tl.float64)
        p_part = p_parts + (weight * tl.num_programs(1) + program) * 8
        tl.store(p_part, tl.sum(touched))
        tl.store(p_part + 1, tl.sum(ratio))
        tl.store(p_part + 2, tl.sum(root_ratio))
        tl.store(p_part + 3, tl.sum(grad_sq))
        tl.store(p_part + 4, tl.sum(sq_total))
        tl.store(p_part + 5, tl.sum(p_sum))
        tl.store(p_part + 6, tl.sum(p_size))
        tl.store(p_part + 7, tl.sum(p_root))


@triton.jit(do_not_specialize=["most"])
def coordinate_totals_kernel(p_table, p_parts, p_totals, most, PROGRAMS: tl.constexpr):
    """Add up the parts (weights, most, 8) to (weights, 8)."""
    weight = tl.program_id(0).to(tl.int64)
    programs = tl.load(p_table + weight * _ENTRIES + 5)
    o_program = tl.arange(0, PROGRAMS)
    o_field = tl.arange(0, 8)
    # (PROGRAMS, 8)
    o_part = (weight * most + o_program[:, None]) * 8 + o_field[None, :]
    parts = tl.load(p_parts + o_part, mask=(o_program < programs)[:, None], other=0.0)
    tl.store(p_totals + weight * 8 + o_field, tl.sum(parts, 0))


def coordinate_sums(grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, direction: Tensor | None) -> Tensor:
    return coordinate_sums_of_many([grad_sum], [abs_sum], [sq_sum], [direction]).view(_FIELDS)


def coordinate_sums_of_many(
    grad_sums: Sequence[Tensor], abs_sums: Sequence[Tensor], sq_sums: Sequence[Tensor], directions: Sequence[Tensor | None]
) -> Tensor:
    """Return (weights, 8). ``directions`` is empty or has a tensor or None for each weight."""
    device = grad_sums[0].device
    held: list[Tensor] = []  # converted copies, kept alive until the kernels are queued

    def pointer(x: Tensor | None) -> int:
        if x is None:
            return 0
        if x.dtype != torch.float32 or not x.is_contiguous() or x.is_neg():
            x = x.to(torch.float32).contiguous().resolve_neg()
            held.append(x)
        return x.data_ptr()

    rows: list[int] = []
    most = 1
    for *sums, u in zip(grad_sums, abs_sums, sq_sums, directions or [None] * len(grad_sums), strict=True):
        count = sums[0].numel()
        programs = min(triton.cdiv(count, PART), PROGRAMS)
        rows += (*map(pointer, sums), pointer(u), count, programs)
        most = max(most, programs)
    W = len(grad_sums)
    parts = torch.empty(W, most, _FIELDS, dtype=torch.float64, device=device)
    totals = torch.empty(W, _FIELDS, dtype=torch.float64, device=device)
    with torch.cuda.device_of(totals):
        table = _on_device(rows, device)
        coordinate_parts_kernel[(W, most)](table, parts, BLOCK=BLOCK, num_warps=WARPS)
        coordinate_totals_kernel[(W,)](table, parts, totals, most, PROGRAMS=PROGRAMS, num_warps=WARPS)
    return totals


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Copy the numbers to the device as int64, without a synchronization."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():  # a replayed copy would read host memory that has been reused
        return torch.stack([torch.full((), number, dtype=torch.int64, device=device) for number in numbers])
    return torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=True).to(device, non_blocking=True)
