"""The plan against what an H100 was measured to take: tests/data/h100.csv, with the microseconds of each way of each call."""

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import zsl_kernels as zk

ROWS = list(csv.DictReader((Path(__file__).parents[1] / "data" / "h100.csv").read_text().splitlines()))


def call_of(row):
    return row["dtype"], *(int(row[size]) for size in "NTKO"), row["gram"] == "1"


CALLS = sorted({call_of(row) for row in ROWS})


def plan_of(call):
    dtype, N, T, K, O, gram = call
    return zk.plan("interference", N=N, T=T, K=K, O=O, gram=gram, dtype=getattr(torch, dtype), device="cuda", arch=90)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_choice_is_within_a_tenth_of_the_best(call):
    took = defaultdict(lambda: math.inf)
    for row in ROWS:
        if call_of(row) == call:
            way = row["impl"], row["way"]
            took[way] = min(took[way], float(row["microseconds"]))
    plan = plan_of(call)
    assert took[plan.impl, plan.way] <= 1.1 * min(took.values()), dict(took)


def test_predictions_are_within_thirty_percent_in_the_median():
    ratios = defaultdict(list)
    for row in ROWS:
        for c in plan_of(call_of(row)).candidates:
            kernel = (row["impl"], row["way"], (int(row["rows"]), int(row["cols"])), int(row["splits"]))
            if (c.impl, c.way, c.tile, c.splits) == kernel:
                ratios[row["impl"], row["way"], row["dtype"]].append(1e-6 * float(row["microseconds"]) / c.time)
    assert len(ratios) == 10  # five ways, in two dtypes
    for way, found in ratios.items():
        assert 1 / 1.3 < statistics.median(found) < 1.3, way
    errors = [abs(math.log(ratio)) for found in ratios.values() for ratio in found]
    assert statistics.median(errors) < math.log(1.3)
    # Of the way that is chosen each is: off by 1.4 at most, for the smallest weight, where launches count.
    hopper = [ratio for (_, way, _), found in ratios.items() for ratio in found if way == "hopper"]
    assert 1 / 1.5 < min(hopper) <= max(hopper) < 1.5
