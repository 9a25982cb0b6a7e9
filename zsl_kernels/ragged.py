"""Ragged rows: sort rows by their example ids, and undo the sorting.

``a`` (R, K) and ``b`` (R, O) with ``example_ids`` (R,) define g_i = Σ_{r: example_ids[r] = i} b_r a_rᵀ. Backends need an example's
rows to be adjacent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zsl_kernels.validation import check_range


class Groups(NamedTuple):
    """The rows of each example, in sorted order."""

    begin: Tensor  # (N + 1,) int64: example i has the sorted rows [begin[i], begin[i + 1])
    order: Tensor | None  # (R,) the original index of each sorted row; None if the rows already were sorted

    def gather(self, x: Tensor) -> Tensor:
        """Sort the rows of ``x`` by example."""
        return x if self.order is None else x.index_select(0, self.order)

    def scatter(self, x: Tensor) -> Tensor:
        """Return sorted rows to their original order."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)


def group(example_ids: Tensor, num_examples: int) -> Groups:
    """Group rows by example. The rows of an example keep their order."""
    check_range("example_ids", example_ids, num_examples)
    ids, order = example_ids.long().contiguous(), None
    if ids.device.type != "cpu" or bool((ids[1:] < ids[:-1]).any()):
        ids, order = ids.sort(stable=True)
    return Groups(torch.searchsorted(ids, torch.arange(num_examples + 1, device=ids.device)), order)
