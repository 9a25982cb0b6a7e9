"""The ops against the plain weight gradient and against other ways to the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zsl_kernels as zk
from benchmarks.cases import Case, inputs
from benchmarks.parametrize import kernels_of, over
from zerosum.bench.ops import weight_gradient
from zsl_kernels.backends import reference

QUICK = [Case(8, 256, 256, 256), Case(8, 64, 256, 256)]
SMALL = [*QUICK, Case(8, 256, 1024, 256), Case(64, 64, 256, 256), Case(8, 64, 3072, 768), Case(32, 256, 768, 768)]
CASES = [
    Case(8, 256, 256, 256),
    Case(8, 256, 1024, 256),
    Case(8, 256, 4096, 256),
    Case(64, 256, 256, 256),
    Case(32, 256, 768, 768),
    Case(8, 1024, 768, 768),
    Case(8, 256, 3072, 768),
    Case(8, 256, 3072, 3072),
    Case(8, 64, 256, 256),
    Case(64, 64, 256, 256),
    Case(32, 64, 768, 768),
    Case(8, 64, 3072, 768),
]

INTERFERENCE = (
    "interference, fp32",
    "Time as a ratio to the dW product of torch. The AVX2 columns use kernels without AVX-512: a library's product may not use it "
    "either (MKL does not on AMD), and then the other columns flatter.",
)
OTHER_WAYS = ("other ways to the same sums, fp32", "Time as a ratio to the dW product of torch, all sums and scalars.")
BF16 = ("interference, bf16", "Time as a ratio to the same call on fp32 inputs, and to the dW product of torch in bf16.")
OTHER_OPS = (
    "other ops, fp32",
    "Time as a ratio to the dW product of torch, in the way that the plan chooses. Ghost by torch is the Gram alone.",
)
BACKWARD = (
    "backward of interference, fp32",
    "Gradients of all sums and scalars, as a ratio to three plain products of the layer's size.",
)


@over(CASES, QUICK)
@pytest.mark.parametrize("column", ["sums", "+ direction", "sums, AVX2"])
def test_interference(compare, table, case, column):
    _test_interference(compare, table, case, column)


@over([case for case in CASES if case.N <= 32], QUICK)  # the pairs' work grows with N
@pytest.mark.parametrize("column", ["+ Gram", "+ Gram, AVX2"])
def test_interference_gram(compare, table, case, column):
    _test_interference(compare, table, case, column)


def _test_interference(compare, table, case, column):
    gram, avx2 = "Gram" in column, "AVX2" in column
    x = inputs(case)
    u = x.direction if "direction" in column else None
    with kernels_of(column):
        compare(
            table(*INTERFERENCE),
            str(case),
            column,
            lambda: zk.interference(x.a, x.b, direction=u, gram=gram),
            lambda: weight_gradient(x.a, x.b),
            target=None if avx2 else _target(case, gram),
            flops=case.flops if column == "sums" else None,
        )


def _target(case: Case, gram: bool) -> float | None:
    if gram:
        return 1.5 if case.T >= 256 else None
    return 1.25 if case.T >= 256 else 1.5


@over(SMALL, QUICK)
@pytest.mark.parametrize("column", ["chunked", "chunked + Gram", "materialized"])
def test_other_ways(compare, table, case, column):
    x = inputs(case)
    subject = {
        "chunked": lambda: zk.interference(x.a, x.b, impl="chunked"),
        "chunked + Gram": lambda: zk.interference(x.a, x.b, gram=True, impl="chunked"),
        "materialized": lambda: reference.interference(x.a, x.b, None, False),
    }[column]
    compare(table(*OTHER_WAYS), str(case), column, subject, lambda: weight_gradient(x.a, x.b))


@over(CASES, QUICK)
@pytest.mark.parametrize("column", ["to fp32", "to bf16 dW"])
def test_bf16(compare, table, case, column):
    x, wide = inputs(case, torch.bfloat16), inputs(case)
    baseline, against, target = {
        "to fp32": (lambda: zk.interference(wide.a, wide.b), "fp32", 1.0),
        "to bf16 dW": (lambda: weight_gradient(x.a, x.b), "bf16 dW", None),
    }[column]
    compare(table(*BF16), str(case), column, lambda: zk.interference(x.a, x.b), baseline, against=against, target=target)


@over(SMALL, QUICK)
@pytest.mark.parametrize("column", ["gram", "ghost by torch", "sq_norm", "dot", "weighted_grad"])
def test_other_ops(compare, table, case, column):
    x = inputs(case)
    subject = {
        "gram": lambda: zk.gram(x.a, x.b),
        "ghost by torch": lambda: ghost_gram(x.a, x.b),
        "sq_norm": lambda: zk.sq_norm(x.a, x.b),
        "dot": lambda: zk.dot(x.a, x.b, x.direction),
        "weighted_grad": lambda: zk.weighted_grad(x.a, x.b, x.weights),
    }[column]
    compare(table(*OTHER_OPS), str(case), column, subject, lambda: weight_gradient(x.a, x.b))


def ghost_gram(a: Tensor, b: Tensor) -> Tensor:
    """The Gram by (A Aᵀ) ⊙ (B Bᵀ), one row of it at a time and one half of it only, so that it fits in memory."""
    N, T, _ = a.shape
    gram = a.new_zeros(N, N)
    for i in range(N):
        products = (a[i] @ a[i:].flatten(0, 1).T).mul_(b[i] @ b[i:].flatten(0, 1).T)
        gram[i, i:] = gram[i:, i] = products.view(T, N - i, T).sum((0, 2))
    return gram


@over(SMALL, QUICK)
def test_backward(compare, table, case):
    x = inputs(case)
    a, b = (operand.clone().requires_grad_() for operand in (x.a, x.b))
    outputs = [field for field in zk.interference(a, b, direction=x.direction) if field is not None]
    ones = [torch.ones_like(output) for output in outputs]
    flat_a, flat_b = x.a.flatten(0, 1), x.b.flatten(0, 1)
    compare(
        table(*BACKWARD),
        str(case),
        "backward",
        lambda: torch.autograd.grad(outputs, (a, b), ones, retain_graph=True),
        lambda: (flat_b.T @ flat_a, flat_b @ x.direction, flat_a @ x.direction.T),
        against="three products",
    )
