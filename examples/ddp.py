"""Measure a step of DistributedDataParallel: each rank probes its own examples, and the report is of all of them.
Run it with: python examples/ddp.py (two processes on a CPU), or torchrun --nproc-per-node 2 examples/ddp.py."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import zerosum

STEPS, N = 9, 8  # N examples on each rank


def train() -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)))
    probe = zerosum.Probe(model, every=4, process_group=dist.group.WORLD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        x = torch.randn(N, 16, generator=data)
        y = x[:, :4].argmax(1)
        optimizer.zero_grad()
        with probe:
            losses = F.cross_entropy(model(x), y, reduction="none")  # (N,)
            losses.mean().backward()
        if step % 4 == 0:  # the block was measured, on all ranks, and all of them ask for the report
            report = probe.report()
            if rank == 0:
                D = report.metrics["D_grad"]
                print(f"step {step}: N = {report.num_examples}, D_grad {D.value:.3f} (random signs {D.null:.3f})")
        optimizer.step()


def worker(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun has started this process
        dist.init_process_group("gloo")
        train()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, (2, os.path.join(folder, "store")), nprocs=2)
