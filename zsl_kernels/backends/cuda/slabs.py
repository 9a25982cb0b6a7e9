"""Gram matrices of slabs (csrc/cuda/slab_gram.cuh).

A slab contains some coordinates of the gradients, one row for each example. The Gram matrix is the sum over slabs of the inner
products of their rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsl_kernels.backends.cuda.module import compiled, pointer, stream
from zsl_kernels.backends.cuda.partials import Partials, add_up

UNIT = 512  # the number of elements of a row is a multiple of this
_ELEMENTS_OF_BLOCK = 4096  # the fewest elements of a row per block
_GROUP = 32  # rows of each slab that a block multiplies


def product_blocks(sms: int, N: int, M: int | None, elements: int) -> int:
    """Return the number of blocks that divide the elements of N rows, or of N rows and M others.

    There are enough blocks to fill the device. Each writes partial results for one pair of groups of rows, so the total size of the
    partial results is bounded for any number of rows.
    """
    groups = -(-N // _GROUP)
    pairs = groups * (groups + 1) // 2 if M is None else groups * -(-M // _GROUP)
    return max(1, min(-(-2 * sms // max(pairs, 1)), elements // _ELEMENTS_OF_BLOCK))


class SlabGram:
    """Accumulates the Gram matrix of slabs: x xᵀ, or x yᵀ for two sets. It uses one launch per slab and one for the result."""

    def __init__(self, like: Tensor, sms: int, N: int, M: int | None, elements: int):
        """``elements``: the largest number of elements in a row of a slab."""
        self._blocks = product_blocks(sms, N, M, elements)
        self._partials = like.new_empty(self._blocks, N, N if M is None else M, dtype=torch.float64)
        self._symmetric, self._began = M is None, False

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add a slab. For a single set, only the part on and above the diagonal is computed."""
        N, M, partials = x.shape[0], (x if y is None else y).shape[0], self._partials.data_ptr()
        bfloat16 = x.dtype == torch.bfloat16
        compiled().slab_gram(x.data_ptr(), pointer(y), bfloat16, N, M, x.shape[1], partials, self._began, self._blocks, stream(x))
        self._began = True

    def result(self) -> Tensor:
        found = self._partials.new_empty(self._partials.shape[1:], dtype=torch.float32)
        add_up(Partials(self._partials, [found], self._symmetric))
        return found
