"""The head that never holds its logits against the plain head, in time and in peak memory."""

from __future__ import annotations

import pytest

from benchmarks.heads import HEADS, Head, HeadCase
from benchmarks.memory import in_fresh_process
from benchmarks.parametrize import over
from benchmarks.tables import Cell

QUICK = [HeadCase(8, 32, 256, 8192)]
CASES = [HeadCase(8, 256, 256, 50304), HeadCase(8, 256, 256, 50304, "bfloat16"), HeadCase(8, 128, 768, 50304)]
TARGET = CASES[0]
TIME = (
    "linear_cross_entropy, time",
    "Forward and backward as a ratio to F.cross_entropy(h @ weight.T), whose weight's gradient is taken by zk.interference, or for "
    "the column without statistics by the plain product.",
)
MEMORY = (
    "linear_cross_entropy, peak memory",
    "MB that forward and backward take beyond the inputs, results included. Target: a quarter of the plain head with statistics.",
)
MB = 1e6


@over((*QUICK, *CASES), QUICK)
@pytest.mark.parametrize("column", ["fused", "fused, no statistics"])
def test_time(compare, table, case, column):
    x = Head.make(case)
    baseline = column.replace("fused", "plain")
    compare(
        table(*TIME),
        str(case),
        column,
        lambda: HEADS[column](x),
        lambda: HEADS[baseline](x),
        against="plain",
        target=1.3 if case == TARGET and column == "fused" else None,
    )


@over((*QUICK, *CASES), QUICK)
def test_memory(table, case):
    def peak(head: str) -> float:
        return in_fresh_process("head", head, case.N, case.T, case.K, case.V, case.dtype) / MB

    memory, plain = table(*MEMORY), peak("plain")
    memory.add(str(case), "plain", Cell(plain, "MB"))
    memory.add(str(case), "fused", Cell(peak("fused"), "MB", plain / 4 if case == TARGET else None))
    memory.add(str(case), "fused, no statistics", Cell(peak("fused, no statistics"), "MB"))
