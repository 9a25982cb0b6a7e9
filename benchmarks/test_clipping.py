"""A training step whose examples' gradients are clipped one by one, against the plain step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import nn

import zsl_kernels as zk
from zerosum import Factors, Probe, weights
from zerosum.bench.ways import PLAIN
from zerosum.bench.workload import CONFIG, N, T, Workload

STEP = (
    "clipping each example's gradient",
    f"GPT of width {CONFIG.width}, {CONFIG.layers} layers, vocabulary {CONFIG.vocab}, N={N}, T={T}, fp32: forward and backward, as "
    "a ratio to the plain step. Two backward passes: of the losses, and of their weighted sum, without norms. Factors: norms and "
    "the weighted sum by zk.sq_norm and zk.weighted_grad of all linear layers, without the embedding, in its favor.",
)


@lru_cache(maxsize=1)
def workload() -> Workload:
    return Workload.make()


def two_passes(work: Workload) -> Callable[[], None]:
    w = torch.rand(N)

    def run() -> None:
        work.model.zero_grad()
        losses = work.losses()
        losses.sum().backward(retain_graph=True)
        work.model.zero_grad()
        (w * losses).sum().backward()

    return run


def probed(work: Workload) -> Callable[[], None]:
    probe = Probe(work.model)

    def run() -> None:
        work.model.zero_grad()
        with probe:
            losses = work.losses()
            losses.sum().backward(retain_graph=True)
        w = weights.clip(probe.report(), 1.0)
        work.model.zero_grad()
        (w * losses).sum().backward()

    for _ in range(4):  # rows are proved, and which weights are used once is seen
        run()
    return run


def factored(work: Workload) -> Callable[[], None]:
    layers = [module for module in work.model.modules() if isinstance(module, nn.Linear)]

    def run() -> None:
        with Factors(*layers) as factors:
            losses = work.losses()
        pairs = factors.of(losses.sum())
        norms = torch.stack([zk.sq_norm(a, b) for a, b in pairs]).sum(0).sqrt()
        w = (1.0 / norms).clamp(max=1)
        for layer, (a, b) in zip(layers, pairs, strict=True):
            layer.weight.grad = zk.weighted_grad(a, b, w)

    return run


WAYS = {"two backward passes": two_passes, "probe, second backward pass": probed, "Factors": factored}


@pytest.mark.parametrize("column", WAYS)
def test_clipping(compare, table, column):
    work = workload()
    compare(table(*STEP), "forward + backward", column, WAYS[column](work), PLAIN.start(work), against="plain")
