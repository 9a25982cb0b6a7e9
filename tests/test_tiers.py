"""Which cases of a test function `make test` and `make check` run (tests/tiers.py)."""

from itertools import product

import pytest

from tests import tiers


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_every_value_of_every_parameter_occurs(share):
    axes = {"model": [f"model {i}" for i in range(9)], "size": [(3, 5), (4, 4), (1, 6)], "gram": [False, True]}
    cases = [frozenset(zip(axes, values, strict=True)) for values in product(*axes.values())]
    found = tiers.sample(cases, share, "seed")
    assert len(found) == len(set(found))
    assert {value for at in found for value in cases[at]} == {(name, value) for name, values in axes.items() for value in values}
    fewest = len(tiers.sample(cases, 0.0, "seed"))
    assert 9 <= fewest <= 14  # the models, and some more
    assert len(found) == max(round(share * len(cases)), fewest)
    assert found == tiers.sample(cases, share, "seed")
    assert share == 1 or found != tiers.sample(cases, share, "another seed")


def test_a_test_without_parameters_is_in_its_sample():
    assert tiers.sample([frozenset()], 0.0, "seed") == [0]


def test_the_files_of_which_samples_run_are_there():
    """A file that is renamed would run whole in `make test`, no more in `make check`, and in several workers."""
    for name in (*tiers.FAMILIES, *tiers.CHECKED, *tiers.TOGETHER):
        assert (tiers.ROOT / name).is_file(), name
