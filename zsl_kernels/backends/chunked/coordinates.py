"""coordinate_sums in plain PyTorch, one block of coordinates at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Coordinates per block: the temporaries stay in the cache.
_COORDINATES = 1 << 16


def _coordinate_sums(grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, direction: Tensor | None) -> Tensor:
    total = grad_sum.new_zeros(8, dtype=torch.float64)
    given = () if direction is None else (direction.to(grad_sum.dtype).reshape(-1),)
    slices = [x.reshape(-1).split(_COORDINATES) for x in (grad_sum, abs_sum, sq_sum, *given)]
    for grad, size, sq, *u in zip(*slices, strict=True):
        touched = size != 0
        safe = torch.where(touched, size, 1)
        root, grad_abs = sq.sqrt(), grad.abs()
        parts = [touched, grad_abs / safe, root / safe, grad.square(), sq]
        if u:
            step = u[0].abs()
            parts += [grad_abs * step, size * step, root * step]
        total[: len(parts)] += torch.stack([part.sum(dtype=torch.float64) for part in parts])
    return total


def coordinate_sums_of_many(
    grad_sums: Sequence[Tensor], abs_sums: Sequence[Tensor], sq_sums: Sequence[Tensor], directions: Sequence[Tensor | None]
) -> Tensor:
    """Return (weights, 8). ``directions`` is empty or has a tensor or None for each weight."""
    given = directions or [None] * len(grad_sums)
    return torch.stack([_coordinate_sums(*tensors) for tensors in zip(grad_sums, abs_sums, sq_sums, given, strict=True)])
