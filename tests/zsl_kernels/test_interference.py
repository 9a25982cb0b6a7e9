"""interference against its specification: accuracy, exactness, edges, memory that was never written, NaN and Inf."""

import math

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import (
    CALLS,
    EMPTY_SIZES,
    LAYOUTS,
    SIZES,
    Problem,
    assert_exact,
    assert_within_budget,
    exact_problems,
    expected,
    problems,
)

FORMS = [call for call in CALLS if call.startswith("interference")]


def test_poison_is_live():
    """What the other tests rely on: torch.empty, which C++ calls as well, holds NaN in floats and in workspaces of bytes."""
    assert torch.empty(9).isnan().all()
    assert torch.empty(16, dtype=torch.uint8).view(torch.float32).isnan().all()


@pytest.mark.parametrize("problem", problems(), ids=str)
@pytest.mark.parametrize("call", FORMS)
def test_stays_in_the_error_budget(call, problem, impl):
    results = CALLS[call](problem.make(), impl)
    for name, e in expected(problem, call).items():
        assert_within_budget(results[name], e, name)


def test_sums_over_thousands_of_examples_do_not_drift(impl):
    """All terms of one sign, where one chain of 5000 additions in float32 is off by 30 eps or more."""
    x = Problem(5000, 1, 33, 13).make()
    truth = zk.interference(x.a.double(), x.b.double(), impl="reference")
    sums = zk.interference(x.a, x.b, impl=impl)
    for name in ("abs_sum", "sq_sum"):
        error = (getattr(sums, name) / getattr(truth, name) - 1).abs().max().item()
        assert error < 8 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("problem", exact_problems(), ids=str)
def test_is_exact_on_integers(problem, impl):
    results = CALLS["interference, all"](problem.make(), impl)
    for name, e in expected(problem, "interference, all").items():
        assert_exact(results[name], e, name)


@pytest.mark.parametrize("problem", [Problem(*size) for size in EMPTY_SIZES.values()], ids=EMPTY_SIZES)
def test_of_nothing_is_zero(problem, impl):
    results = CALLS["interference, all"](problem.make(), impl)
    for name, e in expected(problem, "interference, all").items():
        assert_exact(results[name], e, name)
        assert not results[name].any()


@pytest.mark.parametrize("problem", [Problem(*SIZES["off the register tile"]), Problem(*SIZES["past one tile"])], ids=str)
def test_fields_do_not_depend_on_what_else_was_asked(problem, impl):
    x = problem.make()
    everything = CALLS["interference, all"](x, impl)
    for call in FORMS:
        fields = CALLS[call](x, impl)
        assert ("dot" in fields) == ("abs_dot" in fields) == (call in ("interference, direction", "interference, all"))
        assert ("gram" in fields) == (call in ("interference, gram", "interference, all"))
        for name, field in fields.items():
            torch.testing.assert_close(field, everything[name], rtol=1e-5, atol=1e-5 * everything[name].abs().max().item())


def test_gram_is_symmetric_and_its_diagonal_is_the_norm(impl):
    sums = CALLS["interference, all"](Problem(11, 8, 45, 31).make(), impl)
    torch.testing.assert_close(sums["gram"], sums["gram"].T, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(sums["gram"].diagonal(), sums["sq_norm"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("direction_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_direction_may_have_any_dtype_and_layout(layout, direction_dtype, impl):
    x = Problem(3, 5, 33, 13, dtype=torch.bfloat16, values="integers").make()
    direction = LAYOUTS[layout](x.direction.to(direction_dtype))
    got = zk.interference(x.a, x.b, direction=direction, impl=impl)
    want = zk.interference(x.a, x.b, direction=x.direction, impl="reference")
    assert torch.equal(got.dot, want.dot)
    assert torch.equal(got.abs_dot, want.abs_dot)


def test_views_with_a_pending_negation_are_read_negated(impl):
    z = torch.view_as_complex(torch.randn(3, 5, 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    a, b = z.conj().imag, torch.ones(3, 5, 4, dtype=torch.float64)
    assert a.is_neg()
    torch.testing.assert_close(zk.interference(a, b, impl=impl).grad_sum, zk.interference(a.clone(), b, impl="reference").grad_sum)


def test_inputs_are_left_as_they_were(impl):
    x = Problem(3, 5, 33, 13, layout="sliced").make()
    before = {name: tensor.clone() for name, tensor in x.tensors().items()}
    for call in CALLS.values():
        call(x, impl)
    for name, tensor in x.tensors().items():
        assert torch.equal(tensor, before[name]), name


# Where a number that is not finite stands: inside, at the last row and column of an operand, and in each operand.
SPOTS = {"first": (0, 0, 0), "inside": (1, 2, 3), "last": (-1, -1, -1)}


@pytest.mark.parametrize("size", [(3, 5, 33, 13), (3, 1, 33, 13), (2, 257, 9, 7)], ids=str)
@pytest.mark.parametrize("spot", SPOTS)
@pytest.mark.parametrize("operand", ["a", "b", "direction"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_comes_through_where_the_reference_has_it(value, operand, spot, size, impl):
    problem = Problem(*size)
    x = problem.make()
    at = SPOTS[spot]
    if size[1] == 1:
        at = (at[0], 0, at[2])
    getattr(x, operand)[at if operand != "direction" else at[1:]] = value
    for call in CALLS:
        want = CALLS[call](x, "reference")
        for name, field in CALLS[call](x, impl).items():
            assert torch.equal(field.isfinite(), want[name].isfinite()), f"{call}: {name}"
            if name in ("grad_sum", "abs_sum", "sq_sum"):  # elementwise: no other order of summation makes another of NaN and ±Inf
                torch.testing.assert_close(field, want[name], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_infinities_next_to_padding_do_not_become_nan(dtype, impl):
    """Panels are padded with zeros, and 0·Inf is NaN: it must not leak from the padding into the scalars."""
    a, b = torch.ones(2, 3, 33, dtype=dtype), torch.ones(2, 3, 13, dtype=dtype)
    a[0, 1], b[1, 2] = math.inf, math.inf
    sums = zk.interference(a, b, direction=torch.ones(13, 33, dtype=dtype), gram=True, impl=impl)
    for name, field in sums._asdict().items():
        assert (field == math.inf).all(), name


def test_overflow_of_half_precision_inputs_is_none():
    """65504² is far past float16: inputs are widened before they are multiplied."""
    a, b = torch.full((2, 3, 5), 65504.0, dtype=torch.float16), torch.full((2, 3, 4), 65504.0, dtype=torch.float16)
    assert zk.interference(a, b).grad_sum.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_is_widened_exactly(dtype, cpu_isa):
    """All 65536 of them, subnormals too, times one. But the processors' bf16 products take subnormals as zero."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = zk.interference(numbers.view(1, 1, -1), torch.ones(1, 1, 1, dtype=dtype), impl="cpu").grad_sum.view(-1)
    want = numbers.float()
    if dtype == torch.bfloat16:
        tiny = want.abs() < torch.finfo(torch.float32).tiny
        assert tiny.sum() == 2**8  # 127 of each sign, and the zeros
        if cpu_isa in ("cpu-avx512_bf16", "cpu-amx", "cpu-amx_emulated"):
            want = torch.where(tiny, 0.0, want)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_offsets_past_31_bits(tmp_path, cpu_isa):
    """Strides of 2³¹ elements, over a sparse file of which a few pages are touched."""
    stride, (N, T, K, O) = 2**31 + 3, (2, 2, 3, 2)
    size = (N - 1) * stride + (T - 1) * 1000 + K
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2 * size)
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    a = storage.as_strided((N, T, K), (stride, 1000, 1))
    a.copy_(torch.arange(N * T * K).view(N, T, K))
    b = torch.ones(N, T, O, dtype=torch.bfloat16)
    assert torch.equal(zk.interference(a, b, impl="cpu").grad_sum, a.float().sum((0, 1)).expand(O, K))
    assert torch.equal(torch.ops.zsl_cpu.ghost(a, b, a, b, True, False), zk.gram(a.contiguous(), b, impl="reference"))
