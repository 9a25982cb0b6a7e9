"""The statistics that the ways compute, and what they are of gradients that are held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

LABELS = {
    "grad_sum": "Σg",
    "abs_sum": "Σ|g|",
    "sq_sum": "Σg²",
    "l1": "‖g‖₁",
    "sq_norm": "‖g‖²",
    "dot": "⟨g,u⟩",
    "abs_dot": "Σ|gu|",
    "gram": "Gram",
}
SUMS = ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm")


def label(computed: Iterable[str]) -> str:
    """As in "Σg, Σ|g|, Gram"."""
    return ", ".join(LABELS[name] for name in computed)


@dataclass(frozen=True)
class Statistics:
    """What a way computed; None where it did not. The sums are of each parameter, by name. The others are over these ``parameters``
    together: a number for each example, (N,), and the Gram (N, N)."""

    parameters: tuple[str, ...]
    grad_sum: Mapping[str, Tensor] | None = None
    abs_sum: Mapping[str, Tensor] | None = None
    sq_sum: Mapping[str, Tensor] | None = None
    l1: Tensor | None = None
    sq_norm: Tensor | None = None
    dot: Tensor | None = None
    abs_dot: Tensor | None = None
    gram: Tensor | None = None

    @property
    def computed(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self)[1:] if getattr(self, field.name) is not None)


def sums_of(gradients: Iterable[tuple[str, Tensor]]) -> Statistics:
    """Σg, Σ|g|, Σg² and the norms of gradients (N, *shape); each parameter's are dropped before the next are asked for."""
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    l1, sq_norm = [], []
    for name, g in gradients:
        size, square = g.abs(), g.square()
        sums[name] = (g.sum(0), size.sum(0), square.sum(0))
        l1.append(size.flatten(1).sum(1))
        sq_norm.append(square.flatten(1).sum(1))
        del g, size, square
    grad_sum, abs_sum, sq_sum = ({name: of[k] for name, of in sums.items()} for k in range(3))
    return Statistics(tuple(sums), grad_sum, abs_sum, sq_sum, torch.stack(l1).sum(0), torch.stack(sq_norm).sum(0))


def gram_of(gradients: Iterable[tuple[str, Tensor]]) -> Statistics:
    """⟨gᵢ, gₖ⟩ of gradients (N, *shape)."""
    names, grams = [], []
    for name, g in gradients:
        names.append(name)
        grams.append(g.flatten(1) @ g.flatten(1).T)
        del g
    return Statistics(tuple(names), gram=torch.stack(grams).sum(0))
