"""Runs cases in several processes that share one process group: each is a function ``case_…(rank, world)`` of a module."""

from __future__ import annotations

import importlib
import os
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=30)  # of a collective that another rank does not join


def cases(module: str) -> list[str]:
    return [name for name in vars(importlib.import_module(module)) if name.startswith("case_")]


def run(module: str, world: int) -> None:
    """Raises where a case fails on some rank, with what it said there. (All cases run, so that one run tells of all failures.)"""
    names = [name for name in cases(module) if name in (os.environ.get("CASES") or name)]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (world, module, names, folder), nprocs=world)
        said = sorted(path.read_text() for path in Path(folder).glob("*.failed"))
        done = len(list(Path(folder).glob("*.passed")))
    assert not said, "\n\n".join(said)
    assert done == world * len(names) > 0


def _worker(rank: int, world: int, module: str, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # as a linear layer does without a probe
    dist.init_process_group("gloo", f"file://{folder}/store", TIMEOUT, world, rank)
    found = importlib.import_module(module)
    for name in names:
        torch.manual_seed(0)
        try:
            getattr(found, name)(rank, world)
        except BaseException:
            Path(folder, f"{name}.{rank}.failed").write_text(f"{name}, rank {rank} of {world}:\n{traceback.format_exc()}")
        else:
            Path(folder, f"{name}.{rank}.passed").touch()
    dist.destroy_process_group()
