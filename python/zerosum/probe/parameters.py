"""Collects the uses of one weight while the model runs, and computes its gradient together with the statistics.

Every use of a weight takes the output of one autograd node, :class:`Gather`, in place of the weight. In the backward pass, a use
leaves its part of the weight's gradient with the :class:`GradSource` and returns no gradient to autograd. The engine runs the node
when every use that this backward pass reaches has done so. The node then computes the gradient and its statistics together, in one
pass. A use that is detached or never reached therefore does not count, and additional uses cost no additional products.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import zsl_kernels as zk
from zerosum.probe.contributions import Contribution, Contributions, Dense, Piece, Request, Sums, densified
from zerosum.probe.results import Pass, Results
from zsl_kernels.weight_uses.eager import State, Weight

# Reasons for parameters whose gradient is zero for every example.
UNREACHED = ("no gradient reached it inside the probe", "not used inside the probe")
UNSEEN = "part of its gradient came through an operation that the probe cannot see"


class Context(Protocol):
    """What a weight needs to know about its capture."""

    state: State
    traced: int  # number of the epoch's uses that ran in compiled code
    copies: bool  # whether gradients are overwritten during the backward pass

    @property
    def epoch(self) -> int:
        """The number of the current forward phase between backward passes."""

    @property
    def current(self) -> Pass | None:
        """The backward pass that is being measured, if any."""

    @property
    def nested(self) -> bool:
        """Whether this backward pass runs inside another one."""

    @property
    def running(self) -> bool:
        """Whether a backward pass is running, so that forward code is a checkpoint's recomputation."""


class GradSource:
    """A tensor whose per-example gradient is gathered: a parameter, or a tensor computed from parameters only."""

    gram = False  # whether to compute the inner products of examples
    direction: Tensor | None = None
    gather: type[Gather]

    def __init__(self, context: Context, tensor: Tensor) -> None:
        self.context = context
        self.tensor = tensor
        self.base = Piece.of(tensor)
        self.ref = Ref(self, self.base)
        self._gathered: tuple[int, Tensor] | None = None
        self.roots: list[GradSource] = [self]  # the sources to which the gradients of a derived weight are pulled back
        self._count = 0  # number of uses in this epoch
        self._left: Contributions | None = None

    def covered_by(self, how: str) -> None:
        for parameter in self.parameters:
            parameter.covered_by(how)

    def gathered(self) -> Tensor:
        """Return the tensor that replaces this one in every use of this epoch."""
        epoch = self.context.epoch
        if self._gathered is None or self._gathered[0] != epoch:
            self._gathered = (epoch, self.gather.apply(self.tensor, self))
            self._count = 0
        self._count += 1
        return self._gathered[1]

    def stands_alone(self, piece: Piece) -> bool:
        """Whether this use of the piece is assumed to be the only one in its pass, and needs no gathering node."""
        return False

    def view(self, piece: Piece) -> Tensor:
        whole = self.gathered()
        if piece is self.base or piece == self.base:
            return whole
        return whole.as_strided(piece.size, piece.stride, whole.storage_offset() + piece.offset - self.base.offset)

    def add(self, piece: Piece, contribution: Contribution) -> None:
        """Add one use's part of the gradient."""
        if self._left is None:
            self._left = Contributions(self.base)
        self._left.add(piece, contribution)

    def pull(self, piece: Piece, contribution: Contribution) -> None:
        """Add a use whose part of the gradient autograd computes."""
        raise NotImplementedError

    def drop(self) -> None:
        """Discard the parts of a gradient that was not requested."""
        self._left = None

    def take(self) -> Contributions | None:
        left, self._left = self._left, None
        return left

    def gradient(self, contributions: Contributions) -> Tensor:
        """Return Σ_i g_i over the uses, and compute the requested statistics."""
        raise NotImplementedError

    def sole(self, piece: Piece) -> Request | None:
        """Return the request for a use that is the only one and uses the whole weight, so that it can be computed immediately."""
        return None

    def refuse(self, problem: str) -> None:
        raise NotImplementedError

    def gradient_of(self, contribution: Contribution) -> Tensor:
        """Return :meth:`gradient` for the only use of the whole weight."""
        contributions = Contributions(self.base)
        contributions.add(self.base, contribution)
        return self.gradient(contributions)

    @property
    def ready(self) -> bool:
        """Whether the gradient of a use that stands alone can be computed immediately."""
        return False

    def gradient_of_product(self, b: Tensor, a: Tensor) -> Tensor:
        """Return :meth:`gradient` of ``torch.einsum("nto,ntk->nok", b, a)``. Valid if :attr:`ready`."""
        raise NotImplementedError

    @property
    def flat_direction(self) -> Tensor | None:
        return None if self.direction is None else self.direction.reshape(-1)

    def gradient_of_dense(self, g: Tensor) -> Tensor:
        """Return :meth:`gradient` of each example's gradient (E, …). Valid if :attr:`ready`."""
        raise NotImplementedError

    @property
    def refused(self) -> bool:
        return all(parameter.problem for parameter in self.parameters)

    @property
    def parameters(self) -> list[ParameterProbe]:
        """The parameters that it is computed from."""
        raise NotImplementedError


class Gather(torch.autograd.Function):
    """The identity. Its backward computes the gradient from the uses' parts, and adds any gradient that came through autograd."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, source: GradSource) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.source = source
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        left = ctx.source.take()
        if left is None:
            return grad, None
        with torch.no_grad(), torch._C.DisableTorchFunction(), ctx.source.context.current.unbatched():
            mine = ctx.source.gradient(left)
        return (mine if grad is None else grad + mine), None


GradSource.gather = Gather


@dataclass(frozen=True)
class Ref:
    """A source, or a view of one."""

    source: GradSource
    piece: Piece

    def tensor(self) -> Tensor:
        return self.source.view(self.piece)

    def covered_by(self, how: str) -> None:
        self.source.covered_by(how)

    def leave(self, contribution: Contribution) -> None:
        """Add one use's part of the gradient. With create_graph, autograd computes it, because it must stay differentiable."""
        (self.source.pull if torch.is_grad_enabled() else self.source.add)(self.piece, contribution)


Pullback = Callable[[Contributions], Tensor]


class DerivedWeight(GradSource):
    """A tensor computed from parameters only, such as ``1 + weight.float()`` or the rows of a position embedding.

    ``pullback`` passes its per-example gradients on to the weights that it is computed from.
    """

    pullback: Pullback

    def __init__(self, context: Context, tensor: Tensor, parents: list[ParameterProbe]) -> None:
        super().__init__(context, tensor)
        self._parents = parents
        for parent in parents:
            parent.defer()

    def gradient(self, contributions: Contributions) -> Tensor:
        return self.pullback(contributions).to(self.tensor.dtype)

    def pull(self, piece: Piece, contribution: Contribution) -> None:
        contributions = Contributions(self.base)
        contributions.add(piece, contribution)
        self.pullback(contributions)

    def refuse(self, problem: str) -> None:
        for parent in self._parents:
            parent.refuse(problem)

    @property
    def parameters(self) -> list[ParameterProbe]:
        return self._parents


class ParameterProbe(GradSource):
    """One trainable parameter under a probe.

    If all of its uses go through the gathering node, one pass computes its gradient and statistics. Some uses may not: a function
    of the parameter, or an operation that is differentiated again for each example. Autograd then computes the gradient as usual,
    and a hook on the parameter computes the statistics once the gradient is complete.
    """

    immediate = True  # whether a use's part may be computed immediately

    def __init__(self, context: Context, names: list[str], parameter: nn.Parameter) -> None:
        super().__init__(context, parameter)
        self.name = names[0]
        self.names = names
        self.parameter = parameter
        self.like: Tensor = parameter  # a tensor with the layout of the gradients
        self.marks = Weight(context.state)
        self.marks.owner = weakref.ref(self)
        self._several = False  # whether it had more than one use in some pass

    def renew(self, context: Context, direction: Tensor | None, gram: bool) -> None:
        """Start a block."""
        self.context = context
        marks = self.marks
        if not marks.renew(self.like, direction, gram, context.copies):
            if (base := Piece.of(self.like)) != self.base:
                self.base, self.ref = base, Ref(self, base)
            marks.barred = marks.refused = self.base.repeats or not self.immediate
        self.direction = direction
        self.gram = gram
        self.how: list[str] = []  # the rules that cover it
        self.problem = ""  # why it is not covered
        self.unreached = False  # whether the reason is that no example's loss depends on it
        self.used = False  # whether a use of it was seen
        self.eps = 0.0  # the unit roundoff of the precision of its uses, if that is not their dtype's
        self.results: Results | None = None
        self.doubts: list[Tensor] = []  # each on a device: whether part of its gradient was not observed
        self._gathered = None
        self._count = 0
        self._left = None
        self._whole_piece = False
        self._late: Contributions | None = None
        self._whole = False  # whether the late contributions are the whole gradient, whatever the uses leave
        self._partial: Tensor | None = None  # the gradient from backward passes nested in this one
        self._measured: Results | None = None  # results for a gradient that has not arrived at the parameter yet
        self._fused: tuple[int, int] | None = None  # address and version of the gradient that the node returned

    def _mark(self) -> None:
        self.marks.refused = self.marks.barred or self.refused

    @property
    def parameters(self) -> list[ParameterProbe]:
        return [self]

    @property
    def refused(self) -> bool:
        return bool(self.problem) or self._whole

    def stands_alone(self, piece: Piece) -> bool:
        if self.context.running:
            return False
        marks = self.marks
        epoch = self.context.epoch
        if marks.alone == epoch:
            self._not_alone()
            return False
        if piece is not self.base or not marks.stands_alone():
            return False
        marks.alone, self._count = epoch, 1
        return True

    def _not_alone(self) -> None:
        """A use was assumed to be the only one, but there is another: statistics must wait for the complete gradient."""
        self.marks.single, self._several = False, True
        self.marks.deferred = self.context.epoch

    def use_apart(self) -> None:
        """Note a use whose gradient reaches the parameter without a gathering node, whatever its other uses are."""
        marks, epoch = self.marks, self.context.epoch
        if epoch in (marks.alone, marks.gathered):
            self.defer()
        else:
            marks.alone, self._count = epoch, 1

    def gathered(self) -> Tensor:
        self.marks.gathered = self.context.epoch
        return super().gathered()

    def note_uses(self) -> None:
        """Remembers, at the end of a pass, whether the weight was used exactly once."""
        marks, epoch = self.marks, self.context.epoch
        if marks.alone == epoch:
            return
        if marks.gathered != epoch or marks.deferred == epoch or self._count != 1:
            marks.single = False
            self._several |= self._count > 1
        elif self._whole_piece:
            marks.single = not self._several

    def view(self, piece: Piece) -> Tensor:
        self._whole_piece = piece is self.base
        if self.marks.alone == self.context.epoch and not self.context.running:
            self._not_alone()
        return super().view(piece)

    def covered_by(self, how: str) -> None:
        if how not in self.how:
            self.how.append(how)

    def refuse(self, problem: str) -> None:
        """Mark the parameter as not covered. The first reason is kept; results are dropped, as they are not the whole gradient."""
        self.problem = self.problem or problem
        self.results = None
        self._late = None
        self.marks.refused = True

    def defer(self) -> None:
        self.marks.deferred = self.context.epoch
        if self.marks.alone == self.context.epoch and not self.context.running:
            self._not_alone()

    def pull(self, piece: Piece, contribution: Contribution) -> None:
        if self._whole or self.problem:
            return
        if self._late is None:
            self._late = Contributions(self.base)
        self._late.add(piece, contribution)

    def give(self, gradients: Tensor) -> None:
        """Set all of the pass's gradients, (E, *shape), which were computed by other means than its uses."""
        self._late = Contributions(self.base)
        self._late.add(self.base, Dense(gradients))
        self._whole = True
        self.marks.refused = True

    def _request(self) -> Request:
        now = self.context.current
        assert now is not None
        return Request(now.examples, self.direction, self.gram, now.denominators)

    def _waits(self) -> bool:
        """Whether statistics must wait for the complete gradient."""
        now = self.context.current
        assert now is not None
        return self.marks.deferred == self.context.epoch or self.context.nested or now.denominators is not None

    def sole(self, piece: Piece) -> Request | None:
        waits = self.refused or self.context.current is None or self._waits()
        return None if waits or self._count != 1 or piece != self.base else self._request()

    def gradient(self, contributions: Contributions) -> Tensor:
        if self.refused:
            return contributions.grad_sum(self.like)
        if self._waits():
            if self._late is None:
                self._late = Contributions(self.base)
            self._late.extend(contributions)
            return contributions.grad_sum(self.like)
        sums = self._finish(contributions)
        # Autograd takes over a gradient without a copy only if it holds the sole reference to the tensor. Therefore the results
        # keep a different tensor with the same memory.
        grad = densified(sums, self.like.shape[0] if self.like.ndim else 1).grad_sum
        grad = grad.view(self.like.shape).to(self.like.dtype)
        self._fused = (grad.data_ptr(), grad._version)
        return grad

    @property
    def ready(self) -> bool:
        context, marks = self.context, self.marks
        now = context.current
        if now is None or marks.refused or marks.deferred == context.epoch:
            return False
        return now.simple and not context.nested

    def gradient_of_product(self, b: Tensor, a: Tensor) -> Tensor:
        return self._measure(Sums(*zk.interference(a, b, direction=self.direction, gram=self.gram)))

    def gradient_of_dense(self, g: Tensor) -> Tensor:
        shape = self.like.shape
        g = g.reshape(g.shape[0], shape.numel())
        sums = Sums(*zk.dense_interference(g, direction=self.flat_direction, gram=self.gram))
        if len(shape) != 1:
            sums.grad_sum, sums.abs_sum, sums.sq_sum = (x.view(shape) for x in (sums.grad_sum, sums.abs_sum, sums.sq_sum))
        return self._measure(sums)

    def _measure(self, sums: Sums) -> Tensor:
        """Keep the sums until their gradient, which this returns, has arrived at the parameter."""
        now = self.context.current
        assert now is not None
        self._measured = Results(sums, now, self.like)
        grad = sums.grad_sum.view(self.like.shape)  # a different tensor, as in `gradient`
        if grad.dtype != self.like.dtype:
            grad = grad.to(self.like.dtype)
        self._fused = (grad.data_ptr(), grad._version)
        return grad

    def on_gradient(self, grad: Tensor) -> None:
        """Finish what had to wait for the parameter's complete gradient of one backward pass, and check that no part is missing.

        (It is not called if a single use left its sums with ``marks`` and only that use's gradient arrived.)
        """
        fused, self._fused = self._fused, None
        measured, self._measured = self._measured, None
        now = self.context.current
        if self.problem or now is None:
            return
        if self.context.nested:
            # A reentrant checkpoint runs its own backward pass, and another one that uses the same weight may follow.
            self._partial = grad.clone() if self._partial is None else self._partial.add_(grad)
            return
        if self._partial is not None:
            grad, self._partial = grad + self._partial, None
        if fused is not None and self._late is None and (fused == (grad.data_ptr(), grad._version) or not grad.numel()):
            if measured is not None:
                if self.context.traced and measured.grad_sum.data_ptr() == grad.data_ptr():
                    measured.hold(grad.detach())  # compiled code returned a different tensor with this memory
                self.take_results(measured)
            return
        with torch.no_grad(), torch._C.DisableTorchFunction():
            if self._late is None:
                # (With create_graph, the gradient came through autograd, and its statistics are computed late.)
                self.refuse(UNSEEN)
                return
            late, self._late, self._whole = self._late, None, False
            self._mark()
            plain = None  # the sum as it was differentiated, if it differs from the results'
            if now.denominators is not None:
                plain = late.grad_sum(self.like)
            eps = max(late.eps, torch.finfo(grad.dtype).eps, self.eps)
            sums = self._finish(late)
            measured, self._measured = self._measured, None
            if measured is not None:
                self.take_results(measured)
            self._compare(sums, grad, eps, plain)

    def take_marked(self) -> bool:
        """Take the sums that the only use left with ``marks``, if its gradient has arrived."""
        if (left := self.marks.take()) is None:
            return False
        if not self.problem:
            now = self.context.current
            assert now is not None
            self.take_results(Results(left, now, self.like))
        return True

    def end_pass(self) -> None:
        if not self.take_marked():
            self.note_uses()
        if self._partial is not None:
            grad, self._partial = self._partial, None
            self.on_gradient(grad)
        if self._whole:
            self._whole = False
            self._mark()
        self._late = self._measured = self._fused = None  # of a gradient that was not requested
        self.drop()

    def _compare(self, sums: Sums, grad: Tensor, eps: float, plain: Tensor | None) -> None:
        """Check that the statistics' sum equals the gradient, which reveals operations that the probe did not observe."""
        grad = grad.to_dense() if grad.is_sparse else grad
        total = densified(sums, grad.shape[0] if grad.ndim else 1)
        found = total.grad_sum.view(grad.shape) if plain is None else plain
        error = (found - grad).double().norm()
        size = torch.linalg.vector_norm(total.abs_sum if plain is None else grad, dtype=torch.float64)
        differs = error > min(6e-2, 1e4 * eps) * size
        if not self.may_read(grad):
            self.doubts.append(differs)  # `Report.settled` reads it
        elif differs:
            self.refuse(UNSEEN)

    def may_read(self, x: Tensor) -> bool:
        """Whether a backward pass may read computed values, which waits for a device."""
        return x.is_cpu

    def _finish(self, contributions: Contributions) -> Sums:
        now = self.context.current
        assert now is not None
        sums = contributions.combine(self.like, self._request())
        self._measured = Results(sums, now, self.like)
        return sums

    def take_results(self, results: Results) -> None:
        """Store the results of one pass, or merge them with those of earlier passes."""
        if self.context.copies:
            results.own()
        if self.results is None:
            self.results = results
            self.marks.merges = True
        elif results.latest in self.results.passes:
            self.refuse(
                "the backward pass computed its gradient twice, or the gradient came in parts (reentrant checkpoints of one weight)"
            )
        elif self.results.written_to:
            self.refuse("its .grad was modified in place between two backward passes (zero_grad(set_to_none=False), clipping, …)")
        else:
            self.results.merge(results)

    def release(self) -> None:
        """Drop references to the graph, whose nodes refer to this object, so that nothing waits for the garbage collector."""
        self.drop()
        self.marks.take()
        self._gathered = self._partial = self._late = self._measured = self.results = None

    def finish(self) -> None:
        """Record why the parameter has no results, after the block's last backward pass."""
        if not self.problem and self.results is None:
            self.unreached = True
            self.refuse(UNREACHED[0] if self.used else UNREACHED[1])
