"""One use of weights: what a rule's backward pass needs to leave its weights' parts of the gradient with them."""

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
    """What the backward pass that runs is for."""

    PLAIN = "the gradients that autograd computes without a probe"
    NAMING = "rows' gradients under other weights of the losses"
    MEASURING = "gradients and statistics"


Rows = Callable[[Tensor], Tensor]


def _same(grad: Tensor) -> Tensor:
    return grad


def elements(grad: Tensor) -> Tensor:
    """Each number as a row of its own."""
    return grad.unsqueeze(-1)


class RuleContext(Protocol):
    """What a rule has to know of the capture."""

    phase: Phase
    anchor: Tensor  # an operand of every use, so that a backward pass to it reaches all of them
    state: State
    inseparable: str  # why nothing is differentiated again for one example
    poison: str  # why rows that come next in this backward pass may be of several examples
    traced: int  # the uses of the epoch that ran in compiled code
    copies: bool  # whether gradients are written to in the backward pass

    @property
    def epoch(self) -> int:
        """Counts what runs forward between backward passes."""

    @property
    def current(self) -> Pass | None:
        """The backward pass that is being measured."""

    @property
    def running(self) -> bool:
        """Whether a backward pass runs."""

    @property
    def nested(self) -> bool:
        """Whether this is a backward pass inside of another's."""

    @property
    def elsewhere(self) -> bool:
        """Whether this is another thread than the probe's."""

    def unbatched(self) -> AbstractContextManager[Any]:
        """In which the results of a backward pass are computed."""

    def silenced(self, phase: Phase) -> AbstractContextManager[None]:
        """In which a backward pass of the probe's own runs."""

    def watching(self) -> AbstractContextManager[None]:
        """In which operations are seen."""

    def ref(self, x: object) -> Ref | None:
        """The weight that ``x`` is, or is a view of."""

    def sign(self, site: Site, rows: Tensor) -> None:
        """Takes the gradient of a use's rows, (*lead, F), while they are named."""

    def enter(self, site: Site) -> None:
        """Takes a use that has been seen."""


class Site:
    """One use: its weights, of which some may be none of the probe's, and whose the rows of its result are.

    ``layout`` is known when gradients are measured. ``label`` names the use to people.
    """

    __slots__ = ("alone", "ambiguous", "context", "known", "label", "layout", "lead", "problem", "refs", "rows_of")

    def __init__(
        self, context: RuleContext, label: str, refs: Sequence[Ref | None], lead: Sequence[int], rows_of: Rows | None = None
    ) -> None:
        self.context = context
        self.refs = refs
        self.label = label
        self.lead = lead  # the rows' dimensions
        self.rows_of = rows_of or _same  # (*lead, F) of a gradient of the result
        self.layout: Layout | None = None
        self.problem = ""
        self.alone = 0  # bit k: the k-th weight has no other use, and takes its gradient from this one
        self.ambiguous: Any = None  # the call, where it is not known whether its other operands depend on data
        self.known: Any = None  # the call, where it is like one of an earlier pass
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
        """The site of a call that covers a weight, and perhaps a bias; and what stands for them in the call.

        With ``alone=False`` the rule leaves pieces of the weight, which are put together at its gathering node.
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
        """Those that have no other use, and stand in the graph themselves."""
        return [ref.source.tensor for k, ref in enumerate(self.refs) if ref is not None and self.alone >> k & 1]

    def named(self, grad: Tensor) -> bool:
        """Whether this backward pass names rows; takes the result's gradient then. Nothing else is asked for but the gradient of
        the activations."""
        if self.context.phase is not Phase.NAMING:
            return False
        self.context.sign(self, self.rows_of(grad))
        return True

    def ref(self, k: int = 0) -> Ref | None:
        """The k-th weight, where its statistics are wanted."""
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
        """Whether autograd has to be given the k-th weight's gradient: it is none of the probe's, or is to be differentiated."""
        return self.ref(k) is None or torch.is_grad_enabled()

    def at_once(self, k: int = 0, *, product: bool = False) -> GradSource | None:
        """The k-th weight, where this is its only use and its gradient may be computed here, without waiting for another. With
        ``product`` it is one of rows that come example by example."""
        layout, context = self.layout, self.context
        if layout is None or not self.alone >> k & 1 or context.phase is not Phase.MEASURING:
            return None
        if (product and not layout.plain) or context.poison or torch.is_grad_enabled():
            return None
        ref = self.refs[k]
        assert ref is not None
        return ref.source if ref.source.ready else None

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(E, T, F)"""
        assert self.layout is not None
        return self.layout.rows(x if x.dtype == dtype else x.to(dtype))

    def leave(self, contribution: Callable[[Layout], Contribution], k: int = 0) -> Tensor | None:
        """Leaves the k-th weight's part with it. Returns the weight's gradient where this is its only use."""
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
