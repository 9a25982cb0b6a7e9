"""The probe against one backward pass for each example, and what it does to the model: nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import zerosum
from tests.zerosum.models import COVERED, Flattened, Frozen, Tied, TwoLayers, TwoNames, UsedTwice
from tests.zerosum.oracle import expected_fields, per_example_gradients

N, T = 4, 6


def losses_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).square().flatten(1).mean(1)


def setup(kind: type[nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return kind().to(dtype), torch.randint(0, 11, (N, T))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", COVERED)
def test_every_field_of_every_covered_parameter_is_the_per_example_truth(kind: type[nn.Module], reduction: str) -> None:
    model, tokens = setup(kind)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters(remove_duplicate=False)}
    if kind is TwoNames:  # one parameter under two names has one direction
        direction |= {f"alias.{leaf}": direction[f"middle.{leaf}"] for leaf in ("weight", "bias")}
    probe = zerosum.Probe(model, direction=direction, gram=True, loss_reduction=reduction)
    with probe:
        getattr(losses_of(model, tokens), reduction)().backward()
    report = probe.report()
    truth = per_example_gradients(losses_of(model, tokens), model, report)
    linear = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("embedding")}
    assert set(report) == linear
    totals = dict.fromkeys(("l1", "sq_norm", "dot", "abs_dot", "gram"), 0.0)
    for name in report:
        for field, value in expected_fields(truth[name], direction[name]).items():
            torch.testing.assert_close(getattr(report[name], field), value, rtol=1e-10, atol=1e-13, msg=f"{name}.{field}")
            if field in totals:
                totals[field] = totals[field] + value
    for field, value in totals.items():
        torch.testing.assert_close(getattr(report, field), value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", [*COVERED, Tied, Flattened])
def test_gradients_stay_those_of_the_plain_step(kind: type[nn.Module]) -> None:
    model, tokens = setup(kind)
    losses_of(model, tokens).sum().backward()
    plain = gradients(model)
    model.zero_grad()
    with zerosum.Probe(model):
        losses_of(model, tokens).sum().backward()
    torch.testing.assert_close(gradients(model), plain, rtol=1e-11, atol=1e-14)


def test_gradients_accumulate_into_an_existing_grad() -> None:
    model, tokens = setup(UsedTwice)
    losses_of(model, tokens).sum().backward()
    plain = gradients(model)
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model, tokens).sum().backward()
    torch.testing.assert_close(gradients(model), {k: 2 * v for k, v in plain.items()}, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(probe.report()["head.weight"].grad_sum, plain["head.weight"], rtol=1e-11, atol=1e-14)


def test_the_weight_gradient_is_not_copied_and_a_later_write_is_noticed() -> None:
    model, tokens = setup(TwoLayers)
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model, tokens).sum().backward()
    head = probe.report()["head.weight"]
    assert head.grad_sum.data_ptr() == model.head.weight.grad.data_ptr()
    before = head.metrics["D_grad"]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match=r"grad_sum of 'head.weight' .* modified in place"):
        _ = head.grad_sum
    assert head.metrics["D_grad"] == before


def test_nothing_of_the_model_changes_not_even_after_an_exception() -> None:
    model, tokens = setup(TwoLayers)
    state, keys = copy.deepcopy(model.state_dict()), {name: set(vars(m)) for name, m in model.named_modules()}
    probe = zerosum.Probe(model)
    with pytest.raises(ZeroDivisionError), probe:
        losses_of(model, tokens)[1 // 0]
    assert not torch.overrides._get_current_function_mode_stack()
    assert {name: set(vars(m)) for name, m in model.named_modules()} == keys
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="has not completed"):
        probe.report()
    with probe:  # and it can be used again
        losses_of(model, tokens).sum().backward()
    assert len(probe.report()) == 3


def test_backward_after_the_block_gives_plain_gradients_and_no_results() -> None:
    model, tokens = setup(TwoLayers)
    probe = zerosum.Probe(model)
    with probe:
        losses = losses_of(model, tokens)
    losses.sum().backward()
    report = probe.report()
    assert len(report) == 0
    assert report.coverage.not_covered["head.weight"] == "no gradient reached it inside the probe"
    assert model.head.weight.grad is not None


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        (TwoLayers, "embedding.weight", "used by embedding, which no rule covers"),
        (Tied, "embedding.weight", "used by embedding, which no rule covers"),
        (Flattened, "head.weight", "used by linear on rows (24,), which do not start with N = 4 examples"),
    ],
)
def test_what_is_not_covered_is_named_with_its_reason(kind: type[nn.Module], name: str, reason: str) -> None:
    model, tokens = setup(kind)
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model, tokens).sum().backward()
    report = probe.report()
    assert report.coverage.not_covered[name] == reason
    assert name not in report
    assert f"not covered: {name} ({reason})" in str(report)
    with pytest.raises(KeyError, match=name):
        report[name]
    missing = sum(model.get_parameter(n).numel() for n in report.coverage.not_covered)
    assert report.coverage.share == pytest.approx(1 - missing / sum(p.numel() for p in model.parameters()))


def test_coverage_accounts_for_every_trainable_parameter_and_for_no_other() -> None:
    model, tokens = setup(Frozen)
    model.unused = nn.Linear(2, 2)
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model, tokens).sum().backward()
    coverage = probe.report().coverage
    assert {*coverage.covered, *coverage.not_covered} == {n for n, p in model.named_parameters() if p.requires_grad}
    assert coverage.covered["first.weight"] == "linear"
    assert coverage.covered["frozen.bias"] == "linear bias"
    assert coverage.not_covered["unused.weight"] == "not used inside the probe"


def test_one_parameter_under_two_names_answers_to_both() -> None:
    model, tokens = setup(TwoNames)
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model, tokens).sum().backward()
    report = probe.report()
    assert report["alias.weight"] is report["middle.weight"]
    assert "alias.weight" in report


def test_evaluation_without_gradients_does_not_count_as_use() -> None:
    model, tokens = setup(TwoLayers)
    probe = zerosum.Probe(model)
    with probe:
        with torch.no_grad():
            model(tokens[:2])
        losses_of(model, tokens).sum().backward()
        with torch.no_grad():
            model(tokens[:1])
    truth = per_example_gradients(losses_of(model, tokens), model, probe.report())
    torch.testing.assert_close(probe.report()["head.weight"].abs_sum, truth["head.weight"].abs().sum(0), rtol=1e-10, atol=0)


def test_a_second_batch_in_one_block_is_refused() -> None:
    model, tokens = setup(TwoLayers)
    with zerosum.Probe(model):
        losses_of(model, tokens).sum().backward()
        with pytest.raises(RuntimeError, match="one forward and one backward pass"):
            losses_of(model, tokens)


def test_a_second_backward_through_the_same_graph_is_not_reported_as_one() -> None:
    model, tokens = setup(TwoLayers)
    probe = zerosum.Probe(model)
    with probe:
        losses = losses_of(model, tokens)
        losses.sum().backward(retain_graph=True)
        losses.sum().backward()
    assert len(probe.report()) == 0
    assert "twice" in probe.report().coverage.not_covered["head.weight"]


def test_gradients_of_gradients_pass_through_the_probe() -> None:
    model, tokens = setup(TwoLayers)

    def penalty() -> Tensor:
        (g,) = torch.autograd.grad(losses_of(model, tokens).sum(), model.head.weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), model.first.weight)[0]

    plain = penalty()
    with zerosum.Probe(model):
        torch.testing.assert_close(penalty(), plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models_stay_within_rounding(dtype: torch.dtype) -> None:
    model, tokens = setup(TwoLayers, dtype)
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model, tokens).sum().backward()
    truth = per_example_gradients(losses_of(model.double(), tokens), model, probe.report())
    for name, g in truth.items():
        error = (probe.report()[name].abs_sum.double() - g.abs().sum(0)).norm() / g.abs().sum(0).norm()
        # The model itself rounds activations a few times; sums add nothing to that.
        assert error < 20 * torch.finfo(dtype).eps, name
        assert probe.report()[name].abs_sum.dtype == torch.float32


def test_autocast_covers_the_layers_in_the_lower_precision() -> None:
    model, tokens = setup(TwoLayers, torch.float32)
    probe = zerosum.Probe(model)
    with probe:
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(model, tokens)
        losses.float().sum().backward()
    g = per_example_gradients(losses_of(model.double(), tokens), model, ["head.weight"])["head.weight"]
    error = (probe.report()["head.weight"].abs_sum.double() - g.abs().sum(0)).norm() / g.abs().sum(0).norm()
    assert error < 20 * torch.finfo(torch.bfloat16).eps


def test_nan_comes_through_and_is_flagged_by_name() -> None:
    model, tokens = setup(TwoLayers)
    with torch.no_grad():
        model.first.weight[0, 0] = torch.nan
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model, tokens).sum().backward()
    report = probe.report()
    assert not report.finite
    assert set(report.not_finite) == {"first.weight", "first.bias", "head.weight"}
    assert report.metrics["D_grad"].value != report.metrics["D_grad"].value
    assert "NOT FINITE" in str(report)


def test_arguments_are_checked_and_named() -> None:
    model, tokens = setup(TwoLayers)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        zerosum.Probe([])
    with pytest.raises(ValueError, match="examples: expected 'sequence', got 'word'"):
        zerosum.Probe(model, examples="word")
    with pytest.raises(ValueError, match="loss_reduction: expected 'sum' or 'mean', got 'max'"):
        zerosum.Probe(model, loss_reduction="max")
    with pytest.raises(ValueError, match="num_examples: expected a positive integer, got 0"):
        zerosum.Probe(model, num_examples=0)
    with pytest.raises(TypeError, match="direction: expected a mapping"):
        zerosum.Probe(model, direction=[torch.zeros(3)])
    with pytest.raises(ValueError, match="direction: 'nose' is not a parameter"):
        zerosum.Probe(model, direction={"nose": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"direction\['head.weight'\]: expected a tensor of shape \(5, 12\), got \(3,\)"):
        zerosum.Probe(model, direction={"head.weight": torch.zeros(3)})
    probe = zerosum.Probe(model, direction={"head.weight": torch.zeros(5, 12, dtype=torch.float64)})
    with pytest.raises(ValueError, match="direction: expected one for every covered parameter, got none for first"), probe:
        losses_of(model, tokens).sum().backward()
    with pytest.raises(RuntimeError, match="open already"), zerosum.Probe(model), zerosum.Probe(model):
        pass


def test_num_examples_settles_what_the_first_layer_does_not_tell() -> None:
    model, tokens = setup(TwoLayers)

    def flat_first(tokens: Tensor) -> Tensor:
        x = torch.tanh(model.first(model.embedding(tokens).flatten(0, 1))).unflatten(0, tokens.shape)
        return model.head(x).square().flatten(1).mean(1)

    probe = zerosum.Probe(model, num_examples=N)
    with probe:
        flat_first(tokens).sum().backward()
    assert set(probe.report()) == {"head.weight"}
    assert probe.report().num_examples == N
