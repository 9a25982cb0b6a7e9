"""Helpers that register an op with PyTorch.

- A schema cannot declare optional results. An op returns an empty tensor for a result that was not requested, and the public
  function replaces it by None.
- Implementations run outside of autograd and autocast.
- A derivative is another op, or a few PyTorch matrix products, so the backward pass does not materialize per-example gradients
  either. Derivatives cannot be differentiated again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zsl_kernels.types import sum_dtype

_library = torch.library.Library("zsl", "DEF")

Grads = tuple[Tensor | None, ...]


def outside_autocast(function: Callable) -> Callable:
    """Disable autocast around ``function``: it would round the operands and results of PyTorch's matrix products."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*arguments)
        device = next((x.device.type for x in arguments if isinstance(x, Tensor)), None)
        # A backward call without any cotangent has no tensor argument and nothing to compute.
        if device is None or not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


def define(schema: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Register and return the op ``zsl::name`` for a schema ``name(...) -> ...``."""
    name = schema.split("(")[0]
    _library.define(schema)
    torch.library.impl(f"zsl::{name}", "CompositeExplicitAutograd", outside_autocast(implementation), lib=_library)
    torch.library.register_fake(f"zsl::{name}", fake, lib=_library)
    return getattr(torch.ops.zsl, name).default


def differentiable(op: torch._ops.OpOverload, setup: Callable, backward: Callable) -> None:
    """Register a derivative for the op; see ``torch.library.register_autograd``."""
    torch.library.register_autograd(op, outside_autocast(backward), setup_context=setup, lib=_library)


def refuse_second_derivative(ctx: Any, *cotangents: Tensor | None) -> Grads:
    raise NotImplementedError("zsl_kernels: these ops can be differentiated once only; use impl='reference' for second derivatives")


def differentiable_never(op: torch._ops.OpOverload) -> None:
    """Make a backward pass through the op raise, because the op is itself a derivative."""
    differentiable(op, lambda ctx, inputs, output: None, refuse_second_derivative)


def empty(x: Tensor, *shape: int | torch.SymInt) -> Tensor:
    """Allocate a tensor in the sum dtype of ``x``."""
    return x.new_empty(shape, dtype=sum_dtype(x.dtype))


def sums_like(x: Tensor, shape: Sequence[int | torch.SymInt], N: int, direction: Tensor | None, gram: bool) -> tuple[Tensor, ...]:
    """Allocate the results of an op with the fields of ``InterferenceSums``, for a fake. The sums have the given ``shape``."""
    along = (0,) if direction is None else (N,)
    sizes: list[Sequence[int | torch.SymInt]] = [shape] * 3 + [(N,)] * 2 + [along] * 2 + [(N, N) if gram else (0,)]
    return tuple(empty(x, *size) for size in sizes)
