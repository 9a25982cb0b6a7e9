"""The specification itself, against the definitions written out as loops over plain numbers."""

import itertools

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import CALLS, Problem

PROBLEM = Problem(3, 4, 3, 2, M=2, dtype=torch.float64, values="integers", seed=5)


def gradients_by_loops(a, b):
    N, T, K = a.shape
    O = b.shape[2]
    return [[[sum(b[i, t, o].item() * a[i, t, k].item() for t in range(T)) for k in range(K)] for o in range(O)] for i in range(N)]


def definitions(x):
    """Every result of the ops from its definition."""
    g, h = gradients_by_loops(x.a, x.b), gradients_by_loops(x.a2, x.b2)
    u, w = x.direction.tolist(), x.weights.tolist()
    N, M, (O, K) = len(g), len(h), x.direction.shape
    at = list(itertools.product(range(O), range(K)))

    def each(f):
        return [[f(o, k) for k in range(K)] for o in range(O)]

    def pairs(left, right):
        return [[sum(left[i][o][k] * right[j][o][k] for o, k in at) for j in range(len(right))] for i in range(N)]

    return {
        "grad_sum": each(lambda o, k: sum(g[i][o][k] for i in range(N))),
        "abs_sum": each(lambda o, k: sum(abs(g[i][o][k]) for i in range(N))),
        "sq_sum": each(lambda o, k: sum(g[i][o][k] ** 2 for i in range(N))),
        "l1": [sum(abs(g[i][o][k]) for o, k in at) for i in range(N)],
        "sq_norm": [sum(g[i][o][k] ** 2 for o, k in at) for i in range(N)],
        "dot": [sum(g[i][o][k] * u[o][k] for o, k in at) for i in range(N)],
        "abs_dot": [sum(abs(g[i][o][k] * u[o][k]) for o, k in at) for i in range(N)],
        "gram": pairs(g, g),
        "cross gram": pairs(g, h[:M]),
        "weighted_grad": each(lambda o, k: sum(w[i] * g[i][o][k] for i in range(N))),
    }


@pytest.mark.parametrize("call", CALLS)
def test_is_the_definition(call):
    x = PROBLEM.make()
    truth = definitions(x)
    for name, result in CALLS[call](x, "reference").items():
        assert result.tolist() == truth["cross gram" if call == "cross gram" else name], name


def test_grad_sum_is_the_weight_gradient_of_a_linear_layer():
    x = PROBLEM.make()
    layer = torch.nn.Linear(PROBLEM.K, PROBLEM.O, bias=False, dtype=torch.float64)
    layer(x.a).backward(x.b)
    assert torch.equal(zk.interference(x.a, x.b, impl="reference").grad_sum, layer.weight.grad)


def test_fields_that_were_not_asked_for_are_none():
    x = PROBLEM.make()
    sums = zk.interference(x.a, x.b, impl="reference")
    assert [name for name, field in sums._asdict().items() if field is None] == ["dot", "abs_dot", "gram"]
