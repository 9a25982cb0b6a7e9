"""Sums over groups of rows by ``embedding_bag``: it reads the rows where they are, in order, and adds without atomics."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_groups(x: Tensor, order: Tensor | None, counts: Tensor) -> Tensor:
    """x (P, C), of which the first counts[0] rows (in that order) are added to the first result, and so on: (groups, C)."""
    if not counts.shape[0] * x.shape[1]:  # embedding_bag refuses them
        return x.new_empty(counts.shape[0], x.shape[1])
    if order is None:
        order = torch.arange(x.shape[0], device=x.device)
    return torch.nn.functional.embedding_bag(order, x, counts.cumsum(0) - counts, mode="sum")


def sum_by(x: Tensor, example: Tensor, num_examples: int) -> Tensor:
    """Rows of x (P, C) added up by their example: (N, C)."""
    return sum_groups(x, example.argsort(stable=True), torch.bincount(example, minlength=num_examples))
