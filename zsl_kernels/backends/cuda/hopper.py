"""Launches of the kernels for compute capability 9.0: warpgroup matrix products whose operands are loaded by bulk tensor copies.

- A bulk copy loads a *box* of an operand. This needs contiguous features, and rows that begin at multiples of 16 bytes. Other
  operands are first copied to such a layout, ragged rows so that each example begins a new box.
- A float32 operand is split into bfloat16 parts, x = high + middle + low. Six products of parts give one float32 product, or three
  if tf32 precision is allowed.
- For the Gram matrix, the kernel stores the gradients in slabs, and a second kernel multiplies them.
- The *fold* of a launch is what its kernel does with a tile of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsl_kernels.backends.cuda.module import ELEMENTS, compiled, exact, guard, pointer, stream, strided, written
from zsl_kernels.backends.cuda.slabs import SlabGram
from zsl_kernels.planning.choose import Plan
from zsl_kernels.planning.devices import Gpu
from zsl_kernels.planning.gpu_cost import HOPPER_TILE, hopper_schedule, hopper_slab_tiles
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import InterferenceSums

STEP = 64  # positions per box
WARPS = 8  # warps that write partial scalars of a tile
PARTS = 4  # parts of a float32 operand: high, middle, low, and the finite values of high
GROUP = 8  # rows of tiles that are computed at the same time


class Fold(IntEnum):
    """What a kernel does with a tile of a gradient; see csrc/cuda/hopper_args.h."""

    NONE = 0  # only write it to the slab
    SUMS = 1
    SCALARS = 2  # compute sq_norm and dot, if requested
    WEIGHTED = 3  # accumulate the weighted sum in the first of the sums

    @property
    def matrices(self) -> int:
        return (0, 3, 0, 1)[self]


class _Results(NamedTuple):
    """The outputs of a launch: matrices (O, K) and scalars (N,)."""

    grad_sum: Tensor | None = None
    abs_sum: Tensor | None = None
    sq_sum: Tensor | None = None
    l1: Tensor | None = None
    sq_norm: Tensor | None = None
    dot: Tensor | None = None
    abs_dot: Tensor | None = None

    @property
    def scalars(self) -> int:
        return sum(x is not None for x in self[3:])


_NOTHING = _Results()


class _Boxes(NamedTuple):
    """The layout of an operand for boxes: (parts, examples, positions, features). Ragged rows have one example. No pointers."""

    sizes: tuple[int, ...]  # the four sizes, and the strides of the first three
    copy: tuple[Any, ...]  # arguments of the launch that copies the operand; empty if no copy is needed
    dtype: torch.dtype  # of the copy

    @classmethod
    def of(cls, x: Tensor, products: int, begin: Tensor | None, rows: int) -> _Boxes:
        """Return the layout for x. ``rows``: an upper bound for the ragged rows, each example rounded up to whole steps."""
        if begin is None and x.dtype != torch.float32 and _addressable(x):
            N, T, F = x.shape
            # A dimension of size 1 can have any stride.
            position = x.stride(1) if T > 1 else F + -F % 8
            example = x.stride(0) if N > 1 else T * position
            return cls((1, N, T, F, N * example, example, position), (), x.dtype)
        N = x.shape[0] if begin is None else begin.shape[0] - 1
        F = x.shape[-1]
        pitch = F + -F % 8
        parts = PARTS if x.dtype == torch.float32 else 1
        examples, positions = (N, x.shape[1]) if begin is None else (1, rows)
        part = examples * positions * pitch
        blocks = min(65535, max(1, -(-positions * pitch // (8 * 1024 * (1 if begin is None else N)))))
        copy = (ELEMENTS[x.dtype], N, positions, F, pitch, part, products == 6, blocks)
        return cls((parts, examples, positions, F, part, positions * pitch, pitch), copy, torch.bfloat16 if parts > 1 else x.dtype)

    @property
    def numbers(self) -> int:
        """Return the number of elements of the copy, which have two bytes each."""
        return self.sizes[0] * self.sizes[4] if self.copy else 0

    def at(self, x: tuple[int, ...], held: int, begin: int, first_step: int, on: int) -> tuple[int, ...]:
        """Return the kernel's arguments for the operand ``x``, a pointer and strides. If necessary, copy it to ``held`` first."""
        if not self.copy:
            return (x[0], *self.sizes)
        element, N, positions, F, pitch, part, with_low, blocks = self.copy
        compiled().pack(x, element, N, positions, begin, first_step, F, pitch, part, with_low, held, blocks, on)
        return (held, *self.sizes)


def _addressable(x: Tensor) -> bool:
    N, T, F = x.shape
    strides = [s for s, size in ((x.stride(0), N), (x.stride(1), T)) if size > 1]
    return x.data_ptr() % 16 == 0 and (x.stride(2) == 1 or F == 1) and all(0 < s < 1 << 38 and s % 8 == 0 for s in strides)


class _Operands:
    """The operands a and b of a call, in the layout of the kernel, and the positions of their examples."""

    def __init__(self, plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None):
        assert plan.call.gpu is not None
        self.gpu: Gpu = plan.call.gpu
        self.like, self.element = a, ELEMENTS[a.dtype]
        self.O, self.K = b.shape[-1], a.shape[-1]
        self.first_step: Tensor | None = None
        rows = 0
        if begin is None and a.shape[1] == 0:  # without positions there may still be rows of a tied weight to add
            a, b = (x.new_zeros(x.shape[0], 1, x.shape[2]) for x in (a, b))
        if begin is None:
            self.N, self.steps = a.shape[0], -(-a.shape[1] // STEP)
        else:
            self.N, self.steps = begin.shape[0] - 1, 0
            counts = ((begin.diff() + (STEP - 1)) // STEP).clamp_(min=1)
            self.first_step = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
            rows = (a.shape[0] // STEP + self.N) * STEP
        self.products = _products(a.dtype)
        self.held: list[Tensor] = []
        self.a, self.b = (self._mapped(written(x), begin, rows) for x in (a, b))
        self.slab_dtype = _slab_dtype(a.dtype)

    def _mapped(self, x: Tensor, begin: Tensor | None, rows: int) -> tuple[int, ...]:
        boxes = _Boxes.of(x, self.products, begin, rows)
        self.held += [x, x.new_empty(boxes.numbers, dtype=boxes.dtype)] if boxes.copy else [x]
        return boxes.at(strided(x), self.held[-1].data_ptr(), pointer(begin), pointer(self.first_step), stream(x))

    @property
    def tiles(self) -> int:
        return -(-self.O // HOPPER_TILE) * -(-self.K // HOPPER_TILE)

    def launch(
        self,
        fold: Fold,
        first: int,
        tiles: int,
        slab: Tensor | None = None,
        results: _Results = _NOTHING,
        u: Tensor | None = None,
        added: tuple[Tensor, Tensor, Tensor] | None = None,
        weights: tuple[Tensor | None, ...] = (None, None),
    ) -> None:
        """Launch the kernel for ``tiles`` tiles, from ``first`` on. Launches after the first add to the scalars."""
        whole, parts = (tiles, 1) if fold == Fold.NONE else hopper_schedule(self.gpu, tiles, self.N)
        scalars = results.scalars * self.N * tiles * WARPS
        numbers = (tiles - whole) * parts * fold.matrices * HOPPER_TILE**2 if parts > 1 else 0
        work = self.like.new_empty(numbers + scalars, dtype=torch.float32)
        # The parts come first, because they must be aligned to 16 bytes; the scalars follow.
        pointers = (*map(pointer, results), work.data_ptr() + 4 * numbers, work.data_ptr())
        compiled().hopper(
            self.element,
            0 if slab is None else 1 if slab.dtype == torch.bfloat16 else 2,
            fold,
            self.a,
            self.b,
            (self.N, self.steps, pointer(self.first_step), self.products, self.O, self.K),
            (first, tiles, whole, parts, GROUP),
            (*pointers, pointer(slab), pointer(u), *((0, 0) if u is None else u.stride()), *map(pointer, weights)),
            (0, 0, 0) if added is None else tuple(map(pointer, added)),
            stream(self.like),
        )

    def slab(self, tiles: int) -> Tensor:
        return self.like.new_empty(self.N, tiles * HOPPER_TILE**2, dtype=self.slab_dtype)


def interference(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    gram: bool,
    begin: Tensor | None = None,
    added: AddedRows | None = None,
) -> InterferenceSums:
    """Compute all sums and scalars in two launches. With the Gram matrix there are three launches per slab, and one more."""
    N, O, K = a.shape[0] if begin is None else begin.shape[0] - 1, b.shape[-1], a.shape[-1]
    u = _float32(direction)
    sums = [a.new_empty(O, K, dtype=torch.float32) for _ in range(3)]
    scalars = [a.new_empty(N, dtype=torch.float32) for _ in range(2 if u is None else 4)]
    pairs = None
    if 0 in (N, O, K) or (a.shape[-2] == 0 and added is None):
        for x in (*sums, *scalars):
            x.zero_()
        pairs = a.new_zeros(N, N, dtype=torch.float32) if gram else None
    else:
        results = _Results(*sums, *scalars)
        with guard(a):
            operands = _Operands(plan, a, b, begin)
            rows = None if added is None else _added(added, O)
            each = hopper_slab_tiles(operands.gpu, operands.tiles, N, operands.slab_dtype.itemsize) if gram else operands.tiles
            products = SlabGram(a, operands.gpu.sms, N, None, each * HOPPER_TILE**2) if gram else None
            for first in range(0, operands.tiles, each):
                tiles = min(each, operands.tiles - first)
                slab = operands.slab(tiles) if gram else None
                operands.launch(Fold.SUMS, first, tiles, slab, results, u, rows)
                if products is not None and slab is not None:
                    products.add(slab)
            pairs = None if products is None else products.result()
    dot, abs_dot = scalars[2:] if u is not None else (None, None)
    return InterferenceSums(sums[0], sums[1], sums[2], scalars[0], scalars[1], dot, abs_dot, pairs).asked_for(u, gram)


def in_one_slab(plan: Plan, dtype: torch.dtype) -> bool:
    """Return whether a call with the Gram matrix stores all gradients in one slab."""
    call = plan.call
    assert call.gpu is not None
    tiles = -(-call.O // HOPPER_TILE) * -(-call.K // HOPPER_TILE)
    return tiles <= hopper_slab_tiles(call.gpu, tiles, call.N, _slab_dtype(dtype).itemsize)


def setting(dtype: torch.dtype, gram: bool) -> Callable[[], object] | None:
    """Return a function that reads the precision settings, or None if the results do not depend on them: reading takes time."""
    if dtype == torch.float32:
        return lambda: _products(dtype)
    return (lambda: _slab_dtype(dtype)) if gram and dtype == torch.bfloat16 else None


def gram(plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
    """Compute ⟨g_i, g_k⟩ within one set or between two sets, slab by slab."""
    N = a.shape[0] if begin is None else begin.shape[0] - 1
    M = N if a2 is None else a2.shape[0]
    if 0 in (N, M, a.shape[-1], b.shape[-1], a.shape[-2], 1 if a2 is None else a2.shape[-2]):
        return a.new_zeros(N, M, dtype=torch.float32)
    with guard(a):
        x = _Operands(plan, a, b, begin)
        y = None if a2 is None or b2 is None else _Operands(plan, a2, b2, None)
        each = hopper_slab_tiles(x.gpu, x.tiles, N + (0 if y is None else M), x.slab_dtype.itemsize)
        products = SlabGram(a, x.gpu.sms, N, None if y is None else M, each * HOPPER_TILE**2)
        for first in range(0, x.tiles, each):
            tiles = min(each, x.tiles - first)
            slabs = []
            for z in (x,) if y is None else (x, y):
                slabs.append(z.slab(tiles))
                z.launch(Fold.NONE, first, tiles, slabs[-1])
            products.add(*slabs)
        return products.result()


def sq_norm(plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
    return _scalar(plan, a, b, None, begin)


def dot(plan: Plan, a: Tensor, b: Tensor, direction: Tensor, begin: Tensor | None = None) -> Tensor:
    return _scalar(plan, a, b, direction, begin)


def _scalar(plan: Plan, a: Tensor, b: Tensor, direction: Tensor | None, begin: Tensor | None) -> Tensor:
    """Return ⟨g_i, u⟩, or |g_i|² without a direction, (N,), in two launches.

    The kernel also processes examples without positions, because 0 · u is NaN if the direction is not finite.
    """
    N = a.shape[0] if begin is None else begin.shape[0] - 1
    found = a.new_empty(N, dtype=torch.float32)
    if 0 in (N, a.shape[-1], b.shape[-1]):
        return found.zero_()
    with guard(a):
        operands = _Operands(plan, a, b, begin)
        results = _Results(sq_norm=found) if direction is None else _Results(dot=found)
        operands.launch(Fold.SCALARS, 0, operands.tiles, results=results, u=_float32(direction))
    return found


def weighted_grad(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    abs_weights: Tensor | None,
    direction: Tensor | None,
    begin: Tensor | None = None,
) -> Tensor:
    """Return Σ_i w_i g_i + sign(u) Σ_i v_i |g_i|. The second term needs ``abs_weights`` v and ``direction`` u.

    This takes one launch, and a second one if tiles are split.
    """
    N, O, K = a.shape[0] if begin is None else begin.shape[0] - 1, b.shape[-1], a.shape[-1]
    found = a.new_empty(O, K, dtype=torch.float32)
    if 0 in (N, O, K):
        return found.zero_()
    if abs_weights is None or direction is None:
        abs_weights = direction = None
    w, v, u = map(_float32, (weights, abs_weights, direction))
    with guard(a):
        operands = _Operands(plan, a, b, begin)
        given = tuple(None if x is None else x.contiguous() for x in (w, v))
        operands.launch(Fold.WEIGHTED, 0, operands.tiles, results=_Results(found), u=u, weights=given)
    return found


def _products(dtype: torch.dtype) -> int:
    """Return the number of products of parts that give one product."""
    return 1 if dtype != torch.float32 else 6 if exact() else 3


def _slab_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of slabs: bfloat16 only if torch allows reduced-precision reductions for bfloat16 operands, else float32."""
    coarse = dtype == torch.bfloat16 and torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    return torch.bfloat16 if coarse else torch.float32


def _float32(x: Tensor | None) -> Tensor | None:
    """Convert a direction or weights to float32, as the kernels read them."""
    return None if x is None else written(x.to(torch.float32))


def _added(added: AddedRows, O: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (N, rows of tiles + 1), the bounds of each example's added rows in each row of tiles, and the added rows.

    The added rows are sorted, so a binary search finds the bounds.
    """
    N, device = added.begin.shape[0] - 1, added.feature.device
    edges = (torch.arange(-(-O // HOPPER_TILE) + 1, device=device) * HOPPER_TILE).clamp_(max=O)
    bounds = torch.searchsorted(added.keys(O), torch.arange(N, device=device)[:, None] * O + edges)
    return bounds, added.feature, added.values
