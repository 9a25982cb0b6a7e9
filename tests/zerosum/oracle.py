"""The truth for a probe: one backward pass for each example; and what a report is held to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import zerosum
from tests.inputs import sums_of

# Passes of one probe after which it goes by what it knows: the first is proved, the second finds which weights are used once.
PASSES = 3
TOTALS = ("l1", "sq_norm", "dot", "abs_dot", "gram")
# What a report may say of a parameter that no loss depends on, in place of zeros.
UNREACHED = ("no gradient reached it", "not used")


def per_example_gradients(losses: Tensor, model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """(N, *parameter.shape) for each name; zeros where a loss does not depend on the parameter."""
    names = list(names)
    parameters = [model.get_parameter(name) for name in names]
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return {
        name: torch.stack([torch.zeros_like(parameters[k]) if row[k] is None else row[k] for row in rows])
        for k, name in enumerate(names)
    }


def trainable(model: nn.Module) -> list[str]:
    """The names that a report goes by: the first of each parameter's."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def direction_for(model: nn.Module) -> dict[str, Tensor]:
    """A random direction for every trainable parameter."""
    return {name: torch.randn_like(model.get_parameter(name)) for name in trainable(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """What the step left in ``.grad``."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: Tensor | None, expected: Tensor, scale: float | None = None) -> float:
    """‖found − expected‖ / ‖expected‖, or of a given norm; infinite for another shape or where only one of them is zero or NaN."""
    if found is None or found.shape != expected.shape:
        return float("inf")
    distance = (found.detach().double() - expected.double()).norm().item()
    scale = expected.double().norm().item() if scale is None else scale
    if distance == 0:
        return 0.0
    return distance / scale if scale > 0 and distance == distance else float("inf")


def assert_truth(
    report: zerosum.Report,
    truth: dict[str, Tensor],
    direction: dict[str, Tensor] | None = None,
    *,
    rtol: float = 1e-9,
    gram: Tensor | bool = True,
    vanishing: tuple[str, ...] = (),
    refusable: bool = False,
) -> None:
    """Every field of every parameter and every total against the truth, (N, *parameter.shape) for each trainable parameter.

    Errors are relative to the norm of the field; for parameters with a name that ends in one of ``vanishing``, whose true gradient
    is zero, to the largest norm of the field among parameters. ``gram`` says which entries there must be, (N, N), others being NaN:
    True for all, and False where the probe was not asked for any. A parameter may be missing if no loss depends on it and the
    report says so; with ``refusable`` any may, and the totals are those of the others.
    """
    expected = {name: sums_of(g.double(), _double(direction, name)) for name, g in truth.items()}
    largest = {field: max(fields[field].norm().item() for fields in expected.values()) for field in next(iter(expected.values()))}
    if gram is False:
        assert report.gram is None
    totals = dict.fromkeys(TOTALS, 0.0)
    wrong = []
    for name, fields in expected.items():
        if name not in report:
            reason = report.coverage.not_covered[name]
            assert refusable or (reason.startswith(UNREACHED) and not truth[name].any()), f"{name} is not covered: {reason}"
            continue
        scale = largest if name.endswith(vanishing) and vanishing else {}
        for field, value in fields.items():
            found = getattr(report[name], field)
            if field == "gram":
                if gram is False:
                    assert found is None, name
                    continue
                found = _present(found, gram)
                value = value * gram
            if field in totals:
                totals[field] = totals[field] + value
            if not (e := error(found, value, scale.get(field))) <= rtol:
                wrong.append(f"{name}.{field}: {e:.1e}")
    for field, value in totals.items():
        if isinstance(value, Tensor):
            found = getattr(report, field)
            if not (e := error(_present(found, gram) if field == "gram" else found, value)) <= rtol:
                wrong.append(f"total {field}: {e:.1e}")
    assert not wrong, f"relative errors above {rtol:.0e}: {', '.join(wrong)}"


def assert_covers(report: zerosum.Report, model: nn.Module, truth: dict[str, Tensor]) -> None:
    """All that a loss depends on is covered; of every trainable parameter something is said, once, and every alias answers."""
    coverage = report.coverage
    reached = {name for name, g in truth.items() if g.any()}
    missing = {name: reason for name, reason in coverage.not_covered.items() if name in reached}
    assert not missing
    assert sorted([*coverage.covered, *coverage.not_covered]) == sorted(trainable(model))
    if not coverage.not_covered:
        assert coverage.share == 1
    names = {parameter: name for name, parameter in model.named_parameters()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        if names[parameter] in coverage.covered:
            assert report[alias] is report[names[parameter]]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a measurement must leave as it was, apart from ``.grad``: attributes, hooks, parameters, random numbers, modes."""
    return {
        "modules": {name: _attributes(module) for name, module in model.named_modules(remove_duplicate=False)},
        "parameters": {name: _identity(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "values": {name: x.clone() if isinstance(x, Tensor) else x for name, x in model.state_dict().items()},
        "random": torch.get_rng_state().clone(),
        "modes": [*torch.overrides._get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()],
        "hooks": {
            name: len(h) for name, h in vars(nn.modules.module).items() if name.startswith("_global") and isinstance(h, dict)
        },
        "grad mode": torch.is_grad_enabled(),
    }


def assert_unchanged(after: dict[str, Any], before: dict[str, Any]) -> None:
    for key in ("modules", "parameters", "modes", "hooks", "grad mode"):
        assert after[key] == before[key], key
    assert torch.equal(after["random"], before["random"]), "the probe drew random numbers"
    torch.testing.assert_close(after["values"], before["values"], rtol=0, atol=0, equal_nan=True)


def _double(direction: dict[str, Tensor] | None, name: str) -> Tensor | None:
    return None if direction is None else direction[name].double()


def _present(gram: Tensor | None, present: Tensor | bool) -> Tensor | None:
    """The Gram with zeros for entries that there need not be; infinities where they are not NaN."""
    if gram is None or not isinstance(present, Tensor) or gram.shape != present.shape:
        return gram
    return torch.where(present, gram, torch.where(gram.isnan(), 0.0, torch.inf))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        key: (id(value), sorted(value) if key.startswith("_") and isinstance(value, dict) else None)
        for key, value in vars(module).items()
    } | {"": type(module)}


def _identity(parameter: nn.Parameter) -> tuple[Any, ...]:
    hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    return id(parameter), type(parameter), parameter._version, parameter.requires_grad, *(len(h or ()) for h in hooks)
