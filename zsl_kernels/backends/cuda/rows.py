"""The row kernels: dense_interference and scale_bias_grad on the CUDA backend (csrc/cuda/dense.cuh and scale_bias.cuh).

Each op takes one launch. If several blocks have parts of a result, a second launch adds the parts in a fixed order. (The last block
to finish cannot do this: it would need a zeroed counter, which needs another launch or is shared with calls on other streams.) A
Gram matrix takes one more launch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zsl_kernels.backends.cuda.module import ELEMENTS, compiled, guard, pointer, stream, strided, written
from zsl_kernels.backends.cuda.slabs import UNIT, product_blocks
from zsl_kernels.backends.gpu import multiprocessors
from zsl_kernels.ragged import group
from zsl_kernels.types import InterferenceSums

WARPS = 8  # warps of a block
RUN = 64  # the most examples that a warp adds
AT_ONCE = 4  # examples or positions that a thread processes at a time
# Bytes of a row that a warp reads at a time.
PIECE = 32 * 16
COPY_BYTES = 256 << 20  # the most bytes of rows that a launch copies


def _ceil_div(x: int, unit: int) -> int:
    return -(-x // unit)


def _power(x: int) -> int:
    """Return the smallest power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


class _Workspace:
    """Several arrays in one allocation, each aligned to 16 bytes."""

    def __init__(self, like: Tensor, *sizes: int):
        """``sizes`` are in bytes. An array of size 0 gets the pointer 0."""
        starts, total = [], 0
        for size in sizes:
            starts.append(total)
            total += _ceil_div(size, 16) * 16
        self.held = torch.empty(total, dtype=torch.uint8, device=like.device) if total else None
        self.pointers = [pointer(self.held) + start if size else 0 for start, size in zip(starts, sizes, strict=True)]


# Dense ---------------------------------------------------------------------------------------------------------------------------


def dense_interference(g: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
    N, shape = g.shape[0], g.shape[1:]
    P = math.prod(shape)
    fields = 2 if direction is None else 4

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=g.device)

    sums = [empty(*shape) for _ in range(3)]
    scalars = [empty(N) for _ in range(fields)]
    pairs = empty(N, N) if gram else None
    dot, abs_dot = scalars[2:] if direction is not None else (None, None)
    found = InterferenceSums(sums[0], sums[1], sums[2], scalars[0], scalars[1], dot, abs_dot, pairs)
    if not N * P:
        for x in found:
            if x is not None:
                x.zero_()
        return found
    flat = written(g.reshape(N, P))
    u = None if direction is None else written(direction.reshape(-1).to(torch.float32))
    sms, piece = multiprocessors(g.device), PIECE // g.element_size()
    # If the Gram kernel cannot read the rows directly, the launch copies them. If they are too large, PyTorch copies some columns
    # at a time.
    slab_dtype = torch.bfloat16 if g.dtype == torch.bfloat16 else torch.float32
    elements = _ceil_div(P, UNIT) * UNIT
    columns = elements
    copied = 0 if not gram or _is_slab(flat) else N * elements * slab_dtype.itemsize
    if copied > COPY_BYTES:
        columns, copied = max(1, COPY_BYTES // (N * slab_dtype.itemsize * UNIT)) * UNIT, 0
    padded = elements if copied else P
    lanes, blocks, parts, part = _dense_launch(sms, N, _ceil_div(padded, piece))
    products = product_blocks(sms, N, None, columns) if gram else 0  # blocks for these columns
    work = _Workspace(
        g,
        4 * parts * 3 * P if parts > 1 else 0,
        8 * blocks * fields * N if blocks > 1 else 0,
        copied,
        8 * products * N * N,
    )
    of_sums, of_scalars, slab, of_pairs = work.pointers
    example, element = flat.stride()
    module, on = compiled(), stream(g)
    with guard(g):
        module.dense(
            (blocks, parts, part, lanes, padded),
            ELEMENTS[g.dtype],
            (flat.data_ptr(), example, 0, element),
            N,
            P,
            (0, 0) if u is None else (u.data_ptr(), u.stride(0)),
            tuple(pointer(x) for x in (*found[:5], dot, abs_dot)),
            (of_sums, of_scalars, slab),
            on,
        )
        if gram:
            for start in range(0, elements, columns):
                rows = flat if columns == elements else _copy(flat[:, start : start + columns], slab_dtype)
                is_bfloat16, size = slab_dtype == torch.bfloat16, min(columns, elements - start)
                module.slab_gram(slab or rows.data_ptr(), 0, is_bfloat16, N, N, size, of_pairs, start > 0, products, on)
        adding = []
        if of_sums:
            adding.append((of_sums, False, parts, 3 * P, P, [x.data_ptr() for x in sums], 0))
        if of_scalars:
            adding.append((of_scalars, True, blocks, fields * N, N, [x.data_ptr() for x in scalars], 0))
        if pairs is not None:
            adding.append((of_pairs, True, products, N * N, N * N, [pairs.data_ptr()], N))
        if adding:
            module.add_partials(adding, on)
    return found


def _is_slab(x: Tensor) -> bool:
    """Return whether the Gram kernel can read these rows directly."""
    N, P = x.shape
    return (
        x.dtype != torch.float16 and P % UNIT == 0 and x.stride(1) == 1 and (N == 1 or x.stride(0) == P) and x.data_ptr() % 16 == 0
    )


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy x to rows that the Gram kernel can read, padded with zeros."""
    rows = torch.zeros(x.shape[0], _ceil_div(x.shape[1], UNIT) * UNIT, dtype=dtype, device=x.device)
    rows[:, : x.shape[1]] = x
    return rows


def _dense_launch(sms: int, N: int, pieces: int) -> tuple[int, int, int, int]:
    """Return the warps that share coordinates, the blocks of coordinates, the parts of the examples, and the examples of a part.

    If the coordinates alone fill the device, few warps share them, because the sums of sharing warps must be added up. Otherwise,
    the number of sharing warps grows first, until no warp has more than a run of examples. Only then are the examples divided into
    parts, because parts are written to memory and added by a second launch.
    """
    wanted = 2 * sms  # blocks: two per multiprocessor
    lanes = 1
    while lanes < WARPS and (RUN * lanes < N or (lanes < N and _ceil_div(pieces * lanes, WARPS) < wanted)):
        lanes *= 2
    blocks = min(_ceil_div(pieces * lanes, WARPS), wanted)
    parts = max(_ceil_div(N, RUN * lanes), min(_ceil_div(N, AT_ONCE * lanes), wanted // blocks))
    part = _ceil_div(N, parts)
    return lanes, blocks, _ceil_div(N, part), part


# Scales and biases ---------------------------------------------------------------------------------------------------------------


def scale_bias_grad(
    x: Tensor | None,
    b: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    example_ids: Tensor | None,
    num_examples: int,
    bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    N, K = num_examples, b.shape[2]

    def empty() -> Tensor:
        return torch.empty(N, K, dtype=torch.float32, device=b.device)

    results = (empty() if x is not None else None, empty() if bias else None)
    there = [result for result in results if result is not None]
    rows = b.shape[0] * b.shape[1]
    if not there or not rows * N * K:
        for result in there:
            result.zero_()
        return results
    T, begin, order = b.shape[1], None, None
    if example_ids is not None:
        begin, order = group(example_ids, N)
        b = b[0]
        x, mean, rstd = (None if y is None else y[0] for y in (x, mean, rstd))
    b, x = written(b), None if x is None else written(x)
    mean, rstd = (None if y is None or x is None else written(y.to(torch.float32)) for y in (mean, rstd))
    length = max(PIECE // 32 // y.element_size() for y in (b, x) if y is not None)  # columns per thread
    lanes = min(32, _power(_ceil_div(K, length)))
    parts = _scale_parts(multiprocessors(b.device), N * _ceil_div(K, lanes * length), _ceil_div(rows, N), 32 * WARPS // lanes)
    partial = parts > 1
    work = _Workspace(b, 4 * parts * len(there) * N * K if partial else 0)
    (base,) = work.pointers
    pointers = [base + 4 * i * N * K if partial else y.data_ptr() for i, y in enumerate(there)]
    scale_to = pointers[0] if x is not None else 0
    bias_to = pointers[-1] if bias else 0
    module, on = compiled(), stream(b)
    with guard(b):
        module.scale_bias(
            parts,
            lanes,
            ELEMENTS[b.dtype] if x is None else ELEMENTS[x.dtype],
            ELEMENTS[b.dtype],
            (0, 0, 0, 0) if x is None else strided(x),
            strided(b),
            *((0, 0, 0) if y is None else (y.data_ptr(), y.stride(0) if y.ndim == 2 else 0, y.stride(-1)) for y in (mean, rstd)),
            *(N, T, K),
            pointer(begin),
            pointer(order),
            *(scale_to, bias_to, len(there) * N * K if partial else 0),
            on,
        )
        if partial:
            module.add_partials([(base, False, parts, len(there) * N * K, N * K, [y.data_ptr() for y in there], 0)], on)
    return results


def _scale_parts(sms: int, blocks: int, positions: int, rows: int) -> int:
    """Return the number of blocks that share the positions of an example. A block processes ``rows`` positions at a time.

    There are enough blocks to fill the device, and each thread of a block has enough positions for at least one step.
    """
    if blocks >= 2 * sms:
        return 1
    return max(1, min(_ceil_div(3 * sms, blocks), positions // (AT_ONCE * rows)))
