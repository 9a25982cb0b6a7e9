"""Which tokens are examples: those whose target is not -100, as if the others were not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zerosum
from tests.zerosum.models import Tied, varied
from tests.zerosum.oracle import assert_covers, assert_truth, direction_for, error
from tests.zerosum.test_tokens import VOCAB, batch, cross_entropies, gpt, small, squares, truth_of
from tests.zerosum.transformers_models import IGNORED, gpt2
from zerosum.tokens import SampledReport
from zerosum.training.model import token_losses


def some(y: Tensor) -> None:
    y[0, 2:4] = IGNORED


def first_and_last(y: Tensor) -> None:
    y[0, 0] = y[-1, -1] = IGNORED


def whole_sequences(y: Tensor) -> None:
    y[:-1] = IGNORED


def all_but_one(y: Tensor) -> None:
    y.view(-1)[:-1] = IGNORED


IGNORING = (some, first_and_last, whole_sequences, all_but_one)


@pytest.mark.parametrize("ignoring", IGNORING)
@pytest.mark.parametrize("kind", [gpt, lambda: varied(gpt2("eager")()).double()], ids=["own", "gpt2"])
@pytest.mark.parametrize("n", [1, 3])
def test_every_field_is_of_the_other_tokens(n: int, kind: Callable[[], nn.Module], ignoring: Callable[[Tensor], None]) -> None:
    torch.manual_seed(0)
    model, (x, y) = kind(), batch(n, 7, VOCAB)
    ignoring(y)
    counted = (y != IGNORED).flatten()
    truth = {name: g[counted] for name, g in truth_of(model, x, y, cross_entropies).items()}
    direction = direction_for(model)
    done: list[tuple[int, int]] = []
    report = zerosum.token_report(
        model, x, y, losses=cross_entropies, direction=direction, progress=lambda *numbers: done.append(numbers)
    )
    assert isinstance(report, zerosum.Report)
    examples = int(counted.sum())
    assert report.num_examples == examples
    assert done[-1] == (examples, examples)
    assert_truth(report, truth, direction, gram=False)
    assert_covers(report, model, truth)
    for metric in (m for m in report.metrics.values() if m.null is not None):
        assert metric.n == examples
    changes = zerosum.changes.first_order_changes(model, x, y, direction, losses=cross_entropies)
    assert error(report.dot, changes.flatten()[counted]) < 1e-6


def test_metrics_are_those_of_the_gradients_that_are_left() -> None:
    """N and the noise scale are of the examples, not of the tokens."""
    model, (x, y) = gpt(), batch(3, 7, VOCAB)
    y[1] = y[0, 3] = IGNORED
    report = zerosum.token_report(model, x, y)
    g = torch.cat([g[(y != IGNORED).flatten()].flatten(1) for g in truth_of(model, x, y, token_losses).values()], 1)
    mean, N = g.mean(0), len(g)
    assert N == 13
    variance = g.sub(mean).square().sum() / (N - 1)
    expected = {
        "example_norm": g.square().sum(1).mean().sqrt(),
        "example_l1": g.abs().sum(1).mean(),
        "grad_norm": mean.norm(),
        "noise_trace": variance,
        "grad_norm_sq": mean.square().sum() - variance / N,
        "noise_scale": variance / (mean.square().sum() - variance / N),
    }
    for name, value in expected.items():
        assert report.metrics[name].value == pytest.approx(float(value), rel=1e-9), name
        assert report.metrics[name].n == N


def test_losses_of_tokens_that_are_no_examples_do_not_matter() -> None:
    """A function that ignores no target, and even gives an infinity."""
    model, (x, y) = gpt(), batch(2, 7, VOCAB)
    y[0, 2:5] = y[1, 6] = IGNORED

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        values = model(x).square().mean(2) * (1 + y)
        return torch.where(y == IGNORED, values * 1e308 * 1e308, values) if y.shape[1] == 7 else values

    finite = lambda model, x, y: model(x).square().mean(2) * (1 + y)  # noqa: E731
    for sample in (None, 8):
        one, other = (zerosum.token_report(model, x, y, losses=f, sample=sample) for f in (losses, finite))
        for name in one:
            assert torch.equal(one[name].abs_sum, other[name].abs_sum)
        assert one.num_examples == 10
    truth = {name: g[(y != IGNORED).flatten()] for name, g in truth_of(model, x, y, finite).items()}
    assert_truth(zerosum.token_report(model, x, y, losses=losses), truth, gram=False)


@pytest.mark.parametrize("tied", [False, True])
def test_a_sample_draws_examples_alone(tied: bool) -> None:
    model: nn.Module = small(Tied) if tied else gpt()
    losses = squares if tied else token_losses
    x, y = batch(3, 5)
    y[1] = y[0, 0] = y[2, -1] = IGNORED
    if tied:  # a loss that weighs by the target gives tokens without one the largest
        assert squares(model, x, y)[1].abs().min() > squares(model, x, y)[y != IGNORED].abs().max()
    direction = direction_for(model)
    exact = zerosum.token_report(model, x, y, losses=losses, direction=direction)
    report = zerosum.token_report(model, x, y, losses=losses, direction=direction, sample=400)
    assert isinstance(report, SampledReport)
    assert report.num_examples == exact.num_examples == 8
    assert set(report.draws.tokens.tolist()) <= set(range(8))
    assert len(set(report.draws.tokens.tolist())) == 8
    assert error(report.dot, exact.dot) < 1e-9
    for name in exact:
        assert error(report[name].grad_sum, exact[name].grad_sum) < 1e-9
        assert error(report[name].abs_sum, exact[name].abs_sum) < 0.2
    for name in ("grad_norm", "C_uG", "C", "D"):
        assert report.metrics[name].value == pytest.approx(exact.metrics[name].value, rel=1e-6)
    for name in ("example_norm", "example_l1"):
        assert report.metrics[name].value == pytest.approx(exact.metrics[name].value, rel=0.1)
    assert all(m.n == exact.metrics[name].n for name, m in report.metrics.items())


def test_all_targets_ignored_is_an_error() -> None:
    model, (x, y) = gpt(), batch(2, 7, VOCAB)
    for sample in (None, 8):
        with pytest.raises(ValueError, match="y: expected at least one target other than -100"):
            zerosum.token_report(model, x, torch.full_like(y, IGNORED), sample=sample)


def test_a_step_has_the_same_examples() -> None:
    model, (x, y) = gpt(), batch(2, 7, VOCAB)
    y[0, 1:6] = IGNORED
    report = zerosum.token_report(model, x, y, direction=direction_for(model))
    with zerosum.changes.Step(model, {"train": (x, y)}) as step, torch.no_grad():
        for p in model.parameters():
            p.mul_(1.001)
    assert step.metrics["train.D"].n == report.metrics["D"].n == 9
