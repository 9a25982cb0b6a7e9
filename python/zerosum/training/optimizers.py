"""Builds the optimizers that the demo trains with, all from torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer


class Part(NamedTuple):
    """One of torch's optimizers, its options, and its parameters: "all", the "hidden" weights, or the "others"."""

    kind: type[Optimizer]
    options: dict[str, Any]
    gets: str = "all"

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items() if key != "fused")
        where = {"all": "every parameter", "hidden": "the 2-D weights of the blocks", "others": "the other parameters"}[self.gets]
        return f"{self.kind.__name__}({options}) for {where}"


class Recipe(NamedTuple):
    """An optimizer's default learning rate and its parts, which share the rate."""

    rate: float
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.parts))


_ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
OPTIMIZERS = {
    "adamw": Recipe(3e-3, (Part(torch.optim.AdamW, _ADAM),)),
    # With this adjustment, a Muon update has about the same root mean square as an AdamW update at the same rate, so both use one
    # rate.
    "muon": Recipe(
        3e-3,
        (
            Part(torch.optim.Muon, {"momentum": 0.95, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}, "hidden"),
            Part(torch.optim.AdamW, _ADAM, "others"),
        ),
    ),
    "sgd": Recipe(0.1, (Part(torch.optim.SGD, {"momentum": 0.9}),)),
    "rmsprop": Recipe(1e-3, (Part(torch.optim.RMSprop, {"alpha": 0.95}),)),
    "adafactor": Recipe(3e-2, (Part(torch.optim.Adafactor, {}),)),
}


def recipe(name: str) -> Recipe:
    """Return the recipe of an optimizer.

    Raises:
        ValueError: no optimizer has this name; the message lists the names.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")
    return OPTIMIZERS[name]


def build(name: str, model: nn.Module, rate: float) -> Optimizer:
    """Build the optimizer of a model: one of torch's, or several of them combined.

    "hidden" parameters are the matrices inside ``model.blocks``. Muon is not meant for embeddings and heads, although these are
    matrices too.

    Raises:
        ValueError: no optimizer has this name.
    """
    parts = recipe(name).parts
    hidden = {key for key, p in model.named_parameters() if p.ndim == 2 and key.startswith("blocks.")}
    built = []
    for part in parts:
        chosen = [p for key, p in model.named_parameters() if part.gets == "all" or (key in hidden) == (part.gets == "hidden")]
        built.append(part.kind(chosen, lr=rate, **part.options))  # type: ignore[call-arg]
    return built[0] if len(built) == 1 else Together(built)


class Together(Optimizer):
    """Several optimizers combined into one. Their groups are concatenated; there is one ``state_dict()`` and one ``step()``."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Make the parts use this optimizer's groups and state, which loading a state replaces."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Make one step of each part. Closures are refused, because a closure would be evaluated before all parts."""
        if closure is not None:
            raise ValueError(f"closure: expected None, got {closure!r}")
        for part in self.parts:
            part.step()
