"""The training step that is measured: the project's GPT on random tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zerosum.training.model import GPT, GPTConfig, token_losses

N, T = 8, 256
CONFIG = GPTConfig(vocab=4096, width=256, layers=4, heads=4, positions=T)


@dataclass(frozen=True)
class Workload:
    """A model and a batch; with ``autocast``, the model's products are in bfloat16."""

    model: nn.Module
    x: Tensor  # (N, T)
    y: Tensor  # (N, T)
    autocast: bool = False

    @classmethod
    def make(
        cls, config: GPTConfig = CONFIG, examples: int = N, device: torch.device | str = "cpu", autocast: bool = False
    ) -> Workload:
        torch.manual_seed(0)
        x, y = torch.randint(config.vocab, (2, examples, config.positions)).to(device)
        return cls(GPT(config).to(device), x, y, autocast)

    @property
    def linear_weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if not name.startswith("embedding")}

    def losses(self) -> Tensor:
        """Of each example, (N,)."""
        return self.losses_of(self.model, self.x, self.y)

    def losses_of(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """``model`` may also be a function, such as the model with other weights."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return token_losses(model, x, y).mean(1)
