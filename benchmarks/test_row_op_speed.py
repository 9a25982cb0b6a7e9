"""The ops of small and sparse parameters, embeddings, norms and biases, against what torch computes in their place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import zsl_kernels as zk
from benchmarks.parametrize import kernels_of, over


@dataclass(frozen=True)
class Case:
    """N examples of T positions with K features each; an embedding has V rows."""

    N: int
    T: int
    K: int
    V: int = 0

    def __str__(self) -> str:
        return f"N={self.N} T={self.T} K={self.K}" + (f" V={self.V}" if self.V else "")


EMBEDDINGS = [Case(8, 256, 256, 4096), Case(32, 256, 768, 50304)]
NORMS = [Case(8, 256, 256), Case(32, 64, 256), Case(32, 256, 768)]
HELD = [Case(8, 1, 768), Case(32, 1, 768), Case(32, 1, 3072)]
QUICK = [EMBEDDINGS[0], NORMS[0], HELD[0]]

EMBEDDING = (
    "embedding_interference, fp32",
    "Time as a ratio to embedding_dense_backward, whose result is dense, V × K. The sums have touched rows alone; the column with "
    "the dense gradient makes it from them, as a training step must. Token ids are drawn as words are (Zipf).",
)
NORM = (
    "per-example gradients of norms and biases, fp32",
    "Time as a ratio: scale_bias_grad to the part of native_layer_norm_backward that computes the scale's and bias's gradients, "
    "bias_grad to b.sum((0, 1)). Theirs are sums over the examples, ours each example's.",
)
DENSE = (
    "dense_interference, fp32",
    "Microseconds of a call on N held gradients of K coordinates, and as a ratio to the same sums and scalars by torch.",
)


@lru_cache(maxsize=4)
def token_ids(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    zipf = 1 / (torch.arange(case.V) + 2.7)
    return torch.multinomial(zipf, case.N * case.T, replacement=True, generator=generator).view(case.N, case.T)


@lru_cache(maxsize=4)
def rows(case: Case) -> tuple[Tensor, Tensor]:
    """Two of (N, T, K)."""
    generator = torch.Generator().manual_seed(1)
    x, b = torch.randn(2, case.N, case.T, case.K, generator=generator)
    return x, b


@over(EMBEDDINGS, QUICK)
@pytest.mark.parametrize("column", ["sums", "sums, AVX2", "+ dense gradient", "+ Gram"])
def test_embedding(compare, table, case, column):
    ids, (_, b) = token_ids(case), rows(case)

    def sums() -> Tensor:
        found = zk.embedding_interference(ids, b, case.V, gram="Gram" in column)
        if "dense" not in column:
            return found.grad_sum
        return b.new_zeros(case.V, case.K).index_copy_(0, found.rows, found.grad_sum)

    with kernels_of(column):
        compare(
            table(*EMBEDDING),
            str(case),
            column,
            sums,
            lambda: torch.ops.aten.embedding_dense_backward(b, ids, case.V, -1, False),
            against="torch",
        )


@over(NORMS, QUICK)
@pytest.mark.parametrize("column", ["scale + bias", "scale + bias, AVX2", "bias", "bias, AVX2"])
def test_norm(compare, table, case, column):
    x, b = rows(case)
    weight, bias = torch.ones(case.K), torch.zeros(case.K)
    _, mean, rstd = torch.native_layer_norm(x, (case.K,), weight, bias, 1e-5)

    def layer_norm() -> tuple[Tensor, ...]:
        mask = [False, True, True]
        return torch.ops.aten.native_layer_norm_backward(b, x, (case.K,), mean, rstd, weight, bias, mask)

    of_scale = "scale" in column
    subject = (lambda: zk.scale_bias_grad(x, b, mean=mean, rstd=rstd)) if of_scale else (lambda: zk.bias_grad(b))
    with kernels_of(column):
        compare(
            table(*NORM),
            str(case),
            column,
            subject,
            layer_norm if of_scale else lambda: b.sum((0, 1)),
            against="layer_norm" if of_scale else "sum",
        )


def sums_by_torch(g: Tensor, gram: bool) -> tuple[Tensor, ...]:
    size, square = g.abs(), g.square()
    sums = (g.sum(0), size.sum(0), square.sum(0), size.sum(1, dtype=torch.float64), square.sum(1, dtype=torch.float64))
    return (*sums, g @ g.T) if gram else sums


@over(HELD, QUICK)
@pytest.mark.parametrize("column", ["sums", "sums + Gram"])
def test_dense(compare, table, case, column):
    g, gram = rows(case)[0].squeeze(1), "Gram" in column
    compare(
        table(*DENSE),
        f"N={case.N} K={case.K}",
        column,
        lambda: zk.dense_interference(g, gram=gram),
        lambda: sums_by_torch(g, gram),
        against="torch + Gram" if gram else "torch",
        microseconds=True,
    )
