"""interference_backward: the derivatives da_i = b_i s_i and db_i = a_i s_iᵀ, with s_i = ∂loss/∂g_i.

``derivative_kernel`` recomputes g_i = b_iᵀ a_i tile by tile, converts each tile to one of s_i, and writes it to a workspace of
bounded size. ``product_kernel`` computes both derivatives from the workspace. The workspace contains

- all output rows of some examples, or
- some output rows of one example, if one example does not fit, or
- some output rows of all examples, if the derivative of the Gram matrix mixes the gradients of all examples.
"""

from __future__ import annotations

from operator import itemgetter
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsl_kernels.backends.triton.tiles import config_of, gradient_tile, multiply, precision
from zsl_kernels.planning import gpu_cost
from zsl_kernels.planning.choose import Plan
from zsl_kernels.planning.devices import Gpu
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import Cotangents


@triton.jit
def derivative_kernel(
    p_a,
    p_b,
    p_begin,
    p_slot,
    p_added,
    p_u,
    p_grad,
    p_abs,
    p_sq,
    p_l1,
    p_sq_norm,
    p_dot,
    p_abs_dot,
    p_s,
    p_d_added,
    T,
    K,
    O,
    stride_an,
    stride_at,
    stride_ak,
    stride_bn,
    stride_bt,
    stride_bo,
    GRADIENT: tl.constexpr,
    MIXED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute s (N, O, K) from a and b: ``Cotangents.derivative`` of g, or g itself with ``GRADIENT``.

    With ``MIXED`` the derivative is added to the contents of s. The pointer of a missing cotangent is None. ``p_begin`` contains
    the offsets of ragged rows. ``p_slot`` (N, O) contains the row of ``p_added`` (P, K) that is added to each row of g, or −1. The
    derivatives with respect to these rows are written to ``p_d_added``.
    """
    tiles_k = tl.cdiv(K, COLS)
    tiles = tl.cdiv(O, ROWS) * tiles_k
    example = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o_o = tile // tiles_k * ROWS + tl.arange(0, ROWS)
    o_k = tile % tiles_k * COLS + tl.arange(0, COLS)
    m_o = o_o < O
    m_k = o_k < K
    m_tile = m_o[:, None] & m_k[None, :]
    if p_begin is not None:
        first = tl.load(p_begin + example)
        length = (tl.load(p_begin + example + 1) - first).to(tl.int32)
        p_a += first * stride_at
        p_b += first * stride_bt
    else:
        length = T
        p_a += example * stride_an
        p_b += example * stride_bn
    # (COLS,) and (ROWS,)
    p_a += o_k.to(tl.int64) * stride_ak
    p_b += o_o.to(tl.int64) * stride_bo
    g = gradient_tile(p_a, p_b, m_k, m_o, length, stride_at, stride_bt, ROWS, COLS, DEPTH, PRECISION)
    if p_slot is not None:
        slot = tl.load(p_slot + example * O + o_o, mask=m_o, other=-1)
        m_added = (slot >= 0)[:, None] & m_k[None, :]
        o_added = slot[:, None] * K + o_k[None, :]
        g += tl.load(p_added + o_added, mask=m_added, other=0.0)
    o_weight = o_o.to(tl.int64)[:, None] * K + o_k[None, :]
    p_s += example * O * K + o_weight
    if GRADIENT:
        s = g
    else:
        sign = tl.where(g > 0, 1.0, 0.0) - tl.where(g < 0, 1.0, 0.0)
        s = tl.load(p_s, mask=m_tile, other=0.0) if MIXED else tl.zeros((ROWS, COLS), tl.float32)
        if p_grad is not None:
            s += tl.load(p_grad + o_weight, mask=m_tile, other=0.0)
        if p_abs is not None:
            s += sign * tl.load(p_abs + o_weight, mask=m_tile, other=0.0)
        if p_l1 is not None:
            s += sign * tl.load(p_l1 + example)
        if p_sq is not None:
            s += 2 * g * tl.load(p_sq + o_weight, mask=m_tile, other=0.0)
        if p_sq_norm is not None:
            s += 2 * g * tl.load(p_sq_norm + example)
        if p_u is not None:
            u = tl.load(p_u + o_weight, mask=m_tile, other=0.0)
            if p_dot is not None:
                s += tl.load(p_dot + example) * u
            if p_abs_dot is not None:
                s += tl.load(p_abs_dot + example) * sign * tl.abs(u)
    tl.store(p_s, s, mask=m_tile)
    if p_d_added is not None:
        tl.store(p_d_added + o_added, s, mask=m_added)


@triton.jit(do_not_specialize=["examples"])
def product_kernel(
    p_x,
    p_s,
    p_out,
    p_begin,
    p_example,
    p_first_tile,
    T,
    C,
    F,
    examples,
    stride_xn,
    stride_xt,
    stride_xc,
    stride_sn,
    stride_sc,
    stride_sf,
    stride_outn,
    stride_outt,
    stride_outf,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute out_i (T, F) = x_i (T, C) s_i (C, F). With ``ADD`` the product is added to the contents of out.

    s and the products are float32. With half-precision x the product uses tf32, which is exact for x and keeps 11 bits of s. The
    result is rounded to the dtype of x, which has at most 11 bits too. With ``p_begin`` the rows are ragged. Then ``p_example``
    contains the example of each tile of rows, and ``p_first_tile`` the first tile of each example.
    """
    tiles_f = tl.cdiv(F, COLS)
    tile_t = tl.program_id(0) // tiles_f
    if p_begin is not None:
        example = tl.load(p_example + tile_t)
        if example >= examples:
            return
        first = tl.load(p_begin + example)
        length = (tl.load(p_begin + example + 1) - first).to(tl.int32)
        tile_t = tile_t - tl.load(p_first_tile + example).to(tl.int32)
        p_x += first * stride_xt
        p_out += first * stride_outt
    else:
        example = (tile_t // tl.cdiv(T, ROWS)).to(tl.int64)
        tile_t = tile_t % tl.cdiv(T, ROWS)
        length = T
        p_x += example * stride_xn
        p_out += example * stride_outn
    t = tile_t * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(0) % tiles_f * COLS + tl.arange(0, COLS)
    m_t = t < length
    m_f = f < F
    p_x += t.to(tl.int64)[:, None] * stride_xt
    p_s += example * stride_sn + f.to(tl.int64)[None, :] * stride_sf
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, C, DEPTH):
        c = start + tl.arange(0, DEPTH)
        # (ROWS, DEPTH) and (DEPTH, COLS)
        left = tl.load(p_x + c.to(tl.int64)[None, :] * stride_xc, mask=m_t[:, None] & (c < C)[None, :], other=0.0)
        right = tl.load(p_s + c.to(tl.int64)[:, None] * stride_sc, mask=(c < C)[:, None] & m_f[None, :], other=0.0)
        total = multiply(left.to(tl.float32), right, total, PRECISION)
    p_out += t.to(tl.int64)[:, None] * stride_outt + f.to(tl.int64)[None, :] * stride_outf
    m_out = m_t[:, None] & m_f[None, :]
    if ADD:
        total += tl.load(p_out, mask=m_out, other=0.0)
    tl.store(p_out, total.to(p_out.dtype.element_ty), mask=m_out)


class _Operands(NamedTuple):
    """a and b for some examples and output rows, and the rows that are added to their gradients."""

    a: Tensor
    b: Tensor
    begin: Tensor | None
    added: AddedRows | None
    slots: Tensor | None  # (N, rows)

    @property
    def examples(self) -> int:
        return self.a.shape[0] if self.begin is None else self.begin.shape[0] - 1


def backward(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    c: Cotangents,
    mix: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    want: tuple[bool, bool, bool],
    begin: Tensor | None = None,
    added: AddedRows | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the derivatives; see :class:`zsl_kernels.backends.base.Backend`.

    The only temporaries are the workspace and, if the rows of one example exceed it, da in float32.
    """
    gpu = plan.call.gpu
    assert gpu is not None
    K, O = a.shape[-1], b.shape[-1]
    N, M = (x.shape[0] if begin is None else begin.shape[0] - 1 for x in (a, a2))
    examples, rows = _chunk(N, M, O, K, mix is not None)
    new = torch.empty if N and K and O else torch.zeros
    da = new(a.shape, dtype=a.dtype if rows >= O else torch.float32, device=a.device) if want[0] else None
    db = new(b.shape, dtype=b.dtype, device=b.device) if want[1] else None
    d_added = torch.empty_like(added.values) if added is not None and want[2] else None
    if added is not None and not added.values.shape[0]:
        added = None
    c = Cotangents(*(None if x is None else x.float().contiguous() for x in c))
    u = None if direction is None else direction.float().contiguous()
    workspace = a.new_empty(examples, min(rows, O), K, dtype=torch.float32)
    for first in range(0, N if K else 0, examples):
        n = slice(first, min(first + examples, N))
        for low in range(0, O, rows):
            slab = slice(low, min(low + rows, O))
            own = _operands(a, b, begin, added, n, slab)
            s = workspace.flatten()[: own.examples * (slab.stop - low) * K].view(own.examples, -1, K)
            if mix is not None:
                others = own if added is not None or begin is not None else _operands(a2, b2, None, None, slice(0, M), slab)
                g = torch.empty(M, slab.stop - low, K, dtype=torch.float32, device=a.device)
                _derivative(gpu, others, Cotangents(), None, g, None, gradient=True)
                torch.mm(mix.float(), g.flatten(1), out=s.flatten(1))
            if mix is None or d_added is not None or any(x is not None for x in c):
                each = (None if x is None else x[n] for x in c[3:])
                at = Cotangents(*c[:3], *each).at(itemgetter(slab))
                _derivative(gpu, own, at, None if u is None else u[slab], s, d_added, mixed=mix is not None)
            if da is not None:
                _product(gpu, own.b, s, da if begin is not None else da[n], own, add=low > 0)
            if db is not None:
                _product(gpu, own.a, s.transpose(1, 2), (db if begin is not None else db[n])[..., slab], own)
    return None if da is None else da.to(a.dtype), db, d_added


def _chunk(N: int, M: int, O: int, K: int, mixed: bool) -> tuple[int, int]:
    """Return (examples, output rows) per step: all rows of some examples, some rows of one, or if ``mixed`` some rows of all."""
    row_bytes = 4 * max(K, 1)
    if mixed:
        return max(N, 1), max(1, min(O, gpu_cost.BACKWARD_BYTES // (row_bytes * max(N + M, 1))))
    rows = max(1, min(O, gpu_cost.BACKWARD_BYTES // row_bytes))
    return max(1, min(N, gpu_cost.BACKWARD_BYTES // (row_bytes * rows))), rows


def _operands(a: Tensor, b: Tensor, begin: Tensor | None, added: AddedRows | None, n: slice, slab: slice) -> _Operands:
    slots = None if added is None else _slots(added, n, slab, b.shape[-1])
    if begin is None:
        return _Operands(a[n], b[n, :, slab], None, added, slots)
    return _Operands(a, b[:, slab], begin[n.start : n.stop + 1], added, slots)


def _slots(added: AddedRows, n: slice, slab: slice, O: int) -> Tensor:
    """Return the index of the added row for each output row of the slab and each example, or −1, (n, rows)."""
    P, device = added.values.shape[0], added.values.device
    examples = torch.arange(added.begin.shape[0] - 1, device=device)
    keys = added.keys(O)
    wanted = examples[n, None] * O + torch.arange(slab.start, slab.stop, device=device)
    slots = torch.searchsorted(keys, wanted).clamp_(max=P - 1)
    return torch.where(keys[slots] == wanted, slots, -1)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of x (N, T, ·). Rows (R, ·) are treated as those of a single example."""
    return x.stride() if x.ndim == 3 else (0, *x.stride())


def _derivative(
    gpu: Gpu,
    x: _Operands,
    c: Cotangents,
    u: Tensor | None,
    s: Tensor,
    d_added: Tensor | None,
    gradient: bool = False,
    mixed: bool = False,
) -> None:
    O, K = s.shape[1:]
    # Computing the gradient only leaves registers for a larger tile.
    tile = config_of(gpu, "gradient" if gradient and x.slots is None else "derivative", x.a.dtype, O, K)
    with torch.cuda.device_of(s):
        derivative_kernel[(x.examples * triton.cdiv(O, tile.rows) * triton.cdiv(K, tile.cols),)](
            x.a,
            x.b,
            x.begin,
            x.slots,
            None if x.added is None else x.added.values,
            u,
            *c,
            s,
            None if x.added is None else d_added,
            x.a.shape[-2],
            K,
            O,
            *_strides(x.a),
            *_strides(x.b),
            GRADIENT=gradient,
            MIXED=mixed,
            ROWS=tile.rows,
            COLS=tile.cols,
            DEPTH=tile.depth,
            PRECISION=precision(x.a.dtype),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _product(gpu: Gpu, x: Tensor, s: Tensor, out: Tensor, operands: _Operands, add: bool = False) -> None:
    """Compute out_i = x_i s_i for the examples of the operands, including ragged ones."""
    T, F, begin = x.shape[-2], out.shape[-1], operands.begin
    if not T:
        return
    tile = config_of(gpu, "product", x.dtype, T if begin is None else triton.cdiv(T, operands.examples), F)
    if begin is None:
        tiles, example, first_tile = operands.examples * triton.cdiv(T, tile.rows), None, None
    else:
        # The number of tiles is on the device. This is an upper bound: each example has at most one partial tile.
        tiles = T // tile.rows + operands.examples
        last = begin.diff().add_(tile.rows - 1).div_(tile.rows, rounding_mode="floor").cumsum(0)
        example = torch.searchsorted(last, torch.arange(tiles, device=x.device), right=True)
        first_tile = torch.nn.functional.pad(last, (1, 0))
    with torch.cuda.device_of(s):
        product_kernel[(tiles * triton.cdiv(F, tile.cols),)](
            x,
            s,
            out,
            begin,
            example,
            first_tile,
            T,
            s.shape[1],
            F,
            operands.examples,
            *_strides(x),
            *s.stride(),
            *_strides(out),
            ADD=add,
            ROWS=tile.rows,
            COLS=tile.cols,
            DEPTH=tile.depth,
            PRECISION=precision(x.dtype) if x.dtype == torch.float32 else "tf32",
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
