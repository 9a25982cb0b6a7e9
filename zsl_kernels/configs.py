"""The shipped configurations of the Triton kernels: one dictionary for each architecture.

A configuration is the tile and the launch of one kernel for one kind of operand. Every one is compiled for its architecture by the
tests, which look for spills, for shared memory past the limit and for the matrix unit; the planner chooses among them. Imports
nothing: it is data.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """``tile``: the kernel's block sizes, rows, columns and the depth of one step of its inner loop."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# By kernel, then by the operands' dtype: "half" for bfloat16 and float16, "float32".
Configs = dict[str, dict[str, tuple[Config, ...]]]

SM80: Configs = {
    "interference": {"half": (Config(64, 64, 32, 4, 3),), "float32": (Config(64, 32, 16, 4, 3),)},
}
SM90: Configs = {
    "interference": {"half": (Config(128, 64, 64, 8, 3),), "float32": (Config(64, 64, 16, 8, 3),)},
}
SM100: Configs = {
    "interference": {"half": (Config(64, 64, 64, 8, 3),), "float32": (Config(64, 32, 16, 8, 3),)},
}
CONFIGS: dict[int, Configs] = {80: SM80, 90: SM90, 100: SM100}


def kind(dtype: str) -> str:
    """Which configurations operands of ``dtype`` take."""
    return "float32" if dtype == "float32" else "half"
