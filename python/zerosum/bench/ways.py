"""Ways to take a training step with statistics of its per-example gradients: the plain step, the probe, and PyTorch alone.

``way.start(work)`` prepares a pass. A pass is one forward and backward pass; it returns a function that reads what it computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from zerosum import Probe
from zerosum.bench.statistics import SUMS, Statistics, gram_of, sums_of
from zerosum.bench.workload import Workload

Pass = Callable[[], Callable[[], Statistics]]  # what it returns reads what it computed
W = TypeVar("W")

SETTLING = 4
HELD = "all N gradients are held"
NO_EMBEDDING = "without the embedding, in its favor"
NO_GRADIENT = "without the step's own gradient, in its favor"


@dataclass(frozen=True)
class Way(Generic[W]):
    """One way to statistics of per-example gradients.

    Attributes:
        computes: names of the statistics.
        start: prepares a pass of a workload.
        notes: what it leaves out, and how it works where that matters.
        package: which package it needs, as it is imported; empty where it is this library or PyTorch.
        ours: whether it is this library.
        settling: passes that cost more than later ones: a probe proves whose rows are whose, and sees which weights are used once.
    """

    name: str
    computes: tuple[str, ...]
    start: Callable[[W], Pass]
    notes: tuple[str, ...] = ()
    package: str = ""
    ours: bool = False
    settling: int = 0

    def settled(self, work: W) -> Pass:
        """A pass that costs what later ones do."""
        run = self.start(work)
        for _ in range(self.settling):
            run()
        return run


def _plain(work: Workload) -> Pass:
    def run() -> Callable[[], Statistics]:
        work.model.zero_grad()
        work.losses().sum().backward()
        return read

    def read() -> Statistics:
        gradients = {name: p.grad for name, p in work.model.named_parameters() if p.grad is not None}
        return Statistics(tuple(gradients), gradients)

    return run


def _probed(work: Workload, gram: bool) -> Pass:
    probe = Probe(work.model, gram=gram)  # one for all steps, as in training

    def run() -> Callable[[], Statistics]:
        work.model.zero_grad()
        with probe:
            work.losses().sum().backward()
        report = probe.report()
        assert report.metrics
        assert not report.coverage.not_covered, report.coverage

        def read() -> Statistics:
            grad_sum, abs_sum, sq_sum = ({name: getattr(report[name], field) for name in report} for field in SUMS[:3])
            return Statistics(tuple(report), grad_sum, abs_sum, sq_sum, report.l1, report.sq_norm, gram=report.gram)

        return read

    return run


def _vmapped(work: Workload, of: Callable[[Iterator[tuple[str, Tensor]]], Statistics]) -> Pass:
    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return work.losses_of(lambda tokens: functional_call(work.model, weights, (tokens,)), x[None], y[None])[0]

    def run() -> Callable[[], Statistics]:
        weights = {name: p.detach() for name, p in work.linear_weights.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no batching rule on the CPU and would be eight times slower
            gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, work.x, work.y)
        found = of((name, gradients.pop(name)) for name in list(gradients))
        return lambda: found

    return run


def _each(work: Workload) -> Iterator[dict[str, Tensor]]:
    """The gradients of one example after another."""
    weights = work.linear_weights
    for x, y in zip(work.x.split(1), work.y.split(1), strict=True):
        yield dict(zip(weights, torch.autograd.grad(work.losses_of(work.model, x, y).sum(), list(weights.values())), strict=True))


def _looped(work: Workload) -> Pass:
    def run() -> Callable[[], Statistics]:
        weights = work.linear_weights
        sums = {name: p.new_zeros(3, *p.shape) for name, p in weights.items()}
        l1, sq_norm = work.x.new_zeros(2, len(work.x), dtype=torch.float32)
        for i, gradients in enumerate(_each(work)):
            for name, g in gradients.items():
                total, size, square = sums[name]
                absolute = g.abs()
                total += g
                size += absolute
                square.addcmul_(g, g)
                l1[i] += absolute.sum()
                sq_norm[i] += g.square().sum()
        grad_sum, abs_sum, sq_sum = ({name: of[k] for name, of in sums.items()} for k in range(3))
        return lambda: Statistics(tuple(sums), grad_sum, abs_sum, sq_sum, l1, sq_norm)

    return run


def _looped_abs(work: Workload) -> Pass:
    def run() -> Callable[[], Statistics]:
        abs_sum = {name: torch.zeros_like(p) for name, p in work.linear_weights.items()}
        for gradients in _each(work):
            for name, g in gradients.items():
                abs_sum[name] += g.abs()
        return lambda: Statistics(tuple(abs_sum), abs_sum=abs_sum)

    return run


PLAIN: Way[Workload] = Way("plain step", ("grad_sum",), _plain)
PROBE: Way[Workload] = Way("probe", SUMS, lambda work: _probed(work, False), ours=True, settling=SETTLING)
PROBE_GRAM: Way[Workload] = Way("probe + Gram", (*SUMS, "gram"), lambda work: _probed(work, True), ours=True, settling=SETTLING)
STEPS: tuple[Way[Workload], ...] = (
    PLAIN,
    PROBE,
    PROBE_GRAM,
    Way("vmap(grad)", SUMS, lambda work: _vmapped(work, sums_of), (HELD, NO_EMBEDDING)),
    Way("vmap(grad), Gram", ("gram",), lambda work: _vmapped(work, gram_of), (HELD, NO_GRADIENT, NO_EMBEDDING)),
    Way("loop", SUMS, _looped, (NO_EMBEDDING,)),
    Way("loop, Σ|g|", ("abs_sum",), _looped_abs, (NO_GRADIENT, NO_EMBEDDING)),
)
