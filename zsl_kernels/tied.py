"""Tied weights: the part of the per-example gradients that comes from an embedding with the same weight.

It is a list of Q lookups. Each belongs to one example and one row of the weight and has a gradient of K entries. Backends need the
lookups to be summed, so that each pair of an example and a row occurs once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsl_kernels.backends.chunked.groups import sum_groups
from zsl_kernels.types import sum_dtype
from zsl_kernels.validation import check_range


class AddedRows(NamedTuple):
    """Rows to add to the gradients: the sums of an embedding's lookups, at most one for each pair of an example and a weight row.

    The tensors have room for one row per lookup. Entries from ``begin[N]`` on are unused and have arbitrary values.
    """

    begin: Tensor  # (N + 1,) int64: example i has the rows [begin[i], begin[i + 1])
    feature: Tensor  # (Q,) int64: the weight row of each, ascending within an example; unused entries are num_rows
    values: Tensor  # (Q, K)
    member: Tensor  # (Q,) int64: the index of the sum that each lookup belongs to, or Q if the lookup is skipped

    def keys(self, num_rows: int) -> Tensor:
        """Return example · num_rows + row for each, (Q,), ascending."""
        places = torch.arange(self.feature.shape[0], device=self.feature.device)
        return (torch.searchsorted(self.begin, places, right=True) - 1) * num_rows + self.feature

    def each_row(self, x: Tensor) -> Tensor:
        """Return for each lookup the row of ``x`` (Q, K) of its sum, or zero if it is skipped: the derivative of the sum."""
        return F.pad(x, (0, 0, 0, 1))[self.member]

    def inside(self, slab: slice) -> tuple[Tensor, Tensor]:
        """Return which rows lie in a slab of the weight, (Q, 1), and their indices in the slab's gradients (N · rows, K).

        The index is 0 for rows outside of the slab. The method does not synchronize with the device.
        """
        numbers = torch.arange(self.feature.shape[0], device=self.feature.device)
        inside = (numbers < self.begin[-1]) & (self.feature >= slab.start) & (self.feature < slab.stop)
        examples = torch.searchsorted(self.begin, numbers, right=True) - 1
        return inside[:, None], torch.where(inside, examples * (slab.stop - slab.start) + self.feature - slab.start, 0)

    def add_to(self, g: Tensor, slab: slice) -> None:
        """Add the rows to the gradients (N, rows, K) of a slab of the weight."""
        inside, places = self.inside(slab)
        # Every index except 0 occurs at most once, and index 0 otherwise receives zeros, so the order of additions does not matter.
        if g.shape[0]:
            g.flatten(0, 1).index_add_(0, places, torch.where(inside, self.values, 0))


class Embedding(NamedTuple):
    """The lookups of an embedding with a tied weight, flattened as the ops take them. Negative ids are skipped."""

    ids: Tensor  # (Q,) the weight row of each lookup
    grads: Tensor  # (Q, K)
    example_ids: Tensor  # (Q,)

    def check(self, num_examples: int, num_rows: int) -> None:
        check_range("embedding: ids", self.ids, num_rows, negative=True)
        check_range("embedding: example ids", self.example_ids, num_examples)

    def added(self, num_examples: int, num_rows: int, dtype: torch.dtype) -> AddedRows:
        """Sum the lookups in the sum dtype of ``dtype``. All sizes follow from shapes, so this does not synchronize."""
        self.check(num_examples, num_rows)
        Q, none = self.ids.shape[0], num_examples * num_rows
        ids = self.ids.long()
        keys, order = torch.where(ids < 0, none, self.example_ids.long() * num_rows + ids).sort(stable=True)
        group = F.pad(keys.diff() != 0, (1, 0)).cumsum(0)[:Q]
        counts = group.new_zeros(Q).scatter_add_(0, group, torch.ones_like(group))
        sums = keys.new_full((Q,), none).scatter_(0, group, keys)
        values = self.grads.to(sum_dtype(dtype))
        if Q and values.shape[1]:
            values = sum_groups(values, order, counts)
        begin = torch.searchsorted(sums, torch.arange(num_examples + 1, device=keys.device) * num_rows)
        feature = torch.where(sums == none, num_rows, sums % max(num_rows, 1))
        member = torch.empty_like(order).scatter_(0, order, torch.where(keys == none, Q, group))
        return AddedRows(begin, feature, values.contiguous(), member)
