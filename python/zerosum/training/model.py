"""Defines the demo's model: a small decoder-only GPT in the conventions of Mircea et al. (2025).

It uses RoPE, RMSNorm without scale, SwiGLU, no biases and an untied head. Every weight except the token embedding is a plain
``nn.Linear``, which a probe instruments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model. ``positions`` is the longest sequence that it accepts."""

    vocab: int
    width: int
    layers: int
    heads: int
    positions: int

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "layers", "heads", "positions"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a whole number >= 1, got {size!r}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width: expected an even multiple of heads ({self.heads}), got {self.width}")


class Attention(nn.Module):
    """Causal self-attention. Queries and keys are rotated by their position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        N, T, width = x.shape
        q, k, v = (
            self.qkv(x).view(N, T, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )  # each (N, heads, T, width/heads)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(N, T, width))


class MLP(nn.Module):
    """SwiGLU. Gate and value together are as wide as the model (the paper's ``mlp_ratio`` of 1)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.width, bias=False)
        self.down = nn.Linear(config.width // 2, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """Attention, then the MLP. Each acts on normalized inputs and adds its output to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(normalize(x), cos, sin)
        return x + self.mlp(normalize(x))


class GPT(nn.Module):
    """``GPT(config)(tokens)`` maps token ids (N, T) to logits of the next token (N, T, vocab)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        for name, table in zip(("cos", "sin"), rotations(config.positions, config.width // config.heads), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights from torch's global generator. The scale of the residual stream does not depend on the depth."""
        for name, weight in self.named_parameters():
            std = 1.0 if name.startswith("embedding") else weight.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std /= math.sqrt(2 * self.config.layers)
            elif name.startswith("head"):
                std *= 0.1  # makes predictions near-uniform, so the first loss is ln(vocab)
            nn.init.normal_(weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.shape[1] > self.config.positions:
            raise ValueError(f"tokens: expected shape (N, T <= {self.config.positions}), got {tuple(tokens.shape)}")
        T = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.head(normalize(x))


def token_losses(model: Callable[[Tensor], Any], x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each predicted token, (N, T): ``F.cross_entropy(logits.mT, y, reduction="none")``.

    ``y`` (N, T) is ``x`` shifted by one position. ``logits`` (N, T, vocab) are the :func:`logits_of` of ``model(x)``.
    """
    output = model(x)
    try:
        logits = logits_of(output, x)
    except ValueError as error:
        hint = "losses=f says how losses are computed: f(model, x, y) gives one for each token, (N, T)"
        raise ValueError(f"{error}; {hint}") from None
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def logits_of(output: Any, x: Tensor) -> Tensor:
    """Return the logits (N, T, vocab) in a model's output for the tokens ``x`` (N, T).

    They are the output itself, its attribute ``.logits`` (as in transformers' models), the entry "logits" of a dictionary, or the
    first entry of a tuple.

    Raises:
        ValueError: the output has no logits of that shape.
    """
    found = output
    if isinstance(output, Mapping):  # transformers' outputs are also mappings
        found = output.get("logits")
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if isinstance(found, Tensor) and found.ndim == x.ndim + 1 and found.shape[:-1] == x.shape:
        return found
    got = type(output).__name__
    if isinstance(output, Mapping):
        got += f" of {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(found, Tensor):
        got = str(tuple(found.shape)) if found is output else f"{got} with {tuple(found.shape)}"
    raise ValueError(
        f"model: expected logits of shape ({', '.join(map(str, x.shape))}, vocab), got {got}; they may be the output, its .logits, "
        "its 'logits', or the first entry of a tuple"
    )


def under_autocast(losses: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Wrap ``losses`` so that the model's matrix products run in bfloat16.

    Autocast itself computes ``F.cross_entropy`` in float32.
    """

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return losses(model, x, y)

    return run


def normalize(x: Tensor) -> Tensor:
    """Apply RMSNorm without scale."""
    return F.rms_norm(x, x.shape[-1:])


def rotations(positions: int, size: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of RoPE's angles, (positions, size/2) each.

    Pair i turns by ``10000^(-2i/size)`` for each position.
    """
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + size/2}) of the last dimension by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)
