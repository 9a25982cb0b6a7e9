"""What token_report holds: copies of the parameters, what ``memory`` bounds, and nothing after it is over."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerosum
from benchmarks.token_memory import DRAWS, peak_of, small_model, token_peak
from tests.zerosum.test_tokens import cross_entropies, least_memory
from zerosum.tokens import measure, memory, passes
from zerosum.training.model import GPT, GPTConfig

MB = 2**20
# Tokens' scalars, which a report keeps, and the kernels' workspaces. A sampled one's metrics are computed in float64, by slices.
SCALARS, METRICS = 1 * MB, 8 * 8 * memory.SLICE


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("sample", [None, DRAWS])
def test_the_peak_in_copies_of_the_parameters(sample: int | None, directed: bool, tied: bool) -> None:
    """At most 12, and no more than there is a use for: model, direction, the sums of 3, the check's or the second half's, one
    weight's. (Of a small model one weight is a third of a copy.)"""
    peak = token_peak(small_model(256, 4), directed=directed, sample=sample, tied=tied)
    assert peak <= 12
    assert peak <= 7.5 + directed


@dataclass(frozen=True)
class Shape:
    """A model and data where one thing outweighs the rest."""

    config: GPTConfig
    N: int
    T: int
    tied: bool = False

    def make(self) -> tuple[GPT, Tensor, Tensor]:
        torch.manual_seed(0)
        model = GPT(self.config)
        if self.tied:
            model.head.weight = model.embedding.weight
        x, y = torch.randint(self.config.vocab, (2, self.N, self.T))
        return model, x, y


SHAPES = {
    "attention": Shape(GPTConfig(64, 32, 2, 8, 128), 1, 128),
    "logits": Shape(GPTConfig(8192, 32, 2, 2, 48), 6, 48),
    "tied logits": Shape(GPTConfig(4096, 32, 2, 2, 48), 3, 48, tied=True),
    "many sequences": Shape(GPTConfig(64, 32, 4, 2, 12), 6, 12),
}


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("sample", [None, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_memory_bounds_what_is_held_beside_the_sums(name: str, sample: int | None, factor: int) -> None:
    model, x, y = SHAPES[name].make()
    budget = factor * least_memory(model, x, y, cross_entropies, sample=sample)[0]
    results = (4 if sample is None else 5) * sum(4 * p.numel() for p in model.parameters())
    peak = peak_of(lambda: zerosum.token_report(model, x, y, sample=sample, memory=budget))
    assert peak <= results + budget + SCALARS + (0 if sample is None else METRICS)


def test_memory_is_used() -> None:
    """With more of it, more runs together: without a bound the test above would fail."""
    model, x, y = SHAPES["logits"].make()
    least = least_memory(model, x, y, cross_entropies)[0]
    small, large = (peak_of(partial(zerosum.token_report, model, x, y, memory=m)) for m in (least, 100 * least))
    assert large > small + least + SCALARS


# Nothing is left.


class Attending(nn.Module):
    """A transformer of torch's own attention, with norms that have weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 16)
        self.norm = nn.RMSNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 17)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(torch.tanh(h))


def our_gpt() -> GPT:
    return GPT(GPTConfig(17, 16, 2, 2, 8))


def large_tensors_over_calls(model: nn.Module, **options: Any) -> list[int]:
    """Tensors and nodes of graphs that are alive after 4, 8 and 12 calls: scalars and single rows of them left out."""
    x, y = torch.randint(17, (2, 2, 8))
    alive = []
    for call in range(1, 13):
        zerosum.token_report(model, x, y, losses=cross_entropies, **options)
        if call % 4 == 0:
            gc.collect()
            found = [o for o in gc.get_objects() if issubclass(type(o), Tensor | torch.autograd.graph.Node)]
            alive.append(len([o for o in found if not isinstance(o, Tensor) or o.ndim > 1]))
    return alive


@pytest.mark.parametrize("sample", [None, 8])
@pytest.mark.parametrize("kind", [our_gpt, Attending])
def test_nothing_is_left_of_many_calls(kind: Callable[[], nn.Module], sample: int | None) -> None:
    alive = large_tensors_over_calls(kind(), sample=sample)
    assert len(set(alive)) == 1, alive


def test_a_graph_that_kept_itself_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the results do that nodes keep, handed on as they are."""
    pack = memory.SavedTensors._pack

    def packed(self: memory.SavedTensors, x: Tensor) -> Tensor:
        pack(self, x)
        return x

    monkeypatch.setattr(memory.SavedTensors, "_pack", packed)
    alive = large_tensors_over_calls(our_gpt())
    assert alive[0] < alive[1] < alive[2]


def test_a_capture_that_kept_its_graph_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    close = passes.ChunkPass.close
    monkeypatch.setattr(passes.ChunkPass, "close", lambda self: (kept.append([t.total for t in self.tracked]), close(self)))
    monkeypatch.setattr(measure._Measurement, "_result", lambda self, t: t)
    alive = large_tensors_over_calls(our_gpt())
    assert alive[0] < alive[1] < alive[2]
