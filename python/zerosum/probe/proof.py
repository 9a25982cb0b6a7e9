"""Proves, once for each structure of a step, which example the rows at every use of a weight belong to, and stores the result.

A *structure* is the sequence of uses with their shapes and dtypes, and the operations at the root of the backward pass. On its
first pass, :mod:`~zerosum.probe.attribution` finds the layouts of its rows before the backward pass. Later passes look them up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn.parallel import DistributedDataParallel

from zerosum.distributed import shards_of
from zerosum.probe import attribution
from zerosum.probe.attribution import MIXED, UNREACHED, Cut, Signature, along, find_cut, layout_of, shape_of
from zerosum.probe.compiled import UNPROVED, CompiledSteps
from zerosum.probe.layout import Layout
from zerosum.probe.loss_scale import Loss
from zerosum.probe.loss_tail import TailReader, Term, follow_path
from zerosum.probe.packed import End, Packed, Place, starts
from zerosum.probe.parameters import UNSEEN, ParameterProbe
from zerosum.probe.results import Pass
from zerosum.probe.rules import Known
from zerosum.probe.rules.site import Phase, Site
from zsl_kernels.weight_uses import eager as uses
from zsl_kernels.weight_uses.eager import State

if TYPE_CHECKING:
    from zerosum.probe.capture import Capture

MIXED_CHECKPOINT = "a reentrant checkpoint's result has rows of several examples, or in no regular order"
ANOTHER_END = "its step uses weights like a proved step, but has a different loss; the probe proves it when it occurs again"
BESIDE_CHECKPOINT = "its gradient comes partly through a reentrant checkpoint, and partly around it"
PADDING = "rows that belong to no example have a loss: ignore their targets (-100), or assign them to an example"
STRANGE = "a row's loss depends on rows that zerosum.example_ids assigns to other examples"
REENTRANT = "CheckpointFunctionBackward"  # torch's node, which does not support torch.autograd.grad
Step = tuple[GradientEdge, tuple[int, ...], tuple[str, ...]]  # an edge with the path to it
ATTEMPTS = 4  # the number of cuts to try, each closer to the model


@dataclass
class Named:
    """The attribution of one use's rows."""

    layout: Layout | None
    problem: str = ""
    mixed: bool = False
    settled: bool = True
    reached: bool = True
    names: Tensor | None = None
    bypassed: bool = False  # whether part of the loss reaches it without passing through the cut


@dataclass
class Finding:
    """A cut, and what it shows about each use."""

    cut: Cut
    examples: int
    labels: Tensor | None  # the example of each index of the cut's dimensions, if it is not the index itself
    gradients: list[Tensor]
    named: list[Named]
    coupled: str = ""  # why the computation after the cut does not keep examples separate
    passes: int = 0
    unproved: str = ""  # why the computation after the cut could not be differentiated twice
    checkpoints: dict[Node, int] = field(default_factory=dict)  # reentrant ones, with their results' example dimension, or -1
    first: bool = True  # whether it is the cut closest to the roots
    consistent: bool = True  # whether the first use has its examples in the first dimension
    orderly: bool = True  # whether the first use has its examples in regular order
    doubtful: bool = False  # whether a tensor of the cut has a dimension of the examples' number by chance
    end: End | None = None  # the packed rows that the cut has
    strange: bool = False  # whether it attributes packed rows differently than the user declared

    @property
    def reached(self) -> int:
        return sum(n.reached for n in self.named)

    @property
    def good(self) -> int:
        return sum(n.reached and not n.mixed and not n.bypassed for n in self.named)

    @property
    def perfect(self) -> bool:
        whole = bool(self.reached) and self.good == self.reached and not self.coupled and not self.cut.bypass
        return whole and not self.strange


@dataclass
class Stored:
    """What is stored about a structure."""

    examples: int
    layouts: list[Layout | None]
    problems: list[str]
    reached: list[bool]
    regular: bool  # whether its rows need not be attributed again
    labels: Tensor | None
    cut: list[tuple[tuple[int, ...], tuple[str, ...], int]]  # paths to the edges, and their axes
    terms: list[Term] | None
    refused: dict[int, str]  # reasons by the parameter's id
    hidden: set[int]  # parameters with uses that no mode sees
    passes: int
    since: int  # the pass in which it was proved
    settled: list[bool]  # whether no other layout fits a use's rows
    checkpoints: list[int]  # the example dimensions of reentrant checkpoints, in the order of :func:`_checkpoints`
    nested: bool = False  # whether some of the terms are computed from others
    used: int = 0
    unproved: str = ""
    proofs: int = 1  # the number of consecutive proofs that found these layouts
    short: tuple[int, bytes] = (0, b"")  # the number of examples, and for each use whether its rows are regular
    varies: bool = False  # whether another proof found other layouts: the order of rows depends on the data
    places: list[Place | None] | None = None  # where each use's rows are among those that the user declared
    part: int | None = None  # the part of the declared rows that the labels are; None without labels

    def __post_init__(self) -> None:
        pairs = list(zip(self.layouts, self.problems, strict=True))
        plain = [not problem and layout is not None and layout.plain for layout, problem in pairs]
        examples = {layout.examples for layout, _ in pairs if layout is not None}
        if len(examples) == 1:
            self.short = examples.pop(), bytes(plain)

    def follow(self, earlier: Stored) -> None:
        """Combine it with what an earlier proof of the same structure found."""
        self.used = earlier.used
        if self.places is not None:
            # (Layouts depend on the documents' lengths. What remains equal is the places among the declared rows.)
            assert earlier.places is not None
            self._follow(earlier, all(a == b for a, b in zip(self.places, earlier.places, strict=True)))
            return
        pairs = zip(self.layouts, earlier.layouts, self.settled, earlier.settled, strict=True)
        self._follow(earlier, all(a is None or b is None or a.same_as(b) for a, b, mine, theirs in pairs if mine and theirs))

    def _follow(self, earlier: Stored, alike: bool) -> None:
        self.proofs = earlier.proofs + 1 if alike else 1
        self.varies = earlier.varies or not alike
        self.regular = self.regular and not self.varies

    def of_rows(self, sites: Sequence[Site], packed: Packed | None) -> Stored:
        """Return the same for a pass whose packed rows hold other documents."""
        if packed is None or self.places is None:
            return self
        pairs = zip(sites, self.places, self.layouts, strict=True)
        layouts = [x if place is None else packed.layout(place, torch.Size(site.lead)) for site, place, x in pairs]
        labels = None if self.part is None else packed.part(self.part)
        return replace(self, layouts=layouts, examples=packed.examples, labels=labels)


@dataclass(eq=False)
class Proof:
    """What is known about one backward pass."""

    of: Pass
    cut: Cut | None = None
    gradients: list[Tensor] = field(default_factory=list)
    labels: Tensor | None = None
    reader: TailReader | None = None
    rows_per_example: int = 1
    apart: bool = False  # whether the examples' losses are measured in a separate backward pass
    passes: int = 0  # extra backward passes that the attribution took
    since: int = 0
    trusted: str = ""  # what was assumed without proof
    stored: Stored | None = None  # set if the step may stay compiled from now on
    roots: list[GradientEdge] = field(default_factory=list)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Collect the losses' factors while the training's backward pass runs in this context."""
        if self.reader is None:
            yield
            return
        with self.reader.reading():
            yield
        self.of.factors = self.reader.factors(self.rows_per_example)

    def release(self) -> None:
        """Drop references to the graph, whose nodes refer back to this object in ways that the garbage collector cannot see."""
        self.cut, self.gradients, self.labels, self.reader = None, [], None, None
        self.stored, self.roots = None, []

    def part(self, example: int) -> list[Tensor]:
        """Return the gradients at the cut with those of all other examples set to zero."""
        assert self.cut is not None
        out = []
        for g, axis in zip(self.gradients, self.cut.axes, strict=True):
            labels = torch.arange(g.shape[axis], device=g.device) if self.labels is None else self.labels
            out.append(torch.where(along(labels == example, axis, g).bool(), g, 0))
        return out


class Call:
    """A call that has weights among its operands. It is recognized by its function, its weights and its operands' shapes."""

    __slots__ = ("autocast", "by_rule", "device", "eps", "func", "key", "label", "names", "shapes", "short", "sources", "weights")

    def __init__(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sources: list[ParameterProbe],
        label: str,
        key: Any,
        autocast: torch.dtype | None,
    ) -> None:
        self.sources = sources
        self.autocast = autocast  # the dtype to which autocast casts the operands
        self.eps = 0.0 if autocast is None else torch.finfo(autocast).eps
        self.by_rule = False  # whether its function's rule covered it
        self.short: Short | None = None  # how to run it without Python
        weights = {id(source.parameter) for source in sources}
        self.func, self.label, self.key, self.names = func, label, key, tuple(kwargs)
        args = (*args, *kwargs.values())
        self.weights = tuple(id(x) if id(x) in weights else 0 for x in args)
        self.shapes = tuple((x.shape, x.dtype, x.requires_grad) if isinstance(x, Tensor) else x for x in args)
        self.device = next(x.device.type for x in args if isinstance(x, Tensor))

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call with these arguments repeats this one."""
        if kwargs or self.names:
            if tuple(kwargs) != self.names:
                return False
            args = (*args, *kwargs.values())
        if len(args) != len(self.weights):
            return False
        for x, weight, shape in zip(args, self.weights, self.shapes, strict=True):
            if weight:
                if id(x) != weight:
                    return False
            elif isinstance(x, Tensor):
                if type(shape) is not tuple or x.shape != shape[0] or x.dtype != shape[1] or x.requires_grad != shape[2]:
                    return False
            elif x is not shape and x != shape:
                return False
        return True


@dataclass
class Short:
    """A call that :mod:`zsl_kernels.weight_uses.eager` can run, and how it begins.

    ``native`` must not refer to this object, because the garbage collector does not see into C++.
    """

    native: Any
    operands: list[ParameterProbe | None]  # the weight and the bias, if the probe measures them
    lead: Sequence[int]  # the rows' dimensions
    covers: list[tuple[ParameterProbe, str]]
    alone: int  # as in a site

    def begin(self, capture: Capture, call: Call) -> Site:
        site = Site(capture, call.label, [None if t is None else t.ref for t in self.operands], self.lead)
        site.known, site.alone = self.native, self.alone
        capture.keys.append(call.key)
        for source, how in self.covers:
            source.used = True
            source.eps = max(source.eps, call.eps)
            source.covered_by(how)
        return site

    @classmethod
    def of(cls, state: State, known: Known, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Short | None:
        """Build it, or return None if the call cannot run without Python."""
        if uses.Call is None:
            return None
        bound, args = known.bind(*args, **kwargs), (*args, *kwargs.values())
        if len(args) > len(bound) or any(x is not y for x, y in zip(args, bound, strict=False)):
            return None  # keywords in another order, or keywords that a use does not have
        if known.kind == "layer_norm" and (len(args) < len(bound) or len(args[1]) != 1):
            return None
        if known.kind == "layer_norm" and call.autocast is not None:
            # Only devices compute it in float32, and then the use casts its input but no weight.
            weights = [x for x in args[2:4] if x is not None]
            if call.device != "cuda" or any(x.dtype != torch.float32 for x in weights):
                return None
        by_id = {id(source.parameter): source for source in call.sources}
        found = [by_id.get(id(args[place])) if place < len(args) else None for place in known.places[1:]]
        if sum(source is not None for source in found) != len(call.sources):
            return None
        names = (known.kind, f"{known.kind} bias")
        covers = [(source, how) for source, how in zip(found, names, strict=True) if source is not None]
        alone = sum(1 << k for k, source in enumerate(found) if source is not None)
        marks = [None if source is None else source.marks for source in found]
        native = uses.Call(known.kind, state, call.func, tuple(kwargs), args, marks, known.places, known.backward, call.autocast)
        return cls(native, found, args[known.places[0]].shape[:-1], covers, alone)


class Tree:
    """A model's modules, and its parameters with all their names."""

    def __init__(self, model: nn.Module) -> None:
        self.shards = shards_of(model)
        whole = {} if self.shards is None else self.shards.whole
        modules: dict[nn.Module, None] = {}
        self.names: dict[nn.Parameter, list[str]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            modules[module] = None
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                if isinstance(parameter, nn.parameter.UninitializedParameter):
                    raise ValueError(
                        f"model: expected initialized parameters, got {name!r} of a lazy module; run the model once before this"
                    )
                self.names.setdefault(whole.get((module, key), parameter), []).append(name)
        self.modules = list(modules)
        self.probes: dict[nn.Parameter, ParameterProbe] = {}  # from the blocks so far
        self._parts = self._parts_of(model)

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model still has the same modules and parameters under the same names."""
        return self._parts_of(model) == self._parts

    @staticmethod
    def _parts_of(model: nn.Module) -> list[object]:
        parts: list[object] = []
        stack: list[nn.Module] = [model]
        while stack:
            module = stack.pop()
            parts.append(id(module))
            for own in (module._parameters, module._modules):
                if own:
                    parts += own
                    parts += map(id, own.values())
            stack += [child for child in module._modules.values() if child is not None]
        return parts


class Structures:
    """What a probe keeps between blocks."""

    def __init__(self) -> None:
        self.found: dict[Any, Stored] = {}
        self.state = State()
        self.alone: dict[Any, bool] = {}  # which calls depend on weights only
        self.calls: dict[int, Call] = {}  # the calls of the last pass, by position
        self.known: dict[int, Any] = {}  # the calls among them that run without Python
        self.tree: Tree | None = None
        self.ddps: list[DistributedDataParallel] = []  # wrappers that overwrite gradients
        self.told_of_documents = False  # whether the warning about positions that restart was given
        self.told: set[int] = set()  # numbers of examples for which the warning about other numbers was given
        self.examples_second: bool | None = None  # whether the model's input has positions first; None if unknown
        self.views = False  # whether views of weights are used
        self.tracks = True  # whether to determine that in the next block
        self.compiled: CompiledSteps | None = None  # None: no step stays compiled
        self.passes = 0

    def remember(
        self,
        place: int,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        refs: Sequence[Any],
        key: Any,
        autocast: torch.dtype | None,
    ) -> None:
        """Store a call whose weights are whole parameters."""
        self.known.pop(place, None)
        weights = {id(ref.source.tensor) for ref in refs if ref.source.tensor is ref.source.parameters[0].tensor}
        operands = (*args, *kwargs.values())
        flat = all(not isinstance(x, (list, tuple)) or not any(isinstance(y, Tensor) for y in x) for x in operands)
        found = [x for x in operands if id(x) in weights]
        if flat and len(found) == len(refs):
            name = getattr(func, "__name__", str(func))
            label = f"{name} ({', '.join(t.name for t in refs[0].source.parameters)})"
            self.calls[place] = Call(func, args, kwargs, [ref.source.parameters[0] for ref in refs], label, key, autocast)
        else:
            self.calls.pop(place, None)


class Prover:
    """Attributes rows to examples, for one block."""

    def __init__(
        self,
        *,
        positions: bool = False,
        num_examples: int | None = None,
        loss: Loss | None = None,
        verify: str | int = "once",
        structures: Structures,
    ) -> None:
        self.positions = positions
        self.num_examples = num_examples
        self.loss = loss
        self.verify = verify
        self.structures = structures
        self.declared: Packed | None = None  # the example of each row of the pass, as the user declared it
        self.positions_given: Tensor | None = None  # position_ids or cu_seqlens among the model's inputs
        self._found: dict[Any, tuple[Finding | None, Tensor | None]] = {}  # what cuts of the current graph have shown
        self._barred: set[Site] = set()  # uses whose gradient comes through a reentrant checkpoint and around it

    # Before the backward pass ----------------------------------------------------------------------------------------------------

    def declare(self, x: Tensor, packed: Packed, argument: str) -> None:
        """Register which example each row of the next pass belongs to."""
        if self.positions:
            raise RuntimeError("zerosum.example_ids: expected a probe with examples='sequence', got examples='position'")
        N = self.num_examples
        if N is not None and packed.examples > N:
            if argument == "ids":
                got = f"{int(packed.labels.min())} to {packed.examples - 1}"
                raise ValueError(f"ids: expected values in [0, {N}), got {got}; num_examples is {N}")
            raise ValueError(f"{argument}: expected at most {N} documents, got {packed.examples}; num_examples is {N}")
        packed = Packed(packed.labels.to(x.device), packed.examples if N is None else N)
        if self.declared is not None and not self.declared.same_as(packed):
            raise ValueError(
                f"{argument}: different rows were declared before, without a backward pass in between; "
                "run backward() for each batch of packed rows"
            )
        self.declared = self.declared or packed

    def look(self, kwargs: dict[str, Any]) -> None:
        """Notice signs of packed sequences: positions that may restart within a row, or cumulative lengths."""
        self.positions_given = None
        for name, value in kwargs.items():
            tells = name == "position_ids" or name.startswith(("cu_seqlens", "cu_seq_lens"))
            if tells and isinstance(value, Tensor) and value.ndim and not value.is_floating_point():
                self.positions_given = value
                return

    def _tell_of_documents(self, capture: Capture) -> None:
        """Warn if the whole batch is one example, but the model's inputs contain several documents."""
        given = self.positions_given
        if given is None or self.num_examples is not None or self.structures.told_of_documents or capture._over:
            return
        if given.ndim == 1 and capture.inputs and capture.inputs[-1].shape[-1:] != given.shape:
            documents, what = len(given) - 1, "cu_seqlens has"
        elif given.ndim <= 2 and (given.ndim == 1 or given.shape[0] == 1):
            documents, what = int(starts(given.reshape(1, -1)).sum()), "position_ids restart for"
        else:
            return
        if documents < 2:
            return
        self.structures.told_of_documents = True
        warnings.warn(
            f"zerosum.Probe: {what} {documents} documents in one row, as in packed sequences, but the whole row is one example, "
            "for which D_grad and the other metrics are meaningless. To make each document an example, call zerosum.example_ids(x, "
            "position_ids=…) in the block, before the model. If the row is one example, pass num_examples=1",
            UserWarning,
            stacklevel=2,
        )

    @staticmethod
    def _leads(capture: Capture) -> list[Sequence[int]]:
        """Return the shapes of the model's inputs or, if it is not called, of the rows of the first use of a weight."""
        return [x.shape for x in capture.inputs if x.ndim] or [site.lead for site in capture.sites if site.lead][:1]

    def _sizes(self, capture: Capture, roots: Sequence[GradientEdge], grads: Sequence[Tensor | None]) -> list[int]:
        """Return the possible values of N, the most likely first."""
        if self.declared is not None:
            return [self.declared.examples]
        if self.num_examples is not None:
            return [self.num_examples]
        leads = self._leads(capture)
        inputs = [lead[0] for lead in reversed(leads) if lead]
        rows = [lead[0] * lead[1] for lead in leads if len(lead) > 1]
        # A vector of losses, unless it holds the losses of all positions.
        flat = {*rows, *(n - 1 for n in rows if inputs and inputs[0] == 1)}
        lengths = list(_vectors(roots))
        vectors = [size for size in lengths if size > 1 and size not in flat - set(inputs)]
        # Its length may equal the input's second dimension, if positions come first.
        second = {n for lead in leads for n in lead[1:2]}
        found = [*(size for size in vectors if size in second), *inputs, *vectors]
        if found and found[0] > 1 and 1 in lengths and 1 in second:
            if self.structures.examples_second:
                found.insert(0, 1)  # as in earlier passes, which had more examples
            elif self.structures.examples_second is None:
                self.structures.examples_second = False
                warnings.warn(
                    f"zerosum.Probe: the model's input is ({found[0]}, 1, …) and there is one loss. This is either "
                    f"{found[0]} examples, or one example with positions in the first dimension. The probe assumes {found[0]} "
                    "examples; pass num_examples if this is wrong",
                    UserWarning,
                    stacklevel=2,
                )
        elif found and found[0] == 1 and self.structures.examples_second:
            found = [*(n for n in leads[-1][1:2] if n in lengths), *found] if leads else found
        return list(dict.fromkeys(found))

    # One backward pass ------------------------------------------------------------------------------------------------------------

    def attribute(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None]) -> Proof | None:
        """Set the layouts of a backward pass's sites. Return None if the pass reaches no use of a weight."""
        if not roots:
            return None
        if capture.traced:
            return self._compiled(capture, roots, grads)
        key = self._key(capture, roots)
        stored = self.structures.found.get(key)
        if stored is not None and self._holds(stored):
            now = stored.of_rows(capture.sites, self.declared)
            proof = self._again(capture, roots, grads, now)
            if proof is not None:
                now.used = stored.used = stored.used + 1
                self._settle(capture, roots, grads, proof, now)
                self._note(proof, now, roots)
                return proof
            if capture.shards is not None:
                del self.structures.found[key]
                for t in capture.parameters:
                    t.refuse(ANOTHER_END)
                return None
        try:
            finding = self._trust(capture) if self.verify == "never" else self._find(capture, roots, grads)
        finally:
            self._found.clear()
        if finding is None:
            return None
        if finding.examples == 1 and self.declared is None:
            self._tell_of_documents(capture)
        earlier, stored = stored, self._store(capture, roots, grads, finding)
        if self.verify != "never":
            if earlier is not None:
                stored.follow(earlier)
            self.structures.found[key] = stored
        capture.checkpoints = finding.checkpoints
        proof = self._proof(capture, finding, stored)
        stored.used += 1
        self._settle(capture, roots, grads, proof, stored)
        self._note(proof, stored, roots)
        return proof

    def _holds(self, stored: Stored) -> bool:
        """Whether a known structure need not be proved again."""
        due = self.verify == "always" or (isinstance(self.verify, int) and stored.used % self.verify == 0)
        return stored.regular and stored.proofs >= _enough(stored.examples) and not due

    def differentiates(self, capture: Capture, roots: list[GradientEdge]) -> bool:
        """Whether the step must be differentiated again to attribute its rows."""
        stored = self.structures.found.get(self._key(capture, roots))
        return bool(roots) and self.verify != "never" and (stored is None or not self._holds(stored))

    def _note(self, proof: Proof, stored: Stored, roots: list[GradientEdge]) -> None:
        """Store what is needed to leave a step compiled, if that is allowed."""
        steps = self.structures.compiled
        if steps is not None and steps.seen and stored.regular and stored.proofs >= _enough(stored.examples) and not proof.apart:
            proof.stored, proof.roots = stored, roots

    def _compiled(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None]) -> Proof | None:
        """Return the proof of a known step with uses that ran in compiled code. An unknown step cannot be proved there."""
        steps = self.structures.compiled
        assert steps is not None
        step = steps.find(capture, roots)
        proof = None if step is None else self._again(capture, roots, grads, step.stored)
        if step is None or proof is None:
            steps.miss(roots)
            for t in capture.parameters:
                t.refuse(UNPROVED)
            return None
        step.stored.used += 1
        step.met = True
        if not step.checked:
            # On its first compiled pass, a step computes the sums apart from the gradients and compares them.
            step.checked = True
            for t in capture.parameters:
                t.marks.deferred = capture.epoch
        self._settle(capture, roots, grads, proof, step.stored)
        return proof

    def _key(self, capture: Capture, roots: list[GradientEdge]) -> Any:
        sizes = tuple(x.shape[:1] for x in capture.inputs)
        ends = tuple((e.node.name(), shape_of(e)) for e in roots)
        packed = self.declared
        declared = packed and (packed.labels.shape, packed.examples > 1, packed.padded)
        return tuple(capture.keys), ends, sizes, len(capture.sites), capture.model.training, bool(capture.auxiliary), declared

    def _again(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], stored: Stored) -> Proof | None:
        """Return the proof of a known structure, if the graph has the same losses at its end."""
        cut = None
        if capture.whole or capture.auxiliary or stored.hidden:
            edges = [follow_path(roots, path, names) for path, names, _ in stored.cut]
            if any(e is None for e in edges) or not edges:
                return None
            cut = Cut([e for e in edges if e is not None], [axis for *_, axis in stored.cut])
        if stored.terms and any(follow_path(roots, term.path, term.names) is None for term in stored.terms):
            return None
        if stored.checkpoints:
            capture.checkpoints = dict(zip(_checkpoints(roots), stored.checkpoints, strict=True))
        proof = Proof(self._pass(capture, stored.examples), cut, labels=stored.labels, since=stored.since, trusted=stored.unproved)
        if cut is not None:
            proof.gradients = self._gradients(capture, roots, grads, cut)
        self._assign(capture, stored)
        return proof

    def _pass(self, capture: Capture, examples: int) -> Pass:
        """Return a new pass, or the earlier pass of a graph that is differentiated again."""
        if self.positions:
            examples *= self._positions_of(capture)
        if capture.passes and capture.passes_epoch == capture.epoch and capture.passes[-1].examples == examples and capture._over:
            return capture.passes[-1]
        self.structures.passes += 1
        capture.passes_epoch = capture.epoch
        return Pass(self.structures.passes, examples)

    def _positions_of(self, capture: Capture) -> int:
        shapes: list[Sequence[int]] = [x.shape for x in capture.inputs[-1:]] or [site.lead for site in capture.sites[:1]]
        return shapes[0][1] if shapes and len(shapes[0]) > 1 else 0

    def _assign(self, capture: Capture, stored: Stored) -> None:
        capture.state.examples, capture.state.regular = stored.short
        for site, layout, problem, reached in zip(capture.sites, stored.layouts, stored.problems, stored.reached, strict=True):
            if not reached:
                continue
            site.layout, site.problem = layout, problem
            if problem:
                site.layout = None
                for source in site.sources:
                    source.refuse(problem)
        for t in capture.parameters:
            if id(t.parameter) in stored.hidden:
                capture.refuse_if_strict(t, UNSEEN)
                capture.differentiate_whole(t, UNSEEN)
            if (refused := stored.refused.get(id(t.parameter))) is not None:
                t.refuse(refused)

    def _proof(self, capture: Capture, finding: Finding, stored: Stored) -> Proof:
        proof = Proof(
            self._pass(capture, finding.examples),
            finding.cut if finding.cut.edges else None,
            finding.gradients,
            finding.labels,
            passes=finding.passes,
            since=self.structures.passes,
            trusted=finding.unproved,
        )
        self._assign(capture, stored)
        return proof

    def _settle(
        self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], proof: Proof, stored: Stored
    ) -> None:
        """Determine how the gradients are scaled, and whether part of the loss is marked as auxiliary."""
        proof.apart = bool(capture.auxiliary) and proof.cut is not None
        before = sum(p.examples for p in capture.passes if p is not proof.of)
        if self.loss is not None:
            proof.of.scale = self.loss.scale(proof.of.examples)
            proof.of.denominators = self.loss.scales(before, proof.of.examples)
            if stored.used == 1:
                self._contradict(capture, roots, grads, stored)
            return
        if stored.terms:
            terms = [
                (term, edge, None if term.call is None else capture.losses[term.call])
                for term in stored.terms
                if (edge := follow_path(roots, term.path, term.names)) is not None
            ]
            reader = TailReader(terms, stored.examples, stored.labels)
            if reader.picked:
                ends = [(follow_path(roots, path, names), axis) for path, names, axis in stored.cut]
                reader.cut = [(edge, axis) for edge, axis in ends if edge is not None]
            proof.rows_per_example = self._positions_of(capture) if self.positions else 1
            if proof.apart or stored.nested:
                both = ([edge for _, edge, _ in terms], [edge for edge, _ in reader.cut])
                reader.take(*(self._gradients(capture, roots, grads, Cut(e, [0] * len(e)), raw=True) if e else [] for e in both))
                proof.of.factors = reader.factors(proof.rows_per_example)
            else:
                proof.reader = reader
        elif stored.used == 1 and stored.examples and not capture._over and not capture.warned:
            warnings.warn(
                "zerosum.Probe: loss_reduction='auto' cannot read how the loss was reduced, so the results are for the loss "
                "without rescaling. Pass loss_reduction='sum', 'mean', or the denominators of the examples' losses",
                UserWarning,
                stacklevel=2,
            )

    def _contradict(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], stored: Stored) -> None:
        """Warn if an explicit reduction contradicts what the loss shows."""
        loss = self.loss
        assert loss is not None
        if not stored.terms or self.positions or stored.examples < 2 or loss.uneven is not None:
            return
        terms = [
            (term, edge, None if term.call is None else capture.losses[term.call])
            for term in stored.terms
            if (edge := follow_path(roots, term.path, term.names)) is not None
        ]
        reader = TailReader(terms, stored.examples, stored.labels)
        reader.take(self._gradients(capture, roots, grads, Cut([edge for _, edge, _ in terms], [0] * len(terms)), raw=True))
        factors = reader.factors()
        if factors is None or not float(factors[1]):
            return
        per_example, per_row = float(factors[0] / factors[1].abs()), reader.uniform()
        said = loss.scale(stored.examples)
        calls = [call for _, _, call in terms if call is not None and call.reduction == "mean"]
        ignored = any((valid := call.valid()) is not None and not bool(valid.all()) for call in calls)
        rows = sum(call.targets.numel() for call in calls)
        if any(abs(said - x) <= 1e-3 * abs(x) for x in (per_example, per_row) if x is not None):
            if not (loss.reduction == "mean" and ignored):
                return
        elif per_row is None and not calls:
            return
        shown = per_row if per_row is not None and calls else per_example
        couples = f" couples the examples (a mean over {rows} rows of {stored.examples} examples):" if calls else ""
        warnings.warn(
            f"zerosum.Probe: loss_reduction={loss.shown} means that each example's loss was divided by {said * loss.factor:g}, but "
            f"the loss{couples} divides by {shown * loss.factor:g}. Use loss_reduction='auto', or give the denominators",
            UserWarning,
            stacklevel=2,
        )

    # Finding ----------------------------------------------------------------------------------------------------------------------

    def _find(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None]) -> Finding | None:
        best: Finding | None = None
        sizes = self._sizes(capture, roots, grads)
        packed = self.declared
        if sizes and sizes[0] <= 1 and len(sizes) == 1 and (packed is None or not packed.padded):
            alone = self._single(capture, roots, grads, sizes[0])
            return self._other_reading(capture, roots, grads, sizes[0], alone.named) or alone
        for labels, N, end in self._divisions(capture, sizes):
            if not N:
                continue
            if labels is not None and packed is None and best is not None and not best.cut.bypass:
                continue  # rows show nothing beyond what is already known
            finding = self._find_of(capture, roots, grads, N, end, labels)
            rows_alone = labels is not None and packed is None
            if rows_alone and best and best.good and finding and not self._of_losses(capture, roots, best, finding):
                continue
            if finding is not None and (best is None or _rank(finding) > _rank(best)):
                best = finding
            if best is not None and best.perfect and (packed is not None or (best.orderly and best.examples > 1)):
                break
        one = (
            "; if the whole batch is one example, pass num_examples=1" if self.num_examples is None and 1 in _vectors(roots) else ""
        )
        if best is None:
            # The graph leads to no use of a weight, or no tensor separates the losses.
            if not self._reaches(capture, roots, grads):
                return None
            problem = (
                "the examples are coupled before the loss: no tensor between the loss and the weights has an example "
                f"dimension{one}"
            )
            if packed is not None:
                problem = (
                    f"no tensor between the loss and the weights has the rows {tuple(packed.labels.shape)} that were "
                    "passed to zerosum.example_ids; if the losses are for selected rows, pass those rows and their ids instead"
                )
            best = Finding(Cut([], []), sizes[0] if sizes else 0, None, [], [Named(None, problem, True) for _ in capture.sites])
        if best.perfect and best.labels is None and packed is None:
            best = self._other_reading(capture, roots, grads, best.examples, best.named) or best
        if best.examples == 1 and sizes[:1] == [1] and packed is None:
            return self._single(capture, roots, grads, 1)
        if best.strange and not best.coupled:
            best.coupled = STRANGE
        if best.coupled:
            own = best.coupled in (PADDING, STRANGE)
            problem = best.coupled if own else f"the examples are coupled before the loss: {best.coupled}{one}"
            best.named = [Named(None, problem, True, reached=n.reached) for n in best.named]
        if best.perfect and capture.inputs and capture.inputs[-1].ndim > 1 and best.examples > 1:
            first, second = capture.inputs[-1].shape[:2]
            if first != second:
                self.structures.examples_second = second == best.examples
        if packed is None:
            best = self._ordered(capture, roots, grads, best)
        if _unclear(best):
            N = best.examples
            problem = (
                f"the examples are coupled before the loss, which has {N} parts of {N} rows: a part may be an example or a position"
            )
            best.named = [Named(None, n.problem or problem, True, reached=n.reached) for n in best.named]
        self._tell(capture, best)
        return best

    def _other_reading(
        self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], N: int, named: list[Named]
    ) -> Finding | None:
        """Warn if the losses fit another number of examples as well as N, for which the uses are ``named``.

        Return the finding for that number if it is more likely: one row whose losses form several sums holds several
        sequences."""
        if self.num_examples is not None or self.positions or capture._over:
            return None
        lead = next(reversed(self._leads(capture)), ())
        for n in dict.fromkeys(_vectors(roots)):
            if n < 2 or n == N or 1 < N < n:
                continue
            found = self._find_of(capture, roots, grads, n, End(0, n, 0), None)
            if found is None or not found.perfect or any(shape_of(e) != (n,) for e in found.cut.edges):
                continue
            part: Finding | None = found  # one of the vectors, which may be parts of a longer one
            if len(found.cut.edges) > 1:
                part = self._name(capture, roots, grads, Cut(found.cut.edges[:1], [0]), n, None)
            if part is None:
                continue
            k = next(k for k, one in enumerate(part.named) if one.reached)
            names, theirs = part.named[k].names, named[k].names if N > 1 else None
            if names is None or (N > 1 and theirs is None):
                continue
            names, theirs = names.flatten(), torch.arange(names.numel()) if theirs is None else theirs.flatten()
            pairs = torch.stack([names.cpu(), theirs.cpu()])[:, names.cpu() >= 0].unique(dim=1)  # the rows of each
            counts = pairs[0].bincount()
            if int((counts > 0).sum()) < 2:
                continue
            if N == 1 and tuple(lead[:2]) == (1, n):
                if self.structures.examples_second is not None:
                    continue
                assumed = "one example"
                shown = (
                    f"the model's input is (1, {n}, …) and there are {n} losses. This is either one example of {n} positions, "
                    f"or {n} examples with positions in the first dimension"
                )
            elif not bool((counts > 1).any()):
                continue
            elif N == 1:
                assumed = f"{n} examples"
                shown = (
                    f"the model's input is one row, but its losses form {n} sums. These are either {n} examples, such as "
                    "packed sequences, or one example"
                )
            else:
                assumed = f"{N} examples"
                shown = (
                    f"the model's input has {N} rows, but their losses form {n} sums. These are either {N} examples, or {n} "
                    "examples, such as packed sequences"
                )
            if N not in self.structures.told:
                self.structures.told.add(N)
                said = f"zerosum.Probe: {shown}. The probe assumes {assumed}; pass num_examples if this is wrong"
                warnings.warn(said, UserWarning, stacklevel=2)
            return found if N == 1 and tuple(lead[:2]) != (1, n) else None
        return None

    def _ordered(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], finding: Finding) -> Finding:
        """Reorder the examples to the order of the first vector of losses, if the last one is a permutation of it."""
        cut, N = finding.cut, finding.examples
        if finding.coupled or finding.labels is not None or len(cut.edges) != 1 or shape_of(cut.edges[0]) != (N,):
            return finding
        edge = cut.edges[0]
        while not self._barrier(edge.node):
            before = [e for _, e in _following(edge.node)]
            if len(before) != 1 or getattr(before[0].node, "variable", None) is not None or shape_of(before[0]) != (N,):
                break
            edge = before[0]
        if edge.node is cut.edges[0].node:
            return finding
        ones = torch.ones(N, dtype=attribution._dtype(edge), device=attribution._device(edge))
        (plain,) = capture.extra_backward(cut.edges, [edge], [ones], Phase.NAMING)
        places = torch.arange(1, N + 1).to(ones)
        (moved,) = capture.extra_backward(cut.edges, [edge], [places], Phase.NAMING)
        if plain is None or moved is None or not bool((plain != 0).all()):
            return finding
        order = (moved / plain).round().long() - 1  # the position of each entry of the cut in the first vector
        if not torch.equal(order.sort()[0], torch.arange(N, device=order.device)) or bool((order.diff() == 1).all()):
            return finding
        again = self._name(capture, roots, grads, cut, N, order.argsort())
        return finding if again is None else again

    def _divisions(self, capture: Capture, sizes: list[int]) -> Iterator[tuple[Tensor | None, int, End]]:
        """Yield labels, N, and the dimensions that the labels describe."""
        for N in sizes:
            if self.declared is None or N > 1:
                yield None, N, End(0, N, 0)
        if self.declared is not None:
            for end in self.declared.ends():
                yield self.declared.part(end.part), self.declared.examples, end
            return
        # Flattened rows, (N·T,), are assumed to be in order, which the uses that they reach confirm.
        for N, T in ((x.shape[0], x.shape[1]) for x in capture.inputs[-1:] if x.ndim > 1):
            for per in (T, T - 1):
                if N in sizes and N > 1 and per > 1:
                    yield torch.arange(N).repeat_interleave(per), N, End(0, N * per, 0)

    def _single(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], N: int) -> Finding:
        """Handle one example or none, where all rows belong to that example."""
        cut = Cut([], [])
        if N == 1:
            cut = find_cut(roots, 1, self._barrier, set(), 1, capture.auxiliary)
        gradients = self._gradients(capture, roots, grads, cut) if cut.edges else []
        return Finding(cut, N, None, gradients, [self._of_one(capture, site, N) for site in capture.sites])

    def _of_one(self, capture: Capture, site: Site, N: int) -> Named:
        """Return the layout of a use's rows if they all belong to one sequence."""
        if not self.positions or not N:
            return Named(Layout(N))
        lead = tuple(site.lead)
        return self._of_positions(capture, Layout(1, inner=1 if lead[:1] == (1,) or not lead else lead[0]), torch.Size(lead), True)

    @staticmethod
    def _of_losses(capture: Capture, roots: list[GradientEdge], best: Finding, flat: Finding) -> bool:
        """Whether what bypasses a cut is a sum over flattened rows, or known losses of them. A mean of features over all rows from
        which something is computed belongs to no example: routers are balanced in this way."""
        calls = {call.node for call in capture.losses}
        ends = {(e.node, e.output_nr) for e in (*best.cut.edges, *flat.cut.edges)}
        stack, seen = list(roots), set()
        while stack:
            edge = stack.pop()
            if (edge.node, edge.output_nr) in seen or (edge.node, edge.output_nr) in ends or edge.node in calls:
                continue
            seen.add((edge.node, edge.output_nr))
            if edge.node in capture.auxiliary or getattr(edge.node, "variable", None) is not None:
                continue
            if math.prod(shape_of(edge)) > 1:
                return False
            stack += [e for _, e in _following(edge.node)]
        return True

    def _find_of(
        self,
        capture: Capture,
        roots: list[GradientEdge],
        grads: list[Tensor | None],
        N: int,
        end: End,
        labels: Tensor | None,
    ) -> Finding | None:
        best: Finding | None = None
        size = end.size
        for tier in range(1 if end.positions else 3):
            skip: set[tuple[Node, int]] = set()
            for _ in range(ATTEMPTS):
                cut = find_cut(roots, size, self._barrier, skip, tier, capture.auxiliary, end.positions)
                if not cut.edges:
                    break
                finding = self._name(capture, roots, grads, cut, N, labels)
                if finding is None:
                    break
                finding.end = end
                finding.first = tier == 0 and not skip
                finding.consistent, finding.orderly = _consistent(capture, finding), _orderly(finding)
                contested = _in_parts(finding) or any(
                    axis and shape_of(e)[0] == size for e, axis in zip(cut.edges, cut.axes, strict=True)
                )
                borne_out = _in_order(capture, finding) if contested else finding.consistent or (finding.first and finding.perfect)
                if not borne_out:
                    skip |= {(e.node, e.output_nr) for e in cut.edges}
                    continue  # another dimension of the same size
                alone = self._alone(capture, roots, grads, finding)
                apart = self._apart(capture, roots, grads, finding, alone)
                finding.doubtful = apart is not None
                for one in (finding, apart):
                    if one is not None and (best is None or _rank(one) > _rank(best)):
                        best = one
                vector = finding.first and all(len(shape_of(e)) == 1 for e in cut.edges)
                if best is finding and finding.perfect and (finding.consistent or vector):
                    return finding
                blamed = [e for e, one in alone if one is None or one.coupled or one.good < one.reached]
                skip |= {(e.node, e.output_nr) for e in blamed or cut.edges}
        return best

    def _alone(
        self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], finding: Finding
    ) -> list[tuple[GradientEdge, Finding | None]]:
        """Return what each tensor of a cut shows, if there are several and together they do not separate the losses."""
        cut = finding.cut
        if len(cut.edges) < 2 or finding.perfect:
            return []
        return [
            (edge, self._name(capture, roots, grads, Cut([edge], [axis]), finding.examples, finding.labels))
            for edge, axis in zip(cut.edges, cut.axes, strict=True)
        ]

    def _apart(
        self,
        capture: Capture,
        roots: list[GradientEdge],
        grads: list[Tensor | None],
        finding: Finding,
        alone: list[tuple[GradientEdge, Finding | None]],
    ) -> Finding | None:
        """Return the cut without tensors that show nothing, because one of their dimensions equals N by chance, as in a balance
        loss of N experts. Return None if there are no such tensors, or no others."""
        chance = {(e.node, e.output_nr) for e, one in alone if one is not None and (one.coupled or not one.good)}
        cut = finding.cut
        own = [k for k, e in enumerate(cut.edges) if (e.node, e.output_nr) not in chance]
        if not chance or not own:
            return None
        bypass = [*cut.bypass, *(node for node, _ in chance)]
        found = self._name(
            capture,
            roots,
            grads,
            Cut([cut.edges[k] for k in own], [cut.axes[k] for k in own], bypass),
            finding.examples,
            finding.labels,
        )
        if found is None or found.coupled or not found.good:
            return None
        found.first, found.end = finding.first, finding.end
        found.consistent, found.orderly = _consistent(capture, found), _orderly(found)
        return found

    @staticmethod
    def _barrier(node: Node) -> bool:
        ours = any(hasattr(node, name) for name in ("site", "again", "source"))
        return ours or node.name() == REENTRANT

    def _gradients(
        self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], cut: Cut, raw: bool = False
    ) -> list[Any]:
        """Return the gradients of the loss at the cut's tensors, each without what reaches it through another one of them."""
        with attribution.stopping(cut.edges):
            found = capture.extra_backward(roots, cut.edges, grads, Phase.NAMING)
        if raw:
            return [None if g is None else g.detach() for g in found]
        return [
            torch.zeros(shape_of(e), dtype=attribution._dtype(e), device=attribution._device(e)) if g is None else g.detach()
            for e, g in zip(cut.edges, found, strict=True)
        ]

    def _reaches(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None]) -> bool:
        sites = set(capture.sites)
        return bool(sites & set(_sites_before([e.node for e in roots])[0])) or bool(capture.whole)

    def _name(
        self,
        capture: Capture,
        roots: list[GradientEdge],
        grads: list[Tensor | None],
        cut: Cut,
        N: int,
        labels: Tensor | None,
    ) -> Finding | None:
        """Attribute the rows of all uses from one cut; None if no use is reached. Cache its results, as cuts recur often."""
        edges = frozenset(zip(((e.node, e.output_nr) for e in cut.edges), cut.axes, strict=True))
        key = edges, frozenset(cut.bypass), N, id(labels)
        if key not in self._found:
            gradients = self._gradients(capture, roots, grads, cut)
            coupled, unproved = "", ""
            try:
                coupled = attribution.couples(roots, grads, cut, N, labels)
            except attribution.Unproved as reason:
                unproved = f"the computation from the examples' losses to the final loss cannot be differentiated twice ({reason})"
            if (
                labels is not None
                and bool((labels < 0).any())
                and any(bool((g.detach() * along(labels < 0, axis, g)).any()) for g, axis in zip(gradients, cut.axes, strict=True))
            ):
                coupled = PADDING
            finding = Finding(cut, N, labels, gradients, [], coupled, unproved=unproved)
            self._found[key] = self._name_uses(capture, finding), labels  # (the labels are kept so that their id stays valid)
        found, _ = self._found[key]
        return None if found is None else replace(found, named=[replace(one) for one in found.named])

    def _name_uses(self, capture: Capture, finding: Finding) -> Finding | None:
        """Fill in what a cut shows about each use."""
        cut, N, labels, gradients = finding.cut, finding.examples, finding.labels, finding.gradients
        if finding.coupled:
            behind = _all_sites_before([e.node for e in cut.edges]) | _all_sites_before(cut.bypass)
            if not behind & set(capture.sites):
                return None
            finding.named = [Named(None, reached=site in behind) for site in capture.sites]
            return finding
        places = {site: k for k, site in enumerate(capture.sites)}
        finding.named = named = [Named(None, reached=False) for _ in capture.sites]
        problem = ""
        self._barred.clear()
        finding.passes, boundaries = self._name_segment(capture, cut.edges, cut.axes, gradients, N, labels, named, places)
        done: set[Node] = set()
        while boundaries:
            node, axis = boundaries.pop()
            if node in done:
                continue
            done.add(node)
            if axis < 0:
                problem = MIXED_CHECKPOINT
            finding.checkpoints[node] = -1 if problem else axis
            edges = [e for _, e in _following(node) if getattr(e.node, "variable", None) is None]
            edges = [e for e in edges if shape_of(e)[max(axis, 0) : max(axis, 0) + 1] == (N,)]
            if not edges:
                continue
            starts = [_random(e) for e in edges]
            more, further = self._name_segment(capture, edges, [max(axis, 0)] * len(edges), starts, N, None, named, places, problem)
            finding.passes += more
            boundaries += further
        if not any(n.reached for n in named):
            return None
        for site in _sites_before(cut.bypass)[0]:
            if site in places:
                named[places[site]].bypassed = True
        if self.declared is not None:
            # Judge by the use closest to the input, before anything sorts rows, but not by rows of several examples.
            apart = (n.names for n in named if n.reached and n.names is not None and not bool((n.names == MIXED).any()))
            first = next(apart, None)
            finding.strange = first is not None and self.declared.disagrees(first)
        return finding

    def _name_segment(
        self,
        capture: Capture,
        edges: Sequence[GradientEdge],
        axes: Sequence[int],
        gradients: Sequence[Tensor],
        N: int,
        labels: Tensor | None,
        named: list[Named],
        places: dict[Site, int],
        problem: str = "",
        by_name: bool = False,
    ) -> tuple[int, list[tuple[Node, int]]]:
        """Attribute what backward passes from some tensors reach, up to reentrant checkpoints. Return the number of passes, and
        these checkpoints, each with its results' example dimension, or -1."""
        sites, checkpoints = _sites_before([e.node for e in edges])
        # A use that a checkpoint also reaches gets its whole gradient only there, where the probe's backward passes cannot go.
        behind = set(attribution.nodes_between([x for node in checkpoints for x, _ in node.next_functions if x is not None], set()))
        beside = [site for site, node in sites.items() if node in behind]
        twofold = [node for node in checkpoints if node in behind]
        sites = {site: node for site, node in sites.items() if node not in behind}
        checkpoints = [node for node in checkpoints if node not in behind]
        ends = [GradientEdge(node, k) for node in checkpoints for k in range(len(node._input_metadata))]
        inputs: list[Any] = [capture.anchor]
        if checkpoints:
            inputs = [*(GradientEdge(node, 0) for node in sites.values()), *ends]

        def run(weights: Tensor | None) -> dict[Any, Signature]:
            capture.signatures = {}
            of_row = None if weights is None else weights if labels is None else weights[labels.cpu().clamp(min=0)]
            given = [g if of_row is None else g * along(of_row, axis, g) for g, axis in zip(gradients, axes, strict=True)]
            found = capture.extra_backward(edges, inputs, given, Phase.NAMING)
            signed: dict[Any, Signature] = capture.signatures
            if checkpoints:
                for x, g in zip((*sites, *((e.node, e.output_nr) for e in ends)), found, strict=True):
                    if g is not None and x not in signed:
                        rows = x.rows_of(g) if isinstance(x, Site) else g.unsqueeze(-1)
                        signed[x] = Signature.of(rows)
            capture.signatures = {}
            return signed

        plain = run(None)
        spelled = [run(attribution.weights_of_digit(N, digit)) for digit in range(attribution.digits(N))]
        checked = run(attribution.random_weights(N))
        boundaries: dict[Node, int] = {}
        more: list[dict[Any, Signature]] = []
        for x, signature in plain.items():
            names = attribution.name_rows(signature, [one[x] for one in spelled], checked[x], N)
            if bool((names == MIXED).any()):
                smallest = torch.full((N,), attribution.SMALLEST, dtype=torch.float64)
                more = more or [run(weights) for weights in (None, None, smallest, smallest)]
                again, scaled = ([one[x] for one in half] for half in (more[:2], more[2:]))
                if (noise := attribution.Noise.between(signature, again, scaled)) is not None:
                    names = attribution.name_rows(signature, [one[x] for one in spelled], checked[x], N, noise)
            if isinstance(x, Site):
                if x in places:
                    named[places[x]] = Named(None) if by_name else self._judge(capture, names, N, problem)
                    named[places[x]].names = names
            else:
                layout, _ = layout_of(names, N)
                regular = not bool((names == MIXED).any()) and layout.ids is None and layout.outer == layout.inner == 1
                boundaries[x[0]] = layout.axis if regular and boundaries.get(x[0], layout.axis) == layout.axis else -1
        for node in checkpoints:
            boundaries.setdefault(node, 0)
        boundaries |= dict.fromkeys(twofold, -1)
        for site in beside:
            if site in places:
                self._barred.add(site)
        for site in self._barred & places.keys():
            named[places[site]] = Named(None, BESIDE_CHECKPOINT, True)
        return 2 + len(spelled) + len(more), list(boundaries.items())

    def _judge(self, capture: Capture, names: Tensor, N: int, problem: str = "") -> Named:
        """Return the layout of rows with these names."""
        if problem:
            return Named(None, problem, True)
        mixed = int((names == MIXED).sum())
        if mixed:
            return Named(None, f"{mixed} of {names.numel()} rows serve several examples", True)
        layout, settled = layout_of(names, N)
        settled = settled and not bool((names == UNREACHED).all())
        if self.positions:
            return self._of_positions(capture, layout, names.shape, settled)
        return Named(layout, settled=settled)

    def _of_positions(self, capture: Capture, layout: Layout, lead: torch.Size, settled: bool) -> Named:
        """Return that layout if an example is one position of a sequence."""
        T = self._positions_of(capture)
        N = layout.examples
        if layout.ids is not None:
            return Named(None, "its rows are in no regular order, so positions cannot be separated")
        if layout.outer != 1 or layout.inner != 1:
            behind = [*lead[: layout.axis], layout.outer, layout.inner, *lead[layout.axis + 1 :]]
        else:
            behind = [*lead[: layout.axis], *lead[layout.axis + 1 :]]
        places = [k for k, n in enumerate(behind) if n == T]
        if not places or (
            len(places) > 1 and T > 1 and not (places[0] == 0 and layout.axis == 0 and len(behind) == len(places) == 1)
        ):
            shape = f"rows {tuple(lead)}, which do not have exactly one dimension of {T} positions"
            return Named(None, shape)
        return Named(Layout(N * T, layout.axis, layout.outer, layout.inner, positions=T, place=places[0] + 1), settled=settled)

    def _tell(self, capture: Capture, finding: Finding) -> None:
        """Warn which weights have rows of several examples, and in which operation."""
        mixed: list[str] = []
        for site, named in zip(capture.sites, finding.named, strict=True):
            if not named.mixed or not named.reached:
                continue
            batched = len(site.lead) > 1 and site.lead[0] == finding.examples
            if site.ambiguous is not None and site.refs and not finding.coupled and not batched:
                # What was taken for data does not depend on any. From the next pass on, this is a tensor computed from weights
                # only.
                place, key = site.ambiguous
                self.structures.alone[place] = self.structures.alone[key] = True
                self.structures.calls.clear()
                named.mixed, named.problem, named.settled, named.layout = False, "", False, None
                for source in site.sources:
                    for t in source.parameters:
                        capture.differentiate_whole(t, f"used by {site.label} on rows that are the same for all examples")
                continue
            if named.problem.endswith("rows serve several examples"):
                named.problem = f"the examples are coupled before the loss: {named.problem} in {site.label}"
            mixed += [t.name for source in site.sources for t in source.parameters]
        if not mixed:
            return
        if capture._over:
            return  # the graph was already differentiated before, in another way
        capture.warned = True
        reason = next(n.problem for n in finding.named if n.mixed and n.reached)
        if self.declared is not None and "rows serve several examples" in reason:
            reason += (
                " (documents interact there, as in attention without a mask that separates them; transformers derives such a "
                "mask from position_ids only if attention_mask is None and use_cache is False)"
            )
        names = list(dict.fromkeys(mixed))
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        if capture.strict:
            raise NotImplementedError(f"zerosum.Probe(strict=True): {names[0]} is not covered: {reason}")
        warnings.warn(
            f"zerosum.Probe: {reason}. {len(names)} parameters are not covered: {shown}",
            UserWarning,
            stacklevel=2,
        )

    def _name_positions(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], finding: Finding) -> None:
        """Attribute rows to positions, if the losses separate these. This is exact after the last mixing of positions. Before it,
        the order of a sequence's rows is used instead."""
        T, N = self._positions_of(capture), finding.examples
        if not T or not N:
            return
        cut = find_cut(roots, N, self._barrier, set(), 0, capture.auxiliary, T)
        if not cut.edges or cut.bypass:
            return
        gradients = self._gradients(capture, roots, grads, cut)
        try:
            if attribution.couples(roots, grads, cut, N * T):
                return
        except attribution.Unproved:
            return
        found = [Named(None, reached=False) for _ in capture.sites]
        places = {site: k for k, site in enumerate(capture.sites)}
        finding.passes += self._name_segment(capture, cut.edges, cut.axes, gradients, N * T, None, found, places, by_name=True)[0]
        for named, one in zip(finding.named, found, strict=True):
            names = one.names
            if names is None or named.mixed or bool((names == MIXED).any()):
                continue
            if named.layout is not None:
                mine = named.layout.all_ids(names.shape, names.device).view(names.shape)
                if bool(((names == mine) | (names < 0)).all()):
                    continue
            named.layout, named.problem = Layout(N * T, ids=names.clamp(min=0).reshape(-1)), ""

    def _store(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], finding: Finding) -> Stored:
        if self.positions and self.verify != "never":
            self._name_positions(capture, roots, grads, finding)
        named = finding.named
        refused = self._bypassed(capture, finding)
        regular = all(n.settled and (n.layout is None or n.layout.ids is None) for n in named if n.reached)
        places: list[Place | None] | None = None
        if self.declared is not None and self.verify != "never" and finding.examples > 1:
            places = [None if n.names is None or n.layout is None else self.declared.place_of(n.names) for n in named]
            regular = all(place is not None or n.layout is None for place, n in zip(places, named, strict=True) if n.reached)
        elif regular and not self._shows_examples(capture, finding):
            regular = all(n.layout is None or n.layout.outer == n.layout.inner == 1 for n in named if n.reached)
        terms = self._terms(capture, roots, grads, finding)
        hidden = attribution.reached_leaves([e.node for e in finding.cut.edges], gathered=False)
        hidden &= {id(t.parameter) for t in capture.parameters if t not in capture.whole} - refused.keys()
        return Stored(
            finding.examples,
            [n.layout for n in named],
            [n.problem for n in named],
            [n.reached for n in named],
            regular,
            finding.labels,
            [(*_path(roots, e), axis) for e, axis in zip(finding.cut.edges, finding.cut.axes, strict=True)],
            terms,
            refused,
            hidden,
            finding.passes,
            self.structures.passes + 1,
            [n.settled for n in named],
            [finding.checkpoints.get(node, 0) for node in _checkpoints(roots)],
            attribution.nested([e for term in terms or () if (e := follow_path(roots, term.path, term.names)) is not None]),
            unproved=finding.unproved,
            places=places,
            part=None if finding.labels is None or finding.end is None else finding.end.part,
        )

    def _shows_examples(self, capture: Capture, finding: Finding) -> bool:
        """Whether the step's shapes determine how rows are divided among the examples. If losses are added by index or selected one
        by one, the next batch may divide as many rows differently, even if these rows are in regular order."""
        N = finding.examples
        if finding.labels is not None or N < 2 or any(N in lead[:2] for lead in self._leads(capture)):
            return True
        stack, seen = list(finding.cut.edges), set()
        while stack:
            edge = stack.pop()
            if edge.node in seen or self._barrier(edge.node):
                continue
            seen.add(edge.node)
            for _, before in _following(edge.node):
                if getattr(before.node, "variable", None) is not None:
                    continue
                if N in shape_of(before):
                    stack.append(before)
                elif not edge.node.name().startswith(("View", "UnsafeView", "ReshapeAlias")):
                    return False
        return True

    def _bypassed(self, capture: Capture, finding: Finding) -> dict[int, str]:
        """Return weights that part of the loss reaches without passing through the examples' losses, with the reason."""
        if not finding.cut.bypass or not finding.cut.edges:
            return {}
        reached = attribution.reached_leaves(finding.cut.bypass)
        names = [t.name for t in capture.parameters if id(t.parameter) in reached]
        if not names:
            return {}
        through = ", ".join(dict.fromkeys(_place(node) for node in finding.cut.bypass))
        reason = (
            f"a part of the loss belongs to no example: it reaches the weights by {through} without passing through the "
            "examples' losses. Wrap it in zerosum.auxiliary(term)"
        )
        if capture.strict:
            raise NotImplementedError(f"zerosum.Probe(strict=True): {names[0]} is not covered: {reason}")
        unseen = {id(leaf) for node in finding.cut.bypass if (leaf := getattr(node, "variable", None)) is not None}
        hidden = [t.name for t in capture.parameters if id(t.parameter) in unseen]
        if hidden and not capture._over:
            capture.warned = True
            warnings.warn(
                f"zerosum.Probe: {', '.join(hidden)} enters the loss by an operation that the probe cannot see, after the last "
                "tensor that separates examples, as the head of a fused loss does. It is not covered, and metrics such as D_grad "
                "are over the other parameters. Cover it with zerosum.rule, or use zsl_kernels.linear_cross_entropy in the model",
                UserWarning,
                stacklevel=2,
            )
        further = [x for node in finding.cut.bypass for x, _ in node.next_functions if x is not None]
        if _sites_before(further)[0] and not capture._over:  # more than a penalty on the weights only
            capture.warned = True
            warnings.warn(f"zerosum.Probe: {reason}. {len(names)} parameters are not covered", UserWarning, stacklevel=2)
        return {id(t.parameter): reason for t in capture.parameters if id(t.parameter) in reached}

    # The losses' factors ----------------------------------------------------------------------------------------------------------

    def _terms(
        self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None], finding: Finding
    ) -> list[Term] | None:
        """Return where the factors of the examples' losses can be read; None if nowhere."""
        if not finding.examples or finding.coupled:
            return None
        size = finding.examples if finding.labels is None else len(finding.labels)
        calls = {call.node: k for k, call in enumerate(capture.losses)}
        cuts = {(e.node, e.output_nr): axis for e, axis in zip(finding.cut.edges, finding.cut.axes, strict=True)}
        found: list[Term] = []
        edges: list[GradientEdge] = []
        stack: list[Step] = [(edge, (k,), (edge.node.name(),)) for k, edge in enumerate(roots)]
        axis = finding.cut.axes[0] if finding.cut.axes else 0
        seen: set[tuple[Node, int]] = set()
        while stack:
            edge, path, names = stack.pop()
            if (edge.node, edge.output_nr) in seen:
                continue
            seen.add((edge.node, edge.output_nr))
            if edge.node in capture.auxiliary or getattr(edge.node, "variable", None) is not None or hasattr(edge.node, "source"):
                continue
            if (edge.node, edge.output_nr) in cuts and (edge.node not in calls or len(shape_of(edge)) == 1 < size):
                if len(shape_of(edge)) > 1:
                    edge, path, names = self._deepest(roots, grads, edge, path, names, calls)
                found.append(Term(path, names, axis, calls.get(edge.node)))
                edges.append(edge)
            elif edge.node in calls:
                found.append(Term(path, names, self._order_of(capture, finding, edge), calls[edge.node]))
                edges.append(edge)
            elif not self._barrier(edge.node):
                for step, after in _following(edge.node):
                    stack.append((after, (*path, step), (*names, after.node.name())))
        # A penalty on rows in addition to known losses, such as one on the logits, keeps its own weight.
        known = [k for k, term in enumerate(found) if term.call is not None or len(shape_of(edges[k])) == 1]
        if known:
            found, edges = [found[k] for k in known], [edges[k] for k in known]
        if not found or not self._linear(roots, grads, edges):
            return None
        return found

    def _order_of(self, capture: Capture, finding: Finding, edge: GradientEdge) -> int:
        """Return 1 if consecutive rows of a loss's input belong to different examples, else 0."""
        before = next((e for _, e in _following(edge.node)), None)
        N = finding.examples
        if before is None or N < 2 or not finding.cut.edges or not shape_of(before) or shape_of(before)[0] in (1, N):
            return 0
        one = torch.zeros(shape_of(before), dtype=attribution._dtype(before), device=attribution._device(before))
        one[1] = 1
        found = capture.extra_backward([before], finding.cut.edges, [one], Phase.NAMING)
        for g, axis in zip(found, finding.cut.axes, strict=True):
            if g is not None:
                reached = g.movedim(axis, 0).flatten(1).any(1)
                return int(bool(reached[1:].any()))
        return 0

    def _deepest(
        self,
        roots: list[GradientEdge],
        grads: list[Tensor | None],
        edge: GradientEdge,
        path: tuple[int, ...],
        names: tuple[str, ...],
        calls: dict[Node, int],
    ) -> tuple[GradientEdge, tuple[int, ...], tuple[str, ...]]:
        """Return the first tensor of this shape that leads to the rows' losses only through weights and masks."""
        shape = shape_of(edge)
        while edge.node not in calls and not self._barrier(edge.node):
            steps = _following(edge.node)
            if len(steps) != 1:
                break
            step, after = steps[0]
            leaf = getattr(after.node, "variable", None) is not None
            if leaf or shape_of(after) != shape or not self._linear(roots, grads, [after]):
                break
            edge, path, names = after, (*path, step), (*names, after.node.name())
        return edge, path, names

    @staticmethod
    def _linear(roots: list[GradientEdge], grads: list[Tensor | None], edges: list[GradientEdge]) -> bool:
        """Whether the loss is linear in some tensors."""
        try:
            found = attribution.derivative(roots, grads, edges)
        except attribution.Unproved:
            return False
        return not any(g is not None and g.requires_grad for g in found)

    # Without proof ----------------------------------------------------------------------------------------------------------------

    def _trust(self, capture: Capture) -> Finding:
        """Assume rows (N, …), judged by their shapes only."""
        sizes = self._sizes(capture, [], [])
        N = sizes[0] if sizes else 0
        named = []
        for site in capture.sites:
            lead = site.lead
            if N <= 1:
                named.append(self._of_one(capture, site, N))
            elif self.declared is not None:
                found = self.declared.layout_by_shape(torch.Size(lead))
                shown = tuple(self.declared.labels.shape)
                problem = "" if found else f"used by {site.label} on rows {tuple(lead)}, which are not the packed rows {shown}"
                named.append(Named(found, problem))
            elif lead and lead[0] % N == 0 and lead[0]:
                layout = Layout(N, inner=lead[0] // N)
                named.append(self._of_positions(capture, layout, torch.Size(lead), True) if self.positions else Named(layout))
            else:
                named.append(
                    Named(
                        None,
                        f"used by {site.label} on rows {tuple(lead)}, whose first dimension is not a multiple of N = {N} examples",
                    )
                )
        return Finding(Cut([], []), N, None, [], named, unproved="verify='never': rows are assumed to be (N, …)")

    # Reentrant checkpoints --------------------------------------------------------------------------------------------------------

    def nested(self, capture: Capture, roots: list[GradientEdge], grads: list[Tensor | None]) -> Proof | None:
        """Attribute what a reentrant checkpoint recomputed. Its results' rows are (N, …), as the pass around it showed."""
        sites = capture.sites[capture.mark :]
        capture.mark = len(capture.sites)
        of = capture.current
        if of is None:
            return None
        N = of.examples
        if N <= 1 or self.verify == "never":
            for site in sites:
                if N <= 1:
                    site.layout = Layout(N)
                elif site.lead and site.lead[0] % N == 0:
                    site.layout = Layout(N, inner=site.lead[0] // N)
            return Proof(of)
        cut, given = Cut([], []), []
        axis = capture.checkpoints.get(torch._C._current_autograd_node(), 0)
        if axis < 0:
            for site in sites:
                site.problem = MIXED_CHECKPOINT
            self._warn_once(capture, f"{MIXED_CHECKPOINT}: the weights inside it are not covered")
            return Proof(of)
        for edge, grad in zip(roots, grads, strict=True):
            if grad is not None and shape_of(edge)[axis : axis + 1] == (N,):
                cut.edges.append(edge)
                cut.axes.append(axis)
                given.append(grad.detach())
        if not cut.edges or self.positions:
            return Proof(of)
        named = [Named(None, reached=False) for _ in sites]
        places = {site: k for k, site in enumerate(sites)}
        inputs = _leaf_inputs([e.node for e in cut.edges], {id(t.parameter) for t in capture.parameters})
        if sites:
            self._name_segment(capture, cut.edges, cut.axes, given, N, None, named, places)
        if not self._inputs_apart(capture, cut, given, inputs, N, axis):
            capture.poison = "the examples are coupled before the loss: a reentrant checkpoint mixes the rows of its input"
        for site, one in zip(sites, named, strict=True):
            site.layout, site.problem = one.layout, one.problem
            if one.mixed:
                reason = f"the examples are coupled before the loss: {one.problem} in {site.label}"
                site.problem = reason
                for source in site.sources:
                    source.refuse(reason)
                self._warn_once(capture, reason)
        if capture.poison:
            self._warn_once(capture, capture.poison)
        return Proof(of)

    def _warn_once(self, capture: Capture, reason: str) -> None:
        if not capture.warned:
            capture.warned = True
            warnings.warn(f"zerosum.Probe: {reason}", UserWarning, stacklevel=2)

    def _inputs_apart(self, capture: Capture, cut: Cut, given: list[Tensor], inputs: list[Tensor], N: int, axis: int) -> bool:
        """Whether the rows of a checkpoint's inputs belong to the examples in order, along one dimension."""
        if not inputs:
            return True
        found = []
        for weights in (None, attribution.weights_of_digit(N, 0), attribution.random_weights(N)):
            gs = [g if weights is None else g * along(weights, axis, g) for g, axis in zip(given, cut.axes, strict=True)]
            try:
                found.append(capture.extra_backward(cut.edges, inputs, gs, Phase.NAMING))
            except RuntimeError:
                if not reentrant([e.node for e in cut.edges]):
                    raise
                return False  # another reentrant checkpoint lies on the way to the inputs, so nothing is known
        for x, *more in zip(*found, strict=True):
            if x is None:
                continue
            if x.shape[axis : axis + 1] != (N,):
                return False
            plain = Signature.of(x.unsqueeze(-1))
            for y, weights in zip(more, (attribution.weights_of_digit(N, 0), attribution.random_weights(N)), strict=True):
                rows = along(weights, axis, x).expand(x.shape).reshape(-1).double()
                if not bool(attribution.follows(plain, Signature.of(y.unsqueeze(-1)), rows).all()):
                    return False
        return True


def _enough(examples: int) -> int:
    """Return how many proofs of a structure show that its rows' order does not depend on the data. Rows that the data moves, by
    sorting or routing, are in one regular order by chance once in N! times. The proofs leave a probability of 1e-4."""
    return 1 if examples < 2 else math.ceil(4 / (math.lgamma(examples + 1) / math.log(10)))


def _rank(finding: Finding) -> tuple[bool | int, ...]:
    """Rank findings; larger is better. It prefers another cut if nothing shows that a cut's examples stay separate after it."""
    sure = int(not any(finding.cut.axes)) if not finding.perfect else 3 if finding.consistent else 2
    proved = not finding.coupled, not finding.strange, not finding.unproved
    return *proved, sure, finding.good, not finding.doubtful, not finding.cut.bypass, -finding.reached, finding.orderly


def _consistent(capture: Capture, finding: Finding) -> bool:
    """Whether the use closest to the model's input has its examples in the first dimension, if that has their number."""
    for site, named in zip(capture.sites, finding.named, strict=True):
        if named.reached:
            layout = named.layout
            if layout is None or layout.ids is not None or not site.lead or site.lead[0] != layout.sequences:
                return True
            return layout.axis == 0
    return True


def _orderly(finding: Finding) -> bool:
    """Whether the use closest to the model's input has its examples in regular order. Otherwise, the examples may be something else
    of the same number, such as classes."""
    layout = next((n.layout for n in finding.named if n.reached), None)
    return layout is None or layout.ids is None


def _in_parts(finding: Finding) -> bool:
    """Whether the losses form N equal parts of N rows."""
    kinds = {(e.node.name(), shape_of(e)) for e in finding.cut.edges}
    return len(finding.cut.edges) == finding.examples > 1 == len(kinds)


def _unclear(finding: Finding) -> bool:
    """Whether each of N parts belongs to one example or one position, but the uses of the model's input, whose rows are mixed, do
    not show which."""
    return _in_parts(finding) and any(n.reached and n.mixed for n in finding.named)


def _in_order(capture: Capture, finding: Finding) -> bool:
    """Whether the use closest to the model's input has rows of two dimensions, examples first. If two dimensions of the losses have
    size N, nothing weaker shows that the second one counts examples."""
    for site, named in zip(capture.sites, finding.named, strict=True):
        if named.reached:
            layout = named.layout
            if layout is None or layout.ids is not None or layout.axis:
                return False
            if len(site.lead) > 1:
                return site.lead[0] == layout.sequences and layout.outer == layout.inner == 1
            return layout.outer == 1 < layout.inner
    return False


def _vectors(roots: Sequence[GradientEdge]) -> Iterator[int]:
    """Yield the lengths of vectors from which the roots are computed by sums, products and divisions."""
    stack, seen = list(roots), 0
    while stack and seen < 32:
        edge = stack.pop(0)
        seen += 1
        shape = shape_of(edge)
        following = [e for _, e in _following(edge.node) if e.node._input_metadata] if not Prover._barrier(edge.node) else []
        if shape == (1,) and following and all(len(shape_of(e)) < 2 and shape_of(e) != (1,) for e in following):
            shape = ()  # a total with a dimension of size 1
        if len(shape) == 1:
            yield shape[0]
        elif not shape:
            stack += following


def _sites_before(nodes: Sequence[Node]) -> tuple[dict[Site, Node], list[Node]]:
    """Return the uses that some nodes lead to, up to reentrant checkpoints, and these checkpoints."""
    sites: dict[Site, Node] = {}
    checkpoints: list[Node] = []
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if (site := getattr(node, "site", None)) is not None:
            sites[site] = node
        if (again := getattr(node, "again", None)) is not None:
            for one in again.sites:
                sites[one] = node
        if node.name() == REENTRANT:
            checkpoints.append(node)
            continue
        stack.extend(x for x, _ in node.next_functions if x is not None and x not in seen)
    return sites, checkpoints


def _all_sites_before(nodes: Sequence[Node]) -> set[Site]:
    """Return the uses that some nodes lead to, including those before reentrant checkpoints."""
    found: set[Site] = set()
    for node in attribution.nodes_between(nodes, set()):
        if (site := getattr(node, "site", None)) is not None:
            found.add(site)
        if (again := getattr(node, "again", None)) is not None:
            found.update(again.sites)
    return found


def _checkpoints(roots: Sequence[GradientEdge]) -> list[Node]:
    """Return all reentrant checkpoints that some roots lead to, in the graph's order."""
    return [node for node in attribution.nodes_between([e.node for e in roots], set()) if node.name() == REENTRANT]


def reentrant(nodes: Sequence[Node]) -> bool:
    """Whether some nodes lead to a reentrant checkpoint, which torch.autograd.grad cannot pass."""
    return bool(_sites_before(nodes)[1])


def _leaf_inputs(nodes: Sequence[Node], weights: set[int]) -> list[Tensor]:
    """Return the leaf tensors, other than weights, that some nodes lead to."""
    found: dict[int, Tensor] = {}
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in weights and leaf.ndim:
            found[id(leaf)] = leaf
        stack.extend(x for x, _ in node.next_functions if x is not None and x not in seen)
    return list(found.values())


def _path(roots: Sequence[GradientEdge], target: GradientEdge) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return a path from a root to an edge."""
    stack: list[Step] = [(edge, (k,), (edge.node.name(),)) for k, edge in enumerate(roots)]
    seen: set[tuple[Node, int]] = set()
    while stack:
        edge, path, names = stack.pop(0)
        if edge.node is target.node and edge.output_nr == target.output_nr:
            return path, names
        if (edge.node, edge.output_nr) in seen:
            continue
        seen.add((edge.node, edge.output_nr))
        for step, after in _following(edge.node):
            stack.append((after, (*path, step), (*names, after.node.name())))
    raise AssertionError("the cut lies before the roots")


def _following(node: Node) -> list[tuple[int, GradientEdge]]:
    """Yield where a node's gradients go next, with their positions."""
    return [(k, GradientEdge(before, number)) for k, (before, number) in enumerate(node.next_functions) if before is not None]


def _place(node: Node) -> str:
    if (site := getattr(node, "site", None)) is not None:
        return site.label
    return "an operation that the probe cannot see" if getattr(node, "variable", None) is not None else node.name()


def _random(edge: GradientEdge) -> Tensor:
    """Return a gradient for an edge."""
    drawn = torch.randn(shape_of(edge), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return drawn.to(attribution._device(edge), attribution._dtype(edge))
