"""A training step under a probe against the plain step. ``zerosum bench`` compares it with other ways to the same statistics."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from benchmarks.parametrize import kernels_of, over
from benchmarks.transformer_steps import ModelCase, TransformerWorkload
from zerosum.bench.ways import PLAIN, PROBE, PROBE_GRAM
from zerosum.bench.workload import CONFIG, N, T, Workload

STEP = (
    "training step",
    f"GPT of width {CONFIG.width}, {CONFIG.layers} layers, vocabulary {CONFIG.vocab}, N={N}, T={T}, fp32: forward and backward "
    "with every statistic of every parameter, as a ratio to the plain step. AVX2: kernels without AVX-512.",
)
WAYS = {way.name: way for way in (PROBE, PROBE_GRAM)}
TARGETS = {"probe": 1.15}
MODELS = [
    ModelCase("GPT-2", width=256, layers=4, vocab=4096, N=8, T=256),
    ModelCase("GPT-2", width=256, layers=4, vocab=4096, N=32, T=64),
    ModelCase("GPT-2", width=768, layers=2, vocab=50257, N=4, T=128),
    ModelCase("Llama", width=256, layers=4, vocab=4096, N=8, T=256),
]
MODEL_STEP = (
    "training step of transformers models",
    "Models of transformers (width d, L layers, vocabulary V), fp32: forward and backward with every statistic of every parameter, "
    "as a ratio to the plain step. GPT-2's head is tied to its embedding, Llama's is not. AVX2: kernels without AVX-512.",
)
MODEL_TARGETS = {"probe": 1.25, "probe + Gram": 1.25}


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload.make()


@pytest.mark.parametrize("column", WAYS)
def test_step(compare, table, work, column):
    compare(
        table(*STEP),
        "forward + backward",
        column,
        WAYS[column].settled(work),
        PLAIN.start(work),
        against="plain",
        target=TARGETS.get(column),
    )


def test_step_avx2(compare, table, work):
    column = "probe, AVX2"
    with kernels_of(column):
        compare(table(*STEP), "forward + backward", column, PROBE.settled(work), PLAIN.start(work), against="plain")


def test_step_with_optimizer(compare, table, work):
    optimizer = torch.optim.AdamW(work.model.parameters(), lr=1e-5)

    def then_update(step):
        step()
        optimizer.step()

    probed, plain = PROBE.settled(work), PLAIN.start(work)

    compare(
        table(*STEP),
        "the same + AdamW",
        "probe",
        lambda: then_update(probed),
        lambda: then_update(plain),
        against="plain",
        target=TARGETS["probe"],
    )


@lru_cache(maxsize=1)
def workload(case: ModelCase) -> TransformerWorkload:
    return TransformerWorkload.of(case)


@pytest.mark.parametrize("column", ["probe", "probe + Gram", "probe, AVX2"])
@over(MODELS, MODELS[:1])
def test_model_step(compare, table, case, column):
    pytest.importorskip("transformers")
    work, way = workload(case), WAYS[column.removesuffix(", AVX2")]
    with kernels_of(column):
        compare(
            table(*MODEL_STEP),
            str(case),
            column,
            way.settled(work),
            PLAIN.start(work),
            against="plain",
            target=MODEL_TARGETS.get(column),
        )
