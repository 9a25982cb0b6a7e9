"""Launches of the persistent kernels (csrc/cuda/product.cuh) for compute capability 8.0 and newer.

Each block processes many tiles of the weight. It writes partial scalars and Gram matrices in float64, and one more launch adds them
up. There are no atomics, so the results are bitwise identical on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zsl_kernels.backends.cuda.module import ELEMENTS, compiled, exact, guard, pointer, stream, strided, written
from zsl_kernels.backends.cuda.partials import Partials, add_up
from zsl_kernels.planning.choose import Plan
from zsl_kernels.planning.devices import Gpu
from zsl_kernels.planning.tiles import CUDA_SUMS_HELD, CUDA_TILES, CudaTile
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import InterferenceSums


class _Launch(NamedTuple):
    """The distribution of a call over the blocks of a device."""

    tile: int  # the index in CUDA_TILES
    held: int  # examples whose tiles a block stores at a time
    group: int  # examples on each side of a block's part of the Gram matrix
    pairs: int  # pairs of such groups
    blocks: int  # blocks that share the tiles of the weight

    @property
    def shares(self) -> int:
        return self.blocks * CUDA_TILES[self.tile].shares


def _launch(gpu: Gpu, tile: CudaTile, N: int, M: int | None, gram: bool, O: int, K: int) -> _Launch:
    """Return the launch for the Gram matrix of N examples (with M others, if given), or for their sums only."""
    held, group, pairs = tile.groups(N, M, tile.fitting(gpu.shared_bytes)) if gram else (min(N, CUDA_SUMS_HELD), N, 1)
    tiles = -(-O // tile.rows) * -(-K // tile.cols)
    resident = max(1, min(2, (gpu.shared_bytes + 1024) // (tile.shared_bytes(held, held < N and not gram) + 1024)))
    blocks = max(1, min(tiles, -(-gpu.sms * resident // pairs)))
    return _Launch(CUDA_TILES.index(tile), held, group, pairs, blocks)


class _Results:
    """The outputs of a launch, and the partial results that are added up to them."""

    def __init__(self, like: Tensor, launch: _Launch, N: int, shape: tuple[int, int], sums: bool, gram: bool, u: Tensor | None):
        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=like.device)

        self.sums = [empty(*shape, dtype=torch.float32) for _ in range(3)] if sums else []
        self.scalars = [empty(N, dtype=torch.float32) for _ in range(4)] if sums else []
        self.gram = empty(N, N, dtype=torch.float32) if gram else None
        # The partial results of the blocks.
        self.of_scalars = empty(launch.blocks, 4, N, dtype=torch.float64) if sums else None
        self.of_gram = empty(launch.shares, N, N, dtype=torch.float64) if gram else None
        self.direction = u

    def pointers(self) -> tuple[int, ...]:
        u = self.direction
        tensors = (*(self.sums or (None, None, None)), self.of_scalars, self.of_gram, u)
        return (*map(pointer, tensors), *((0, 0) if u is None else u.stride()))

    def partials(self) -> list[Partials]:
        found = [] if self.of_scalars is None else [Partials(self.of_scalars, self.scalars)]
        if self.of_gram is not None and self.gram is not None:
            found.append(Partials(self.of_gram, [self.gram], symmetric=True))
        return found


def _nothing(like: Tensor, shape: tuple[int, int], N: int, u: Tensor | None, gram: bool) -> InterferenceSums:
    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float32, device=like.device)

    sizes = (shape, shape, shape, (N,), (N,), (N,), (N,), (N, N))
    return InterferenceSums(*(zeros(*size) for size in sizes)).asked_for(u, gram)


def interference(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    gram: bool,
    begin: Tensor | None = None,
    added: AddedRows | None = None,
) -> InterferenceSums:
    N = a.shape[0] if begin is None else begin.shape[0] - 1
    a, b = written(a), written(b)
    u = None if direction is None else written(direction.to(torch.float32))
    shape = (b.shape[-1], a.shape[-1])
    if not N * shape[0] * shape[1]:
        return _nothing(a, shape, N, u, gram)
    launches = [_gram_launch(plan, a, b, N, begin, added, True, gram, u)]
    if gram and launches[0].gram is None:
        launches.append(_gram_launch(plan, a, b, N, begin, added, False, True, None))
    add_up(*(partials for each in launches for partials in each.partials()))
    (grad_sum, abs_sum, sq_sum), (l1, sq_norm, dot, abs_dot) = launches[0].sums, launches[0].scalars
    return InterferenceSums(grad_sum, abs_sum, sq_sum, l1, sq_norm, dot, abs_dot, launches[-1].gram).asked_for(u, gram)


def _gram_launch(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    N: int,
    begin: Tensor | None,
    added: AddedRows | None,
    sums: bool,
    gram: bool,
    u: Tensor | None,
) -> _Results:
    """Launch the kernel for the sums, the Gram matrix or both. Omit the Gram matrix if both are wanted but do not fit."""
    gpu, tile = _planned(plan)
    O, K = b.shape[-1], a.shape[-1]
    gram = gram and (tile.fitting(gpu.shared_bytes) >= N or not sums)
    launch = _launch(gpu, tile, N, None, gram, O, K)
    results = _Results(a, launch, N, (O, K), sums, gram, u)
    rows = (0, 0, 0) if added is None else (pointer(added.begin), pointer(added.feature), pointer(added.values))
    T = a.shape[1] if begin is None else 0
    with guard(a):
        compiled().gram(
            (launch.tile, launch.blocks, launch.pairs, stream(a)),
            ELEMENTS[a.dtype],
            (O, K, launch.held, launch.group, exact()),
            strided(a),
            strided(b),
            N,
            T,
            pointer(begin),
            rows,
            results.pointers(),
        )
    return results


def _planned(plan: Plan) -> tuple[Gpu, CudaTile]:
    assert plan.call.gpu is not None
    return plan.call.gpu, next(tile for tile in CUDA_TILES if (tile.rows, tile.cols) == plan.tile)


def gram(plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
    N = a.shape[0] if begin is None else begin.shape[0] - 1
    M = N if a2 is None else a2.shape[0]
    a, b = written(a), written(b)
    O, K = b.shape[-1], a.shape[-1]
    if not N * M * O * K:
        return torch.zeros(N, M, dtype=torch.float32, device=a.device)
    if a2 is None or b2 is None:
        own = _gram_launch(plan, a, b, N, begin, None, False, True, None)
        add_up(*own.partials())
        assert own.gram is not None
        return own.gram
    a2, b2 = written(a2), written(b2)
    gpu, tile = _planned(plan)
    launch = _launch(gpu, tile, N, M, True, O, K)
    pairs = torch.empty(launch.shares, N, M, dtype=torch.float64, device=a.device)
    with guard(a):
        compiled().cross_gram(
            (launch.tile, launch.blocks, launch.pairs, stream(a)),
            ELEMENTS[a.dtype],
            (O, K, launch.held, launch.group, exact()),
            *(strided(a), strided(b), N, a.shape[1]),
            *(strided(a2), strided(b2), M, a2.shape[1]),
            pointer(pairs),
        )
    found = torch.empty(N, M, dtype=torch.float32, device=a.device)
    add_up(Partials(pairs, [found]))
    return found
