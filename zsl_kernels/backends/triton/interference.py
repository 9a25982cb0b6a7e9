"""Algorithms "direct" and "stored": compute the per-example gradients g_i = b_iᵀ a_i tile by tile.

"direct" folds each tile into the results immediately. A program processes one tile of the (O, K) weight for one part of the
examples and computes the tile of each g_i in registers. It accumulates the sums in registers for a run of examples, and then adds
them to the part's totals in memory, which bounds the rounding error for thousands of examples. A scalar is written as one number
per example and tile. PyTorch adds up tiles and parts, so the results do not depend on the order in which programs run.

"stored", which the Gram matrix needs, writes the gradients of all examples for one slab of the weight at a time. A slab stays in
the L2 cache. A second kernel reads it for the sums, and PyTorch's matrix product reads it for the inner products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsl_kernels.backends.triton.tiles import add_parts, add_tile, config_for, gradient_tile, parts_of, precision, tile_of
from zsl_kernels.planning.choose import Plan
from zsl_kernels.planning.gpu_cost import SUM_RUN, slab_of
from zsl_kernels.planning.tiles import Config
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import InterferenceSums

# Elements of a slab per program of fold_kernel, and its warps.
FOLD_BLOCK, FOLD_WARPS = 1024, 4


@triton.jit(do_not_specialize=["N", "T", "per_part", "first_row", "first_col", "num_rows", "num_cols", "slab_rows"])
def interference_kernel(
    a_ptr,
    b_ptr,
    direction_ptr,  # (O, K) float32, or None
    begin_ptr,  # (N + 1,) of ragged rows, or None
    bound_ptr,  # (N, rows of tiles + 1) of added rows, or None
    feature_ptr,
    added_ptr,
    grad_ptr,  # (parts, O, K) like the other two sums, or all None
    abs_ptr,
    sq_ptr,
    scalars_ptr,  # (fields, N, tiles), or None
    slab_ptr,  # (N, slab_rows, slab_cols), or None
    N,
    T,
    K,
    O,
    per_part,
    first_row,
    first_col,
    num_rows,
    num_cols,
    slab_rows,
    slab_cols,
    stride_an,
    stride_at,
    stride_ak,
    stride_bn,
    stride_bt,
    stride_bo,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients tile by tile and write one of three outputs.

    - With ``grad_ptr``: the sums and the scalars l1 and sq_norm; with a direction also dot and abs_dot.
    - With ``slab_ptr``: the gradients themselves, for the tiles from (first_row, first_col) on.
    - With neither: sq_norm.

    ``EVEN``: the tiles cover the weight exactly.
    """
    tile_row, tile_col = tile_of(tl.program_id(0), num_rows, num_cols)
    part = tl.program_id(1)
    o_o = ((first_row + tile_row) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_k = ((first_col + tile_col) * COLS + tl.arange(0, COLS)).to(tl.int64)
    m_o = EVEN | (o_o < O)
    m_k = EVEN | (o_k < K)
    mask = m_o[:, None] & m_k[None, :]
    p_a = a_ptr + o_k * stride_ak
    p_b = b_ptr + o_o * stride_bo
    # The offset of the tile in a matrix of the weight's shape, and the offsets of its elements in the tile.
    corner = tile_row.to(tl.int64) * ROWS * K + tile_col * COLS
    o_r = tl.arange(0, ROWS)
    o_c = tl.arange(0, COLS)
    within = o_r.to(tl.int64)[:, None] * K + o_c[None, :]
    tiles = tl.num_programs(0).to(tl.int64)
    first = part * per_part
    last = tl.minimum(first + per_part, N)
    # Hoisting addresses out of these loops would occupy registers that the sums need.
    for run in tl.range(first, last, RUN, disable_licm=True):
        if grad_ptr is not None:
            grad_sum = tl.zeros((ROWS, COLS), tl.float32)
            abs_sum = tl.zeros((ROWS, COLS), tl.float32)
            sq_sum = tl.zeros((ROWS, COLS), tl.float32)
        for n in tl.range(run, tl.minimum(run + RUN, last), disable_licm=True):
            i = tl.cast(n, tl.int64)
            if begin_ptr is not None:
                begin = tl.load(begin_ptr + i)
                length = (tl.load(begin_ptr + i + 1) - begin).to(tl.int32)
                p_an = p_a + begin * stride_at
                p_bn = p_b + begin * stride_bt
            else:
                length = T
                p_an = p_a + i * stride_an
                p_bn = p_b + i * stride_bn
            g = gradient_tile(p_an, p_bn, m_k, m_o, length, stride_at, stride_bt, ROWS, COLS, DEPTH, PRECISION)
            if bound_ptr is not None:
                p_bound = bound_ptr + i * (tl.cdiv(O, ROWS) + 1) + first_row + tile_row
                for p in range(tl.load(p_bound), tl.load(p_bound + 1)):
                    # (COLS,)
                    value = tl.load(added_ptr + p * K + o_k, mask=m_k, other=0.0)
                    g += tl.where(o_o[:, None] == tl.load(feature_ptr + p), value[None, :], 0.0)
            if not EVEN:
                # Outside of the weight one operand is zero, but zero times infinity is NaN.
                g = tl.where(mask, g, 0.0)
            if scalars_ptr is not None:
                p_scalar = scalars_ptr + i * tiles + tl.program_id(0)
            if direction_ptr is not None:
                # (ROWS, COLS)
                u = tl.load(direction_ptr + corner + within, mask=mask, other=0.0)
                product = g * u
                tl.store(p_scalar + 2 * N * tiles, tl.sum(product))
                tl.store(p_scalar + 3 * N * tiles, tl.sum(tl.abs(product)))
            if grad_ptr is not None:
                square = g * g
                grad_sum += g
                abs_sum += tl.abs(g)
                sq_sum += square
                tl.store(p_scalar, tl.sum(tl.abs(g)))
                tl.store(p_scalar + N * tiles, tl.sum(square))
            elif slab_ptr is not None:
                p_slab = slab_ptr + (i * slab_rows + tile_row * ROWS) * slab_cols + tile_col * COLS
                tl.store(p_slab + o_r[:, None] * slab_cols + o_c[None, :], g, mask=mask)
            else:
                tl.store(p_scalar, tl.sum(g * g))
        if grad_ptr is not None:
            # (ROWS, COLS)
            o_sum = part.to(tl.int64) * O * K + corner + within
            add_tile(grad_ptr + o_sum, grad_sum, mask, run > first)
            add_tile(abs_ptr + o_sum, abs_sum, mask, run > first)
            add_tile(sq_ptr + o_sum, sq_sum, mask, run > first)


@triton.jit(do_not_specialize=["N", "per_part"])
def fold_kernel(
    slab_ptr,  # (N, E)
    direction_ptr,  # (E,) float32, or None
    sums_ptr,  # (3, parts, E)
    scalars_ptr,  # (fields, N, blocks)
    N,
    E,
    per_part,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    """Compute the sums and scalars of stored gradients."""
    part = tl.program_id(1)
    blocks = tl.num_programs(0).to(tl.int64)
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < E
    first = part * per_part
    last = tl.minimum(first + per_part, N)
    if direction_ptr is not None:
        # (BLOCK,)
        u = tl.load(direction_ptr + o_e, mask=m_e, other=0.0)
    for run in range(first, last, RUN):
        grad_sum = tl.zeros((BLOCK,), tl.float32)
        abs_sum = tl.zeros((BLOCK,), tl.float32)
        sq_sum = tl.zeros((BLOCK,), tl.float32)
        for n in range(run, tl.minimum(run + RUN, last)):
            i = tl.cast(n, tl.int64)
            # (BLOCK,)
            g = tl.load(slab_ptr + i * E + o_e, mask=m_e, other=0.0)
            square = g * g
            grad_sum += g
            abs_sum += tl.abs(g)
            sq_sum += square
            p_scalar = scalars_ptr + i * blocks + tl.program_id(0)
            tl.store(p_scalar, tl.sum(tl.abs(g)))
            tl.store(p_scalar + N * blocks, tl.sum(square))
            if direction_ptr is not None:
                product = g * u
                tl.store(p_scalar + 2 * N * blocks, tl.sum(product))
                tl.store(p_scalar + 3 * N * blocks, tl.sum(tl.abs(product)))
        # (BLOCK,)
        p_sum = sums_ptr + part.to(tl.int64) * E + o_e
        all_parts = tl.num_programs(1).to(tl.int64) * E
        add_tile(p_sum, grad_sum, m_e, run > first)
        add_tile(p_sum + all_parts, abs_sum, m_e, run > first)
        add_tile(p_sum + 2 * all_parts, sq_sum, m_e, run > first)


class _Operands(NamedTuple):
    """The operands of a call: a, b, ragged and added rows, and the configuration of the kernel."""

    a: Tensor
    b: Tensor
    begin: Tensor | None
    added: AddedRows | None
    bounds: Tensor | None
    config: Config
    splits: int

    @classmethod
    def of(
        cls, plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None, added: AddedRows | None = None, *others: Tensor
    ) -> _Operands:
        """Prepare the operands. ``others``: a second set, which must use the same tile because it is stored in the same slabs."""
        # The kernels read memory directly and would miss a pending negation.
        a, b = a.resolve_neg(), b.resolve_neg()
        config = config_for(plan, "interference" if plan.way == "direct" else "sq_norm", a, b, *others)
        return cls(
            a, b, begin, added, None if added is None else _bounds(added, b.shape[-1], config.rows), config, plan.chosen.splits
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return (N, O, K)."""
        N = self.a.shape[0] if self.begin is None else self.begin.shape[0] - 1
        return N, self.b.shape[-1], self.a.shape[-1]

    @property
    def tiles(self) -> tuple[int, int]:
        """Return the numbers of rows and columns of tiles of the weight."""
        _, O, K = self.sizes
        return triton.cdiv(O, self.config.rows), triton.cdiv(K, self.config.cols)

    def launch(
        self,
        parts: tuple[int, int],
        direction: Tensor | None = None,
        sums: Sequence[Tensor] | None = None,
        scalars: Tensor | None = None,
        slab: Tensor | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> None:
        """Launch the kernel. ``corner``: the row and column of the weight where the slab begins, aligned to tiles."""
        a, b, config = self.a, self.b, self.config
        N, O, K = self.sizes
        rows, cols = (
            self.tiles if slab is None else (triton.cdiv(slab.shape[1], config.rows), triton.cdiv(slab.shape[2], config.cols))
        )
        number, per_part = parts
        interference_kernel[(rows * cols, number)](
            a,
            b,
            direction,
            self.begin,
            self.bounds,
            None if self.added is None else self.added.feature,
            None if self.added is None else self.added.values,
            *((None,) * 3 if sums is None else sums),
            scalars,
            slab,
            N,
            a.shape[-2],
            K,
            O,
            per_part,
            corner[0] // config.rows,
            corner[1] // config.cols,
            rows,
            cols,
            0 if slab is None else slab.shape[1],
            0 if slab is None else slab.shape[2],
            0 if self.begin is not None else a.stride(0),
            a.stride(-2),
            a.stride(-1),
            0 if self.begin is not None else b.stride(0),
            b.stride(-2),
            b.stride(-1),
            ROWS=config.rows,
            COLS=config.cols,
            DEPTH=config.depth,
            RUN=SUM_RUN,
            EVEN=O % config.rows == 0 and K % config.cols == 0,
            PRECISION=precision(a.dtype),
            num_warps=config.warps,
            num_stages=config.stages,
        )


def _bounds(added: AddedRows, O: int, rows: int) -> Tensor:
    """Return (N, tiles + 1), the bounds of each example's added rows in each row of tiles, by binary search."""
    N, device = added.begin.shape[0] - 1, added.feature.device
    edges = (torch.arange(triton.cdiv(O, rows) + 1, device=device) * rows).clamp_(max=O)
    return torch.searchsorted(added.keys(O), torch.arange(N, device=device)[:, None] * O + edges)


def interference(
    plan: Plan, a: Tensor, b: Tensor, direction: Tensor | None, gram: bool, begin: Tensor | None, added: AddedRows | None
) -> InterferenceSums:
    """Compute all sums and scalars with the algorithm "stored", or with "direct", which has no Gram matrix."""
    x = _Operands.of(plan, a, b, begin, added)
    N, O, K = x.sizes
    u = None if direction is None else direction.float().contiguous()
    fields = 2 if u is None else 4
    if 0 in (N, O, K):
        sums, scalars = [a.new_zeros(O, K, dtype=torch.float32) for _ in range(3)], a.new_zeros(fields, N)
        pairs = a.new_zeros(N, N)
    elif plan.way == "direct":
        parts = parts_of(N, x.splits)
        totals = [a.new_empty(parts[0], O, K, dtype=torch.float32) for _ in range(3)]
        partials = a.new_empty(fields, N, x.tiles[0] * x.tiles[1], dtype=torch.float32)
        x.launch(parts, u, totals, partials)
        sums, scalars, pairs = [add_parts(x) for x in totals], partials.sum(2, dtype=torch.float64), None
    else:
        sums, scalars, pairs = _of_slabs(x, u, gram, plan)
    # Clone: the outputs of an op must not share storage.
    l1, sq_norm, dot, abs_dot = (*(x.clone() for x in scalars.float()), None, None)[:4]
    pairs = None if pairs is None else pairs.float()
    return InterferenceSums(sums[0], sums[1], sums[2], l1, sq_norm, dot, abs_dot, pairs).asked_for(u, gram)


def _slabs(x: _Operands, examples: int) -> Iterator[tuple[slice, slice]]:
    _, O, K = x.sizes
    rows, cols = slab_of(examples, O, K, x.config)
    for row in range(0, O, rows):
        for col in range(0, K, cols):
            yield slice(row, min(row + rows, O)), slice(col, min(col + cols, K))


def _gradients(x: _Operands, where: tuple[slice, slice]) -> Tensor:
    """Return g_i for this part of the weight, (N, elements)."""
    rows, cols = where
    slab = x.a.new_empty(x.sizes[0], rows.stop - rows.start, cols.stop - cols.start, dtype=torch.float32)
    x.launch(parts_of(x.sizes[0], x.splits), slab=slab, corner=(rows.start, cols.start))
    return slab.flatten(1)


def _of_slabs(x: _Operands, u: Tensor | None, gram: bool, plan: Plan) -> tuple[list[Tensor], Tensor, Tensor | None]:
    assert plan.call.gpu is not None
    N, O, K = x.sizes
    sums = [x.a.new_empty(O, K, dtype=torch.float32) for _ in range(3)]
    scalars = x.a.new_zeros(2 if u is None else 4, N, dtype=torch.float64)
    pairs = x.a.new_zeros(N, N, dtype=torch.float64) if gram else None
    for where in _slabs(x, N):
        g = _gradients(x, where)
        E = g.shape[1]
        blocks = triton.cdiv(E, FOLD_BLOCK)
        parts, per_part = parts_of(N, max(1, min(N, 4 * plan.call.gpu.sms // blocks)))
        totals = g.new_empty(3, parts, E)
        partials = g.new_empty(scalars.shape[0], N, blocks)
        part_u = None if u is None else u[where].reshape(-1)
        fold_kernel[(blocks, parts)](
            g, part_u, totals, partials, N, E, per_part, BLOCK=FOLD_BLOCK, RUN=SUM_RUN, num_warps=FOLD_WARPS
        )
        for total, part in zip(sums, totals, strict=True):
            total[where] = add_parts(part).view(where[0].stop - where[0].start, -1)
        scalars += partials.sum(2, dtype=torch.float64)
        if pairs is not None:
            pairs += g @ g.T
    return sums, scalars, pairs


def gram(plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None) -> Tensor:
    """Compute ⟨g_i, g_k⟩ from gradients that are stored slab by slab."""
    if a2 is None or b2 is None:
        x = y = _Operands.of(plan, a, b, begin)
    else:
        x, y = _Operands.of(plan, a, b, begin, None, a2, b2), _Operands.of(plan, a2, b2, None, None, a, b)
    N, M = x.sizes[0], y.sizes[0]
    pairs = a.new_zeros(N, M, dtype=torch.float64)
    if pairs.numel() and 0 not in x.sizes:
        for where in _slabs(x, N + (0 if y is x else M)):
            g = _gradients(x, where)
            pairs += g @ (g if y is x else _gradients(y, where)).T
    return pairs.float()


def sq_norm(plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None) -> Tensor:
    x = _Operands.of(plan, a, b, begin)
    N, O, K = x.sizes
    if 0 in (N, O, K):
        return a.new_zeros(N, dtype=torch.float32)
    partials = a.new_empty(1, N, x.tiles[0] * x.tiles[1], dtype=torch.float32)
    x.launch(parts_of(N, x.splits), scalars=partials)
    return partials[0].sum(1, dtype=torch.float64).float()
