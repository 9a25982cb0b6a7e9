"""Other projects' ways, of a copy of the same model: each computes what it can of the same statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from zerosum.bench.statistics import SUMS, Statistics, sums_of
from zerosum.bench.ways import HELD, NO_GRADIENT, Pass, Way
from zerosum.bench.workload import Workload


def _opacus(work: Workload) -> Pass:
    from opacus.grad_sample import GradSampleModule

    model = GradSampleModule(copy.deepcopy(work.model), loss_reduction="sum", strict=False)
    return _of_attribute(replace(work, model=model), "grad_sample")


def _opacus_norms(work: Workload) -> Pass:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    copied = copy.deepcopy(work.model)
    model = GradSampleModuleFastGradientClipping(copied, loss_reduction="sum", strict=False, max_grad_norm=1.0)
    watched, names = replace(work, model=model), _names(model)

    def run() -> Callable[[], Statistics]:
        model.zero_grad()
        watched.losses().sum().backward()
        norms = model.get_norm_sample()
        gradients = {name: p.grad for name, p in zip(names, model.parameters(), strict=True) if p.grad is not None}
        return lambda: Statistics(names, gradients, sq_norm=norms.square())

    return run


def _torchjd(work: Workload) -> Pass:
    from torchjd.autogram import Engine

    watched = replace(work, model=copy.deepcopy(work.model))
    engine, names = Engine(watched.model, batch_dim=0), _names(watched.model)

    def run() -> Callable[[], Statistics]:
        gram = engine.compute_gramian(watched.losses())
        return lambda: Statistics(names, gram=gram)

    return run


def _backpack(work: Workload) -> Pass:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    run = _of_attribute(replace(work, model=extend(copy.deepcopy(work.model))), "grad_batch")

    def extended() -> Callable[[], Statistics]:
        with backpack(BatchGrad()):
            return run()

    return extended


def _backpack_sums(work: Workload) -> Pass:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad, SumGradSquared

    watched = replace(work, model=extend(copy.deepcopy(work.model)))

    def run() -> Callable[[], Statistics]:
        watched.model.zero_grad()
        with backpack(SumGradSquared(), BatchL2Grad()):
            watched.losses().sum().backward()
        grad_sum, sq_sum, sq_norms = (
            {name: getattr(p, attribute) for name, p in watched.model.named_parameters()}
            for attribute in ("grad", "sum_grad_squared", "batch_l2")
        )
        sq_norm = torch.stack(list(sq_norms.values())).sum(0)
        return lambda: Statistics(tuple(grad_sum), grad_sum, sq_sum=sq_sum, sq_norm=sq_norm)

    return run


def _of_attribute(work: Workload, attribute: str) -> Pass:
    """The sums of per-example gradients that a backward pass leaves at each parameter."""

    def gradients() -> Iterator[tuple[str, Tensor]]:
        for name, p in zip(_names(work.model), work.model.parameters(), strict=True):
            g = getattr(p, attribute)
            setattr(p, attribute, None)
            yield name, g
            del g

    def run() -> Callable[[], Statistics]:
        work.model.zero_grad()
        work.losses().sum().backward()
        found = sums_of(gradients())
        return lambda: found

    return run


def _names(model: nn.Module) -> tuple[str, ...]:
    """As the model itself calls its parameters."""
    return tuple(name.removeprefix("_module.") for name, _ in model.named_parameters())


PEERS: tuple[Way[Workload], ...] = (
    Way("Opacus", SUMS, _opacus, (HELD,), "opacus"),
    Way("Opacus, ghost norms", ("grad_sum", "sq_norm"), _opacus_norms, package="opacus"),
    Way("TorchJD", ("gram",), _torchjd, (NO_GRADIENT,), "torchjd"),
    Way("BackPACK, BatchGrad", SUMS, _backpack, (HELD,), "backpack"),
    Way("BackPACK, its own sums", ("grad_sum", "sq_sum", "sq_norm"), _backpack_sums, package="backpack"),
)
