"""Runs cases in several processes that share one process group: each is a function ``case_…(rank, world)`` of a module.

``CASES="case_sum case_tied" pytest tests/zerosum/distributed`` runs those alone.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=30)  # of a collective that another rank does not join


def cases(module: str) -> list[str]:
    mine = [name for name in vars(importlib.import_module(module)) if name.startswith("case_")]
    return [name for name in mine if name in (os.environ.get("CASES") or name).split()]


def run(world: int, *modules: str) -> None:
    """Raises where a case fails on some rank, with what it said there. (All cases run, so that one run tells of all failures.)"""
    count = sum(len(cases(module)) for module in modules)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (world, modules, folder), nprocs=world)
        said = sorted(path.read_text() for path in Path(folder).glob("*.failed"))
        done = len(list(Path(folder).glob("*.passed")))
    assert not said, "\n\n".join(said)
    assert done == world * count


def _worker(rank: int, world: int, modules: Sequence[str], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # as a linear layer does without a probe
    dist.init_process_group("gloo", f"file://{folder}/store", TIMEOUT, world, rank)
    for module, name in [(place, name) for place in modules for name in cases(place)]:
        torch.manual_seed(0)
        label = f"{module.rpartition('.')[2]}.{name}"
        try:
            getattr(importlib.import_module(module), name)(rank, world)
        except BaseException:
            Path(folder, f"{label}.{rank}.failed").write_text(f"{label}, rank {rank} of {world}:\n{traceback.format_exc()}")
        else:
            Path(folder, f"{label}.{rank}.passed").touch()
    dist.destroy_process_group()
