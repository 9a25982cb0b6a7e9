"""Predicts the time of each algorithm on a GPU. The model is fitted to measurements on an H100 (tests/data/h100.csv).

A launch consists of *programs* (thread blocks) that all do the same: each computes some tiles with matrix products and *folds* each
tile, which means that it accumulates the tile into sums. The time of a launch is the maximum of three times:

- **Multiprocessors**: the time of the busiest one. It runs its programs in rounds of as many as it can hold. A round takes the
  larger of its programs' total matrix-unit time and total instruction time, because different programs overlap. It takes at least
  as long as a single program, which waits ``FILL`` for the first operands of every tile and folds after it has multiplied.
- **L2**: the time to read the operands from the L2 cache, (rows + columns) for every step of every tile.
- **Memory**: the time to read the operands once for each block of tiles that are computed concurrently, and to transfer the results
  and the workspace.

The launch overhead is added. ``ACHIEVED`` is the fraction of the peak rates that good kernels sustain. The model predicts a
library's plain matrix product by the same rules, so ratios depend less on this constant.

The model ignores the layout and alignment of the operands, clock rates that drop under load, transfers between the partitions of
the L2 cache, the direction's tile, and results as small as (N, N).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import ceil

from zsl_kernels.planning.call import Call, Candidate
from zsl_kernels.planning.devices import H100, Gpu
from zsl_kernels.planning.tiles import CONFIGS, CUDA_SUMS_HELD, CUDA_TILES, GHOST_SHORT, Config, kind

ACHIEVED = 0.75
LAUNCH, GAP = 5e-6, 2e-6
FILL = 0.8e-6
# Thread instructions, counted in the compiled kernels (make gpu-report) for the larger tiles. FOLD: per element of a tile that is
# folded. STEP and CUDA_STEP: per operand element of a step. The element is copied and, if it is float32, split into parts that the
# matrix units multiply exactly. If warps multiply independently, every warp that uses the element splits it.
FOLD = {"interference": 14.0, "sq_norm": 9.0, "derivative": 16.0, "ghost": 4.0, "rank_one": 3.0, "gram": 12.0, "product": 4.0}
STEP = {"half": {80: 3.0, 90: 2.2, 100: 2.4}, "float32": {80: 32.0, 90: 18.0, 100: 19.0}}
CUDA_STEP = {"half": 6.0, "float32": 50.0}  # of the CUDA kernels
# float32 values that a thread keeps per element of its part of the tile, and the other registers that it needs.
LIVE = {"interference": 4, "sq_norm": 1, "derivative": 2, "ghost": 2, "rank_one": 3, "gram": 4, "product": 1}
REGISTERS = 96
# The slab of gradients that "stored" writes and reads back. It is small enough to stay in the L2 cache.
SLAB_BYTES = 32 << 20
# The derivatives that the backward pass stores at a time: enough work for a whole device, and about the size of the L2 cache.
BACKWARD_BYTES = 64 << 20
SUM_RUN = 64  # examples that are summed in registers before the sum is written
# The tiles that a library matrix product is assumed to use. It can also split the contraction.
LIBRARY = {"half": Config(128, 256, 64, 8, 3), "float32": Config(128, 128, 16, 8, 3)}
# The measured time on an H100 divided by the model's time: the median over all measured calls, per backend and algorithm. The same
# factors are assumed for GPUs that were not measured.
MEASURED = {
    ("triton", "stored"): {"half": 3.2, "float32": 3.5},
    ("triton", "direct"): {"half": 1.1, "float32": 2.8},
    ("cuda", "direct"): {"half": 2.8, "float32": 1.4},
    ("chunked", "chunked"): {"half": 1.4, "float32": 1.3},
}
CUDA_DEPTH, CUDA_WARPS = 32, 8  # of the CUDA kernels, in steps of 64 bytes
# Seconds of the kernels for compute capability 9.0 per tile and example: to fold the tile, and per 64 positions of its product.
# They were measured for interference and are upper bounds for the other ops, which fold into scalars or into one weighted sum.
HOPPER_FOLD, HOPPER_STEP = 0.94e-6, 0.46e-6


@dataclass(frozen=True)
class Time:
    """The time of one or several launches in seconds, by resource. The resources work concurrently."""

    multiprocessors: float = 0.0
    l2: float = 0.0
    memory: float = 0.0
    launches: float = 1.0
    busy: str = "matrix unit"  # the bottleneck inside of the multiprocessors
    l2_bytes: float = 0.0
    bytes: float = 0.0

    @property
    def device(self) -> float:
        """Return the time without the launch overhead."""
        return max(self.multiprocessors, self.l2, self.memory)

    @property
    def limit(self) -> str:
        found = {self.busy: self.multiprocessors, "L2": self.l2, "memory": self.memory}
        return max(found, key=lambda name: found[name])

    def times(self, count: float) -> Time:
        scaled = {f.name: count * getattr(self, f.name) for f in fields(self) if f.name != "busy"}
        return Time(**scaled, busy=self.busy)


def total(times: list[Time]) -> tuple[float, str]:
    """Return the time of consecutive launches and its largest component.

    The host issues the next launch while the device works. The device pauses for ``GAP`` between two launches.
    """
    launches = sum(t.launches for t in times)
    spent: dict[str, float] = {"launch": max(GAP * launches, LAUNCH * launches - sum(t.device for t in times)) + LAUNCH}
    for t in times:
        spent[t.limit] = spent.get(t.limit, 0.0) + t.device
    return sum(spent.values()), max(spent, key=lambda name: spent[name])


def shared_bytes(config: Config, itemsize: int) -> int:
    """Estimate the shared memory of a kernel's operands. The tests compare it with the compiled kernels."""
    return config.stages * (config.rows + config.cols) * config.depth * itemsize


def resident(gpu: Gpu, warps: int, registers: int, shared: int) -> int:
    """Return how many programs fit on a multiprocessor, at least one. The system reserves 1 KiB of shared memory per program."""
    by_registers = 65536 // (32 * warps * (-(-registers // 8) * 8))
    by_shared = (gpu.shared_bytes + 1024) // (shared + 1024)
    return max(1, min(by_registers, by_shared, gpu.max_warps // warps, 32))


def registers(kernel: str, config: Config) -> int:
    """Estimate the registers of a thread."""
    return min(255, REGISTERS + LIVE[kernel] * config.rows * config.cols // (32 * config.warps))


@dataclass(frozen=True)
class Launch:
    programs: int
    folds: int  # tiles per program
    contraction: int  # length of the contraction that computes a tile
    rate: float  # operations per second of the device's matrix units
    fold: float  # instructions per element of a tile
    holds: int  # programs that fit on a multiprocessor
    itemsize: int
    extra: float = 0.0  # additional seconds of a program on the matrix unit
    step: float = 0.0  # instructions per operand element of a matrix product
    l2_share: float = 1.0  # fraction of the operands read from the L2 cache; the rest comes from other multiprocessors

    def time(self, gpu: Gpu, config: Config, operands: float, results: float, cached: float = 0.0) -> Time:
        """Return the time of the launch.

        ``operands``: bytes of the operands read from memory. ``results``: other bytes read from or written to memory. ``cached``:
        bytes that stay in the L2 cache.
        """
        area, depth = config.rows * config.cols, _up(self.contraction, config.depth)
        matrix = self.folds * 2.0 * area * depth / (self.rate / gpu.sms) + self.extra
        loads = (config.rows + config.cols) * self.contraction
        issue = gpu.instructions * ACHIEVED / gpu.sms
        fold, step = self.folds * area * self.fold / issue, self.folds * loads * self.step / issue
        # The matrix unit processes one step while the next is copied.
        alone = max(matrix, step) + fold + self.folds * FILL

        def round_(programs: int) -> float:
            return max(programs * max(matrix, fold + step), alone) if programs else 0.0

        full, rest = divmod(ceil(self.programs / gpu.sms), self.holds)
        busiest = full * round_(self.holds) + round_(rest)
        evenly = self.programs / gpu.sms * max(matrix, fold + step)
        busy = "waves" if busiest > 1.25 * evenly else "instructions" if fold + step > matrix else "matrix unit"
        l2_bytes = float(self.programs) * self.folds * loads * self.itemsize * self.l2_share + cached
        moved = min(l2_bytes - cached, operands) + results
        return Time(busiest, l2_bytes / gpu.l2_bandwidth, moved / gpu.bandwidth, 1, busy, l2_bytes, moved)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def operand_traffic(gpu: Gpu, config: Config, holds: int, O: int, K: int, row_bytes: int) -> float:
    """Return the bytes of a and b read from memory, with ``row_bytes`` per feature.

    The concurrently computed tiles form a block of the weight, as square as O and K allow. Each block reads its operands once.
    """
    at_once = float(gpu.sms * holds * config.rows * config.cols)
    cols = min(max(K, 1), max(at_once**0.5, at_once / max(O, 1)))
    rows = min(max(O, 1), at_once / cols)
    blocks = max(1.0, O / rows) * max(1.0, K / cols)
    return blocks * (rows + cols) * row_bytes


def product_rate(gpu: Gpu, dtype: str, warp_wide: bool) -> float:
    """Return the operations per second of our kernels' matrix products. A float32 product takes three products of tf32 parts.

    ``warp_wide``: whether they use single-warp instructions (HMMA), which do not reach the full rate on newer devices.
    """
    peak = gpu.tf32_flops / 3 if kind(dtype) == "float32" else gpu.half_flops
    return peak * ACHIEVED * (gpu.warp_share if warp_wide else 1.0)


def library_rate(gpu: Gpu, dtype: str) -> float:
    """Return the operations per second of a library matrix product. Exact float32 runs on the CUDA cores."""
    return ACHIEVED * {"float64": gpu.float32_flops / 2, "float32": gpu.float32_flops}.get(dtype, gpu.half_flops)


def library(gpu: Gpu, work: float, moved: float, launches: int, dtype: str = "float32") -> Time:
    """Return the time of large library calls, which are assumed to use the whole device."""
    return Time(work / library_rate(gpu, dtype), 0.0, moved / gpu.bandwidth, launches, "library", 0.0, moved)


def _splits(gpu: Gpu, tiles: int, N: int, holds: int) -> Iterator[int]:
    """Yield the numbers of splits to consider: powers of two up to N, until half as many fill the device."""
    splits = 1
    while splits == 1 or (splits <= N and tiles * (splits // 2) < gpu.sms * holds):
        yield splits
        splits *= 2


def _configs(call: Call, kernel: str) -> tuple[Config, ...]:
    assert call.gpu is not None
    return CONFIGS[call.gpu.arch].get(kernel, {}).get(kind(call.dtype), ())


def _tiles(rows: int, cols: int, config: Config) -> int:
    return ceil(rows / config.rows) * ceil(cols / config.cols)


def _launch(call: Call, kernel: str, config: Config, programs: int, folds: int, contraction: int, *, fold: float = 0.0) -> Launch:
    """Return the launch of a Triton kernel. ``fold``: additional instructions per element."""
    gpu = call.gpu
    assert gpu is not None
    holds = resident(gpu, config.warps, registers(kernel, config), shared_bytes(config, call.operand_itemsize))
    rate = product_rate(gpu, call.dtype, warp_wide=False)
    return Launch(
        programs, folds, contraction, rate, FOLD[kernel] + fold, holds, call.operand_itemsize, 0.0, STEP[kind(call.dtype)][gpu.arch]
    )


def _candidate(
    call: Call, way: str, kernel: str, config: Config, work: float, times: list[Time], workspace: float, splits: int = 1
) -> Candidate:
    """Return the candidate of consecutive launches."""
    time, limit = total(times)
    return Candidate(
        "triton",
        way,
        kernel,
        config[:2],
        work,
        sum(t.bytes for t in times),
        time,
        int(workspace),
        limit,
        sum(t.l2_bytes for t in times),
        config,
        splits,
    )


def triton_direct(call: Call) -> Iterator[Candidate]:
    """Algorithm "direct", without pairwise products: a program per tile and part of the examples; a second stage adds the parts."""
    if call.pairs or call.op not in ("interference", "sq_norm"):
        return
    gpu = call.gpu
    assert gpu is not None
    for config in _configs(call, call.op):
        tiles = _tiles(call.O, call.K, config)
        holds = _launch(call, call.op, config, 1, 1, 1).holds
        for splits in _splits(gpu, tiles, call.N, holds):
            folds = ceil(call.N / splits)
            # After the first run of examples, totals are read, updated and written. The second stage reads the parts back.
            runs = max(0, ceil(folds / SUM_RUN) - 1)
            parts = call.result_bytes * splits if splits > 1 else 0.0
            scalars = 4.0 * 4 * call.N * tiles
            launch = _launch(call, call.op, config, tiles * splits, folds, call.T)
            read = operand_traffic(gpu, config, holds, call.O, call.K, call.N * call.T * call.operand_itemsize)
            first = launch.time(gpu, config, read, parts + 2 * runs * call.result_bytes * splits + scalars)
            second = library(gpu, 0.0, parts + call.result_bytes + scalars, 1 + (splits > 1))
            yield _candidate(call, "direct", call.op, config, call.product, [first, second], parts + scalars, splits)


def slab_of(examples: int, O: int, K: int, config: Config) -> tuple[int, int]:
    """Return the rows and columns of a slab of float32 gradients within ``SLAB_BYTES``: whole tiles, at least one."""
    fit = max(1, SLAB_BYTES // (4 * config.rows * config.cols * max(examples, 1)))
    across = min(fit, ceil(max(K, 1) / config.cols))
    return config.rows * min(fit // across, ceil(max(O, 1) / config.rows)), config.cols * across


def triton_stored(call: Call) -> Iterator[Candidate]:
    """Algorithm "stored": store the gradients of all examples for a slab of the weight; read them for sums and pairwise products.

    The storing kernel keeps no sums in registers, so its tiles are larger than those of "direct".
    """
    if call.op not in ("interference", "gram"):
        return
    gpu = call.gpu
    assert gpu is not None
    for config in _configs(call, "sq_norm"):
        rows, cols = slab_of(call.formed, call.O, call.K, config)
        rows, cols = min(rows, max(call.O, 1)), min(cols, max(call.K, 1))
        slabs = ceil(call.O / rows) * ceil(call.K / cols) or 1
        tiles = _tiles(rows, cols, config)
        slab = 4.0 * call.formed * rows * cols
        if slab > SLAB_BYTES and not call.pairs:
            continue  # a single tile of all examples is too large; "direct" does not store it
        launch = _launch(call, "sq_norm", config, 1, 1, 1)
        for splits in _splits(gpu, tiles, call.formed, launch.holds):
            folds = ceil(call.formed / splits)
            read = operand_traffic(gpu, config, launch.holds, rows, cols, call.formed * call.T * call.operand_itemsize)
            store = replace(launch, programs=tiles * splits, folds=folds, contraction=call.T).time(gpu, config, read, 0.0, slab)
            times = [store.times(slabs)]
            if call.op == "interference":
                times.append(_slab_sums(call, slab).times(slabs))
            if call.pairs:
                times.append(_slab_products(call, slab).times(slabs))
            if slab > SLAB_BYTES:  # the first kernel writes it to memory, and each other kernel reads it from there
                moved = len(times) * slab * slabs
                times.append(Time(0.0, 0.0, moved / gpu.bandwidth, 0.0, bytes=moved))
            work = call.product + (_met(call) if call.pairs else 0.0) * call.O * call.K
            yield _candidate(call, "stored", "sq_norm", config, work, times, slab, splits)


def _slab_sums(call: Call, slab: float) -> Time:
    """Return the time to fold a slab of gradients that is read from the L2 cache, and to add up the programs' partial results."""
    gpu = call.gpu
    assert gpu is not None
    fold = FOLD["interference"] * slab / 4 / (gpu.instructions * ACHIEVED)
    results = 2 * call.result_bytes * slab / max(4.0 * call.elements, 1.0)
    return Time(fold, slab / gpu.l2_bandwidth, results / gpu.bandwidth, 4, "instructions", slab, results)


def _met(call: Call) -> float:
    """Return the operations per coordinate of the library's pairwise products: whole blocks of 32 examples, both triangles."""
    return 2.0 * _up(call.N, 32) * _up(call.M or call.N, 32)


def _slab_products(call: Call, slab: float) -> Time:
    """Return the time of a slab's pairwise products. Each block of examples reads the slab from the L2 cache once."""
    gpu = call.gpu
    assert gpu is not None
    moved = slab * ceil((call.M or call.N) / LIBRARY["float32"].rows)
    work = _met(call) * slab / (4.0 * max(call.formed, 1))
    return Time(work / library_rate(gpu, "float32"), moved / gpu.l2_bandwidth, 0.0, 3, "Gram", moved)


def triton_rank_one(call: Call) -> Iterator[Candidate]:
    """Algorithm "rank-one", for T = 1: the sums are three matrix products over the examples; the scalars factorize too."""
    if call.T != 1 or call.irregular or call.op != "interference":
        return
    gpu = call.gpu
    assert gpu is not None
    work = 6.0 * call.elements + call.pairs * (call.O + call.K)
    vectors = 8.0 * call.N * (call.O + call.K)  # float32 copies and their magnitudes or squares; PyTorch computes the scalars
    for config in _configs(call, "rank_one"):
        tiles = _tiles(call.O, call.K, config)
        holds = _launch(call, "rank_one", config, 1, 1, 1).holds
        # Two products of the operands, and one of their squares, which are float32 and therefore split.
        rate = 3 / (2 / product_rate(gpu, call.dtype, False) + 1 / product_rate(gpu, "float32", False))
        for splits in _splits(gpu, tiles, call.N, holds):
            parts = call.result_bytes * splits if splits > 1 else 0.0
            # Each operand is loaded once for all three. One product or all of them split it.
            step = STEP["float32"][gpu.arch] / (1 if kind(call.dtype) == "float32" else 3)
            contraction, itemsize = 3 * ceil(call.N / splits), call.operand_itemsize
            launch = Launch(tiles * splits, 1, contraction, rate, 0.0, holds, itemsize, 0.0, step, l2_share=1 / 3)
            first = launch.time(gpu, config, call.operand_bytes, max(parts, call.result_bytes))
            last = library(gpu, 2 * call.pairs * (call.O + call.K), call.operand_bytes + 2 * (parts + vectors), 8)
            yield _candidate(call, "rank-one", "rank_one", config, work, [first, last], parts + vectors, splits)


def triton_ghost(call: Call) -> Iterator[Candidate]:
    """Algorithm "ghost": blocks of positions × blocks of positions. Short examples share a block, padded to a power of two."""
    if call.irregular or call.op not in ("gram", "sq_norm"):
        return
    gpu = call.gpu
    assert gpu is not None
    kernel = "ghost" if call.T > GHOST_SHORT else "ghost_short"
    for config in _configs(call, kernel):
        padded = 1 << max(0, call.T - 1).bit_length()
        if padded <= min(config.rows, config.cols):
            blocks, others = (ceil(n * padded / config.rows) for n in (call.N, call.M or 0))
            pairs = blocks if call.op == "sq_norm" else blocks * others if call.M else blocks * (blocks + 1) // 2
            programs, folds = pairs, 1
        else:
            programs, folds = ceil(call.T / config.rows), ceil(call.T / config.cols)
            programs *= call.N if call.op == "sq_norm" else call.N * call.M if call.M else call.N * (call.N + 1) // 2
        launch = _launch(call, "ghost", config, programs, folds, call.O + call.K)
        partials = 8.0 * programs
        times = [launch.time(gpu, config, call.operand_bytes, partials), library(gpu, 0.0, partials, 1)]
        work = 2.0 * programs * folds * config.rows * config.cols * (call.O + call.K)
        yield _candidate(call, "ghost", kernel, config, work, times, partials)


def triton_backward(call: Call) -> Iterator[Candidate]:
    """The backward pass: store ∂loss/∂g_i in a workspace, piece by piece, and compute two matrix products with each piece."""
    if call.op != "interference_backward":
        return
    gpu = call.gpu
    assert gpu is not None
    workspace = min(4.0 * call.elements, BACKWARD_BYTES)
    pieces = max(1, ceil(4.0 * call.elements / BACKWARD_BYTES))
    products = _configs(call, "product")
    for config in _configs(call, "derivative"):
        programs = ceil(call.N * _tiles(call.O, call.K, config) / pieces)
        launch = _launch(call, "derivative", config, programs, 1, call.T)
        read = operand_traffic(gpu, config, launch.holds, call.O, call.K, call.N * call.T * call.operand_itemsize)
        times = [launch.time(gpu, config, read / pieces, workspace).times(pieces)]
        if call.gram:
            times.append(_slab_products(call, 2 * workspace).times(pieces))
        for features, contraction in ((call.K, call.O), (call.O, call.K)) if products else ():
            # The same choice as in the backward pass.
            product = min(products, key=lambda c: _up(call.T, c.rows) * _up(features, c.cols))
            programs = ceil(call.N * _tiles(call.T, features, product) / pieces)
            launch = _launch(call, "product", product, programs, 1, contraction)
            times.append(launch.time(gpu, product, call.operand_bytes + workspace, call.operand_bytes / pieces).times(pieces))
        yield _candidate(call, "direct", "derivative", config, 3 * call.product, times, workspace)


def cuda_direct(call: Call) -> Iterator[Candidate]:
    """Algorithm "direct" in CUDA: a persistent kernel keeps all tiles in shared memory and multiplies them there."""
    if call.op not in ("interference", "gram"):
        return
    gpu = call.gpu
    assert gpu is not None
    for kernel in CUDA_TILES:
        tile = (kernel.rows, kernel.cols)
        slots = kernel.fitting(gpu.shared_bytes)
        if slots < 2:
            continue
        held, _, rounds = kernel.groups(call.N, call.M, slots) if call.pairs else (CUDA_SUMS_HELD, 0, 1)
        shared = kernel.shared_bytes(held, not call.pairs)
        if shared > gpu.shared_bytes or (rounds > 1 and kernel is not CUDA_TILES[-1]):
            continue
        formed = rounds * held if rounds > 1 else call.formed  # each pair of groups computes its examples again
        config = Config(*tile, CUDA_DEPTH, CUDA_WARPS, kernel.stages)
        tiles = _tiles(call.O, call.K, config)
        holds = resident(gpu, CUDA_WARPS, registers("gram", config), shared)
        # The pairwise products consist of three products of parts, in fragments of 16 × 8 examples.
        met = _up(call.N, 16) * _up(call.M or call.N, 8) if call.pairs else 0
        pairs = 2.0 * met / rounds * tile[0] * tile[1] / (product_rate(gpu, "float32", True) / gpu.sms)
        rate = product_rate(gpu, call.dtype, True)
        step, itemsize = CUDA_STEP[kind(call.dtype)], call.operand_itemsize
        launch = Launch(tiles * rounds, formed // rounds, call.T, rate, FOLD["gram"], holds, itemsize, pairs, step)
        blocks = min(tiles, gpu.sms * holds)
        partials = 8.0 * blocks * kernel.shares * call.N * (call.M or call.N) if call.pairs else 0.0
        scalars = 4.0 * 4 * call.N * tiles
        read = operand_traffic(gpu, config, holds, call.O, call.K, formed * call.T * call.operand_itemsize)
        first = launch.time(gpu, config, read, call.result_bytes + partials + scalars)
        second = library(gpu, 0.0, partials + scalars, 2)
        times = [first, second]
        if rounds > 1 and call.op == "interference":  # the sums need a separate launch
            launch = Launch(tiles, call.N, call.T, rate, FOLD["gram"], 2, itemsize, 0.0, step)
            times.append(launch.time(gpu, config, read, call.result_bytes))
        time, limit = total(times)
        work = call.product / max(call.formed, 1) * formed + 2.0 * met * call.O * call.K
        yield Candidate(
            "cuda",
            "direct",
            "gram" if call.pairs else "interference",
            tile,
            work,
            first.bytes + second.bytes,
            time,
            int(partials + scalars),
            limit,
            first.l2_bytes,
            config,
        )


def measured(candidate: Candidate, call: Call) -> Candidate:
    """Correct the candidate's time by the measured factor."""
    factor = MEASURED.get((candidate.impl, candidate.way), {}).get(kind(call.dtype), 1.0)
    return replace(candidate, time=factor * candidate.time)


HOPPER_OPS = ("interference", "gram", "dot", "sq_norm", "weighted_grad")
HOPPER_TILE = 128
HOPPER_SHARED = 5 * 32768 + 4 * HOPPER_TILE**2 + 80  # bytes per block: the stages, Σ g² and the barriers
HOPPER_SLAB_BYTES = 256 << 20


def hopper_schedule(gpu: Gpu, tiles: int, N: int) -> tuple[int, int]:
    """Return how many tiles have a block of their own, and into how many parts of the examples the other tiles are split.

    Whole waves of tiles are not split. The remaining tiles, which would leave multiprocessors idle, are split if this fills them
    better.
    """
    rest = tiles % gpu.sms
    parts = min(N, gpu.sms // rest) if rest else 1
    return (tiles - rest, parts) if parts > 1 else (tiles, 1)


def hopper_slab_tiles(gpu: Gpu, tiles: int, examples: int, itemsize: int) -> int:
    """Return the tiles of a slab within ``HOPPER_SLAB_BYTES``, at least one, in whole waves if a wave fits."""
    fit = max(1, HOPPER_SLAB_BYTES // (max(examples, 1) * HOPPER_TILE**2 * itemsize))
    return min(tiles, fit if fit < gpu.sms else fit // gpu.sms * gpu.sms)


def has_hopper(gpu: Gpu) -> bool:
    """Return whether the kernels for compute capability 9.0 run on this GPU."""
    return gpu.boxes and gpu.shared_bytes >= HOPPER_SHARED


def hopper(call: Call) -> Iterator[Candidate]:
    """Algorithm "hopper": warpgroup matrix products, which only compute capability 9.0 has.

    The model is fitted to measurements on an H100: a tile of one example takes ``HOPPER_FOLD``, and ``HOPPER_STEP`` per step of its
    positions.
    """
    gpu = call.gpu
    assert gpu is not None
    if not has_hopper(gpu) or call.op not in HOPPER_OPS:
        return
    tiles = max(1, ceil(call.O / HOPPER_TILE) * ceil(call.K / HOPPER_TILE))
    products = 1 if kind(call.dtype) == "half" else 6
    steps = ceil(call.T / 64) * products
    whole, parts = hopper_schedule(gpu, tiles, max(call.formed, 1))
    turns = ceil(whole / gpu.sms) + (ceil((tiles - whole) * parts / gpu.sms) / parts if tiles > whole else 0)
    share = H100.sms / gpu.sms
    busy = turns * call.formed * (HOPPER_STEP * steps + HOPPER_FOLD) * share
    times = [Time(busy, 0.0, 0.0, 1.0 + (parts > 1), "matrix unit", 0.0, call.operand_bytes + call.result_bytes)]
    workspace = 0.0
    if products > 1 or call.irregular:
        packed = call.operand_bytes * (1 + 2 * (products > 1))
        times.append(Time(memory=packed / gpu.bandwidth, launches=2, bytes=packed))
    if call.pairs:
        itemsize = 2 if call.dtype == "bfloat16" else 4
        slab = call.elements * itemsize
        slabs = ceil(tiles / hopper_slab_tiles(gpu, tiles, call.formed, itemsize))
        read = slab * ceil(call.formed / 32)
        times.append(Time(memory=(slab + read) / gpu.bandwidth, launches=3.0 * slabs, bytes=slab + read))
        workspace += slab / slabs
    time, limit = total(times)
    yield Candidate(
        "cuda",
        "hopper",
        "hopper",
        (HOPPER_TILE, HOPPER_TILE),
        call.product,
        sum(t.bytes for t in times),
        time,
        int(workspace),
        limit,
    )


def plain_product(gpu: Gpu, N: int, T: int, K: int, O: int, dtype: str) -> Time:
    """Return the time of the library's dW = bᵀa over all N·T rows, the baseline of the kernels, with its best split of the rows.

    The model grants it a feature of newer GPUs: ``gpu.cluster`` blocks above each other share the operand they have in common.
    """
    config = LIBRARY[kind(dtype)]
    itemsize = 4 if dtype == "float32" else 2
    l2_share = (config.rows + config.cols / gpu.cluster) / (config.rows + config.cols)
    tiles = _tiles(O, K, config)
    found = []
    for splits in _splits(gpu, tiles, N * T, 1):
        parts = 2 * 4.0 * O * K * splits if splits > 1 else 0.0
        rows = ceil(N * T / splits)
        launch = Launch(tiles * splits, 1, rows, library_rate(gpu, dtype), FOLD["product"], 1, itemsize, l2_share=l2_share)
        found.append(launch.time(gpu, config, operand_traffic(gpu, config, 1, O, K, N * T * itemsize), 4.0 * O * K + parts))
    return min(found, key=lambda t: t.device)
