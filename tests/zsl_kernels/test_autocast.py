"""Autocast leaves the ops alone: their operands' dtypes are meant, and the sums are accumulated in float32."""

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import CALLS, DIFFERENTIATED, Problem, cotangents, gradients

PROBLEMS = [Problem(4, 9, 33, 21), Problem(5, 1, 33, 21), Problem(4, 9, 33, 21, dtype=torch.bfloat16)]
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def assert_same(found, expected):
    for name, want in expected.items():
        assert found[name].dtype == want.dtype, name
        assert torch.equal(found[name], want), name


@each_problem
@pytest.mark.parametrize("call", CALLS)
def test_results_are_those_without_it(call, problem, impl):
    x = problem.make()
    expected = CALLS[call](x, impl)
    with autocast():
        found = CALLS[call](x, impl)
    assert_same(found, expected)


@each_problem
@pytest.mark.parametrize("call", DIFFERENTIATED)
def test_derivatives_are_those_without_it(call, problem, impl):
    x, c = problem.make(), cotangents(problem, call)
    expected = gradients(call, x, impl, c)
    with autocast():
        found = gradients(call, x, impl, c)
    assert_same(found, expected)


def test_ops_without_products_too(impl):
    g, ids = torch.randn(4, 9, 21), torch.randint(0, 7, (4, 9))
    calls = {
        "dense": lambda: zk.dense_interference(g, direction=g[0], gram=True, impl=impl).gram,
        "embedding": lambda: zk.embedding_interference(ids, g, 7, gram=True, impl=impl).gram,
        "scale": lambda: zk.scale_grad(g, g, impl=impl),
    }
    expected = {name: call() for name, call in calls.items()}
    with autocast():
        found = {name: call() for name, call in calls.items()}
    assert_same(found, expected)


def test_a_backward_without_cotangents_has_nothing_to_compute(impl):
    x = PROBLEMS[0].make()
    leaf = x.a.requires_grad_()
    found = zk.interference(leaf, x.b, gram=True, impl=impl)
    undefined = torch._C._functions.UndefinedGrad()(found.abs_sum)
    assert torch.autograd.grad(undefined.sum(), leaf, allow_unused=True) == (None,)
