"""Sums over many rows. Those of groups are ``embedding_bag``'s, which reads rows where they are, in order and without atomics.

PyTorch may form a sum as one chain of float32 additions, which errs by its length and stands still at 2^24 ones. A long one is
therefore a sum of sums over runs of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a group in a chain, and positions in a product, which is one chain for some shapes.
_RUN, _RUN_OF_PRODUCT = 1 << 12, 1 << 16


def long_product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """``x @ y``, whose inner dimension may be long."""
    if x.shape[-1] <= _RUN_OF_PRODUCT:
        return torch.matmul(x, y, out=out)
    first, *rest = zip(x.split(_RUN_OF_PRODUCT, -1), y.split(_RUN_OF_PRODUCT, -2), strict=True)
    total = torch.matmul(*first, out=out)
    part = torch.empty_like(total)  # for autocast leaves products with ``out`` alone
    for run in rest:
        total += torch.matmul(*run, out=part)
    return total


def sum_groups(x: Tensor, order: Tensor | None, counts: Tensor) -> Tensor:
    """x (P, C), of which the first counts[0] rows (in that order) are added to the first result, and so on: (groups, C)."""
    if not counts.shape[0] * x.shape[1]:  # embedding_bag refuses them
        return x.new_empty(counts.shape[0], x.shape[1])
    if order is None:
        order = torch.arange(x.shape[0], device=x.device)
    begin = counts.cumsum(0) - counts
    # A device is not waited for, to learn that all groups are short.
    if order.shape[0] > _RUN and (x.device.type != "cpu" or int(counts.max()) > _RUN):
        # The runs of each group, and room for as many as there can be: those behind the last are empty.
        runs = (counts + (_RUN - 1)) // _RUN
        first = runs.cumsum(0) - runs
        number = torch.arange(counts.shape[0] + order.shape[0] // _RUN, device=x.device)
        group = torch.searchsorted(first, number, right=True) - 1
        places = begin[group] + torch.minimum((number - first[group]) * _RUN, counts[group])
        x = torch.nn.functional.embedding_bag(order, x, places, mode="sum")
        order, begin = number, first
    return torch.nn.functional.embedding_bag(order, x, begin, mode="sum")


def sum_by(x: Tensor, example: Tensor, num_examples: int) -> Tensor:
    """Rows of x (P, C) added up by their example: (N, C)."""
    return sum_groups(x, example.argsort(stable=True), counts_of(example, num_examples))


def counts_of(x: Tensor, number: int) -> Tensor:
    """How often each of 0, …, number - 1 is in x. (``bincount`` waits for a device to know the largest.)"""
    return x.new_zeros(number).scatter_add_(0, x, torch.ones_like(x))
