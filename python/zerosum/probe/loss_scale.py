"""Checks and applies an explicit ``loss_reduction``: what each example's loss was divided by before the losses were added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """A loss Σ_i ℓ_i / d_i times ``factor``, with the denominators d_i that ``reduction`` implies."""

    reduction: str | float | Tensor
    factor: float = 1.0

    @property
    def uneven(self) -> Tensor | None:
        """The denominators, if they differ."""
        d = self.reduction
        return d if isinstance(d, Tensor) and d.numel() > 1 and bool((d != d.flatten()[0]).any()) else None

    @property
    def shown(self) -> str:
        return (
            repr(self.reduction) if isinstance(self.reduction, str) else f"{float(torch.as_tensor(self.reduction).flatten()[0]):g}"
        )

    def scale(self, examples: int) -> float:
        """Return the scale with g_i = scale · the gradient of what was differentiated, apart from :meth:`scales`."""
        d = self.reduction
        if isinstance(d, str):
            return (examples if d == "mean" else 1) / self.factor
        if isinstance(d, Tensor):
            d = 1.0 if self.uneven is not None else float(d.flatten()[0])
        return d / self.factor

    def scales(self, first: int, examples: int) -> Tensor | None:
        """Return the denominators of these examples, if they differ."""
        d = self.uneven
        if d is not None and first + examples > len(d):
            self.check(first + examples)
        return None if d is None else d[first : first + examples]

    def check(self, examples: int) -> None:
        """Raise an error unless there is one denominator for each example."""
        d = self.reduction
        if isinstance(d, Tensor) and d.ndim and len(d) != examples:
            raise ValueError(
                f"loss_reduction: expected one denominator for each of {examples} examples, got shape {tuple(d.shape)}"
            )


def check_shape(argument: str, value: Any, like: Tensor) -> None:
    """Raise an error unless ``value`` is a tensor of the shape of ``like``."""
    if not isinstance(value, Tensor) or value.shape != like.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{argument}: expected a tensor of shape {tuple(like.shape)}, got {got}")


def check_loss_reduction(d: Any) -> None:
    """Raise an error unless ``d`` is a valid reduction."""
    if isinstance(d, str):
        if d in ("auto", "sum", "mean"):
            return
    elif isinstance(d, Tensor):
        if d.ndim <= 1 and d.numel() and not d.is_complex() and d.dtype != torch.bool and bool((d > 0).all()):
            return
        d = f"a tensor of shape {tuple(d.shape)}" + (" that is not all positive" if d.ndim <= 1 else "")
    elif isinstance(d, (int, float)) and not isinstance(d, bool) and d > 0:
        return
    raise ValueError(
        f"loss_reduction: expected 'auto', 'sum', 'mean', or positive denominators as a number or a tensor (N,), got {d!r}"
    )
