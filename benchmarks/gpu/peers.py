"""Other projects' ways to per-example gradients, where they are installed: a step of a copy of the same model and batch."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

from benchmarks.training_steps import Workload


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def opacus(work: Workload) -> Callable[[], None]:
    """Opacus: every linear weight's per-example gradients, materialized, and the sums and norms of them."""
    from opacus.grad_sample import GradSampleModule

    model = GradSampleModule(copy.deepcopy(work.model), loss_reduction="sum", strict=False)
    watched = Workload(model, work.x, work.y)

    def step() -> None:
        model.zero_grad()
        watched.losses().sum().backward()
        results = []
        for p in model.parameters():
            g = p.grad_sample
            results.append((g.sum(0), g.abs().sum(0), g.square().sum(0), g.flatten(1).abs().sum(1), g.flatten(1).square().sum(1)))
            p.grad_sample = None

    return step


def torchjd(work: Workload) -> Callable[[], None]:
    """TorchJD's autogram: the Gram of all parameters."""
    from torchjd.autogram import Engine

    watched = Workload(copy.deepcopy(work.model), work.x, work.y)
    engine = Engine(watched.model, batch_dim=0)

    def step() -> None:
        engine.compute_gramian(watched.losses())

    return step


PEERS: dict[str, Callable[[Workload], Callable[[], None]]] = {"opacus": opacus, "torchjd": torchjd}
