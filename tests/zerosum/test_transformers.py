"""The probe on real transformer architectures, against one backward pass for each example; every parameter must be covered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerosum
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
from tests.zerosum.transformers_models import ARCHITECTURES, Architecture

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
# (N, T): T != N, and T == N, where a mistaken dimension fits all the same.
SIZES = [(3, 7), (4, 4)]


def tolerance(architecture: Architecture, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 1e-5
    return 1e-6 if architecture.rounds else 1e-9


def probed(
    architecture: Architecture, model: nn.Module, inputs: dict[str, Tensor], per_token: str = "sum", **options: Any
) -> zerosum.Report:
    """The report of the pass after which a probe goes by what it knows."""
    probe = zerosum.Probe(model, **options)
    for _ in range(PASSES):
        model.zero_grad()
        with probe:
            architecture.losses(model, inputs, per_token).sum().backward()
    return probe.report()


@pytest.mark.parametrize(("n", "t", "per_token"), [(*SIZES[0], "sum"), (*SIZES[1], "mean")])
@architectures
def test_every_field_of_every_parameter_is_the_truth(architecture: Architecture, n: int, t: int, per_token: str) -> None:
    model, inputs = architecture.model(architecture.dtype), architecture.inputs(n, t)
    truth = per_example_gradients(architecture.losses(model, inputs, per_token), model, trainable(model))
    direction = direction_for(model)
    report = probed(architecture, model, inputs, per_token, direction=direction, gram=True)
    assert report.num_examples == n
    rtol = tolerance(architecture, architecture.dtype)
    assert_truth(report, truth, direction, rtol=rtol, vanishing=architecture.vanishing)
    assert_covers(report, model, truth)


@architectures
def test_float32_models_are_measured_to_rounding(architecture: Architecture) -> None:
    """The truth is of the same float32 model, so that the model's own rounding is in both."""
    model, inputs = architecture.model(torch.float32), architecture.inputs(*SIZES[0])
    truth = per_example_gradients(architecture.losses(model, inputs), model, trainable(model))
    direction = direction_for(model)
    report = probed(architecture, model, inputs, direction=direction, gram=True)
    assert_truth(report, truth, direction, rtol=tolerance(architecture, torch.float32), vanishing=architecture.vanishing)


@architectures
def test_the_step_is_the_plain_one_and_the_model_stays_as_it_was(architecture: Architecture) -> None:
    model, inputs = architecture.model(architecture.dtype), architecture.inputs(*SIZES[0])
    plain = architecture.losses(model, inputs)
    plain.sum().backward()
    plain_gradients, before = gradients(model), snapshot(model)
    model.zero_grad()
    with zerosum.Probe(model, gram=True):
        watched = architecture.losses(model, inputs)
        watched.sum().backward()
    assert_unchanged(snapshot(model), before)
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    rtol, largest = tolerance(architecture, architecture.dtype), max(g.norm().item() for g in plain_gradients.values())
    for name, g in gradients(model).items():
        scale = largest if name.endswith(architecture.vanishing) and architecture.vanishing else plain_gradients[name].norm().item()
        assert (g - plain_gradients[name]).norm().item() <= rtol * scale, name


def test_a_tied_parameter_is_reported_once_and_answers_to_both_names() -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == "gpt2-eager")
    model, inputs = architecture.model(), architecture.inputs(*SIZES[0])
    report = probed(architecture, model, inputs)
    assert "transformer.wte.weight" in list(report)
    assert "lm_head.weight" not in list(report)
    assert report["lm_head.weight"] is report["transformer.wte.weight"]


@pytest.mark.parametrize(("experts", "dtype"), [("batched_mm", torch.float64), ("grouped_mm", torch.float32)])
def test_the_implementations_of_experts_agree(experts: str, dtype: torch.dtype) -> None:
    """The eager experts' truth in float64 is that of the other implementations too, whose graphs have nothing in common with it."""
    eager, other = (next(a for a in ARCHITECTURES if a.name == f"mixtral-{name}") for name in ("eager", experts))
    model, inputs = eager.model(), eager.inputs(*SIZES[0])
    truth = per_example_gradients(eager.losses(model, inputs), model, trainable(model))
    report = probed(other, other.model(dtype), inputs)
    # The float32 model's own rounding, through two layers and back, is in this difference.
    assert_truth(report, truth, rtol=1e-6 if dtype == torch.float64 else 1e-4, gram=False)


@pytest.mark.parametrize("name", ["gpt2-sdpa-left-padded", "llama-eager-padded", "bert-sdpa-padded", "t5-relu-padded"])
def test_padding_changes_nothing_that_an_example_alone_would_not_show(name: str) -> None:
    """The truth of each example by itself, in a batch of one: what pads the others adds nothing to it."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, inputs = architecture.model(), architecture.inputs(*SIZES[0])
    alone = []
    for i in range(SIZES[0][0]):
        losses = architecture.losses(model, {key: x[i : i + 1] for key, x in inputs.items()})
        alone.append(per_example_gradients(losses, model, trainable(model)))
    truth = {name: torch.cat([g[name] for g in alone]) for name in trainable(model)}
    report = probed(architecture, model, inputs)
    rtol = tolerance(architecture, torch.float64)
    assert_truth(report, truth, rtol=rtol, gram=False, vanishing=architecture.vanishing)
