"""The chunked form in several slabs: real ones are so large that small problems have one."""

import pytest

from tests.inputs import CALLS, DIFFERENTIATED, Problem, assert_exact, cotangents, expected, expected_gradients, gradients
from zsl_kernels.backends.chunked.gradients import _slabs
from zsl_kernels.planning import cpu_cost

PROBLEM = Problem(4, 6, 33, 13, values="integers")


@pytest.fixture(params=[1, 5, 12], ids="{} rows".format)
def rows(request, monkeypatch):
    """Slabs of so many of the 13 output rows, in buffers of 4 examples: the last slab is a partial one, or one row."""
    monkeypatch.setattr(cpu_cost, "CHUNKED_BYTES", request.param * 2 * 4 * 33 * 4)
    slabs = [slab.stop - slab.start for slab in _slabs(*(getattr(PROBLEM.make(), name) for name in "ab"), PROBLEM.N)]
    assert slabs[0] == request.param
    assert sum(slabs) == 13
    assert len(slabs) > 1


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("call", CALLS)
def test_slabs_add_up(call):
    results = CALLS[call](PROBLEM.make(), "chunked")
    for name, e in expected(PROBLEM, call).items():
        assert_exact(results[name], e, name)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("call", DIFFERENTIATED)
def test_derivatives_of_slabs_add_up(call):
    got = gradients(call, PROBLEM.make(), "chunked", cotangents(PROBLEM, call))
    for name, e in expected_gradients(PROBLEM, call).items():
        assert_exact(got[name], e, name)
