"""The Triton kernels of the ghost products, derivatives and head on CPU tensors, by Triton's interpreter.

Not collected by itself: test_triton.py runs it in a process of its own. What the ops' own tests do not reach: both sides of the
kernels' edges, every way of going through the workspace, infinities beside what is filled up.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

import zsl_kernels as zk
from tests import error_budgets
from tests.error_budgets import Sizes
from tests.inputs import (
    Expected,
    Irregular,
    Problem,
    assert_exact,
    assert_within_budget,
    expectations,
    expected,
    irregular_sizes_of,
    sizes_of,
)
from zsl_kernels import streamed_head as head
from zsl_kernels.backends import dispatch
from zsl_kernels.backends.chunked.gradients import interference_backward as portable_backward
from zsl_kernels.backends.triton import backward, ghost, linear_cross_entropy
from zsl_kernels.planning import gpu_cost
from zsl_kernels.planning.choose import Plan
from zsl_kernels.ragged import group
from zsl_kernels.tied import Embedding
from zsl_kernels.types import Cotangents

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# Ghost ---------------------------------------------------------------------------------------------------------------------------

# Positions: one; several examples in a block, a power of two and not; the last that share one; one block, past it, past two.
# Examples: one, and off the block.
GHOSTS = [
    Problem(1, 1, 5, 3),
    Problem(70, 1, 20, 12, M=65),
    Problem(9, 5, 33, 13, M=20, dtype=BF16, layout="sliced"),
    Problem(9, 8, 33, 13, dtype=FP16, layout="shared"),
    Problem(3, 32, 70, 20),
    Problem(3, 33, 20, 70, layout="permuted"),
    Problem(2, 128, 8, 8, dtype=BF16),
    Problem(2, 129, 8, 8, dtype=BF16, layout="permuted"),
    Problem(2, 140, 8, 9),
    Problem(4, 7, 9, 40, values="wide"),
]


def ghost_plan(op: str, a: Tensor, b: Tensor, a2: Tensor | None = None) -> Plan:
    plan = dispatch.plan_call(op, a, b, impl="triton", a2=a2)
    return dataclasses.replace(plan, candidates=tuple(c for c in plan.candidates if c.way == "ghost"))


@pytest.mark.parametrize("problem", GHOSTS, ids=str)
def test_ghost_products_stay_in_the_error_budget(problem):
    x = problem.make()
    plan = ghost_plan("gram", x.a, x.b)
    gram = ghost.gram(plan, x.a, x.b, None, None)
    assert_within_budget(gram, expected(problem, "gram")["gram"])
    assert torch.equal(gram, gram.T)
    cross = ghost.gram(ghost_plan("gram", x.a, x.b, x.a2), x.a, x.b, x.a2, x.b2)
    assert_within_budget(cross, expected(problem, "cross gram")["gram"])
    norms = ghost.sq_norm(ghost_plan("sq_norm", x.a, x.b), x.a, x.b)
    assert_within_budget(norms, expected(problem, "sq_norm")["sq_norm"])


@pytest.mark.parametrize(
    "problem", [Problem(5, 9, 20, 13, values="integers", dtype=FP16), Problem(2, 65, 20, 13, values="integers")], ids=str
)
def test_ghost_products_of_integers_are_exact(problem):
    x = problem.make()
    assert_exact(ghost.gram(ghost_plan("gram", x.a, x.b), x.a, x.b, None, None), expected(problem, "gram")["gram"])
    assert_exact(ghost.sq_norm(ghost_plan("sq_norm", x.a, x.b), x.a, x.b), expected(problem, "sq_norm")["sq_norm"])


def test_ghost_products_of_a_program_with_several_blocks_of_positions():
    """On a device so small that the positions of a pair go to one program."""
    problem = Problem(2, 140, 8, 9)
    x = problem.make()
    plan = ghost_plan("gram", x.a, x.b)
    small = dataclasses.replace(plan, call=dataclasses.replace(plan.call, gpu=dataclasses.replace(plan.call.gpu, sms=1)))
    assert_within_budget(ghost.gram(small, x.a, x.b, None, None), expected(problem, "gram")["gram"])
    cross = ghost.gram(small, x.a, x.b, x.a2, x.b2)
    assert_within_budget(cross, expected(problem, "cross gram")["gram"])


def test_an_infinity_reaches_its_own_example_alone():
    """Zero times infinity is NaN: what fills up a block must not meet it."""
    x = Problem(4, 5, 6, 7).make()
    x.a[1, 2, 3] = math.inf
    gram = ghost.gram(ghost_plan("gram", x.a, x.b), x.a, x.b, None, None)
    rest = torch.tensor([0, 2, 3])
    assert not gram[1].isfinite().any()
    assert gram[rest][:, rest].isfinite().all()
    x = Problem(1, 3, 4, 2).make()
    x.a[...], x.b[...] = 1, 1
    x.a[0, 1, 1] = math.inf
    assert ghost.sq_norm(ghost_plan("sq_norm", x.a, x.b), x.a, x.b).tolist() == [math.inf]


# Derivatives ----------------------------------------------------------------------------------------------------------------------


def cotangents(N: int, O: int, K: int, generator: torch.Generator) -> Cotangents:
    shapes = [(O, K)] * 3 + [(N,)] * 4
    return Cotangents(*(torch.randn(shape, generator=generator) for shape in shapes))


def assert_derivatives(found: tuple[Tensor | None, ...], arguments: tuple, sizes: Sizes) -> None:
    """Against the portable form in float64."""
    a, b, u, c, mix, a2, b2, want, begin, added = arguments

    def of_rows(results: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """With the derivative of each of the embedding's rows: sums that no row is part of are any value."""
        da, db, d_added = results
        return da, db, d_added if added is None or d_added is None else added.each_row(d_added)

    # What is not a tensor stays.
    tensors = {"a": a, "b": b, "u": u, "mix": mix, "a2": a2, "b2": b2, "e": None if added is None else added.values}
    tensors |= {f"c.{name}": x for name, x in c._asdict().items()}
    tensors = {name: x for name, x in tensors.items() if x is not None}

    def compute(x):
        wide = None if added is None else added._replace(values=x["e"])
        given = Cotangents(**{name: x.get(f"c.{name}") for name in Cotangents._fields})
        results = portable_backward(x["a"], x["b"], x.get("u"), given, x.get("mix"), x["a2"], x["b2"], want, begin, wide)
        return dict(zip(("a", "b", "e"), of_rows(results), strict=True))

    dtypes = {name: x.dtype for name, x in tensors.items()}
    # A second set of M examples takes the place of the first.
    errors = error_budgets.gradients("interference, all", dataclasses.replace(sizes, N=max(sizes.N, sizes.M)))
    expected = expectations(compute, tensors, errors, dtypes, a.dtype)
    for name, x in zip(("a", "b", "e"), of_rows(found), strict=True):
        assert (x is not None) == (name in expected)
        if x is not None:
            assert_within_budget(x, expected[name], name)


# Workspace: all at once; some examples at a time; some rows of one.
WORKSPACES = (64 << 20, 4_000, 700)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize(
    "problem",
    [
        Problem(3, 5, 33, 13),
        Problem(3, 9, 20, 17, dtype=FP16, layout="shared"),
        Problem(3, 34, 20, 11, M=2, dtype=BF16, layout="sliced"),
    ],
    ids=str,
)
def test_derivatives_are_right_for_any_workspace(problem, workspace, monkeypatch):
    monkeypatch.setattr(gpu_cost, "BACKWARD_BYTES", workspace)
    x, generator = problem.make(), torch.Generator().manual_seed(1)
    plan = dispatch.plan_call("interference_backward", x.a, x.b, impl="triton")
    every = cotangents(problem.N, problem.O, problem.K, generator)
    mix = torch.randn(problem.N, problem.M, generator=generator)
    for c, given in ((every, None), (every, mix), (Cotangents(), mix)):
        arguments = (x.a, x.b, x.direction, c, given, x.a2, x.b2, (True, True, False), None, None)
        assert_derivatives(backward.backward(plan, *arguments), arguments, sizes_of(problem))


@pytest.mark.parametrize("field", Cotangents._fields)
def test_each_cotangent_has_its_own_derivative(field):
    problem = Problem(3, 4, 18, 9)
    x, generator = problem.make(), torch.Generator().manual_seed(2)
    c = Cotangents(**{field: getattr(cotangents(3, 9, 18, generator), field)})
    plan = dispatch.plan_call("interference_backward", x.a, x.b, impl="triton")
    arguments = (x.a, x.b, x.direction, c, None, x.a, x.b, (True, True, False), None, None)
    assert_derivatives(backward.backward(plan, *arguments), arguments, sizes_of(problem))


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize(
    ("problem", "mixed"),
    list(
        itertools.product(
            [Irregular((3, 0, 66, 1, 9), 20, 11, S=4, dtype=BF16), Irregular((4, 4, 4), 33, 13, S=6, ragged=False)], (False, True)
        )
    ),
    ids=str,
)
def test_derivatives_of_ragged_rows_and_tied_weights(problem, mixed, workspace, monkeypatch):
    monkeypatch.setattr(gpu_cost, "BACKWARD_BYTES", workspace)
    x, generator, N = problem.make(), torch.Generator().manual_seed(3), len(problem.lengths)
    a, b, begin = x["a"], x["b"], None
    e_examples = torch.arange(N)[:, None].expand(N, problem.S)
    if problem.ragged:
        groups = group(x["example_ids"], N)
        a, b, begin, e_examples = groups.gather(a), groups.gather(b), groups.begin, x["e_examples"]
    tied = Embedding(x["ids"].flatten(), x["e"].flatten(0, -2), e_examples.flatten())
    added = tied.added(N, problem.O, a.dtype)
    plan = dispatch.plan_call("interference_backward", a, b, impl="triton", gram=mixed, num_examples=N, added=True)
    mix = torch.randn(N, N, generator=generator) if mixed else None
    c = cotangents(N, problem.O, problem.K, generator)
    arguments = (a, b, x["direction"], c, mix, a, b, (True, True, True), begin, added)
    sizes = irregular_sizes_of(problem)
    assert_derivatives(backward.backward(plan, *arguments), arguments, sizes)
    if not mixed:  # the embedding adds no row to any of a slab's
        bare = (*arguments[:7], (True, True, False), begin, None)
        assert_derivatives(backward.backward(plan, *(*arguments[:-1], None)), bare, sizes)


def test_derivatives_that_float16_cannot_hold_as_factors():
    """s is past the largest float16, b so small that their product is not."""
    a, b = torch.ones(2, 3, 4, dtype=FP16), torch.full((2, 3, 5), 2.0**-14, dtype=FP16)
    c = Cotangents(grad_sum=torch.full((5, 4), 1e6))
    plan = dispatch.plan_call("interference_backward", a, b, impl="triton")
    da, _, _ = backward.backward(plan, a, b, None, c, None, a, b, (True, False, False))
    torch.testing.assert_close(da, torch.full_like(da, 5 * 2.0**-14 * 1e6), rtol=2e-3, atol=0)


# Head -----------------------------------------------------------------------------------------------------------------------------

IGNORED = -100


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("N", "T", "K", "V"), [(1, 1, 1, 1), (2, 5, 33, 13), (3, 50, 20, 300), (2, 3, 70, 129)])
def test_heads_without_logits(N, T, K, V, dtype):
    generator = torch.Generator().manual_seed(4)
    h = torch.randn(K, N, T, generator=generator).to(dtype).movedim(0, -1)
    weight = torch.randn(V, 2 * K, generator=generator).to(dtype)[:, ::2]
    targets = torch.randint(0, V, (N, T), generator=generator)
    if T > 1:
        targets[:, 1] = IGNORED
    c = torch.randn(N, T, generator=generator)
    logits = h.double() @ weight.double().T
    losses, lse = head.forward(h, weight, targets, IGNORED, 100, "triton")
    want = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), targets, ignore_index=IGNORED, reduction="none")
    found = targets != IGNORED
    onehot = torch.nn.functional.one_hot(targets.where(found, 0), V)
    errors = error_budgets.head(h.double(), weight.double(), onehot, c.double().where(found, 0), dtype)

    def allowed(truth, beside, dtype):
        return Expected(truth, torch.zeros_like(truth), error_budgets.EXACT, dtype, FP32, dtype != FP32, beside)

    assert_within_budget(losses, allowed(want, errors.losses, FP32))
    assert_within_budget(lse, allowed(logits.logsumexp(-1), errors.lse, torch.float64))
    b = torch.cat([b.clone() for _, _, b in head.output_gradients(h, weight, targets, lse, c, IGNORED, 100, "triton")], 2)
    assert b.dtype == dtype
    want = ((logits.softmax(-1) - onehot) * c[..., None].double()).where(found[..., None], 0)
    assert_within_budget(b, allowed(want, errors.b, dtype))
    assert not b[~found].any()


def test_a_program_with_several_blocks_of_the_vocabulary(monkeypatch):
    """On a device so small that they do not all go to programs of their own; the logits grow from block to block, and fall."""
    kernels = linear_cross_entropy
    gpu = dataclasses.replace(kernels.gpu_of(torch.device("cpu")), sms=1)
    monkeypatch.setattr(kernels, "gpu_of", lambda device: gpu)
    V = 3 * 4 * 256 + 5
    h, weight = torch.ones(1, 2, 1), torch.linspace(-8, 8, V)[:, None]
    h[0, 1] = -1
    targets = torch.tensor([[V - 1, 3]])
    logits = h.double() @ weight.double().T
    losses, lse = head.forward(h, weight, targets, IGNORED, V, "triton")
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.double(), lse - logits.gather(2, targets[..., None])[..., 0], rtol=1e-6, atol=1e-6)


def test_large_logits_neither_overflow_nor_cancel():
    h, weight = torch.tensor([[[1e4]], [[-1e4]]]), torch.tensor([[1.0], [-1.0], [0.99]])
    targets = torch.tensor([[0], [0]])
    losses, lse = head.forward(h, weight, targets, IGNORED, 2, "triton")
    assert losses.tolist() == [[pytest.approx(math.exp(-100), abs=1e-6)], [2e4]]
    assert lse.tolist() == [[1e4], [1e4]]
    b = torch.cat(
        [b.clone() for _, _, b in head.output_gradients(h, weight, targets, lse, torch.ones(2, 1), IGNORED, 2, "triton")], 2
    )
    torch.testing.assert_close(b, torch.tensor([[[0.0, 0.0, 0.0]], [[-1.0, 1.0, 0.0]]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("negated", ["h", "weight"])
def test_heads_of_a_pending_negation(negated):
    """The imaginary part of a conjugate is a view whose numbers in memory have the other sign."""
    generator = torch.Generator().manual_seed(7)
    views = {
        name: torch.randn(shape, dtype=torch.complex64, generator=generator).conj().imag
        for name, shape in (("h", (2, 5, 6)), ("weight", (9, 6)))
    }
    h, weight = (x if name == negated else x.resolve_neg() for name, x in views.items())
    assert (h.is_neg(), weight.is_neg()) == (negated == "h", negated == "weight")
    targets = torch.randint(0, 9, (2, 5), generator=generator)

    def run(h: Tensor, weight: Tensor) -> list[Tensor]:
        losses, lse = head.forward(h, weight, targets, IGNORED, 4, "triton")
        chunks = head.output_gradients(h, weight, targets, lse, torch.ones(2, 5), IGNORED, 4, "triton")
        return [losses, lse, *(b.clone() for _, _, b in chunks)]

    for x, y in zip(run(h, weight), run(h.resolve_neg(), weight.resolve_neg()), strict=True):
        assert torch.equal(x, y)


def test_the_head_under_statistics_is_that_of_the_portable_form():
    generator = torch.Generator().manual_seed(5)
    found = {}
    for impl in ("triton", "chunked"):
        generator.manual_seed(5)
        h = torch.randn(3, 20, 17, generator=generator).requires_grad_()
        weight = torch.randn(40, 17, generator=generator).requires_grad_()
        targets = torch.randint(0, 40, (3, 20), generator=generator)
        kept: list[zk.InterferenceSums] = []
        losses = zk.linear_cross_entropy(h, weight, targets, statistics=kept.append, gram=True, vocabulary_chunk=16, impl=impl)
        losses.sum().backward()
        found[impl] = (losses.detach(), h.grad, weight.grad, *(x for x in kept[0] if x is not None))
    for x, y in zip(found["triton"], found["chunked"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
