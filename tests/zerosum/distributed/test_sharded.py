"""Sharded models are refused before the first step, by what shards them."""

import re

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import zerosum

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of what is refused


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(kind, mesh):
    inner = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    if kind == "FSDP1":
        return nn.Sequential(FullyShardedDataParallel(inner, device_id=mesh.device_type))
    if kind == "FSDP2":
        fully_shard(inner, mesh=mesh)
        return nn.Sequential(inner)
    parallelize_module(inner, mesh, {"0": ColwiseParallel()})
    return nn.Sequential(inner)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("FSDP1", "model: '0' is a FullyShardedDataParallel module (FSDP1)"),
        ("FSDP2", "model: '0.0.weight' is a DTensor, sharded by fully_shard (FSDP2)"),
        ("tensor parallel", "model: '0.0.weight' is a DTensor, sharded by tensor parallelism"),
    ],
)
def test_a_sharded_model_is_refused_by_name(kind, words, mesh):
    with pytest.raises(NotImplementedError, match=re.escape(words)) as raised:
        zerosum.Probe(sharded(kind, mesh))
    assert "DistributedDataParallel instead" in str(raised.value)
