"""Rows that name their example: parity with the specification, any order, empty and long examples, derivatives, errors."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zsl_kernels as zk
from tests.inputs import (
    DTYPES,
    IRREGULAR_CALLS,
    IRREGULAR_OPERANDS,
    Irregular,
    assert_exact,
    assert_within_budget,
    expected_irregular,
    irregular_gradients,
)
from zsl_kernels.backends.chunked import gradients
from zsl_kernels.ragged import group

# Empty examples first, inside and last; one of a thousand rows among single ones; both sides of a chunk of positions; more
# examples than rows; one example.
PROBLEMS = [
    Irregular((0, 3, 1, 0, 0, 7, 2, 0), 33, 13),
    Irregular((1000, *([1] * 20)), 20, 30),
    Irregular((256, 257, 5, 513), 33, 13),
    Irregular((2, 0, 3) + (0,) * 20, 40, 25),
    Irregular((1, 0, 3) * 50, 40, 25),
    Irregular((9,), 17, 7),
    Irregular((3, 5, 4), 391, 197),
    Irregular((3, 70, 2), 33, 45, values="wide"),
    *(Irregular((0, 300, 7, 12, 1), 70, 50, dtype=dtype) for dtype in DTYPES),
]
EXACT = [
    Irregular((0, 5, 1, 40, 3), 45, 31, dtype=dtype, layout=layout, values="integers")
    for dtype in DTYPES
    for layout in ("contiguous", "permuted", "sliced")
] + [Irregular((300, 0, 1, 257), 9, 7, dtype=dtype, values="integers") for dtype in DTYPES]
EMPTY = {
    "no rows": Irregular((0, 0, 0), 5, 6),
    "no examples": Irregular((), 5, 6),
    "no inputs": Irregular((2, 0, 3), 0, 6),
    "no outputs": Irregular((2, 0, 3), 5, 0),
}
ONE_OF_EACH = pytest.mark.parametrize("impl", ["chunked", "cpu"], indirect=True)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("call", IRREGULAR_CALLS)
def test_stays_in_the_error_budget(call, problem, impl):
    results = IRREGULAR_CALLS[call](problem.make(), impl)
    for name, e in expected_irregular(problem, call).items():
        assert_within_budget(results[name], e, name)


@pytest.mark.parametrize("problem", EXACT, ids=str)
@pytest.mark.parametrize("call", ["interference, all", "gram", "dot", "sq_norm", "weighted_grad"])
def test_is_exact_on_integers(call, problem, impl):
    results = IRREGULAR_CALLS[call](problem.make(), impl)
    for name, e in expected_irregular(problem, call).items():
        assert_exact(results[name], e, name)


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("call", IRREGULAR_CALLS)
def test_of_nothing_is_zero(call, name, impl):
    results = IRREGULAR_CALLS[call](EMPTY[name].make(), impl)
    for field, e in expected_irregular(EMPTY[name], call).items():
        assert_exact(results[field], e, field)
        assert not results[field].any()


@pytest.mark.parametrize("call", IRREGULAR_CALLS)
def test_is_that_of_the_same_rows_in_a_rectangle(call, impl):
    """The reference, too."""
    regular = Irregular((7,) * 4, 33, 13, ragged=False, values="integers").make()
    ids = torch.arange(4).repeat_interleave(7)
    flat = {**regular, "a": regular["a"].flatten(0, 1), "b": regular["b"].flatten(0, 1), "example_ids": ids}
    for name, field in IRREGULAR_CALLS[call](regular, "reference").items():
        assert torch.equal(IRREGULAR_CALLS[call](flat, impl)[name], field), name
        assert torch.equal(IRREGULAR_CALLS[call](flat, "reference")[name], field), name


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@ONE_OF_EACH
def test_ids_may_have_any_integer_dtype_and_stride(dtype, impl):
    problem = Irregular((2, 0, 9, 1), 33, 13, values="integers")
    x = problem.make()
    ids = torch.stack([x["example_ids"], x["example_ids"] * 0 + 99], 1).to(dtype)[:, 0]
    for call in IRREGULAR_CALLS:
        for name, field in IRREGULAR_CALLS[call]({**x, "example_ids": ids}, impl).items():
            assert_exact(field, expected_irregular(problem, call)[name], name)


@pytest.mark.parametrize("call", IRREGULAR_CALLS)
def test_rows_sorted_by_the_caller_give_the_same_bits(call, impl):
    """Only the order of an example's rows among themselves is an order of summation."""
    x = Irregular((0, 300, 7, 12, 1), 70, 50).make()
    ids, order = x["example_ids"].sort(stable=True)
    in_order = {**x, "a": x["a"][order], "b": x["b"][order], "example_ids": ids}
    got = IRREGULAR_CALLS[call](x, impl)
    for name, field in IRREGULAR_CALLS[call](in_order, impl).items():
        assert torch.equal(got[name], field), name


def test_rows_may_share_their_memory(impl):
    """An operand expanded over the rows: stride 0, which in (N, T, ·) would mean that it is packed once."""
    x = Irregular((0, 3, 8, 5), 33, 13, values="integers").make()
    x["a"] = x["a"][:1].expand(16, -1)
    for call in IRREGULAR_CALLS:
        want = IRREGULAR_CALLS[call](x, "reference")
        for name, field in IRREGULAR_CALLS[call](x, impl).items():
            assert torch.equal(field, want[name]), name


@pytest.mark.parametrize("operand", ["a", "b", "direction"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_comes_through_where_the_reference_has_it(value, operand, impl):
    """An example without rows too: zero times an infinite direction is not zero."""
    x = Irregular((0, 3, 8, 5), 33, 13).make()
    x[operand][2, 3] = value
    for call in IRREGULAR_CALLS:
        want = IRREGULAR_CALLS[call](x, "reference")
        for name, field in IRREGULAR_CALLS[call](x, impl).items():
            assert torch.equal(field.isfinite(), want[name].isfinite()), f"{call}: {name}"


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("call", IRREGULAR_CALLS)
def test_the_same_call_gives_the_same_bits_with_any_number_of_threads(call, count, threads, impl):
    threads(count)
    problem = Irregular((0, 100, 7, 12, 1, 0, 40), 150, 110)
    x = problem.make()
    wanted = IRREGULAR_OPERANDS.get(call, ("a", "b"))
    first = IRREGULAR_CALLS[call](x, impl)
    gradients = irregular_gradients(call, x, impl, wanted, first)
    for _ in range(2):
        for name, result in IRREGULAR_CALLS[call](x, impl).items():
            assert torch.equal(result, first[name]), name
            assert_within_budget(result, expected_irregular(problem, call)[name], name)
        for name, result in irregular_gradients(call, x, impl, wanted, first).items():
            assert torch.equal(result, gradients[name]), name


# Derivatives ---------------------------------------------------------------------------------------------------------------------


@ONE_OF_EACH
@pytest.mark.parametrize("call", IRREGULAR_CALLS)
def test_gradcheck(call, impl):
    x = Irregular((2, 0, 3, 1), 4, 3, dtype=torch.float64).make()
    wanted = IRREGULAR_OPERANDS.get(call, ("a", "b"))

    def function(*leaves):
        return tuple(IRREGULAR_CALLS[call]({**x, **dict(zip(wanted, leaves, strict=True))}, impl).values())

    assert torch.autograd.gradcheck(function, [x[name].requires_grad_() for name in wanted])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(0, 5, 1, 40, 3), (0, 0), (300, 2)], ids=str)
@pytest.mark.parametrize("call", ["interference, all", "gram", "dot", "sq_norm", "weighted_grad"])
def test_derivatives_are_exact_on_integers(call, lengths, dtype, impl):
    x = Irregular(lengths, 45, 31, dtype=dtype, values="integers").make()
    results = IRREGULAR_CALLS[call](x, "reference")
    generator = torch.Generator().manual_seed(1)
    given = {name: torch.randint(-1, 2, f.shape, generator=generator).to(f.dtype) for name, f in results.items()}
    wanted = IRREGULAR_OPERANDS.get(call, ("a", "b"))
    # In float64 where a float32 sum of these integers would round.
    wide = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    want = irregular_gradients(call, wide, "reference", wanted, {name: c.double() for name, c in given.items()})
    assert all(g.abs().max() < 2**24 for g in want.values() if g.numel())
    for name, gradient in irregular_gradients(call, x, impl, wanted, given).items():
        assert gradient.dtype == x[name].dtype
        torch.testing.assert_close(gradient, want[name].to(x[name].dtype), rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_second_derivatives_are_refused():
    x = Irregular((2, 0, 3, 1), 4, 3, dtype=torch.float64).make()
    a = x["a"].requires_grad_()
    options = {"example_ids": x["example_ids"], "num_examples": 4}
    (da,) = torch.autograd.grad(zk.sq_norm(a, x["b"], **options).sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="once"):
        torch.autograd.grad(da.sum(), a)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("call", ["interference, all", "gram", "dot", "sq_norm", "weighted_grad"])
def test_compiles_as_one_graph(call, dynamic):
    torch._dynamo.reset()
    x = Irregular((2, 0, 9, 1), 33, 13, dtype=torch.float64).make()
    wanted = IRREGULAR_OPERANDS.get(call, ("a", "b"))
    compiled = torch.compile(IRREGULAR_CALLS[call], fullgraph=True, backend="aot_eager", dynamic=dynamic)

    def both(function):
        leaves = {name: x[name].detach().clone().requires_grad_() for name in wanted}
        results = function({**x, **leaves}, "auto")
        sum(field.sum() for field in results.values()).backward()
        return {**results, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}

    want = both(IRREGULAR_CALLS[call])
    for name, field in both(compiled).items():
        torch.testing.assert_close(field, want[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("call", IRREGULAR_CALLS)
def test_tensors_without_data_give_shapes(call):
    x = Irregular((2, 0, 9, 1), 33, 13, dtype=torch.bfloat16).make()
    want = IRREGULAR_CALLS[call](x, "auto")
    for name, field in IRREGULAR_CALLS[call]({key: t.to("meta") for key, t in x.items()}, "auto").items():
        assert (field.shape, field.dtype) == (want[name].shape, want[name].dtype), name


# Work and memory -----------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that a tensor had."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.count = max(self.count, x.numel())
        return out


def test_the_chunked_form_does_not_pad_to_the_longest_example():
    x = Irregular((1000, *([1] * 499)), 64, 32).make()
    groups = group(x["example_ids"], 500)
    with Largest() as largest:
        gradients.interference(groups.gather(x["a"]), groups.gather(x["b"]), None, False, groups.begin)
    assert largest.count <= 500 * 32 * 64  # the gradients; padded inputs would be half as much again for each of b and a ...
    with Largest() as largest:
        gradients._parts(x["a"], x["b"], groups.begin)
    assert largest.count <= 2 * 1500 * 64  # ... and are at most twice what they were


def test_plans_have_the_mean_of_the_rows_and_only_direct_ways():
    plan = zk.plan("sq_norm", N=32, T=1, K=500, O=500, irregular=True)
    assert {c.way for c in plan.candidates} <= {"direct", "chunked"}
    assert "ghost" in {c.way for c in zk.plan("sq_norm", N=32, T=1, K=500, O=500).candidates}
    assert "irregular" in str(plan)


@pytest.mark.skipif(zk.build_info()["cpu"] != "live", reason="the CPU kernels are not live")
@pytest.mark.parametrize(("call", "kernel"), [("gram", "gram_direct"), ("sq_norm", "sq_norm_direct")])
def test_calls_go_the_direct_way(call, kernel):
    x = Irregular((1,) * 20, 100, 100).make()
    with torch.autograd.profiler.profile() as profile:
        IRREGULAR_CALLS[call](x, "cpu")
    assert {event.name for event in profile.function_events if event.name.startswith("zsl_cpu::")} == {f"zsl_cpu::{kernel}"}


# Errors --------------------------------------------------------------------------------------------------------------------------

A, B, IDS = torch.zeros(4, 5), torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
ERRORS = [
    ({"num_examples": None}, ValueError, ["num_examples:", "None"]),
    (
        {"example_ids": None, "a": torch.zeros(1, 4, 5), "b": torch.zeros(1, 4, 6)},
        ValueError,
        ["num_examples:", "example_ids", "3"],
    ),
    ({"num_examples": 2.0}, TypeError, ["num_examples:", "int", "float"]),
    ({"num_examples": True}, TypeError, ["num_examples:", "int", "bool"]),
    ({"num_examples": -1}, ValueError, ["num_examples:", ">= 0", "-1"]),
    ({"example_ids": [0, 0, 0, 0]}, TypeError, ["example_ids:", "Tensor", "list"]),
    ({"example_ids": IDS.float()}, TypeError, ["example_ids:", "integers", "float32"]),
    ({"example_ids": IDS.bool()}, TypeError, ["example_ids:", "integers", "bool"]),
    ({"example_ids": IDS[:3]}, ValueError, ["example_ids:", "(4,)", "(3,)"]),
    ({"example_ids": IDS[None]}, ValueError, ["example_ids:", "(4,)", "(1, 4)"]),
    ({"example_ids": IDS.to("meta")}, ValueError, ["example_ids:", "cpu", "meta"]),
    ({"example_ids": IDS + 3}, IndexError, ["example_ids:", "[0, 3)", "3"]),
    ({"example_ids": IDS - 1}, IndexError, ["example_ids:", "[0, 3)", "-1"]),
    ({"num_examples": 0}, IndexError, ["example_ids:", "[0, 0)", "0"]),
    ({"a": torch.zeros(1, 4, 5)}, ValueError, ["a:", "(R, K)", "(1, 4, 5)"]),
    ({"b": torch.zeros(1, 4, 6)}, ValueError, ["b:", "(R, O)", "(1, 4, 6)"]),
    ({"b": torch.zeros(5, 6)}, ValueError, ["b:", "(4, O)", "(5, 6)"]),
]
FUNCTIONS = {
    "interference": zk.interference,
    "gram": zk.gram,
    "sq_norm": zk.sq_norm,
    "dot": lambda a, b, **o: zk.dot(a, b, torch.zeros(6, 5), **o),
    "weighted_grad": lambda a, b, **o: zk.weighted_grad(a, b, torch.zeros(3), **o),
}


@pytest.mark.parametrize(("change", "error", "words"), ERRORS, ids=lambda x: "-".join(map(str, x)) if isinstance(x, list) else "")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_bad_arguments(impl, name, change, error, words):
    arguments = {"a": A, "b": B, "example_ids": IDS, "num_examples": 3, **change}
    if name == "weighted_grad" and words[1] == "[0, 0)":
        pytest.skip("the weights are wrong before the ids")
    with pytest.raises(error) as raised:
        FUNCTIONS[name](impl=impl, **arguments)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_second_set_is_refused():
    with pytest.raises(ValueError, match="a2, b2: expected none with example_ids"):
        zk.gram(A, B, A, B, example_ids=IDS, num_examples=3)


def test_weights_are_those_of_the_examples():
    with pytest.raises(ValueError, match=r"weights: expected shape \(3,\)"):
        zk.weighted_grad(A, B, torch.zeros(4), example_ids=IDS, num_examples=3)


@pytest.mark.skipif(zk.build_info()["cpu"] != "live", reason="the CPU kernels are not live")
@pytest.mark.parametrize("begin", [[0, 2], [0, 5, 4], [1, 4], []], ids=str)
def test_the_kernels_check_the_offsets_that_they_are_given(begin):
    with pytest.raises(RuntimeError, match="expected offsets"):
        torch.ops.zsl_cpu.sq_norm_direct(A, B, 12, 32, torch.tensor(begin, dtype=torch.int64))
