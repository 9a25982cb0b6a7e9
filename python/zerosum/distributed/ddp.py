"""Holds what the probe needs to know about ``torch.nn.parallel.DistributedDataParallel``.

DDP averages ``.grad`` over the ranks while the backward pass still runs, in the memory that holds the probe's sums. Therefore the
probe keeps a copy of each parameter's local sum, taken before the gradient is accumulated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel


def wrappers(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    """Return the modules whose gradients DDP averages."""
    return [module for module in modules if isinstance(module, DistributedDataParallel)]


def around() -> DistributedDataParallel | None:
    """Return the wrapper whose forward pass is running, if the probe was given the module inside it."""
    return DistributedDataParallel._active_ddp_module


def is_sink(node: Node) -> bool:
    """Whether it is the identity that DDP appends to a model's outputs with ``find_unused_parameters`` or ``static_graph``."""
    return node.name() == "_DDPSinkBackward"


@contextmanager
def unnoticed(ddps: Iterable[DistributedDataParallel]) -> Iterator[None]:
    """Keep a backward pass of the probe's own from starting the first all-reduce of a static graph."""
    waiting = [ddp for ddp in ddps if ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued]
    for ddp in waiting:
        ddp._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for ddp in waiting:
            ddp._static_graph_delay_allreduce_enqueued = False
