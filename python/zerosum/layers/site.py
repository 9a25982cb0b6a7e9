"""What every rule's backward pass needs to leave its weights' parts of the gradient with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zerosum.provenance import Layout
from zerosum.tracking import Ref
from zerosum.uses import Use

if TYPE_CHECKING:
    from zerosum.capture import Capture


@dataclass(frozen=True)
class Site:
    """One call's weights, of which some may be none of the probe's, and how its activation is divided among the examples."""

    capture: Capture
    pass_number: int
    layout: Layout
    refs: tuple[Ref | None, ...]

    @classmethod
    def of(cls, capture: Capture, layout: Layout, how: str, *weights: Tensor | None) -> tuple[Site, list[Tensor | None]]:
        """The site of a call that covers a weight, and perhaps a bias; and what stands for them in the call."""
        refs = tuple(None if weight is None else capture.ref(weight) for weight in weights)
        for ref, covers in zip(refs, (how, f"{how} bias"), strict=False):
            if ref is not None:
                ref.covered_by(covers)
        tensors = [weight if ref is None else ref.tensor() for ref, weight in zip(refs, weights, strict=True)]
        return cls(capture, capture.pass_number, layout, refs), tensors

    def ref(self, k: int = 0) -> Ref | None:
        """The k-th weight, while the probe is open."""
        return self.refs[k] if self.capture.open else None

    def plain(self, k: int = 0) -> bool:
        """Whether autograd has to be given the k-th weight's gradient: it is none of the probe's, or is to be differentiated."""
        return self.ref(k) is None or torch.is_grad_enabled()

    def leave(self, use: Callable[[], Use], k: int = 0) -> None:
        """Leaves the k-th weight's part with it."""
        if (ref := self.ref(k)) is not None:
            ref.leave(self.pass_number, use())
