"""A hundred random models; ``python -m tests.zerosum.fuzz`` runs more of them, and says how to run one again."""

from __future__ import annotations

import pytest

from tests.zerosum.fuzz import ENDS, ENTRIES, apart, draw_plan, examine
from tests.zerosum.fuzz_blocks import BLOCKS, MIXING, RESHAPING, WRAPPERS
from tests.zerosum.steps import quiet

SEEDS, GROUP = 100, 10
ALWAYS = 40  # of which `make test` runs so many
OTHERS = pytest.mark.slow("further random models")


@pytest.mark.parametrize(
    "first", [first if first < ALWAYS else pytest.param(first, marks=OTHERS) for first in range(0, SEEDS, GROUP)]
)
def test_random_models(first: int) -> None:
    """The step runs and stays as it is, what is covered is the truth, and all of what keeps examples apart is covered."""
    for seed in range(first, first + GROUP):
        outcome = examine(draw_plan(seed))
        again = f"python -m tests.zerosum.fuzz --count 1 --seed {seed}"
        assert not outcome.failed, f"{again}\n{outcome.kind}: {outcome.plan}\n{outcome.detail}"
        assert outcome.covered == outcome.reached, f"{again}\nrefused: {outcome.plan}\n{dict(outcome.reasons)}"


def test_the_truth_is_that_of_each_example_alone() -> None:
    with quiet():
        angles = [angle for seed in range(40) if (angle := apart(draw_plan(seed))) is not None]
    assert len(angles) > 20
    assert max(angles) < 1e-7


def test_there_are_many_kinds() -> None:
    assert len(BLOCKS) + len(RESHAPING) + len(WRAPPERS) >= 65
    assert min(len(MIXING), len(ENTRIES), len(ENDS)) >= 10
    plans = [draw_plan(seed) for seed in range(400)]
    assert {plan.entry for plan in plans} == set(ENTRIES)
    assert {plan.end for plan in plans} == set(ENDS)
    assert sum(len({plan.n, plan.t, plan.w}) < 3 or plan.n == 1 for plan in plans) > 200
    assert any(plan.mixes for plan in plans)
    assert any(len(plan.sizes) > 1 for plan in plans)
