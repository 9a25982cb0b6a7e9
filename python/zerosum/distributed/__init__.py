"""The probe in training that runs in several processes: what it has to know of DistributedDataParallel
(:mod:`~zerosum.distributed.ddp`) and of fully_shard (:mod:`~zerosum.distributed.fsdp`), and how ranks' reports become one
(:mod:`~zerosum.distributed.reports`).

Reports of ranks that have whole parameters are added up by :meth:`zerosum.Report.all_reduce`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from zerosum.distributed.fsdp import Shards


def shards_of(model: nn.Module) -> Shards | None:
    """The parameters of a model that fully_shard has sharded. All ranks call it, as parameters may be gathered for it."""
    if "torch.distributed.fsdp" not in sys.modules:
        return None  # (which takes long to import)
    from zerosum.distributed import fsdp

    return fsdp.Shards.find(model)


def check_whole(model: nn.Module, caller: str) -> None:
    """Raises where a model's parameters are parts of parameters, of which only a plain probe knows what to do.

    Raises:
        NotImplementedError: the message names the module or the parameter, and what to do instead.
    """
    _refuse_flat(model)
    for name, p in model.named_parameters():
        if type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor":
            raise NotImplementedError(
                f"model: {name!r} is a DTensor, a part of a parameter; {caller} measures whole ones: give it a copy of the model "
                "with full_tensor() of each"
            )


def check_supported(model: nn.Module) -> None:
    """Raises where a model's parameters are parts of parameters, in a way that the probe does not support.

    Raises:
        NotImplementedError: the message names the module or the parameter, and what to do instead.
    """
    _refuse_flat(model)
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor

    sharded = frozenset[nn.Parameter]()
    if "torch.distributed.fsdp" in sys.modules:
        from zerosum.distributed import fsdp

        sharded = fsdp.check(model)
    for name, p in model.named_parameters():
        if isinstance(p, DTensor) and p not in sharded:
            raise NotImplementedError(
                f"model: {name!r} is a DTensor of {p.placements} that fully_shard has not made; tensor parallel parameters are not "
                "supported: measure a copy of the model whose parameters are whole"
            )
        if p.requires_grad and sharded and p not in sharded:
            raise NotImplementedError(
                f"model: {name!r} is not sharded, and other parameters are: call fully_shard on the whole model last, as PyTorch "
                "advises, without ignored_params that are trained"
            )


def _refuse_flat(model: nn.Module) -> None:
    for name, module in model.named_modules():
        # By name: importing the class takes a second.
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise NotImplementedError(
                f"model: {name or 'it'!r} is a FullyShardedDataParallel module (FSDP1), which flattens its parameters: shard the "
                "model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )


__all__ = ["check_supported", "check_whole", "shards_of"]
