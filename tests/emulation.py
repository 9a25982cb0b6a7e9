"""Which of the ops' suites a process runs that emulates a GPU's kernels."""

from __future__ import annotations

import random

import pytest

from tests.inputs import EMULATED

# Words in the names of tests of what the kernels are not for: threads of the CPU, and float64.
OTHERS = ("threads", "float64")
# Hundreds of examples, each of them of several tiles of 128 × 128: half of the time of all. simt_checks.py has more than one run.
TOO_MANY = ("N600", "thousands")
# The interpreter is slow, and so are tiles of 128 × 128: of each test's parameter sets a sample. The kernels' own tests,
# emulated_*.py, choose their sizes.
SETS = {"triton": 12, "cuda": 10_000, "hopper": 16}
# And of each of these samples so many run in `make test`, the others in `make test-slow`.
FEW = {"triton": 1, "cuda": 8, "hopper": 4}


def select(items: list[pytest.Item]) -> list[pytest.Item]:
    of_test: dict[tuple[object, str], list[pytest.Item]] = {}
    for item in items:
        if _own(item) or _of_kernels(item):
            of_test.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    assert EMULATED is not None
    kept = set()
    for found in of_test.values():
        sampled = random.Random(0).sample(found, len(found) if _own(found[0]) else min(len(found), SETS[EMULATED]))
        for item in sampled[FEW[EMULATED] :]:
            item.add_marker(pytest.mark.slow("a further case of emulated kernels"))
        kept.update(sampled)
    return [item for item in items if item in kept]


def _own(item: pytest.Item) -> bool:
    return item.path.name.startswith("emulated_")


def _of_kernels(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    words = (*OTHERS, *TOO_MANY) if EMULATED == "hopper" else OTHERS
    return params.get("impl") == EMULATED and not any(word in item.name for word in words)
