"""The CUDA backend: loads the compiled kernels and calls the one that the plan names.

The kernels' module knows pointers, sizes and a stream; tensors are checked and allocated here. It is the same for devices and for
the emulation of the kernels on the CPU, which the tests use. Blocks leave partial scalars and Grams in float64, which are added up
here: no atomics, so results are the same bits on every run.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from zsl_kernels.backends import gpu_of
from zsl_kernels.configs import CUDA_SUMS_HELD, CUDA_TILES, CudaTile
from zsl_kernels.gpus import Gpu
from zsl_kernels.plan import Plan
from zsl_kernels.rows import AddedRows
from zsl_kernels.small_chunked import pairs_of
from zsl_kernels.types import EmbeddingSums, InterferenceSums

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_emulation: ModuleType | None = None


def emulate(module: ModuleType | None) -> None:
    """Runs the kernels of ``module``, built from csrc/simt, on CPU tensors from now on; None ends it."""
    global _emulation
    _emulation = module


def emulated() -> bool:
    return _emulation is not None


def _compiled() -> ModuleType:
    return _emulation or importlib.import_module("zsl_kernels._cuda")


def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    try:
        built, driver = _compiled().versions()
    except (ImportError, AttributeError) as error:  # the latter of an older build
        return f"it was not built, or does not load ({error}): reinstall with nvcc and ZSL_BUILD_CUDA unset"
    if driver // 1000 < built // 1000:  # a newer minor version runs on the driver of an older one
        return (
            f"it was built with CUDA {_version(built)}, and the driver is of {_version(driver)}: update it, or build with its nvcc"
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _exact() -> bool:
    """Whether float32 products are to be those of float32: torch says when those of tf32 will do."""
    return torch.backends.cuda.matmul.fp32_precision != "tf32"


class _Launch(NamedTuple):
    """How one call is laid out over a device's blocks."""

    tile: int  # in CUDA_TILES
    held: int  # examples whose tiles a block holds at a time
    group: int  # examples of either side of a block's part of the Gram
    pairs: int  # of such groups
    blocks: int  # among which the weight's tiles are divided

    @property
    def shares(self) -> int:
        return self.blocks * CUDA_TILES[self.tile].shares


def _launch(gpu: Gpu, tile: CudaTile, N: int, M: int | None, gram: bool, O: int, K: int) -> _Launch:
    """For the Gram of N examples, with M others if there are any, or for their sums alone."""
    held, group, pairs = tile.groups(N, M, tile.fitting(gpu.shared_bytes)) if gram else (min(N, CUDA_SUMS_HELD), N, 1)
    tiles = -(-O // tile.rows) * -(-K // tile.cols)
    resident = max(1, min(2, (gpu.shared_bytes + 1024) // (tile.shared_bytes(held, held < N and not gram) + 1024)))
    blocks = max(1, min(tiles, -(-gpu.sms * resident // pairs)))
    return _Launch(CUDA_TILES.index(tile), held, group, pairs, blocks)


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _guard(x: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    """The pointer and the strides of examples, positions and features of (N, T, features), or of rows (R, features)."""
    position, feature = x.stride()[-2:]
    return x.data_ptr(), x.stride(0) if x.ndim == 3 else 0, position, feature


class _Results:
    """What a launch writes, and what becomes of it."""

    def __init__(self, like: Tensor, launch: _Launch, N: int, shape: tuple[int, int], sums: bool, gram: bool, u: Tensor | None):
        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=like.device)

        self.sums = tuple(empty(*shape, dtype=torch.float32) for _ in range(3)) if sums else ()
        self.scalars = empty(launch.blocks, 4, N, dtype=torch.float64) if sums else None
        self.pairs = empty(launch.shares, N, N, dtype=torch.float64) if gram else None
        self.direction = u

    def pointers(self) -> tuple[int, ...]:
        u = self.direction
        tensors = (*(self.sums or (None, None, None)), self.scalars, self.pairs, u)
        return (*map(_pointer, tensors), *((0, 0) if u is None else u.stride()))

    def gram(self) -> Tensor | None:
        return None if self.pairs is None else _mirrored(self.pairs.sum(0)).float()

    def result(self, gram: Tensor | None) -> InterferenceSums:
        assert self.scalars is not None
        grad_sum, abs_sum, sq_sum = self.sums
        # Clones: an op's outputs may not share storage.
        l1, sq_norm, dot, abs_dot = (x.clone() for x in self.scalars.sum(0).float())
        found = InterferenceSums(grad_sum, abs_sum, sq_sum, l1, sq_norm, dot, abs_dot, gram)
        return found.asked_for(self.direction, gram is not None)


def _written(x: Tensor) -> Tensor:
    """The tensor, or where its negation is pending a copy: kernels read memory as it is."""
    return x.resolve_neg()


def _mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix that has been computed on and above its diagonal alone."""
    return upper.triu() + upper.triu(1).T


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
    a, b = _written(a), _written(b)
    u = None if direction is None else _written(direction.to(torch.float32))
    shape = (b.shape[-1], a.shape[-1])
    if not N * shape[0] * shape[1]:
        return _nothing(a, shape, N, u, gram)
    own = _gram_launch(plan, a, b, N, begin, added, True, gram, u)
    if not gram or own.pairs is not None:
        return own.result(own.gram())
    return own.result(_gram_launch(plan, a, b, N, begin, added, False, True, None).gram())


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
    """One launch: of the sums, the Gram or both; of the sums alone where both are wanted and a block cannot hold every example."""
    gpu, tile = _planned(plan)
    O, K = b.shape[-1], a.shape[-1]
    gram = gram and (tile.fitting(gpu.shared_bytes) >= N or not sums)
    launch = _launch(gpu, tile, N, None, gram, O, K)
    results = _Results(a, launch, N, (O, K), sums, gram, u)
    rows = (0, 0, 0) if added is None else (_pointer(added.begin), _pointer(added.feature), _pointer(added.values))
    T = a.shape[1] if begin is None else 0
    with _guard(a):
        _compiled().gram(
            (launch.tile, launch.blocks, launch.pairs, _stream(a)),
            _ELEMENTS[a.dtype],
            (O, K, launch.held, launch.group, _exact()),
            _strided(a),
            _strided(b),
            N,
            T,
            _pointer(begin),
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
    a, b = _written(a), _written(b)
    O, K = b.shape[-1], a.shape[-1]
    if not N * M * O * K:
        return torch.zeros(N, M, dtype=torch.float32, device=a.device)
    if a2 is None or b2 is None:
        found = _gram_launch(plan, a, b, N, begin, None, False, True, None).gram()
        assert found is not None
        return found
    a2, b2 = _written(a2), _written(b2)
    gpu, tile = _planned(plan)
    launch = _launch(gpu, tile, N, M, True, O, K)
    pairs = torch.empty(launch.shares, N, M, dtype=torch.float64, device=a.device)
    with _guard(a):
        _compiled().cross_gram(
            (launch.tile, launch.blocks, launch.pairs, _stream(a)),
            _ELEMENTS[a.dtype],
            (O, K, launch.held, launch.group, _exact()),
            *(_strided(a), _strided(b), N, a.shape[1]),
            *(_strided(a2), _strided(b2), M, a2.shape[1]),
            _pointer(pairs),
        )
    return pairs.sum(0).float()


def _embedding_tile(gpu: Gpu, N: int, gram: bool) -> CudaTile:
    """The largest that holds all examples; for the Gram of more in groups the last, and without it the largest."""
    if gram:
        return next((tile for tile in CUDA_TILES if tile.fitting(gpu.shared_bytes) >= N), CUDA_TILES[-1])
    fitting = [tile for tile in CUDA_TILES if tile.shared_bytes(CUDA_SUMS_HELD, True) <= gpu.shared_bytes]
    return next((tile for tile in fitting if tile.slots >= N), fitting[0])


def embedding_interference(
    ids: Tensor,
    b: Tensor,
    example_ids: Tensor | None,
    num_examples: int,
    padding_idx: int,
    direction: Tensor | None,
    gram: bool,
) -> EmbeddingSums:
    N, K = num_examples, b.shape[2]
    p = pairs_of(ids, b.shape[1], example_ids, num_examples, padding_idx)
    U = p.rows.shape[0]
    b = _written(b)
    u, u_rows = direction, p.rows
    if direction is not None and direction.dtype != torch.float32:  # of a whole weight, only the rows that are touched are copied
        u, u_rows = direction.index_select(0, p.rows).float(), torch.arange(U, device=b.device)
    u = None if u is None else _written(u)
    if not N * U * K:
        return EmbeddingSums(p.rows, *_nothing(b, (U, K), N, u, gram))
    row_begin, place_begin = (torch.nn.functional.pad(counts.cumsum(0), (1, 0)) for counts in (p.row_counts, p.counts))
    tensors = (row_begin, p.row, p.example, place_begin, p.place, u_rows)

    def run(sums: bool, gram: bool) -> _Results:
        launch = _launch(gpu, tile, N, None, gram, U, K)
        results = _Results(b, launch, N, (U, K), sums, gram, u if sums else None)
        with _guard(b):
            _compiled().embedding(
                (launch.tile, launch.blocks, launch.pairs, _stream(b)),
                _ELEMENTS[b.dtype],
                (U, K, launch.held, launch.group, _exact()),
                _strided(b),
                N,
                max(b.shape[1], 1),
                *map(_pointer, tensors),
                results.pointers(),
            )
        return results

    gpu = gpu_of(b.device)
    tile = _embedding_tile(gpu, N, gram)
    if not gram or tile.fitting(gpu.shared_bytes) >= N:
        own = run(True, gram)
        found = own.result(own.gram())
    else:
        found = run(True, False).result(run(False, True).gram())
    return EmbeddingSums(p.rows, *found)
