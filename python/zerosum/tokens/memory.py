"""Counts and limits the memory of the passes of :mod:`zerosum.tokens.passes`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Coordinates of a weight per slice, for work that needs temporaries of higher precision.
SLICE = 2**17


# Tensors of the largest activation's size that a vectorized backward pass holds at once, for each token of a chunk.
HELD = 5
# Such tensors of an ordinary pass over a sequence, beyond what its forward pass keeps.
HELD_BY_A_PASS = 4
# Tensors of the size of a tied weight's uses in the tail that are held for each token of a chunk.
HELD_OF_USES = 3
# Tensors of a weight's shape that are held while its sums are added to the results.
HELD_OF_A_WEIGHT = 5


class SavedTensors:
    """Counts the bytes that a forward pass keeps for its backward pass, without the model's own tensors.

    Attributes:
        total: the bytes of all tensors, each counted once.
        largest: the bytes of the largest tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = self.largest = 0
        self._seen = {_storage(x) for x in (*model.parameters(), *model.buffers())}

    def watch(self) -> AbstractContextManager[None]:
        """Count a forward pass that runs in this context."""
        return saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        if (storage := _storage(x)) not in self._seen:
            self._seen.add(storage)
            size = x.numel() * x.element_size()
            self.total += max(size, x.untyped_storage().nbytes())
            self.largest = max(self.largest, size)
        # Detach it: a result that its own node keeps would keep itself alive through that node.
        return x.detach()


class Budget:
    """Divides a number of bytes among what :func:`zerosum.token_report` holds in addition to the model and the sums.

    ``forward`` is what the forward pass of a chunk keeps, and ``weight`` the size of the largest weight's sum.
    """

    def __init__(self, memory: int, forward: SavedTensors, weight: int) -> None:
        self._memory = memory
        self._weight = HELD_OF_A_WEIGHT * weight
        self._forward = forward.total
        self._token = HELD * forward.largest
        self._sequence = self._kept = 0

    def note_pass(self, saved: SavedTensors, rows: int, uses: int, positions: int) -> None:
        """Learn what one sequence needs: what its pass keeps, and the bytes of its rows at the cut and of the tied weights'
        uses."""
        self._sequence = saved.total + HELD_BY_A_PASS * saved.largest + rows + uses
        self._forward += uses
        self._token += HELD_OF_USES * (uses // positions)

    def keep(self, size: int) -> None:
        """Reserve bytes for the whole run.

        Raises:
            ValueError: too little is left for one sequence or one token.
        """
        self._kept = size
        fixed = size + self._weight
        least = fixed + max(self._sequence, self._forward + self._token)
        if least > self._memory:
            raise ValueError(
                f"memory: expected at least {least} bytes, got {self._memory}: {fixed} for the whole run, and either "
                f"{self._sequence} for one sequence's losses or {self._forward} + {self._token} for the backward pass of each token"
            )

    def sequences(self) -> int:
        """Return how many sequences fit into one ordinary pass."""
        return (self._memory - self._weight - self._kept) // max(self._sequence, 1)

    def tokens(self) -> int:
        """Return how many tokens of a sequence one vectorized backward pass can take."""
        return (self._memory - self._weight - self._kept - self._forward) // max(self._token, 1)


def size_of(*tensors: Tensor) -> int:
    """Return the bytes of the tensors, with shared memory counted once."""
    return sum({_storage(x): x.numel() * x.element_size() for x in tensors}.values())


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def placeholder(like: Tensor) -> Tensor:
    """Return zeros of this shape that take no memory, for autograd to return in place of a gradient that was already consumed."""
    return like.new_zeros(()).expand(like.shape)


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield slices of tensors of one shape, in float64."""
    flat = [x.reshape(-1) for x in tensors]
    for parts in zip(*(x.split(SLICE) for x in flat), strict=True):
        yield tuple(part.double() for part in parts)


def distance(x: Tensor, y: Tensor | None = None) -> float:
    """Compute ‖x − y‖, or ‖x‖, in float64, without a float64 copy of the tensors."""
    pairs = slices(x) if y is None else slices(x, y)
    parts = [(part - rest[0] if rest else part).square().sum() for part, *rest in pairs]
    return float(torch.stack(parts).sum().sqrt()) if parts else 0.0
