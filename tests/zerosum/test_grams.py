"""Inner products of the gradients of a data set's examples, against one backward pass for each."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerosum
from tests.zerosum.oracle import assert_unchanged, error, per_example_gradients, snapshot, trainable
from zerosum.probe import results
from zerosum.training.model import GPT, GPTConfig, token_losses

V, T = 11, 5
Batch = tuple[Tensor, Tensor]


def gpt(dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab=V, width=8, layers=1, heads=2, positions=T)).to(dtype)


def tokens(n: int, seed: int) -> Batch:
    x, y = torch.randint(V, (2, n, T), generator=torch.Generator().manual_seed(seed))
    return x, y


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return token_losses(model, x, y).mean(1)


def gradients(model: nn.Module, batch: Batch, names: Iterable[str] | None = None) -> Tensor:
    """(N, P)"""
    found = per_example_gradients(losses_of(model, *batch), model, trainable(model) if names is None else names)
    return torch.cat([g.flatten(1) for g in found.values()], 1).double()


@pytest.mark.parametrize(("n", "m", "block"), [(5, 7, 3), (3, 2, 8), (4, 9, 4), (1, 1, 1)])
def test_two_sets(n: int, m: int, block: int) -> None:
    model, first, second = gpt(), tokens(n, 1), tokens(m, 2)
    found = zerosum.gram_between(model, losses_of, first, second, block=block)
    assert error(found, gradients(model, first) @ gradients(model, second).T) < 1e-11


@pytest.mark.parametrize(("n", "block"), [(7, 3), (6, 3), (4, 8), (9, 1), (1, 4)])
def test_one_set(n: int, block: int) -> None:
    model, batch = gpt(), tokens(n, 1)
    found = zerosum.gram_between(model, losses_of, batch, block=block)
    g = gradients(model, batch)
    assert error(found, g @ g.T) < 1e-11


def test_some_parameters() -> None:
    model, first, second = gpt(), tokens(4, 1), tokens(5, 2)
    names = [trainable(model)[2], "head.weight"]
    found = zerosum.gram_between(model, losses_of, first, second, parameters=names)
    assert error(found, gradients(model, first, names) @ gradients(model, second, names).T) < 1e-11
    everything = zerosum.gram_between(model, losses_of, first, second)
    assert error(found, everything) > 1e-3


def test_it_leaves_the_model_as_it_was() -> None:
    """Its mode, its gradients, what is frozen, and random numbers; dropout is off."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double().train()
    model[0].bias.requires_grad_(False)
    x = torch.randn(5, 4, dtype=torch.float64)
    model(x).sum().backward()
    kept = {name: p.grad for name, p in model.named_parameters()}
    values = {name: g.clone() for name, g in kept.items() if g is not None}
    before = snapshot(model)

    def squares(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum(1)

    with torch.no_grad():
        found = zerosum.gram_between(model, squares, (x,), block=2)
    assert_unchanged(snapshot(model), before)
    for name, p in model.named_parameters():
        assert p.grad is kept[name]
        assert p.grad is None or torch.equal(p.grad, values[name])
    model.eval()
    g = per_example_gradients(squares(model, x), model, trainable(model))
    flat = torch.cat([part.flatten(1) for part in g.values()], 1)
    assert error(found, flat @ flat.T) < 1e-11


def test_a_parameter_that_no_loss_depends_on_adds_nothing() -> None:
    model, batch = gpt(), tokens(3, 1)
    expected = zerosum.gram_between(model, losses_of, batch)
    model.unused = nn.Linear(2, 2)
    assert torch.equal(zerosum.gram_between(model, losses_of, batch), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_parameter_that_is_not_covered_is_an_error() -> None:
    """Here examples meet behind it."""

    class Centered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second((h - h.mean(0)).relu())

    def squares(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum(1)

    model, x = Centered().double(), torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"parameters: the per-example gradients of 'first.weight' are not known: "):
        zerosum.gram_between(model, squares, (x,))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"first": torch.ones(3)}, TypeError, "first: expected a tuple of tensors, .* got Tensor"),
        ({"first": ()}, TypeError, "first: expected a tuple of tensors"),
        ({"second": (torch.ones(3), torch.ones(2))}, ValueError, r"second: expected tensors of the same number .* got \[2, 3\]"),
        ({"second": tuple(x[:, :-1] for x in tokens(2, 1))}, ValueError, "second: expected tensors that may be joined"),
        ({"block": 0}, ValueError, "block: expected a positive integer, got 0"),
        ({"losses": 3}, TypeError, r"losses: expected a function of \(model, \*batch\), got int"),
        ({"losses": lambda model, x, y: token_losses(model, x, y)}, ValueError, r"losses: expected one for each of 4 examples"),
        ({"parameters": ["nothing"]}, ValueError, "parameters: 'nothing' is not a trainable parameter"),
        ({"parameters": []}, ValueError, "parameters: expected at least one"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_not_expected_is_refused_by_name(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"losses": losses_of, "first": tokens(2, 1), "second": tokens(2, 2)} | change
    with pytest.raises(kind, match=message):
        zerosum.gram_between(gpt(), **arguments)


def test_a_micro_batch_costs_the_same_however_many_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what earlier passes left nothing is copied again: one parameter's scalars are put aside once for each pass."""
    put_aside = []
    of = results._Scalars.of
    monkeypatch.setattr(results._Scalars, "of", lambda sums: put_aside.append(sums) or of(sums))
    model = nn.Linear(3, 2)
    probe = zerosum.Probe(model, gram=True)
    for count in (4, 8, 16):
        put_aside.clear()
        with probe:
            for _ in range(count):
                model(torch.randn(2, 3)).square().sum(1).sum().backward()
        assert len(put_aside) == 2 * count
        assert probe.report().num_examples == 2 * count
