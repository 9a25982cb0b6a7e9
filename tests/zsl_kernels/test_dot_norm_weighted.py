"""dot, sq_norm and weighted_grad against their specification."""

import math

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import CALLS, EMPTY_SIZES, Problem, assert_exact, assert_within_budget, exact_problems, expected, problems

NAMES = ["dot", "sq_norm", "weighted_grad"]


@pytest.mark.parametrize("problem", problems(), ids=str)
@pytest.mark.parametrize("call", NAMES)
def test_stays_in_the_error_budget(call, problem, impl):
    assert_within_budget(CALLS[call](problem.make(), impl)[call], expected(problem, call)[call])


@pytest.mark.parametrize("problem", exact_problems(), ids=str)
@pytest.mark.parametrize("call", NAMES)
def test_is_exact_on_integers(call, problem, impl):
    assert_exact(CALLS[call](problem.make(), impl)[call], expected(problem, call)[call])


# More than two runs of examples; on both sides of a GPU's tiles of 128 × 128 and of its steps of 64 positions.
EDGES = [(130, 3, 20, 12), (1, 65, 129, 127), (3, 64, 128, 257), (2, 130, 1, 130)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", EDGES, ids=str)
def test_stays_in_the_error_budget_past_runs_and_tiles(size, dtype, impl):
    problem = Problem(*size, dtype=dtype)
    for call in NAMES:
        assert_within_budget(CALLS[call](problem.make(), impl)[call], expected(problem, call)[call], call)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("operand", ["a", "b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_comes_through_where_the_reference_has_it(dtype, operand, value, impl):
    """A weight of zero does not hide it: zero times infinity is NaN."""
    x = Problem(3, 5, 33, 13, dtype=dtype).make()
    getattr(x, operand)[1, 2, 3] = value
    x.weights[1] = 0
    for call in NAMES:
        got, want = (CALLS[call](x, name)[call] for name in (impl, "reference"))
        assert torch.equal(got.isfinite(), want.isfinite()), call
        if call == "weighted_grad":
            assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("problem", [Problem(*size) for size in EMPTY_SIZES.values()], ids=EMPTY_SIZES)
@pytest.mark.parametrize("call", NAMES)
def test_of_nothing_is_zero(call, problem, impl):
    assert_exact(CALLS[call](problem.make(), impl)[call], expected(problem, call)[call])


@pytest.mark.parametrize("call", NAMES)
def test_is_that_of_interference(call, impl):
    x = Problem(5, 7, 33, 13, dtype=torch.float64).make()
    sums = zk.interference(x.a, x.b, direction=x.direction, impl=impl)
    if call == "weighted_grad":
        x, sums = x.replace(weights=torch.ones_like(x.weights)), sums._replace(grad_sum=sums.grad_sum)
    want = {"dot": sums.dot, "sq_norm": sums.sq_norm, "weighted_grad": sums.grad_sum}[call]
    torch.testing.assert_close(CALLS[call](x, impl)[call], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_may_have_any_dtype(dtype, impl):
    x = Problem(5, 7, 33, 13, dtype=torch.bfloat16, values="integers").make()
    got = zk.weighted_grad(x.a, x.b, x.weights.to(dtype), impl=impl)
    assert torch.equal(got, zk.weighted_grad(x.a, x.b, x.weights, impl="reference"))


def test_squared_norms_never_round_below_zero(impl):
    """Gradients that cancel almost: two positions nearly alike, with opposite b. The ghost form subtracts large numbers here."""
    x = Problem(4, 2, 300, 300).make()
    a, b = x.a.clone(), x.b.clone()
    a[:, 1], b[:, 1] = a[:, 0] * (1 + 1e-6), -b[:, 0]
    assert (zk.sq_norm(a, b, impl=impl) >= 0).all()
    assert (zk.interference(a, b, impl=impl).sq_norm >= 0).all()
