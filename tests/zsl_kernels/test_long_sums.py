"""Sums that one chain of float32 additions would get wrong: a sum of ones stands still at 2^24."""

import math

import pytest
import torch

import zsl_kernels as zk
from tests import error_budgets
from tests.error_budgets import Sizes
from tests.inputs import Expected, assert_within_budget, implementations, running
from zsl_kernels.backends.chunked import linear_cross_entropy as head
from zsl_kernels.backends.chunked.groups import sum_groups

# Past 2^24 by 2^-6 of it, which is 32 budgets of √n.
LONG = 2**24 + 2**18
LIVE = [name for name in implementations() if name != "cpu"]


def ones(*shape):
    """That hold no memory."""
    return torch.ones(1).expand(shape)


def zeros(*shape):
    return torch.zeros(1, dtype=torch.int64).expand(shape)


def check(found, want, error, what):
    """All terms are of one sign: the truth is the sum of magnitudes."""
    truth = torch.as_tensor(want, dtype=torch.float64).expand(found.shape)
    assert_within_budget(found, Expected(truth, truth, error, torch.float32, torch.float32), what)


def gradient(impl, ragged):
    """Of one example of LONG positions: every field is LONG, or its square."""
    options = {"example_ids": zeros(LONG), "num_examples": 1} if ragged else {}
    shape = (LONG, 1) if ragged else (1, LONG, 1)
    sums = zk.interference(ones(*shape), ones(*shape), direction=ones(1, 1), gram=True, impl=impl, **options)
    return {name: (x, LONG ** (1 + (name in ("sq_sum", "sq_norm", "gram")))) for name, x in sums._asdict().items()}


POSITIONS = {
    "interference": lambda impl: gradient(impl, False),
    "interference, ragged": lambda impl: gradient(impl, True),
    "gram": lambda impl: {"gram": (zk.gram(ones(1, LONG, 1), ones(1, LONG, 1), impl=impl), LONG**2)},
    "sq_norm": lambda impl: {"sq_norm": (zk.sq_norm(ones(1, LONG, 1), ones(1, LONG, 1), impl=impl), LONG**2)},
    "dot": lambda impl: {"dot": (zk.dot(ones(1, LONG, 1), ones(1, LONG, 1), ones(1, 1), impl=impl), LONG)},
    "weighted_grad": lambda impl: {"weighted_grad": (zk.weighted_grad(*[ones(1, LONG, 1)] * 2, ones(1), impl=impl), LONG)},
}


@pytest.mark.parametrize("implementation", LIVE)
@pytest.mark.parametrize("call", POSITIONS)
def test_positions(call, implementation):
    with running(implementation) as impl:
        for name, (found, want) in POSITIONS[call](impl).items():
            budget = error_budgets.call("weighted_grad" if call == "weighted_grad" else "interference", Sizes(1, LONG, 1, 1))
            check(found, want, budget[name], name)


@pytest.mark.parametrize("implementation", LIVE[:2])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_bias(ragged, implementation):
    options = {"example_ids": zeros(LONG), "num_examples": 1} if ragged else {}
    with running(implementation) as impl:
        found = zk.bias_grad(ones(LONG, 1) if ragged else ones(1, LONG, 1), impl=impl, **options)
    check(found, LONG, error_budgets.scale_bias(LONG)["bias"], "bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_heads_weight(dtype):
    """Its product over all rows."""
    found = head.product(ones(2, LONG).to(dtype), ones(LONG, 1).to(dtype), torch.empty(2, 1))
    check(found, LONG, error_budgets.product(LONG), "weight.grad")


# One term of 2^24 comes first and takes in what is added to it by ones: those of its own run, but no others.
COUNT = 2**16


def firsts(count):
    x = torch.ones(count)
    x[0] = 2**24
    return x


EXAMPLES = {
    "dense_interference": lambda g: zk.dense_interference(g[:, None], direction=torch.ones(1), impl="cpu"),
    "embedding_interference": lambda g: zk.embedding_interference(zeros(COUNT, 1), g[:, None, None], 3, impl="cpu"),
    "interference": lambda g: zk.interference(g[:, None, None], ones(COUNT, 1, 1), impl="cpu"),
}


@pytest.mark.parametrize("call", EXAMPLES)
def test_examples(call, cpu_isa):
    g = firsts(COUNT)
    sums = EXAMPLES[call](g)
    errors = error_budgets.dense(COUNT, 1, torch.float32)
    for name, want in (("grad_sum", g), ("abs_sum", g), ("sq_sum", g.double().square())):
        check(getattr(sums, name).flatten(), want.double().sum().item(), errors[name], name)


def test_positions_of_the_register_tile(cpu_isa):
    b = firsts(COUNT)[None, :, None]
    sums = zk.interference(ones(1, COUNT, 1), b, impl="cpu")
    check(sums.grad_sum, b.double().sum().item(), error_budgets.interference(Sizes(1, COUNT, 1, 1))["grad_sum"], "grad_sum")


@pytest.mark.parametrize("count", [4800, COUNT])
def test_squares_of_many_examples_err_as_their_runs_do(count, cpu_isa):
    """A chain of all would err by several times as much: the roundings of positive terms do not cancel."""
    g = torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
    sums = zk.dense_interference(g, impl="cpu")
    budget = error_budgets.rounding() + error_budgets.chain(64) + error_budgets.chain(math.ceil(count / 64))
    for name, x in (("abs_sum", g.double().abs()), ("sq_sum", g.double().square())):
        assert_within_budget(getattr(sums, name), Expected(x.sum(0), x.sum(0), budget, torch.float32, torch.float32), name)


@pytest.mark.parametrize("counts", [[1, 0, 4096, 1, 0], [0, 5000, 4097], [12289], [0, 0, 9000, 0], [4096, 4096]], ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_groups_of_rows_are_cut_into_runs(ordered, counts):
    P = sum(counts)
    x = torch.randint(-3, 4, (P, 3), generator=torch.Generator().manual_seed(0)).float()
    order = torch.randperm(P, generator=torch.Generator().manual_seed(1)) if ordered else None
    rows = x if order is None else x[order]
    want = torch.stack([part.sum(0) for part in rows.split(counts)])
    assert torch.equal(sum_groups(x, order, torch.tensor(counts)), want)
