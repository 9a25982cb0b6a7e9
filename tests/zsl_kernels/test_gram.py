"""gram, self and cross, in every way of computing it: as the plan says, direct and ghost."""

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import CALLS, EMPTY_SIZES, SIZES, Problem, assert_exact, assert_within_budget, exact_problems, expected, problems

ops = torch.ops.zsl_cpu
# As cpu.py calls them, whatever the plan would choose.
WAYS = {
    "ghost": lambda x: ops.ghost(x.a, x.b, x.a, x.b, True, False),
    "ghost, cross": lambda x: ops.ghost(x.a, x.b, x.a2, x.b2, False, False),
    "ghost, norms": lambda x: ops.ghost(x.a, x.b, x.a, x.b, True, True),
    "direct": lambda x: ops.gram_direct(x.a, x.b, x.a, x.b, True, 24, 64),
    "direct, cross": lambda x: ops.gram_direct(x.a, x.b, x.a2, x.b2, False, 24, 64),
    "direct, norms": lambda x: ops.sq_norm_direct(x.a, x.b, 24, 64),
}


def field_of(way):
    """The public call and its field that a way computes."""
    if "norms" in way:
        return "sq_norm", "sq_norm"
    return ("cross gram" if "cross" in way else "gram"), "gram"


# More second examples than first, as many, fewer; none.
CROSS = [Problem(2, 5, 33, 13, M=9), Problem(5, 40, 20, 20, M=5), Problem(9, 3, 33, 13, M=1), Problem(3, 5, 33, 13, M=0)]
# So many that sums in vectors are kept for a band of rows at a time (a MiB of them).
MANY = Problem(600, 1, 20, 12, M=520)
# The ghost's blocks of 96 rows: examples that fill one, straddle its edge, are longer than it; features past one chunk.
BLOCKS = [Problem(3, 96, 8, 8), Problem(5, 37, 8, 8), Problem(2, 200, 8, 8), Problem(100, 1, 300, 290), Problem(3, 33, 257, 513)]


@pytest.mark.parametrize("problem", problems() + CROSS, ids=str)
@pytest.mark.parametrize("call", ["gram", "cross gram"])
def test_stays_in_the_error_budget(call, problem, impl):
    assert_within_budget(CALLS[call](problem.make(), impl)["gram"], expected(problem, call)["gram"])


@pytest.mark.parametrize("problem", exact_problems(), ids=str)
@pytest.mark.parametrize("call", ["gram", "cross gram"])
def test_is_exact_on_integers(call, problem, impl):
    assert_exact(CALLS[call](problem.make(), impl)["gram"], expected(problem, call)["gram"])


@pytest.mark.parametrize("problem", [*(p for p in problems() if p.O < 100), *CROSS, *BLOCKS, MANY], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_stays_in_the_error_budget(way, problem, cpu_isa):
    call, field = field_of(way)
    assert_within_budget(WAYS[way](problem.make()), expected(problem, call)[field])


@pytest.mark.parametrize("problem", [p for p in exact_problems() if p.T < 100], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_exact_on_integers(way, problem, cpu_isa):
    call, field = field_of(way)
    assert_exact(WAYS[way](problem.make()), expected(problem, call)[field])


@pytest.mark.parametrize("problem", [Problem(*size) for size in EMPTY_SIZES.values()], ids=EMPTY_SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_zeros_of_nothing(way, problem, cpu_isa):
    call, field = field_of(way)
    assert_exact(WAYS[way](problem.make()), expected(problem, call)[field])


def test_with_itself_as_second_set_is_the_gram(impl):
    x = Problem(5, 7, 33, 13).make()
    torch.testing.assert_close(zk.gram(x.a, x.b, x.a, x.b, impl=impl), zk.gram(x.a, x.b, impl=impl), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("way", [way for way in WAYS if "cross" not in way and "norms" not in way])
def test_of_one_set_is_exactly_symmetric(way, cpu_isa):
    gram = WAYS[way](Problem(*SIZES["many short examples"]).make())
    assert torch.equal(gram, gram.T)


def test_of_two_sets_transposed_is_that_of_the_sets_swapped(impl):
    x = Problem(5, 7, 33, 13, M=4, dtype=torch.float64).make()
    torch.testing.assert_close(zk.gram(x.a, x.b, x.a2, x.b2, impl=impl).T, zk.gram(x.a2, x.b2, x.a, x.b, impl=impl))
