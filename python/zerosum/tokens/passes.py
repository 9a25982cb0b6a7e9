"""Runs the two passes over a sequence: one over all tokens up to the cut, and one over a chunk of tokens from the cut back.

The *tail* is the part of the model after the cut (:mod:`zerosum.tokens.cut`). One ordinary backward pass from all losses gives the
sum of every weight's gradient, the statistics of the tail's weights, whose examples are single rows, and each token's row at the
cut.

The second pass runs a *chunk* of C tokens of one sequence backward at once. The sequence runs forward once, up to the chunk's last
token, and a vectorized backward pass starts from C rows. The C examples therefore share a weight's inputs (T, K), and their
gradients (C, T, O) and the inputs form one wide product for the kernel.
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
    """The layout of an activation of one sequence whose gradients come for several examples at once: every example has all rows."""

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
        """Return (E, *x.shape) for a tensor that vmap has batched, and (1, *x.shape) for any other."""
        f = torch._C._functorch
        if not f.is_batchedtensor(x):
            return x.unsqueeze(0)
        return f.get_unwrapped(x).movedim(f.maybe_get_bdim(x), 0)


class SharedSequence(Prover):
    """Attributes a pass in which one sequence runs forward, and ``count`` examples, the losses of some tokens, run backward."""

    def __init__(self) -> None:
        super().__init__(loss=_SUM, structures=Structures())
        self.count = 1

    def attribute(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None]) -> Proof:
        layout = SharedLayout(self.count)
        for site in capture.sites:
            site.layout = layout
        self.structures.passes += 1
        # The statistics are computed outside vmap, because what a use leaves is no longer batched.
        return Proof(Pass(self.structures.passes, self.count, unbatched=temporarily_pop_interpreter_stack))


def _rms_norm(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if torch.is_autocast_enabled(input.device.type):
        with torch.no_grad():
            input = input.to(func(input, *args, **kwargs).dtype)
    return rms_norm_by_parts(input, *args, **kwargs)


class Place(NamedTuple):
    """Identifies an activation of a forward pass: the ``number``-th (N, T, …) or (N·T, …) of a function and a shape.

    Activations of data-dependent shapes, such as the rows that reach an expert, do not count.
    """

    name: str
    rest: tuple[int, ...]
    number: int


@dataclass(frozen=True)
class Cut:
    """Where the activation at the cut is made, and which parameters are used after it only (``tail``) or on both sides
    (``tied``)."""

    place: Place
    tail: frozenset[int]
    tied: frozenset[int]


@dataclass(frozen=True)
class Subject:
    """What all passes of a report share.

    Attributes:
        ignores: whether some tokens have no target.
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
    """The activation at the cut in one forward pass. The norms of its rows, ``sizes`` (N·T,), identify it in another pass."""

    edge: GradientEdge
    shape: torch.Size
    sizes: Tensor


class _Reached(BaseException):
    """Leaves the model at the cut. It is a BaseException so that the model does not catch it."""


class TokenCapture(Capture):
    """Captures a pass, notes which nodes of the graph made activations, and finds the activation at the cut."""

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
        self.ignores = False  # whether some tokens have no target

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self._stops and func in _RMS_NORMS and not self._touches((*args, *(kwargs or {}).values())):
            # A GPU's fused RMS norm has no vectorized derivative. (For a measured weight, its rule computes the derivative.)
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
        # The graph's nodes refer to the capture, and the garbage collector cannot see autograd's part of such a cycle.
        self.cut = None
        self.activations.clear()
        super().release()

    def add_up(self) -> None:
        """Do nothing after a pass: the sums over coordinates are computed once, for all passes."""

    def forget_pass(self) -> None:
        """Forget a forward pass that had no backward pass."""
        self._begin_epoch()

    def forward_to_cut(self, losses: Losses, x: Tensor, y: Tensor) -> AtCut:
        """Run :meth:`forward` only up to the cut, because the head is a large part of a small model. It disables fused attention,
        which has no vectorized derivative."""
        self._stops = True
        try:
            with sdpa_kernel(SDPBackend.MATH):
                self.forward(losses, x, y)
        except _Reached:
            pass
        finally:
            self._stops = False
        assert self.cut is not None  # `forward` raises an error if there is no cut
        return self.cut

    def forward(self, losses: Losses, x: Tensor, y: Tensor) -> Tensor:
        """Compute the (N, T) losses, and note the nodes of activations."""
        self.activations.clear()
        self._seen.clear()
        self._shape, self.cut = x.shape, None
        values = losses(self.model, x, y)
        if not isinstance(values, Tensor) or values.shape != x.shape:
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"losses: expected one loss per token, shape {tuple(x.shape)}, got {got}")
        if self.ignores:
            # The loss of a token without a target does not count, whatever its value.
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
    """Find the deepest tensor that separates the graph, has a row-wise gradient, and after which the probe covers every weight."""
    capture = TokenCapture(model, _positions(), _no_direction)
    capture.start()
    try:
        with disable_saved_tensors_hooks(
            "token_report: the model uses activation checkpointing or offloading, which does not support backward passes of many "
            "tokens at once; disable it (`memory` limits how much activations take)"
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
    raise RuntimeError(
        "losses: expected each token's loss to be computed from its own row, but the losses themselves are not row-wise"
    )


def rounding(eps: float, size: float, largest: float) -> float:
    """Return how much two computations of one sum of this size may differ. ``largest`` is the size of the model's largest sum:
    a sum that vanishes in exact arithmetic is rounding noise of that one."""
    return min(6e-2, 1e4 * eps) * size + 10 * eps * largest


def _positions() -> Prover:
    """Return a prover for which every position is an example."""
    return Prover(positions=True, loss=_SUM, structures=Structures())


def _no_direction(names: list[str]) -> None:
    return None


class _Kept(ParameterProbe):
    """Probes a weight whose sums are kept on the device ``kept_on``, which may differ from its own."""

    immediate = False
    kept_on: torch.device | None = None

    def may_read(self, x: Tensor) -> bool:
        return True  # what is not covered is measured by another pass

    def _request(self) -> Request:
        asked = super()._request()
        if asked.direction is not None:
            asked.direction = asked.direction.to(self.parameter.device)
        return asked


class _TailParameter(_Kept):
    """Probes a weight after the cut. For a tied weight it keeps the uses there."""

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
        # The backward pass ended at the cut, so a tied weight now holds exactly its uses in the tail.
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
    """Runs ordinary passes over sequences: computes every weight's gradient sum, the tail's statistics and each token's row at the
    cut.

    ``sums`` are Σ_i g_i of the weights before the cut over all tokens so far, by the parameter's id. ``signed`` are Σ_i ε_i g_i of
    all weights, if signs were given. Both are on the subject's ``kept_on``. ``tracked`` are the tail's parameters. With
    ``measure=False``, the pass only collects the uses of tied weights.
    """

    def __init__(self, subject: Subject, direction: Direction, measure: bool = True) -> None:
        self._losses, self._cut, self._kept_on = subject.losses, subject.cut, subject.kept_on
        self._measures = measure
        self._capture = subject.capture(_positions(), direction, _TailParameter)
        self.sums: dict[int, Tensor] = {}
        self.signed: dict[int, Tensor] = {}
        self.strayed: set[int] = set()  # parameters on a different side of the cut than in the first sequence
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
        """Run sequences (N, T). Return the sizes (N·T,) and the gradient's rows (N·T, F) at the cut, and the uses of tied weights
        in the tail.

        ``signs`` (N, T) are the losses' signs for ``signed``. ``saved`` counts what is kept for the backward passes.
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
                # The warning is about a tail that does not keep rows separate, which `covers` reports.
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
        return cut.sizes, rows.detach(), uses  # the cut itself would keep the graph alive

    def _add(self, sums: dict[int, Tensor], t: ParameterProbe, grad: Tensor) -> None:
        before = sums.get(id(t.parameter))
        if before is None:
            # A copy, because several weights, and the results, may share one gradient's memory.
            sums[id(t.parameter)] = grad.detach().to(self._kept_on or grad.device, copy=True)
        else:
            before.add_(grad.detach().to(before.device))

    def grad_sum(self, t: ParameterProbe) -> Tensor | None:
        """Return Σ_i g_i of any weight, as far as it was measured."""
        if id(t.parameter) not in self._cut.tail:
            return self.sums.get(id(t.parameter))
        return None if t.results is None else t.results.sums.spread(t.results.grad_sum, t.parameter.shape).view(t.parameter.shape)

    def _look_behind(self, values: Tensor, edge: GradientEdge) -> None:
        """Note parameters that are on a different side of this sequence's cut."""
        assert values.grad_fn is not None
        mine = {id(t.parameter) for t in self._capture.parameters}
        before, behind = leaves(edge.node) & mine, leaves(values.grad_fn, stop=edge.node) & mine
        both, cut = behind & before, self._cut
        self.strayed |= (behind - before - cut.tail) | (both - cut.tied) | (before & cut.tail)

    @property
    def eps(self) -> float:
        return self._capture.eps

    def covers(self) -> bool:
        """Whether the probe attributed every use of a weight in the tail to rows."""
        used = [*self.finish(), *(t for t in self._others if t.tied)]
        return not any(t.problem for t in used)

    def adds_up(self, parameters: list[nn.Parameter], gradients: Sequence[Tensor | None]) -> bool:
        """Whether the sums equal these gradients, that is, whether every path to a weight passes through the cut or starts after
        it."""
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
        """Return the tail's parameters with their results. ``examples`` masks the tokens; the others have zero gradients."""
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
    """Do nothing with a gradient that the results already contain."""


@contextmanager
def _taking(parameters: Iterable[ParameterProbe], take: Callable[[ParameterProbe, Tensor], None]) -> Iterator[None]:
    """Pass each weight's gradient to ``take`` as soon as it is complete. autograd returns placeholders instead, so that it need
    not hold the gradients of all weights together."""

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
    examples' scalars."""

    grad_sum: Tensor | None  # None if it is not needed
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
        """Estimate the variance of ``abs_sum``, for examples that are this many draws, with the draws' weights as factors."""
        return self.abs_sum.square().div_(-draws).add_(self.sq_sum).clamp_(min=0).mul_(draws / (draws - 1))


class ChunkParameter(_Kept):
    """Adds up the chunks of a weight, and Σ g_i only if ``checked``. ``tail`` are this chunk's uses after the cut, of a tied
    weight."""

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
        # The chunk's sums were added. autograd gets a placeholder, and `on_gradient` checks whether more gradient arrives.
        grad = placeholder(self.parameter)
        self._fused = grad.data_ptr(), grad._version
        return grad

    def on_gradient(self, grad: Tensor) -> None:
        # Covered uses leave one sum for all examples. A batched gradient, one per example, came from a use that was not observed.
        if not torch._C._functorch.is_batchedtensor(grad):
            super().on_gradient(grad)
        elif not self.problem:
            self.refuse(UNSEEN)

    def _compare(self, sums: Sums, grad: Tensor, eps: float, plain: Tensor | None) -> None:
        if self.tail is None:
            super()._compare(sums, grad, eps, plain)


class ChunkPass:
    """Runs chunks of tokens backward from the cut, and adds up the statistics of the weights before it."""

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
        """Measure what the forward pass of the sequence (1, T) keeps."""
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
        """Run one chunk of the sequence x (1, T).

        ``tokens`` (C,) are its positions, ``rows`` (C, F) their gradients at the cut, ``factors`` (C,) the examples' factors,
        ``tail`` the uses of tied weights in the tail, and ``sizes`` (T,) the sizes of the activation at the cut in the other pass.
        """
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
        """Return and clear the examples' scalars since the last call, each summed over the parameters that have it."""
        found: dict[str, Tensor] = {}
        for t in self.tracked:
            if t.total is not None and not t.problem:
                for name, parts in t.total.scalars.items():
                    value = torch.cat(parts)
                    found[name] = found[name] + value if name in found else value
                t.total.scalars.clear()
        return found
