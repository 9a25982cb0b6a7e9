"""The CPU backend: loads the compiled kernels and calls the one that the plan names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from zsl_kernels.plan import Plan
from zsl_kernels.types import Cotangents, InterferenceSums


def load() -> str | None:
    """Loads the compiled library; returns why it could not be, or None."""
    library = Path(__file__).with_name("_cpu.so")
    if not library.exists():
        return "it was not built: reinstall with a C++ compiler and ZSL_BUILD_NATIVE unset"
    try:
        torch.ops.load_library(library)
        torch.ops.zsl_cpu.isa()
    except (OSError, RuntimeError) as error:
        return f"{error}; if torch was changed after the installation, reinstall zsl_kernels"
    return None


def interference(plan: Plan, a: Tensor, b: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
    return InterferenceSums(*torch.ops.zsl_cpu.interference(a, b, direction, gram, *plan.tile)).asked_for(direction, gram)


def gram(plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None) -> Tensor:
    itself = a2 is None
    a2, b2 = (a, b) if itself else (a2, b2)
    if plan.way == "ghost":
        return torch.ops.zsl_cpu.ghost(a, b, a2, b2, itself, False)
    return torch.ops.zsl_cpu.gram_direct(a, b, a2, b2, itself, *plan.tile)


def dot(plan: Plan, a: Tensor, b: Tensor, direction: Tensor) -> Tensor:
    return torch.ops.zsl_cpu.dot_direct(a, b, direction, *plan.tile)


def sq_norm(plan: Plan, a: Tensor, b: Tensor) -> Tensor:
    if plan.way == "ghost":
        return torch.ops.zsl_cpu.ghost(a, b, a, b, True, True)
    return torch.ops.zsl_cpu.sq_norm_direct(a, b, *plan.tile)


def weighted_grad(
    plan: Plan, a: Tensor, b: Tensor, weights: Tensor, abs_weights: Tensor | None, direction: Tensor | None
) -> Tensor:
    return torch.ops.zsl_cpu.weighted_grad(a, b, weights, abs_weights, direction, *plan.tile)


def backward(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    c: Cotangents,
    mix: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    want: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    da, db = torch.ops.zsl_cpu.backward(a, b, direction, *c, mix, a2, b2, *want, *plan.tile)
    return (da if want[0] else None), (db if want[1] else None)


def coordinate_sums(grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, direction: Tensor | None) -> Tensor:
    return torch.ops.zsl_cpu.coordinate_sums(grad_sum, abs_sum, sq_sum, direction)
