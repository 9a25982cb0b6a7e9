"""Peak memory, each measurement in a fresh process."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest

from benchmarks.memory import in_fresh_process
from benchmarks.tables import Cell
from benchmarks.transformer_steps import ModelCase
from zerosum.bench.workload import Workload

MB = 1e6
EXAMPLES = (4, 8, 16, 32, 64)
COVERED = 4 * sum(p.numel() for p in Workload.make().linear_weights.values())
TARGETS = {"probe": (2.2 * COVERED + 64e6) / MB}
PEERS = ("probe + Gram", "vmap(grad)", "loop")
STEP = (
    "peak memory of a training step",
    f"MB that a step takes more than the plain one, each in a fresh process; the linear weights are {COVERED / MB:.1f} MB. "
    "The loop holds the activations of one example only, so that it takes less. Target: 2.2 copies of the linear weights + 64 MB.",
)
MODEL = ModelCase("GPT-2", width=256, layers=4, vocab=4096, N=EXAMPLES[0], T=64)
SLOPE = 0.05  # of the plain step's growth
OVER_N = (
    "peak memory of a GPT-2 step over N",
    f"MB of the plain step and what the probe takes more, each in a fresh process: {MODEL.family} of width {MODEL.width}, "
    f"{MODEL.layers} layers, vocabulary {MODEL.vocab}, T={MODEL.T}. Σ|g| and Σg² of all parameters are 34 MB, whatever N is. "
    f"Target: over N the extra grows by no more than {SLOPE:.0%} of the plain step's growth. Peaks are of what is held; in the "
    "columns on the right glibc keeps freed memory as it likes.",
)
OP = (
    "peak memory of a call",
    "MB that a call takes beyond its inputs, results included, for T=64, O=K=768, fp32, with a direction.",
)


@pytest.fixture(scope="module")
def plain_peak() -> float:
    return in_fresh_process("step", "plain step") / MB


@pytest.mark.parametrize("column", ["probe", *(pytest.param(name, marks=pytest.mark.full) for name in PEERS)])
def test_step(table, plain_peak, column):
    extra = in_fresh_process("step", column) / MB - plain_peak
    memory = table(*STEP)
    memory.add("forward + backward", "plain, in all", Cell(plain_peak, "MB"))
    memory.add("forward + backward", column, Cell(extra, "MB", TARGETS.get(column)))


@pytest.mark.parametrize("returning", [True, pytest.param(False, marks=pytest.mark.full)], ids=["held", "kept"])
def test_step_over_examples(table, request, returning):
    pytest.importorskip("transformers")
    ends = (EXAMPLES[0], EXAMPLES[-1])
    memory, note = table(*OVER_N), "" if returning else ", freed kept"
    peaks = {}
    for N in EXAMPLES if returning and not request.config.option.quick else ends:
        case = astuple(replace(MODEL, N=N))
        plain, probed = (in_fresh_process("step", step, *case, returning=returning) / MB for step in ("plain step", "probe"))
        peaks[N] = (plain, probed - plain)
        memory.add(f"N={N}", f"plain, in all{note}", Cell(plain, "MB"))
        memory.add(f"N={N}", f"probe{note}", Cell(probed - plain, "MB"))
    growth, extra = (last - first for first, last in zip(*(peaks[N] for N in ends), strict=True))
    memory.add(f"growth, {ends[0]} to {ends[1]}", f"plain, in all{note}", Cell(growth, "MB"))
    memory.add(f"growth, {ends[0]} to {ends[1]}", f"probe{note}", Cell(extra, "MB", SLOPE * growth))


@pytest.mark.parametrize("column", ["interference", "interference + Gram", "chunked", "materialized"])
@pytest.mark.parametrize("examples", [8, pytest.param(32, marks=pytest.mark.full), pytest.param(128, marks=pytest.mark.full)])
def test_op(table, examples, column):
    table(*OP).add(f"N={examples}", column, Cell(in_fresh_process("op", column, examples, 64, 768, 768) / MB, "MB"))
