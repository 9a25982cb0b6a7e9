"""Ways to every token's own gradient, for speed benchmarks: what :func:`zerosum.token_report` is held against.

Both compute, for the linear weights, Σ_i g_i, Σ_i |g_i| and each token's ‖g_i‖₁, ‖g_i‖², Σ_j g_ij u_j and Σ_j |g_ij u_j|. In their
favour they leave out Σ_i g_i², the nulls and the embedding.
"""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

import zerosum
from tests.zerosum.trained import train
from zerosum.tokens import SampledReport
from zerosum.training.model import GPT, GPTConfig, token_losses

VOCAB, WIDTH, LAYERS, HEADS = 4096, 256, 4, 4
STEPS, BATCH, RATE = 200, 4, 1e-3


@dataclass
class TokenWorkload:
    """A GPT after some steps on text, a batch that it has not seen, and its next step's update as the direction."""

    model: GPT
    x: Tensor  # (N, T)
    y: Tensor
    direction: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """But for the embedding, all of them are linear layers'."""
        return {name: p for name, p in self.model.named_parameters() if not name.startswith("embedding")}

    @property
    def first(self) -> TokenWorkload:
        """Of one sequence alone: sequences are measured one by one, and all take the same time."""
        return replace(self, x=self.x[:1], y=self.y[:1])

    def plain(self) -> None:
        """One ordinary forward and backward pass over the batch."""
        torch.autograd.grad(token_losses(self.model, self.x, self.y).sum(), list(self.model.parameters()))

    def measure_exactly(self) -> zerosum.Report:
        report = zerosum.token_report(self.model, self.x, self.y, direction=self.direction)
        assert isinstance(report, zerosum.Report)
        assert not report.coverage.not_covered, report.coverage
        assert report.metrics
        return report

    def measure_sample(self, draws: int, seed: int = 0) -> SampledReport:
        report = zerosum.token_report(self.model, self.x, self.y, direction=self.direction, sample=draws, seed=seed)
        assert isinstance(report, SampledReport)
        assert not report.coverage.not_covered, report.coverage
        return report


@lru_cache(maxsize=1)
def text() -> Tensor:
    """The standard library's pairs of bytes, hashed into the vocabulary."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    pairs = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths[:60])), dtype=torch.uint8).long()
    pairs = pairs[: len(pairs) // 2 * 2].view(-1, 2)
    return (pairs[:, 0] * 31 + pairs[:, 1] * 17 * 31) % VOCAB


@lru_cache(maxsize=8)
def workload(sequences: int, positions: int) -> TokenWorkload:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=VOCAB, width=WIDTH, layers=LAYERS, heads=HEADS, positions=positions))
    tokens = text()

    def batch(size: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - positions - 1, (size,))
        rows = torch.stack([tokens[start : start + positions + 1] for start in starts.tolist()])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    direction = train(model, lambda: batch(BATCH), STEPS, RATE)
    return TokenWorkload(model, *batch(sequences), direction)


class DenseSums:
    """The sums of one weight and its tokens' scalars, fed from dense gradients with one reused temporary."""

    def __init__(self, weight: Tensor, direction: Tensor) -> None:
        self.direction = direction
        self.grad_sum, self.abs_sum, self._temporary = (torch.zeros_like(weight) for _ in range(3))
        self.scalars: list[tuple[Tensor, ...]] = []

    def add(self, g: Tensor) -> None:
        size = torch.abs(g, out=self._temporary)
        self.grad_sum += g
        self.abs_sum += size
        l1, sq_norm = size.sum(), torch.dot(g.flatten(), g.flatten())
        p = torch.mul(g, self.direction, out=self._temporary)
        dot = p.sum()
        self.scalars.append((l1, sq_norm, dot, p.abs_().sum()))


def one_backward_per_token(work: TokenWorkload, tokens: list[int]) -> dict[str, DenseSums]:
    """``torch.autograd.grad`` of each of these tokens' losses, one sequence at a time: the others would only add work."""
    sums = {name: DenseSums(p.detach(), work.direction[name]) for name, p in work.weights.items()}
    T = work.x.shape[1]
    for i in sorted({token // T for token in tokens}):
        losses = token_losses(work.model, work.x[i : i + 1], work.y[i : i + 1])[0]
        for token in tokens:
            if token // T == i:
                gradients = torch.autograd.grad(losses[token % T], list(work.weights.values()), retain_graph=True)
                for one, g in zip(sums.values(), gradients, strict=True):
                    one.add(g)
    return sums


def one_backward_per_position(work: TokenWorkload, positions: list[int]) -> dict[str, DenseSums]:
    """One backward pass for the losses of all sequences at each of these positions, in which every sequence's dense gradient is the
    product of the layer's inputs and its outputs' gradients. The pass computes nothing but these, and the products go no further
    than the position, behind which gradients are zero."""
    weights = work.weights
    sums = {name: DenseSums(p.detach(), work.direction[name]) for name, p in weights.items()}
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {name: work.model.get_submodule(name.removesuffix(".weight")) for name in weights}
    hooks = [
        layer.register_forward_hook(lambda _, args, result, name=name: calls.__setitem__(name, (args[0].detach(), result)))
        for name, layer in layers.items()
    ]
    try:
        losses = token_losses(work.model, work.x, work.y)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = [result for _, result in calls.values()]
    for t in positions:
        gradients = torch.autograd.grad(losses[:, t].sum(), outputs, retain_graph=True)
        for (name, (a, _)), b in zip(calls.items(), gradients, strict=True):
            for i in range(len(a)):
                sums[name].add(torch.einsum("to,tk->ok", b[i, : t + 1], a[i, : t + 1]))
    return sums
