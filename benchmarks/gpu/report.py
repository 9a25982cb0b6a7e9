"""What the GPU kernels are compiled to, and how fast devices that were not measured are predicted to be: ``make gpu-report``.

Writes benchmarks/results/gpu_report.md and needs no GPU. Registers, shared memory and instructions are those of the compiled
kernels. Times are the cost model's, whose constants were fitted on an H100 (benchmarks/results/gpu_kernels.md has what that took).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path

import zsl_kernels
from benchmarks.gpu import sass
from benchmarks.gpu.variants import variants
from zerosum.bench import machine
from zsl_kernels.planning import gpu_cost
from zsl_kernels.planning.call import Call
from zsl_kernels.planning.choose import choose
from zsl_kernels.planning.devices import GPUS, H100, Gpu
from zsl_kernels.planning.tiles import CUDA_SUMS_HELD, CUDA_TILES, Config

RESULTS = Path(__file__).parents[1] / "results"
# Width and layers of two of the paper's models (heads do not matter to the weights).
MODELS = {"78M": (768, 12), "472M": (2048, 16)}
N, T, V = 8, 1024, 50304
IMPLS = ("triton", "cuda", "chunked")


def weights(width: int, layers: int) -> list[tuple[int, int, int]]:
    """How many, O and K: queries, keys and values; the way out of attention; SwiGLU's gate and value, half as wide as the model
    each; its way out; the head."""
    d = width
    return [(layers, 3 * d, d), (layers, d, d), (layers, d, d), (layers, d, d // 2), (1, V, d)]


@dataclass(frozen=True)
class Prediction:
    """Of the gradients of all weight matrices of a model, for one batch."""

    gpu: str
    dtype: str
    model: str
    gram: bool
    milliseconds: float
    plain_milliseconds: float  # of the plain weight gradients
    chosen: dict[str, float]  # share of the time by implementation, way and tile

    @property
    def ratio(self) -> float:
        return self.milliseconds / self.plain_milliseconds

    def row(self) -> list[str]:
        chosen = max(self.chosen, key=lambda name: self.chosen[name])
        gram = "yes" if self.gram else ""
        times = (f"{self.milliseconds:.2f}", f"{self.plain_milliseconds:.2f}", f"{self.ratio:.2f}")
        return [self.gpu, self.dtype, self.model, gram, *times, chosen]


PREDICTED = ["GPU", "dtype", "model", "Gram", "ms", "plain ms", "× plain", "mostly by"]


def predict(gpu: Gpu, dtype: str, model: str, gram: bool) -> Prediction:
    seconds = plain = 0.0
    chosen = Counter[str]()
    for count, O, K in weights(*MODELS[model]):
        best = choose(Call("interference", N, T, K, O, gram=gram, dtype=dtype, gpu=gpu), IMPLS).chosen
        seconds += count * best.time
        plain += count * gpu_cost.total([gpu_cost.plain_product(gpu, N, T, K, O, dtype)])[0]
        chosen[f"{best.impl} {best.way} {best.tile[0]}×{best.tile[1]}"] += count * best.time
    shares = {name: value / seconds for name, value in chosen.items()}
    return Prediction(gpu.name, dtype, model, gram, 1e3 * seconds, 1e3 * plain, shares)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel on one architecture."""

    name: str
    gpu: str
    kind: str  # of the operands
    tile: tuple[int, int, int]  # rows, columns, depth
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    blocks: int  # that a multiprocessor holds
    loops: list[dict[str, int]]  # matrix instructions of each loop that has any itself
    instructions: list[int]  # all of these loops, of which branches may leave some out
    step_flops: float  # of one step of a tile
    step_bytes: float

    def row(self) -> list[str]:
        units = [", ".join(f"{count} {name}" for name, count in loop.items()) for loop in self.loops]
        loops = [f"{unit} of {count}" for unit, count in zip(units, self.instructions, strict=True)]
        return [
            self.name,
            self.gpu,
            self.kind,
            "×".join(map(str, self.tile)),
            str(self.warps),
            str(self.registers),
            f"{self.stack} / {self.spills}",
            f"{self.shared / 1024:.1f}",
            f"{self.blocks} / {self.blocks * self.warps}",
            "; ".join(loops) or "none",
            f"{self.step_flops / 1e3:.0f}",
            f"{self.step_bytes / 1e3:.1f}",
            f"{self.step_flops / max(self.step_bytes, 1):.0f}",
        ]


COMPILED = [
    "kernel",
    "GPU",
    "operands",
    "tile × depth",
    "warps",
    "registers",
    "stack / spills",
    "shared KiB",
    "blocks / warps",
    "matrix instructions of all, loop by loop",
    "kflop",
    "KB",
    "flop / B",
]


def kernel(name: str, gpu: Gpu, kind: str, config: Config, usage: sass.Usage, shared: int) -> Kernel:
    loops = [loop for loop in usage.loops if loop.own_matrix]
    itemsize = 4 if kind == "float32" else 2
    return Kernel(
        name,
        gpu.name,
        kind,
        config[:3],
        config.warps,
        usage.registers,
        usage.stack,
        usage.spills,
        shared,
        gpu_cost.resident(gpu, config.warps, usage.registers, shared),
        [dict(loop.own_matrix) for loop in loops],
        [loop.own.total() for loop in loops],
        2.0 * config.rows * config.cols * config.depth,
        float(itemsize) * (config.rows + config.cols) * config.depth,
    )


def shipped(arch: int) -> list[sass.Variant]:
    """One variant of each Triton kernel for each of its configurations: the first, which has the fewest flags."""
    found: dict[object, sass.Variant] = {}
    for variant in variants(arch):
        found.setdefault((re.split("[ ,]", variant.name)[0], variant.dtype, variant.config), variant)
    return list(found.values())


def _compile(arch: int, at: int) -> Kernel:
    # By number: what Triton made of a kernel does not travel between processes.
    variant = shipped(arch)[at]
    compiled = sass.compile_triton(variant, arch)
    return kernel(f"triton {variant.name}", GPUS[arch], variant.dtype, variant.config, compiled.usage, compiled.shared)


def triton_kernels() -> list[Kernel]:
    """Compiled two at a time, each in a process of its own: some thirty seconds for each architecture."""
    jobs = [(arch, at) for arch in GPUS for at in range(len(shipped(arch)))]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, *zip(*jobs, strict=True)))


def compiled(library: Path) -> Iterator[tuple[Gpu, sass.Usage]]:
    """The kernels of the module that setup.py built, for the devices that the planner knows."""
    for name, cubin in sass.cubins(library).items():
        arch = int(name.split("sm_")[1].removesuffix(".cubin").removesuffix("a"))
        if arch in GPUS:
            for usage in sass.inspect(cubin):
                yield GPUS[arch], usage


def cuda_kernels(library: Path) -> Iterator[Kernel]:
    """Of the module that setup.py built; its kernels' names have their tile and the operands' type."""
    tiles = {(tile.rows, tile.cols, tile.slots): tile for tile in CUDA_TILES}
    for gpu, usage in compiled(library):
        sizes = tuple(int(number) for number in re.findall(r"Li(\d+)E", usage.kernel)[:3])
        if sizes not in tiles or "Float16" in usage.kernel.replace("Bfloat16", ""):
            continue  # float16 is compiled as bfloat16 is
        tile, kind = tiles[sizes], "half" if "Bfloat16" in usage.kernel else "float32"
        config = Config(tile.rows, tile.cols, gpu_cost.CUDA_DEPTH // (2 if kind == "float32" else 1), gpu_cost.CUDA_WARPS, 0)
        held = [(f"cuda gram, N ≤ {tile.slots}", tile.slots, False)]
        if tile is CUDA_TILES[0]:
            held.append(("cuda sums", CUDA_SUMS_HELD, True))
        for title, examples, runs in held:
            yield kernel(title, gpu, kind, config, usage, usage.shared + tile.shared_bytes(examples, runs))


def other_kernels(library: Path) -> list[list[str]]:
    """Of those without a tile of ``CUDA_TILES``: how many variants of each, the most registers, and whether any spills."""
    found: dict[tuple[str, str], list[sass.Usage]] = {}
    for gpu, usage in compiled(library):
        length, rest = re.match(r"_ZN3zsl(\d+)(\w+)", usage.kernel).groups()  # its name, after the namespace
        name = rest[: int(length)]
        if name != "gram_kernel":
            found.setdefault((name, gpu.name), []).append(usage)
    return [
        [
            name,
            gpu,
            str(len(usages)),
            str(max(usage.registers for usage in usages)),
            f"{max(usage.stack for usage in usages)} / {max(usage.spills for usage in usages)}",
        ]
        for (name, gpu), usages in sorted(found.items())
    ]


OTHERS = ["kernel", "GPU", "variants", "registers, at most", "stack / spills"]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


ABOUT_COMPILED = """
Blocks and warps: what a multiprocessor holds. Matrix instructions, and instructions in all: of one warp, loop by loop, smallest
first; branches may leave out some of a large one. Operations and bytes: of one step of one tile. Of each kernel the variant with
the fewest flags; the tests compile all.
"""
ABOUT_PREDICTED = f"""
`interference` of every weight matrix of the paper's models, with N = {N}, T = {T} and a head of {V} rows, against the plain weight
gradients of a library under the same assumptions (float32 there without tf32). **No device but an H100 was measured.** Its
constants are taken for the A100 and the B200, whose rates are the vendor's.
"""


def report(kernels: list[Kernel], others: list[list[str]], predictions: list[Prediction], dropped: list[str]) -> str:
    """Markdown."""
    parts = [
        "# GPU kernels, compiled and predicted",
        f"`make gpu-report`, {datetime.now(timezone.utc):%Y-%m-%d}, commit {machine.describe()['commit']}. No GPU was used.",
        "## Compiled",
        ABOUT_COMPILED.strip(),
        *dropped,
        markdown(COMPILED, [x.row() for x in kernels]),
        "The other CUDA kernels:",
        markdown(OTHERS, others),
        "## Predicted",
        ABOUT_PREDICTED.strip(),
        markdown(PREDICTED, [x.row() for x in predictions]),
        (gpu_cost.__doc__ or "").strip(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    library = next(Path(zsl_kernels.__file__).parent.glob("_cuda*.so"), None)
    dropped = [] if library else ["The CUDA module is not built here: its kernels are missing from the table."]
    kernels = triton_kernels() + (list(cuda_kernels(library)) if library else [])
    predictions = [
        predict(gpu, dtype, model, gram)
        for gpu in GPUS.values()
        if gpu is not H100
        for dtype in ("bfloat16", "float32")
        for model in MODELS
        for gram in (False, True)
    ]
    text = report(kernels, other_kernels(library) if library else [], predictions, dropped)
    (RESULTS / "gpu_report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
