"""A training step with a probe, held to one backward pass for each example and to the step without a probe."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

import zerosum
from tests.zerosum.oracle import PASSES, assert_truth, direction_for, gradients, trainable

SEED = 7


@contextmanager
def quiet() -> Iterator[None]:
    """No warning is an error: where parameters are refused the probe may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def square_losses(output: Tensor) -> Tensor:
    """(N,) losses of outputs (N, …)."""
    return output.square().flatten(1).mean(1)


def truth_of(model: nn.Module, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
    """(N, *parameter.shape) for each trainable parameter, by one backward pass for each of the losses (N,).

    Not by ``torch.autograd.grad``, which reentrant checkpoints do not allow.
    """
    kept = {name: p.grad for name, p in model.named_parameters()}
    rows: dict[str, list[Tensor]] = {name: [] for name in trainable(model)}
    torch.manual_seed(SEED)
    for loss in losses():
        model.zero_grad()
        loss.backward(retain_graph=True)
        for name, parts in rows.items():
            p = model.get_parameter(name)
            parts.append(torch.zeros_like(p) if p.grad is None else p.grad.detach().clone())
    for name, p in model.named_parameters():
        p.grad = kept[name]
    return {name: torch.stack(parts) for name, parts in rows.items()}


def check(
    model: nn.Module,
    losses: Callable[[], Tensor],
    step: Callable[[], None] | None = None,
    *,
    refused: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    factors: tuple[float, ...] = (1.0,),
    rtol: float = 1e-9,
    gram: Tensor | bool = True,
    vanishing: tuple[str, ...] = (),
    directed: bool = True,
    **options: object,
) -> zerosum.Report:
    """Runs ``step``, by default the backward pass of the sum of ``losses``, and holds its report to the truth of ``losses``.

    Parameters whose names begin with one of ``refused`` must not be covered, those of ``optional`` may be missing, and all others
    that a loss depends on must be covered. ``factors`` lists what the losses may be multiplied by: more than one where the
    definition of the examples' losses leaves a choice. Without ``directed`` no inner products with a direction are measured: those
    of one example may cancel, and leave the rounding of a model that computes in float32. A warning is an error unless something
    may be refused.
    """

    def run() -> None:
        torch.manual_seed(SEED)
        if step is None:
            losses().sum().backward()
        else:
            step()

    model.zero_grad()
    truth, direction = truth_of(model, losses), direction_for(model) if directed else None
    run()
    plain = gradients(model)
    if step is None:
        assert_gradients({name: truth[name].sum(0) for name in plain}, plain, rtol, vanishing)
    probe = zerosum.Probe(model, direction=direction, gram=True, **options)  # type: ignore[arg-type]
    n = len(next(iter(truth.values())))
    for _ in range(PASSES):
        model.zero_grad()
        with quiet() if refused or optional else nullcontext(), probe:
            run()
        report = probe.report()
        assert_gradients(gradients(model), plain, rtol, vanishing)
        assert report.num_examples == n, f"{report.num_examples} examples, not {n}"
        assert_coverage(report, model, truth, refused, optional)
        assert_one_truth(report, truth, direction, factors, rtol=rtol, gram=gram, vanishing=vanishing)
    return report


def check_or_told(
    model: nn.Module,
    losses: Callable[[], Tensor],
    step: Callable[[], None] | None = None,
    *,
    rtol: float = 1e-9,
    argument: str = "",
) -> None:
    """As :func:`check`, where the probe is not told what the examples are: it finds out, or says that something is missing, in
    words that have ``argument``, such as the name of what would tell."""
    truth = truth_of(model, losses)
    model.zero_grad()
    torch.manual_seed(SEED)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with (probe := zerosum.Probe(model, gram=True)):
            if step is None:
                losses().sum().backward()
            else:
                step()
    report = probe.report()
    if len(report) and report.num_examples == len(next(iter(truth.values()))):
        assert_one_truth(report, truth, None, (1.0,), rtol=rtol)
    else:
        assert any(argument in str(warning.message) for warning in said), f"{report.num_examples} examples, without a word"


def assert_gradients(found: dict[str, Tensor], plain: dict[str, Tensor], rtol: float, vanishing: tuple[str, ...] = ()) -> None:
    """The same gradients to rounding, which is judged by the norm of each, and by the largest where it vanishes."""
    assert found.keys() == plain.keys()
    largest = max((g.norm().item() for g in plain.values()), default=0.0)
    for name, g in plain.items():
        scale = largest if vanishing and name.endswith(vanishing) else g.norm().item()
        assert (found[name] - g).norm().item() <= rtol * scale + 1e-3 * rtol * largest, name


def assert_coverage(
    report: zerosum.Report, model: nn.Module, truth: dict[str, Tensor], refused: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    covered, missing = report.coverage.covered, report.coverage.not_covered
    assert sorted([*covered, *missing]) == sorted(trainable(model))
    assert all(missing.values()), "a parameter is refused without a reason"
    if refused:
        wrong = {name: how for name, how in covered.items() if name.startswith(refused)}
        assert not wrong, f"covered, although examples meet above: {wrong}"
    may = (*refused, *optional)
    unexpected = {name: reason for name, reason in missing.items() if truth[name].any() and not (may and name.startswith(may))}
    assert not unexpected, f"refused: {unexpected}"


def assert_one_truth(
    report: zerosum.Report,
    truth: dict[str, Tensor],
    direction: dict[str, Tensor] | None,
    factors: tuple[float, ...],
    *,
    rtol: float,
    gram: Tensor | bool = True,
    vanishing: tuple[str, ...] = (),
) -> None:
    """The truth, times one of the factors."""
    for k, factor in enumerate(factors):
        scaled = {name: g * factor for name, g in truth.items()}
        try:
            assert_truth(report, scaled, direction, rtol=rtol, gram=gram, vanishing=vanishing, refusable=True)
        except AssertionError:
            if k == len(factors) - 1:
                raise
        else:
            return
