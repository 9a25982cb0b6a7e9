"""Sharded models are refused by name where they are not supported, and with what to do instead."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import zerosum
from tests.zerosum.steps import square_losses

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of what is refused

IDS = torch.zeros(2, 3, dtype=torch.long)
# What measures whole parameters alone.
OTHERS = {
    "token_report": lambda model: zerosum.token_report(model, IDS, IDS),
    "gram_between": lambda model: zerosum.gram_between(model, lambda model, x: square_losses(model(x)), (torch.ones(2, 3),)),
    "Sketch": lambda model: zerosum.Sketch(model, lambda model, x: square_losses(model(x))),
}


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


@pytest.mark.parametrize("what", ["Probe", *OTHERS])
def test_fsdp1_is_refused_by_name(what, mesh):
    words = "model: '0' is a FullyShardedDataParallel module (FSDP1)"
    with pytest.raises(NotImplementedError, match=re.escape(words)) as raised:
        {"Probe": zerosum.Probe, **OTHERS}[what](sharded("FSDP1", mesh))
    assert "fully_shard (FSDP2) instead" in str(raised.value)


@pytest.mark.parametrize("kind", ["FSDP2", "tensor parallel"])
@pytest.mark.parametrize("what", OTHERS)
def test_a_dtensor_is_refused_by_what_is_no_probe(what, kind, mesh):
    with pytest.raises(NotImplementedError, match=rf"model: '0\.0\.weight' is a DTensor, .* {what} needs whole parameters"):
        OTHERS[what](sharded(kind, mesh))
