"""‖found − truth‖ / ‖truth‖ of each statistic, on a small case, where the truth is computed in float64 one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zerosum.bench.cases import Case
from zerosum.bench.ops import WEIGHT, Operands
from zerosum.bench.statistics import Statistics, gram_of, sums_of
from zerosum.bench.ways import Way
from zerosum.bench.workload import Workload

Gradients = dict[str, Tensor]  # (N, *shape) of each parameter, float64


def errors(case: Case[Any], ways: Sequence[Way[Any]], device: torch.device | str) -> dict[str, dict[str, float]]:
    """Of each statistic of each way, over the parameters that it covers. A way that fails has none: the table of times says why."""
    found: dict[str, dict[str, float]] = {}
    for way in ways:
        work = case.make(device)
        try:
            statistics = way.start(work)()()
        except Exception:  # of a peer, which may raise any
            continue
        found[way.name] = compare(statistics, truth(work, statistics))
    return found


def compare(found: Statistics, expected: Statistics) -> dict[str, float]:
    return {name: _distance(getattr(found, name), getattr(expected, name)) for name in found.computed}


def truth(work: Workload | Operands, like: Statistics) -> Statistics:
    """The same statistics of the same parameters, in float64."""
    gradients = of_op(work) if isinstance(work, Operands) else of_step(work)
    covered = [(name, gradients[name]) for name in like.parameters]
    sums = replace(sums_of(covered), gram=gram_of(covered).gram)
    if isinstance(work, Operands):
        along = gradients[WEIGHT] * work.direction.double().cpu()
        sums = replace(sums, dot=along.sum((1, 2)), abs_dot=along.abs().sum((1, 2)))
    return sums


def of_step(work: Workload) -> Gradients:
    """Of a step: one backward pass for each example."""
    model = copy.deepcopy(work.model).cpu().double()
    names, weights = zip(*model.named_parameters(), strict=True)
    exact = Workload(model, work.x.cpu(), work.y.cpu())
    each = [
        torch.autograd.grad(exact.losses_of(model, x, y).sum(), weights)
        for x, y in zip(exact.x.split(1), exact.y.split(1), strict=True)
    ]
    return {name: torch.stack(gradients) for name, gradients in zip(names, zip(*each, strict=True), strict=True)}


def of_op(x: Operands) -> Gradients:
    """bᵢᵀ aᵢ of one weight."""
    return {WEIGHT: torch.einsum("nto,ntk->nok", x.b.double().cpu(), x.a.double().cpu())}


def _distance(found: Tensor | dict[str, Tensor], expected: Tensor | dict[str, Tensor]) -> float:
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        found, expected = {"": found}, {"": expected}
    assert isinstance(found, dict)
    assert isinstance(expected, dict)
    squares = [((found[name].detach().double().cpu() - x).square().sum(), x.square().sum()) for name, x in expected.items()]
    off, norm = (torch.stack(parts).sum().sqrt().item() for parts in zip(*squares, strict=True))
    return off / norm
