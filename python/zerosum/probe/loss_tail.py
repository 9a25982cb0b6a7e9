"""Reads off the loss how it was reduced from the examples' losses, so that results do not depend on the reduction.

Between the examples' losses and the root of a backward pass there are reductions, weights and divisions. The gradient c at the
losses shows what they did. If the step adds up a tensor of N losses, ℓ_i is entry i times c_i over the mean of all c. Otherwise ℓ_i
is computed from the rows' losses ℓ_r:

    ℓ_i = Σ_{r of i} c_r ℓ_r / mean_i(Σ_{r of i} c_r).

The rows of an average example then have total weight one. The mean is over the examples of all micro-batches of a block. The
results are the same for a sum, a mean over examples or over all rows, a division by accumulation steps or a number of items, and a
gradient scaler. Rows with c_r = 0, such as ignored targets, do not count, and neither do examples without rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

import zsl_kernels as zk
from zerosum.probe.attribution import hooked

# The index of `reduction` among the positional arguments.
LOSSES: dict[Any, int] = {
    F.cross_entropy: 6,
    F.nll_loss: 6,
    F.mse_loss: 4,
    F.l1_loss: 4,
    F.smooth_l1_loss: 4,
    F.huber_loss: 2,
    F.binary_cross_entropy: 5,
    F.binary_cross_entropy_with_logits: 5,
    F.kl_div: 4,
    zk.linear_cross_entropy: 99,
}
_CLASSES = (F.cross_entropy, F.nll_loss, zk.linear_cross_entropy)


@dataclass(eq=False)
class LossCall:
    """A call of a known loss function, with its rows' losses and their reduction."""

    name: str
    node: Node
    reduction: str
    shape: torch.Size  # the shape of the result
    targets: Tensor
    classes: bool  # whether the targets are class indices, one per row
    distributions: bool  # whether they are distributions over the classes
    ignore_index: int
    weight: Tensor | None

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> LossCall:
        assert result.grad_fn is not None
        place = LOSSES[func]
        default = "none" if func is zk.linear_cross_entropy else "mean"
        reduction = kwargs.get("reduction", args[place] if len(args) > place else default)
        target_place = 2 if func is zk.linear_cross_entropy else 1
        key = "targets" if func is zk.linear_cross_entropy else "target"
        targets = args[target_place] if len(args) > target_place else kwargs[key]
        classes = func in _CLASSES and not targets.is_floating_point()
        distributions = func is F.cross_entropy and not classes
        ignore_place = 3 if func is zk.linear_cross_entropy else 4
        ignore = kwargs.get("ignore_index", args[ignore_place] if len(args) > ignore_place and classes else -100)
        weight = kwargs.get("weight", args[2] if len(args) > 2 and func in (F.cross_entropy, F.nll_loss) else None)
        if func is zk.linear_cross_entropy:
            weight = None
        # long(), because integers of fewer bits would be compared with an ignore_index cut to their width.
        targets = targets.detach().long() if classes else targets.detach()
        return cls(func.__name__, result.grad_fn, reduction, result.shape, targets, classes, distributions, ignore, weight)

    def valid(self) -> Tensor | None:
        """Return which rows count, in the targets' shape; None for all rows."""
        return self.targets != self.ignore_index if self.classes else None

    def rows(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return Σ_r c_r, given the gradient at the result, and which rows count."""
        grad = grad.detach().double()
        valid = self.valid()
        size = self._sizes(valid)
        if self.reduction == "none":
            return (grad if size is None else grad * size).sum(), valid
        if self.reduction == "mean":
            return grad.reshape(()), valid
        count = float(self.count) if size is None else size.sum()
        if self.reduction == "batchmean":
            count = count / self.targets.shape[0]
        return grad.reshape(()) * count, valid

    @property
    def count(self) -> int:
        """The number of rows. A distribution over classes is one row."""
        classes = self.targets.shape[1 if self.targets.ndim > 1 else 0] if self.distributions else 1
        return self.targets.numel() // max(classes, 1)

    def _sizes(self, valid: Tensor | None) -> Tensor | None:
        """Return the rows' own weights in the loss, 0 for rows that do not count."""
        if valid is None:
            return None
        if self.weight is None or self.weight.ndim != 1:
            return valid.double()
        return torch.where(valid, self.weight.detach().double()[torch.where(valid, self.targets, 0)], 0.0)


@dataclass(frozen=True)
class Term:
    """One part of the loss: the tensor at the end of ``path`` from a root.

    ``call``: the number of the loss function's call that made it; None for losses with an example dimension ``axis``.
    """

    path: tuple[int, ...]
    names: tuple[str, ...]
    axis: int
    call: int | None


COMPILED = "CompiledFunctionBackward"  # torch's node for compiled code


def follow_path(roots: Sequence[GradientEdge], path: tuple[int, ...], names: tuple[str, ...]) -> GradientEdge | None:
    """Return the edge at the end of a path, if the graph has the same nodes along it. (The last may be a compiled model's
    node.)"""
    if path[0] >= len(roots):
        return None
    edge = roots[path[0]]
    for step, name in zip((*path[1:], None), names, strict=True):
        if edge.node is None or (edge.node.name() != name and (step is not None or edge.node.name() != COMPILED)):
            return None
        if step is not None:
            following = edge.node.next_functions
            if step >= len(following) or following[step][0] is None:
                return None
            node, number = following[step]
            assert node is not None
            edge = GradientEdge(node, number)
    return edge


class TailReader:
    """Collects the gradients at the terms while a backward pass runs, and computes the factors from them.

    If the targets of the losses are for ``picked`` rows, the gradients at the ``cut`` show which examples have losses. The cut's
    tensors separate the examples by a dimension.
    """

    def __init__(self, terms: Sequence[tuple[Term, GradientEdge, LossCall | None]], examples: int, labels: Tensor | None) -> None:
        self._terms = terms
        self._examples = examples
        self._labels = labels
        self._found: dict[int, Tensor] = {}
        count = examples if labels is None else len(labels)
        self.picked = any(call is not None and call.classes and count and call.targets.numel() % count for _, _, call in terms)
        self.cut: list[tuple[GradientEdge, int]] = []
        self._at_cut: dict[int, Tensor] = {}

    def reading(self) -> AbstractContextManager[None]:
        """Return the context in which the backward pass must run."""

        def keep(found: dict[int, Tensor], k: int, number: int, grads: tuple[Tensor | None, ...]) -> None:
            if (g := grads[number]) is not None:
                found[k] = g.detach()

        terms = ((self._found, k, edge) for k, (_, edge, _) in enumerate(self._terms))
        cut = ((self._at_cut, k, edge) for k, (edge, _) in enumerate(self.cut))
        return hooked((edge.node, partial(keep, found, k, edge.output_nr)) for found, k, edge in (*terms, *cut))

    def take(self, gradients: Sequence[Tensor | None], at_cut: Sequence[Tensor | None] = ()) -> None:
        """Set the gradients, if they are already known."""
        self._found = {k: g for k, g in enumerate(gradients) if g is not None}
        self._at_cut = {k: g for k, g in enumerate(at_cut) if g is not None}

    def factors(self, rows_per_example: int = 1) -> tuple[Tensor, Tensor] | None:
        """Return the number of examples with losses and Σ c over all rows, on the device, without waiting for it."""
        total: Tensor | None = None
        active: Tensor | None = None
        for k, (term, _, call) in enumerate(self._terms):
            if (grad := self._found.get(k)) is None:
                continue
            if call is None:
                part = grad.double()
                mine = self._of_gradient(part, term.axis)
                part = part.sum()
            else:
                part, valid = call.rows(grad)
                known = None if valid is None else self._rows_by_example(valid, term.axis)
                known = self._with_gradients() if known is None else known
                mine = torch.ones(self._examples, dtype=torch.bool, device=grad.device) if known is None else known
            total = part if total is None else total + part
            active = mine if active is None else active | mine
        if active is None or total is None:
            return None
        return active.sum().double() * rows_per_example, total

    def _with_gradients(self) -> Tensor | None:
        """Return which examples have nonzero gradients at the cut."""
        parts = [self._of_gradient(g, self.cut[k][1]) for k, g in self._at_cut.items()]
        return torch.stack(parts).any(0) if parts else None

    def _of_gradient(self, gradient: Tensor, axis: int) -> Tensor:
        rows = (gradient != 0).movedim(axis, 0)
        count = len(rows) if self._labels is None else len(self._labels)  # labels may cover the first two dimensions
        return self._by_example(rows.reshape(count, -1).any(1))

    def _by_example(self, rows: Tensor) -> Tensor:
        if self._labels is None:
            return rows
        counts = torch.zeros(self._examples, dtype=torch.long, device=rows.device)
        rows = rows & (self._labels >= 0)  # rows of no example have no loss
        return counts.index_add_(0, self._labels.clamp(min=0), rows.long()) > 0

    def _rows_by_example(self, valid: Tensor, axis: int) -> Tensor | None:
        count = self._examples if self._labels is None else len(self._labels)
        if not count or valid.numel() % count:
            return None
        rows = valid.reshape(-1, count).any(0) if axis else valid.reshape(count, -1).any(1)
        return self._by_example(rows)

    def uniform(self) -> float | None:
        """Return 1/c if every row has the same c."""
        values = []
        for k, (_, _, call) in enumerate(self._terms):
            if (grad := self._found.get(k)) is None:
                continue
            c = grad.double()
            if call is not None and call.reduction == "mean":
                size = call._sizes(call.valid())
                c = c / (float(call.count) if size is None else size.sum())
            values += [c.min(), c.max()]
        if not values:
            return None
        low, high = min(values).item(), max(values).item()
        return 1 / high if high > 0 and high - low <= 1e-6 * abs(high) else None
