"""The embedding's part of a tied weight: every statistic is of the sum of both parts."""

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import (
    DTYPES,
    IRREGULAR_CALLS,
    Irregular,
    assert_exact,
    assert_within_budget,
    expected_irregular,
    irregular_gradients,
)

CALLS = [call for call in IRREGULAR_CALLS if call.startswith("interference")]
EVERYTHING = "interference, all"
ONE_OF_EACH = pytest.mark.parametrize("impl", ["chunked", "cpu"], indirect=True)


def regular(N, T, K, O, S, **options):
    return Irregular((T,) * N, K, O, S, ragged=False, **options)


# Few rows of many and all of few; one position, none, both sides of a chunk, past two; past one tile; ragged rows, examples
# without rows among them.
PROBLEMS = [
    regular(3, 5, 33, 90, 4),
    regular(4, 1, 40, 25, 60),
    regular(3, 0, 17, 9, 5),
    regular(2, 256, 33, 30, 9),
    regular(2, 257, 33, 30, 9),
    regular(2, 513, 19, 37, 7),
    regular(3, 4, 391, 397, 20),
    regular(3, 6, 33, 45, 9, values="wide"),
    *(regular(3, 300, 40, 50, 11, dtype=dtype) for dtype in DTYPES),
    Irregular((0, 3, 1, 0, 300, 7), 33, 70, 6),
    Irregular((0, 0, 0), 33, 70, 6),
]
EXACT = [
    problem
    for dtype in DTYPES
    for layout in ("contiguous", "permuted", "sliced")
    for problem in (
        regular(4, 11, 45, 61, 30, dtype=dtype, layout=layout, values="integers"),
        Irregular((0, 5, 1, 20), 45, 61, 30, dtype=dtype, layout=layout, values="integers"),
    )
] + [regular(2, 257, 9, 25, 40, dtype=dtype, values="integers") for dtype in DTYPES]
EMPTY = {
    "no lookups": {"ids": torch.zeros(3, 0, dtype=torch.int64), "e": torch.zeros(3, 0, 33)},
    "only padding": {"ids": torch.full((3, 4), -100), "e": torch.full((3, 4, 33), torch.nan)},
}


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_stays_in_the_error_budget(call, problem, impl):
    results = IRREGULAR_CALLS[call](problem.make(), impl)
    for name, e in expected_irregular(problem, call).items():
        assert_within_budget(results[name], e, name)


@pytest.mark.parametrize("problem", EXACT, ids=str)
def test_is_exact_on_integers(problem, impl):
    results = IRREGULAR_CALLS[EVERYTHING](problem.make(), impl)
    for name, e in expected_irregular(problem, EVERYTHING).items():
        assert_exact(results[name], e, name)


@pytest.mark.parametrize("e_dtype", DTYPES, ids=str)
def test_the_embedding_may_have_another_dtype(e_dtype, impl):
    problem = regular(3, 7, 33, 40, 6, dtype=torch.bfloat16, e_dtype=e_dtype, values="integers")
    for name, field in IRREGULAR_CALLS[EVERYTHING](problem.make(), impl).items():
        assert_exact(field, expected_irregular(problem, EVERYTHING)[name], name)


@pytest.mark.parametrize("ragged", [False, True], ids=["regular", "ragged"])
def test_is_that_of_more_rows_with_a_one_each(ragged, impl):
    """Of the reference too: a lookup is a position whose input is e and whose output gradient is one at its id."""
    x = Irregular((7,) * 4, 33, 50, 9, ragged=ragged, values="integers").make()
    one = torch.nn.functional.one_hot(x["ids"].clamp(min=0), 50).float() * (x["ids"] >= 0)[..., None]
    dim = 0 if ragged else 1
    joined = {**x, "a": torch.cat([x["a"], x["e"]], dim), "b": torch.cat([x["b"], one], dim)}
    if ragged:
        joined["example_ids"] = torch.cat([x["example_ids"], x["e_examples"]])
    for name in ("ids", "e", "e_examples"):
        joined.pop(name, None)
    want = IRREGULAR_CALLS[EVERYTHING](joined, "reference")
    for form in (impl, "reference"):
        for name, field in IRREGULAR_CALLS[EVERYTHING](x, form).items():
            assert torch.equal(field, want[name]), name


@pytest.mark.parametrize("T", [3, 300])
def test_every_single_row_lands_where_it_belongs(T, impl):
    """One lookup at a time: the register tile that it touches, and no other, starts from it."""
    x = regular(2, T, 70, 27, 1, values="integers").make()
    plain = zk.interference(x["a"], x["b"], impl="reference").grad_sum
    for row in range(27):
        ids = torch.tensor([[row], [-1]])
        sums = zk.interference(x["a"], x["b"], gram=True, embedding=(ids, x["e"]), impl=impl)
        want = plain.clone()
        want[row] += x["e"][0, 0]
        assert torch.equal(sums.grad_sum, want), row
        assert torch.equal(sums.gram.diagonal(), sums.sq_norm), row


@pytest.mark.parametrize("name", EMPTY)
def test_without_lookups_is_the_plain_result(name, impl):
    x = regular(3, 7, 33, 40, 0).make()
    plain = IRREGULAR_CALLS[EVERYTHING](x, impl)
    for field, result in IRREGULAR_CALLS[EVERYTHING]({**x, **EMPTY[name]}, impl).items():
        assert torch.equal(result, plain[field]), field


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_without_lookups_has_the_plain_derivatives(name, gram, impl):
    x = regular(3, 7, 33, 40, 0, values="integers").make()
    found = []
    for given in ({}, EMPTY[name]):
        a, b = (x[k].clone().requires_grad_() for k in "ab")
        e = given["e"].clone().requires_grad_() if given else None
        sums = zk.interference(a, b, gram=gram, impl=impl, embedding=(given["ids"], e) if given else None)
        sum(field.sum() for field in sums if field is not None).backward()
        found.append((a.grad, b.grad))
    for plain, empty in zip(*found, strict=True):
        torch.testing.assert_close(empty, plain, rtol=1e-5, atol=1e-5)
    assert e.grad is not None
    assert not e.grad.any()


@pytest.mark.parametrize(("N", "K", "O"), [(0, 5, 6), (3, 0, 6), (3, 5, 0)])
def test_of_nothing_is_zero(N, K, O, impl):
    options = {"embedding": (torch.full((N, 2), -1 if O == 0 else 0, dtype=torch.int32), torch.zeros(N, 2, K)), "impl": impl}
    for field in zk.interference(torch.zeros(N, 4, K), torch.zeros(N, 4, O), direction=torch.zeros(O, K), gram=True, **options):
        assert not field.any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32], ids=str)
@ONE_OF_EACH
def test_ids_may_have_any_integer_dtype(dtype, impl):
    problem = Irregular((2, 0, 9, 1), 33, 20, 5, values="integers")
    x = problem.make()
    narrow = {name: t if t.is_floating_point() else t.to(dtype) for name, t in x.items()}
    for name, field in IRREGULAR_CALLS[EVERYTHING](narrow, impl).items():
        assert_exact(field, expected_irregular(problem, EVERYTHING)[name], name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_comes_through_where_the_reference_has_it(value, impl):
    x = regular(3, 7, 33, 40, 4).make()
    x["ids"][1, 2], x["e"][1, 2, 32] = 39, value
    want = IRREGULAR_CALLS[EVERYTHING](x, "reference")
    for name, field in IRREGULAR_CALLS[EVERYTHING](x, impl).items():
        assert torch.equal(field.isfinite(), want[name].isfinite()), name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_call_gives_the_same_bits_with_any_number_of_threads(count, threads, impl):
    threads(count)
    problem = regular(5, 40, 150, 110, 64)
    x = problem.make()
    first = IRREGULAR_CALLS[EVERYTHING](x, impl)
    gradients = irregular_gradients(EVERYTHING, x, impl, ("a", "b", "e"), first)
    for _ in range(2):
        for name, result in IRREGULAR_CALLS[EVERYTHING](x, impl).items():
            assert torch.equal(result, first[name]), name
            assert_within_budget(result, expected_irregular(problem, EVERYTHING)[name], name)
        for name, result in irregular_gradients(EVERYTHING, x, impl, ("a", "b", "e"), first).items():
            assert torch.equal(result, gradients[name]), name


def test_inputs_are_left_as_they_were(impl):
    x = regular(3, 7, 33, 40, 9, layout="sliced").make()
    before = {name: t.clone() for name, t in x.items()}
    IRREGULAR_CALLS[EVERYTHING](x, impl)
    for name, t in x.items():
        assert torch.equal(t, before[name]), name


# Derivatives ---------------------------------------------------------------------------------------------------------------------


@ONE_OF_EACH
@pytest.mark.parametrize("ragged", [False, True], ids=["regular", "ragged"])
@pytest.mark.parametrize("call", CALLS)
def test_gradcheck(call, ragged, impl):
    x = Irregular((2, 0, 3) if ragged else (3, 3), 4, 5, 3, ragged=ragged, dtype=torch.float64).make()
    wanted = ("a", "b", "e")

    def function(*leaves):
        return tuple(IRREGULAR_CALLS[call]({**x, **dict(zip(wanted, leaves, strict=True))}, impl).values())

    assert torch.autograd.gradcheck(function, [x[name].requires_grad_() for name in wanted])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["regular", "ragged"])
def test_derivatives_are_exact_on_integers(ragged, dtype, impl):
    x = Irregular((11,) * 4, 45, 31, 6, ragged=ragged, dtype=dtype, values="integers").make()
    results = IRREGULAR_CALLS[EVERYTHING](x, "reference")
    generator = torch.Generator().manual_seed(1)
    given = {name: torch.randint(-1, 2, f.shape, generator=generator).to(f.dtype) for name, f in results.items()}
    wide = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    want = irregular_gradients(EVERYTHING, wide, "reference", ("a", "b", "e"), {name: c.double() for name, c in given.items()})
    for name, gradient in irregular_gradients(EVERYTHING, x, impl, ("a", "b", "e"), given).items():
        assert gradient.dtype == x[name].dtype
        torch.testing.assert_close(gradient, want[name].to(dtype), rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_the_derivative_along_the_direction_is_refused():
    x = regular(2, 3, 4, 5, 3).make()
    u = x["direction"].requires_grad_()
    sums = zk.interference(x["a"], x["b"], direction=u, embedding=(x["ids"], x["e"]))
    with pytest.raises(NotImplementedError, match=r"embedding.*direction"):
        sums.dot.sum().backward()


@pytest.mark.parametrize("ragged", [False, True], ids=["regular", "ragged"])
def test_compiles_as_one_graph(ragged):
    torch._dynamo.reset()
    x = Irregular((3, 3), 33, 13, 4, ragged=ragged, dtype=torch.float64).make()
    compiled = torch.compile(IRREGULAR_CALLS[EVERYTHING], fullgraph=True, backend="aot_eager")

    def both(function):
        leaves = {name: x[name].detach().clone().requires_grad_() for name in ("a", "b", "e")}
        results = function({**x, **leaves}, "auto")
        sum(field.sum() for field in results.values()).backward()
        return {**results, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}

    want = both(IRREGULAR_CALLS[EVERYTHING])
    for name, field in both(compiled).items():
        torch.testing.assert_close(field, want[name], msg=lambda m, name=name: f"{name}: {m}")


# Errors --------------------------------------------------------------------------------------------------------------------------

IDS, E = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 5)
ERRORS = [
    (IDS, TypeError, ["embedding:", "ids (N, S), e (N, S, K)", "Tensor"]),
    ((IDS, E, IDS), TypeError, ["embedding:", "tuple", "3 items"]),
    ((IDS, None), TypeError, ["embedding: e:", "Tensor", "NoneType"]),
    ((IDS, E.int()), TypeError, ["embedding: e:", "float32", "int32"]),
    ((IDS, E[0]), ValueError, ["embedding: e:", "(2, S, 5)", "(3, 5)"]),
    ((IDS, E[:1]), ValueError, ["embedding: e:", "(2, S, 5)", "(1, 3, 5)"]),
    ((IDS, E[:, :, :4]), ValueError, ["embedding: e:", "(2, S, 5)", "(2, 3, 4)"]),
    ((IDS.to("meta"), E), ValueError, ["embedding: ids:", "cpu", "meta"]),
    ((IDS, E.to("meta")), ValueError, ["embedding: e:", "cpu", "meta"]),
    ((IDS.tolist(), E), TypeError, ["embedding: ids:", "Tensor", "list"]),
    ((IDS.float(), E), TypeError, ["embedding: ids:", "integers", "float32"]),
    ((IDS[:, :2], E), ValueError, ["embedding: ids:", "(2, 3)", "(2, 2)"]),
    ((IDS + 6, E), IndexError, ["embedding: ids:", "[0, 6)", "6"]),
]
RAGGED_ERRORS = [
    ((IDS[0], E[0]), TypeError, ["embedding:", "example ids (Q,)", "2 items"]),
    ((IDS, E, IDS), ValueError, ["embedding: e:", "(Q, 5)", "(2, 3, 5)"]),
    ((IDS[0], E[0], IDS), ValueError, ["embedding: example ids:", "(3,)", "(2, 3)"]),
    ((IDS[0], E[0], IDS[0] + 2), IndexError, ["embedding: example ids:", "[0, 2)", "2"]),
    ((IDS[0], E[0], IDS[0] - 1), IndexError, ["embedding: example ids:", "[0, 2)", "-1"]),
    ((IDS[0], E[0], E[0, :, 0]), TypeError, ["embedding: example ids:", "integers", "float32"]),
]


@pytest.mark.parametrize(
    ("ragged", "embedding", "error", "words"), [(False, *case) for case in ERRORS] + [(True, *case) for case in RAGGED_ERRORS]
)
@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_bad_arguments(impl, ragged, embedding, error, words):
    a, b = torch.zeros(2, 4, 5), torch.zeros(2, 4, 6)
    options = {"example_ids": IDS[:, 0], "num_examples": 2} if ragged else {}
    with pytest.raises(error) as raised:
        zk.interference(*((x[:, 0] if ragged else x) for x in (a, b)), embedding=embedding, impl=impl, **options)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.skipif(zk.build_info()["cpu"] != "live", reason="the CPU kernels are not live")
@pytest.mark.parametrize("features", [[0, 0], [1, 0], [0, 6], [-1, 0]], ids=str)
def test_the_kernels_check_the_added_rows_that_they_are_given(features):
    a, b = torch.zeros(1, 4, 5), torch.zeros(1, 4, 6)
    with pytest.raises(RuntimeError, match="ascending features below 6"):
        torch.ops.zsl_cpu.interference(
            a, b, None, False, 12, 32, None, torch.tensor([0, 2]), torch.tensor(features), torch.zeros(2, 5)
        )
