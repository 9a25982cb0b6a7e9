"""Loss changes: of a real step, between checkpoints, and to first order, against one backward pass per token and differences."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zsl_kernels as zk
from tests.zerosum.oracle import assert_unchanged, per_example_gradients, snapshot
from tests.zerosum.transformers_models import ARCHITECTURES, Architecture
from zerosum import Probe
from zerosum.changes import IGNORED, Step, between, evaluate, first_order_changes, first_order_metrics
from zerosum.metrics import number_interference
from zerosum.training.model import GPT, GPTConfig, token_losses

CONFIG = GPTConfig(vocab=17, width=16, layers=2, heads=2, positions=9)


class Dropping(nn.Module):
    """Dropout, random numbers in eval mode too, a tied head, a norm with scale, a buffer, frozen parameters and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 8)
        self.norm = nn.LayerNorm(8)
        self.layer = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(8, 17, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("gain", torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        x = F.dropout(self.layer(x.cumsum(1)).tanh(), 0.3, self.training) + 0 * torch.rand(())
        return self.head(self.frozen(x) * self.gain)


def gpt(dtype: torch.dtype = torch.float64, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    with torch.no_grad():
        model.head.weight.mul_(10)
    return model.to(dtype)


def dropping(dtype: torch.dtype = torch.float64) -> Dropping:
    torch.manual_seed(1)
    return Dropping().to(dtype).train()


def batch(n: int = 5, t: int = 7, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 17, (n, t), generator=generator), torch.randint(0, 17, (n, t), generator=generator)


def random_update(model: nn.Module, size: float = 1.0, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def moved(model: nn.Module, update: dict[str, Tensor], by: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, u in update.items():
            other.get_parameter(name).add_(u, alpha=by)
    return other


def dots(losses: Tensor, model: nn.Module, update: dict[str, Tensor]) -> Tensor:
    """Σ_j g_ij Δ_j from one backward pass per token."""
    g = per_example_gradients(losses.flatten(), model, update)
    return sum(g[name].flatten(1).double() @ update[name].flatten().double() for name in update).view(losses.shape)  # type: ignore


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


# To first order.


@pytest.mark.parametrize("build", [gpt, dropping])
@pytest.mark.parametrize("micro_batch", [None, 1, 2, 99])
def test_first_order_changes_are_those_of_one_backward_per_token(build: Any, micro_batch: int | None) -> None:
    model, (x, y) = build(), batch()
    update = random_update(model)
    before = snapshot(model)
    found = first_order_changes(model, x, y, update, micro_batch=micro_batch)
    assert_unchanged(snapshot(model), before)
    assert not found.requires_grad
    model.eval()
    assert_close(found, dots(token_losses(model, x, y), model, update), 1e-12)


@pytest.mark.parametrize("build", [gpt, dropping])
def test_first_order_changes_are_the_limit_of_finite_differences(build: Any) -> None:
    model, (x, y) = build(), batch()
    update = random_update(model)
    h = 1e-5
    ahead, behind = (evaluate(moved(model, update, by), x, y) for by in (h, -h))
    assert_close(first_order_changes(model, x, y, update), (ahead - behind) / (2 * h), 1e-7)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if "grouped" not in a.name], ids=lambda a: a.name)
def test_first_order_changes_of_transformers(architecture: Architecture) -> None:
    model, inputs = architecture.model().eval(), architecture.inputs(3, 7)
    targets = inputs["targets"]
    mine = torch.arange(3)[:, None].expand(targets.shape)  # which sequences a micro-batch has

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        some = {name: value[x[:, 0]] for name, value in inputs.items() if name != "targets"}
        output = model(**some)
        logits = output if isinstance(output, Tensor) else output.logits
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="none").view(y.shape)

    update = random_update(model)
    found = first_order_changes(model, mine, targets, update, losses=losses, micro_batch=2)
    assert_close(found, dots(losses(model, mine, targets), model, update), 1e-6 if architecture.rounds else 1e-12)


def test_an_operation_without_forward_derivative_is_named() -> None:
    model, (x, y) = gpt(torch.float32), batch()

    def fused(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return zk.linear_cross_entropy(model.embedding(x), model.head.weight, y)

    with pytest.raises(NotImplementedError, match=r"ops\.linear_cross_entropy\._LinearCrossEntropy has no forward-mode"):
        first_order_changes(model, x, y, random_update(model), losses=fused)
    architecture = next(a for a in ARCHITECTURES if a.name == "mixtral-grouped_mm")
    inputs = architecture.inputs(3, 7)

    def experts(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return token_losses(lambda tokens: model(tokens).logits, x, y)  # type: ignore[arg-type]

    mixtral = architecture.model(torch.float32)
    before = snapshot(mixtral)
    with pytest.raises(NotImplementedError, match="first_order_changes: _grouped_mm has no forward-mode derivative"):
        first_order_changes(mixtral, inputs["input_ids"], inputs["targets"], random_update(mixtral), losses=experts)
    assert_unchanged(snapshot(mixtral), before)


def test_a_parameter_without_update_stands_still_and_aliases_are_one() -> None:
    model, (x, y) = dropping(), batch()
    update = random_update(model)
    some = {"layer.bias": update["layer.bias"]}
    model.eval()
    assert_close(first_order_changes(model, x, y, some), dots(token_losses(model, x, y), model, some), 1e-12)
    tied = first_order_changes(model, x, y, {"head.weight": update["embedding.weight"]})
    assert torch.equal(tied, first_order_changes(model, x, y, {"embedding.weight": update["embedding.weight"]}))
    assert not first_order_changes(model, x, y, {"unused": torch.ones(3)}).any()


def test_first_order_changes_at_other_weights() -> None:
    model, (x, y) = gpt(), batch()
    update = random_update(model, 0.1)
    there = moved(model, update, 1.0)
    at = {name: p.detach() for name, p in there.named_parameters()}
    assert torch.equal(first_order_changes(model, x, y, update, at=at), first_order_changes(there, x, y, update))


def test_of_a_small_update_the_first_order_changes_are_the_true_ones() -> None:
    model, (x, y) = gpt(), batch()
    update = random_update(model, 1e-6)
    changes = evaluate(moved(model, update, 1.0), x, y) - evaluate(model, x, y)
    found = first_order_metrics(changes, first_order_changes(model, x, y, update))
    assert found["first_order.relative_error"].value < 1e-4
    assert found["first_order.sign_agreement"].value == 1
    assert found["first_order.correlation"].value == pytest.approx(1)
    assert found["first_order.C"].n == 35


def test_the_comparison_is_its_definition_and_its_nulls_are_what_random_signs_give() -> None:
    generator = torch.Generator().manual_seed(4)
    true = torch.randn(40, generator=generator, dtype=torch.float64)
    linear = true + torch.randn(40, generator=generator, dtype=torch.float64)
    true[:3] = linear[2:6] = 0
    found = first_order_metrics(true, linear)
    assert found["first_order.relative_error"].value == pytest.approx(((true - linear).norm() / true.norm()).item())
    assert found["first_order.sign_agreement"].value == (true.sign() == linear.sign()).double().mean()
    assert found["first_order.correlation"].value == pytest.approx(np.corrcoef(true, linear)[0, 1])
    assert {name: m for name, m in found.items() if name[-2:] in (".C", ".D", ".M")} == {
        f"first_order.{name}": m for name, m in number_interference(linear).items() if name != "mean"
    }
    signs = torch.randint(0, 2, (4000, 40), generator=generator).double() * 2 - 1
    drawn = [first_order_metrics(true * s, linear) for s in signs]
    for name in ("relative_error", "sign_agreement", "correlation"):
        values = np.array([metrics[f"first_order.{name}"].value for metrics in drawn])
        noise = 4 * values.std() / math.sqrt(len(drawn))
        assert values.mean() == pytest.approx(found[f"first_order.{name}"].null, rel=0.01, abs=noise), name


def test_the_comparison_of_nothing_and_of_nan_is_no_number() -> None:
    zero = first_order_metrics(torch.zeros(4), torch.zeros(4))
    assert math.isnan(zero["first_order.relative_error"].value)
    assert zero["first_order.sign_agreement"].value == zero["first_order.sign_agreement"].null == 1
    broken = first_order_metrics(torch.tensor([1.0, math.nan]), torch.ones(2))
    assert all(math.isnan(broken[f"first_order.{name}"].value) for name in ("relative_error", "sign_agreement", "correlation"))
    ignored = first_order_metrics(torch.tensor([1.0, 9.0, 2.0]), torch.tensor([1.0, -5.0, 2.0]), torch.tensor([3, IGNORED, 4]))
    assert ignored["first_order.relative_error"].value == 0
    assert ignored["first_order.M"].n == 2


# One step.


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    token_losses(model, x, y).mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


@pytest.mark.parametrize("build", [gpt, dropping])
def test_a_step_is_measured_and_stays_what_it_is_without(build: Any) -> None:
    model, plain = build(), build()
    (x, y), (x2, y2) = batch(), batch(3, 8, seed=5)
    old = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, plain)]
    torch.manual_seed(6)
    train(plain, optimizers[1], x, y)
    after_plain = torch.get_rng_state()
    torch.manual_seed(6)
    before = snapshot(model)
    with Step(model, {"train": (x, y), "held_out": (x2, y2)}, micro_batch=2) as step:
        assert_unchanged(snapshot(model), before)
        train(model, optimizers[0], x, y)
    assert torch.equal(torch.get_rng_state(), after_plain)
    assert model.training
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)

    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert step.update.keys() == step.weights.keys() == trainable
    for name in trainable:
        assert torch.equal(step.weights[name], old.get_parameter(name))
        assert torch.equal(step.update[name], model.get_parameter(name) - old.get_parameter(name))
    old.eval(), plain.eval()
    for name, tokens in (("train", (x, y)), ("held_out", (x2, y2))):
        first, last = token_losses(old, *tokens).detach(), token_losses(plain, *tokens).detach()
        torch.testing.assert_close(step.before[name], first, rtol=1e-12, atol=0)
        torch.testing.assert_close(step.after[name], last, rtol=1e-12, atol=0)
        assert step.metrics[f"{name}.loss"].value == pytest.approx(first.mean().item())
        for key, metric in number_interference(last - first).items():
            assert step.metrics[f"{name}.{key}"].value == pytest.approx(metric.value)
            assert step.metrics[f"{name}.{key}"].n == tokens[0].numel()
            assert step.metrics[f"{name}.{key}"].null == (None if metric.null is None else pytest.approx(metric.null))
    assert step.metrics["train.mean"].value < 0


def test_the_first_order_changes_of_a_small_step_are_the_measured_ones() -> None:
    model, (x, y) = gpt(), batch()
    with Step(model, {"train": (x, y)}) as step:
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-6), x, y)
    linear = first_order_changes(model, x, y, step.update, at=step.weights)
    assert first_order_metrics(step.after["train"] - step.before["train"], linear)["first_order.relative_error"].value < 1e-3


def test_the_update_of_low_precision_parameters_is_the_one_that_was_applied() -> None:
    model, (x, y) = gpt(torch.bfloat16), batch()
    old = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="losses are computed in bfloat16; .* less than their rounding"):
        step = Step(model, {"train": (x, y)}).__enter__()
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), x, y)
    step.__exit__(None)
    for name, u in step.update.items():
        assert u.dtype == torch.float32
        assert torch.equal(u, model.get_parameter(name).float() - old.get_parameter(name).float())
    assert first_order_changes(model, x, y, step.update, at=step.weights).isfinite().all()


def test_autocast_that_stays_open_over_the_step_hides_nothing() -> None:
    model, (x, y) = gpt(torch.float32), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = [evaluate(model, x, y)]
        with pytest.warns(UserWarning, match="losses are computed in bfloat16"), Step(model, {"train": (x, y)}) as step:
            train(model, torch.optim.SGD(model.parameters(), lr=1.0), x, y)
        assert all(p.grad is not None for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        expected.append(evaluate(model, x, y))
    assert not torch.equal(step.before["train"], evaluate(gpt(torch.float32), x, y))  # rounded
    assert torch.equal(step.before["train"], expected[0])
    assert torch.equal(step.after["train"], expected[1])
    assert not torch.equal(*expected)


def test_autocast_inside_of_the_block_leaves_the_losses_in_float32() -> None:
    model, (x, y) = gpt(torch.float32), batch()
    with Step(model, {"train": (x, y)}) as step, torch.autocast("cpu", torch.bfloat16):
        train(model, torch.optim.SGD(model.parameters(), lr=1e-3), x, y)
    assert torch.equal(step.before["train"], evaluate(gpt(torch.float32), x, y))
    assert torch.equal(step.after["train"], evaluate(model, x, y))


class Averaging(nn.Module):
    """With a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(17, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 17)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).cumsum(1)
        return self.head(self.norm(x.flatten(0, 1)).view(x.shape))


def test_running_averages_that_move_are_no_part_of_the_change() -> None:
    model, (x, y), (x2, y2) = Averaging(), batch(), batch(3, 8, seed=5)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with Step(model, {"held_out": (x2, y2)}) as step:
        train(model, torch.optim.SGD(model.parameters(), lr=1e-4), x, y)
    assert step.weights.keys() - step.update.keys() == buffers.keys()
    assert not torch.equal(model.norm.running_mean, buffers["norm.running_mean"])
    changes = step.after["held_out"] - step.before["held_out"]
    linear = first_order_changes(model, x2, y2, step.update, at=step.weights)
    assert first_order_metrics(changes, linear)["first_order.relative_error"].value < 1e-2


def test_a_step_goes_around_a_probe() -> None:
    model, (x, y) = gpt(), batch()
    probe = Probe(model, loss_reduction="mean")
    with Step(model, {"train": (x, y)}) as step, probe:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    assert probe.report().num_examples == 5
    assert probe.report().coverage.share == 1
    assert step.metrics["train.M"].value > 0


@pytest.mark.parametrize("steps", [0, 1])
def test_a_step_that_changes_nothing_is_refused(steps: int) -> None:
    model, (x, y) = gpt(), batch()
    step = Step(model, {"train": (x, y)}).__enter__()
    for _ in range(steps):
        train(model, torch.optim.AdamW(model.parameters(), lr=0.0), x, y)
    with pytest.raises(RuntimeError, match=r"the step changed no parameter.* learning rate was 0"):
        step.__exit__(None)


def test_an_exception_in_the_block_comes_through() -> None:
    model, (x, y) = gpt(), batch()
    with pytest.raises(ZeroDivisionError), Step(model, {"train": (x, y)}):
        _ = 1 // 0


def test_ignored_tokens_are_no_examples() -> None:
    model, (x, y) = gpt(), batch()
    y[:, -2:] = IGNORED
    with Step(model, {"train": (x, y)}) as step:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    changes = (step.after["train"] - step.before["train"])[:, :-2]
    assert step.metrics["train.M"].n == step.metrics["train.loss"].n == 25
    assert step.metrics["train.M"].value == pytest.approx(changes.abs().mean().item())
    assert step.metrics["train.loss"].value == pytest.approx(step.before["train"][:, :-2].mean().item())


# Between checkpoints.


@pytest.mark.parametrize("build", [gpt, dropping])
def test_the_change_between_two_checkpoints(build: Any) -> None:
    model, (x, y) = build(), batch()
    first, last = (moved(model, random_update(model), by) for by in (0.1, 0.3))
    before = snapshot(model)
    found = between(model, first.state_dict(), last.state_dict(), x, y, micro_batch=2)
    assert_unchanged(snapshot(model), before)
    first.eval(), last.eval()
    losses = [token_losses(m, x, y).detach() for m in (first, last)]
    torch.testing.assert_close([found.before, found.after], losses, rtol=1e-12, atol=1e-14)
    assert found.metrics.keys() == {"interval.C", "interval.D", "interval.M", "interval.mean"}
    assert found.metrics["interval.M"].value == pytest.approx((losses[1] - losses[0]).abs().mean().item())
    assert found.metrics["interval.D"].n == 35


def test_a_checkpoint_s_buffers_count_too() -> None:
    model, (x, y) = dropping(), batch()
    last = copy.deepcopy(model)
    last.gain.fill_(2.0)
    assert between(model, model.state_dict(), last.state_dict(), x, y).metrics["interval.M"].value > 0


def test_bad_arguments_are_named() -> None:
    model, (x, y) = dropping(), batch()
    state = model.state_dict()
    update = random_update(model)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        evaluate([], x, y)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        Step([], {"train": (x, y)})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"losses: expected a function of \(model, x, y\), got int"):
        evaluate(model, x, y, losses=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got list"):
        evaluate(model, [1], y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: expected at least one token, of shape \(N, T\), got \(0, 7\)"):
        evaluate(model, x[:0], y[:0])
    with pytest.raises(ValueError, match=r"y: expected shape \(5, 7\) as x, got \(5, 6\)"):
        evaluate(model, x, y[:, 1:])
    with pytest.raises(ValueError, match="micro_batch: expected a positive integer or None, got 0"):
        evaluate(model, x, y, micro_batch=0)
    with pytest.raises(
        ValueError, match=r"losses: expected a function that returns one loss per token, shape \(5, 7\) like y, got \(5,\)"
    ):
        evaluate(model, x, y, losses=lambda m, x, y: token_losses(m, x, y).mean(1))
    with pytest.raises(ValueError, match="update: 'what' is neither a parameter nor a buffer"):
        first_order_changes(model, x, y, {"what": x})
    with pytest.raises(ValueError, match="update: expected names of parameters, got the buffer 'gain'"):
        first_order_changes(model, x, y, {"gain": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"update\['layer.bias'\]: expected a tensor of shape \(8,\), got \(3,\)"):
        first_order_changes(model, x, y, update | {"layer.bias": torch.ones(3)})
    with pytest.raises(TypeError, match="at: expected a mapping from names to tensors, got list"):
        first_order_changes(model, x, y, update, at=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"after: expected a value for every parameter of the model, got none for unused"):
        between(model, state, {name: value for name, value in state.items() if name != "unused"}, x, y)
    with pytest.raises(
        ValueError, match=r"before\['head.weight'\]: expected the values of 'embedding.weight', to which it is tied"
    ):
        between(model, {**state, "head.weight": state["head.weight"] + 1}, state, x, y)
    with pytest.raises(TypeError, match=r"data: expected a mapping from names to batches .* got an empty one"):
        Step(model, {})
    with pytest.raises(TypeError, match=r"data\['train'\]: expected a pair of tensors \(x, y\), got Tensor"):
        Step(model, {"train": x})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"first_order: expected shape \(2,\) as changes, got \(3,\)"):
        first_order_metrics(torch.ones(2), torch.ones(3))
