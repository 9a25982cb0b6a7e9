"""What the benchmarks' tests share: the cases they go over, and the kernels that a column is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from tests.inputs import cpu_isas, running


def over(cases: Iterable[Any], quick: Iterable[Any]) -> Callable[[Any], Any]:
    """Parametrizes a test by ``case``; cases that are not for --quick are marked."""
    names = {case: str(case).replace(" ", "-").replace("=", "") for case in cases}
    params = [pytest.param(case, id=name, marks=() if case in quick else pytest.mark.full) for case, name in names.items()]
    return pytest.mark.parametrize("case", params)


def kernels_of(column: str) -> AbstractContextManager[object]:
    """Runs the AVX2 kernels where the column's name says so, else those that the library chooses."""
    if "AVX2" not in column:
        return nullcontext()
    if "avx2" not in cpu_isas():
        pytest.skip("this machine has no AVX2 kernels")
    return running("cpu-avx2")
