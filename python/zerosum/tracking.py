"""What a probe keeps of one weight while the model runs, and the results that come of it.

Every use of a weight takes the output of one autograd node, :class:`_Gather`, in its place. A use leaves its part of the weight's
gradient with the :class:`Source` and returns none to autograd; the engine runs the node when every use that this backward
pass reaches has done so, and there the gradient and its statistics are computed together, in one pass. So a use that is detached
or never reached does not count, and one more use costs no more products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zerosum.metrics import block_diagonal
from zerosum.uses import SCALARS, WEIGHT_SHAPED, Asked, Piece, Sums, Use, Uses, densified
from zsl_kernels import CoordinateSums
from zsl_kernels.types import sum_dtype

if TYPE_CHECKING:
    from zerosum.capture import Capture


class Source:
    """A tensor whose per-example gradient is gathered: a parameter, or a function of parameters alone."""

    def __init__(self, capture: Capture, tensor: Tensor) -> None:
        self.capture = capture
        self.tensor = tensor
        self.base = Piece.of(tensor)
        self._gathered: tuple[int, Tensor] | None = None
        self._count: dict[int, int] = {}  # of uses, by pass
        self._uses: dict[int, Uses] = {}  # by pass: of the passes whose gradient is not computed yet

    def gathered(self) -> Tensor:
        """Stands for the tensor in every use of this pass."""
        now = self.capture.pass_number
        self._count[now] = self._count.get(now, 0) + 1
        if self._gathered is None or self._gathered[0] != now:
            self._gathered = (now, _Gather.apply(self.tensor, self, now))
        return self._gathered[1]

    def view(self, piece: Piece) -> Tensor:
        whole = self.gathered()
        if piece == self.base:
            return whole
        return whole.as_strided(piece.size, piece.stride, whole.storage_offset() + piece.offset - self.base.offset)

    def add(self, pass_number: int, piece: Piece, use: Use) -> None:
        """Leaves one use's part of the gradient."""
        self._uses.setdefault(pass_number, Uses(self.base)).add(piece, use)

    def pull(self, pass_number: int, piece: Piece, use: Use) -> None:
        """Leaves a use whose part of the gradient autograd computes."""
        raise NotImplementedError

    def drop(self) -> None:
        """Forgets what was left for a gradient that was not asked for."""
        self._uses.clear()

    def take(self, pass_number: int) -> Uses:
        return self._uses.pop(pass_number, None) or Uses(self.base)

    def gradient(self, pass_number: int, uses: Uses) -> Tensor:
        """Σ_i g_i over the uses, and on the way what else is wanted of them."""
        raise NotImplementedError

    def sole(self, pass_number: int, piece: Piece) -> Asked | None:
        """What is asked of a use that is the only one, and of the whole, so that it may be computed at once."""
        return None

    def refuse(self, problem: str) -> None:
        raise NotImplementedError

    @property
    def parameters(self) -> list[Tracked]:
        """The parameters that it is made of."""
        raise NotImplementedError


class _Gather(torch.autograd.Function):
    """The identity. Its backward computes the gradient from what the uses left, and adds what came through autograd."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, source: Source, pass_number: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.source, ctx.pass_number = source, pass_number
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        source = ctx.source
        uses = source.take(ctx.pass_number)
        if not uses:
            return grad, None, None
        with torch.no_grad(), torch._C.DisableTorchFunction(), source.capture.provenance.unbatched():
            mine = source.gradient(ctx.pass_number, uses)
        return (mine if grad is None else grad + mine), None, None


@dataclass(frozen=True)
class Ref:
    """A tensor that is a source, or a view of one."""

    source: Source
    piece: Piece

    def tensor(self) -> Tensor:
        return self.source.view(self.piece)

    def covered_by(self, how: str) -> None:
        for t in self.source.parameters:
            t.covered_by(how)

    def leave(self, pass_number: int, use: Use) -> None:
        """Leaves one use's part of the gradient; with create_graph autograd computes it, since it must stay differentiable."""
        (self.source.pull if torch.is_grad_enabled() else self.source.add)(pass_number, self.piece, use)


class Derived(Source):
    """A function of parameters alone, such as ``1 + weight.float()`` or the rows of a position embedding.

    ``pullback`` takes its per-example gradients on to the weights that it is made of.
    """

    def __init__(self, capture: Capture, tensor: Tensor, parents: list[Tracked], pullback: Callable[[int, Uses], Tensor]) -> None:
        super().__init__(capture, tensor)
        self._parents = parents
        self._pullback = pullback
        for parent in parents:
            parent.defer()

    def gradient(self, pass_number: int, uses: Uses) -> Tensor:
        return self._pullback(pass_number, uses).to(self.tensor.dtype)

    def pull(self, pass_number: int, piece: Piece, use: Use) -> None:
        uses = Uses(self.base)
        uses.add(piece, use)
        self._pullback(pass_number, uses)

    def refuse(self, problem: str) -> None:
        for parent in self._parents:
            parent.refuse(problem)

    @property
    def parameters(self) -> list[Tracked]:
        return self._parents


class Tracked(Source):
    """One trainable parameter under a probe.

    Where all of its uses pass through the gathering node, its gradient and statistics are one pass. Where some do not (a function
    of the parameter, a module that is run again for each example), autograd computes the gradient as ever and the statistics
    follow when it is complete, which a hook on the parameter tells.
    """

    def __init__(self, capture: Capture, names: list[str], parameter: nn.Parameter, direction: Tensor | None, gram: bool) -> None:
        super().__init__(capture, parameter)
        self.name = names[0]
        self.names = names
        self.parameter = parameter
        self.direction = direction
        self.gram = gram
        self.how: list[str] = []  # the rules that cover it
        self.problem = ""  # why it is not covered
        self.seen = False  # whether a use of it was seen in this pass, ...
        self.eps = 0.0  # the unit roundoff of what its uses were computed in, where that is not their own
        self.ruled = False  # ... and covered where it happened
        self.results: Results | None = None
        self._deferred: set[int] = set()  # passes of which some use does not pass through the node
        self._replaced: set[int] = set()  # passes that were run again whole
        self._late: dict[int, Uses] = {}
        self._partial: Tensor | None = None  # the gradient of the backward passes in this one
        self._fused: tuple[int, int] | None = None  # where the gradient lies that the node returned, and its version

    @property
    def parameters(self) -> list[Tracked]:
        return [self]

    def covered_by(self, how: str) -> None:
        self.ruled = True
        if how not in self.how:
            self.how.append(how)

    def refuse(self, problem: str) -> None:
        """The first problem is the one to tell; what was gathered is not the whole gradient."""
        self.problem = self.problem or problem
        self.results = None
        self._late.clear()

    def defer(self) -> None:
        self._deferred.add(self.capture.pass_number)

    def pull(self, pass_number: int, piece: Piece, use: Use) -> None:
        if pass_number not in self._replaced:
            self.pull_whole(pass_number, piece, use)

    def replace(self) -> None:
        """What is run again has all of the pass's uses in it: takes no other's part than :meth:`pull_whole`."""
        self._replaced.add(self.capture.pass_number)

    def pull_whole(self, pass_number: int, piece: Piece, use: Use) -> None:
        """As :meth:`pull`, of all uses together."""
        self._late.setdefault(pass_number, Uses(self.base)).add(piece, use)

    def _asked(self, pass_number: int) -> Asked:
        return Asked(self.capture.examples_of(pass_number), self.direction, self.gram, self.capture.scales(pass_number))

    def _waits(self, pass_number: int) -> bool:
        """Whether statistics come after the gradient."""
        return pass_number in self._deferred or self.capture.nested or self.capture.scales(pass_number) is not None

    def sole(self, pass_number: int, piece: Piece) -> Asked | None:
        waits = self.problem or pass_number in self._replaced or self._waits(pass_number)
        return None if waits or self._count[pass_number] != 1 or piece != self.base else self._asked(pass_number)

    def gradient(self, pass_number: int, uses: Uses) -> Tensor:
        if self.problem or pass_number in self._replaced:
            return uses.grad_sum(self.parameter)
        if self._waits(pass_number):
            self._late.setdefault(pass_number, Uses(self.base)).extend(uses)
            return uses.grad_sum(self.parameter)
        sums = self._finish(pass_number, uses)
        # Autograd takes a gradient over without a copy only if it holds the sole reference to the tensor: the results keep another
        # tensor of the same memory.
        grad = densified(sums, self.parameter.shape[0] if self.parameter.ndim else 1).grad_sum
        grad = grad.view(self.parameter.shape).to(self.parameter.dtype)
        self._fused = (grad.data_ptr(), grad._version)
        return grad

    def on_gradient(self, grad: Tensor) -> None:
        """The parameter's gradient of one backward pass is complete: finishes what had to wait, and checks that none is missing."""
        fused, self._fused = self._fused, None
        if self.problem or not self.capture.open:
            return
        if self.capture.nested:
            # A reentrant checkpoint has a backward pass of its own, and another may follow that uses the same weight.
            self._partial = grad.clone() if self._partial is None else self._partial.add_(grad)
            return
        if self._partial is not None:
            grad, self._partial = grad + self._partial, None
        with torch.no_grad(), torch._C.DisableTorchFunction():
            if self._late:
                for pass_number, uses in list(self._late.items()):
                    plain = None  # the sum as it was differentiated, where that is not the results'
                    if self.capture.scales(pass_number) is not None:
                        plain = uses.grad_sum(self.parameter)
                    eps = max(uses.eps, torch.finfo(grad.dtype).eps, self.eps)
                    sums = self._finish(pass_number, uses)
                    self._compare(sums, grad, eps, plain)
                self._late.clear()
            elif fused is None or (fused != (grad.data_ptr(), grad._version) and grad.numel()):
                # (With create_graph the gradient came through autograd; its statistics are late ones.)
                self._refuse_unseen()

    def _refuse_unseen(self) -> None:
        self.refuse(self.capture.modules.reason(self) or "part of its gradient came through an operation that the probe cannot see")

    def end_pass(self) -> None:
        if self._partial is not None:
            grad, self._partial = self._partial, None
            self.on_gradient(grad)
        self._late.clear()
        self.drop()

    def _compare(self, sums: Sums, grad: Tensor, eps: float, plain: Tensor | None) -> None:
        """Whether the statistics' sum is the gradient: an operation that nobody saw shows here."""
        grad = grad.to_dense() if grad.is_sparse else grad
        total = densified(sums, grad.shape[0] if grad.ndim else 1)
        found = total.grad_sum.view(grad.shape) if plain is None else plain
        error = (found - grad).double().norm()
        size = torch.linalg.vector_norm(total.abs_sum if plain is None else grad, dtype=torch.float64)
        if error > min(6e-2, 1e4 * eps) * size:
            self._refuse_unseen()

    def _finish(self, pass_number: int, uses: Uses) -> Sums:
        capture = self.capture
        sums = uses.combine(self.parameter, self._asked(pass_number))
        results = Results(sums, pass_number, capture.scale(pass_number))
        if self.results is None:
            results.add_up(self)  # at once: someone may write to .grad, whose memory this is
            self.results = results
        elif pass_number in self.results.passes:
            self.refuse(
                "the backward pass went through it twice, or its gradient came in parts (reentrant checkpoints of one weight)"
            )
        elif self.results.grad_sum._version != self.results.version:
            self.refuse("its .grad was modified in place between two backward passes (zero_grad(set_to_none=False), clipping, …)")
        else:
            self.results.merge(results, self)
        return sums

    def release(self) -> None:
        """Lets go of the graph, whose nodes hold this: nothing should wait for the garbage collector."""
        self.drop()
        self._late.clear()
        self._gathered = self._partial = None

    def finish(self) -> None:
        """Nothing is left to come."""
        if not self.problem and self.results is None:
            self.refuse(
                "no gradient reached it inside the probe" if self._gathered or self._deferred else "not used inside the probe"
            )
        if self.results is not None:
            self.results.finish(self)


class Results:
    """A parameter's sums and scalars for the loss that was differentiated; g_i = ``scale`` · the gradient of that.

    ``grad_sum`` shares its memory with the ``.grad`` that autograd stored, so that it costs nothing; ``version`` tells whether
    someone has written to it since.
    """

    def __init__(self, sums: Sums, pass_number: int, scale: float) -> None:
        self.sums = sums
        self.scale = scale
        self.passes = {pass_number}
        self.scalars = {pass_number: {name: getattr(sums, name) for name in SCALARS}}
        self._hold(sums.grad_sum.detach())  # another tensor of the same memory
        self._coordinates: Tensor | None = None

    @property
    def coordinates(self) -> CoordinateSums:
        """Reads what :meth:`add_up` left on the device, and waits for it."""
        assert self._coordinates is not None
        return CoordinateSums(*self._coordinates.tolist())

    def _hold(self, grad_sum: Tensor) -> None:
        self.grad_sum, self.version = grad_sum, grad_sum._version

    def merge(self, other: Results, tracked: Tracked) -> None:
        """Adds another micro-batch: sums add, and the examples come after these."""
        num_rows = tracked.parameter.shape[0] if tracked.parameter.ndim else 1
        mine, its = densified(self.sums, num_rows), densified(other.sums, num_rows)
        for name, power in WEIGHT_SHAPED.items():
            # Not in place: autograd owns the memory of the first gradient, and adds to it.
            total, more = getattr(mine, name) * self.scale**power, getattr(its, name)
            setattr(mine, name, total.add_(more, alpha=other.scale**power))
        for results in (self, other):
            for scalars in results.scalars.values():
                for name, power in SCALARS.items():
                    if scalars[name] is not None:
                        scalars[name] = scalars[name] * results.scale**power
        mine.rows = None
        self.sums, self.scale = mine, 1.0
        self._hold(mine.grad_sum)
        self.passes |= other.passes
        self.scalars |= other.scalars
        self._coordinates = None

    def check_version(self, name: str) -> None:
        if self.grad_sum._version != self.version:
            raise RuntimeError(
                f"grad_sum of {name!r} shares memory with the parameter's .grad, which was modified in place after the probe "
                "(gradient clipping, zero_grad(set_to_none=False), …): read it before that"
            )

    def add_up(self, tracked: Tracked) -> None:
        """The sums over coordinates, as the tensor that the op gives: zk.coordinate_sums would wait for a device."""
        s, u = self.sums, tracked.direction
        if u is not None:
            u = (u if s.rows is None else u[s.rows]).reshape(s.abs_sum.shape)
        with torch.no_grad():
            self._coordinates = torch.ops.zsl.coordinate_sums(s.grad_sum.view(s.abs_sum.shape), s.abs_sum, s.sq_sum, u, "auto")

    def finish(self, tracked: Tracked) -> None:
        """Scalars of all micro-batches behind one another."""
        if self._coordinates is None:
            self.add_up(tracked)
        s, capture = self.sums, tracked.capture
        blocks = {name: [] for name in SCALARS}  # type: dict[str, list[Tensor | None]]
        dtype = sum_dtype(tracked.parameter.dtype)
        for p in capture.measured:
            E = capture.examples_of(p)
            for name in SCALARS if E else ():
                if p in self.scalars:
                    blocks[name].append(self.scalars[p][name])
                elif getattr(s, name) is not None:
                    blocks[name].append(torch.zeros((E, E) if name == "gram" else (E,), dtype=dtype, device=s.l1.device))
        for name, parts in blocks.items():
            if parts and all(part is not None for part in parts):
                setattr(s, name, block_diagonal(parts) if name == "gram" else torch.cat(parts))  # type: ignore[arg-type]
        self.scalars.clear()
