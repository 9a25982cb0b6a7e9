"""scale_grad, bias_grad and both in one pass against their definitions."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.library import opcheck

import zsl_kernels as zk
from tests import error_budgets
from tests.inputs import DTYPES, LAYOUTS, VALUES, assert_exact, assert_within_budget, expectations
from zsl_kernels.types import sum_dtype

ONE_OF_EACH = pytest.mark.parametrize("impl", ["chunked", "cpu"], indirect=True)
OPERANDS = ("x", "b", "mean", "rstd")


@dataclass(frozen=True)
class Case:
    """N examples of T positions and K features; ``b`` may have a dtype of its own."""

    N: int
    T: int
    K: int
    dtype: torch.dtype = torch.float32
    b_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    values: str = "normal"
    ragged: bool = False

    def make(self):
        """Operands, and the options that say whose the rows are."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape, dtype=self.dtype):
            if self.layout == "shared":
                shape, size = (1, *shape[1:]), shape
                return VALUES[self.values](shape, generator).to(dtype).expand(size)
            return LAYOUTS[self.layout](VALUES[self.values](shape, generator).to(dtype))

        N, T, K = self.N, self.T, self.K
        x = {
            "x": draw(N, T, K),
            "b": draw(N, T, K, dtype=self.b_dtype or self.dtype),
            "mean": draw(N, T),
            "rstd": draw(N, T),
        }
        if not self.ragged:
            return x, {}
        example_ids = torch.randint(0, N + 1, (N * T,), generator=generator)  # some examples have none
        return {name: y.flatten(0, 1) for name, y in x.items()}, {"example_ids": example_ids, "num_examples": N + 2}


def definition(x, options):
    """``mean`` is subtracted with its sign turned, so that the sum of the terms' magnitudes is the same formula."""
    dtype = sum_dtype(torch.promote_types(x["x"].dtype, x["b"].dtype))
    wide = {name: y.to(dtype) for name, y in x.items()}
    b = wide["b"]
    scaled = b * ((wide["x"] + wide["minus_mean"].unsqueeze(-1)) * wide["rstd"].unsqueeze(-1))

    def per_example(g):
        if not options:
            return g.sum(1)
        member = options["example_ids"].long() == torch.arange(options["num_examples"])[:, None]
        return torch.where(member[..., None], g, 0).sum(1)

    return {"scale": per_example(scaled), "bias": per_example(b)}


def expected(x, options):
    operands = {"x": x["x"], "b": x["b"], "minus_mean": -x["mean"], "rstd": x["rstd"]}
    T = int(options["example_ids"].bincount().max()) if options else x["b"].shape[1]
    return expectations(lambda y: definition(y, options), operands, error_budgets.scale_bias(T))


def call(x, options, impl):
    scale, bias = zk.scale_bias_grad(x["x"], x["b"], mean=x["mean"], rstd=x["rstd"], impl=impl, **options)
    return {"scale": scale, "bias": bias}


# On and off a vector; past 256 features that are copied and 1024 that are summed at a time; positions around 4 that are read and
# 64 that are summed together; one example of many.
SIZES = [
    *((1, 1, 1), (3, 5, 7), (4, 16, 64), (90, 2, 9)),
    *((2, 3, 257), (2, 6, 1030), (3, 64, 33), (2, 65, 33), (2, 131, 21), (1, 700, 40)),
]
CASES = [
    *(Case(*size) for size in SIZES),
    *(Case(3, 70, 35, dtype=dtype, layout=layout) for dtype in DTYPES for layout in LAYOUTS),
    *(Case(3, 70, 35, dtype=dtype, ragged=True) for dtype in DTYPES),
    *(Case(3, 9, 290, dtype=x, b_dtype=b) for x in DTYPES for b in DTYPES if x != b),
    *(Case(5, 40, 45, dtype=dtype, values="wide") for dtype in DTYPES),
    Case(2, 300, 1030, ragged=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stays_in_the_error_budget(case, impl):
    x, options = case.make()
    got = call(x, options, impl)
    for name, e in expected(x, options).items():
        assert_within_budget(got[name], e, name)


def test_the_reference_is_the_definition():
    for ragged in (False, True):
        x, options = Case(3, 70, 35, ragged=ragged).make()
        got = call(x, options, "reference")
        for name, e in expected(x, options).items():
            assert_within_budget(got[name], e, name)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_exact_on_integers(dtype, layout, ragged, impl):
    x, options = Case(6, 140, 300, dtype=dtype, layout=layout, values="integers", ragged=ragged).make()
    got = call(x, options, impl)
    for name, e in expected(x, options).items():
        assert_exact(got[name], e, name)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("statistics", [(), ("mean",), ("rstd",), ("mean", "rstd")], ids=str)
def test_each_part_alone_is_that_of_the_whole(statistics, ragged, impl):
    """Mean and rstd each or not at all, with or without a 1 behind; scale alone, bias alone, both."""
    x, options = Case(3, 11, 35, ragged=ragged).make()
    given = {name: x[name] for name in statistics}
    behind = {name: x[name].unsqueeze(-1) for name in statistics}
    neutral = {"mean": torch.zeros_like(x["mean"]), "rstd": torch.ones_like(x["rstd"])}
    want = call({**x, **neutral, **given}, options, impl)
    scale, bias = zk.scale_bias_grad(x["x"], x["b"], impl=impl, **given, **options)
    assert torch.equal(scale, want["scale"])
    assert torch.equal(bias, want["bias"])
    assert torch.equal(zk.scale_grad(x["x"], x["b"], impl=impl, **behind, **options), want["scale"])
    assert torch.equal(zk.bias_grad(x["b"], impl=impl, **options), want["bias"])


@pytest.mark.parametrize("size", [(0, 4, 5), (3, 0, 5), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_of_nothing_is_zero(ragged, size, impl):
    N, T, K = size
    x, options = {"x": torch.ones(N, T, K), "b": torch.ones(N, T, K), "mean": torch.ones(N, T), "rstd": torch.ones(N, T)}, {}
    if ragged:
        x = {name: y.flatten(0, 1) for name, y in x.items()}
        options = {"example_ids": torch.zeros(N * T, dtype=torch.int32), "num_examples": max(N, int(T * N > 0))}
    for name, field in call(x, options, impl).items():
        assert field.shape == (N, K), name
        assert not field.any(), name


def test_statistics_and_rows_are_read_from_any_layout(impl):
    """Mean and rstd transposed, of other dtypes than the operands; example ids of a narrow dtype."""
    x, options = Case(3, 11, 35, ragged=True).make()
    want = call(x, options, impl)
    x["mean"], x["rstd"] = (torch.stack([x[name].double(), torch.zeros(33).double()], 1)[:, 0] for name in ("mean", "rstd"))
    got = call(x, {**options, "example_ids": options["example_ids"].to(torch.uint8)}, impl)
    for name in got:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("operand", OPERANDS)
def test_what_is_not_finite_stays_in_its_example(operand, value, impl):
    x, options = Case(4, 70, 35).make()
    x[operand][(2, 66, 34)[: x[operand].ndim]] = value
    for name, field in call(x, options, impl).items():
        bad = torch.zeros(4, 35, dtype=torch.bool)
        if name == "scale" or operand == "b":
            bad[2, 34 if operand in ("x", "b") else slice(None)] = True
        assert torch.equal(~field.isfinite(), bad), name


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", [Case(9, 40, 400), Case(1, 300, 800), Case(5, 90, 400, ragged=True)], ids=str)
def test_threads_change_rounding_at_most_and_repetition_nothing(case, count, threads, impl):
    threads(count)
    x, options = case.make()
    first = call(x, options, impl)
    for name, e in expected(x, options).items():
        assert_within_budget(first[name], e, name)
    for _ in range(3):
        for name, field in call(x, options, impl).items():
            assert torch.equal(field, first[name]), name


def test_inputs_are_left_as_they_were(impl):
    x, options = Case(3, 11, 35, layout="sliced").make()
    before = {name: y.clone() for name, y in x.items()}
    call(x, options, impl)
    for name, y in x.items():
        assert torch.equal(y, before[name]), name


@ONE_OF_EACH
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("wanted", [(name,) for name in OPERANDS] + [OPERANDS], ids=str)
def test_gradcheck(wanted, ragged, impl):
    """Second derivatives too: these are plain expressions."""
    x, options = Case(3, 4, 5, dtype=torch.float64, ragged=ragged).make()

    def function(*tensors):
        results = call({**x, **dict(zip(wanted, tensors, strict=True))}, options, impl)
        return tuple(field for field in results.values() if field.requires_grad)

    leaves = [x[name].requires_grad_() for name in wanted]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@ONE_OF_EACH
@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck_without_statistics(ragged, impl):
    x, options = Case(3, 4, 5, dtype=torch.float64, ragged=ragged).make()
    leaves = (x["x"].requires_grad_(), x["b"].requires_grad_())
    assert torch.autograd.gradcheck(lambda x, b: zk.scale_grad(x, b, impl=impl, **options), leaves)
    assert torch.autograd.gradcheck(lambda x, b: zk.scale_bias_grad(x, b, impl=impl, **options), leaves)
    assert torch.autograd.gradcheck(lambda b: zk.bias_grad(b, impl=impl, **options), leaves[1:])


@ONE_OF_EACH
def test_derivatives_have_the_dtypes_of_their_operands(impl):
    x, options = Case(3, 4, 5, dtype=torch.float32, b_dtype=torch.bfloat16).make()
    leaves = [x[name].requires_grad_() for name in OPERANDS]
    grads = torch.autograd.grad(sum(y.sum() for y in call(x, options, impl).values()), leaves)
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_a_layer_norms_own_gradients_are_the_sums(impl):
    x, b = (torch.randn(4, 9, 35, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    weight, bias = torch.ones(35, requires_grad=True), torch.zeros(35, requires_grad=True)
    out, mean, rstd = torch.native_layer_norm(x, (35,), weight, bias, 1e-5)
    out.backward(b)
    scale, shift = zk.scale_bias_grad(x, b, mean=mean, rstd=rstd, impl=impl)
    torch.testing.assert_close(scale.sum(0), weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shift.sum(0), bias.grad, rtol=1e-5, atol=1e-5)


@ONE_OF_EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(ragged, dtype, impl):
    x, options = Case(3, 4, 5, dtype=dtype, ragged=ragged).make()
    if ragged:
        x = {name: y.unsqueeze(0) for name, y in x.items()}
    x = {name: y.detach().requires_grad_() for name, y in x.items()}
    rest = (options.get("example_ids"), options.get("num_examples", 3))
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float64:
        checks.append("test_aot_dispatch_dynamic")
    op = torch.ops.zsl.scale_bias_grad.default
    for operands, bias in (
        ((x["x"], x["b"], x["mean"], x["rstd"]), True),
        ((x["x"], x["b"], None, x["rstd"]), False),
        ((None, x["b"], None, None), True),
    ):
        opcheck(op, (*operands, *rest, bias, impl), test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_compiles_as_one_graph(ragged, dynamic):
    torch._dynamo.reset()
    x, options = Case(3, 4, 5, dtype=torch.float64, ragged=ragged).make()
    leaves = [x[name].requires_grad_() for name in OPERANDS]

    def function(x, b, mean, rstd):
        both = zk.scale_bias_grad(x, b, mean=mean, rstd=rstd, **options)
        return *both, zk.bias_grad(b, **options), zk.scale_grad(x, b, rstd=rstd, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = [f(*leaves) for f in (compiled, function)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(sum(y.sum() for y in r), leaves) for r in results))


GOOD = {"x": torch.zeros(3, 4, 5), "b": torch.zeros(3, 4, 5), "mean": torch.zeros(3, 4), "rstd": torch.zeros(3, 4, 1)}
RAGGED = {
    "x": torch.zeros(6, 5),
    "b": torch.zeros(6, 5),
    "mean": torch.zeros(6),
    "rstd": torch.zeros(6, 1),
    "example_ids": torch.zeros(6, dtype=torch.int64),
    "num_examples": 3,
}


@pytest.mark.parametrize(
    ("good", "change", "error", "words"),
    [
        (GOOD, {"x": None}, TypeError, ["x:", "Tensor", "NoneType"]),
        (GOOD, {"x": torch.zeros(3, 4, 5, dtype=torch.int32)}, TypeError, ["x:", "float32", "int32"]),
        (GOOD, {"x": torch.zeros(3, 5)}, ValueError, ["x:", "(N, T, K)", "(3, 5)"]),
        (GOOD, {"b": torch.zeros(3, 4, 6)}, ValueError, ["b:", "(3, 4, 5)", "(3, 4, 6)"]),
        (GOOD, {"b": torch.zeros(3, 4, 5, device="meta")}, ValueError, ["b:", "cpu", "meta"]),
        (GOOD, {"mean": torch.zeros(3)}, ValueError, ["mean:", "(3, 4)", "(3,)"]),
        (GOOD, {"mean": 0.0}, TypeError, ["mean:", "Tensor", "float"]),
        (GOOD, {"rstd": torch.zeros(3, 4, 5)}, ValueError, ["rstd:", "(3, 4)", "(3, 4, 5)"]),
        (GOOD, {"rstd": torch.zeros(3, 4, device="meta")}, ValueError, ["rstd:", "cpu", "meta"]),
        (GOOD, {"num_examples": 3}, ValueError, ["num_examples:", "example_ids", "3"]),
        (GOOD, {"impl": "fast"}, ValueError, ["impl:", "chunked", "'fast'"]),
        (RAGGED, {"x": torch.zeros(6, 1, 5)}, ValueError, ["x:", "(R, K)", "(6, 1, 5)"]),
        (RAGGED, {"num_examples": None}, ValueError, ["num_examples:", "None"]),
        (RAGGED, {"num_examples": -1}, ValueError, ["num_examples:", ">= 0", "-1"]),
        (RAGGED, {"example_ids": torch.zeros(7, dtype=torch.int64)}, ValueError, ["example_ids:", "(6,)", "(7,)"]),
        (RAGGED, {"example_ids": torch.zeros(6)}, TypeError, ["example_ids:", "integers", "float32"]),
        (RAGGED, {"example_ids": [0] * 6}, TypeError, ["example_ids:", "Tensor", "list"]),
        (RAGGED, {"example_ids": torch.full((6,), 3)}, IndexError, ["example_ids:", "[0, 3)", "3"]),
        (RAGGED, {"example_ids": torch.full((6,), -1)}, IndexError, ["example_ids:", "-1"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
def test_bad_arguments(impl, good, change, error, words):
    arguments = {"impl": impl, **good, **change}
    for function in (zk.scale_grad, zk.scale_bias_grad):
        rest = dict(arguments)
        with pytest.raises(error) as raised:
            function(rest.pop("x"), rest.pop("b"), **rest)
        assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("b", [torch.zeros(3, 5), torch.zeros(3, 4, 5, dtype=torch.int64), None], ids=["2-D", "integers", "none"])
def test_bad_bias_operands(b):
    with pytest.raises((TypeError, ValueError), match=r"^b: expected"):
        zk.bias_grad(b)


def test_tensors_without_data_give_shapes():
    x = torch.empty(3, 4, 5, device="meta", dtype=torch.bfloat16)
    for field in (*zk.scale_bias_grad(x, x), zk.bias_grad(x), zk.scale_grad(x, x)):
        assert field.is_meta
        assert field.shape == (3, 5)
        assert field.dtype == torch.float32
