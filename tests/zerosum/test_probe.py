"""The probe against one backward pass for each example, and what it does to the model: nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zerosum
import zsl_kernels as zk
from tests.inputs import sums_of
from tests.zerosum.models import COVERED, Flattened, Frozen, Tied, TwoLayers, TwoNames, UsedTwice
from tests.zerosum.oracle import assert_truth, direction_for, per_example_gradients
from zerosum.probe import contributions

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
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(report) == trainable
    totals = dict.fromkeys(("l1", "sq_norm", "dot", "abs_dot", "gram"), 0.0)
    for name in report:
        for field, value in sums_of(truth[name], direction[name]).items():
            torch.testing.assert_close(getattr(report[name], field), value, rtol=1e-10, atol=1e-13, msg=f"{name}.{field}")
            if field in totals:
                totals[field] = totals[field] + value
    for field, value in totals.items():
        torch.testing.assert_close(getattr(report, field), value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", COVERED)
def test_rows_that_are_padded_as_on_a_device_change_nothing(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, over two passes of one block, a direction and the Gram among the rest."""
    model, tokens = setup(kind)
    tokens %= 5  # rows of the tables that nobody touches
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    reports, grads, padded_rows = [], [], []

    def most_rows(lookup: contributions.RowGather) -> int:
        padded_rows.append(lookup.num_rows)
        return min(lookup.num_rows, lookup.rows.numel())

    for passes in (1, 2):
        for padded in (False, True):
            if padded:
                monkeypatch.setattr(contributions, "most_rows", most_rows)
            model.zero_grad()
            with (probe := zerosum.Probe(model, direction=direction, gram=True)):
                for _ in range(passes):
                    losses_of(model, tokens).sum().backward()
            reports.append(probe.report())
            grads.append(gradients(model))
            monkeypatch.undo()
    for plain, padded, grad, grad_padded in zip(reports[::2], reports[1::2], grads[::2], grads[1::2], strict=True):
        assert set(plain) == set(padded)
        for name in plain:
            for field in zk.InterferenceSums._fields:
                found, want = (getattr(report[name], field) for report in (padded, plain))
                # Passes have no inner products with each other: those are NaN.
                torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True, msg=f"{name}.{field}")
            assert torch.equal(grad[name], grad_padded[name]), name
            assert repr(plain[name].metrics) == repr(padded[name].metrics)
        assert repr(plain.metrics) == repr(padded.metrics)
    assert padded_rows == 3 * [11]


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
    assert len(probe.report()) == 4


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


def decayed(model: TwoLayers, tokens: Tensor) -> Tensor:
    """A loss that is not a sum over examples: its last part is the weight's own."""
    return losses_of(model, tokens).sum() + 0.1 * model.head.weight.square().sum()


def test_what_is_not_covered_is_named_with_its_reason() -> None:
    losses, reason = decayed, "a part of the loss belongs to no example: it reaches the weights by add (head.weight)"
    model, tokens = setup(TwoLayers)
    losses(model, tokens).sum().backward()
    plain = gradients(model)
    model.zero_grad()
    probe = zerosum.Probe(model)
    with probe:
        losses(model, tokens).sum().backward()
    torch.testing.assert_close(gradients(model), plain, rtol=1e-11, atol=1e-14)
    report = probe.report()
    assert report.coverage.not_covered["head.weight"].startswith(reason)
    assert "head.weight" not in report
    assert f"not covered: head.weight ({reason}" in str(report)
    with pytest.raises(KeyError, match=r"head\.weight"):
        report["head.weight"]
    missing = sum(model.get_parameter(n).numel() for n in report.coverage.not_covered)
    assert report.coverage.share == pytest.approx(1 - missing / sum(p.numel() for p in model.parameters()))
    with pytest.raises(NotImplementedError, match=r"head\.weight"), zerosum.Probe(model, strict=True):
        losses(model, tokens).sum().backward()


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(0),
        lambda x: x.flatten(0, 1).roll(1, 0).view_as(x),
        lambda x: x + x.flip(0),
        lambda x: x.softmax(0),
        lambda x: torch.einsum("nm,mtk->ntk", torch.ones(N, N, dtype=x.dtype), x),
        lambda x: 0.7 * x + 0.3 * x[[1, 2, 3, 0]],
        lambda x: F.batch_norm(x.mT, None, None, training=True).mT,
        lambda x: x.cumsum(0),
        lambda x: x[torch.tensor([1, 2, 3, 0])] * x[[2, 3, 0, 1]],
        lambda x: x.flatten(0, 1)[torch.arange(N * T).roll(1)].view_as(x) + x.flatten(0, 1).view_as(x),
        lambda x: (torch.ones(N, N, dtype=x.dtype) @ x.flatten(1)).view_as(x),
        lambda x: x + torch.einsum("nm,mtk->ntk", torch.ones(N, N, dtype=x.dtype), x),
        # Values do not show it, gradients do.
        lambda x: x + torch.fft.fft(0 * x, dim=0).real,
        lambda x: torch.fft.fft(x, dim=0).real,
    ],
)
def test_coupled_examples_are_not_reported(mix: Callable[[Tensor], Tensor]) -> None:
    """Rows that serve several examples refuse the weights that they feed, and no others: what is reported is the truth."""
    model, tokens = setup(TwoLayers)

    def losses() -> Tensor:
        return model.head(mix(torch.tanh(model.first(model.embedding(tokens))))).square().flatten(1).mean(1)

    truth = per_example_gradients(losses(), model, [name for name, _ in model.named_parameters()])
    losses().sum().backward()
    plain = gradients(model)
    model.zero_grad()
    probe = zerosum.Probe(model, gram=True)
    with warnings.catch_warnings(record=True) as caught, probe:
        warnings.simplefilter("always")
        losses().sum().backward()
    torch.testing.assert_close(gradients(model), plain, rtol=1e-11, atol=1e-14)
    report = probe.report()
    assert "head.weight" in report
    assert_truth(report, truth, refusable=True)
    reasons = report.coverage.not_covered
    assert all("coupled before the loss" in reason for reason in reasons.values())
    assert any("coupled before the loss" in str(warning.message) for warning in caught) == bool(reasons)


def test_a_weight_that_overlaps_itself_is_measured_as_it_is() -> None:
    torch.manual_seed(0)

    class Toeplitz(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.band = nn.Parameter(torch.randn(23))

        def forward(self, tokens: Tensor) -> Tensor:
            x = torch.tanh(self.first(self.embedding(tokens)))
            return self.head(F.linear(x, self.band.unfold(0, 12, 1)))

    model, tokens = Toeplitz().double(), torch.randint(0, 11, (N, T))
    truth = per_example_gradients(losses_of(model, tokens), model, [name for name, _ in model.named_parameters()])
    probe = zerosum.Probe(model, gram=True)
    with probe:
        losses_of(model, tokens).sum().backward()
    torch.testing.assert_close(model.band.grad, truth["band"].sum(0), rtol=1e-10, atol=1e-13)
    assert_truth(probe.report(), truth)


@pytest.mark.parametrize("trainable", [True, False])
def test_another_network_in_the_loss_is_everybodys(trainable: bool) -> None:
    """A judge with weights of its own, of any size, keeps the examples apart."""
    model, tokens = setup(TwoLayers)
    judge = nn.ModuleList([nn.Conv1d(5, N, 1), nn.Linear(N, N)]).double().requires_grad_(trainable)

    def losses() -> Tensor:
        return judge[1](judge[0](model(tokens).mT).mT).square().flatten(1).mean(1)

    truth = per_example_gradients(losses(), model, [name for name, _ in model.named_parameters()])
    probe = zerosum.Probe(model, gram=True)
    with probe:
        losses().sum().backward()
    assert_truth(probe.report(), truth)


def test_an_empty_batch_is_a_step_like_any_other() -> None:
    model = TwoLayers()
    nn.utils.parametrizations.weight_norm(model.first)
    with zerosum.Probe(model):
        losses_of(model, torch.zeros(0, T, dtype=torch.long)).sum().backward()
    assert not model.head.weight.grad.any()


def test_a_gradient_that_was_written_to_between_two_batches_is_refused() -> None:
    """The sums of the first share its memory."""
    model, tokens = setup(TwoLayers)
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model, tokens).sum().backward()
        model.zero_grad(set_to_none=False)
        losses_of(model, tokens.flip(0)).sum().backward()
    assert "modified in place between two backward passes" in probe.report().coverage.not_covered["head.weight"]


class Hidden(torch.autograd.Function):
    """A product that no torch function shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w.T, x.flatten(0, 1).T @ grad.flatten(0, 1)


@pytest.mark.parametrize("written", [False, True])
def test_a_hidden_use_is_measured_though_its_input_was_written_to(written: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, 12) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return Hidden.apply(torch.tanh(x), self.w)

    class Model(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.first(self.embedding(tokens)).clone()
            y = self.layer(x)
            return self.head((x.add_(1) if written else x + 1) + y)

    torch.manual_seed(0)
    model, tokens = Model().double(), torch.randint(0, 11, (N, T))
    truth = per_example_gradients(losses_of(model, tokens), model, ["layer.w", "head.weight"])
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model, tokens).sum().backward()
    report = probe.report()
    torch.testing.assert_close(model.layer.w.grad, truth["layer.w"].sum(0), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(report["layer.w"].abs_sum, truth["layer.w"].abs().sum(0), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(report["head.weight"].abs_sum, truth["head.weight"].abs().sum(0), rtol=1e-10, atol=1e-13)


def test_a_head_without_logits_has_plain_gradients_after_the_block() -> None:
    torch.manual_seed(0)
    model, tokens = HeadedTied().double(), torch.randint(0, 211, (N, T))
    model(tokens).sum().backward()
    plain = gradients(model)
    model.zero_grad()
    with zerosum.Probe(model):
        losses = model(tokens)
    losses.sum().backward()
    torch.testing.assert_close(gradients(model), plain, rtol=1e-11, atol=1e-14)


def test_a_tied_weight_is_measured_without_holding_every_gradient() -> None:
    """Not even one tensor is as large as the N gradients."""
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(2003, 8))
    tokens = torch.randint(0, 2003, (N, T))
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
            return result

    model = nn.Module()
    model.register_parameter("table", table)
    probe = zerosum.Probe(model, gram=True)
    with Largest(), probe:
        F.linear(torch.tanh(F.embedding(tokens, table)), table).square().flatten(1).mean(1).sum().backward()
    assert probe.report().coverage.covered == {"table": "embedding + linear"}
    assert N * T * 2003 <= largest < N * table.numel()


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


@pytest.mark.parametrize("between", [Tensor.dim, Tensor.numel, Tensor.is_contiguous, Tensor.size, None])
def test_a_second_backward_through_the_same_graph_is_not_reported_as_one(between: Callable[[Tensor], object] | None) -> None:
    """Nor where it was asked in between what a weight is like, which is no use of it."""
    model, tokens = setup(TwoLayers)
    probe = zerosum.Probe(model)
    with probe:
        losses = losses_of(model, tokens)
        losses.sum().backward(retain_graph=True)
        if between is not None:
            between(model.head.weight)
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
    assert set(report.not_finite) == {"embedding.weight", "first.weight", "first.bias", "head.weight"}
    assert report.metrics["D_grad"].value != report.metrics["D_grad"].value
    assert "NOT FINITE" in str(report)


def test_arguments_are_checked_and_named() -> None:
    model, tokens = setup(TwoLayers)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        zerosum.Probe([])
    with pytest.raises(ValueError, match="examples: expected 'sequence' or 'position', got 'word'"):
        zerosum.Probe(model, examples="word")
    with pytest.raises(ValueError, match=r"loss_reduction: expected 'auto', 'sum', 'mean', or positive denominators .* got 'max'"):
        zerosum.Probe(model, loss_reduction="max")
    with pytest.raises(ValueError, match="num_examples: expected a positive integer, got 0"):
        zerosum.Probe(model, num_examples=0)
    with pytest.raises(TypeError, match="direction: expected a mapping"):
        zerosum.Probe(model, direction=[torch.zeros(3)])
    with pytest.raises(ValueError, match="direction: 'nose' is not a parameter"):
        zerosum.Probe(model, direction={"nose": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"direction\['head.weight'\]: expected a tensor of shape \(5, 12\), got \(3,\)"):
        zerosum.Probe(model, direction={"head.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"loss_reduction: expected .* got 'a tensor of shape \(2,\) that is not all positive"):
        zerosum.Probe(model, loss_reduction=torch.tensor([1.0, 0.0]))
    with pytest.raises(TypeError, match=r"grad_scaler: expected a torch\.amp\.GradScaler, got float"):
        zerosum.Probe(model, grad_scaler=2.0)
    probe = zerosum.Probe(model, direction={"head.weight": torch.zeros(5, 12, dtype=torch.float64)})
    with pytest.raises(ValueError, match="direction: expected one for every covered parameter, got none for embedding"), probe:
        losses_of(model, tokens).sum().backward()
    with pytest.raises(RuntimeError, match="open already"), zerosum.Probe(model), zerosum.Probe(model):
        pass


def test_num_examples_settles_what_the_first_tensor_does_not_tell() -> None:
    """Rows that were flattened before they meet the model say nothing of N, and nothing of whose they are."""
    model, tokens = setup(TwoLayers)

    def flat_first(tokens: Tensor) -> Tensor:
        x = model.embedding(tokens.flatten()).unflatten(0, tokens.shape)
        return model.head(torch.tanh(model.first(x))).square().flatten(1).mean(1)

    truth = per_example_gradients(flat_first(tokens), model, ["head.weight", "first.weight"])
    probe = zerosum.Probe(model, num_examples=N)
    with probe:
        flat_first(tokens).sum().backward()
    assert probe.report().num_examples == N
    for name, g in truth.items():
        torch.testing.assert_close(probe.report()[name].abs_sum, g.abs().sum(0), rtol=1e-10, atol=1e-14)


def test_packed_sequences_are_told_apart_by_example_ids() -> None:
    model, _ = setup(TwoLayers)
    lengths = torch.tensor([3, 5, 1, 4])
    ids, tokens = torch.arange(4).repeat_interleave(lengths), torch.randint(0, 11, (13,))

    def losses() -> Tensor:
        per_row = model(zerosum.example_ids(tokens, ids)).square().sum(1)
        return per_row.new_zeros(4).index_add(0, ids, per_row)

    truth = per_example_gradients(losses(), model, [n for n, _ in model.named_parameters()])
    direction = direction_for(model)
    probe = zerosum.Probe(model, direction=direction, gram=True, num_examples=4)
    with probe:
        losses().sum().backward()
    assert_truth(probe.report(), truth, direction)
    with zerosum.Probe(model, num_examples=4), pytest.raises(ValueError, match=r"ids: expected values in \[0, 4\), got 0 to 4"):
        zerosum.example_ids(tokens, ids + (ids == 3))
    with (
        zerosum.Probe(model, num_examples=4),
        pytest.raises(ValueError, match=r"ids: expected 13 integers, .* got torch.int64 \(4,\)"),
    ):
        zerosum.example_ids(tokens, lengths)
    with (probe := zerosum.Probe(model, direction=direction, gram=True)):  # the ids say how many there are
        losses().sum().backward()
    assert_truth(probe.report(), truth, direction)


class Headed(TwoLayers):
    """Ends in zk.linear_cross_entropy, whose weight may be the embedding's."""

    tied = False

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(211, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 211, bias=False)
        if self.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        targets = tokens.roll(1, 1).masked_fill(tokens % 5 == 0, -100)
        x = torch.tanh(self.first(self.embedding(tokens)))
        return zk.linear_cross_entropy(x, self.head.weight, targets, vocabulary_chunk=64)


class HeadedTied(Headed):
    tied = True


@pytest.mark.parametrize("kind", [Headed, HeadedTied])
@pytest.mark.parametrize("examples", ["sequence", "position"])
def test_a_head_without_logits_is_the_head_with_them(kind: type[Headed], examples: str) -> None:
    torch.manual_seed(0)
    model, tokens = kind().double(), torch.randint(0, 211, (N, T))
    direction = direction_for(model)

    def logits(tokens: Tensor) -> Tensor:
        targets = tokens.roll(1, 1).masked_fill(tokens % 5 == 0, -100)
        x = model.head(torch.tanh(model.first(model.embedding(tokens))))
        return F.cross_entropy(x.movedim(-1, 1), targets, reduction="none")

    reports = []
    for losses in (model, logits):
        model.zero_grad()
        probe = zerosum.Probe(model, examples=examples, direction=direction, gram=True)
        with probe:
            losses(tokens).sum().backward()
        reports.append((probe.report(), gradients(model)))
    (report, grads), (plain, plain_grads) = reports
    assert "linear_cross_entropy" in report.coverage.covered["embedding.weight" if kind.tied else "head.weight"]
    assert set(report) == set(plain)
    torch.testing.assert_close(grads, plain_grads, rtol=1e-10, atol=1e-13)
    for name in report:
        for field in ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm", "dot", "abs_dot", "gram"):
            found, expected = getattr(report[name], field), getattr(plain[name], field)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=f"{name}.{field}")
