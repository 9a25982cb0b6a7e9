"""A training step with a penalty on the examples' gradients of some layers, against the plain step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import zsl_kernels as zk
from benchmarks.parametrize import over
from zerosum import Factors
from zerosum.bench.ways import PLAIN
from zerosum.bench.workload import CONFIG, N, T, Workload

STEP = (
    "penalties on gradients",
    f"GPT of width {CONFIG.width}, {CONFIG.layers} layers, vocabulary {CONFIG.vocab}, N={N}, T={T}, fp32: forward pass, backward "
    "pass with create_graph for the factors of the layers, penalty, backward pass of both, as a ratio to the plain step (whose "
    "attention is fused; that of a step with a penalty cannot be). Σ b² is a penalty that costs nothing by itself. Materialized: "
    "the same penalty of torch.einsum's gradients.",
)
LAYERS: dict[str, Callable[[nn.Module], bool]] = {
    "head": lambda layer: layer.out_features == CONFIG.vocab,
    "mlp.down of every block": lambda layer: layer.in_features == CONFIG.width // 2,
    "all linear layers": lambda layer: True,
}


def size(a: Tensor, b: Tensor) -> Tensor:
    return b.square().sum()


def interference(a: Tensor, b: Tensor) -> Tensor:
    s = zk.interference(a, b)
    return 1 - s.grad_sum.abs().sum() / s.abs_sum.sum()


def interference_materialized(a: Tensor, b: Tensor) -> Tensor:
    g = torch.einsum("nto,ntk->nok", b, a)
    return 1 - g.sum(0).abs().sum() / g.abs().sum()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return -cosine_of(zk.gram(a, b))


def cosine_materialized(a: Tensor, b: Tensor) -> Tensor:
    g = torch.einsum("nto,ntk->nok", b, a).flatten(1)
    return -cosine_of(g @ g.T)


def cosine_of(gram: Tensor) -> Tensor:
    norms = gram.diagonal().sqrt()
    return (gram / norms[:, None] / norms).triu(1).sum() / (N * (N - 1) / 2)


PENALTIES = {
    "Σ b²": size,
    "1 − Σ|Σg| / Σ|g|": interference,
    "the same, materialized": interference_materialized,
    "−mean cosine": cosine,
    "mean cosine, materialized": cosine_materialized,
}


@lru_cache(maxsize=1)
def workload() -> Workload:
    return Workload.make()


@pytest.mark.parametrize("column", PENALTIES)
@over(LAYERS, list(LAYERS)[:1])
def test_penalty(compare, table, case, column):
    work, penalty = workload(), PENALTIES[column]
    layers = [module for module in work.model.modules() if isinstance(module, nn.Linear) and LAYERS[case](module)]
    assert layers

    def run() -> None:
        work.model.zero_grad()
        with sdpa_kernel(SDPBackend.MATH), Factors(*layers) as factors:  # the fused attention cannot be differentiated twice
            losses = work.losses()
        total = losses.sum()
        parts = [penalty(a, b) for a, b in factors.of(total, create_graph=True)]
        (total + torch.stack(parts).sum()).backward()

    compare(table(*STEP), case, column, run, PLAIN.start(work), against="plain")
