"""The host's time of a probed step, where there is next to nothing to compute: per weight, and over many passes of one probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from statistics import median
from time import perf_counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import zerosum
from benchmarks.tables import Cell
from zerosum.training.model import GPT, GPTConfig, token_losses

WIDTH, T, N, VOCAB = 32, 16, 4, 64
PASSES = 1000  # of one probe, and a tenth of them to compare their ends
MICRO_BATCHES = 200

TITLE = "host time of a probed step, fp32, one thread"
NOTE = (
    f"Forward and backward at width {WIDTH}, T={T}, N={N}, with every statistic of every parameter and the report, as a ratio to "
    "the plain step, in the steady state: rows were attributed before. Milliseconds per weight are of what the probe adds."
)
STEADY = (
    "host time over a long run",
    f"The project's GPT of 12 layers as above: a pass after {PASSES} of one probe over one of a fresh probe, and a micro-batch "
    f"after {MICRO_BATCHES} of one block over the second one.",
)
TARGET, TARGET_PER_WEIGHT, TARGET_STEADY = 2.0, 0.2, 1.1


class Case(NamedTuple):
    family: str
    layers: int

    def __str__(self) -> str:
        return f"{self.family}, {self.layers} layers"


CASES = [Case(family, layers) for family in ("GPT", "GPT-2") for layers in (12, 48)]


class Work:
    """A model, a batch, and a probe for all of its steps."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randint(VOCAB, (2, N, T))
        if case.family == "GPT":
            self.model: nn.Module = GPT(GPTConfig(vocab=VOCAB, width=WIDTH, layers=case.layers, heads=4, positions=T))
        else:
            self.model = gpt2(case.layers)
        self.probe = zerosum.Probe(self.model)
        self.weights = len(list(self.model.parameters()))

    def settle(self) -> None:
        """The passes in which so few examples are proved, and one more."""
        for _ in range(4):
            self.probed()

    def losses(self) -> Tensor:
        return token_losses(self.model, self.x, self.y).mean(1)

    def plain(self) -> None:
        self.model.zero_grad()
        self.losses().sum().backward()

    def probed(self) -> None:
        self.model.zero_grad()
        with self.probe:
            self.losses().sum().backward()
        report = self.probe.report()
        assert len(report) == self.weights, report.coverage


class Logits(nn.Module):
    """A transformers model as a function from ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


def gpt2(layers: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=T,
        n_embd=WIDTH,
        n_layer=layers,
        n_head=4,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return Logits(transformers.GPT2LMHeadModel(config))


@lru_cache(maxsize=1)
def work_of(case: Case) -> Work:
    return Work(case)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_host_time(compare: Callable[..., None], table: Callable[..., object], case: Case) -> None:
    work = work_of(case)
    work.settle()
    found = table(TITLE, NOTE)
    compare(found, str(case), "probe", work.probed, work.plain, against="plain", target=TARGET)
    if (row := found.rows.get(str(case))) is not None:
        more = row["probe"].details["ms"].median - row["probe"].details["baseline_ms"].median
        found.add(str(case), "weights", Cell(work.weights, ""))
        found.add(str(case), "ms per weight", Cell(more / work.weights, "ms, finely", TARGET_PER_WEIGHT))


def test_a_long_run(compare: Callable[..., None], table: Callable[..., object], request: pytest.FixtureRequest) -> None:
    """The first passes' times are those of a fresh probe whose structure is known."""
    work, passes = Work(CASES[0]), PASSES // 10 if request.config.option.quick else PASSES
    fresh = Work(CASES[0])
    fresh.settle()
    for _ in range(passes):
        work.probed()
    compare(table(*STEADY), f"pass {passes} of a probe", "last", work.probed, fresh.probed, against="second", target=TARGET_STEADY)


@pytest.mark.parametrize("gram", [False, True], ids=["", "Gram"])
def test_many_micro_batches(table: Callable[..., object], request: pytest.FixtureRequest, gram: bool) -> None:
    """One more micro-batch of a block that has had many, against one of a block that has had one."""
    count = MICRO_BATCHES // 10 if request.config.option.quick else MICRO_BATCHES
    last, second = (after(blocks, gram) for blocks in (count, 1))
    table(*STEADY).add(f"micro-batch {count} of a block{', Gram' if gram else ''}", "last", Cell(last / second, "×", TARGET_STEADY))


def after(blocks: int, gram: bool, rounds: int = 25) -> float:
    """A micro-batch of a block that has had some, as a ratio to a plain one.

    (Two probes are not open at once: each is held to the plain step beside it, which the block's mode does not see.)
    """
    work, plain = Work(CASES[0]), Work(CASES[0])
    ratios = []
    with zerosum.Probe(work.model, gram=gram):
        for _ in range(blocks):
            work.losses().sum().backward()
        for _ in range(rounds):
            with torch._C.DisableTorchFunction():
                baseline = timed(plain.plain)
            ratios.append(timed(lambda: work.losses().sum().backward()) / baseline)
    return median(ratios)


def timed(function: Callable[[], None]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start
