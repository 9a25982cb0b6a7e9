"""Ragged rows: those that name their example by an id instead of their place.

``a`` (R, K) and ``b`` (R, O) with ``example_ids`` (R,) stand for g_i = Σ_{r: example_ids[r] = i} b_r a_rᵀ. Backends want an
example's rows side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zsl_kernels.validation import check_range


class Groups(NamedTuple):
    """Where each example's rows are."""

    begin: Tensor  # (N + 1,) int64: example i has rows [begin[i], begin[i + 1]) in this order of rows
    order: Tensor | None  # (R,) the caller's row of each, None if the caller has them in this order

    def gather(self, x: Tensor) -> Tensor:
        """The caller's rows, example by example."""
        return x if self.order is None else x.index_select(0, self.order)

    def scatter(self, x: Tensor) -> Tensor:
        """Rows example by example, in the caller's order."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)


def group(example_ids: Tensor, num_examples: int) -> Groups:
    """Groups rows by example; an example's rows keep their order."""
    check_range("example_ids", example_ids, num_examples)
    ids, order = example_ids.long().contiguous(), None
    if ids.device.type != "cpu" or bool((ids[1:] < ids[:-1]).any()):
        ids, order = ids.sort(stable=True)
    return Groups(torch.searchsorted(ids, torch.arange(num_examples + 1, device=ids.device)), order)
