"""Adds up the partial results of the blocks of a launch with one more launch, in a fixed order (csrc/cuda/add_partials.cuh)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from zsl_kernels.backends.cuda.module import compiled, guard, stream


class Partials(NamedTuple):
    """``torch.stack(results) = parts.sum(0)``, with float32 results."""

    parts: Tensor  # (parts, …) float64: the elements of all results, concatenated
    results: Sequence[Tensor]  # all of the same shape
    symmetric: bool = False  # whether it is one square result, computed only on and above the diagonal


def add_up(*partials: Partials) -> None:
    """Add up at most three sets of partial results in one launch."""
    adding = []
    for parts, results, symmetric in partials:
        count, width, each = parts.shape[0], parts[0].numel(), results[0].numel()
        side = results[0].shape[0] if symmetric else 0
        adding.append((parts.data_ptr(), True, count, width, each, [x.data_ptr() for x in results], side))
    like = partials[0].parts
    with guard(like):
        compiled().add_partials(adding, stream(like))
