"""Backward passes that do not repeat to the last bit, as on a device whose kernels add by atomics: naming rows allows for what two
runs of a pass differ by, and still refuses what is coupled."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum
from tests.zerosum.models import TwoLayers
from tests.zerosum.oracle import per_example_gradients, trainable
from zerosum.probe import attribution

N, T = 8, 32


class Noise(torch.autograd.Function):
    """The identity, whose gradient is off by another random part of itself in each pass."""

    @staticmethod
    def forward(ctx, x: Tensor, level: float) -> Tensor:
        ctx.level = level
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g + ctx.level * g.abs().mean(-1, keepdim=True) * torch.randn_like(g), None


class Noisy(TwoLayers):
    level = 1e-4
    leak = 0.0  # how much of the batch's mean each example gets

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(12))  # by rows of single numbers

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.first(self.embedding(tokens)) * self.scale
        h = h + self.leak * h.mean(0, keepdim=True)
        return self.head(Noise.apply(h, self.level).tanh())


def measured(model: nn.Module, tokens: Tensor) -> zerosum.Report:
    probe = zerosum.Probe(model)
    with probe:
        model(tokens).square().flatten(1).mean(1).sum().backward()
    return probe.report()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("level", [1e-10, 1e-6, 1e-4, 1e-3])
def test_noise_is_no_coupling(level: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, tokens = Noisy().double(), torch.randint(0, 11, (N, T))
    model.level = level
    report = measured(model, tokens)
    assert report.coverage.share == 1
    model.level = 0.0
    truth = per_example_gradients(model(tokens).square().flatten(1).mean(1), model, trainable(model))
    for name, each in truth.items():
        assert (report[name].l1 - each.abs().flatten(1).sum(1)).abs().max() <= 10 * level * each.abs().sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("leak", [0.005, 0.03, 1.0])
def test_coupling_is_seen_through_noise(leak: float, seed: int) -> None:
    """Of a leak of 0.005 each other example has an eighth, some six times the noise."""
    torch.manual_seed(seed)
    model, tokens = Noisy().double(), torch.randint(0, 11, (N, T))
    model.leak = leak
    with pytest.warns(UserWarning, match="coupled before the loss"):
        report = measured(model, tokens)
    assert set(report) == {name for name, _ in model.named_parameters() if name.startswith("head")}


def test_half_precision_that_underflows_is_no_coupling() -> None:
    """Gradients near the smallest numbers of float16 have few bits, which a weight of an eighth takes away."""
    torch.manual_seed(0)
    model, tokens = Noisy(), torch.randint(0, 11, (N, T))
    model.level = 0.0

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return model(tokens).float().square().flatten(1).mean(1) / 64

    probe = zerosum.Probe(model)
    with probe:
        losses().sum().backward()
    assert probe.report().coverage.share == 1
    small = torch.autograd.grad(losses().sum(), model.first.weight)[0]
    exact = torch.autograd.grad(losses().sum() * 64, model.first.weight)[0] / 64
    assert not torch.equal(small, exact)  # it does underflow


def test_what_is_coupled_without_noise_is_refused_as_before() -> None:
    torch.manual_seed(0)
    model, tokens = Noisy().double(), torch.randint(0, 11, (N, T))
    model.level, model.leak = 0.0, 1e-9
    with pytest.warns(UserWarning, match="coupled before the loss"):
        measured(model, tokens)


def test_deterministic_algorithms_are_as_they_were() -> None:
    model = nn.Linear(3, 2, device="meta")
    edges = [torch.autograd.graph.get_gradient_edge(model(torch.empty(4, 3, device="meta")))]
    for before in ((False, False), (True, True), (True, False)):
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        try:
            with warnings.catch_warnings(record=True) as told, contextlib.suppress(KeyError), attribution.repeatable(edges):
                assert torch.is_deterministic_algorithms_warn_only_enabled()
                raise KeyError
            assert not told
            after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
            assert after == before
        finally:
            torch.use_deterministic_algorithms(False)


class Deep(nn.Module):
    """Blocks whose noise has the size of an example's mean gradient, which drowns small rows and single numbers."""

    def __init__(self, level: float, leak: float) -> None:
        super().__init__()
        self.level, self.leak = level, leak
        self.embedding, self.positions = nn.Embedding(50, 32), nn.Parameter(torch.randn(256, 32))
        self.linears = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(4))
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        for k, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            h = linear(norm(x))
            h = h + self.leak * h.mean(0, keepdim=True) if k == 2 else h
            x = x + OfExamples.apply(h.tanh(), self.level)
        return self.head(x)


class OfExamples(Noise):
    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        size = g.abs().mean(-1, keepdim=True) + g.abs().mean((1, 2), keepdim=True)
        return g + ctx.level * size * torch.randn_like(g), None


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("level", "leak"), [(1e-3, 0.0), (1e-2, 0.0), (3e-2, 0.0), (1e-3, 0.01), (1e-2, 0.1)])
def test_rows_that_drown_in_noise_are_told_from_coupled_ones(level: float, leak: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, tokens, targets = Deep(level, leak), torch.randint(50, (N, 256)), torch.randint(50, (N, 256))
    weights = 3.0 * (torch.rand(N, 256) < 0.99)  # ignored positions
    probe = zerosum.Probe(model)
    with pytest.warns(UserWarning, match="coupled before the loss") if leak else contextlib.nullcontext(), probe:
        losses = F.cross_entropy(model(tokens).mT, targets, reduction="none") * weights
        losses.mean(1).sum().backward()
    covered = probe.report().coverage.covered
    behind = {name for name, _ in model.named_parameters() if name.startswith(("linears.3", "norms.3", "head"))}
    if leak:
        assert set(covered) == behind
    else:
        assert len(covered) == len(list(model.parameters()))


class Few(nn.Module):
    """Noise everywhere, and one position in 1024 whose rows are of several examples, or of another one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.first, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.first(self.embedding(tokens))
        one = h[:, :1]
        if self.kind == "mixed":
            one = one + one.roll(1, 0)
        elif self.kind == "moved":
            one = one.flip(0)
        return self.head(OfExamples.apply(torch.cat([one, h[:, 1:]], 1).tanh(), 1e-3))


def few(kind: str, seed: int) -> tuple[Few, Tensor, zerosum.Probe, Callable[[], Tensor]]:
    torch.manual_seed(seed)
    model, tokens, targets = Few(kind).double(), torch.randint(50, (4, 1024)), torch.randint(50, (4, 1024))

    def losses() -> Tensor:
        return F.cross_entropy(model(tokens).mT, targets, reduction="none").mean(1)

    return model, tokens, zerosum.Probe(model), losses


@pytest.mark.parametrize("seed", range(6))
def test_a_few_mixed_rows_are_not_lost_in_noise(seed: int) -> None:
    _, _, probe, losses = few("mixed", seed)
    with pytest.warns(UserWarning, match=r"4 of 4096 rows serve several examples"), probe:
        losses().sum().backward()
    assert set(probe.report()) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("seed", range(6))
def test_a_few_rows_of_other_examples_are_named(seed: int) -> None:
    model, _, probe, losses = few("moved", seed)
    with probe:
        losses().sum().backward()
    report, truth = probe.report(), per_example_gradients(losses(), model, trainable(model))
    for name, g in truth.items():
        assert (report[name].sq_norm - g.flatten(1).square().sum(1)).abs().max() <= 1e-2 * g.square().sum() / len(g), name


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_that_cannot_repeat_is_differentiated_by_another_kernel(grouped: bool) -> None:
    """Of the node that cuDNN's attention has on a device; a stand-in has what that saves."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 8, 16, requires_grad=True)
    key, value = (torch.randn(2, 2 if grouped else 4, 8, 16, requires_grad=True) for _ in range(2))
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=grouped)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, (query, key, value), grad)
    saved = {"query": query, "key": key, "value": value, "attn_bias": None, "is_causal": True, "scale": 0.3, "dropout_p": 0.0}
    node = SimpleNamespace(**{f"_saved_{name}": x for name, x in saved.items()})
    found = attribution._attention_again(node, (grad, None, grad, None), (grad,))
    assert found is not None
    assert found[1] is found[3] is None  # what was not wanted
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])
    node._saved_dropout_p = 0.1
    assert attribution._attention_again(node, (grad,) * 4, (grad,)) is None
