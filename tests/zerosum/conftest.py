"""Which tests of the probe run by default."""

from __future__ import annotations

import os
import random
from collections import defaultdict

import pytest

# Some 4,400 cases of attribution and of the loss end take 10 minutes with one worker. By default a third of each test's cases
# runs, always the same ones, and all of the tests that have few; `make test-all` runs every case, as does a test's own name.
LONG = (
    "test_attribution.py",
    "test_attribution_transformers.py",
    "test_loss_ends.py",
    "test_packed.py",
    "test_packed_transformers.py",
)
FEW = 3


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("ZSL_TEST_ALL") == "1" or any("::" in arg for arg in config.args):
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.parent.name == "zerosum" and item.path.name in LONG:
            cases[item.nodeid.split("[")[0]].append(item)
    left: set[pytest.Item] = set()
    for name, all_of_it in cases.items():
        count = max(len(all_of_it) // 3, FEW)
        left.update(random.Random(name).sample(all_of_it, max(len(all_of_it) - count, 0)))
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = [item for item in items if item not in left]
