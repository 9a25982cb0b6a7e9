"""Describes how the rows of an activation are divided among the examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Uncovered(Exception):
    """Raised when a rule cannot cover a call; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The example of every row of an activation ``(*lead, F)``.

    Regular: dimension ``axis`` of ``lead`` is ``(outer, sequences, inner)``, flattened. ``(N, T)`` in order is ``axis=0``,
    ``(T, N)`` is ``axis=1``, ``(N·T,)`` is ``axis=0, inner=T``. Irregular: ``ids`` holds the example of every row,
    ``(prod(lead),)``.

    If positions are the examples, each sequence has ``positions`` of them, in the order of the rows. ``place`` is their dimension
    once that of the sequences has been moved to the front.
    """

    examples: int
    axis: int = 0
    outer: int = 1
    inner: int = 1
    ids: Tensor | None = None
    positions: int = 0
    place: int = 1

    @property
    def sequences(self) -> int:
        return self.examples // self.positions if self.positions else self.examples

    def same_as(self, other: Layout) -> bool:
        """Whether both are regular and divide rows in the same way."""
        mine, theirs = ((x.ids is None, x.axis, x.outer, x.inner, x.place) for x in (self, other))
        return mine == theirs and self.ids is None

    @cached_property
    def plain(self) -> bool:
        """Whether the rows are sorted by example."""
        return self.ids is None and self.axis == 0 and self.outer == 1 and self.place == 1

    def first(self, x: Tensor) -> Tensor:
        """Move the sequences to the front: (sequences, …), or (sequences, positions, …) if positions are the examples."""
        if self.outer != 1 or self.inner != 1:
            x = x.unflatten(self.axis, (self.outer, self.sequences, self.inner)).movedim(self.axis + 1, 0)
        elif self.axis:
            x = x.movedim(self.axis, 0)
        return x.movedim(self.place, 1) if self.place != 1 else x

    def rows(self, x: Tensor) -> Tensor:
        """Reshape ``(*lead, F)`` to (E, T, F), or to (P, F) with :attr:`ids`."""
        if self.ids is not None:
            return x.reshape(-1, x.shape[-1])
        if not self.plain:
            x = self.first(x)
        return x.reshape(self.examples, x.shape[:-1].numel() // max(self.examples, 1), x.shape[-1])

    def ragged(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments that tell an op of ``zsl_kernels`` the example of each row, for irregular rows."""
        return {} if self.ids is None else {"example_ids": self.ids, "num_examples": self.examples}

    def all_ids(self, lead: torch.Size, device: torch.device) -> Tensor:
        """Return the example of every row, (prod(lead),)."""
        if self.ids is not None:
            return self.ids
        if self.examples <= 1:
            return torch.zeros(math.prod(lead), dtype=torch.long, device=device)
        if self.positions:
            mine = torch.arange(self.examples, device=device).view(self.sequences, self.positions)
        else:
            mine = torch.arange(self.examples, device=device)
        number = torch.arange(math.prod(lead), device=device).view(lead)
        ordered = self.first(number)
        mine = mine.view(*mine.shape, *[1] * (ordered.ndim - mine.ndim)).expand(ordered.shape)
        return torch.empty_like(number).view(-1).index_put_((ordered.reshape(-1),), mine.reshape(-1))

    def slice(self, x: Tensor, mine: slice) -> tuple[Tensor, Tensor | None]:
        """Return some rows of ``x`` (P, F), and the example of each."""
        return x[mine], self.all_ids(x.shape[:-1], x.device)[mine]

    def is_diagonal(self, shape: torch.Size, ndim: int) -> bool:
        """Whether a weight of this shape, broadcast to ``ndim`` dimensions, has one entry of dimension 0 for each example."""
        regular = self.ids is None and self.outer == self.inner == 1 and not self.positions and self.axis == 0
        return regular and len(shape) == ndim > 0 and shape[0] == self.examples > 1

    def per_example(self, g: Tensor, shape: torch.Size) -> Tensor:
        """Return (E, *shape): the gradient ``g`` of a weight that was broadcast from ``shape``, by example."""
        lead = (1,) * (g.ndim - len(shape)) + tuple(shape)
        if self.examples > 1 and self.ids is None and not self.positions and lead[self.axis] == 1:
            parts = g.unflatten(self.axis, (self.outer, self.sequences, self.inner)).movedim(self.axis + 1, 0)
            summed = parts.sum((self.axis + 1, self.axis + 2)).unsqueeze(self.axis + 1)
            return summed.sum_to_size((self.examples, *lead)).reshape(self.examples, *shape)
        entries = torch.arange(math.prod(shape), device=g.device).view(lead).expand(g.shape).reshape(-1)
        out = g.new_zeros(self.examples, math.prod(shape))
        return out.index_put_((self.all_ids(g.shape, g.device), entries), g.reshape(-1), accumulate=True).view(-1, *shape)
