"""The budgets of tests/error_budgets.py accept every order of summation, and refuse less precision and missing terms."""

import math

import pytest
import torch

from tests import error_budgets
from tests.inputs import (
    CALLS,
    DIFFERENTIATED,
    SIZES,
    Inputs,
    Problem,
    cotangents,
    expected,
    expected_gradients,
    gradients,
    problems,
)

EVERYTHING = "interference, all"
ROUNDED = (torch.float32, torch.float64)
SOME = {name: SIZES[name] for name in ("off the register tile", "many short examples", "past one chunk", "long examples")}


# Orders of summation ----------------------------------------------------------------------------------------------------------


def sequential(x, dim):
    total = torch.zeros_like(x.select(dim, 0))
    for part in x.unbind(dim):
        total = total + part
    return total


def largest_first(x, dim):
    return sequential(x.gather(dim, x.abs().argsort(dim, descending=True)), dim)


def pairwise(x, dim):
    if x.shape[dim] == 1:
        return x.squeeze(dim)
    half = x.shape[dim] // 2
    return pairwise(x.narrow(dim, 0, half), dim) + pairwise(x.narrow(dim, half, x.shape[dim] - half), dim)


def chunked(x, dim):
    return sequential(torch.stack([part.sum(dim) for part in x.split(7, dim)], dim), dim)


def by_plain_pytorch(x, dim):
    return x.sum(dim)


ORDERS = (sequential, largest_first, pairwise, chunked, by_plain_pytorch)


def in_less(dtype):
    """A sequential sum whose total is rounded to ``dtype`` after every addition."""

    def add(x, dim):
        return sequential(x.to(dtype), dim).to(x.dtype)

    return add


def results(x: Inputs, positions, examples, features):
    """Every field, from sums over positions, examples and features that are added as is said. Scalars of float32 take float64
    after ``RUN`` numbers, as the ops do."""
    dtype = torch.float64 if x.a.dtype == torch.float64 else torch.float32
    a, b, u, w = (y.to(dtype) for y in (x.a, x.b, x.direction, x.weights))

    def scalar(y):
        y = y.flatten(1)
        y = torch.nn.functional.pad(y, (0, -y.shape[1] % error_budgets.RUN)).unflatten(1, (-1, error_budgets.RUN))
        return features(y, 2).double().sum(1).to(dtype)

    g = positions(b[..., None] * a[:, :, None], 1)
    p, flat = g * u, g.flatten(1)
    return {
        "grad_sum": examples(g, 0),
        "abs_sum": examples(g.abs(), 0),
        "sq_sum": examples(g.square(), 0),
        "l1": scalar(g.abs()),
        "sq_norm": scalar(g.square()),
        "dot": scalar(p),
        "abs_dot": scalar(p.abs()),
        "gram": torch.stack([features(flat * row, 1) for row in flat]),
        "weighted_grad": examples(g * w[:, None, None], 0),
    }


def everything(problem):
    return {**expected(problem, EVERYTHING), **expected(problem, "weighted_grad")}


@pytest.mark.parametrize("add", ORDERS)
@pytest.mark.parametrize("values", ["normal", "wide"])
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("size", SOME)
def test_every_order_is_accepted(size, dtype, values, add):
    problem = Problem(*SOME[size], dtype=dtype, values=values)
    found = results(problem.make(), add, add, add)
    for name, e in everything(problem).items():
        assert e.share(found[name]) <= 0.6, name


def moved(x: Inputs, seed: int):
    """The same problem with everything in another order, and what undoes it for each result."""
    generator = torch.Generator().manual_seed(seed)
    N, T, K = x.a.shape
    n, t, k, o, m = (torch.randperm(size, generator=generator) for size in (N, T, K, x.b.shape[2], len(x.a2)))
    there = Inputs(
        a=x.a[n][:, t][..., k],
        b=x.b[n][:, t][..., o],
        direction=x.direction[o][:, k],
        weights=x.weights[n],
        a2=x.a2[m][:, t][..., k],
        b2=x.b2[m][:, t][..., o],
    )
    n, t, k, o, m = (order.argsort() for order in (n, t, k, o, m))
    back = dict.fromkeys(("grad_sum", "abs_sum", "sq_sum", "weighted_grad", "direction"), (o, k))
    back |= dict.fromkeys(("l1", "sq_norm", "dot", "abs_dot", "weights"), (n,))
    return there, back | {"a": (n, t, k), "b": (n, t, o), "a2": (m, t, k), "b2": (m, t, o), "gram": (n, n), "cross gram": (n, m)}


def indexed(x, orders):
    for dim, order in enumerate(orders):
        x = x.index_select(dim, order)
    return x


@pytest.mark.parametrize("dtype", [*ROUNDED, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("call", CALLS)
def test_plain_pytorch_in_another_order_is_accepted(call, size, dtype):
    problem = Problem(*SIZES[size], dtype=dtype)
    x, back = moved(problem.make(), 1)
    found = CALLS[call](x, "reference")
    for name, e in expected(problem, call).items():
        assert e.share(indexed(found[name], back[call if call == "cross gram" else name])) <= 0.6, name


def moved_cotangents(given, call, back):
    """Cotangents go the other way than results."""
    return {
        name: indexed(c, [order.argsort() for order in back[call if call == "cross gram" else name]]) for name, c in given.items()
    }


@pytest.mark.parametrize("dtype", [*ROUNDED, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["one position", "off the register tile", "past one chunk"])
@pytest.mark.parametrize("call", DIFFERENTIATED)
def test_plain_gradients_in_another_order_are_accepted(call, size, dtype):
    problem = Problem(*SIZES[size], dtype=dtype)
    x, back = moved(problem.make(), 2)
    found = gradients(call, x, "reference", moved_cotangents(cotangents(problem, call), call, back))
    for name, e in expected_gradients(problem, call).items():
        assert e.share(indexed(found[name], back[name])) <= 0.6, name


# Mistakes ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SOME)
@pytest.mark.parametrize("level", ["positions", "examples", "features"])
def test_one_sum_in_float32_is_refused_in_float64(level, size):
    assert_one_sum_is_refused(Problem(*SOME[size], dtype=torch.float64), level, torch.float32, 1e3)


@pytest.mark.parametrize("size", SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", ["positions", "examples", "features"])
def test_one_sum_in_bfloat16_is_refused_in_float32(level, dtype, size):
    assert_one_sum_is_refused(Problem(*SOME[size], dtype=dtype), level, torch.bfloat16, 1.5)


WITH_LEVEL = {
    "positions": (*expected(Problem(1, 1, 1, 1), EVERYTHING), "weighted_grad"),
    "examples": ("grad_sum", "abs_sum", "sq_sum", "weighted_grad"),
    "features": ("l1", "sq_norm", "dot", "abs_dot", "gram"),
}


def assert_one_sum_is_refused(problem, level, dtype, budgets):
    found = results(problem.make(), **{**dict.fromkeys(WITH_LEVEL, sequential), level: in_less(dtype)})
    want = everything(problem)
    for name in WITH_LEVEL[level]:
        assert want[name].share(found[name]) > budgets, name


@pytest.mark.parametrize("size", SIZES)
def test_operands_in_tf32_are_refused(size):
    """11 significant bits of every operand. In a scalar of thousands of terms of both signs that is lost."""
    problem = Problem(*SIZES[size])
    x = problem.make()
    cut = {name: (y.view(torch.int32) & -(1 << 13)).view(torch.float32) for name, y in x.tensors().items()}
    found = {name: y for call in (EVERYTHING, "weighted_grad") for name, y in CALLS[call](x.replace(**cut), "reference").items()}
    want = everything(problem)
    for name in ("grad_sum", "abs_sum", "sq_sum", "weighted_grad"):
        assert want[name].share(found[name]) > 2, name


@pytest.mark.parametrize("size", ["one position", "off the register tile", "past one chunk"])
@pytest.mark.parametrize("call", DIFFERENTIATED)
def test_gradients_in_float32_are_refused_in_float64(call, size):
    problem = Problem(*SIZES[size], dtype=torch.float64)
    x = problem.make()
    narrow = {name: c.float() for name, c in cotangents(problem, call).items()}
    found = gradients(call, Inputs(**{name: y.float() for name, y in x.tensors().items()}), "reference", narrow)
    for name, e in expected_gradients(problem, call).items():
        assert e.share(found[name]) > 1e5, name


def without(x: Inputs, what: str) -> Inputs:
    """Without the middle position of the last example, or without that example."""
    a, b = x.a.clone(), x.b.clone()
    at = (-1, a.shape[1] // 2) if what == "position" else (-1,)
    a[at] = b[at] = 0
    return x.replace(a=a, b=b)


@pytest.mark.parametrize("problem", [p for p in problems() if p.layout == "contiguous"], ids=str)
@pytest.mark.parametrize("what", ["position", "example"])
def test_a_missing_term_is_refused(what, problem):
    """Of every field. A float64 computation, rounded: nothing else is wrong with it."""
    x = without(problem.make(), what)
    wide = Inputs(**{name: y.double() for name, y in x.tensors().items()})
    for call in CALLS:
        found = CALLS[call](wide, "reference")
        for name, e in expected(problem, call).items():
            assert e.share(found[name].to(e.dtype)) > 2, f"{call}: {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", ["one position", "off the register tile", "past one chunk"])
@pytest.mark.parametrize("call", DIFFERENTIATED)
@pytest.mark.parametrize("what", ["position", "example"])
def test_a_gradient_with_a_missing_term_is_refused(what, call, size, dtype):
    problem = Problem(*SIZES[size], dtype=dtype)
    x = without(problem.make(), what)
    wide = Inputs(**{name: y.double() for name, y in x.tensors().items()})
    given = {name: c.double() for name, c in cotangents(problem, call).items()}
    found = gradients(call, wide, "reference", given)
    for name, e in expected_gradients(problem, call).items():
        assert e.share(found[name].to(e.dtype)) > 2, name


# The model itself ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 30, 300, 3000])
@pytest.mark.parametrize("order", [sequential, largest_first])
def test_the_deviation_of_a_chain_is_below_the_models(order, n):
    """10000 sums of positive terms, whose partial sums are the largest that there are."""
    x = torch.rand(n, 10_000, generator=torch.Generator().manual_seed(0))
    units = (order(x, 0).double() - x.double().sum(0)) / x.double().sum(0) / torch.finfo(torch.float32).eps
    model = error_budgets.SPREAD * math.sqrt(n)
    assert units.square().mean().sqrt() < model * (1 if order is sequential else math.sqrt(3))
    assert units.abs().max() < error_budgets.chain(n).units(torch.float32)


def test_a_device_adds_terms_of_its_own():
    e = error_budgets.product(256)
    usual, of_half = (e.units(torch.float32, operands) for operands in (torch.float32, torch.float16))
    assert usual == of_half
    with error_budgets.computing_by(error_budgets.DEVICE):
        assert e.units(torch.float32) == usual + error_budgets.DEVICE.split + 256 * 3 / 8 / 2
        assert e.units(torch.float32, torch.float16) == usual + 256 / 16 / 2
    assert e.units(torch.float32) == usual
