"""Observes every use of a weight while the model runs, and passes it to the rule of its operation."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from zerosum.distributed import ddp
from zerosum.probe import compiled
from zerosum.probe.attribution import Signature, edge_of, repeatable
from zerosum.probe.contributions import Piece
from zerosum.probe.derived import derive, derive_lookup
from zerosum.probe.layout import Uncovered
from zerosum.probe.loss_tail import LOSSES, LossCall
from zerosum.probe.packed import Packed, declared
from zerosum.probe.parameters import DerivedWeight, GradSource, ParameterProbe, Ref
from zerosum.probe.proof import Proof, Prover, Short, Structures, Tree, reentrant
from zerosum.probe.results import Pass, add_up
from zerosum.probe.rules import APPLIED, KNOWN, RULES, again, broadcast, embedding, linear, norm
from zerosum.probe.rules.site import Phase, Site
from zsl_kernels.weight_uses import recorded
from zsl_kernels.weight_uses.eager import NotCopied, Weight, only_for_weights, run_known

_ACCESSORS = {"__get__", "__set__", "__delete__"}
_NESTED = {tuple, list, dict}
_VIEWS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}


class Capture(TorchFunctionMode):
    """Watches torch function calls while a probe is open. It changes nothing in the model except a hook on each parameter, which it
    removes again.

    An *epoch* is the forward code that runs until the first use of a weight after a backward pass. Its uses are kept until then, so
    that a graph can be differentiated in parts.
    """

    inseparable = ""  # why the probe cannot differentiate an operation again for one example

    def __init__(
        self,
        model: nn.Module,
        *,
        prover: Prover,
        structures: Structures,
        direction: Callable[[list[str]], Tensor | None],
        gram: bool = False,
        strict: bool = False,
        parameter_type: type[ParameterProbe] = ParameterProbe,
    ) -> None:
        super().__init__()
        self.open = False
        self.model = model
        self.strict = strict
        self.prover = prover
        self.structures = structures
        if prover.positions:
            self.inseparable = "positions cannot be separated in it"
        self.phase = Phase.PLAIN
        self.current: Pass | None = None
        self.passes: list[Pass] = []
        self.proofs: list[Proof] = []
        self.state = structures.state
        self.state.epoch += 1
        self.state.forward, self.state.thread = True, threading.get_ident()
        self.state.setting = recorded.setting()
        if not KNOWN.keys() >= {call.func for call in structures.calls.values() if call.short is not None}:
            structures.calls.clear()  # a rule was registered for a call that was already known
            structures.known.clear()
        self.known = structures.known
        self.sites: list[Site] = []
        self.keys: list[Any] = []
        self.losses: list[LossCall] = []
        self.auxiliary: set[Node] = set()
        self.inputs: list[Tensor] = []  # the first tensor of each call of the model
        self.extra = False  # whether the running backward pass is the probe's own
        self.signatures: dict[Site, Signature] = {}
        self.anchor = torch.zeros((), requires_grad=True)
        self._bases = structures.tracks or structures.views  # whether to look for views of weights
        self._depth = 0  # nesting depth of backward passes
        self._proving = False  # whether rows are being attributed
        self._over = False  # whether a backward pass ended this epoch
        self._thread = threading.get_ident()
        tree = structures.tree
        if tree is None or not tree.is_of(model):
            tree = structures.tree = Tree(model)
            structures.ddps = ddp.wrappers(tree.modules)
            structures.calls.clear()
            structures.known.clear()
        self.modules, self.shards, names = tree.modules, tree.shards, tree.names
        self.copies = bool(structures.ddps)
        self.parameters: list[ParameterProbe] = []
        for p, known in names.items():
            if p.requires_grad:
                t = tree.probes.get(p)
                if t is None:
                    t = parameter_type(self, known, p) if self.shards is None else self.shards.probe(self, known, p)
                    tree.probes[p] = t
                t.renew(self, direction(known), gram)
                if p.is_complex():
                    t.refuse("it is complex")
                self.parameters.append(t)
        self.sources: dict[int, GradSource] = {id(t.parameter): t for t in self.parameters}
        self._derived: list[DerivedWeight] = []
        self.whole: dict[ParameterProbe, str] = {}  # weights for which the whole loss is differentiated for each example
        self.passes_epoch = -1  # the epoch of the last pass
        self.mark = 0  # index of the first site that a checkpoint recomputes
        self._poison = ""
        # The example dimension of each reentrant checkpoint's results; -1 if their rows belong to several examples.
        self.checkpoints: dict[Node, int] = {}
        self.warned = False
        self._retained: list[weakref.ref[Tensor]] = []
        # Which tensors do not depend on data, while that must be determined.
        self._constants: WeakIdKeyDictionary | None = WeakIdKeyDictionary() if structures.tracks else None
        if self._constants is not None:
            own = (x for m in self.modules for x in vars(m).values() if isinstance(x, Tensor))
            frozen = [p for p in names if not p.requires_grad]
            for x in (*model.buffers(), *frozen, *own):
                self._constants[x] = True
            self._frozen = {p.untyped_storage()._cdata for p in frozen}
        self.recomputed = False  # whether a checkpoint has recomputed uses
        self.hooked = False  # whether the user's hooks see what is computed
        self.compiling = False  # whether code may be compiled in this block
        self.traced = 0  # number of the epoch's uses that ran in compiled code
        self._by_memory: dict[Any, ParameterProbe] = {}  # compiled code passes a weight's memory, not the parameter object
        self._stamps: dict[int, tuple[Site, str]] = {}  # uses in compiled code, by their stamps
        self._tables: list[DerivedWeight] = []  # rows of position tables in compiled code
        self.sees_all = self._bases or self._constants is not None  # whether calls without weights matter too
        self._stack = ExitStack()

    def start(self) -> None:
        self.open = True
        with ExitStack() as stack:
            stack.callback(self._remove_hooks)
            if self.shards is not None:
                stack.enter_context(self.shards.watched(lambda: self.unnoticed, self.parameters))
            for t in self.parameters:
                # Like register_hook, but without its handle.
                hooks: dict[Any, Any] | None = t.parameter._backward_hooks
                if hooks is None:
                    t.parameter._backward_hooks = hooks = OrderedDict()
                hooks[t.marks] = t.marks
            for module in self.modules:
                if module._backward_hooks or module._backward_pre_hooks or module._forward_hooks or module._forward_pre_hooks:
                    self.hooked = True
                    for hooks in (module._backward_hooks, module._backward_pre_hooks):
                        stack.enter_context(self._guarding(hooks, _Guarded))
                    for hooks in (module._forward_hooks, module._forward_pre_hooks):
                        stack.enter_context(self._guarding(hooks, _GuardedForward))
            steps = self.structures.compiled
            mode = None if steps is None or self.hooked else steps.mode_for(self)
            if mode is not None and steps is not None:
                self.compiling = steps.compiling
                if not self.compiling:
                    stack.enter_context(torch.compiler.set_stance("eager_on_recompile"))
                mode.hook.put_on(self.model)
                stack.callback(mode.hook.take_off, self.model)
                self._by_memory = {_memory(t.parameter): t for t in self.parameters}
                mode.capture = self
                stack.callback(setattr, mode, "capture", None)
                stack.enter_context(mode)
                self._stack = stack.pop_all()
                return
            if not isinstance(self.model, torch.jit.ScriptModule):
                stack.callback(self.model.register_forward_pre_hook(_Hook(self, "before_model"), with_kwargs=True).remove)
            for function, replacement in APPLIED.items():
                stack.enter_context(_seen_applying(function, replacement))
            if "torch._dynamo" in sys.modules:
                # Compiled code would bypass the mode, so code in the block runs uncompiled.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self)
            self._stack = stack.pop_all()

    def _remove_hooks(self) -> None:
        for t in self.parameters:
            hooks: dict[Any, Any] | None = t.parameter._backward_hooks
            if hooks:
                hooks.pop(t.marks, None)

    def stop(self) -> None:
        self._stack.close()
        self.open = False
        self.phase = Phase.PLAIN
        for t in self.parameters:
            if not t.parameter._backward_hooks:
                t.parameter._backward_hooks = None  # as before the first hook

    @property
    def epoch(self) -> int:
        return self.state.epoch

    @property
    def poison(self) -> str:
        """The reason why the next rows in this backward pass may belong to several examples, or ""."""
        return self._poison

    @poison.setter
    def poison(self, why: str) -> None:
        self._poison = why
        if why:
            self.state.at_once = False

    @property
    def elsewhere(self) -> bool:
        """Whether this is another thread of the user's, whose backward passes the mode does not see. (Autograd runs the backward
        passes of other devices in its own threads, with the mode on.)"""
        return not self._depth and self.open and threading.get_ident() != self._thread

    def release(self) -> None:
        """Break reference cycles."""
        for t in self.parameters:
            t.release()
        for proof in self.proofs:
            proof.release()
        self.proofs.clear()
        self.checkpoints.clear()
        self.whole.clear()
        self.sources.clear()
        self._derived.clear()
        self.parameters.clear()
        self.sites.clear()
        self.losses.clear()
        self.inputs.clear()
        self.auxiliary.clear()
        self.signatures.clear()
        self._stamps.clear()
        self._tables.clear()

    @property
    def unnoticed(self) -> bool:
        """Whether the running code is the probe's own, which users' hooks must not see."""
        return self.extra or self._proving

    @property
    def running(self) -> bool:
        """Whether a backward pass is running."""
        return self._depth > 0

    @property
    def nested(self) -> bool:
        """Whether this backward pass runs inside another one."""
        return self._depth > 1

    def unbatched(self) -> AbstractContextManager[Any]:
        """Return the context in which a backward pass's results are computed."""
        return nullcontext() if self.current is None else self.current.unbatched()

    # The context that rules use --------------------------------------------------------------------------------------------------

    def ref(self, x: Any) -> Ref | None:
        """Return a reference to the weight that ``x`` is or is a view of, or None."""
        if x is None or not isinstance(x, Tensor) or not x.requires_grad:
            return None
        source = self.sources.get(id(x))
        if source is not None:
            return source.ref
        base = x._base
        source = None if base is None else self.sources.get(id(base))
        if source is None or x.dtype != source.tensor.dtype or x.is_conj() or x.is_neg():
            return None
        piece = Piece.of(x)
        self.structures.views = True
        return None if piece.overlaps else Ref(source, piece)

    def enter(self, site: Site) -> None:
        self.sites.append(site)
        self.recomputed |= self._depth > 0

    def sign(self, site: Site, rows: Tensor) -> None:
        self.signatures[site] = Signature.of(rows)

    def forget(self, x: Tensor) -> None:
        """Stop treating a tensor computed from weights only as a weight, because it is a term of the loss."""
        if isinstance(self.sources.get(id(x)), DerivedWeight):
            del self.sources[id(x)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn the mode on again: it is off while it handles a call."""
        with self:
            yield

    # The mode --------------------------------------------------------------------------------------------------------------------

    def _handle(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _SPECIAL:
            return _SPECIAL[func](self, func, args, kwargs or {})
        if (self._touches(args) or (kwargs and self._touches(kwargs.values()))) and torch.is_grad_enabled():
            return self._weights(func, args, kwargs or {})
        result = func(*args, **kwargs) if kwargs else func(*args)
        if self._constants is not None:
            self._follow(func, args, kwargs or {}, result)
        return result

    def _touches(self, args: Iterable[Any]) -> bool:
        """Whether an argument is a weight."""
        sources, bases = self.sources, self._bases
        for x in args:
            if id(x) in sources:
                return True
            kind = type(x)
            if kind in _NESTED:
                if self._touches(x.values() if kind is dict else x):
                    return True
            elif bases and isinstance(x, Tensor) and x.requires_grad and x._base is not None and id(x._base) in sources:
                return True
        return False

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note results that do not depend on data."""
        assert self._constants is not None
        if getattr(func, "__name__", "") in _ACCESSORS and func not in _VIEWS:
            return
        operands = [x for x in again.leaves(args, kwargs) if isinstance(x, Tensor)]
        frozen = [self._of_frozen(x) for x in operands]
        constant = all(frozen)
        if constant or any(
            (x.requires_grad and not of) or self._constants.get(x) is False for x, of in zip(operands, frozen, strict=True)
        ):
            for r in again.leaves(result):
                if isinstance(r, Tensor) and (constant or not r.requires_grad) and r not in self._constants:
                    self._constants[r] = constant

    def _of_frozen(self, x: Tensor) -> bool:
        """Whether a tensor does not depend on data, even if it requires a gradient. PEFT makes new Parameters from frozen ones,
        which require one by default, and then detaches what it computes from them."""
        assert self._constants is not None
        if not x.requires_grad or x in self._constants:
            return self.is_constant(x) or self._constants.get(x) is True
        return isinstance(x, nn.Parameter) and x.is_leaf and x.untyped_storage()._cdata in self._frozen

    def is_constant(self, x: Tensor) -> bool:
        return not x.requires_grad and (x.ndim == 0 or (self._constants is not None and self._constants.get(x) is True))

    def _weights(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle a call that has weights among its operands."""
        if (known := self._as_before(func, args, kwargs)) is not None:
            return known[0]
        name = getattr(func, "__name__", str(func))
        if (name in _ACCESSORS and func not in _VIEWS) or name in ("detach", "detach_", "requires_grad_", "register_hook"):
            result = func(*args, **kwargs)
            if self._constants is not None and name == "detach":
                self._constants[result] = True
            return result
        if torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0:
            return func(*args, **kwargs)  # vmap and similar transforms add their own batch dimension; forward mode has no gradients
        if self.elsewhere:
            return func(*args, **kwargs)
        tensors = [x for x in again.leaves(args, kwargs) if isinstance(x, Tensor)]
        refs = [ref for ref in map(self.ref, tensors) if ref is not None]
        if not refs:
            return func(*args, **kwargs)
        others = [x for x in tensors if self.ref(x) is None]
        if not others:
            result = func(*args, **kwargs)
            if not any(isinstance(x, Tensor) for x in again.leaves(result)):
                return result  # numel() and similar calls only ask about a weight
        if not self._depth and self._over:
            self._begin_epoch()
        for ref in refs:
            for t in ref.source.parameters:
                t.used = True
        key = (
            func,
            tuple(id(ref.source.parameters[0].parameter) for ref in refs),
            tuple((x.shape, x.stride(), x.dtype) for x in tensors),
        )
        constant = not any(x.requires_grad for x in others)
        alone = constant and self._is_alone(key, others)
        device = refs[0].source.tensor.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if not self._depth:
            # (A lookup with the same ids for all examples is a function of one weight.)
            lookup = (refs[0].source.parameters[0].name,) if alone and func is F.embedding else ()
            self.keys.append((func, tuple(x.shape for x in tensors), tensors[0].dtype, autocast, alone, *lookup))
            if not alone:
                self.structures.remember(len(self.keys) - 1, func, args, kwargs, refs, self.keys[-1], autocast)
        if alone:
            if others:
                result = func(*args, **kwargs)
            self._derive(func, args, kwargs, refs, result)
            return result
        if autocast is not None:
            self._rounds(refs, autocast)
        return self._use(func, args, kwargs, refs, tensors)

    def _as_before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """Return the result, in a tuple, of a call that repeats the call at its position in the last pass; None for a new call."""
        if self._depth or self._constants is not None:
            return None
        if self._over:
            self._begin_epoch()
        call = self.structures.calls.get(len(self.keys))
        if call is None or call.func is not func or not call.by_rule:
            return None
        if (torch.get_autocast_dtype(call.device) if torch.is_autocast_enabled(call.device) else None) != call.autocast:
            return None
        if torch._C._functorch.maybe_current_level() is not None or self.elsewhere or torch.autograd.forward_ad._current_level >= 0:
            return None
        if call.short is not None and (result := run_known(self, func, args, kwargs, self.sources)) is not None:
            return (result,)
        rule = RULES.get(func)
        if rule is None or not call.fits(args, kwargs):
            return None
        sites = self.sites
        before = len(sites)
        try:
            result = rule(self, func, args, kwargs)
        except Uncovered:
            return None
        self.keys.append(call.key)
        for source in call.sources:
            source.used = True
            source.eps = max(source.eps, call.eps)
        for k in range(before, len(sites)):
            sites[k].label = call.label
            sites[k].known = call.short and call.short.native
        return (result,)

    def begin(self) -> Site:
        """Open the site of the known call that runs next."""
        call = self.structures.calls[len(self.keys)]
        assert call.short is not None
        return call.short.begin(self, call)

    def _is_alone(self, key: Any, others: list[Tensor]) -> bool:
        """Whether a call depends on weights only, because its other operands do not depend on data."""
        if not others:
            return True
        place = (len(self.keys), *key[:2])
        known = self.structures.alone.get(key if self._depth else place)
        if known is None:
            known = self._constants is not None and all(self.is_constant(x) for x in others)
            if self._constants is None:
                self.structures.tracks = True  # to determine it from the next block on
            self.structures.alone[key] = self.structures.alone[place] = known
        return known

    def _unknown(self, func: Any, refs: list[Ref], tensors: list[Tensor]) -> Any:
        """Return keys of the call if it is unknown whether its other operands depend on data, and else None."""
        others = [x for x in tensors if self.ref(x) is None]
        if self._constants is None or any(x.requires_grad or x in self._constants for x in others):
            return None
        ids = tuple(id(ref.source.parameters[0].parameter) for ref in refs)
        shapes = tuple((x.shape, x.stride(), x.dtype) for x in tensors)
        return (len(self.keys) - 1, func, ids), (func, ids, shapes)

    def _use(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], refs: list[Ref], tensors: list[Tensor]) -> Any:
        """Handle a use of a weight with activations, by the rule of its operation."""
        name = getattr(func, "__name__", str(func))
        before = len(self.sites)
        reason = f"used by {name}, which no rule covers"
        covered = not any(x.is_complex() for x in tensors)
        if not covered:
            reason = f"used by {name} with complex numbers"
        parallel = self.shards is not None and self.shards.is_parallel(tensors)
        rule = self.shards.rule(func) if self.shards is not None and parallel else RULES.get(func)
        if parallel:
            reason = f"used by {name} on DTensors, which no rule covers"
        try:
            if rule is not None and covered:
                try:
                    result = rule(self, func, args, kwargs)
                except Uncovered as problem:
                    reason = f"used by {name} on {problem}"
                else:
                    call = None if parallel else self.structures.calls.get(len(self.keys) - 1)
                    if call is not None and not self._depth and call.key is self.keys[-1]:
                        call.by_rule = True
                        if (known := KNOWN.get(func)) is not None:
                            call.short = Short.of(self.state, known, call, args, kwargs)
                            if call.short is not None:
                                self.known[len(self.keys) - 1] = call.short.native
                    return result
            self.refuse_if_strict(refs[0].source.parameters[0], reason)
            if covered and not parallel:
                try:
                    return again.call(self, func, args, kwargs)
                except Uncovered as problem:
                    reason = f"{reason}; {problem}"
        finally:
            unknown = self._unknown(func, refs, tensors)
            for site in self.sites[before:]:
                site.ambiguous = unknown
                if site.refs:
                    site.label = f"{name} ({', '.join(t.name for t in refs[0].source.parameters)})"
        for ref in refs:
            for t in ref.source.parameters:
                self.differentiate_whole(t, reason)
        return func(*args, **kwargs)

    def differentiate_whole(self, t: ParameterProbe, reason: str) -> None:
        """Cover a weight by differentiating the whole loss for each example, as a last resort."""
        if self.shards is not None:
            t.refuse(f"{reason}; with sharded weights, the probe does not differentiate the whole loss again for each example")
        elif self.inseparable:
            t.refuse(f"{reason}; {self.inseparable}" if self.inseparable not in reason else reason)
        elif t not in self.whole:
            self.whole[t] = reason

    def refuse_if_strict(self, t: ParameterProbe, reason: str) -> None:
        if self.strict:
            raise NotImplementedError(f"zerosum.Probe(strict=True): {t.name} is {reason}")

    @staticmethod
    def _rounds(refs: list[Ref], dtype: torch.dtype) -> None:
        for ref in refs:
            for t in ref.source.parameters:
                t.eps = max(t.eps, torch.finfo(dtype).eps)

    # Tensors computed from parameters only ---------------------------------------------------------------------------------------

    def _derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], refs: list[Ref], result: Any) -> None:
        """Register a tensor computed from parameters only, so that its uses count as the parameters' uses."""
        for out in again.leaves(result):
            if not isinstance(out, Tensor) or self.ref(out) is not None:
                continue
            if not out.requires_grad:
                if self._constants is not None:
                    self._constants[out] = True
                continue
            parents = list(dict.fromkeys(t for ref in refs for t in ref.source.parameters))
            name = getattr(func, "__name__", func)
            if self.shards is not None and self.shards.is_parallel([out]):
                for t in parents:
                    self.refuse_if_strict(t, f"used by {name}, a function of parameters that are DTensors")
                    t.refuse(f"used by {name}, a function of parameters that are DTensors")
                return
            if Piece.of(out).overlaps or out.is_complex() or not isinstance(result, Tensor) or again.writes(str(name)):
                for t in parents:
                    self.refuse_if_strict(t, f"used by {name}, a function of parameters that no rule covers")
                    self.differentiate_whole(t, f"used by {name}, a function of parameters that no rule covers")
                return
            self._rounds(refs, out.dtype)
            derived = derive(self, func, args, kwargs, refs, out)
            self._derived.append(derived)
            self.sources[id(out)] = derived

    # Compiled code -------------------------------------------------------------------------------------------------------------

    def enter_traced(self, stamp: int, kind: str, tensors: Sequence[Tensor | None]) -> None:
        """Register a use that runs in compiled code."""
        if not self._watching or self._depth:
            return
        if self._over:
            self._begin_epoch()
        func = compiled.FUNCTIONS[kind]
        if kind == "add":
            self._add_traced(stamp, tensors)
            return
        x, *weights = (tensors[k] for k in ((1, 2, 0) if kind == "addmm" else range(len(tensors))))
        assert x is not None
        sources = [None if weight is None else self._by_memory.get(_memory(weight)) for weight in weights]
        if all(t is None for t in sources):
            return  # a use of another model's weights
        shapes = tuple(y.shape for y in tensors if y is not None)
        steps = self.structures.compiled
        assert steps is not None
        if kind == "embedding" and (t := sources[0]) is not None and (self.parameters.index(t), x.shape) in steps.tables:
            t.used = True
            self.keys.append((func, shapes, x.dtype, None, True, t.name))
            self._tables.append(derive_lookup(self, x.clone(), t.ref))
            self.traced += 1
            return
        own = [t.name for t in sources if t is not None]
        lead = x.shape if kind == "embedding" else x.shape[:-1]
        site = Site(self, f"{func.__name__} ({', '.join(own[:1])})", [None if t is None else t.ref for t in sources], lead)
        self.keys.append((func, shapes, x.dtype, None, False))
        self._stamps[stamp] = site, kind
        self.traced += 1
        for k, t in enumerate(sources):
            if t is not None:
                t.used = True
                t.eps = max(t.eps, torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0)
                t.covered_by(f"{kind} bias" if k else kind)
                t.use_apart()
                site.alone |= 1 << k

    def _add_traced(self, stamp: int, tensors: Sequence[Tensor | None]) -> None:
        """Register a sum of rows and a tensor that is the same for all examples: the rows of the only position table, if any."""
        if len(self._tables) == 1:
            x, same = (y.shape for y in tensors if y is not None)
            (derived,) = self._tables
            derived.covered_by("add")
            site = Site(self, f"add ({derived.parameters[0].name})", [derived.ref], x)
            self.keys.append((torch.add, (x, same), None, None, False))
            self._stamps[stamp] = site, "add"
            self.traced += 1

    def refuse_traced(self, weight: Tensor) -> None:
        """Refuse a weight because of an unknown use in compiled code."""
        if (t := self._by_memory.get(_memory(weight))) is not None:
            t.refuse(compiled.UNKNOWN)

    def leave_traced(self, stamp: int, grad: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """Return the gradients of a use's weight and bias, if they are measured."""
        if stamp not in self._stamps or self.phase is not Phase.MEASURING:
            return None, None
        site, kind = self._stamps[stamp]
        if kind == "add":
            if (ref := site.ref()) is not None and site.layout is not None:
                part = broadcast.contribution(site.layout, grad.clone(), ref.source.tensor.shape, ref.piece)
                ref.source.pull(ref.piece, part)
            return None, None
        if not all(source.ready for source in site.sources):
            # A source waits for other uses or for the whole gradient. The compiler reuses its tensors' memory, so copy them.
            grad, saved = grad.clone(), [x.clone() for x in saved]
        if kind in ("linear", "addmm"):
            backward = linear.backward if kind == "linear" else linear.addmm_backward
            return backward(site, grad, saved, (False, *wanted))[1:]
        if kind == "embedding":
            ids, weight = saved
            return embedding.backward(site, grad, ids, weight.shape[0], weight.dtype), None
        return norm.scale_backward(site, grad, saved[0], wanted)

    # Backward --------------------------------------------------------------------------------------------------------------------

    def _run_backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the engine with the mode on, so that uses that a checkpoint recomputes are observed again.

        These functions would pass tensors to the mode first, and a mode is off while it handles a call. They do not do this with
        graph edges.
        """
        outputs, *inputs = args  # the inputs of `grad`; everything else is passed by keyword
        kwargs = {("grad_tensors" if key == "gradient" else key): value for key, value in kwargs.items()}
        if func in (Tensor.backward, torch.autograd.backward) and inputs:
            names = ("grad_tensors", "retain_graph", "create_graph")
            kwargs |= dict(zip(names, inputs, strict=False))
            inputs = []
        if kwargs.get("inputs") is not None:
            kwargs["inputs"] = _edges(kwargs["inputs"])
        given = kwargs.get("grad_tensors", kwargs.get("grad_outputs", inputs[1] if len(inputs) > 1 else None))
        engine = torch.autograd.backward if func is Tensor.backward else func
        if (steps := self.structures.compiled) is not None and (kwargs.get("create_graph") or kwargs.get("retain_graph")):
            steps.bar("a graph is differentiated again")
        proof = None
        if self._watching:
            if self.shards is not None:
                self.shards.check_loss(outputs)
            proof = self._prepare(_roots(outputs), _given(given, outputs))
        if proof is None:
            return self._run(engine, outputs, inputs, kwargs, Phase.PLAIN, self.current if self._depth else None)
        self._find_whole(proof)
        if proof.apart and self.shards is not None:
            raise NotImplementedError(
                "zerosum.auxiliary: a model that fully_shard has sharded is not supported: do not mark the term"
            )
        if proof.apart:
            # Part of the loss belongs to no example, so what is measured differs from what is accumulated.
            self._measure_apart(proof)
            return self._run(engine, outputs, inputs, kwargs, Phase.PLAIN, None)
        try:
            with proof.reading():
                return self._run(engine, outputs, inputs, kwargs, Phase.MEASURING, proof.of)
        except BaseException:
            for t in self.parameters:
                t.drop()
                if t.results is not None and proof.of in t.results.passes:
                    t.refuse("a backward pass raised an error before it ended")
            raise
        finally:
            self._end_pass(proof)

    def _run(self, engine: Any, outputs: Any, inputs: Sequence[Any], kwargs: Any, phase: Phase, of: Pass | None) -> Any:
        state = self.state
        before, once, forward = (self.phase, self.current), state.at_once, state.forward
        self.phase, self.current = phase, of
        self._depth += 1
        if self._depth == 1:
            self.mark, self.poison = len(self.sites), ""
        state.forward = False
        state.at_once = phase is Phase.MEASURING and self._depth == 1 and of is not None and of.simple
        sites = len(self.sites)
        try:
            # (Compiled code recomputes nothing that must be observed, and the compiler's own calls must not be.)
            with nullcontext() if self.traced else self:
                return engine(_edges(outputs), *map(_edges, inputs), **kwargs)
        finally:
            state.at_once, state.forward = once and not self.poison, forward
            self._depth -= 1
            if not self._depth:
                del self.sites[sites:]  # the recomputed ones
            self.phase, self.current = before

    def _prepare(self, roots: list[GradientEdge], grads: list[Tensor | None]) -> Proof | None:
        """Return what is known about the graph of a backward pass; None if it leads to no use of a weight."""
        if self._depth:
            return self.prover.nested(self, roots, grads) if self.phase is Phase.MEASURING else None
        if not self.sites and not self.whole:
            return None
        self._proving = True
        try:
            with self._differentiable(roots):
                proof = self.prover.attribute(self, roots, grads)
        finally:
            self._proving = False
        if proof is not None:
            self.proofs.append(proof)
            if proof.of not in self.passes:
                self.passes.append(proof.of)
        return proof

    def _differentiable(self, roots: list[GradientEdge]) -> AbstractContextManager[None]:
        """Allow differentiating the step again: gather sharded weights, on all ranks if one needs it."""
        if self.shards is None or not self.shards.any(self.prover.differentiates(self, roots)):
            return nullcontext()
        return self.shards.gathered()

    def extra_backward(
        self, outputs: Sequence[GradientEdge], inputs: Sequence[Any], grads: Sequence[Tensor | None], phase: Phase
    ) -> tuple[Tensor | None, ...]:
        """Run ``torch.autograd.grad`` without side effects: it accumulates nothing and runs no user hooks."""
        quiet = ddp.unnoticed(self.structures.ddps) if self.copies else nullcontext()
        with self.silenced(phase), quiet, repeatable(outputs) if phase is Phase.NAMING else nullcontext():
            return self._run(
                torch.autograd.grad,
                list(outputs),
                [list(inputs), list(grads)],
                {"retain_graph": True, "allow_unused": True},
                phase,
                self.current,
            )

    @contextmanager
    def silenced(self, phase: Phase) -> Iterator[None]:
        """Disable users' hooks."""
        state = self.state
        before, self.extra, phase_before, once = self.extra, True, self.phase, (state.at_once, state.forward)
        self.phase, state.at_once, state.forward = phase, False, False
        hooks = [(h, dict(h)) for t in self.parameters if (h := t.parameter._backward_hooks)] if not before else []
        kept = [(x, x.grad) for r in self._retained if (x := r()) is not None] if not before else []
        for h, _ in hooks:
            h.clear()
        for x, _ in kept:
            x.grad = None
        try:
            # (A checkpoint recomputes with the mode on, as in its first run.)
            with torch._C._EnableTorchFunction():
                yield
        finally:
            self.extra, self.phase, (state.at_once, state.forward) = before, phase_before, once
            for h, saved in hooks:
                h.update(saved)
            for x, grad in kept:
                x.grad = grad

    def _find_whole(self, proof: Proof) -> None:
        """Compute the gradients of weights that need it by one backward pass of the whole loss per example."""
        wanted = [t for t in self.whole if not t.problem]
        if not wanted or self._depth:
            return
        if proof.cut is None:
            for t in wanted:
                t.refuse(self.whole[t])
            return
        if reentrant([e.node for e in proof.cut.edges]):
            for t in wanted:
                t.refuse(f"{self.whole[t]}; a reentrant checkpoint comes after it, which cannot be differentiated for one example")
            return
        E = proof.of.examples
        found = [t.parameter.new_zeros(E, *t.parameter.shape) for t in wanted]
        reached = set()
        for i in range(E):
            gs = self.extra_backward(proof.cut.edges, [t.parameter for t in wanted], proof.part(i), Phase.PLAIN)
            for t, mine, g in zip(wanted, found, gs, strict=True):
                if g is not None:
                    # Copy immediately: a function may return the same memory in each pass, as graphed callables do.
                    mine[i] = (g.to_dense() if g.is_sparse else g).detach()
                    reached.add(t)
        for t, mine in zip(wanted, found, strict=True):
            if t in reached:
                t.covered_by("the loss, differentiated again for each example")
                t.give(mine)
                t.defer()

    def _measure_apart(self, proof: Proof) -> None:
        """Measure the examples' own losses in a separate backward pass."""
        assert proof.cut is not None
        inputs = [t.parameter for t in self.parameters]
        self.current = proof.of
        try:
            with self._own_hooks():
                self._run(
                    torch.autograd.grad,
                    proof.cut.edges,
                    [inputs, proof.gradients],
                    {"retain_graph": True, "allow_unused": True},
                    Phase.MEASURING,
                    proof.of,
                )
        finally:
            self.current = None
            self._end_pass(proof)

    @contextmanager
    def _own_hooks(self) -> Iterator[None]:
        """Run the probe's hooks on parameters and disable all others."""
        self.extra = True
        hooks = [(h, dict(h)) for t in self.parameters if (h := t.parameter._backward_hooks)]
        for h, saved in hooks:
            for key, hook in saved.items():
                if not isinstance(hook, Weight):
                    del h[key]
        try:
            yield
        finally:
            self.extra = False
            for h, saved in hooks:
                h.clear()
                h.update(saved)

    def _end_pass(self, proof: Proof) -> None:
        if self._depth:
            return
        self.current = proof.of
        try:
            for t in self.parameters:
                t.end_pass()
            self.add_up()
            if (steps := self.structures.compiled) is not None:
                if self.traced and any(t.problem for t in self.parameters if t.used):
                    steps.bar("a gradient in compiled code was not what was expected")
                elif proof.stored is not None:
                    steps.learn(self, proof.stored, proof.roots)
        finally:
            self.current = None
            proof.release()
        for derived in self._derived:
            derived.drop()
        self._over, self.state.forward = True, False

    def add_up(self) -> None:
        """Compute the sums over coordinates of what was measured."""
        if self.shards is not None:
            return  # computed for all ranks at the end of the block
        add_up((t.results, t.direction) for t in self.parameters if t.results is not None)

    def _begin_epoch(self) -> None:
        self.state.epoch += 1
        self._over, self.state.forward = False, not self._depth
        self.sites.clear()
        self.keys.clear()
        self.losses.clear()
        self.auxiliary.clear()
        self._stamps.clear()
        self._tables.clear()
        self.traced = 0
        self.prover.declared = None
        del self.inputs[:-1]
        self.whole.clear()
        for derived in self._derived:
            self.sources.pop(id(derived.tensor), None)
        self._derived.clear()

    @property
    def _watching(self) -> bool:
        return self.open and not self.extra and not self.elsewhere

    def declare(self, x: Tensor, packed: Packed, argument: str) -> None:
        """Register which example each row of the next forward pass belongs to."""
        if not self._watching or self._depth or not torch.is_grad_enabled():
            return
        if self._over:
            self._begin_epoch()
            self.inputs.clear()
        self.prover.declare(x, packed, argument)

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn N from the model's inputs."""
        if not self._watching or self._depth or not torch.is_grad_enabled():
            return
        if torch._C._functorch.maybe_current_level() is not None:
            return
        if (wrapper := ddp.around()) is not None and wrapper not in self.structures.ddps:
            self.structures.ddps.append(wrapper)
            self.copies = True
            for t in self.parameters:
                t.marks.merges = True
        if self._over:
            self._begin_epoch()
            self.inputs.clear()
        inputs = [x for x in again.leaves(args, kwargs) if isinstance(x, Tensor)]
        if self._constants is not None:
            for x in inputs:
                self._constants[x] = False  # an input is data, however it was made
        if self.structures.compiled is not None:
            self.structures.compiled.look(inputs)
        if inputs:
            self.inputs.append(inputs[0])
            self.prover.look(kwargs)

    def _loss(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle a loss function, which shows the rows that it reduces."""
        touches = torch.is_grad_enabled() and (self._touches(args) or self._touches(kwargs.values()))
        result = self._weights(func, args, kwargs) if touches else func(*args, **kwargs)
        if isinstance(result, Tensor) and result.grad_fn is not None and not self._depth:
            if self._over:
                self._begin_epoch()
            steps = self.structures.compiled
            if steps is not None and steps.seen and not steps.barred and compiled.in_compiled_code():
                steps.bar("its loss is computed in compiled code")
            self.losses.append(LossCall.of(func, args, kwargs, result))
        return result

    def _register_hook(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wrap a user's hook, so that it does not see the probe's own backward passes."""
        x, *rest = args
        if x.is_leaf or not rest:
            return func(*args, **kwargs)
        self.hooked = True
        return func(x, _Guarded(self, rest[0]), *rest[1:], **kwargs)

    def _retain_grad(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.hooked = True
        self._retained.append(weakref.ref(args[0]))
        return func(*args, **kwargs)

    @contextmanager
    def _guarding(self, hooks: dict[Any, Any], guarded: type[_Guarded]) -> Iterator[None]:
        before = dict(hooks)
        for key, hook in before.items():
            hooks[key] = guarded(self, hook)
        try:
            yield
        finally:
            for key, hook in before.items():
                if key in hooks:
                    hooks[key] = hook


def example_ids(
    x: Tensor, ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """Tell an open probe which example each row of ``x`` belongs to, and return ``x``. Without an open probe it only returns
    ``x``.

    Use it for sequences that are packed one after another. ``x`` is a tensor of token ids, or of activations whose rows are the
    packed ones: (R, …), (1, R, …), or (B, R, …) for several packed rows. Call it once per backward pass, before the model. N is the
    probe's ``num_examples``, or else follows from the argument. The losses may be totals of each example, (N,), or losses of rows,
    (R,), (B, R) or one position fewer; the loss of a row belongs to the row's example.

    Args:
        ids: (R,) or (B, R) integers from 0 to N - 1, and -1 for rows of no example, such as padding.
        cu_seqlens: (N + 1,) integers from 0: document i has the rows from ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` of one row (R,
            …) or (1, R, …). Rows after the last document are padding.
        position_ids: (R,) or (B, R) integers. A document starts at the beginning of each row of ``x``, and wherever they are 0 or
            do not increase. Negative integers mark padding.

    Raises:
        TypeError: not exactly one of the three is given, or it is not a tensor.
        ValueError: its shape or values are invalid, or it differs from an earlier call without a backward pass in between.
        RuntimeError: the probe's examples are positions.
    """
    if captures := open_captures():
        packed, argument = declared(x, ids, cu_seqlens, position_ids)
        for capture in captures:
            capture.declare(x, packed, argument)
    return x


def auxiliary(loss: Tensor) -> Tensor:
    """Tell an open probe that ``loss`` belongs to no example, such as a router's balance loss, and return it.

    The probe then measures the examples' own losses in a separate backward pass; ``.grad`` is still that of the whole loss. Call it
    before ``backward()``, with the term that is in the graph: ``zerosum.auxiliary(out.aux_loss); out.loss.backward()``.

    Raises:
        TypeError: ``loss`` is not a tensor.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a torch.Tensor, got {type(loss).__name__}")
    if loss.grad_fn is not None:
        for capture in open_captures():
            capture.auxiliary.add(loss.grad_fn)
            capture.forget(loss)
    return loss


def open_captures() -> list[Capture]:
    found = [
        mode.capture if isinstance(mode, compiled.Traced) else mode for mode in torch.overrides._get_current_function_mode_stack()
    ]
    return [mode for mode in found if isinstance(mode, Capture)]


class _Guarded:
    """Wraps a user's hook so that it sees only the training's own backward passes."""

    def __init__(self, capture: Capture, hook: Any) -> None:
        self._capture = weakref.ref(capture)
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        capture = self._capture()
        return None if capture is not None and capture.unnoticed else self._hook(*args, **kwargs)


class _GuardedForward(_Guarded):
    """Wraps a module's forward hook. When a checkpoint reruns the module in the probe's own passes, the hook runs only if it
    changes the module's inputs or outputs."""

    _changes = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._changes:
            return self._hook(*args, **kwargs)
        result = super().__call__(*args, **kwargs)
        self._changes = result is not None
        return result


class _Hook(NotCopied):
    """Calls a method as long as its object is alive. A copy of a probed model may safely contain it."""

    def __init__(self, target: Any, method: str) -> None:
        self._target = weakref.ref(target)
        self._method = method

    def __call__(self, *args: Any) -> Any:
        target = self._target()
        return None if target is None else getattr(target, self._method)(*args)


@contextmanager
def _seen_applying(function: type[torch.autograd.Function], replacement: Any) -> Iterator[None]:
    """Let the mode see calls of an autograd.Function's ``apply``, for a rule of the user's."""
    plain = function.apply

    def apply(*args: Any, **kwargs: Any) -> Any:
        for capture in reversed(open_captures()):
            if torch.is_grad_enabled() and (capture._touches(args) or capture._touches(kwargs.values())):
                if (steps := capture.structures.compiled) is not None:
                    steps.bar("a function in it runs by a rule, which compiled code would not")
                return replacement(capture, plain, args, kwargs)
        return plain(*args, **kwargs)

    function.apply = staticmethod(apply)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del function.apply


def _edges(tensors: Any) -> Any:
    if isinstance(tensors, Tensor):
        return get_gradient_edge(tensors)
    if tensors is None or not isinstance(tensors, (list, tuple)):
        return tensors
    if not tensors or not all(isinstance(x, (Tensor, GradientEdge)) for x in tensors):
        return tensors
    return tuple(get_gradient_edge(x) if isinstance(x, Tensor) and x.requires_grad else x for x in tensors)


def _memory(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def _roots(outputs: Any) -> list[GradientEdge]:
    outputs = outputs if isinstance(outputs, (list, tuple)) and not isinstance(outputs, GradientEdge) else (outputs,)
    return [edge_of(x) for x in outputs if isinstance(x, GradientEdge) or x.requires_grad]


def _given(grads: Any, outputs: Any) -> list[Tensor | None]:
    outputs = outputs if isinstance(outputs, (list, tuple)) and not isinstance(outputs, GradientEdge) else (outputs,)
    grads = grads if isinstance(grads, (list, tuple)) else (grads,) * len(outputs)
    return [g for x, g in zip(outputs, grads, strict=True) if isinstance(x, GradientEdge) or x.requires_grad]


_SPECIAL: dict[Any, Any] = {
    **dict.fromkeys((Tensor.backward, torch.autograd.backward, torch.autograd.grad), Capture._run_backward),
    **dict.fromkeys(LOSSES, Capture._loss),
    Tensor.register_hook: Capture._register_hook,
    Tensor.retain_grad: Capture._retain_grad,
}

# (Most calls have no weight among their arguments: what the mode costs them is most of its cost.)
Capture.__torch_function__ = only_for_weights(Capture._handle, _SPECIAL)  # type: ignore[method-assign]
