"""Meshes of two dimensions, and shards that some ranks have nothing of: on four processes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.zerosum.distributed import fsdp_cases
from tests.zerosum.distributed.ddp_cases import Deep


def case_hybrid(rank: int, world: int) -> None:
    """Shards of two ranks each, which two pairs of ranks have."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    fsdp_cases.check(rank, world, mesh=mesh)


def case_empty_shards(rank: int, world: int) -> None:
    """Of the five rows of the head and the three of the last bias, the last rank has none."""
    fsdp_cases.check(rank, world)
    fsdp_cases.check(rank, world, Small)


class Small(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)


def case_accumulation_hybrid(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    fsdp_cases.accumulate(rank, world, mesh=mesh)
    torch.testing.assert_close(mesh.get_coordinate(), [rank // 2, rank % 2])
