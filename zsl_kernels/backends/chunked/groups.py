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
    return sum_groups(x, example.argsort(stable=True), counts_of(example, num_examples))


def counts_of(x: Tensor, number: int) -> Tensor:
    """How often each of 0, …, number - 1 is in x. (``bincount`` waits for a device to know the largest.)"""
    return x.new_zeros(number).scatter_add_(0, x, torch.ones_like(x))
