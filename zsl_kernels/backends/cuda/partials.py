"""What the blocks of a launch have left is added up by one more launch, in order (csrc/cuda/add_partials.cuh)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from zsl_kernels.backends.cuda.module import compiled, guard, stream


class Partials(NamedTuple):
    """``torch.stack(results) = parts.sum(0)``, with float32 results."""

    parts: Tensor  # (parts, …) float64: the numbers of the results, one result after another
    results: Sequence[Tensor]  # of one shape
    symmetric: bool = False  # one square result, of which only what is on and above the diagonal was computed


def add_up(*partials: Partials) -> None:
    """Of at most three, in one launch."""
    adding = []
    for parts, results, symmetric in partials:
        count, width, each = parts.shape[0], parts[0].numel(), results[0].numel()
        side = results[0].shape[0] if symmetric else 0
        adding.append((parts.data_ptr(), True, count, width, each, [x.data_ptr() for x in results], side))
    like = partials[0].parts
    with guard(like):
        compiled().add_partials(adding, stream(like))
