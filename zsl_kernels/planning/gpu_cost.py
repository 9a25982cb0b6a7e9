"""The predicted time of each way of computing a call on a GPU: a model, fitted to measurements on an H100 (tests/data/h100.csv).

A launch is a number of *programs* (blocks of threads), each of which does the same: it forms some tiles by matrix products and
*folds* each into sums. Its time is the longest of

- the busiest multiprocessor's, which takes its share of the programs in rounds of as many as it holds at once. A round takes the
  sum of its programs' work on the matrix unit or their instructions, whichever is more, for different programs overlap; but no less
  than one program alone, which folds when it has multiplied, and waits ``FILL`` for the first operands of every tile;
- the operands' way from the second-level cache: (rows + columns) of every step of every tile;
- the device's memory: the operands once for each block of tiles that are in work at once, the results, the workspace;

and the launches come on top. A part of the peak rates, ``ACHIEVED``, is what good kernels keep up; a library's plain product is
predicted by the same rules, so ratios depend on it less. Left out: the operands' layout and alignment, clocks that fall under load,
transfers between the halves of the second-level cache, the direction's tile, and results as small as (N, N).
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
# Instructions of a thread: for each element of a tile that is folded; for each operand of a step, which is copied and, if it is
# float32, split into parts that the matrix units multiply exactly, by every warp that meets it where warps multiply alone. Counted
# in the compiled kernels (make gpu-report), for the larger tiles.
FOLD = {"interference": 14.0, "sq_norm": 9.0, "derivative": 16.0, "ghost": 4.0, "rank_one": 3.0, "gram": 12.0, "product": 4.0}
STEP = {"half": {80: 3.0, 90: 2.2, 100: 2.4}, "float32": {80: 32.0, 90: 18.0, 100: 19.0}}
CUDA_STEP = {"half": 6.0, "float32": 50.0}  # of the CUDA kernels
# float32 values that a thread holds for each element of its part of the tile, and registers that it needs besides.
LIVE = {"interference": 4, "sq_norm": 1, "derivative": 2, "ghost": 2, "rank_one": 3, "gram": 4, "product": 1}
REGISTERS = 96
# The slab of gradients that "stored" writes and reads again: it stays in the second-level cache.
SLAB_BYTES = 32 << 20
# Of the derivatives that the backward pass stores: work for a whole device, and near the second-level cache.
BACKWARD_BYTES = 64 << 20
SUM_RUN = 64  # examples that are summed in registers
# What a library's product uses, with its other choices among the splits.
LIBRARY = {"half": Config(128, 256, 64, 8, 3), "float32": Config(128, 128, 16, 8, 3)}
# How much longer than the model says the ways took on an H100, in the median of all calls that were measured there. For the other
# parts, which were not measured, the same is assumed.
MEASURED = {
    ("triton", "stored"): {"half": 3.2, "float32": 3.5},
    ("triton", "direct"): {"half": 1.1, "float32": 2.8},
    ("cuda", "direct"): {"half": 2.8, "float32": 1.4},
    ("chunked", "chunked"): {"half": 1.4, "float32": 1.3},
}
CUDA_DEPTH, CUDA_WARPS = 32, 8  # of the CUDA kernels, in steps of 64 bytes
# Of the kernels of compute capability 9.0, for a tile of one example: to fold it, and for 64 positions of its product. Measured of
# interference. To fold a tile into scalars alone, or into a weighted sum, is less work and was not measured: it is an upper bound.
HOPPER_FOLD, HOPPER_STEP = 0.94e-6, 0.46e-6


@dataclass(frozen=True)
class Time:
    """Seconds of one or several launches, by what they are spent on; the parts overlap."""

    multiprocessors: float = 0.0
    l2: float = 0.0
    memory: float = 0.0
    launches: float = 1.0
    busy: str = "matrix unit"  # what holds the multiprocessors up
    l2_bytes: float = 0.0
    bytes: float = 0.0

    @property
    def device(self) -> float:
        """Without the launches."""
        return max(self.multiprocessors, self.l2, self.memory)

    @property
    def limit(self) -> str:
        found = {self.busy: self.multiprocessors, "L2": self.l2, "memory": self.memory}
        return max(found, key=lambda name: found[name])

    def times(self, count: float) -> Time:
        scaled = {f.name: count * getattr(self, f.name) for f in fields(self) if f.name != "busy"}
        return Time(**scaled, busy=self.busy)


def total(times: list[Time]) -> tuple[float, str]:
    """Seconds of launches one after the other, and what most of them are spent on. The host launches the next while the device
    works, which pauses for ``GAP`` between two."""
    launches = sum(t.launches for t in times)
    spent: dict[str, float] = {"launch": max(GAP * launches, LAUNCH * launches - sum(t.device for t in times)) + LAUNCH}
    for t in times:
        spent[t.limit] = spent.get(t.limit, 0.0) + t.device
    return sum(spent.values()), max(spent, key=lambda name: spent[name])


def shared_bytes(config: Config, itemsize: int) -> int:
    """Shared memory of a kernel's operands; what a compiled kernel really takes is for the tests to compare."""
    return config.stages * (config.rows + config.cols) * config.depth * itemsize


def resident(gpu: Gpu, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at once, at least one; each program's shared memory has another KiB of the system's."""
    by_registers = 65536 // (32 * warps * (-(-registers // 8) * 8))
    by_shared = (gpu.shared_bytes + 1024) // (shared + 1024)
    return max(1, min(by_registers, by_shared, gpu.max_warps // warps, 32))


def registers(kernel: str, config: Config) -> int:
    """An estimate, for a thread."""
    return min(255, REGISTERS + LIVE[kernel] * config.rows * config.cols // (32 * config.warps))


@dataclass(frozen=True)
class Launch:
    programs: int
    folds: int  # tiles that each forms
    contraction: int  # length of the products that form a tile
    rate: float  # operations that the device's matrix units do in a second
    fold: float  # instructions for each element of a tile
    holds: int  # programs that a multiprocessor holds
    itemsize: int
    extra: float = 0.0  # seconds of a program on the matrix unit beyond its tiles' products
    step: float = 0.0  # instructions for each operand of a product
    l2_share: float = 1.0  # of the operands, what comes from the second-level cache; the rest from neighbouring multiprocessors

    def time(self, gpu: Gpu, config: Config, operands: float, results: float, cached: float = 0.0) -> Time:
        """``operands``: bytes of them that come from memory; ``results``: bytes written, or read besides; ``cached``: bytes that
        stay in the second-level cache."""
        area, depth = config.rows * config.cols, _up(self.contraction, config.depth)
        matrix = self.folds * 2.0 * area * depth / (self.rate / gpu.sms) + self.extra
        loads = (config.rows + config.cols) * self.contraction
        issue = gpu.instructions * ACHIEVED / gpu.sms
        fold, step = self.folds * area * self.fold / issue, self.folds * loads * self.step / issue
        # The matrix unit works on one step while the next is copied.
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
    """Bytes of a and b that come from memory, ``row_bytes`` for each feature: the tiles that are in work at once lie in a block as
    square as O and K allow, and what such a block needs is read once."""
    at_once = float(gpu.sms * holds * config.rows * config.cols)
    cols = min(max(K, 1), max(at_once**0.5, at_once / max(O, 1)))
    rows = min(max(O, 1), at_once / cols)
    blocks = max(1.0, O / rows) * max(1.0, K / cols)
    return blocks * (rows + cols) * row_bytes


def product_rate(gpu: Gpu, dtype: str, warp_wide: bool) -> float:
    """Operations in a second of our kernels' products; float32 ones are three products of shorter numbers.

    ``warp_wide``: with the instructions of a single warp (HMMA), which on newer parts do not reach the matrix unit's full rate.
    """
    peak = gpu.tf32_flops / 3 if kind(dtype) == "float32" else gpu.half_flops
    return peak * ACHIEVED * (gpu.warp_share if warp_wide else 1.0)


def library_rate(gpu: Gpu, dtype: str) -> float:
    """Of a library's product: float32 on the CUDA cores, as true float32 is."""
    return ACHIEVED * {"float64": gpu.float32_flops / 2, "float32": gpu.float32_flops}.get(dtype, gpu.half_flops)


def library(gpu: Gpu, work: float, moved: float, launches: int, dtype: str = "float32") -> Time:
    """Large library calls, which are taken to use the whole device."""
    return Time(work / library_rate(gpu, dtype), 0.0, moved / gpu.bandwidth, launches, "library", 0.0, moved)


def _splits(gpu: Gpu, tiles: int, N: int, holds: int) -> Iterator[int]:
    """Powers of two up to N, while the programs of half as many do not fill the device."""
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
    """Of a Triton kernel; ``fold``: instructions for each element besides the kernel's own."""
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
    """Of launches one after the other."""
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
    """Without pairwise products: programs are tiles × parts of the examples, and a second stage adds up what the parts found."""
    if call.pairs or call.op not in ("interference", "sq_norm"):
        return
    gpu = call.gpu
    assert gpu is not None
    for config in _configs(call, call.op):
        tiles = _tiles(call.O, call.K, config)
        holds = _launch(call, call.op, config, 1, 1, 1).holds
        for splits in _splits(gpu, tiles, call.N, holds):
            folds = ceil(call.N / splits)
            # Totals past one run of examples are read, added to and written; parts are written, and read by the second stage.
            runs = max(0, ceil(folds / SUM_RUN) - 1)
            parts = call.result_bytes * splits if splits > 1 else 0.0
            scalars = 4.0 * 4 * call.N * tiles
            launch = _launch(call, call.op, config, tiles * splits, folds, call.T)
            read = operand_traffic(gpu, config, holds, call.O, call.K, call.N * call.T * call.operand_itemsize)
            first = launch.time(gpu, config, read, parts + 2 * runs * call.result_bytes * splits + scalars)
            second = library(gpu, 0.0, parts + call.result_bytes + scalars, 1 + (splits > 1))
            yield _candidate(call, "direct", call.op, config, call.product, [first, second], parts + scalars, splits)


def slab_of(examples: int, O: int, K: int, config: Config) -> tuple[int, int]:
    """Rows and columns of a slab of float32 gradients within ``SLAB_BYTES``, in whole tiles; one tile at least."""
    fit = max(1, SLAB_BYTES // (4 * config.rows * config.cols * max(examples, 1)))
    across = min(fit, ceil(max(K, 1) / config.cols))
    return config.rows * min(fit // across, ceil(max(O, 1) / config.rows)), config.cols * across


def triton_stored(call: Call) -> Iterator[Candidate]:
    """The gradients of all examples in a slab of the weight are stored, and read for the sums and for the pairwise products.

    Without sums to hold, the kernel that stores has larger tiles than the direct one's.
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
            continue  # one tile of so many examples, which the direct way need not hold
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
            if slab > SLAB_BYTES:  # written to memory, and read from there by each of the others
                moved = len(times) * slab * slabs
                times.append(Time(0.0, 0.0, moved / gpu.bandwidth, 0.0, bytes=moved))
            work = call.product + (_met(call) if call.pairs else 0.0) * call.O * call.K
            yield _candidate(call, "stored", "sq_norm", config, work, times, slab, splits)


def _slab_sums(call: Call, slab: float) -> Time:
    """Of the kernel that folds a slab of gradients, read from the second-level cache, and of adding up what its programs found."""
    gpu = call.gpu
    assert gpu is not None
    fold = FOLD["interference"] * slab / 4 / (gpu.instructions * ACHIEVED)
    results = 2 * call.result_bytes * slab / max(4.0 * call.elements, 1.0)
    return Time(fold, slab / gpu.l2_bandwidth, results / gpu.bandwidth, 4, "instructions", slab, results)


def _met(call: Call) -> float:
    """Operations for each coordinate of the library's pairwise products: whole blocks of at least 32 examples, and both halves."""
    return 2.0 * _up(call.N, 32) * _up(call.M or call.N, 32)


def _slab_products(call: Call, slab: float) -> Time:
    """Of a slab of gradients with itself, read from the second-level cache once for each block of the other examples."""
    gpu = call.gpu
    assert gpu is not None
    moved = slab * ceil((call.M or call.N) / LIBRARY["float32"].rows)
    work = _met(call) * slab / (4.0 * max(call.formed, 1))
    return Time(work / library_rate(gpu, "float32"), moved / gpu.l2_bandwidth, 0.0, 3, "Gram", moved)


def triton_rank_one(call: Call) -> Iterator[Candidate]:
    """Single positions: the sums factorize into three products over the examples, and the scalars into those of vectors."""
    if call.T != 1 or call.irregular or call.op != "interference":
        return
    gpu = call.gpu
    assert gpu is not None
    work = 6.0 * call.elements + call.pairs * (call.O + call.K)
    vectors = 8.0 * call.N * (call.O + call.K)  # float32, and their magnitudes or squares: the scalars are PyTorch's
    for config in _configs(call, "rank_one"):
        tiles = _tiles(call.O, call.K, config)
        holds = _launch(call, "rank_one", config, 1, 1, 1).holds
        # Two products of the operands themselves and one of their squares, which are float32 and split.
        rate = 3 / (2 / product_rate(gpu, call.dtype, False) + 1 / product_rate(gpu, "float32", False))
        for splits in _splits(gpu, tiles, call.N, holds):
            parts = call.result_bytes * splits if splits > 1 else 0.0
            # Each operand is loaded once for the three; one of them splits it, or all.
            step = STEP["float32"][gpu.arch] / (1 if kind(call.dtype) == "float32" else 3)
            contraction, itemsize = 3 * ceil(call.N / splits), call.operand_itemsize
            launch = Launch(tiles * splits, 1, contraction, rate, 0.0, holds, itemsize, 0.0, step, l2_share=1 / 3)
            first = launch.time(gpu, config, call.operand_bytes, max(parts, call.result_bytes))
            last = library(gpu, 2 * call.pairs * (call.O + call.K), call.operand_bytes + 2 * (parts + vectors), 8)
            yield _candidate(call, "rank-one", "rank_one", config, work, [first, last], parts + vectors, splits)


def triton_ghost(call: Call) -> Iterator[Candidate]:
    """Blocks of positions × blocks of positions; short examples share a block, each padded to a power of two."""
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
    """Piece by piece of a workspace: the derivatives with respect to the gradients are stored, and two products of them follow."""
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
            # As the backward pass chooses.
            product = min(products, key=lambda c: _up(call.T, c.rows) * _up(features, c.cols))
            programs = ceil(call.N * _tiles(call.T, features, product) / pieces)
            launch = _launch(call, "product", product, programs, 1, contraction)
            times.append(launch.time(gpu, product, call.operand_bytes + workspace, call.operand_bytes / pieces).times(pieces))
        yield _candidate(call, "direct", "derivative", config, 3 * call.product, times, workspace)


def cuda_direct(call: Call) -> Iterator[Candidate]:
    """One persistent kernel: the tiles of all examples stay in shared memory, where their mutual products are formed too."""
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
        formed = rounds * held if rounds > 1 else call.formed  # groups of examples are formed for every other group again
        config = Config(*tile, CUDA_DEPTH, CUDA_WARPS, kernel.stages)
        tiles = _tiles(call.O, call.K, config)
        holds = resident(gpu, CUDA_WARPS, registers("gram", config), shared)
        # Pairwise products in three parts, by fragments of 16 × 8 examples.
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
        if rounds > 1 and call.op == "interference":  # the sums are a launch of their own
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
    """The candidate with the time that it takes in fact."""
    factor = MEASURED.get((candidate.impl, candidate.way), {}).get(kind(call.dtype), 1.0)
    return replace(candidate, time=factor * candidate.time)


HOPPER_OPS = ("interference", "gram", "dot", "sq_norm", "weighted_grad")
HOPPER_TILE = 128
HOPPER_SHARED = 5 * 32768 + 4 * HOPPER_TILE**2 + 80  # bytes of a block: the stages, Σ g², the barriers
HOPPER_SLAB_BYTES = 256 << 20


def hopper_schedule(gpu: Gpu, tiles: int, N: int) -> tuple[int, int]:
    """How many tiles have a block of their own, and among how many parts of the examples each of the others is split: whole waves
    of tiles first; what would leave multiprocessors idle is split, if that fills them better."""
    rest = tiles % gpu.sms
    parts = min(N, gpu.sms // rest) if rest else 1
    return (tiles - rest, parts) if parts > 1 else (tiles, 1)


def hopper_slab_tiles(gpu: Gpu, tiles: int, examples: int, itemsize: int) -> int:
    """Tiles of a slab within ``HOPPER_SLAB_BYTES``, in whole waves where there is room for one; one tile at least."""
    fit = max(1, HOPPER_SLAB_BYTES // (max(examples, 1) * HOPPER_TILE**2 * itemsize))
    return min(tiles, fit if fit < gpu.sms else fit // gpu.sms * gpu.sms)


def has_hopper(gpu: Gpu) -> bool:
    """Whether the kernels of compute capability 9.0 run there."""
    return gpu.boxes and gpu.shared_bytes >= HOPPER_SHARED


def hopper(call: Call) -> Iterator[Candidate]:
    """By products of a warpgroup, which compute capability 9.0 alone has. The times were fitted to measurements on an H100: a tile
    of one example takes ``HOPPER_FOLD`` and ``HOPPER_STEP`` for each step of its positions."""
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
    """The library's dW = bᵀa over all N·T rows, which the kernels are compared with: the best of the splits of its rows.

    It is given what the newer parts offer to it: ``gpu.cluster`` blocks that lie above each other share the operand they have in
    common.
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
