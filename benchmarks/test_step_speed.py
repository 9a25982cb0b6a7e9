"""A training step under a probe against the plain step and against other ways to the same statistics."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from benchmarks.parametrize import kernels_of, over
from benchmarks.training_steps import CONFIG, STEPS, N, T, Workload, plain
from benchmarks.transformer_steps import ModelCase, TransformerWorkload

STEP = (
    "training step",
    f"GPT of width {CONFIG.width}, {CONFIG.layers} layers, vocabulary {CONFIG.vocab}, N={N}, T={T}, fp32: forward and backward "
    "with every statistic of every parameter, as a ratio to the plain step. vmap materializes the gradients, loop takes one "
    "example at a time; both leave out the embedding. AVX2: kernels without AVX-512.",
)
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


def test_step_avx2(compare, table, work):
    column = "probe, AVX2"
    with kernels_of(column):
        compare(table(*STEP), "forward + backward", column, lambda: STEPS["probe"](work), lambda: plain(work), against="plain")


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


@lru_cache(maxsize=1)
def workload(case: ModelCase) -> TransformerWorkload:
    return TransformerWorkload.of(case)


@pytest.mark.parametrize("column", ["probe", "probe + Gram", "probe, AVX2"])
@over(MODELS, MODELS[:1])
def test_model_step(compare, table, case, column):
    pytest.importorskip("transformers")
    work, step = workload(case), STEPS[column.removesuffix(", AVX2")]
    with kernels_of(column):
        compare(
            table(*MODEL_STEP),
            str(case),
            column,
            lambda: step(work),
            lambda: plain(work),
            against="plain",
            target=MODEL_TARGETS.get(column),
        )
