"""What is measured: a training step or one weight, of some sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from zerosum.bench.ops import OPS, Operands
from zerosum.bench.peers import PEERS
from zerosum.bench.ways import STEPS, Way
from zerosum.bench.workload import Workload
from zerosum.training.model import GPTConfig

W = TypeVar("W")


class Case(Generic[W]):
    """What to make, and the ways that there are, of which the first is the baseline."""

    ways: Sequence[Way[W]]

    @property
    def title(self) -> str:
        raise NotImplementedError

    @property
    def note(self) -> str:
        raise NotImplementedError

    def make(self, device: torch.device | str) -> W:
        raise NotImplementedError

    def small(self) -> Case[W]:
        """The same, of sizes at which everything can be compared with the truth."""
        raise NotImplementedError

    def way(self, name: str) -> Way[W]:
        return next(way for way in self.ways if way.name == name)


@dataclass(frozen=True)
class StepCase(Case[Workload]):
    """A training step of the project's GPT with N sequences, in float32 or under autocast to bfloat16."""

    config: GPTConfig
    N: int
    dtype: str = "float32"

    ways = (*STEPS, *PEERS)

    @property
    def title(self) -> str:
        return f"Training step, N={self.N} T={self.config.positions}, {_precision(self.dtype)}"

    @property
    def note(self) -> str:
        c = self.config
        return f"Forward and backward pass of the project's GPT: width {c.width}, {c.layers} layers, vocabulary {c.vocab}."

    def make(self, device: torch.device | str) -> Workload:
        return Workload.make(self.config, self.N, device, self.dtype == "bfloat16")

    def small(self) -> StepCase:
        return replace(self, config=GPTConfig(vocab=96, width=64, layers=2, heads=2, positions=24), N=5)


@dataclass(frozen=True)
class OpCase(Case[Operands]):
    """One weight (O, K)."""

    N: int
    T: int
    O: int
    K: int
    dtype: str = "float32"

    ways = OPS

    @property
    def title(self) -> str:
        return f"One weight, N={self.N} T={self.T} O={self.O} K={self.K}, {self.dtype}"

    @property
    def note(self) -> str:
        return "Against torch's product dW = bᵀ a in the same precision."

    def make(self, device: torch.device | str) -> Operands:
        return Operands.make(self.N, self.T, self.O, self.K, getattr(torch, self.dtype), device)

    def small(self) -> OpCase:
        return replace(self, N=5, T=33, O=45, K=70)


def _precision(dtype: str) -> str:
    return dtype if dtype == "float32" else f"autocast to {dtype}"
