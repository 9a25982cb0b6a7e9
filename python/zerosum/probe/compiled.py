"""Keeps steps of a compiled model compiled while a probe measures them.

A step is proved uncompiled, like any other. After that, later blocks use a mode that a compiler can trace. Dynamo guards on modes,
so it keeps one graph for code inside the block and one for plain code. In the graph for the block, known uses of weights are ops
that report when they run (:mod:`zsl_kernels.weight_uses.compiled`). A compiled pass therefore leaves the same uses as an uncompiled
one, and looks up the proof in the same way. Unknown steps run uncompiled, as before.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from zerosum.probe.attribution import shape_of
from zerosum.probe.layout import Layout
from zerosum.probe.loss_tail import COMPILED, follow_path
from zerosum.probe.rules import RULES
from zerosum.probe.rules.embedding import lookup_arguments
from zerosum.probe.rules.linear import addmm_arguments, linear_arguments
from zerosum.probe.rules.norm import layer_norm_arguments, rms_norm_arguments
from zsl_kernels.weight_uses.compiled import OPS, Found, listen
from zsl_kernels.weight_uses.eager import NotCopied

if TYPE_CHECKING:
    from zerosum.probe.capture import Capture
    from zerosum.probe.proof import Stored

# The functions that stay in compiled code. A compiler may call one of them by another name.
KINDS: dict[Any, str] = {
    F.linear: "linear",
    **dict.fromkeys((torch.addmm, Tensor.addmm), "addmm"),
    F.embedding: "embedding",
    F.layer_norm: "layer_norm",
    **dict.fromkeys((F.rms_norm, torch.rms_norm), "rms_norm"),
    **dict.fromkeys((torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__), "scale"),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), "add"),
}
# Operations on a position table's rows that may come before the addition.
_PASSED_ON = (Tensor.to, Tensor.contiguous, Tensor.unsqueeze)
FUNCTIONS: dict[str, Any] = {"scale": torch.mul, "add": torch.add}
for function, kind in KINDS.items():
    FUNCTIONS.setdefault(kind, function)
_OWN_RULES = {function: RULES[function] for function in KINDS if function in RULES}
_HOOK = "zerosum"  # the key of the hook on the model; it is constant because a graph is valid for the same keys only
SHAPES = 4  # steps of more shapes run uncompiled, because a compiler keeps few graphs of a function
MISSES = 3  # the number of unknown compiled steps after which all steps run uncompiled
REST = 8  # the number of uncompiled blocks after such a step, in which a step like it may be proved

UNPROVED = "the step ran compiled before a step like it was proved; the next steps run uncompiled"
UNKNOWN = "used in compiled code by an operation that did not run when the step was proved"


@dataclass
class Step:
    """A step that was proved and may stay compiled."""

    stored: Stored
    order: list[int]  # the positions of its uses in the uncompiled step
    ends: list[tuple[int, ...]]  # the shapes of the loss's terms
    training: bool
    block: int  # the last block in which it ran uncompiled
    met: bool = False  # whether it has run where it could have been compiled
    checked: bool = False  # whether its sums were compared with autograd's gradients


class CompiledSteps:
    """What a probe keeps about compiled steps."""

    def __init__(self) -> None:
        self.barred = ""  # why every step runs uncompiled
        self.seen = False  # whether the model is called from code to be compiled
        self.tables: set[tuple[int, Any]] = set()  # weights that are looked up alike for all examples, and the ids' shapes
        self._steps: dict[Any, Step] = {}
        self._mode: Traced | None = None
        self._parameters: tuple[int, ...] = ()
        self._rest = self._missed = self._block = 0
        self._calm = False  # whether the last step was known

    def bar(self, reason: str) -> None:
        self.barred = self.barred or reason

    def look(self, inputs: Sequence[Tensor]) -> None:
        """Determine whether the model is compiled, in a call that is not."""
        if self.barred or "torch._dynamo" not in sys.modules:
            return
        self.seen = self.seen or in_compiled_code()
        if any(hasattr(x, "_dynamo_dynamic_indices") for x in inputs):
            self.bar("a dimension of its input was marked as dynamic")

    def mode_for(self, capture: Capture) -> Traced | None:
        """Return the mode of a block whose steps may stay compiled; None if there are no such steps."""
        if self.barred or "torch._dynamo" not in sys.modules:
            return None
        self.seen = self.seen or any(_is_compiled(module) for module in capture.modules)
        if not self.seen:
            return None
        self._block += 1
        if not _default_compiler() or any(RULES[f] is not rule for f, rule in _OWN_RULES.items()):
            return None
        self._renew(capture)
        if not any(step.training == capture.model.training for step in self._steps.values()):
            return None
        if self._rest:
            self._rest -= 1
            return None
        if self._mode is None:
            self._mode = Traced()
        return self._mode

    def _renew(self, capture: Capture) -> None:
        """Forget all steps if the trainable parameters have changed."""
        parameters = tuple(id(t.parameter) for t in capture.parameters)
        if parameters != self._parameters:
            self._steps.clear()
            self.tables.clear()
            self._parameters = parameters

    @property
    def compiling(self) -> bool:
        """Whether code may be compiled in this block, because a known step that was not compiled yet is likely to be next. In other
        blocks, unknown code runs uncompiled, so that it can be proved."""
        return self._calm and any(not step.met and self._block - step.block <= SHAPES for step in self._steps.values())

    def learn(self, capture: Capture, stored: Stored, roots: Sequence[GradientEdge]) -> None:
        """Store a step that has just run uncompiled, if it may stay compiled from now on."""
        if self.barred or not self.seen:
            return
        self._renew(capture)
        if capture.recomputed or capture.auxiliary or capture.prover.declared is not None or capture.hooked:
            self.bar("it has hooks, activations that are computed again, or a loss that is set apart")
            return
        known = stored.regular and not stored.nested and not stored.hidden and not stored.refused and not any(stored.problems)
        if not known or capture.whole or any(t.problem for t in capture.parameters if t.used):
            return
        terms = [follow_path(roots, term.path, term.names) for term in stored.terms or ()]
        if any(edge is None for edge in terms) or (stored.terms is None and capture.prover.loss is None):
            return
        key, order = self._key(capture, roots)
        if key is None:
            return
        alike: dict[Any, Layout] = {}
        used = [entry for entry in key[0] if entry[1][0] != "table"]
        for place, entry in zip(order, used, strict=True):
            layout = stored.layouts[place]
            if layout is None or not layout.same_as(alike.setdefault(entry, layout)):
                return
        self._calm = key in self._steps
        if self._calm:
            step = self._steps[key]
            step.block = self._block
            step.met |= capture.compiling  # it could have been compiled in this block but was not, and so never will be
        elif len(self._steps) < SHAPES:
            self.tables |= {(numbers[0], use[1][0]) for numbers, use in key[0] if use[0] == "table"}
            ends_at = [shape_of(edge) for edge in terms if edge is not None]
            self._steps[key] = Step(stored, order, ends_at, capture.model.training, self._block)

    def find(self, capture: Capture, roots: Sequence[GradientEdge]) -> Step | None:
        """Return the step whose forward pass ran compiled, and put its uses into the order in which they were proved."""
        key, order = self._key(capture, roots)
        step = None if key is None else self._steps.get(key)
        if step is None or capture.auxiliary or capture.prover.declared is not None:
            return None
        terms = [follow_path(roots, term.path, term.names) for term in step.stored.terms or ()]
        if [None if edge is None else shape_of(edge) for edge in terms] != step.ends:
            return None
        self._calm = True
        places = dict(zip(step.order, order, strict=True))
        capture.sites[:] = [capture.sites[places[k]] for k in range(len(places))]
        return step

    def _key(self, capture: Capture, roots: Sequence[GradientEdge]) -> tuple[Any, list[int]]:
        """Return what identifies a step, and its uses in an order that does not depend on the compiler."""
        known = {id(t): k for k, t in enumerate(capture.parameters)}
        names = {t.name: k for k, t in enumerate(capture.parameters)}
        entries: list[tuple[tuple[int, int], Any, int]] = []
        sites = iter(enumerate(capture.sites))
        for key in capture.keys:
            if key[4] and key[0] in _PASSED_ON:
                continue
            use = _use_of(key)
            place, site = (-1, None) if key[4] else next(sites, (-1, None))
            if use is None or (site is None) != (use[0] == "table"):
                return None, []
            if site is None:
                entries.append(((names[key[5]], -1), use, place))
                continue
            mine: list[int] = []
            for ref in site.refs:
                if ref is None:
                    mine.append(-1)
                elif use[0] == "add" and len(ref.source.parameters) == 1 and ref.source.parameters[0] is not ref.source:
                    mine.append(known[id(ref.source.parameters[0])])
                elif use[0] != "add" and id(ref.source) in known and ref.piece == ref.source.base:
                    mine.append(known[id(ref.source)])
                else:
                    return None, []  # a piece of a weight, or a tensor computed from weights
            entries.append(((mine[0], mine[1] if len(mine) > 1 else -1), use, place))
        tables, sums = (sum(use[0] == kind for _, use, _ in entries) for kind in ("table", "add"))
        if tables > 1 or tables != sums or next(sites, None) is not None:
            return None, []
        entries.sort(key=lambda entry: (entry[0], entry[1][0] == "table", entry[2]))
        ends = tuple((edge.node.name(), shape_of(edge)) for edge in roots)
        losses = tuple((call.name, call.reduction, call.shape, call.targets.shape) for call in capture.losses)
        uses = tuple((numbers, use) for numbers, use, _ in entries)
        return (uses, ends, losses, capture.model.training), [place for _, _, place in entries if place >= 0]

    def miss(self, roots: Sequence[GradientEdge]) -> None:
        """Note a compiled step that was unknown."""
        self._missed += 1
        self._rest = REST
        if any(edge.node.name() == COMPILED for edge in roots):
            self.bar("its loss is computed in compiled code")
        elif self._missed == MISSES:
            self.bar("its steps vary")


class Traced(TorchFunctionMode):
    """The mode of a block whose steps may stay compiled. A compiler traces how it replaces uses of weights by ops. In uncompiled
    code it passes every call to the capture."""

    def __init__(self) -> None:
        super().__init__()
        self.token = listen(self)
        self.capture: Capture | None = None
        self.hook = ModelHook(self)
        self._stamps = itertools.count()
        _run_as_written(Traced.__torch_function__)
        _run_as_written(ModelHook.__call__)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return traced(self, func, args, kwargs or {})
        if func in OPS or self.capture is None:  # (in a graph that runs operation by operation)
            return func(*args, **kwargs) if kwargs else func(*args)
        return self.capture.__torch_function__(func, types, args, kwargs)

    # Calls from the ops ----------------------------------------------------------------------------------------------------------

    def enter(self, kind: str, tensors: Sequence[Tensor | None]) -> int:
        stamp = next(self._stamps)
        if self.capture is not None:
            self.capture.enter_traced(stamp, kind, tensors)
        return stamp

    def leave(self, stamp: int, grad: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]) -> Found:
        return (None, None) if self.capture is None else self.capture.leave_traced(stamp, grad, saved, wanted)

    def unknown(self, weight: Tensor) -> None:
        if self.capture is not None:
            self.capture.refuse_traced(weight)


class ModelHook(NotCopied):
    """A hook that runs before the model is called. A compiler that traces the call leaves it out."""

    def __init__(self, mode: Traced) -> None:
        self._mode = mode

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        if self._mode.capture is not None:
            self._mode.capture.before_model(model, args, kwargs)

    def put_on(self, model: nn.Module) -> None:
        # Like register_forward_pre_hook, but under the same key in every block.
        model._forward_pre_hooks[_HOOK] = self  # type: ignore[index]
        model._forward_pre_hooks_with_kwargs[_HOOK] = True  # type: ignore[index]

    @staticmethod
    def take_off(model: nn.Module) -> None:
        model._forward_pre_hooks.pop(_HOOK, None)  # type: ignore[call-overload]
        model._forward_pre_hooks_with_kwargs.pop(_HOOK, None)  # type: ignore[call-overload]


def traced(mode: Traced, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call in code that is compiled. A known function on whole weights becomes an op. Any other call runs unchanged, with an
    op that reports each weight among its operands. (A compiler traces this function, so keep it simple.)"""
    if not torch.is_grad_enabled():
        return func(*args, **kwargs)
    kind = KINDS.get(func)
    if kind is not None:
        y = _used(mode.token, kind, args, kwargs)
        if y is not None:
            return y
    return func(*[_told(mode.token, x) for x in args], **{key: _told(mode.token, x) for key, x in kwargs.items()})


def _used(token: Tensor, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the result of the op that replaces a call; None unless it is a known function of whole weights and rows."""
    x: Any
    weight: Any
    bias: Any
    eps: Any
    if kind == "linear":
        x, weight, bias = linear_arguments(*args, **kwargs)
        if _is_use(x, weight, bias) and weight.ndim == 2:
            x = _lowered(x)
            return torch.ops.zsl.use_product.default(x, weight, bias, kind, token, list(x.shape))[0]
    elif kind == "addmm":
        bias, x, weight, scaled = addmm_arguments(*args, **kwargs)
        if _is_use(x, weight, bias) and bias.ndim == 1 and not scaled:
            x = _lowered(x)
            return torch.ops.zsl.use_product.default(x, weight, bias, kind, token, list(x.shape))[0]
    elif kind == "embedding":
        ids, weight, padding_idx, max_norm, scaled, sparse = lookup_arguments(*args, **kwargs)
        if ids.ndim > 0 and _is_weight(weight) and max_norm is None and not scaled and not sparse:
            padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
            return torch.ops.zsl.use_lookup.default(ids, weight, padding, token, list(ids.shape))[0]
    elif kind == "layer_norm":
        x, shape, weight, bias, eps = layer_norm_arguments(*args, **kwargs)
        if _is_use(x, weight, bias) and len(shape) == 1:
            y = F.layer_norm(x, shape, None, None, eps)
            return torch.ops.zsl.use_scale.default(y, weight, bias, kind, token, list(x.shape))[0]
    elif kind == "rms_norm":
        x, shape, weight, eps = rms_norm_arguments(*args, **kwargs)
        if _is_use(x, weight, None) and len(shape) == 1:
            y = F.rms_norm(x, shape, None, eps)
            return torch.ops.zsl.use_scale.default(y, weight, None, kind, token, list(x.shape))[0]
    elif kind == "add":
        if len(args) == 2 and not kwargs and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            x, weight = (args[1], args[0]) if _is_shared(args[0], args[1]) else args
            if _is_shared(weight, x):
                return torch.ops.zsl.use_shared.default(x, weight, token, list(x.shape))[0]
    elif len(args) == 2:
        x, weight = (args[1], args[0]) if _is_weight(args[0]) else args
        tensors = isinstance(x, Tensor) and isinstance(weight, Tensor)
        if tensors and _is_use(x, weight, None) and x.dtype == weight.dtype and x.shape[-1:] == weight.shape:
            return torch.ops.zsl.use_scale.default(x, weight, None, kind, token, list(x.shape))[0]
    return None


def _is_use(x: Tensor, weight: Any, bias: Any) -> bool:
    """Whether rows are combined with a weight or a bias."""
    return x.ndim > 1 and (_is_weight(weight) or _is_weight(bias)) and not _is_weight(x)


def _is_shared(same: Tensor, x: Tensor) -> bool:
    """Whether this may be the sum of a position table's rows and rows of several examples."""
    rows = x.ndim == 3 and x.shape[0] > 1 and (same.shape == x.shape[1:] or (same.ndim == 3 and same.shape == (1, *x.shape[1:])))
    return rows and same.requires_grad and not _is_weight(same) and not _is_weight(x) and same.dtype == x.dtype


def _lowered(x: Tensor) -> Tensor:
    """Return the rows of a product, as they are under autocast."""
    kind = x.device.type
    lowers = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if lowers else x


def _is_weight(x: Any) -> bool:
    return isinstance(x, nn.Parameter) and x.requires_grad


def _told(token: Tensor, x: Any) -> Any:
    """Return an operand, with an op that reports it if it is a weight."""
    if isinstance(x, nn.Parameter):
        return torch.ops.zsl.use_unknown.default(x, token) if x.requires_grad else x
    if type(x) is tuple:
        return tuple([_told(token, y) for y in x])
    if type(x) is list:
        return [_told(token, y) for y in x]
    return x


def _use_of(key: Any) -> Any:
    """Return the capture's key of a use, whatever name it was called by; None if it would not stay in compiled code."""
    function, shapes, dtype, autocast, alone, *_ = key
    kind = KINDS.get(function)
    if kind is None or (autocast is not None and kind in ("scale", "add")):
        return None
    if alone:
        return ("table", shapes, None) if kind == "embedding" and (len(shapes[0]) == 1 or shapes[0][0] == 1) else None
    if kind == "add":
        x, same = max(shapes, key=math.prod), min(shapes, key=math.prod)
        rows = len(shapes) == 2 and len(x) == 3 and x[0] > 1 and same in (x[1:], (1, *x[1:]))
        return (kind, (x, x[1:]), None) if rows else None
    if kind == "scale":
        shapes = tuple(sorted(shapes, key=len, reverse=True))
    x, weights = (shapes[1], shapes[::2]) if kind == "addmm" else (shapes[0], shapes[1:])
    product = kind in ("linear", "addmm")
    if len(x) < 2 or any(len(w) > (2 if product or kind == "embedding" else 1) for w in weights):
        return None
    if kind == "scale" and weights != (x[-1:],):
        return None
    return kind, shapes, (dtype if autocast is None or dtype == torch.float64 else autocast) if product else None


def in_compiled_code() -> bool:
    """Whether the running code was called by a function that is to be compiled."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def _default_compiler() -> bool:
    """Whether compiled code runs in the default way."""
    dynamo = sys.modules["torch._dynamo"]
    if not hasattr(dynamo.eval_frame, "set_code_exec_strategy"):
        return False  # another release of torch
    stance = dynamo.eval_frame._stance
    backward = dynamo.config.compiled_autograd or dynamo.compiled_autograd.compiled_autograd_enabled
    return stance.stance == "default" and stance.backend is None and not backward


def _run_as_written(function: Any) -> None:
    """Keep a compiler from compiling a function that its own code calls, and all that this calls. It may still trace it."""
    frames = sys.modules["torch._dynamo"].eval_frame
    whole = frames.FrameExecStrategy(frames.FrameAction.SKIP, frames.FrameAction.SKIP)
    frames.set_code_exec_strategy(function.__code__, whole)
