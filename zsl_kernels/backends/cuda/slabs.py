"""Products of slabs: rows of gradients, one row for each example, whose inner products are the Gram (csrc/cuda/slab_gram.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from zsl_kernels.backends.cuda.module import compiled, pointer, stream
from zsl_kernels.backends.cuda.partials import Partials, add_up

UNIT = 512  # the elements of a row are a multiple of it
_ELEMENTS_OF_BLOCK = 4096  # of a slab's row, at least
_GROUP = 32  # rows of either slab that a block multiplies


def product_blocks(sms: int, N: int, M: int | None, elements: int) -> int:
    """Blocks among which the elements of N rows and M others, or of N rows alone, are divided.

    As many as fill the device. Each leaves partial results for the pairs of one group of rows with another, so what they leave is
    bounded, however many rows there are.
    """
    groups = -(-N // _GROUP)
    pairs = groups * (groups + 1) // 2 if M is None else groups * -(-M // _GROUP)
    return max(1, min(-(-2 * sms // max(pairs, 1)), elements // _ELEMENTS_OF_BLOCK))


class SlabGram:
    """The Gram of gradients that come slab by slab: x xᵀ, or x yᵀ of two sets. One launch for each slab, and one for the result."""

    def __init__(self, like: Tensor, sms: int, N: int, M: int | None, elements: int):
        """Of slabs with at most so many elements in a row."""
        self._blocks = product_blocks(sms, N, M, elements)
        self._partials = like.new_empty(self._blocks, N, N if M is None else M, dtype=torch.float64)
        self._symmetric, self._began = M is None, False

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Of one set only what is on and above the diagonal need be computed."""
        N, M, partials = x.shape[0], (x if y is None else y).shape[0], self._partials.data_ptr()
        bfloat16 = x.dtype == torch.bfloat16
        compiled().slab_gram(x.data_ptr(), pointer(y), bfloat16, N, M, x.shape[1], partials, self._began, self._blocks, stream(x))
        self._began = True

    def result(self) -> Tensor:
        found = self._partials.new_empty(self._partials.shape[1:], dtype=torch.float32)
        add_up(Partials(self._partials, [found], self._symmetric))
        return found
