"""Models whose parameters are shards: refused before the first step, with what to do instead."""

from __future__ import annotations

from torch import nn

_INSTEAD = "wrap a model that is to be measured in torch.nn.parallel.DistributedDataParallel instead"


def check_whole(model: nn.Module) -> None:
    """Raises where parameters are shards, which the probe would measure wrongly or not at all.

    Raises:
        NotImplementedError: the model is sharded; the message names the module or the parameter, and how it is sharded.
    """
    for name, module in model.named_modules():
        if _is_a(module, "FullyShardedDataParallel"):
            raise NotImplementedError(
                f"model: {name or 'it'!r} is a FullyShardedDataParallel module (FSDP1), which flattens its parameters; {_INSTEAD}"
            )
    for name, p in model.named_parameters():
        if type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor":
            how = "fully_shard (FSDP2)" if _is_fully_sharded(model, name) else "tensor parallelism"
            raise NotImplementedError(
                f"model: {name!r} is a DTensor, sharded by {how}; the probe measures whole parameters: {_INSTEAD}"
            )


def _is_fully_sharded(model: nn.Module, parameter: str) -> bool:
    """Whether the module of a parameter, or one around it, is FSDP2's."""
    path = parameter.split(".")[:-1]
    return any(_is_a(model.get_submodule(".".join(path[:k])), "FSDPModule") for k in range(len(path) + 1))


def _is_a(module: nn.Module, name: str) -> bool:
    """By name: importing the class takes a second."""
    return any(kind.__name__ == name for kind in type(module).__mro__)
