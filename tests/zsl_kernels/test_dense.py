"""dense_interference against its definition: gradients that are held."""

import math

import pytest
import torch
from torch.library import opcheck

import zsl_kernels as zk
from tests import error_budgets
from tests.inputs import DTYPES, LAYOUTS, VALUES, assert_exact, assert_within_budget, expectations, sums_of
from zsl_kernels.types import sum_dtype

ONE_OF_EACH = pytest.mark.parametrize("impl", ["chunked", "cpu"], indirect=True)

# On and off a vector; past the 1024 features of a block and two; one number for each example; rows and columns off the Gram's
# blocks of 3 and 4, and past its panels of 24 and 32; scalars past 64 vectors of every instruction set.
SHAPES = [(1, 1), (5,), (4, 64), (3, 7, 5), (2, 1024), (7, 1025), (3, 50, 43), (9, 8, 3, 3), (33, 70), (70, 131), (600, 20)]


def make(shape, dtype=torch.float32, layout="contiguous", values="normal"):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return LAYOUTS[layout](VALUES[values](size, generator).to(dtype))

    if layout == "shared":
        return draw(1, *shape[1:]).expand(shape), draw(*shape[1:])
    return draw(*shape), draw(*shape[1:])


def definition(x):
    return sums_of(x["g"].to(sum_dtype(x["g"].dtype)), x["direction"])


def errors(g):
    return error_budgets.dense(g.shape[0], math.prod(g.shape[1:]), sum_dtype(g.dtype))


def expected(g, u):
    return expectations(definition, {"g": g, "direction": u}, errors(g))


def fields(sums):
    return {name: x for name, x in sums._asdict().items() if x is not None}


CASES = [
    *((shape, torch.float32, "contiguous", "normal") for shape in SHAPES),
    *(((7, 3, 35), dtype, layout, "normal") for dtype in DTYPES for layout in LAYOUTS),
    *(((6, 1100), dtype, "contiguous", "wide") for dtype in DTYPES),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stays_in_the_error_budget(case, impl):
    g, u = make(*case)
    got = fields(zk.dense_interference(g, direction=u, gram=True, impl=impl))
    for name, e in expected(g, u).items():
        assert_within_budget(got[name], e, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_exact_on_integers(dtype, layout, impl):
    g, u = make((9, 37, 31), dtype, layout, "integers")
    got = fields(zk.dense_interference(g, direction=u, gram=True, impl=impl))
    for name, e in expected(g, u).items():
        assert_exact(got[name], e, name)


def test_the_reference_is_the_definition():
    g, u = make((7, 3, 35))
    got = fields(zk.dense_interference(g, direction=u, gram=True, impl="reference"))
    for name, e in expected(g, u).items():
        assert_within_budget(got[name], e, name)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 4, 0), (0, 0)], ids=str)
def test_of_nothing_is_zero(shape, impl):
    sums = zk.dense_interference(torch.ones(shape), direction=torch.ones(shape[1:]), gram=True, impl=impl)
    for name, field in sums._asdict().items():
        assert field.shape == (shape[1:] if name.endswith("_sum") else (shape[0],) * (1 + (name == "gram"))), name
        assert not field.any(), name


def test_only_what_was_asked_for(impl):
    g, u = make((5, 33))
    everything = zk.dense_interference(g, direction=u, gram=True, impl=impl)
    for direction in (None, u):
        for gram in (False, True):
            sums = zk.dense_interference(g, direction=direction, gram=gram, impl=impl)
            assert (sums.dot is None) == (sums.abs_dot is None) == (direction is None)
            assert (sums.gram is None) == (not gram)
            for name, field in fields(sums).items():
                torch.testing.assert_close(field, getattr(everything, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("at", [(0, 0), (2, 17), (4, 32)], ids=str)
def test_what_is_not_finite_stays_where_it_is(at, value, impl):
    g, u = make((5, 33))
    g[at] = value
    want = sums_of(g, u)
    for name, field in fields(zk.dense_interference(g, direction=u, gram=True, impl=impl)).items():
        assert torch.equal(field.isfinite(), want[name].isfinite()), name


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(9, 30000), (40, 5000)], ids=str)
def test_threads_change_rounding_at_most_and_repetition_nothing(shape, count, threads, impl):
    threads(count)
    g, u = make(shape)
    first = fields(zk.dense_interference(g, direction=u, gram=True, impl=impl))
    for name, e in expected(g, u).items():
        assert_within_budget(first[name], e, name)
    for _ in range(3):
        for name, field in fields(zk.dense_interference(g, direction=u, gram=True, impl=impl)).items():
            assert torch.equal(field, first[name]), name


def test_gram_is_symmetric_to_the_bit(impl):
    gram = zk.dense_interference(make((37, 5000))[0], gram=True, impl=impl).gram
    assert torch.equal(gram, gram.T)


@ONE_OF_EACH
@pytest.mark.parametrize("wanted", [("g",), ("direction",), ("g", "direction")], ids=str)
def test_gradcheck(wanted, impl):
    g, u = make((3, 2, 5), torch.float64)
    leaves = {"g": g, "direction": u}

    def function(*tensors):
        x = {**leaves, **dict(zip(wanted, tensors, strict=True))}
        sums = zk.dense_interference(x["g"], direction=x["direction"], gram=True, impl=impl)
        return tuple(field for field in sums if field.requires_grad)

    assert torch.autograd.gradcheck(function, [leaves[name].requires_grad_() for name in wanted])


@ONE_OF_EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("field", zk.InterferenceSums._fields)
def test_each_fields_derivative_is_the_definitions(field, dtype, impl):
    g, u = (x.requires_grad_() for x in make((4, 33), dtype))
    got = torch.autograd.grad(
        getattr(zk.dense_interference(g, direction=u, gram=True, impl=impl), field).square().sum(), (g, u), allow_unused=True
    )

    def derivatives(x):
        leaves = [x[name].detach().requires_grad_() for name in ("g", "direction")]
        found = torch.autograd.grad(sums_of(*leaves)[field].square().sum(), leaves, allow_unused=True)
        return dict(zip(("g", "direction"), found, strict=True))

    tensors = {"g": g.detach(), "direction": u.detach()}
    of_square = error_budgets.gradients_of_square(field, errors(g), error_budgets.EXACT, g.shape[0])
    want = expectations(derivatives, tensors, of_square, dict.fromkeys(tensors, dtype))
    for name, x in zip(tensors, got, strict=True):
        assert (x is not None) == (name in want)
        if x is not None:
            assert_within_budget(x, want[name], name)


@ONE_OF_EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype, impl):
    g, u = (x.requires_grad_() for x in make((3, 2, 5), dtype))
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float64:
        checks.append("test_aot_dispatch_dynamic")
    for direction, gram in ((None, False), (u, True)):
        opcheck(torch.ops.zsl.dense_interference.default, (g, direction, gram, impl), test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    torch._dynamo.reset()
    g, u = (x.requires_grad_() for x in make((3, 2, 5), torch.float64))

    def function(g, u):
        return tuple(zk.dense_interference(g, direction=u, gram=True))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for x, y in zip(compiled(g, u), function(g, u), strict=True):
        torch.testing.assert_close(x, y)
    got, want = (torch.autograd.grad(sum(x.sum() for x in f(g, u)), (g, u)) for f in (compiled, function))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"g": [1.0]}, TypeError, ["g:", "Tensor", "list"]),
        ({"g": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, ["g:", "float32", "int32"]),
        ({"g": torch.tensor(1.0)}, ValueError, ["g:", "(N, ...)", "scalar"]),
        ({"direction": torch.zeros(4)}, ValueError, ["direction:", "(3,)", "(4,)"]),
        ({"direction": torch.zeros(3, device="meta")}, ValueError, ["direction:", "cpu", "meta"]),
        ({"direction": 1.0}, TypeError, ["direction:", "Tensor", "float"]),
        ({"impl": "fast"}, ValueError, ["impl:", "chunked", "'fast'"]),
        ({"impl": "cuda"}, (RuntimeError, ValueError), ["impl:", "cuda"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict | list) else "",
)
def test_bad_arguments(change, error, words):
    arguments = {"g": torch.zeros(2, 3), "direction": torch.zeros(3), **change}
    with pytest.raises(error) as raised:
        zk.dense_interference(arguments.pop("g"), **arguments)
    assert all(word in str(raised.value) for word in words), raised.value


def test_tensors_without_data_give_shapes():
    sums = zk.dense_interference(torch.empty(3, 4, 5, device="meta", dtype=torch.bfloat16), gram=True)
    assert sums.grad_sum.shape == (4, 5)
    assert sums.gram.shape == (3, 3)
    assert sums.gram.dtype == torch.float32
