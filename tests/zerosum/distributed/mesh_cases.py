"""Meshes of two dimensions, and shards that some ranks have nothing of: on four processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import zerosum
from tests.zerosum.distributed import fsdp_cases, parallel_cases
from tests.zerosum.distributed.ddp_cases import Deep, data
from tests.zerosum.distributed.parallel_cases import Transformer


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


def case_sharded_and_parallel(rank: int, world: int) -> None:
    """Two pairs of ranks: each pair has a part of each example's batch, and the ranks of a pair have parts of the layers."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))

    def sharded(model: Any) -> nn.Module:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    dp = mesh["dp"].get_local_rank()
    report = check(lambda model: parallel_cases.parallelize(model, mesh["tp"]), data(2), dp, sharded, Transformer())
    assert report.coverage.share == 1
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 13, (n, 6), generator=generator) for n in (2, 3)]
    for norm in (nn.LayerNorm, nn.RMSNorm):
        model = Transformer(norm, norm is nn.LayerNorm)
        report = check(lambda model: parallel_cases.sequence_parallel(model, mesh["tp"]), batches, dp, sharded, model)
        assert report.coverage.share == 1


def check(divide: Any, batches: list[torch.Tensor], mine: int, sharded: Any, model: nn.Module) -> zerosum.Report:
    return parallel_cases.check(model, divide, batches, mine, sharded=sharded)


def case_refusals(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(fully_shard(nn.Linear(4, 4), mesh=mesh["dp"]), fully_shard(nn.Linear(4, 4), mesh=mesh["tp"]))
    with pytest.raises(NotImplementedError, match="its parameters are sharded over 2 meshes"):
        zerosum.Probe(model)
