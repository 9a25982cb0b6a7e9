"""Computes the update Δ that the next step from a checkpoint would make, without continuing the training."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zerosum.changes import IGNORED
from zerosum.checkpoints import Loaded
from zerosum.evaluation import Sample
from zerosum.training.run import Refused

Update = dict[str, Tensor]
MICRO_BATCH = 8  # sequences in one pass, if examples need not be together
# Parameters that transformers' Trainer does not decay.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def optimizer_update(loaded: Loaded, batch: Sample, clip: float, learning_rate: float | None = None) -> Update:
    """Return what ``optimizer.step()`` on the batch's mean token loss adds to the weights, with the checkpoint's own state.

    The gradient is clipped to the norm ``clip``. The learning rate is the one in the state unless another is given. The model is
    left unchanged.

    Raises:
        Refused: there is no state; or the state does not fit the model, moves nothing, or belongs to an optimizer that is neither
            Adam nor AdamW nor known from the run.
    """
    optimizer = _optimizer(loaded)
    for group in optimizer.param_groups:
        # These options depend on the machine that trained.
        group |= {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
        group["lr"] = float(group["lr"]) if learning_rate is None else learning_rate
    before = {name: x.clone() for name, x in loaded.weights().items()}
    with _gradient(loaded, batch):
        torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), clip)
        try:
            optimizer.step()
            update = {name: x - before[name] for name, x in loaded.weights().items()}
        finally:
            for name, x in loaded.weights().items():
                x.copy_(before[name])
    if not any(bool(x.any()) for x in update.values()):
        raise Refused(
            "the optimizer's step moves nothing: its learning rate is 0; --learning-rate sets another, --update another step"
        )
    return update


def gradient_update(loaded: Loaded, batch: Sample, clip: float, learning_rate: float | None = None) -> Update:
    """Return −η∇ of the batch's mean token loss, with ∇ clipped to the norm ``clip``: a step of gradient descent.

    Without a rate η, return −∇ itself, whose length has no meaning.
    """
    with _gradient(loaded, batch):
        if learning_rate is not None:
            torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), clip)
        rate = 1.0 if learning_rate is None else learning_rate
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad * -rate
            for name, p in loaded.model.named_parameters()
            if p.requires_grad
        }


@contextmanager
def _gradient(loaded: Loaded, batch: Sample) -> Iterator[None]:
    """Hold the gradient of the mean token loss in ``.grad`` inside the context."""
    loaded.model.zero_grad()
    count = int((batch.y != IGNORED).sum())
    try:
        for x, y in zip(batch.x.split(MICRO_BATCH), batch.y.split(MICRO_BATCH), strict=True):
            losses = loaded.losses(loaded.model, x, y).masked_fill(y == IGNORED, 0)
            (losses.sum() / count).backward()
        yield
    finally:
        loaded.model.zero_grad()


def _optimizer(loaded: Loaded) -> torch.optim.Optimizer:
    """Build the checkpoint's own optimizer, with its state."""
    state = loaded.optimizer
    if state is None:
        raise Refused("no optimizer state there: --update gradient needs none")
    optimizer = _adam(loaded, state) if loaded.build_optimizer is None else loaded.build_optimizer(loaded.model)
    optimizer.load_state_dict(copy.deepcopy(state))  # the optimizer would keep and change the dictionary that it gets
    return optimizer


def _adam(loaded: Loaded, state: dict[str, Any]) -> torch.optim.Optimizer:
    """Build the Adam or AdamW that a state belongs to, with the parameters in the state's order."""
    if not all({"lr", "betas", "eps", "params"} <= group.keys() for group in state["param_groups"]) or not all(
        {"step", "exp_avg", "exp_avg_sq"} <= entry.keys() for entry in state["state"].values()
    ):
        raise Refused("the optimizer's state is not of Adam or AdamW; --update gradient needs none")
    parameters = dict(loaded.model.named_parameters())
    groups = _groups(loaded.model, state)
    decoupled = all(group.get("decoupled_weight_decay", True) for group in state["param_groups"])
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind([{"params": [parameters[name] for name in group]} for group in groups])


def _groups(model: nn.Module, state: dict[str, Any]) -> list[list[str]]:
    """Return the parameters' names in the order of the state, which only has numbers.

    Try the common orders, and take the one that fits the shapes.
    """
    fitting: list[list[list[str]]] = []
    for groups in _customs(model, state):
        if groups not in fitting and _fits(model, state, groups):
            fitting.append(groups)
    if len(fitting) == 1:
        return fitting[0]
    sizes = [len(group["params"]) for group in state["param_groups"]]
    known = "all parameters together, those that are decayed first as transformers does it, or weights before vectors"
    how = "more than one way fits" if fitting else "no known way fits"
    raise Refused(
        f"which parameters the optimizer's groups of {', '.join(map(str, sizes))} are is not known ({known}): {how}; "
        "--update gradient needs no state"
    )


def _customs(model: nn.Module, state: dict[str, Any]) -> Iterator[list[list[str]]]:
    if all("param_names" in group for group in state["param_groups"]):
        yield [list(group["param_names"]) for group in state["param_groups"]]
        return
    every = dict(model.named_parameters())
    trained = {name: p for name, p in every.items() if p.requires_grad}
    normed = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    vectors = {name for name, p in trained.items() if p.ndim < 2}
    plain = {name for name in trained if _NOT_DECAYED.search(name.lower()) or name.rpartition(".")[0] in normed}
    yield [list(every)]
    yield [list(trained)]
    for second in (plain, vectors):
        yield [[name for name in trained if name not in second], [name for name in trained if name in second]]


def _fits(model: nn.Module, state: dict[str, Any], groups: list[list[str]]) -> bool:
    parameters = dict(model.named_parameters())
    if [len(group) for group in groups] != [len(group["params"]) for group in state["param_groups"]]:
        return False
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    shapes = {number: entry["exp_avg"].shape for number, entry in state["state"].items()}
    names = [name for group in groups for name in group]
    return all(
        name in parameters and shapes.get(number, parameters[name].shape) == parameters[name].shape
        for number, name in zip(numbers, names, strict=True)
    )
