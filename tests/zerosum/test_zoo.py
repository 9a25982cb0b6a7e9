"""The probe on small models that are hard to measure, against one backward pass for each example in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zerosum
from tests.zerosum.models import ZOO, LearnedSlopes, Packed, Tied, TwoLayers, TwoNames
from tests.zerosum.oracle import (
    PASSES,
    assert_covers,
    assert_truth,
    assert_unchanged,
    direction_for,
    gradients,
    per_example_gradients,
    snapshot,
    trainable,
)

# (N, T): T != N, and T == N, where a mistaken dimension fits all the same.
SIZES = [(3, 6), (4, 4)]


def setup(kind: type[TwoLayers], n: int, t: int) -> tuple[TwoLayers, Tensor]:
    torch.manual_seed(0)
    return kind().double().train(), torch.randint(0, 11, (n, t))


def outputs(model: TwoLayers, tokens: Tensor) -> Tensor:
    """The same dropout at every call."""
    torch.manual_seed(1)
    return model(tokens)


def losses_of(output: Tensor) -> Tensor:
    return output.square().flatten(1).mean(1)


def truth_of(model: TwoLayers, tokens: Tensor) -> dict[str, Tensor]:
    return per_example_gradients(losses_of(outputs(model, tokens)), model, trainable(model))


zoo = pytest.mark.parametrize("kind", ZOO)
sizes = pytest.mark.parametrize(("n", "t"), SIZES)


@sizes
@zoo
def test_the_truth_is_that_of_each_example_alone(kind: type[TwoLayers], n: int, t: int) -> None:
    if kind.random:
        pytest.skip("another batch, other random numbers")
    model, tokens = setup(kind, n, t)
    alone = [truth_of(model, tokens[i : i + 1]) for i in range(n)]
    for name, g in truth_of(model, tokens).items():
        # float32 inside a model rounds differently in another batch.
        torch.testing.assert_close(torch.cat([g_i[name] for g_i in alone]), g, rtol=1e-6, atol=kind.rtol * g.abs().max().item())


@sizes
@zoo
def test_every_field_of_every_parameter_is_the_truth(kind: type[TwoLayers], n: int, t: int) -> None:
    model, tokens = setup(kind, n, t)
    truth, direction = truth_of(model, tokens), direction_for(model)
    # Nothing in a packed batch says how many examples there are.
    probe = zerosum.Probe(model, direction=direction, gram=True, num_examples=n if kind is Packed else None)
    for _ in range(PASSES):
        with probe:
            losses_of(outputs(model, tokens)).sum().backward()
        report = probe.report()
        assert report.num_examples == n
        assert_truth(report, truth, direction, rtol=kind.rtol, refusable=kind.refusable)


@zoo
def test_all_parameters_that_a_loss_depends_on_are_covered(kind: type[TwoLayers]) -> None:
    if kind.refusable:
        pytest.skip("naming a parameter as not covered is an honest answer here")
    model, tokens = setup(kind, *SIZES[0])
    probe = zerosum.Probe(model)
    how = []
    for _ in range(PASSES):
        with probe:
            losses_of(outputs(model, tokens)).sum().backward()
        assert_covers(probe.report(), model, truth_of(model, tokens))
        how.append(probe.report().coverage.covered)
    assert how[2] == how[1], "known passes take another way"


@zoo
def test_the_step_is_the_plain_one_and_the_model_stays_as_it_was(kind: type[TwoLayers]) -> None:
    model, tokens = setup(kind, *SIZES[0])
    plain = outputs(model, tokens)
    losses_of(plain).sum().backward()
    plain_gradients, before = gradients(model), snapshot(model)
    model.zero_grad()
    with zerosum.Probe(model, direction=direction_for(model), gram=True):
        watched = outputs(model, tokens)
        losses_of(watched).sum().backward()
    assert_unchanged(snapshot(model), before)
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    # The sums are the same, taken in another order; in float32 where the model casts its parameters.
    torch.testing.assert_close(gradients(model), plain_gradients, rtol=kind.rtol, atol=1e-3 * kind.rtol)


def test_learned_slopes_have_a_rule() -> None:
    """They are not differentiated again for each example."""
    model, tokens = setup(LearnedSlopes, 3, 6)
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model(tokens)).sum().backward()
    covered = probe.report().coverage.covered
    assert {name: covered[name] for name in ("of_channels.weight", "one.weight", "slopes", "of_mean")} == dict.fromkeys(
        ("of_channels.weight", "one.weight", "slopes", "of_mean"), "prelu"
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", [TwoLayers, Tied, TwoNames])
def test_a_model_that_is_called_by_keyword(kind: type[TwoLayers], reduction: str) -> None:
    model, tokens = setup(kind, 3, 6)
    probe = zerosum.Probe(model, loss_reduction=reduction)
    with probe:
        getattr(losses_of(model(tokens=tokens)), reduction)().backward()
    assert_truth(probe.report(), truth_of(model, tokens), gram=False)


@sizes
@zoo
def test_two_runs_agree_to_the_bit(kind: type[TwoLayers], n: int, t: int) -> None:
    model, tokens = setup(kind, n, t)
    runs = []
    for _ in range(2):
        model.zero_grad()
        probe = zerosum.Probe(model, gram=True, num_examples=n if kind is Packed else None)
        with probe:
            losses_of(outputs(model, tokens)).sum().backward()
        report = probe.report()
        runs.append({name: [getattr(report[name], f).clone() for f in ("abs_sum", "sq_sum", "l1", "gram")] for name in report})
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@zoo
def test_a_batch_of_one_example(kind: type[TwoLayers]) -> None:
    """Every field is of one gradient, and rows (1, T, ·) look like what is broadcast."""
    model, tokens = setup(kind, 1, 6)
    truth, direction = truth_of(model, tokens), direction_for(model)
    probe = zerosum.Probe(model, direction=direction, gram=True, num_examples=1 if kind is Packed else None)
    with probe:
        losses_of(outputs(model, tokens)).sum().backward()
    assert_truth(probe.report(), truth, direction, rtol=kind.rtol, refusable=kind.refusable)
