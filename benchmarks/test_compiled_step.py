"""A compiled training step under a probe against the plain compiled step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import nn

from benchmarks.training_steps import CONFIG, N, T, Workload
from zerosum import Probe
from zerosum.training.model import token_losses

STEP = (
    "compiled training step",
    f"GPT of width {CONFIG.width}, {CONFIG.layers} layers, vocabulary {CONFIG.vocab}, N={N}, T={T}, fp32, compiled by inductor: "
    "forward and backward with every statistic of every parameter, as a ratio to the plain compiled step. The last column is the "
    "probe with the model as it was written.",
)
TARGETS = {"probe": 1.3, "probe + Gram": 1.3}
PROOFS = 3  # steps that run before one is compiled, and that one


class Compiled:
    """A model, compiled, and ways to take its step."""

    def __init__(self) -> None:
        self.work = Workload.make()
        self.compiled = torch.compile(self.work.model, fullgraph=True)
        gram = {"probe": False, "probe + Gram": True, "probe, not compiled": False}
        self.probes = {column: Probe(self.work.model, gram=g) for column, g in gram.items()}
        for column in self.probes:
            for _ in range(PROOFS):
                self.probed(column)

    def step(self, model: Callable[..., object]) -> None:
        self.work.model.zero_grad()
        assert isinstance(model, nn.Module)
        token_losses(model, self.work.x, self.work.y).mean(1).sum().backward()

    def plain(self) -> None:
        self.step(self.compiled)

    def probed(self, column: str) -> None:
        probe = self.probes[column]
        with probe:
            self.step(self.work.model if column == "probe, not compiled" else self.compiled)
        report = probe.report()
        assert report.metrics
        assert not report.coverage.not_covered, report.coverage


@lru_cache(maxsize=1)
def compiled() -> Compiled:
    return Compiled()


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("column", ["probe", "probe + Gram", "probe, not compiled"])
def test_compiled_step(compare, table, column):
    of = compiled()
    compare(
        table(*STEP),
        "forward + backward",
        column,
        lambda: of.probed(column),
        of.plain,
        against="plain, compiled",
        target=TARGETS.get(column),
    )
