"""Rows that name their example, and weights that are an embedding's table too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import zsl_kernels as zk
from benchmarks.cases import Case, inputs
from benchmarks.parametrize import kernels_of, over
from tests.inputs import Irregular

RAGGED_CASES = [Case(8, 256, 1024, 256), Case(32, 64, 768, 768), Case(32, 256, 768, 768)]
TIED_CASES = [Case(8, 256, 4096, 256), Case(32, 64, 4096, 256), Case(8, 64, 50257, 256)]
QUICK = [RAGGED_CASES[0], TIED_CASES[0]]

RAGGED = (
    "ragged rows, fp32",
    "Time of interference as a ratio to the dW product of the same rows. Lengths vary from T/2 to 3T/2, about N·T rows in all, "
    "sorted by example or shuffled.",
)
TIED = (
    "tied weights, fp32",
    "Time of interference with embedding=, of N·T lookups, as a ratio to the same call without.",
)


@dataclass(frozen=True)
class Rows:
    a: Tensor  # (R, K)
    b: Tensor  # (R, O)
    example_ids: Tensor  # (R,)


@lru_cache(maxsize=4)
def ragged(case: Case, ordered: bool) -> Rows:
    lengths = tuple(case.T // 2 + i * case.T // max(case.N - 1, 1) for i in range(case.N))
    x = Irregular(lengths, K=case.K, O=case.O).make()
    ids = x["example_ids"]
    return Rows(x["a"], x["b"], ids.sort().values if ordered else ids)


@over(RAGGED_CASES, QUICK)
@pytest.mark.parametrize("column", ["sorted", "shuffled", "shuffled + Gram", "sorted, AVX2", "shuffled, AVX2"])
def test_ragged(compare, table, case, column):
    x = ragged(case, "sorted" in column)
    with kernels_of(column):
        compare(
            table(*RAGGED),
            str(case),
            column,
            lambda: zk.interference(x.a, x.b, gram="Gram" in column, example_ids=x.example_ids, num_examples=case.N),
            lambda: x.b.T @ x.a,
        )


@lru_cache(maxsize=2)
def lookups(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(case.O, (case.N, case.T), generator=generator)
    return ids, torch.randn(case.N, case.T, case.K, generator=generator)


@over(TIED_CASES, QUICK)
@pytest.mark.parametrize("column", ["tied", "tied + Gram"])
def test_tied(compare, table, case, column):
    x, embedding, gram = inputs(case), lookups(case), "Gram" in column
    compare(
        table(*TIED),
        str(case),
        column,
        lambda: zk.interference(x.a, x.b, gram=gram, embedding=embedding),
        lambda: zk.interference(x.a, x.b, gram=gram),
        against=column.replace("tied", "untied"),
    )
