"""Lets the probe measure training that runs in several processes.

- :mod:`~zerosum.distributed.ddp` handles DistributedDataParallel.
- :mod:`~zerosum.distributed.fsdp` handles fully_shard (FSDP2).
- :mod:`~zerosum.distributed.tensor_parallel` handles tensor parallelism.
- :mod:`~zerosum.distributed.reports` combines the ranks' reports. For ranks with whole parameters, call
  :meth:`zerosum.Report.all_reduce`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from zerosum.distributed.shards import Shards


def check_supported(model: nn.Module) -> None:
    """Raise an error if a model's parameters are sharded in a way that the probe does not support.

    Raises:
        NotImplementedError: the message names the module or the parameter, and what to do instead.
    """
    _refuse_flat(model)
    if is_sharded(model):
        from zerosum.distributed import shards

        if any(_is_a(module, "DistributedDataParallel") for module in model.modules()):
            raise NotImplementedError("model: DTensors inside DistributedDataParallel are not supported: use fully_shard")
        shards.check(model)


def check_whole(model: nn.Module, caller: str) -> None:
    """Raise an error if a model's parameters are sharded, for a ``caller`` that needs whole parameters.

    Raises:
        NotImplementedError: the message names the module or the parameter, and what to do instead.
    """
    _refuse_flat(model)
    if (name := _dtensor(model)) is not None:
        raise NotImplementedError(
            f"model: {name!r} is a DTensor, which holds part of a parameter; {caller} needs whole parameters: pass a copy of the "
            "model with full_tensor() of each parameter"
        )


def shards_of(model: nn.Module) -> Shards | None:
    """Return the model's sharded parameters, or None if there are none. All ranks must call it, because it may gather
    parameters."""
    if not is_sharded(model):
        return None
    from zerosum.distributed import shards  # a slow import

    return shards.Shards(model)


def _refuse_flat(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _is_a(module, "FullyShardedDataParallel"):
            raise NotImplementedError(
                f"model: {name or 'it'!r} is a FullyShardedDataParallel module (FSDP1), which flattens its parameters: shard the "
                "model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds parts of a model's parameters."""
    # Between `unshard` and `reshard`, the parameters of fully_shard are whole, so parameters alone do not show it.
    return _dtensor(model) is not None or any(_is_a(module, "FSDPModule") for module in model.modules())


def _dtensor(model: nn.Module) -> str | None:
    """Return the name of a parameter that is a DTensor."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    return next((name for name, p in model.named_parameters() if "DTensor" in (type(p).__name__, type(p.data).__name__)), None)


def _is_a(module: nn.Module, name: str) -> bool:
    """Compare classes by name, because importing the class takes a second."""
    return any(kind.__name__ == name for kind in type(module).__mro__)


__all__ = ["check_supported", "check_whole", "is_sharded", "shards_of"]
