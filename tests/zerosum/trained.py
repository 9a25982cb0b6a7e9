"""A model some steps into its training, and the update that its next step would make."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zerosum.training.model import token_losses


def train(model: nn.Module, batch: Callable[[], tuple[Tensor, Tensor]], steps: int, rate: float) -> dict[str, Tensor]:
    """Trains the model by AdamW on drawn batches; returns Δ of one more step, which is taken back."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)

    def step() -> None:
        optimizer.zero_grad()
        token_losses(model, *batch()).mean().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    update = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    model.load_state_dict(before, strict=False)
    optimizer.zero_grad()
    return update
