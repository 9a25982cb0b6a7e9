"""What a probe keeps of one parameter while the model runs, and the results that come of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import zsl_kernels as zk
from zsl_kernels import CoordinateSums


@dataclass
class Results:
    """A parameter's sums and scalars for the loss that was differentiated, before `loss_reduction` is undone.

    ``grad_sum`` shares its memory with the ``.grad`` that autograd stored, so that it costs nothing; ``version`` tells whether
    someone has written to it since.
    """

    grad_sum: Tensor
    abs_sum: Tensor
    sq_sum: Tensor
    l1: Tensor
    sq_norm: Tensor
    dot: Tensor | None
    abs_dot: Tensor | None
    gram: Tensor | None
    coordinates: CoordinateSums
    version: int

    @classmethod
    def of(cls, sums: zk.InterferenceSums, direction: Tensor | None) -> Results:
        coordinates = zk.coordinate_sums(sums.grad_sum, sums.abs_sum, sums.sq_sum, direction=direction)
        # Another tensor of the same memory: autograd takes a gradient over without a copy only if it holds the sole reference.
        grad_sum = sums.grad_sum.detach()
        return cls(*sums._replace(grad_sum=grad_sum), coordinates=coordinates, version=grad_sum._version)


@dataclass
class Tracked:
    """One trainable parameter under a probe.

    A parameter that is used once in the forward pass gets its statistics in the backward pass, fused with its gradient. One that is
    used more often has an example's gradient summed over the uses before any |·|: its inputs and output gradients are kept
    until the probe closes, and form one longer sequence of positions.
    """

    name: str
    parameter: nn.Parameter
    direction: Tensor | None
    gram: bool
    uses: int = 0
    how: str = ""  # the rule that covers it
    problem: str = ""  # why it is not covered
    results: Results | None = None
    _pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _per_example: Tensor | None = None

    def refuse(self, problem: str) -> None:
        """The first problem is the one to tell; what was gathered is no longer the whole gradient."""
        self.problem = self.problem or problem
        self.results = self._per_example = None
        self._pending.clear()

    @property
    def fused(self) -> bool:
        """Whether the coming backward use is the parameter's only one, so that its gradient and statistics are one pass."""
        return self.uses == 1 and not self.problem and self.results is None

    def weight_gradient(self, a: Tensor, b: Tensor) -> Tensor:
        """The weight's gradient, Σ_i b_iᵀ a_i, with the statistics on the way. ``fused`` must hold."""
        sums = zk.interference(a, b, direction=self.direction, gram=self.gram)
        self.results = Results.of(sums, self.direction)
        return sums.grad_sum

    def add_use(self, a: Tensor, b: Tensor) -> None:
        """Keeps one of several uses until :meth:`finish`."""
        if not self.problem:
            self._pending.append((a, b))

    def add_per_example(self, g: Tensor) -> None:
        """Adds gradients of one use that are small enough to hold for each example: (N, ·)."""
        if not self.problem:
            self._per_example = g if self._per_example is None else self._per_example + g

    def finish(self) -> None:
        """Computes what could not be computed during the backward pass."""
        if self.problem:
            return
        if self._pending:
            a, b = (torch.cat(parts, 1) for parts in zip(*self._pending, strict=True))
            self.results = Results.of(zk.interference(a, b, direction=self.direction, gram=self.gram), self.direction)
            self._pending.clear()
        elif self._per_example is not None:
            g = self._per_example.unsqueeze(1)
            # One position with one input feature of value 1: g_i = b_i.
            ones = g.new_ones(1, 1, 1).expand(g.shape[0], 1, 1)
            direction = None if self.direction is None else self.direction.unsqueeze(1)
            sums = zk.interference(ones, g, direction=direction, gram=self.gram)
            sums = sums._replace(**{name: getattr(sums, name).squeeze(1) for name in ("grad_sum", "abs_sum", "sq_sum")})
            self.results = Results.of(sums, self.direction)
            self._per_example = None
        if self.results is None:
            self.refuse("no gradient reached it inside the probe" if self.uses else "not used inside the probe")
