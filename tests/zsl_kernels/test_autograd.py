"""Derivatives of every op: against finite differences, and against autograd through the reference."""

import math

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import (
    CALLS,
    DIFFERENTIATED,
    DTYPES,
    EMPTY_SIZES,
    LAYOUTS,
    OPERANDS,
    SIZES,
    Problem,
    assert_exact,
    assert_within_budget,
    cotangents,
    expected,
    expected_gradients,
    gradients,
)

SMALL = Problem(2, 3, 4, 3, M=2, dtype=torch.float64)
# The instruction sets share what these tests are about.
ONE_OF_EACH = pytest.mark.parametrize("impl", ["chunked", "cpu"], indirect=True)
# Every field of the widest call: its derivative's own term.
FIELDS = ["grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm", "dot", "abs_dot", "gram"]
# Each alone, and those whose derivatives need no gradient of their own example.
SOME_FIELDS = [*((field,) for field in FIELDS), ("grad_sum", "gram"), ("dot", "gram"), ("grad_sum", "dot")]
EVERYTHING = "interference, all"


def subsets(call):
    """All operands, and each alone."""
    names = OPERANDS[call]
    return [names, *((name,) for name in names)]


@ONE_OF_EACH
@pytest.mark.parametrize(("call", "wanted"), [(call, wanted) for call in CALLS for wanted in subsets(call)], ids=str)
def test_gradcheck(call, wanted, impl):
    """In float64, for every subset of operands that require gradients; gradcheck leaves cotangents undefined as well."""
    x = SMALL.make()
    leaves = [getattr(x, name).requires_grad_() for name in wanted]
    results = CALLS[call](x, impl)
    used = [name for name, field in results.items() if field.requires_grad]  # a direction reaches only dot and abs_dot

    def function(*tensors):
        results = CALLS[call](x.replace(**dict(zip(wanted, tensors, strict=True))), impl)
        return tuple(results[name] for name in used)

    assert used
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("size", ["one position", "off the register tile", "past one chunk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", DIFFERENTIATED)
def test_stays_in_the_error_budget(call, dtype, size, impl):
    problem = Problem(*SIZES[size], dtype=dtype)
    got = gradients(call, problem.make(), impl, cotangents(problem, call))
    for name, e in expected_gradients(problem, call).items():
        assert_within_budget(got[name], e, name)


@pytest.mark.parametrize("call", ["interference, all", "cross gram"])
def test_is_exact_past_one_tile(call, impl):
    problem = Problem(*SIZES["past one tile"], M=2, values="integers")
    got = gradients(call, problem.make(), impl, cotangents(problem, call))
    for name, e in expected_gradients(problem, call).items():
        assert_exact(got[name], e, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", DIFFERENTIATED)
def test_is_exact_on_integers(call, dtype, layout, impl):
    """The sign of a zero included: integers have many."""
    problem = Problem(5, 11, 45, 31, dtype=dtype, layout=layout, values="integers")
    got = gradients(call, problem.make(), impl, cotangents(problem, call))
    for name, e in expected_gradients(problem, call).items():
        assert_exact(got[name], e, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", SOME_FIELDS, ids="+".join)
def test_of_some_fields_is_exact_on_integers(fields, dtype, impl):
    """The other cotangents are undefined then, not zeros."""
    problem = Problem(5, 11, 45, 31, dtype=dtype, values="integers")
    got = gradients(EVERYTHING, problem.make(), impl, cotangents(problem, EVERYTHING, fields))
    want = expected_gradients(problem, EVERYTHING, fields)
    for name, gradient in got.items():
        if name in want:
            assert_exact(gradient, want[name], name)
        else:
            assert gradient is None, f"{fields} do not depend on {name}"


@ONE_OF_EACH
@pytest.mark.parametrize("size", EMPTY_SIZES)
@pytest.mark.parametrize("call", DIFFERENTIATED)
def test_of_nothing_is_nothing(call, size, impl):
    problem = Problem(*EMPTY_SIZES[size])
    got = gradients(call, problem.make(), impl, cotangents(problem, call))
    for name, e in expected_gradients(problem, call).items():
        assert_exact(got[name], e, name)


@ONE_OF_EACH
def test_operands_that_need_no_gradient_get_none(impl):
    x = SMALL.make()
    results = CALLS[EVERYTHING](x, impl)
    assert not any(field.requires_grad for field in results.values())
    b = x.b.requires_grad_()
    sum(field.sum() for field in CALLS[EVERYTHING](x, impl).values()).backward()
    assert b.grad is not None
    assert x.a.grad is None
    assert x.direction.grad is None


@ONE_OF_EACH
def test_no_graph_without_grad_mode(impl):
    x = SMALL.make()
    x.a.requires_grad_()
    with torch.no_grad():
        assert not any(field.requires_grad for field in CALLS[EVERYTHING](x, impl).values())


@ONE_OF_EACH
def test_inputs_changed_in_place_are_noticed(impl):
    x = SMALL.make()
    leaf = x.a.requires_grad_()
    a = leaf * 1
    loss = zk.sq_norm(a, x.b, impl=impl).sum()
    with torch.no_grad():
        a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ONE_OF_EACH
def test_a_shared_input_gets_the_sum_over_examples(impl):
    """Positions embedded once and expanded over the batch."""
    problem = Problem(4, 7, 33, 13, dtype=torch.float64)
    x = problem.make()
    grads = []
    for name in (impl, "reference"):
        row = x.a[:1].clone().requires_grad_()
        zk.interference(row.expand(4, -1, -1), x.b, impl=name).abs_sum.square().sum().backward()
        grads.append(row.grad)
    torch.testing.assert_close(*grads)


@ONE_OF_EACH
@pytest.mark.parametrize("field", FIELDS)
def test_infinite_gradients_spoil_only_what_depends_on_them(field, impl):
    """An example's gradient is infinite; the derivative of grad_sum, say, does not look at it."""
    problem = Problem(3, 5, 33, 13)
    x = problem.make()
    x.a[1, 2, 3] = math.inf
    cs = cotangents(problem, EVERYTHING, (field,))
    want = gradients(EVERYTHING, x, "reference", cs)
    for name, gradient in gradients(EVERYTHING, x, impl, cs).items():
        if want[name] is not None:
            assert torch.equal(gradient.isfinite(), want[name].isfinite()), name


@ONE_OF_EACH
@pytest.mark.parametrize("call", DIFFERENTIATED)
def test_second_derivatives_are_right_or_refused(call, impl):
    """Never silently wrong, zero or cut off."""
    x = SMALL.make()

    def second(impl):
        names = OPERANDS[call]
        leaves = [getattr(x, name).detach().clone().requires_grad_() for name in names]
        results = CALLS[call](x.replace(**dict(zip(names, leaves, strict=True))), impl)
        loss = sum((e.truth.to(e.dtype) * results[name]).sum() for name, e in expected(SMALL, call).items())
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)

    try:
        got = second(impl)
    except (NotImplementedError, RuntimeError):
        return
    for g, w in zip(got, second("reference"), strict=True):
        torch.testing.assert_close(g, w)
