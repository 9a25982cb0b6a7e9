"""The shipped configurations: the Triton kernels', one dictionary for each architecture, and the tiles of the CUDA kernels.

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


# Positions of an example up to which the ghost form holds several in a block: "ghost_short", where longer ones take "ghost".
GHOST_SHORT = 32

# By kernel, then by the operands' dtype: "half" for bfloat16 and float16, "float32".
Configs = dict[str, dict[str, tuple[Config, ...]]]

SM80: Configs = {
    "interference": {
        "half": (Config(64, 64, 64, 8, 3), Config(32, 64, 64, 4, 3)),
        "float32": (Config(64, 64, 16, 8, 3), Config(32, 64, 16, 4, 3)),
    },
    "sq_norm": {
        "half": (Config(128, 256, 32, 8, 3), Config(128, 128, 32, 8, 4), Config(64, 64, 64, 4, 3)),
        "float32": (Config(128, 64, 16, 8, 3), Config(64, 32, 16, 4, 3)),
    },
    "rank_one": {"half": (Config(64, 64, 16, 8, 2),), "float32": (Config(64, 32, 16, 8, 2),)},
    "ghost": {"half": (Config(128, 128, 32, 8, 3),), "float32": (Config(64, 64, 16, 8, 3),)},
    "ghost_short": {"half": (Config(64, 64, 32, 8, 3),), "float32": (Config(32, 32, 32, 8, 3),)},
    "gradient": {"half": (Config(128, 256, 32, 8, 3),), "float32": (Config(128, 64, 32, 8, 3),)},
    "derivative": {"half": (Config(128, 64, 64, 8, 3),), "float32": (Config(128, 64, 32, 8, 3),)},
    "product": {
        "half": (
            Config(128, 128, 32, 8, 3),
            Config(64, 64, 32, 4, 3),
        ),
        "float32": (
            Config(128, 64, 32, 8, 3),
            Config(32, 64, 32, 4, 3),
        ),
    },
    "linear_cross_entropy": {"half": (Config(128, 128, 64, 8, 3),), "float32": (Config(128, 64, 32, 8, 3),)},
}
SM90: Configs = {
    "interference": {
        "half": (Config(128, 64, 64, 8, 4), Config(64, 64, 64, 8, 4)),
        "float32": (Config(64, 64, 16, 8, 3), Config(64, 32, 32, 4, 3)),
    },
    "sq_norm": {
        "half": (Config(128, 256, 64, 8, 4), Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 3)),
        "float32": (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 8, 3)),
    },
    "rank_one": {"half": (Config(64, 64, 32, 8, 2),), "float32": (Config(64, 64, 16, 8, 2),)},
    "ghost": {"half": (Config(128, 128, 64, 8, 3),), "float32": (Config(64, 64, 32, 8, 3),)},
    "ghost_short": {"half": (Config(64, 64, 64, 8, 3),), "float32": (Config(64, 64, 16, 8, 3),)},
    "gradient": {"half": (Config(128, 256, 64, 8, 3),), "float32": (Config(128, 128, 32, 8, 3),)},
    "derivative": {"half": (Config(128, 64, 64, 8, 3),), "float32": (Config(128, 64, 32, 8, 3),)},
    "product": {
        "half": (
            Config(128, 128, 64, 8, 3),
            Config(64, 64, 32, 4, 3),
        ),
        "float32": (
            Config(128, 128, 32, 8, 3),
            Config(32, 64, 32, 4, 3),
        ),
    },
    "linear_cross_entropy": {"half": (Config(128, 128, 64, 8, 3),), "float32": (Config(128, 128, 32, 8, 3),)},
}
SM100: Configs = {
    "interference": {
        "half": (Config(64, 64, 64, 8, 4), Config(64, 32, 64, 8, 3)),
        "float32": (Config(64, 64, 32, 8, 3), Config(64, 32, 32, 4, 3)),
    },
    "sq_norm": {
        "half": (Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 3)),
        "float32": (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 8, 3)),
    },
    "rank_one": {"half": (Config(64, 64, 32, 8, 2),), "float32": (Config(64, 64, 32, 8, 2),)},
    "ghost": {"half": (Config(128, 128, 64, 8, 3),), "float32": (Config(64, 64, 32, 8, 3),)},
    "ghost_short": {"half": (Config(64, 64, 32, 4, 3),), "float32": (Config(64, 64, 32, 8, 2),)},
    "gradient": {"half": (Config(128, 256, 64, 8, 3),), "float32": (Config(128, 128, 32, 8, 3),)},
    "derivative": {"half": (Config(128, 64, 64, 8, 3),), "float32": (Config(128, 64, 32, 8, 3),)},
    "product": {
        "half": (
            Config(128, 128, 32, 8, 3),
            Config(64, 64, 32, 4, 3),
        ),
        "float32": (
            Config(128, 128, 32, 8, 3),
            Config(32, 64, 32, 4, 3),
        ),
    },
    "linear_cross_entropy": {"half": (Config(128, 256, 64, 8, 3),), "float32": (Config(128, 128, 32, 8, 3),)},
}
CONFIGS: dict[int, Configs] = {80: SM80, 90: SM90, 100: SM100}


# What replaces the configuration of a kernel where operands are not aligned: numbers that come one at a time need so many registers
# for their addresses that a larger tile would spill.
UNALIGNED = {
    "interference": Config(64, 32, 16, 8, 2),
    "sq_norm": Config(64, 64, 16, 8, 2),
    "rank_one": Config(64, 16, 16, 8, 2),
}


def kind(dtype: str) -> str:
    """Which configurations operands of ``dtype`` take."""
    return "float32" if dtype == "float32" else "half"


class CudaTile(NamedTuple):
    """A tile that the CUDA kernels are compiled for, as csrc/cuda/tile.cuh has it. Its place in ``CUDA_TILES`` names it."""

    rows: int
    cols: int
    slots: int  # examples whose tiles a block holds at a time, at most
    together: int  # examples that are formed at a time
    stages: int
    shares: int  # warps among which a tile's part of the Gram is divided, each with partial results of its own

    def shared_bytes(self, held: int, runs: bool) -> int:
        """Shared memory of a block: the tiles held, the operands' stages and, where it has more examples, a run's sums."""
        stages = self.stages * self.together * (self.rows + self.cols + 16) * 64
        return 4 * (held * (self.rows * self.cols + 4) + (3 * self.rows * self.cols if runs else 0)) + stages

    def fitting(self, shared_bytes: int) -> int:
        """How many examples' tiles a block of that much shared memory can hold."""
        return min(self.slots, (shared_bytes - self.shared_bytes(0, False)) // (4 * (self.rows * self.cols + 4)))

    def groups(self, N: int, M: int | None, slots: int) -> tuple[int, int, int]:
        """For the Gram of N examples with themselves, or with M others: examples held at a time, of a group, and pairs of groups.

        ``slots``, at least two, is how many can be held. What cannot be held at once goes in groups of half as many, and is formed
        again for every pair of them.
        """
        formed = N + (M or 0)
        if formed <= slots:
            return formed, max(N, M or 0, 1), 1
        size = slots // 2
        groups = -(-N // size)
        return 2 * size, size, groups * (groups + 1) // 2 if M is None else groups * -(-M // size)


CUDA_TILES = (
    CudaTile(64, 64, 8, 1, 3, 8),
    CudaTile(64, 32, 16, 1, 3, 8),
    CudaTile(32, 32, 32, 2, 3, 4),
    CudaTile(32, 16, 64, 4, 2, 1),
)
# Without the Gram few examples are held: what they leave of shared memory goes to another block.
CUDA_SUMS_HELD = 4
