"""What the passes of :mod:`zerosum.tokens.passes` hold, and how they hold less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Coordinates of a weight that are looked at together, where that takes temporaries of higher precision.
SLICE = 2**17


# Tensors of the largest activation's size, for each token of a chunk, that a vectorized backward pass holds at once.
HELD = 5
# The same for an ordinary pass over a sequence, beyond what its forward pass keeps.
HELD_BY_A_PASS = 4
# The same of a tied weight's uses in the tail, for each token of a chunk.
HELD_OF_USES = 3
# Tensors of a weight's shape that are held while its sums are added to the results.
HELD_OF_A_WEIGHT = 5


class SavedTensors:
    """Counts the bytes that a forward pass keeps for its backward pass, the model's own left out.

    Attributes:
        total: of all tensors, each counted once.
        largest: of the largest.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = self.largest = 0
        self._seen = {_storage(x) for x in (*model.parameters(), *model.buffers())}

    def watch(self) -> AbstractContextManager[None]:
        """In which a forward pass is counted."""
        return saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        if (storage := _storage(x)) not in self._seen:
            self._seen.add(storage)
            size = x.numel() * x.element_size()
            self.total += max(size, x.untyped_storage().nbytes())
            self.largest = max(self.largest, size)
        # A result that its own node keeps would, by its node, keep itself for ever.
        return x.detach()


class Budget:
    """Divides bytes among what :func:`zerosum.token_report` holds beside the model and the sums.

    ``forward`` is what the forward pass of a chunk keeps, ``weight`` the size of the largest weight's sum.
    """

    def __init__(self, memory: int, forward: SavedTensors, weight: int) -> None:
        self._memory = memory
        self._weight = HELD_OF_A_WEIGHT * weight
        self._forward = forward.total
        self._token = HELD * forward.largest
        self._sequence = self._kept = 0

    def note_pass(self, saved: SavedTensors, rows: int, uses: int, positions: int) -> None:
        """Learns what one sequence takes: what its pass keeps, the bytes of its rows at the cut and of the tied weights' uses."""
        self._sequence = saved.total + HELD_BY_A_PASS * saved.largest + rows + uses
        self._forward += uses
        self._token += HELD_OF_USES * (uses // positions)

    def keep(self, size: int) -> None:
        """Sets bytes aside.

        Raises:
            ValueError: too little is left for one sequence or one token.
        """
        self._kept = size
        fixed = size + self._weight
        least = fixed + max(self._sequence, self._forward + self._token)
        if least > self._memory:
            raise ValueError(
                f"memory: expected at least {least} bytes, got {self._memory}: {fixed} throughout, and {self._sequence} for one "
                f"sequence's losses or {self._forward} and {self._token} for each token that goes back"
            )

    def sequences(self) -> int:
        """How many fit into one ordinary pass."""
        return (self._memory - self._weight - self._kept) // max(self._sequence, 1)

    def tokens(self) -> int:
        """How many of a sequence can go back at once."""
        return (self._memory - self._weight - self._kept - self._forward) // max(self._token, 1)


def size_of(*tensors: Tensor) -> int:
    """Their bytes, each memory counted once."""
    return sum({_storage(x): x.numel() * x.element_size() for x in tensors}.values())


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def placeholder(like: Tensor) -> Tensor:
    """Zeros of this shape that take no memory: for autograd to return where a gradient has been dealt with."""
    return like.new_zeros(()).expand(like.shape)


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Weights of one shape, some of their coordinates at a time, in float64."""
    flat = [x.reshape(-1) for x in tensors]
    for parts in zip(*(x.split(SLICE) for x in flat), strict=True):
        yield tuple(part.double() for part in parts)


def distance(x: Tensor, y: Tensor | None = None) -> float:
    """‖x − y‖, or ‖x‖, in float64, without a copy of them in float64."""
    pairs = slices(x) if y is None else slices(x, y)
    parts = [(part - rest[0] if rest else part).square().sum() for part, *rest in pairs]
    return float(torch.stack(parts).sum().sqrt()) if parts else 0.0
