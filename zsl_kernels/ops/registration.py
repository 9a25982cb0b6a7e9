"""How an op is registered with PyTorch.

An op's schema has no optional results: one that was not asked for is an empty tensor there, and the public functions turn it into
None. Implementations run outside of autograd and of autocast. Derivatives are ops too, or a few products of PyTorch's, so nothing
is materialized on the way back either; they cannot be differentiated again.
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
    """The operands' dtypes are meant: autocast would round those of PyTorch's own products, and the results."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*arguments)
        device = next((x.device.type for x in arguments if isinstance(x, Tensor)), None)
        # A backward whose results have no cotangents has no tensor, and nothing to compute.
        if device is None or not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


def define(schema: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    """The op ``zsl::name`` of a schema ``name(...) -> ...``."""
    name = schema.split("(")[0]
    _library.define(schema)
    torch.library.impl(f"zsl::{name}", "CompositeExplicitAutograd", outside_autocast(implementation), lib=_library)
    torch.library.register_fake(f"zsl::{name}", fake, lib=_library)
    return getattr(torch.ops.zsl, name).default


def differentiable(op: torch._ops.OpOverload, setup: Callable, backward: Callable) -> None:
    """Gives the op a derivative, as ``torch.library.register_autograd`` has it."""
    torch.library.register_autograd(op, outside_autocast(backward), setup_context=setup, lib=_library)


def refuse_second_derivative(ctx: Any, *cotangents: Tensor | None) -> Grads:
    raise NotImplementedError("zsl_kernels: these ops can be differentiated once; use impl='reference' for second derivatives")


def differentiable_never(op: torch._ops.OpOverload) -> None:
    """For an op that is a derivative itself."""
    differentiable(op, lambda ctx, inputs, output: None, refuse_second_derivative)


def empty(x: Tensor, *shape: int | torch.SymInt) -> Tensor:
    """Of the sum dtype of ``x``."""
    return x.new_empty(shape, dtype=sum_dtype(x.dtype))


def sums_like(x: Tensor, shape: Sequence[int | torch.SymInt], N: int, direction: Tensor | None, gram: bool) -> tuple[Tensor, ...]:
    """The results of an op that has the fields of ``InterferenceSums``, with sums of ``shape``, as a fake gives them."""
    along = (0,) if direction is None else (N,)
    sizes: list[Sequence[int | torch.SymInt]] = [shape] * 3 + [(N,)] * 2 + [along] * 2 + [(N, N) if gram else (0,)]
    return tuple(empty(x, *size) for size in sizes)
