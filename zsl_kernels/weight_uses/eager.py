"""Uses of weights in eager code: C++ autograd nodes (csrc/bindings/uses.cpp) for uses that a probe knows from earlier passes.

A node's backward computes a weight's gradient together with its statistics, without Python. A probe has one :class:`State`, one
:class:`Weight` for each parameter, and one ``Call`` for each known call. Without the compiled extension, the Python classes in this
file replace those of C++, and no call is known.
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
        """The sums that the only use of a weight has computed. They are converted to tensors when they are read."""

        version: int  # the version counter of the memory of grad_sum

        def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
            """The fields of :class:`zsl_kernels.InterferenceSums`."""
            raise NotImplementedError

    def coordinate_sums_of_left(weights: list[Left]) -> Tensor | None:
        """Return :func:`zsl_kernels.coordinate_sums_of_many` of these sums, or None if not all of them are on the CPU."""
        raise NotImplementedError

    @dataclass
    class State:
        """The state that all weights of a probe share."""

        epoch: int = 0  # the number of the forward phase; backward passes separate the phases
        at_once: bool = False  # whether regular uses may compute their statistics in the current backward pass
        examples: int = 0  # the number of examples of that pass
        setting: int = 0  # the precision settings of torch, if calls are recorded
        forward: bool = False  # whether the training's forward pass runs, in the epoch that its first use began
        thread: int = 0  # the thread of that forward pass
        regular: bytes = b""  # one byte per use of the epoch, in order: whether its rows are regular

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
            """Start a block. Return whether the parameter is known to have kept its memory layout since the last start."""
            self.direction, self.gram, self.merges, self.refused = direction, gram, merges, self.barred
            return False

        def take(self) -> Left | None:
            return None

        def __call__(self, grad: Tensor) -> None:
            owner = self.owner()
            if owner is not None:
                owner.on_gradient(grad)

    def only_for_weights(handler: Callable[..., Any], wanted: dict[Any, Any]) -> Callable[..., Any]:
        """Return a ``__torch_function__`` of a mode that calls ``handler`` only if necessary.

        It calls ``handler`` if the function is in ``wanted``, if an argument is in the mode's ``sources`` (a dictionary indexed by
        the ids of tensors), or if the mode has ``sees_all`` set.
        """
        return handler

    def run_known(mode: Any, function: Any, args: Any, kwargs: Any, sources: Any) -> Any:
        """Return the result of a call that the mode knows, computed without Python, or None if the call is not known."""
        return None


class NotCopied:
    """A hook that copies and pickles of its parameter do not keep."""

    def __deepcopy__(self, memo: Any) -> Any:
        return _ignore

    def __reduce__(self) -> Any:
        return _inert, ()


class Weight(NotCopied, _Weight):
    """The probe's record of one parameter. It is also the parameter's hook.

    - ``single``: every pass so far had at most one use of the parameter.
    - ``refused``: uses must not compute its statistics in this block.
    - ``barred``: the same for all blocks, as long as its memory layout does not change.
    - ``alone``: the epoch in which a use was assumed to be the only one.
    - ``gathered``: the epoch in which uses went through its gathering node.
    - ``deferred``: the epoch whose statistics are computed later.
    - ``waiting``: a use has stored sums that have not been taken yet.
    - ``merges``: earlier passes have stored sums, and autograd is about to add to their memory.
    - ``owner``: a weak reference to an object with two methods. ``on_gradient`` is called with each gradient, except those whose
      sums a use has stored. ``take_marked`` is called for the latter if they are merged.
    """


def _ignore(*args: Any) -> None:
    """Replace a hook in a copy."""


def _inert() -> Any:
    return _ignore
