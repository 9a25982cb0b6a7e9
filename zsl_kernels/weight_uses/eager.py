"""The uses of weights that a probe knows from earlier passes, where the compiled kernels were built (csrc/bindings/uses.cpp):
autograd nodes that compute a weight's gradient with its statistics at once, without Python.

A probe keeps one :class:`State`, one :class:`Weight` for each parameter, and one ``Call`` for each call that it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zsl_kernels.backends import cpu

Call: Any

if cpu.MISSING is None and not TYPE_CHECKING:
    from zsl_kernels._cpu import Call, Left, State, coordinate_sums_of_left, only_for_weights, run_known
    from zsl_kernels._cpu import Weight as _Weight
else:
    Call = None

    class Left:
        """What a weight's only use has left with it: the sums of its gradient, of which tensors are made when they are read."""

        version: int  # of the memory of the gradient's sum

        def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
            """The fields of :class:`zsl_kernels.InterferenceSums`."""
            raise NotImplementedError

    def coordinate_sums_of_left(weights: list[Left]) -> Tensor | None:
        """:func:`zsl_kernels.coordinate_sums_of_many` of what was left; None where it is not all on the CPU."""
        raise NotImplementedError

    @dataclass
    class State:
        """What is the same for all weights of a probe."""

        epoch: int = 0  # counts what runs forward between backward passes
        at_once: bool = False  # whether a backward pass runs whose regular uses may be computed at once
        examples: int = 0  # of that pass
        setting: int = 0  # what torch was told about products, where calls are recorded
        forward: bool = False  # whether what runs is the training's forward pass, in the epoch that its first use has begun
        thread: int = 0  # that it runs in
        regular: bytes = b""  # for each use of the epoch, in order: whether its rows are regular

    @dataclass(eq=False)
    class _Weight:
        state: State
        single: bool = False
        refused: bool = False
        barred: bool = False
        alone: int = -1
        gathered: int = -1
        deferred: int = -1
        direction: Tensor | None = None
        gram: bool = False
        waiting: bool = False
        merges: bool = False
        owner: Any = None

        def stands_alone(self) -> bool:
            return self.single and self.state.epoch not in (self.alone, self.gathered, self.deferred)

        def renew(self, like: Tensor, direction: Tensor | None, gram: bool, merges: bool) -> bool:
            """Starts a block. Returns whether the parameter is known to lie in memory as it did at the last one's start."""
            self.direction, self.gram, self.merges, self.refused = direction, gram, merges, self.barred
            return False

        def take(self) -> Left | None:
            return None

        def __call__(self, grad: Tensor) -> None:
            owner = self.owner()
            if owner is not None:
                owner.on_gradient(grad)

    def only_for_weights(handler: Callable[..., Any], wanted: dict[Any, Any]) -> Callable[..., Any]:
        """A mode's ``__torch_function__`` that asks ``handler`` only for functions that are ``wanted``, where an argument is one of
        the mode's ``sources`` (a dictionary by tensors' ids), or where the mode ``sees_all``."""
        return handler

    def run_known(mode: Any, function: Any, args: Any, kwargs: Any, sources: Any) -> Any:
        """The result of a call that the mode knows, without Python; None where it does not."""
        return None


class NotCopied:
    """A hook of which nothing is left in a copy of what it is on, or in a file."""

    def __deepcopy__(self, memo: Any) -> Any:
        return _ignore

    def __reduce__(self) -> Any:
        return _inert, ()


class Weight(NotCopied, _Weight):
    """What a probe notes of one parameter, and the parameter's hook.

    ``single``: it has had one use in a pass, and never more. ``refused``: nothing is computed of it at once; ``barred``: in no
    block, as it lies in memory. ``alone``, ``gathered`` and ``deferred``: the epoch in which one use was taken for the only one, in
    which uses went through its gathering node, and in which its statistics come late. ``waiting``: sums were left that nobody has
    taken. ``merges``: there are those of earlier passes, to whose memory autograd is about to add. ``owner``: a weak reference to
    what has ``on_gradient``, which is called with each gradient but those that a use has left, and ``take_marked``, which is called
    for these where they are merged.
    """


def _ignore(*args: Any) -> None:
    """What is left of a hook in a copy."""


def _inert() -> Any:
    return _ignore
