"""The embedding's part of the gradients of a tied weight: rows (Q, K), each of one row of the weight and one example.

Backends want one row for each example and row of the weight.
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
    """Rows added to the gradients, at most one for each example and row of the weight: the sums of an embedding's.

    There is room for one for each row of the embedding. What is behind ``begin[N]`` is of no example and no row, and any value.
    """

    begin: Tensor  # (N + 1,) int64: example i has [begin[i], begin[i + 1])
    feature: Tensor  # (Q,) int64: the weight's row of each, ascending for each example; the number of rows behind the last
    values: Tensor  # (Q, K)
    member: Tensor  # (Q,) int64: which of them each row of the embedding is part of, Q if it is skipped

    def keys(self, num_rows: int) -> Tensor:
        """(Q,) ascending: example · num_rows + row of each."""
        places = torch.arange(self.feature.shape[0], device=self.feature.device)
        return (torch.searchsorted(self.begin, places, right=True) - 1) * num_rows + self.feature

    def each_row(self, x: Tensor) -> Tensor:
        """For each row of the embedding that of its sum, zero where it is skipped: the derivative of the sums."""
        return F.pad(x, (0, 0, 0, 1))[self.member]

    def inside(self, slab: slice) -> tuple[Tensor, Tensor]:
        """Which of them lie in a slab of the weight's rows, (Q, 1), and their places in gradients (N · rows, K) of it; the first
        place for those that do not. Nothing waits for a device."""
        numbers = torch.arange(self.feature.shape[0], device=self.feature.device)
        inside = (numbers < self.begin[-1]) & (self.feature >= slab.start) & (self.feature < slab.stop)
        examples = torch.searchsorted(self.begin, numbers, right=True) - 1
        return inside[:, None], torch.where(inside, examples * (slab.stop - slab.start) + self.feature - slab.start, 0)

    def add_to(self, g: Tensor, slab: slice) -> None:
        """To gradients (N, rows, K) of a slab of the weight's rows."""
        inside, places = self.inside(slab)
        # Each place but the first comes once, and zeros that are added there change no sum.
        if g.shape[0]:
            g.flatten(0, 1).index_add_(0, places, torch.where(inside, self.values, 0))


class Embedding(NamedTuple):
    """An embedding's part of a tied weight's gradients, as the ops take it; negative ids are skipped."""

    ids: Tensor  # (Q,) the weight's row
    grads: Tensor  # (Q, K)
    example_ids: Tensor  # (Q,)

    def check(self, num_examples: int, num_rows: int) -> None:
        check_range("embedding: ids", self.ids, num_rows, negative=True)
        check_range("embedding: example ids", self.example_ids, num_examples)

    def added(self, num_examples: int, num_rows: int, dtype: torch.dtype) -> AddedRows:
        """Summed in the sum dtype of ``dtype``. Sizes follow from shapes: nothing waits for a device."""
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
