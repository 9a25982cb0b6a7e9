"""Sums and matrix products over many rows with bounded rounding error.

PyTorch may compute a sum as one chain of float32 additions. Its error grows with its length; a sum of ones stops at 2^24. These
functions therefore divide long sums into runs of rows and add up the sums of the runs. Sums of groups use ``embedding_bag``, which
reads rows in place, in order and without atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The longest run of rows in a group, and of positions in a matrix product, which is one chain for some shapes.
_RUN, _RUN_OF_PRODUCT = 1 << 12, 1 << 16


def long_product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute ``x @ y`` with a possibly long inner dimension."""
    if x.shape[-1] <= _RUN_OF_PRODUCT:
        return torch.matmul(x, y, out=out)
    first, *rest = zip(x.split(_RUN_OF_PRODUCT, -1), y.split(_RUN_OF_PRODUCT, -2), strict=True)
    total = torch.matmul(*first, out=out)
    part = torch.empty_like(total)  # autocast does not affect products with ``out``
    for run in rest:
        total += torch.matmul(*run, out=part)
    return total


def sum_groups(x: Tensor, order: Tensor | None, counts: Tensor) -> Tensor:
    """Sum groups of the rows of x (P, C): the first counts[0] rows in the given order, then the next counts[1], …; (groups, C)."""
    if not counts.shape[0] * x.shape[1]:  # embedding_bag does not accept empty tensors
        return x.new_empty(counts.shape[0], x.shape[1])
    if order is None:
        order = torch.arange(x.shape[0], device=x.device)
    begin = counts.cumsum(0) - counts
    # On a device, do not synchronize to find out whether all groups are short.
    if order.shape[0] > _RUN and (x.device.type != "cpu" or int(counts.max()) > _RUN):
        # Allocate the largest possible number of runs. Unused runs are empty.
        runs = (counts + (_RUN - 1)) // _RUN
        first = runs.cumsum(0) - runs
        number = torch.arange(counts.shape[0] + order.shape[0] // _RUN, device=x.device)
        group = torch.searchsorted(first, number, right=True) - 1
        places = begin[group] + torch.minimum((number - first[group]) * _RUN, counts[group])
        x = torch.nn.functional.embedding_bag(order, x, places, mode="sum")
        order, begin = number, first
    return torch.nn.functional.embedding_bag(order, x, begin, mode="sum")


def sum_by(x: Tensor, example: Tensor, num_examples: int) -> Tensor:
    """Sum the rows of x (P, C) by example, (N, C)."""
    return sum_groups(x, example.argsort(stable=True), counts_of(example, num_examples))


def counts_of(x: Tensor, number: int) -> Tensor:
    """Count how often each of 0, …, number - 1 occurs in x. (``bincount`` would synchronize to find the largest value.)"""
    return x.new_zeros(number).scatter_add_(0, x, torch.ones_like(x))
