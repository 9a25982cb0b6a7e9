"""The CPU backend: loads the compiled kernels and calls the one that the plan names."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsl_kernels.plan import Plan
from zsl_kernels.rows import AddedRows
from zsl_kernels.types import Cotangents, InterferenceSums


def load() -> str | None:
    """Loads the compiled library; returns why it could not be, or None."""
    library = Path(__file__).with_name("_cpu.so")
    if not library.exists():
        return "it was not built: reinstall with a C++ compiler and ZSL_BUILD_NATIVE unset"
    try:
        importlib.import_module("zsl_kernels._cpu")
        torch.ops.zsl_cpu.isa()
    except (ImportError, RuntimeError) as error:
        return f"{error}; if torch was changed after the installation, reinstall zsl_kernels"
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
    return InterferenceSums(*torch.ops.zsl_cpu.interference(a, b, direction, gram, *plan.tile, begin, *_pointers(added)))


def _pointers(added: AddedRows | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if added is None else (added.begin, added.feature, added.values)


def gram(plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
    itself = a2 is None
    a2, b2 = (a, b) if itself else (a2, b2)
    if plan.way == "ghost":
        return torch.ops.zsl_cpu.ghost(a, b, a2, b2, itself, False)
    return torch.ops.zsl_cpu.gram_direct(a, b, a2, b2, itself, *plan.tile, begin)


def dot(plan: Plan, a: Tensor, b: Tensor, direction: Tensor, begin: Tensor | None = None) -> Tensor:
    return torch.ops.zsl_cpu.dot_direct(a, b, direction, *plan.tile, begin)


def sq_norm(plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
    if plan.way == "ghost":
        return torch.ops.zsl_cpu.ghost(a, b, a, b, True, True)
    return torch.ops.zsl_cpu.sq_norm_direct(a, b, *plan.tile, begin)


def weighted_grad(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    abs_weights: Tensor | None,
    direction: Tensor | None,
    begin: Tensor | None = None,
) -> Tensor:
    return torch.ops.zsl_cpu.weighted_grad(a, b, weights, abs_weights, direction, *plan.tile, begin)


def product(plan: Plan, x: Tensor, y: Tensor, out: Tensor) -> None:
    """out = x @ y in the sum dtype."""
    torch.ops.zsl_cpu.product(x, y, out, *plan.tile)


def backward(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    direction: Tensor | None,
    c: Cotangents,
    mix: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    want: tuple[bool, bool, bool],
    begin: Tensor | None = None,
    added: AddedRows | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    found = torch.ops.zsl_cpu.backward(a, b, direction, *c, mix, a2, b2, *want, *plan.tile, begin, *_pointers(added))
    da, db, d_added = (x if wanted else None for x, wanted in zip(found, want, strict=True))
    return da, db, d_added


def coordinate_sums(grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, direction: Tensor | None) -> Tensor:
    return torch.ops.zsl_cpu.coordinate_sums.default(grad_sum, abs_sum, sq_sum, direction)


def coordinate_sums_of_many(
    grad_sums: Sequence[Tensor], abs_sums: Sequence[Tensor], sq_sums: Sequence[Tensor], directions: Sequence[Tensor | None]
) -> Tensor:
    return torch.ops.zsl_cpu.coordinate_sums_of_many.default(grad_sums, abs_sums, sq_sums, directions)


# The small ops need no plan: their kernels take what the ops have.


def dense_interference(g: Tensor, direction: Tensor | None, gram: bool) -> tuple[Tensor, ...]:
    return torch.ops.zsl_cpu.dense_interference(g, direction, gram)


def embedding_interference(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.zsl_cpu.embedding_interference(*arguments)


def scale_bias_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.zsl_cpu.scale_bias_grad(*arguments)
