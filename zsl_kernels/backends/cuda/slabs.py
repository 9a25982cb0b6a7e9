"""Products of slabs: rows of gradients, one row for each example, whose inner products are the Gram (csrc/cuda/slab_gram.cuh)."""

from __future__ import annotations

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
