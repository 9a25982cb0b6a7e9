"""The two passes over a sequence: one that takes what is a token's own, and one that takes a chunk of tokens back together.

The *tail* is what lies behind the cut (:mod:`zerosum.tokens.cut`). One ordinary backward pass from all losses gives the gradient's
sum for every weight, the statistics of the tail's weights, whose examples are single rows, and each token's row at the cut.

From there a *chunk* of C tokens of one sequence goes back at once: the sequence runs forward once, up to the chunk's last token,
and a vectorized backward pass starts from C rows. So a weight's inputs are shared by the C examples, and its
gradients (C, T, O) with these (T, K) are one wide product for the kernel.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd.graph import GradientEdge, Node, disable_saved_tensors_hooks, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from zerosum.changes import IGNORED, Losses
from zerosum.probe.capture import Capture
from zerosum.probe.contributions import SCALARS, WEIGHT_SHAPED, Contributions, Request, Sums, densified
from zerosum.probe.layout import Layout
from zerosum.probe.loss_scale import Loss
from zerosum.probe.parameters import UNSEEN, ParameterProbe
from zerosum.probe.proof import Proof, Prover, Structures
from zerosum.probe.results import Pass, Results
from zerosum.probe.rules.again import leaves as tensors_of
from zerosum.probe.rules.norm import rms_norm_by_parts
from zerosum.tokens.cut import follows, leaves, position_rows, row_wise, separators
from zerosum.tokens.memory import SavedTensors, distance, placeholder
from zsl_kernels.types import sum_dtype

Direction = Callable[[list[str]], Tensor | None]
_SUM = Loss("sum")
_RMS_NORMS = {F.rms_norm, torch.rms_norm}
_OTHERWISE = "token_report: expected a model that computes every sequence, and every beginning of one, by the same operations"


@dataclass(frozen=True, eq=False)
class SharedLayout(Layout):
    """Of an activation of one sequence, whose gradients come for several examples at once: all rows are every example's."""

    def rows(self, x: Tensor) -> Tensor:
        x = self._of_examples(x)
        return x.reshape(len(x), -1, x.shape[-1]).expand(self.examples, -1, -1)

    def slice(self, x: Tensor, mine: slice) -> tuple[Tensor, None]:
        return self.rows(x[mine]), None

    def is_diagonal(self, shape: torch.Size, ndim: int) -> bool:
        return False

    def per_example(self, g: Tensor, shape: torch.Size) -> Tensor:
        lead = (1,) * (g.ndim - len(shape)) + tuple(shape)
        g = self._of_examples(g)
        return g.sum_to_size((len(g), *lead)).reshape(len(g), *shape).expand(self.examples, *shape)

    @staticmethod
    def _of_examples(x: Tensor) -> Tensor:
        """(E, *x.shape) of a tensor that vmap has batched, and (1, *x.shape) of another."""
        f = torch._C._functorch
        if not f.is_batchedtensor(x):
            return x.unsqueeze(0)
        return f.get_unwrapped(x).movedim(f.maybe_get_bdim(x), 0)


class SharedSequence(Prover):
    """One sequence runs forward, and ``count`` examples, losses of some of its tokens, run backward."""

    def __init__(self) -> None:
        super().__init__(loss=_SUM, structures=Structures())
        self.count = 1

    def attribute(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None]) -> Proof:
        layout = SharedLayout(self.count)
        for site in capture.sites:
            site.layout = layout
        self.structures.passes += 1
        # Outside of vmap: what a use leaves is not batched any more.
        return Proof(Pass(self.structures.passes, self.count, unbatched=temporarily_pop_interpreter_stack))


def _rms_norm(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if torch.is_autocast_enabled(input.device.type):
        with torch.no_grad():
            input = input.to(func(input, *args, **kwargs).dtype)
    return rms_norm_by_parts(input, *args, **kwargs)


class Place(NamedTuple):
    """Which of the activations of a forward pass: the ``number``-th (N, T, …) or (N·T, …) of a function and a shape. What depends
    on the data, like the rows that reach an expert, is of other shapes and does not count."""

    name: str
    rest: tuple[int, ...]
    number: int


@dataclass(frozen=True)
class Cut:
    """Where the activation is made, and which parameters lie behind it alone (``tail``), or on both sides (``tied``)."""

    place: Place
    tail: frozenset[int]
    tied: frozenset[int]


@dataclass(frozen=True)
class Subject:
    """What all passes of a report are of.

    Attributes:
        ignores: whether tokens without a target are among those that come.
        kept_on: the device of the sums; None for the weights' own.
    """

    model: nn.Module
    losses: Losses
    cut: Cut
    ignores: bool = False
    kept_on: torch.device | None = None

    def capture(self, prover: Prover, direction: Direction, kind: type[_Kept]) -> TokenCapture:
        capture = TokenCapture(self.model, prover, direction, kind, self.cut)
        capture.ignores = self.ignores
        for t in capture.parameters:
            assert isinstance(t, _Kept)
            t.kept_on = self.kept_on
        return capture


class AtCut(NamedTuple):
    """The activation at the cut in one forward pass. ``sizes`` (N·T,) are the norms of its rows, by which it is known again."""

    edge: GradientEdge
    shape: torch.Size
    sizes: Tensor


class _Reached(BaseException):
    """Leaves the model at the cut. (No exception of the model's own, which it might catch.)"""


class TokenCapture(Capture):
    """A capture that also notes which nodes of the graph made activations, and finds the one at the cut."""

    def __init__(
        self,
        model: nn.Module,
        prover: Prover,
        direction: Direction,
        parameter_type: type[ParameterProbe] = ParameterProbe,
        cut: Cut | None = None,
    ) -> None:
        super().__init__(model, prover=prover, structures=prover.structures, direction=direction, parameter_type=parameter_type)
        if isinstance(prover, SharedSequence):
            self.inseparable = "the examples are tokens of one sequence"
        self._place = None if cut is None else cut.place
        self._stops = False
        self.activations: dict[Node, tuple[torch.Size, Place]] = {}
        self.cut: AtCut | None = None
        self._shape = torch.Size()
        self._seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.eps = 0.0  # the unit roundoff of the least precise activation
        self.ignores = False  # whether tokens without a target are among those that come

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self._stops and func in _RMS_NORMS and not self._touches((*args, *(kwargs or {}).values())):
            # A GPU's fused one has no vectorized derivative. (With a weight that is measured its rule takes the derivative.)
            result: Any = _rms_norm(func, *args, **(kwargs or {}))
        else:
            result = super().__torch_function__(func, types, args, kwargs)
        if not self._depth and torch.is_grad_enabled():
            for x in tensors_of(result):
                if isinstance(x, Tensor) and x.grad_fn is not None and self.ref(x) is None:
                    self._note(getattr(func, "__name__", ""), x)
        return result

    def _note(self, name: str, x: Tensor) -> None:
        assert x.grad_fn is not None
        self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        lead = 2 if x.shape[:2] == self._shape else 1 if x.ndim and x.shape[0] == self._shape.numel() else 0
        key = (name, tuple(x.shape[lead:])) if lead else ("", ())
        self._seen[key] += 1
        place = Place(*key, self._seen[key])
        self.activations[x.grad_fn] = (x.shape, place)
        if place == self._place:
            rows = position_rows(x.detach(), self._shape)
            assert rows is not None
            self.cut = AtCut(get_gradient_edge(x), x.shape, torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))
            if self._stops:
                raise _Reached

    def release(self) -> None:
        # The graph's nodes hold the capture: autograd's part of such a circle is invisible to the garbage collector.
        self.cut = None
        self.activations.clear()
        super().release()

    def add_up(self) -> None:
        """Not after each pass: the sums over coordinates are those of all of them."""

    def forget_pass(self) -> None:
        """Goes on as if a forward pass without a backward pass had not been."""
        self._begin_epoch()

    def forward_to_cut(self, losses: Losses, x: Tensor, y: Tensor) -> AtCut:
        """What :meth:`forward` computes before the cut, without the rest: a head is much of a small model. Fused attention has no
        vectorized derivative; written out, it has."""
        self._stops = True
        try:
            with sdpa_kernel(SDPBackend.MATH):
                self.forward(losses, x, y)
        except _Reached:
            pass
        finally:
            self._stops = False
        assert self.cut is not None  # forward raises where there is none
        return self.cut

    def forward(self, losses: Losses, x: Tensor, y: Tensor) -> Tensor:
        """(N, T) losses, with the nodes of activations on the way."""
        self.activations.clear()
        self._seen.clear()
        self._shape, self.cut = x.shape, None
        values = losses(self.model, x, y)
        if not isinstance(values, Tensor) or values.shape != x.shape:
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"losses: expected one for each token, {tuple(x.shape)}, got {got}")
        if self.ignores:
            # Whatever the loss of a token without a target is, it is no example's.
            with torch._C.DisableTorchFunction():
                values = values.masked_fill(y == IGNORED, 0)
        if not values.isfinite().all():
            raise ValueError("losses: expected finite numbers, got infinities or NaN")
        if values.grad_fn is None:
            raise ValueError("losses: expected a function that autograd can differentiate, got a result without a graph")
        if self._place is not None and self.cut is None:
            raise RuntimeError(_OTHERWISE)
        return values


def find_cut(model: nn.Module, losses: Losses, x: Tensor, y: Tensor, generator: torch.Generator) -> Cut:
    """The deepest separator whose gradient is row-wise, and behind which the probe can tell what each row does."""
    capture = TokenCapture(model, _positions(), _no_direction)
    capture.start()
    try:
        with disable_saved_tensors_hooks(
            "token_report: the model hands its activations to a checkpoint or an offload, which cannot take part in backward "
            "passes of many tokens at once; expected a model without (`memory` bounds what they take)"
        ):
            values = capture.forward(losses, x, y)
    finally:
        capture.stop()
    assert values.grad_fn is not None
    parameters = [t.parameter for t in capture.parameters]
    plain = torch.autograd.grad(values.sum(dtype=torch.float64), parameters, retain_graph=True, allow_unused=True)
    edges = list(separators(values, capture.activations))
    signs = torch.randint(2, values.shape, generator=generator).mul(2).sub(1).to(values.device)
    apart = row_wise(values, edges, signs)
    candidates = edges[: apart.index(False) if False in apart else None]
    cuts = []
    for edge in reversed(candidates):
        before, behind = (x & {id(p) for p in parameters} for x in (leaves(edge.node), leaves(values.grad_fn, stop=edge.node)))
        cuts.append(Cut(capture.activations[edge.node][1], frozenset(behind - before), frozenset(behind & before)))
    capture.activations.clear()
    capture.release()
    for cut in cuts:
        tail = TailPass(Subject(model, losses, cut), _no_direction)
        tail.run(x, y)
        whole = tail.covers() and tail.adds_up(parameters, plain)
        tail.close()
        if whole:
            return cut
    raise RuntimeError("losses: expected a row-wise function of (N, T) tokens; not even the losses' own gradient is")


def rounding(eps: float, size: float, largest: float) -> float:
    """How much two ways to one sum of this size may differ, where the largest of the model's sums are as large as that: what
    vanishes in exact arithmetic is rounding noise of those."""
    return min(6e-2, 1e4 * eps) * size + 10 * eps * largest


def _positions() -> Prover:
    """Every position is an example."""
    return Prover(positions=True, loss=_SUM, structures=Structures())


def _no_direction(names: list[str]) -> None:
    return None


class _Kept(ParameterProbe):
    """A weight whose sums are kept on the device ``kept_on``, which may be another than its own."""

    immediate = False
    kept_on: torch.device | None = None

    def may_read(self, x: Tensor) -> bool:
        return True  # what is not covered is measured in another way

    def _request(self) -> Request:
        asked = super()._request()
        if asked.direction is not None:
            asked.direction = asked.direction.to(self.parameter.device)
        return asked


class _TailParameter(_Kept):
    """Measures what lies behind the cut; of a tied weight it keeps the uses there."""

    tied = False
    uses: Contributions | None = None

    def take_results(self, results: Results) -> None:
        if self.kept_on is not None and self.kept_on != self.parameter.device:
            sums = densified(results.sums, self.parameter.shape[0] if self.parameter.ndim else 1)
            for name in WEIGHT_SHAPED:
                setattr(sums, name, getattr(sums, name).to(self.kept_on))
            results.sums = sums
            results.hold(sums.grad_sum)
        super().take_results(results)

    def end_pass(self) -> None:
        # The backward pass went no further than the cut: what is left with a tied weight are its uses in the tail.
        if self.tied:
            self.uses = self.take()
            if self._late is not None:
                self.uses = self._late if self.uses is None else self.uses
                if self.uses is not self._late:
                    self.uses.extend(self._late)
        super().end_pass()

    def on_gradient(self, grad: Tensor) -> None:
        if not self.tied:
            super().on_gradient(grad)


class TailPass:
    """Ordinary passes over sequences: the gradient's sum of every weight, the tail's statistics, and each token's row at the cut.

    ``sums`` are Σ_i g_i over all tokens so far of the weights before the cut, by the parameter's id, and ``signed`` Σ_i ε_i g_i
    of all weights where signs were given, both on the subject's ``kept_on``; ``tracked`` are the tail's parameters. With
    ``measure=False`` it only looks for the uses of tied weights.
    """

    def __init__(self, subject: Subject, direction: Direction, measure: bool = True) -> None:
        self._losses, self._cut, self._kept_on = subject.losses, subject.cut, subject.kept_on
        self._measures = measure
        self._capture = subject.capture(_positions(), direction, _TailParameter)
        self.sums: dict[int, Tensor] = {}
        self.signed: dict[int, Tensor] = {}
        self.strayed: set[int] = set()  # parameters that lie on another side of the cut than in the first sequence
        self.tracked: list[_TailParameter] = []
        self._others: list[_TailParameter] = []
        for t in self._capture.parameters:
            assert isinstance(t, _TailParameter)
            t.tied, behind = id(t.parameter) in self._cut.tied, id(t.parameter) in self._cut.tail
            (self.tracked if behind else self._others).append(t)
            if not (t.tied or (measure and behind)):
                t.refuse("not asked for")

    def run(
        self, x: Tensor, y: Tensor, signs: Tensor | None = None, saved: SavedTensors | None = None
    ) -> tuple[Tensor, Tensor, dict[int, Contributions]]:
        """The sizes (N·T,) of what is at the cut for sequences (N, T), its gradient's rows (N·T, F), and the uses of tied weights
        in the tail.

        ``signs`` (N, T) are of the losses for ``signed``. ``saved`` counts what is kept for the backward passes.
        """
        capture = self._capture
        capture.start()
        try:
            with nullcontext() if saved is None else saved.watch():
                values = capture.forward(self._losses, x, y)
            cut = capture.cut
            assert cut is not None
            self._look_behind(values, cut.edge)
            total = values.sum(dtype=torch.float64)
            inputs: list[Any] = [*(t.parameter for t in self.tracked), cut.edge]
            with warnings.catch_warnings(), _taking(self.tracked, _drop):
                # Of a tail that is none: :meth:`covers` tells.
                warnings.filterwarnings("ignore", "zerosum.Probe: the examples are coupled", UserWarning)
                *_, at_cut = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
        finally:
            capture.stop()
            capture.activations.clear()
            capture.cut = None
        everything = [] if signs is None else capture.parameters
        if signs is None:
            signs = (torch.arange(x.shape[1], device=x.device) % 2 * 2 - 1).expand(x.shape)
        inputs = [cut.edge, *(t.parameter for t in everything)]
        with _taking(everything, partial(self._add, self.signed)):
            at_cut_signed, *_ = torch.autograd.grad(values, inputs, signs.to(values.dtype), retain_graph=True, allow_unused=True)
        if not follows(at_cut, at_cut_signed, signs):
            raise RuntimeError(_OTHERWISE)
        uses = {id(t.parameter): t.uses for t in self._others if t.uses}
        others = [t.parameter for t in self._others]
        if others and self._measures:
            with _taking(self._others, partial(self._add, self.sums)):
                torch.autograd.grad([cut.edge], others, [at_cut], allow_unused=True)
            for t in self._others:
                if t.uses:
                    with torch.no_grad():
                        self._add(self.sums, t, t.uses.grad_sum(t.parameter))
        for t in self._others:
            t.uses = None
        rows = position_rows(at_cut, values.shape)
        assert rows is not None
        return cut.sizes, rows.detach(), uses  # (the cut itself would hold the graph)

    def _add(self, sums: dict[int, Tensor], t: ParameterProbe, grad: Tensor) -> None:
        before = sums.get(id(t.parameter))
        if before is None:
            # A copy: several weights, and the results, may have one gradient's memory.
            sums[id(t.parameter)] = grad.detach().to(self._kept_on or grad.device, copy=True)
        else:
            before.add_(grad.detach().to(before.device))

    def grad_sum(self, t: ParameterProbe) -> Tensor | None:
        """Σ_i g_i of any weight, as far as it was measured."""
        if id(t.parameter) not in self._cut.tail:
            return self.sums.get(id(t.parameter))
        return None if t.results is None else t.results.sums.spread(t.results.grad_sum, t.parameter.shape).view(t.parameter.shape)

    def _look_behind(self, values: Tensor, edge: GradientEdge) -> None:
        """Whether the cut of this sequence has the same weights behind it."""
        assert values.grad_fn is not None
        mine = {id(t.parameter) for t in self._capture.parameters}
        before, behind = leaves(edge.node) & mine, leaves(values.grad_fn, stop=edge.node) & mine
        both, cut = behind & before, self._cut
        self.strayed |= (behind - before - cut.tail) | (both - cut.tied) | (before & cut.tail)

    @property
    def eps(self) -> float:
        return self._capture.eps

    def covers(self) -> bool:
        """Whether the probe could tell each row's part of all that is used in the tail."""
        used = [*self.finish(), *(t for t in self._others if t.tied)]
        return not any(t.problem for t in used)

    def adds_up(self, parameters: list[nn.Parameter], gradients: Sequence[Tensor | None]) -> bool:
        """Whether the sums are these gradients: all that leads to a weight passes through the cut, or lies behind it."""
        probes: dict[int, ParameterProbe] = {id(t.parameter): t for t in self._capture.parameters}
        largest = max((distance(g) for g in gradients if g is not None), default=0.0)
        for p, g in zip(parameters, gradients, strict=True):
            found = [x for x in (self.grad_sum(probes[id(p)]), g) if x is not None]
            if found:
                size = max(map(distance, found))
                error = distance(*found) if len(found) > 1 else size
                if not error <= rounding(self.eps, size, largest):
                    return False
        return True

    def close(self) -> None:
        self._capture.release()

    def finish(self, examples: Tensor | None = None) -> list[_TailParameter]:
        """The tail's parameters with their results. ``examples`` is a mask of all tokens; the gradients of the others are zero."""
        with torch.no_grad():
            for t in self.tracked:
                t.finish()
                if t.results is not None:
                    sums = t.results.sums
                    t.results.finish(self._capture.passes)
                    for name in SCALARS if examples is not None else ():
                        if (value := getattr(sums, name)) is not None:
                            setattr(sums, name, value[examples])
        return self.tracked


def _drop(t: ParameterProbe, grad: Tensor) -> None:
    """The results have it."""


@contextmanager
def _taking(parameters: Iterable[ParameterProbe], take: Callable[[ParameterProbe, Tensor], None]) -> Iterator[None]:
    """In which each weight's gradient goes to ``take`` as soon as it is complete. What autograd then returns is a placeholder: it
    would hold the gradients of all weights together."""

    def hook(t: ParameterProbe, grad: Tensor) -> Tensor:
        grad = grad.to_dense() if grad.is_sparse else grad
        with torch.no_grad(), torch._C.DisableTorchFunction():
            take(t, grad)
            return placeholder(grad)

    with ExitStack() as stack:
        for t in parameters:
            stack.callback(t.parameter.register_hook(partial(hook, t)).remove)
        yield


@dataclass
class Accumulated:
    """The sums of one weight over the chunks so far, Σ c_i g_i, Σ c_i |g_i| and Σ c_i² g_i² with the examples' factors c, and the
    examples' own scalars."""

    grad_sum: Tensor | None  # where it is asked for
    abs_sum: Tensor
    sq_sum: Tensor
    scalars: dict[str, list[Tensor]]

    @classmethod
    def zeros(cls, like: Tensor, device: torch.device | None, grad_sum: bool) -> Accumulated:
        dtype, device = sum_dtype(like.dtype), device or like.device
        size, square, *total = (torch.zeros(like.shape, dtype=dtype, device=device) for _ in range(2 + grad_sum))
        return cls(total[0] if total else None, size, square, {})

    def add(self, sums: Sums, factors: Tensor) -> None:
        for name in WEIGHT_SHAPED:
            total, part = getattr(self, name), getattr(sums, name)
            if total is None:
                continue
            if sums.rows is None:
                total.add_(part.view(total.shape).to(total.device))
            else:
                total.index_add_(0, sums.rows.clamp(min=0).to(total.device), part.to(total.device))  # rows of -1 are zeros
        for name, power in SCALARS.items():
            if (value := getattr(sums, name)) is not None:
                self.scalars.setdefault(name, []).append(value.double() / factors.double() ** power)

    def variance(self, draws: int) -> Tensor:
        """Of ``abs_sum``, where the examples are that many draws and their factors the draws' weights."""
        return self.abs_sum.square().div_(-draws).add_(self.sq_sum).clamp_(min=0).mul_(draws / (draws - 1))


class ChunkParameter(_Kept):
    """Adds the chunks up, Σ g_i only where that is ``checked``. ``tail`` are this chunk's uses behind the cut, of a tied weight."""

    checked = True
    total: Accumulated | None = None
    tail: Contributions | None = None
    factors: Tensor
    _added: Pass | None = None  # the last backward pass whose sums are in ``total``

    def _finish(self, contributions: Contributions) -> Sums:
        if self._added is self.context.current:
            self.refuse("the backward pass computed its gradient twice")
        self._added = self.context.current
        if self.tail is not None:
            contributions.extend(self.tail)
        sums = contributions.combine(self.parameter, self._request())
        if self.total is None:
            self.total = Accumulated.zeros(self.parameter, self.kept_on, self.checked)
        self.total.add(sums, self.factors)
        return sums

    def gradient(self, contributions: Contributions) -> Tensor:
        if self.refused or self._waits():
            return super().gradient(contributions)
        self._finish(contributions)
        # The chunk's sums have been added: autograd is given nothing to hold, and :meth:`on_gradient` sees whether more came.
        grad = placeholder(self.parameter)
        self._fused = grad.data_ptr(), grad._version
        return grad

    def on_gradient(self, grad: Tensor) -> None:
        # What uses leave is one sum for all examples; one for each of them came by another way.
        if not torch._C._functorch.is_batchedtensor(grad):
            super().on_gradient(grad)
        elif not self.problem:
            self.refuse(UNSEEN)

    def _compare(self, sums: Sums, grad: Tensor, eps: float, plain: Tensor | None) -> None:
        if self.tail is None:
            super()._compare(sums, grad, eps, plain)


class ChunkPass:
    """Takes chunks of tokens back from the cut, and adds up what lies before it."""

    def __init__(self, subject: Subject, direction: Direction, checked: bool = True) -> None:
        self._losses = subject.losses
        self._prover = SharedSequence()
        self._capture = subject.capture(self._prover, direction, ChunkParameter)
        self.tracked: list[ChunkParameter] = []
        for t in self._capture.parameters:
            assert isinstance(t, ChunkParameter)
            t.checked = checked
            if id(t.parameter) in subject.cut.tail:
                t.refuse("the tail's")
            else:
                self.tracked.append(t)

    def weigh(self, x: Tensor, y: Tensor) -> SavedTensors:
        """What the forward pass of the sequence (1, T) keeps."""
        saved = SavedTensors(self._capture.model)
        self._capture.start()
        try:
            with saved.watch():
                self._capture.forward_to_cut(self._losses, x, y)
        finally:
            self._capture.stop()
            self._capture.activations.clear()
            self._capture.cut = None
        self._capture.forget_pass()
        return saved

    def run(
        self, x: Tensor, y: Tensor, tokens: Tensor, rows: Tensor, factors: Tensor, tail: Mapping[int, Contributions], sizes: Tensor
    ) -> None:
        """One chunk of the sequence x (1, T): ``tokens`` (C,) are its positions, ``rows`` (C, F) their gradients at the cut,
        ``factors`` (C,) what each example is multiplied by, ``tail`` the uses of tied weights there, ``sizes`` (T,) those of the
        activation at the cut in the other pass."""
        capture, C = self._capture, len(tokens)
        self._prover.count = C
        for t in self.tracked:
            t.factors = factors
            t.tail = tail.get(id(t.parameter))
        capture.start()
        try:
            edge, shape, found = capture.forward_to_cut(self._losses, x, y)
            if not torch.allclose(found, sizes, rtol=min(0.1, 1e3 * capture.eps), atol=0):
                raise RuntimeError(_OTHERWISE)
            cotangents = rows.new_zeros(C, x.numel(), rows.shape[1])
            cotangents[torch.arange(C, device=rows.device), tokens] = rows * factors.to(rows.dtype).unsqueeze(1)
            parameters = [t.parameter for t in self.tracked]

            def backward(cotangent: Tensor) -> Tensor:
                torch.autograd.grad(edge, parameters, cotangent, allow_unused=True)
                return cotangent.new_zeros(())

            torch.func.vmap(backward)(cotangents.view(C, *shape))
        finally:
            capture.stop()
            capture.activations.clear()
            capture.cut = None

    def close(self) -> None:
        self._capture.release()

    def take_scalars(self) -> dict[str, Tensor]:
        """The examples' scalars since the last time, each a total over the parameters that have it."""
        found: dict[str, Tensor] = {}
        for t in self.tracked:
            if t.total is not None and not t.problem:
                for name, parts in t.total.scalars.items():
                    value = torch.cat(parts)
                    found[name] = found[name] + value if name in found else value
                t.total.scalars.clear()
        return found
