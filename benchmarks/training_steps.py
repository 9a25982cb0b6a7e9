"""Ways to take a training step of a small GPT with statistics of its per-example gradients, for speed and memory benchmarks.

``STEPS[name](workload)`` is one forward and backward pass. The probe covers every parameter. "vmap" and "loop" compute the same
sums and norms of the linear weights; in their favour, they leave out the embedding's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from zerosum import Probe
from zerosum.training.model import GPT, GPTConfig, token_losses

N, T = 8, 256
CONFIG = GPTConfig(vocab=4096, width=256, layers=4, heads=4, positions=T)


@dataclass(frozen=True)
class Workload:
    """A model and a batch."""

    model: nn.Module
    x: Tensor  # (N, T)
    y: Tensor  # (N, T)

    @classmethod
    def make(cls, config: GPTConfig = CONFIG, examples: int = N, device: str = "cpu") -> Workload:
        torch.manual_seed(0)
        tokens = torch.randint(config.vocab, (2, examples, config.positions))
        return cls(GPT(config).to(device), *tokens.to(device))

    @property
    def linear_weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if not name.startswith("embedding")}

    def losses(self) -> Tensor:
        """Of each example, (N,)."""
        return token_losses(self.model, self.x, self.y).mean(1)


class Sums:
    """Σg, Σ|g|, Σg² of each weight and each example's norms, fed from per-example gradients."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        self._sums = {name: p.new_zeros(3, *p.shape) for name, p in weights.items()}
        self.scalars: list[tuple[Tensor, Tensor]] = []

    def add_example(self, gradients: tuple[Tensor, ...]) -> None:
        for (total, size, square), g in zip(self._sums.values(), gradients, strict=True):
            absolute = g.abs()
            total += g
            size += absolute
            square.addcmul_(g, g)
            self.scalars.append((absolute.sum(), g.square().sum()))


def plain(work: Workload) -> None:
    work.model.zero_grad()
    work.losses().sum().backward()


_PROBES: WeakKeyDictionary[nn.Module, dict[bool, Probe]] = WeakKeyDictionary()


def probe_of(model: nn.Module, gram: bool = False) -> Probe:
    """One probe for all of a model's steps, as in training."""
    probes = _PROBES.setdefault(model, {})
    if gram not in probes:
        probes[gram] = Probe(model, gram=gram)
    return probes[gram]


def probed(work: Workload, *, gram: bool = False) -> None:
    work.model.zero_grad()
    probe = probe_of(work.model, gram)
    with probe:
        work.losses().sum().backward()
    report = probe.report()
    assert report.metrics
    assert not report.coverage.not_covered, report.coverage


def materialized(work: Workload) -> None:
    """All per-example gradients at once by torch.func."""

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(work.model, weights, (x[None],))[0], y)

    weights = {name: p.detach() for name, p in work.linear_weights.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no batching rule on the CPU and would be eight times slower
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, work.x, work.y)
    results = []
    for name in list(gradients):
        g = gradients.pop(name)
        total, absolute, squares = g.sum(0), g.abs(), g.square()
        results.append((total, absolute.sum(0), squares.sum(0), absolute.sum((1, 2)), squares.sum((1, 2))))


def loop(work: Workload) -> None:
    """One backward pass for each example."""
    weights = work.linear_weights
    sums = Sums(weights)
    for x, y in zip(work.x.split(1), work.y.split(1), strict=True):
        sums.add_example(torch.autograd.grad(token_losses(work.model, x, y).mean(), list(weights.values())))


STEPS: dict[str, Callable[[Workload], None]] = {
    "plain": plain,
    "probe": probed,
    "probe + Gram": lambda work: probed(work, gram=True),
    "vmap": materialized,
    "loop": loop,
}
