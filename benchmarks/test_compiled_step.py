"""A compiled training step under a probe against the plain compiled step."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from benchmarks.parametrize import over
from benchmarks.transformer_steps import ModelCase, TransformerWorkload
from zerosum import Probe
from zerosum.bench.workload import CONFIG, N, T, Workload

STEP = (
    "compiled training step",
    f"GPT of width {CONFIG.width}, {CONFIG.layers} layers, vocabulary {CONFIG.vocab}, N={N}, T={T}, and models of transformers of "
    "the same size, fp32, compiled by inductor: forward and backward with every statistic of every parameter, as a ratio to the "
    "plain compiled step. The last column is the probe with the model as it was written.",
)
TARGET = 1.3
PROBES = {"probe": False, "probe + Gram": True, "probe, not compiled": False}  # whether there is a Gram
CASES = [
    "GPT",
    ModelCase("GPT-2", width=CONFIG.width, layers=CONFIG.layers, vocab=CONFIG.vocab, N=N, T=T),
    ModelCase("Llama", width=CONFIG.width, layers=CONFIG.layers, vocab=CONFIG.vocab, N=N, T=T),
]


class Compiled:
    """A model, compiled, and ways to take its step."""

    def __init__(self, case: str | ModelCase) -> None:
        self.written = Workload.make() if isinstance(case, str) else TransformerWorkload.of(case)
        self.compiled = replace(self.written, model=torch.compile(self.written.model, fullgraph=True))
        self.probes = {column: Probe(self.written.model, gram=gram) for column, gram in PROBES.items()}
        for column in PROBES:
            for _ in range(4):  # two are proved, one is compiled and checked
                self.probed(column)

    def step(self, work: Workload) -> None:
        self.written.model.zero_grad()
        work.losses().sum().backward()

    def plain(self) -> None:
        self.step(self.compiled)

    def probed(self, column: str) -> None:
        probe = self.probes[column]
        with probe:
            self.step(self.written if column == "probe, not compiled" else self.compiled)
        report = probe.report()
        assert report.metrics
        assert not report.coverage.not_covered, report.coverage


@lru_cache(maxsize=1)
def compiled(case: str | ModelCase) -> Compiled:
    return Compiled(case)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("column", list(PROBES))
@over(CASES, CASES[:1])
def test_compiled_step(compare, table, case, column):
    if case != "GPT":
        pytest.importorskip("transformers")
    of = compiled(case)
    compare(
        table(*STEP),
        str(case),
        column,
        lambda: of.probed(column),
        of.plain,
        against="plain, compiled",
        target=None if column == "probe, not compiled" else TARGET,
    )
