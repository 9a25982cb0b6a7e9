"""The embedding's part of the gradients of a tied weight: rows (Q, K), each of one row of the weight and one example.

Backends want one row for each example and row of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsl_kernels.types import sum_dtype
from zsl_kernels.validation import check_range


class AddedRows(NamedTuple):
    """Rows added to the gradients, at most one for each example and row of the weight: the sums of an embedding's."""

    begin: Tensor  # (N + 1,) int64: example i has [begin[i], begin[i + 1])
    feature: Tensor  # (P,) int64: the weight's row of each, ascending for each example
    values: Tensor  # (P, K)
    member: Tensor  # (Q,) int64: which of the P each row of the embedding is part of, P if it is skipped

    def each_row(self, x: Tensor) -> Tensor:
        """From (P, K) to (Q, K), zero for those skipped: the derivative of the sums."""
        return F.pad(x, (0, 0, 0, 1))[self.member]

    def inside(self, slab: slice) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Which of the P lie in a slab of the weight's rows, and their places in gradients (N, rows, K) of it."""
        found = ((self.feature >= slab.start) & (self.feature < slab.stop)).nonzero().squeeze(1)
        examples = torch.searchsorted(self.begin, found, right=True) - 1
        return found, (examples, self.feature[found] - slab.start)

    def add_to(self, g: Tensor, slab: slice) -> None:
        """To gradients (N, rows, K) of a slab of the weight's rows."""
        found, places = self.inside(slab)
        g[places] += self.values[found]


class Embedding(NamedTuple):
    """An embedding's part of a tied weight's gradients, as the ops take it; negative ids are skipped."""

    ids: Tensor  # (Q,) the weight's row
    grads: Tensor  # (Q, K)
    example_ids: Tensor  # (Q,)

    def check(self, num_examples: int, num_rows: int) -> None:
        check_range("embedding: ids", self.ids, num_rows, negative=True)
        check_range("embedding: example ids", self.example_ids, num_examples)

    def added(self, num_examples: int, num_rows: int, dtype: torch.dtype) -> AddedRows:
        """Summed in the sum dtype of ``dtype``."""
        self.check(num_examples, num_rows)
        ids = self.ids.long()
        used = (ids >= 0).nonzero().squeeze(1)
        keys, order = (self.example_ids.long()[used] * num_rows + ids[used]).sort(stable=True)
        used = used[order]
        keys, group, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
        values = self.grads.to(sum_dtype(dtype))
        if keys.numel() and values.shape[1]:
            values = F.embedding_bag(used, values, counts.cumsum(0) - counts, mode="sum")
        begin = torch.searchsorted(keys, torch.arange(num_examples + 1, device=keys.device) * num_rows)
        member = torch.full_like(ids, keys.numel()).index_copy_(0, used, group)
        return AddedRows(begin, keys % max(num_rows, 1), values[: keys.numel()].contiguous(), member)
