"""What the GPU kernels are compiled to, and how fast they are predicted to be: ``make gpu-report``. Needs no GPU.

Writes benchmarks/results/gpu_report.md and .json. Nothing in it was measured on a device: registers, shared memory and instructions
are those of the compiled kernels, times are the cost model's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path

import zsl_kernels
from benchmarks import machine
from benchmarks.gpu import sass
from benchmarks.gpu.variants import variants
from zsl_kernels import gpu_costs
from zsl_kernels.candidates import Call
from zsl_kernels.configs import CUDA_SUMS_HELD, CUDA_TILES, Config
from zsl_kernels.gpus import GPUS, Gpu
from zsl_kernels.plan import choose

RESULTS = Path(__file__).parents[1] / "results"
# Width and layers of the paper's six models (heads do not matter to the weights), all with T = 1024 and V = 50304.
MODELS = {"14M": (256, 4), "37M": (512, 8), "78M": (768, 12), "144M": (1024, 16), "285M": (1536, 16), "472M": (2048, 16)}
T, V = 1024, 50304
EXAMPLES = (8, 32)
IMPLS = ("triton", "cuda", "chunked")
ENOUGH = 0.6  # of the plain product's speed; below it, the table names the limit in bold


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
    N: int
    gram: bool
    milliseconds: float
    plain_milliseconds: float  # of the plain weight gradients
    peak_share: float  # of the matrix unit's rate that the plain products' operations reach
    plain_peak_share: float
    chosen: dict[str, float]  # share of the time by implementation, way and tile
    limits: dict[str, float]  # share of the time by what limits it

    @property
    def ratio(self) -> float:
        """Speed, with that of the plain products as 1."""
        return self.plain_milliseconds / self.milliseconds

    def row(self) -> list[str]:
        limits = ", ".join(f"{name} {share:.0%}" for name, share in sorted(self.limits.items(), key=lambda x: -x[1])[:2])
        chosen = max(self.chosen, key=lambda name: self.chosen[name])
        short = self.ratio < ENOUGH
        return [
            self.model,
            str(self.N),
            "yes" if self.gram else "",
            f"{self.milliseconds:.2f}",
            f"{self.plain_milliseconds:.2f}",
            f"{self.peak_share:.0%}",
            f"{self.plain_peak_share:.0%}",
            f"**{self.ratio:.2f}**" if short else f"{self.ratio:.2f}",
            f"**{limits}**" if short else limits,
            chosen,
        ]


PREDICTED = ["model", "N", "Gram", "ms", "plain ms", "of peak", "plain, of peak", "speed / plain", "limits", "mostly by"]


def predict(gpu: Gpu, dtype: str, model: str, N: int, gram: bool, impls: tuple[str, ...] = IMPLS) -> Prediction:
    seconds = plain = work = 0.0
    chosen, limits = Counter[str](), Counter[str]()
    for count, O, K in weights(*MODELS[model]):
        best = choose(Call("interference", N, T, K, O, gram=gram, dtype=dtype, gpu=gpu), impls).chosen
        seconds += count * best.time
        plain += count * gpu_costs.total([gpu_costs.plain_product(gpu, N, T, K, O, dtype)])[0]
        work += count * 2.0 * N * T * O * K
        chosen[f"{best.impl} {best.way} {best.tile[0]}×{best.tile[1]}"] += count * best.time
        limits[best.limit] += count * best.time
    peak = gpu.float32_flops if dtype == "float32" else gpu.half_flops
    shares = ({name: value / seconds for name, value in found.items()} for found in (chosen, limits))
    return Prediction(
        gpu.name, dtype, model, N, gram, 1e3 * seconds, 1e3 * plain, work / seconds / peak, work / plain / peak, *shares
    )


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
        gpu_costs.resident(gpu, config.warps, usage.registers, shared),
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


def cuda_kernels(library: Path) -> Iterator[Kernel]:
    """Of the module that setup.py built; its kernels' names have their tile and the operands' type."""
    tiles = {(tile.rows, tile.cols, tile.slots): tile for tile in CUDA_TILES}
    for name, cubin in sass.cubins(library).items():
        gpu = GPUS[int(name.split("sm_")[1].removesuffix(".cubin").removesuffix("a"))]
        for usage in sass.inspect(cubin):
            sizes = tuple(int(number) for number in re.findall(r"Li(\d+)E", usage.kernel)[:3])
            if sizes not in tiles or "Float16" in usage.kernel.replace("Bfloat16", ""):
                continue  # float16 is compiled as bfloat16 is
            tile, kind = tiles[sizes], "half" if "Bfloat16" in usage.kernel else "float32"
            config = Config(tile.rows, tile.cols, gpu_costs.CUDA_DEPTH // (2 if kind == "float32" else 1), gpu_costs.CUDA_WARPS, 0)
            stem = "embedding" if "embedding" in usage.kernel else "gram"
            held = [(f"cuda {stem}, N ≤ {tile.slots}", tile.slots, False)]
            if tile is CUDA_TILES[0] and stem == "gram":
                held.append(("cuda sums", CUDA_SUMS_HELD, True))
            for title, examples, runs in held:
                yield kernel(title, gpu, kind, config, usage, usage.shared + tile.shared_bytes(examples, runs))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


RATES = ["GPU", "multiprocessors", "half", "tf32", "float32", "instructions", "L2", "memory", "warp-wide share", "cluster"]


def rates(gpu: Gpu) -> list[str]:
    """In 10¹² for each second."""
    found = (gpu.half_flops, gpu.tf32_flops, gpu.float32_flops, gpu.instructions, gpu.l2_bandwidth, gpu.bandwidth)
    return [gpu.name, str(gpu.sms), *(f"{rate / 1e12:g}" for rate in found), f"{gpu.warp_share:g}", str(gpu.cluster)]


CONSTANTS = f"""
Of the peak rates {gpu_costs.ACHIEVED:.0%} are taken to be achieved; a launch takes the host {1e6 * gpu_costs.LAUNCH:g} µs and the
device pauses {1e6 * gpu_costs.GAP:g} µs between two; a tile's first operands arrive after {1e6 * gpu_costs.FILL:g} µs. Instructions
of a thread, counted in the compiled kernels: {gpu_costs.FOLD["interference"]:g} for an element that is folded; for an operand of a
step on the A100, the H100 and the B200 {", ".join(map(str, gpu_costs.STEP["half"].values()))} in half precision and
{", ".join(map(str, gpu_costs.STEP["float32"].values()))} in float32, which is split; of the CUDA kernels
{gpu_costs.CUDA_STEP["half"]:g} and {gpu_costs.CUDA_STEP["float32"]:g}.

Rates, in 10¹² operations, instructions or bytes for each second, are the vendor's for dense operations. Assumptions are the
bandwidth of the second-level cache; the share of the matrix unit's rate that instructions of a single warp reach, which the CUDA
kernels use; and the cluster, blocks of a library's product that share what they load, as the kernels here do not.
"""
ABOUT_COMPILED = """
Blocks and warps: what a multiprocessor holds. Matrix instructions, and instructions in all: of one warp, loop by loop, smallest
first; branches may leave out some of a large one. Operations and bytes: of one step of one tile. Of each kernel the variant with
the fewest flags; the tests compile all.
"""
ABOUT_PREDICTED = f"""
`interference` of every weight matrix of the paper's models with {T} positions and a head of {V}, of N sequences, against the plain
weight gradients of a library under the same assumptions (float32 there without tf32). "Of peak" is the share of the roofline, which
at these sizes is the rate of the matrix unit; in float32 that of the CUDA cores, which splitting on the matrix unit can exceed.
Bold: less than {ENOUGH:.0%} of the plain products' speed, and what takes the time.
"""


def report(kernels: list[Kernel], predictions: list[Prediction], dropped: list[str]) -> str:
    """Markdown."""
    parts = [
        "# GPU kernels, compiled and predicted",
        f"**Nothing here was measured on a GPU.** {datetime.now(timezone.utc):%Y-%m-%d}, commit {machine.describe()['commit']}.",
        "## Assumptions",
        (gpu_costs.__doc__ or "").strip(),
        CONSTANTS.strip(),
        markdown(RATES, [rates(gpu) for gpu in GPUS.values()]),
        "## Compiled",
        ABOUT_COMPILED.strip(),
        *dropped,
        markdown(COMPILED, [x.row() for x in kernels]),
        "## Predicted",
        ABOUT_PREDICTED.strip(),
    ]
    for name, dtype in dict.fromkeys((x.gpu, x.dtype) for x in predictions):
        rows = [x.row() for x in predictions if (x.gpu, x.dtype) == (name, dtype)]
        parts += [f"### {name}, {dtype}, predicted", markdown(PREDICTED, rows)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    library = next(Path(zsl_kernels.__file__).parent.glob("_cuda*.so"), None)
    dropped = [] if library else ["The CUDA module is not built here: its kernels are missing from the table."]
    kernels = triton_kernels() + (list(cuda_kernels(library)) if library else [])
    cases = [
        (gpu, dtype, model, N, gram)
        for gpu in GPUS.values()
        for dtype in ("bfloat16", "float32")
        for model in MODELS
        for N in EXAMPLES
        for gram in (False, True)
    ]
    predictions = [predict(*case) for case in cases]
    text = report(kernels, predictions, dropped)
    (RESULTS / "gpu_report.md").write_text(text)
    tables = {"compiled": kernels, "predicted": predictions, "gpus": list(GPUS.values())}
    plain = {name: [asdict(row) for row in rows] for name, rows in tables.items()}
    (RESULTS / "gpu_report.json").write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    print(text)


if __name__ == "__main__":
    main()
