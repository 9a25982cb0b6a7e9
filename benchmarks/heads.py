"""A language model's head, forward and backward: the plain one, which holds its logits, and the one that does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zsl_kernels as zk


@dataclass(frozen=True)
class HeadCase:
    """One head and one batch."""

    N: int
    T: int
    K: int
    V: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"N={self.N} T={self.T} K={self.K} V={self.V} {self.dtype}"


@dataclass(frozen=True)
class Head:
    h: Tensor
    weight: Tensor
    targets: Tensor

    @classmethod
    def make(cls, case: HeadCase, device: str = "cpu") -> Head:
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        h = torch.empty(case.N, case.T, case.K, dtype=dtype, device=device).normal_().requires_grad_()
        weight = torch.empty(case.V, case.K, dtype=dtype, device=device).normal_(0, case.K**-0.5).requires_grad_()
        return cls(h, weight, torch.randint(case.V, (case.N, case.T), device=device))

    def backward(self, losses: Tensor) -> None:
        with torch.enable_grad():
            torch.autograd.grad(losses.sum(), (self.h, self.weight))


class _Linear(torch.autograd.Function):
    """``h @ weight.T`` whose weight's gradient comes with the statistics, or is the plain product."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, statistics: bool) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.statistics = statistics
        return h @ weight.T

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor, None]:
        h, weight = ctx.saved_tensors
        grad_h = b @ weight
        if ctx.statistics:
            return grad_h, zk.interference(h, b).grad_sum.to(weight.dtype), None
        return grad_h, b.flatten(0, 1).T @ h.flatten(0, 1), None


def plain(x: Head, statistics: bool = True) -> None:
    """As autocast has it in half precision: the loss in float32. No logits are referenced from here."""
    with torch.enable_grad():
        losses = F.cross_entropy(_Linear.apply(x.h, x.weight, statistics).float().movedim(-1, 1), x.targets, reduction="none")
    x.backward(losses)


def fused(x: Head, statistics: bool = True) -> None:
    with torch.enable_grad():
        losses = zk.linear_cross_entropy(x.h, x.weight, x.targets, statistics=(lambda sums: None) if statistics else None)
    x.backward(losses)


HEADS: dict[str, Callable[[Head], None]] = {
    "plain": plain,
    "fused": fused,
    "plain, no statistics": lambda x: plain(x, statistics=False),
    "fused, no statistics": lambda x: fused(x, statistics=False),
}
