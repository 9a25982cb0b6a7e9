"""A training step under a probe against the plain step and against other ways to the same statistics."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training_steps import CONFIG, STEPS, N, T, Workload, plain
from tests.inputs import cpu_isas, running

STEP = (
    "training step",
    f"GPT of width {CONFIG.width}, {CONFIG.layers} layers, vocabulary {CONFIG.vocab}, N={N}, T={T}, fp32: forward and backward "
    "with every statistic of every linear weight, as a ratio to the plain step. vmap materializes the gradients; loop takes one "
    "example at a time. AVX2: kernels without AVX-512.",
)
TARGETS = {"probe": 1.15}


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload.make()


@pytest.mark.parametrize("column", [name for name in STEPS if name != "plain"])
def test_step(compare, table, work, column):
    step = STEPS[column]
    compare(
        table(*STEP),
        "forward + backward",
        column,
        lambda: step(work),
        lambda: plain(work),
        against="plain",
        target=TARGETS.get(column),
    )


@pytest.mark.skipif("avx2" not in cpu_isas(), reason="this machine has no AVX2 kernels")
def test_step_avx2(compare, table, work):
    with running("cpu-avx2"):
        compare(
            table(*STEP), "forward + backward", "probe, AVX2", lambda: STEPS["probe"](work), lambda: plain(work), against="plain"
        )


def test_step_with_optimizer(compare, table, work):
    optimizer = torch.optim.AdamW(work.model.parameters(), lr=1e-5)

    def then_update(step):
        step(work)
        optimizer.step()

    compare(
        table(*STEP),
        "the same + AdamW",
        "probe",
        lambda: then_update(STEPS["probe"]),
        lambda: then_update(plain),
        against="plain",
        target=TARGETS["probe"],
    )
