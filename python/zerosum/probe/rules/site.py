"""Describes one use of weights: the state with which a rule's backward pass stores the weights' gradient contributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from zerosum.probe.contributions import Contribution
from zerosum.probe.layout import Layout, Uncovered
from zerosum.probe.parameters import GradSource, Ref
from zerosum.probe.results import Pass
from zsl_kernels.weight_uses.eager import State


class Phase(Enum):
    """The purpose of the running backward pass."""

    PLAIN = "the gradients that autograd computes without a probe"
    NAMING = "rows' gradients under other weights of the losses"
    MEASURING = "gradients and statistics"


Rows = Callable[[Tensor], Tensor]


def _same(grad: Tensor) -> Tensor:
    return grad


def elements(grad: Tensor) -> Tensor:
    """Make each number a row of its own."""
    return grad.unsqueeze(-1)


class RuleContext(Protocol):
    """The part of the capture that rules need."""

    phase: Phase
    anchor: Tensor  # an operand of every use; a backward pass to it reaches all uses
    state: State
    inseparable: str  # the reason why calls cannot be differentiated again for each example; empty if they can
    poison: str  # the reason why later rows of this backward pass may mix several examples; empty if they cannot
    traced: int  # number of uses in this epoch that ran in compiled code
    copies: bool  # whether the backward pass writes to gradients in place

    @property
    def epoch(self) -> int:
        """The number of the current epoch, which is what runs forward between two backward passes."""

    @property
    def current(self) -> Pass | None:
        """The backward pass that is being measured, if any."""

    @property
    def running(self) -> bool:
        """Whether a backward pass is running."""

    @property
    def nested(self) -> bool:
        """Whether this backward pass runs inside another one."""

    @property
    def elsewhere(self) -> bool:
        """Whether this thread is not the probe's thread."""

    def unbatched(self) -> AbstractContextManager[Any]:
        """Return a context in which to compute the results of a backward pass."""

    def silenced(self, phase: Phase) -> AbstractContextManager[None]:
        """Return a context in which the probe runs a backward pass of its own."""

    def watching(self) -> AbstractContextManager[None]:
        """Return a context in which the probe sees operations."""

    def ref(self, x: object) -> Ref | None:
        """Return the weight that ``x`` is or is a view of; None if it is neither."""

    def sign(self, site: Site, rows: Tensor) -> None:
        """Receive the gradient (*lead, F) of a use's rows while the rows are named."""

    def enter(self, site: Site) -> None:
        """Register a new use."""


class Site:
    """One use of weights: which weights it uses, and which example each row of its result belongs to.

    Some of the weights may not belong to the probe; their entry in ``refs`` is None. ``layout`` is known by the time gradients are
    measured. ``label`` names the use in messages.
    """

    __slots__ = ("alone", "ambiguous", "context", "known", "label", "layout", "lead", "problem", "refs", "rows_of")

    def __init__(
        self, context: RuleContext, label: str, refs: Sequence[Ref | None], lead: Sequence[int], rows_of: Rows | None = None
    ) -> None:
        self.context = context
        self.refs = refs
        self.label = label
        self.lead = lead  # the dimensions of the rows
        self.rows_of = rows_of or _same  # turns a gradient of the result into rows (*lead, F)
        self.layout: Layout | None = None
        self.problem = ""
        self.alone = 0  # bit k is set if this is the k-th weight's only use, which then yields its gradient
        self.ambiguous: Any = None  # the call, if it is unknown whether its other operands depend on data
        self.known: Any = None  # the call, if it is like one of an earlier pass
        context.enter(self)

    @classmethod
    def of(
        cls,
        context: RuleContext,
        how: str,
        lead: Sequence[int],
        *weights: Tensor | None,
        rows_of: Rows | None = None,
        alone: bool = True,
    ) -> tuple[Site, list[Tensor | None]]:
        """Create the site of a call that covers a weight and optionally a bias. Also return the call's replacement tensors.

        With ``alone=False`` the rule stores pieces of the weight, which the weight's gathering node puts together.
        """
        refs: list[Ref | None] = []
        site = cls(context, how, refs, lead, rows_of)
        tensors: list[Tensor | None] = []
        for k, weight in enumerate(weights):
            ref = None if weight is None else context.ref(weight)
            refs.append(ref)
            if ref is None:
                tensors.append(weight)
                continue
            ref.covered_by(f"{how} bias" if k else how)
            if alone and ref.source.stands_alone(ref.piece):
                site.alone |= 1 << k
                tensors.append(weight)
            else:
                tensors.append(ref.tensor())
        return site, tensors

    @property
    def sources(self) -> list[GradSource]:
        return [ref.source for ref in self.refs if ref is not None]

    @property
    def alone_weights(self) -> list[Tensor]:
        """The weights that have no other use. These are themselves in the graph."""
        return [ref.source.tensor for k, ref in enumerate(self.refs) if ref is not None and self.alone >> k & 1]

    def named(self, grad: Tensor) -> bool:
        """Whether this backward pass names rows.

        If so, pass on the result's gradient; only the gradient of the activations is needed then.
        """
        if self.context.phase is not Phase.NAMING:
            return False
        self.context.sign(self, self.rows_of(grad))
        return True

    def ref(self, k: int = 0) -> Ref | None:
        """Return the k-th weight if its statistics are wanted, else None."""
        ref = self.refs[k]
        if ref is None:
            return None
        if self.context.phase is not Phase.MEASURING or ref.source.refused:
            if self.context.elsewhere:
                ref.source.refuse("its backward pass ran in another thread, which the probe does not see")
            return None
        if self.layout is None or self.context.poison:
            ref.source.refuse(self.problem or self.context.poison or f"used by {self.label} where no loss was seen to lead before")
            return None
        return ref

    def plain(self, k: int = 0) -> bool:
        """Whether autograd needs the k-th weight's gradient.

        It does if the weight does not belong to the probe, or if the gradient is to be differentiated.
        """
        return self.ref(k) is None or torch.is_grad_enabled()

    def at_once(self, k: int = 0, *, product: bool = False) -> GradSource | None:
        """Return the k-th weight if this is its only use and its gradient may be computed now; else None.

        With ``product``, the rows must also be ordered by example.
        """
        layout, context = self.layout, self.context
        if layout is None or not self.alone >> k & 1 or context.phase is not Phase.MEASURING:
            return None
        if (product and not layout.plain) or context.poison or torch.is_grad_enabled():
            return None
        ref = self.refs[k]
        assert ref is not None
        return ref.source if ref.source.ready else None

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Arrange the rows of ``x`` as (E, T, F), in ``dtype``."""
        assert self.layout is not None
        return self.layout.rows(x if x.dtype == dtype else x.to(dtype))

    def leave(self, contribution: Callable[[Layout], Contribution], k: int = 0) -> Tensor | None:
        """Store the contribution with the k-th weight. Return the weight's gradient if this is its only use, else None."""
        if (ref := self.ref(k)) is None:
            return None
        assert self.layout is not None
        left = contribution(self.layout)
        if self.alone >> k & 1 and not torch.is_grad_enabled():
            with torch.no_grad(), self.context.unbatched():
                return ref.source.gradient_of(left)
        ref.leave(left)
        return None


__all__ = ["Phase", "RuleContext", "Site", "Uncovered"]
