"""Times probed training steps on a device, and writes benchmarks/results/gpu_steps.md.

``python -m benchmarks.gpu.steps``: some minutes. Each way to take a step (eagerly, replayed from a CUDA graph, compiled) is timed
in turns with the plain step taken the same way. ``--device cpu --quick`` shows whether it runs.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import zerosum
from benchmarks.gpu.report import markdown
from benchmarks.transformer_steps import ModelCase, TransformerWorkload
from zerosum.bench import machine
from zerosum.bench.memory import on_cuda
from zerosum.bench.timing import compare
from zerosum.bench.workload import Workload
from zerosum.training.model import GPTConfig

RESULT = Path(__file__).parents[1] / "results" / "gpu_steps.md"
SETTLING = 5  # passes: rows are proved, kernels and graphs compiled
SECONDS = 3.0  # of each comparison
MODES = ("eager", "captured", "compiled")
STATISTICS = {"plain": None, "probe": False, "probe, with the Gram": True}  # whether there is a Gram

HEAD = ["", "ms", "ratio", "quartiles", "asked, on an H100", "peak beyond what is held, GB"]

Step = Callable[[], object]


class Case(NamedTuple):
    family: str
    autocast: bool
    config: GPTConfig
    N: int
    # Ratios asked of each mode, without and with the Gram, on an H100.
    targets: dict[str, tuple[float | None, float | None]]

    def __str__(self) -> str:
        return f"{self.family}, {'bfloat16 by autocast' if self.autocast else 'float32'}"

    def make(self, device: str) -> Workload:
        if self.family == "GPT":
            return Workload.make(self.config, self.N, device, self.autocast)
        c = self.config
        return TransformerWorkload.of(
            ModelCase(self.family, c.width, c.layers, c.vocab, self.N, c.positions), device, self.autocast
        )


GPT2_SMALL = GPTConfig(vocab=50304, width=768, layers=12, heads=12, positions=1024)
TINY = GPTConfig(vocab=64, width=64, layers=1, heads=2, positions=8)


def cases(config: GPTConfig, examples: int) -> list[Case]:
    return [
        Case("GPT", True, config, examples, {"eager": (1.6, 1.8), "captured": (1.12, 1.3)}),
        Case("GPT", False, config, examples, {"eager": (1.2, None), "captured": (1.2, None)}),
        Case("GPT-2", True, config, examples, {"eager": (1.4, None)}),
    ]


def eager(work: Workload, gram: bool | None) -> Step:
    probe = None if gram is None else zerosum.Probe(work.model, gram=gram)

    def run() -> zerosum.Report | None:
        work.model.zero_grad()
        with nullcontext() if probe is None else probe:
            work.losses().sum().backward()
        return None if probe is None else probe.report()  # which is read where it is wanted: reading waits for the device

    return run


def captured(work: Workload, gram: bool | None) -> Step:
    def step() -> None:
        work.losses().sum().backward()

    if gram is not None:
        return zerosum.capture(step, zerosum.Probe(work.model, gram=gram)).replay
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(SETTLING):
            work.model.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(side)
    work.model.zero_grad()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def compiled(work: Workload, gram: bool | None) -> Step:
    return eager(replace(work, model=torch.compile(work.model)), gram)


START = {"eager": eager, "captured": captured, "compiled": compiled}


def rows(case: Case, mode: str, device: str) -> Iterator[list[str]]:
    """A line for the plain step, with a probe, and with the Gram: milliseconds, ratio, target, peak memory."""
    work = case.make(device)
    steps: dict[str, Step] = {}
    for name, gram in STATISTICS.items():
        steps[name] = START[mode](work, gram)
        for _ in range(SETTLING):
            report = steps[name]()
        assert not isinstance(report, zerosum.Report) or not report.coverage.not_covered, report.coverage
    for i, (name, run) in enumerate(steps.items()):
        times = compare(run, steps["plain"], SECONDS if device.startswith("cuda") else 0.01)
        assert times is not None
        target = case.targets.get(mode, (None, None))[i - 1] if i else None
        peak = f"{on_cuda(run) / 1e9:.1f}" if device.startswith("cuda") and mode != "captured" else ""
        ratio = f"{times.ratio.low:.2f} to {times.ratio.high:.2f}"
        yield [
            f"{case}, {mode}, {name}",
            f"{times.ms.median:.1f}",
            f"{times.ratio.median:.2f}" if i else "1",
            ratio if i else "",
            f"{target}" if target else "",
            peak,
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--quick", action="store_true", help="one small case of each; writes nothing")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    about = machine.line(machine.describe(options.device))
    config, examples = (TINY, 2) if options.quick else (GPT2_SMALL, 8)
    lines, failed = [], False
    for mode in options.modes:
        if mode == "captured" and not cuda:
            continue
        for case in cases(config, examples):
            try:
                for line in rows(case, mode, options.device):
                    print("  ".join(line), file=sys.stderr, flush=True)
                    lines.append(line)
            except (AssertionError, RuntimeError) as error:  # the others are measured anyway
                failed = True
                lines.append([f"{case}, {mode}: {str(error).splitlines()[0]}", *[""] * (len(HEAD) - 1)])
                print(lines[-1][0], file=sys.stderr, flush=True)
            torch._dynamo.reset()
            gc.collect()
    text = (
        f"# Training steps on a device\n\n`python -m benchmarks.gpu.steps`. Measured on {about}.\n\nForward and backward pass "
        "without an optimizer, with every statistic of every parameter. Ratios are medians of interleaved runs to the plain step "
        f"taken the same way. {config}, N = {examples}; GPT-2 is that of transformers.\n\n{markdown(HEAD, lines)}\n"
    )
    print(text)
    if not options.quick:
        RESULT.write_text(text)
    sys.exit(failed)


if __name__ == "__main__":
    main()
