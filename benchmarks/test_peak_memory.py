"""Peak memory, each measurement in a fresh process."""

from __future__ import annotations

from statistics import median

import pytest

from benchmarks.memory import in_fresh_process
from benchmarks.tables import Cell
from benchmarks.training_steps import Workload

MB = 1e6
COVERED = 4 * sum(p.numel() for p in Workload.make().linear_weights.values())
TARGETS = {"probe": (2.2 * COVERED + 64e6) / MB}
PEERS = ("probe + Gram", "vmap", "loop")
STEP = (
    "peak memory of a training step",
    f"MB that a step takes more than the plain one, the median of fresh processes; the linear weights are {COVERED / MB:.1f} MB. "
    "The loop holds the activations of one example only, so that it takes less. Target: 2.2 copies of the covered weights + 64 MB.",
)
OP = (
    "peak memory of a call",
    "MB that a call takes beyond its inputs, results included, for T=64, O=K=768, fp32, with a direction.",
)


@pytest.fixture(scope="module")
def plain_peak(request) -> float:
    return _peak("plain", request.config)


def _peak(step: str, config: pytest.Config) -> float:
    return median(in_fresh_process("step", step) for _ in range(1 if config.option.quick else 3)) / MB


@pytest.mark.parametrize("column", ["probe", *(pytest.param(name, marks=pytest.mark.full) for name in PEERS)])
def test_step(table, plain_peak, request, column):
    extra = _peak(column, request.config) - plain_peak
    memory = table(*STEP)
    memory.add("forward + backward", "plain, in all", Cell(plain_peak, "MB"))
    memory.add("forward + backward", column, Cell(extra, "MB", TARGETS.get(column)))


@pytest.mark.parametrize("column", ["interference", "interference + Gram", "chunked", "materialized"])
@pytest.mark.parametrize("examples", [8, pytest.param(32, marks=pytest.mark.full), pytest.param(128, marks=pytest.mark.full)])
def test_op(table, examples, column):
    table(*OP).add(f"N={examples}", column, Cell(in_fresh_process("op", column, examples, 64, 768, 768) / MB, "MB"))
