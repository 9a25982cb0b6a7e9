"""The available tiles: configurations of the Triton kernels, one dictionary per architecture, and tiles of the CUDA kernels.

A configuration is the tile and the launch parameters of one kernel for one kind of operand. The planner chooses among them. The
tests compile every configuration for its architecture and check that it does not spill registers, that it stays within the limit of
shared memory, and that it uses the matrix unit. This module contains only data and imports no other module of the library.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """The tile (rows, columns, and the depth of one step of the inner loop) and the launch parameters of a Triton kernel."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# With up to this many positions, the ghost algorithm puts several examples in a block ("ghost_short"); otherwise it uses "ghost".
GHOST_SHORT = 32

# Indexed by kernel, then by the kind of the operands' dtype: "half" for bfloat16 and float16, or "float32".
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


# Configurations for operands that are not aligned. Their elements are loaded one at a time, which needs so many registers for
# addresses that a larger tile would spill.
UNALIGNED = {
    "interference": Config(64, 32, 16, 8, 2),
    "sq_norm": Config(64, 64, 16, 8, 2),
    "rank_one": Config(64, 16, 16, 8, 2),
}


def kind(dtype: str) -> str:
    """Return the key of the configurations for operands of ``dtype``."""
    return "float32" if dtype == "float32" else "half"


class CudaTile(NamedTuple):
    """A tile that the CUDA kernels are compiled for; see csrc/cuda/tile.cuh. Its index in ``CUDA_TILES`` identifies it."""

    rows: int
    cols: int
    slots: int  # the most examples whose tiles a block stores at a time
    together: int  # examples whose tiles are computed at a time
    stages: int
    shares: int  # warps that share a tile's part of the Gram matrix; each has its own partial results

    def shared_bytes(self, held: int, runs: bool) -> int:
        """Return a block's shared memory: the stored tiles, the stages of the operands and, with ``runs``, the sums of a run."""
        stages = self.stages * self.together * (self.rows + self.cols + 16) * 64
        return 4 * (held * (self.rows * self.cols + 4) + (3 * self.rows * self.cols if runs else 0)) + stages

    def fitting(self, shared_bytes: int) -> int:
        """Return how many examples' tiles fit in a block with that much shared memory."""
        return min(self.slots, (shared_bytes - self.shared_bytes(0, False)) // (4 * (self.rows * self.cols + 4)))

    def groups(self, N: int, M: int | None, slots: int) -> tuple[int, int, int]:
        """Divide the examples into groups for the Gram matrix of N examples with themselves, or with M others.

        Returns the examples stored at a time, the examples of a group, and the number of pairs of groups. At most ``slots``
        examples, at least two, can be stored. If not all fit, groups have half of that size, and each pair of groups computes its
        examples again.
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
# Examples that a block stores if there is no Gram matrix. They are few, so that shared memory is left for another block.
CUDA_SUMS_HELD = 4
