"""The Triton backend. Its functions are the ops' that it has kernels for, with the plan before their arguments.

Imports Triton, so ``backends`` imports it only for a call that may use it. The kernels' modules are imported here: one with an op's
name would otherwise take the function's place when it is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsl_kernels import chunked
from zsl_kernels.plan import Plan
from zsl_kernels.rows import AddedRows
from zsl_kernels.triton import ghost, linear_cross_entropy, rank_one
from zsl_kernels.triton import interference as tiled
from zsl_kernels.triton.backward import backward
from zsl_kernels.triton.coordinates import coordinate_sums, coordinate_sums_of_many
from zsl_kernels.triton.embedding import embedding_interference
from zsl_kernels.types import InterferenceSums

__all__ = [
    "backward",
    "coordinate_sums",
    "coordinate_sums_of_many",
    "embedding_interference",
    "gram",
    "interference",
    "linear_cross_entropy",
    "missing",
    "sq_norm",
]

_OLDEST = (8, 0)  # compute capability whose matrix units take bfloat16 and tf32


def missing() -> str | None:
    """Why the kernels cannot run here although there is a device, or None."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _OLDEST:
        major, minor = torch.cuda.get_device_capability()
        return f"the kernels need compute capability 8.0 or newer; this device has {major}.{minor}"
    return None


def interference(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    gram: bool,
    begin: Tensor | None = None,
    added: AddedRows | None = None,
) -> InterferenceSums:
    with torch.cuda.device_of(a):
        if plan.way == "rank-one":
            return chunked.rank_one(a, b, direction, gram, rank_one.sums(plan, a.squeeze(1), b.squeeze(1)))
        return tiled.interference(plan, a, b, direction, gram, begin, added)


def gram(plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
    with torch.cuda.device_of(a):
        if plan.way == "ghost":
            return ghost.gram(plan, a, b, a2, b2)
        return tiled.gram(plan, a, b, a2, b2, begin)


def sq_norm(plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
    with torch.cuda.device_of(a):
        if plan.way == "ghost":
            return ghost.sq_norm(plan, a, b)
        return tiled.sq_norm(plan, a, b, begin)
