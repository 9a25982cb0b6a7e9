"""What holds for every input: hypothesis draws sizes, dtypes, layouts and values."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zsl_kernels as zk
from tests.inputs import (
    CALLS,
    DIFFERENTIATED,
    DTYPES,
    IRREGULAR_CALLS,
    LAYOUTS,
    OPERANDS,
    Inputs,
    Irregular,
    Problem,
    assert_exact,
    assert_within_budget,
    cotangents,
    expected,
    expected_gradients,
    gradients,
    implementations,
    running,
)

live = [name for name in implementations() if name != "cpu"]
# Small sizes, and those next to the edges of register tiles and chunks.
features = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 96, 97]))
positions = st.one_of(st.integers(1, 12), st.sampled_from([255, 256, 257, 300]))


def drawn(values=("normal", "wide", "integers"), dtypes=DTYPES, fewest=1):
    return st.builds(
        Problem,
        N=st.integers(fewest, 9),
        T=positions,
        K=features,
        O=features,
        M=st.integers(1, 6),
        dtype=st.sampled_from(dtypes),
        layout=st.sampled_from(list(LAYOUTS)),
        values=st.sampled_from(values),
        seed=st.integers(0, 2**31),
    )


# Sums of integers are exact: what these properties say must hold to the last bit.
exactly = drawn(values=("integers",))
everywhere = st.sampled_from(live)


@given(drawn(), st.sampled_from(list(CALLS)), everywhere)
def test_results_stay_in_the_error_budget(problem, call, implementation):
    with running(implementation) as impl:
        for name, result in CALLS[call](problem.make(), impl).items():
            assert_within_budget(result, expected(problem, call)[name], name)


@given(drawn(values=("integers",)), st.sampled_from(DIFFERENTIATED), everywhere)
def test_gradients_of_integers_are_exact_where_nothing_rounds(problem, call, implementation):
    want = expected_gradients(problem, call)
    with running(implementation) as impl:
        got = gradients(call, problem.make(), impl, cotangents(problem, call))
    for name, e in want.items():
        if e.scale.max() < 2**24:
            assert_exact(got[name], e, name)
        else:
            assert_within_budget(got[name], e, name)


def everything(x: Inputs, implementation: str) -> zk.InterferenceSums:
    with running(implementation) as impl:
        return zk.interference(x.a, x.b, direction=x.direction, gram=True, impl=impl)


@given(exactly, everywhere, st.randoms(use_true_random=False))
def test_permuting_the_examples_permutes_scalars_and_leaves_sums(problem, implementation, random):
    x = problem.make()
    order = list(range(problem.N))
    random.shuffle(order)
    sums, moved = everything(x, implementation), everything(x.replace(a=x.a[order], b=x.b[order]), implementation)
    for name in ("grad_sum", "abs_sum", "sq_sum"):
        assert torch.equal(getattr(moved, name), getattr(sums, name)), name
    for name in ("l1", "sq_norm", "dot", "abs_dot"):
        assert torch.equal(getattr(moved, name), getattr(sums, name)[order]), name
    assert torch.equal(moved.gram, sums.gram[order][:, order])


@given(drawn(values=("integers",), fewest=2), everywhere, st.data())
def test_splitting_the_batch_splits_scalars_and_adds_sums(problem, implementation, data):
    x = problem.make()
    at = data.draw(st.integers(0, problem.N))
    sums = everything(x, implementation)
    parts = [everything(x.replace(a=x.a[part], b=x.b[part]), implementation) for part in (slice(0, at), slice(at, None))]
    for name in ("grad_sum", "abs_sum", "sq_sum"):
        assert torch.equal(sum(getattr(part, name) for part in parts), getattr(sums, name)), name
    for name in ("l1", "sq_norm", "dot", "abs_dot"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(sums, name)), name
    assert torch.equal(parts[0].gram, sums.gram[:at, :at])


@given(exactly, everywhere, st.sampled_from([-2.0, -1.0, 0.0, 0.5, 4.0]))
def test_scaling_b_scales_each_field_by_its_power(problem, implementation, c):
    """Powers of two, so that scaling rounds nothing."""
    x = problem.make()
    sums, scaled = everything(x, implementation), everything(x.replace(b=x.b * c), implementation)
    power = {"grad_sum": c, "dot": c, "sq_sum": c * c, "sq_norm": c * c, "gram": c * c}
    for name, field in scaled._asdict().items():
        assert torch.equal(field, getattr(sums, name) * power.get(name, abs(c))), name


@given(exactly, everywhere)
def test_shuffling_features_moves_columns_only(problem, implementation):
    x = problem.make()
    sums = everything(x, implementation)
    moved = everything(x.replace(a=x.a.flip(2), b=x.b.flip(2), direction=x.direction.flip(0, 1)), implementation)
    for name, field in moved._asdict().items():
        want = getattr(sums, name)
        assert torch.equal(field, want.flip(0, 1) if name in ("grad_sum", "abs_sum", "sq_sum") else want), name


@given(drawn(), everywhere)
def test_fields_agree_with_each_other(problem, implementation):
    sums = everything(problem.make(), implementation)
    eps, N = torch.finfo(sums.grad_sum.dtype).eps, problem.N
    slack = 1 + 4 * N * eps  # of sums of N terms, each a rounding away
    assert (sums.abs_sum * slack >= sums.grad_sum.abs()).all()
    assert (sums.sq_sum * slack * N >= sums.grad_sum.square() / slack).all()  # Cauchy and Schwarz
    assert (sums.sq_norm >= 0).all()
    assert (sums.abs_dot * (1 + 1e-4) >= sums.dot.abs()).all()
    want = expected(problem, "interference, all")
    allowed = want["gram"].allowed().diagonal() + want["sq_norm"].allowed() + 2 * want["sq_norm"].rounding()
    assert ((sums.gram.diagonal() - sums.sq_norm).abs() <= allowed).all()
    assert torch.allclose(sums.l1.sum().double(), sums.abs_sum.double().sum(), rtol=1e-4)
    assert torch.allclose(sums.sq_norm.sum().double(), sums.sq_sum.double().sum(), rtol=1e-4)


# What is not finite. Zero times it is NaN, so that it reaches every product with an example's gradient, whatever way computes it.
# (Infinity or NaN: that depends on the way, where both signs of infinity meet.)
not_finite = st.sampled_from([math.nan, math.inf, -math.inf])


def spoil(x, value, data):
    """A copy with one number replaced."""
    spoiled = x.clone(memory_format=torch.contiguous_format)
    spoiled.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = value
    return spoiled


def assert_finite_alike(found, want):
    assert torch.equal(found.isfinite(), want.isfinite())


@given(
    drawn(values=("normal", "integers")),
    st.sampled_from(["interference, gram", "gram", "cross gram"]),
    everywhere,
    not_finite,
    st.data(),
)
def test_a_gram_is_finite_where_the_definitions_is(problem, call, implementation, value, data):
    x = problem.make()
    name = data.draw(st.sampled_from(OPERANDS[call]))
    x = x.replace(**{name: spoil(getattr(x, name), value, data)})
    want = CALLS[call](Inputs(**{name: y.double() for name, y in x.tensors().items()}), "reference")["gram"]
    with running(implementation) as impl:
        assert_finite_alike(CALLS[call](x, impl)["gram"], want)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any),
    st.integers(0, 3),
    st.sampled_from(["interference, all", "gram"]),
    everywhere,
    not_finite,
    st.data(),
)
def test_a_gram_of_ragged_rows_is_finite_where_the_definitions_is(lengths, S, call, implementation, value, data):
    x = Irregular(tuple(lengths), 7, 5, S=S if call != "gram" else 0, seed=data.draw(st.integers(0, 99))).make()
    name = data.draw(st.sampled_from([name for name in ("a", "b", "e") if name in x]))
    x[name] = spoil(x[name], value, data)
    wide = {name: y.double() if y.is_floating_point() else y for name, y in x.items()}
    with running(implementation) as impl:
        assert_finite_alike(IRREGULAR_CALLS[call](x, impl)["gram"], IRREGULAR_CALLS[call](wide, "reference")["gram"])


@given(st.integers(1, 80), features, everywhere, not_finite, st.data())
def test_a_gram_of_held_gradients_is_finite_where_the_definitions_is(N, K, implementation, value, data):
    g = spoil(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), value, data)
    with running(implementation) as impl:
        assert_finite_alike(zk.dense_interference(g, gram=True, impl=impl).gram, g.double() @ g.double().T)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 5), everywhere, not_finite, st.data())
def test_a_gram_of_an_embedding_is_finite_where_the_definitions_is(N, T, V, implementation, value, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ids = torch.randint(-1, V, (N, T), generator=generator)
    b = spoil(torch.randn(N, T, 5, generator=generator), value, data)
    with running(implementation) as impl:
        found = zk.embedding_interference(ids, b, V, gram=True, impl=impl).gram
    assert_finite_alike(found, zk.embedding_interference(ids, b.double(), V, gram=True, impl="reference").gram)


@given(drawn(values=("integers",), dtypes=(torch.float32, torch.float64)), everywhere)
def test_weighted_grad_and_dot_are_each_others_adjoints(problem, implementation):
    """Σ_i w_i ⟨g_i, u⟩ = ⟨Σ_i w_i g_i, u⟩."""
    x = problem.make()
    with running(implementation) as impl:
        left = (zk.dot(x.a, x.b, x.direction, impl=impl) * x.weights).sum()
        right = (zk.weighted_grad(x.a, x.b, x.weights, impl=impl) * x.direction).sum()
    assert left == right


@pytest.mark.parametrize("values", ["normal", "wide", "integers"])
def test_equal_problems_make_equal_inputs(values):
    problem = Problem(3, 5, 7, 9, values=values)
    for name, x in problem.make().tensors().items():
        assert torch.equal(x, dataclasses.replace(problem).make().tensors()[name])
        assert not torch.equal(x, dataclasses.replace(problem, seed=1).make().tensors()[name])
