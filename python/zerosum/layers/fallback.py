"""What no rule covers: the operation, or the module around it, is run again for each example.

Exact for any operation that keeps examples apart, and slow: its weights' per-example gradients are materialized, of this module
alone. The ordinary gradient is left to autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zerosum.layers import broadcast
from zerosum.provenance import Moved, Nobodys, Rows, Uncovered, flatten, writes
from zerosum.tracking import Ref, Tracked
from zerosum.uses import Dense, Piece, Use

if TYPE_CHECKING:
    from zerosum.capture import Capture


# What one run takes of an operand.
Part = Callable[[Any], Any]


def call(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], refs: Sequence[Ref], reason: str) -> Any:
    """The function's result, with its weights' gradients taken by calling it again for each example; or, where that cannot be,
    with its weights left to the module around it."""
    name = getattr(func, "__name__", str(func))
    examples = capture.provenance.examples
    repeated = [ref.piece.size[:1] == (examples,) and ref.piece.stride[0] == 0 and len(ref.piece.size) == 3 for ref in refs]
    batched = name in ("bmm", "baddbmm", "matmul", "__matmul__")
    if batched and all(repeated) and not capture.provenance.inseparable and capture.provenance.all_standard((args, kwargs)):

        def lifted(x: Any) -> Any:
            return x if (ref := capture.ref(x)) is None else broadcast.lift_repeated(capture, ref, name)

        return func(*map_leaves(lifted, args), **map_leaves(lifted, kwargs))
    random = torch.get_rng_state()
    result = func(*args, **kwargs)
    if not any(isinstance(r, Tensor) and r.requires_grad for r in flatten((result,))):
        return result
    if capture.strict:
        capture.not_covered(refs[0].source.parameters[0], reason)
    sources = list(dict.fromkeys(ref.source for ref in refs))
    in_place = writes(name)

    def run(part: Part, weights: list[Tensor], alone: bool) -> Any:
        leaves = dict(zip(sources, weights, strict=True))

        def one(x: Any) -> Any:
            if (ref := capture.ref(x)) is None:
                return part(x)
            leaf = leaves[ref.source]
            size, stride, offset = ref.piece
            if alone and size[:1] == (examples,) and stride[0] == 0:
                size = (1, *size[1:])  # repeated for the examples
            elif ref.piece == ref.source.base:
                return leaf
            return leaf.as_strided(size, stride, offset - ref.source.base.offset)

        return func(*map_leaves(one, args), **map_leaves(one, kwargs))

    again = _Again(
        capture, run, [source.tensor for source in sources], [source.pull for source in sources], refs[0].source.parameters
    )
    try:
        if in_place or not torch.equal(random, torch.get_rng_state()):
            raise Uncovered("it works in place" if in_place else "it draws random numbers")
        tapped = again.tap(result, (args, kwargs))
    except Uncovered as problem:
        for ref in refs:
            for t in ref.source.parameters:
                capture.modules.uncovered(t, f"{reason}, and cannot be run again for each example: {problem}")
        return result
    for ref in refs:
        ref.covered_by(f"{name}, run again for each example")
        for t in ref.source.parameters:
            t.defer()
    return tapped


class Modules:
    """Covers what cannot be covered where it happens by the module that owns the weight, and notices uses that nobody saw."""

    def __init__(self, capture: Capture, model: nn.Module) -> None:
        self._capture = capture
        tracked = {id(t.parameter): t for t in capture.parameters}
        self._owned: dict[int, dict[str, Tracked]] = {}
        for module in model.modules():
            own = {name: tracked[id(p)] for name, p in module.named_parameters(recurse=False) if id(p) in tracked}
            if own:
                self._owned[id(module)] = own
        self._inside: dict[int, dict[str, Tracked]] = {}
        self.watched: list[nn.Module] = []
        modules = dict(model.named_modules())
        for prefix, m in modules.items():
            # Each module's own weights are in it and in those around it.
            for name, t in self._owned.get(id(m), {}).items():
                path = prefix.split(".") if prefix else []
                for depth in range(len(path) + 1):
                    around = modules[".".join(path[:depth])]
                    self._inside.setdefault(id(around), {})[".".join([*path[depth:], name])] = t
        self.watched = [m for m in modules.values() if id(m) in self._inside]
        self._uncovered: dict[int, tuple[Tracked, str]] = {}
        self.running = False

    def uncovered(self, t: Tracked, reason: str) -> None:
        """A use of this weight that could not be covered: the module that owns it may be."""
        if self._capture.strict:
            self._capture.not_covered(t, reason)
        self._uncovered.setdefault(id(t), (t, reason))

    def reason(self, t: Tracked) -> str:
        """Why a use of this weight could not be covered so far, or an empty string."""
        return self._uncovered[id(t)][1] if id(t) in self._uncovered else ""

    def after_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """A hook on every module: returns the result with taps where weights in this module are not covered otherwise.

        The module that owns a weight is the first to be tried, then those around it. The whole model has all uses of a weight in
        it, any other module perhaps not all: it is passed over where other uses of the weight were covered where they happened.
        """
        inside = self._inside.get(id(module))
        if inside is None or self.running:
            return None
        whole = module is self._capture.model
        mixed = self._capture.provenance.mixed
        if (mixed and not whole) or self._capture.provenance.proven:
            return None  # what met the other examples on the way is not known: the whole model must tell
        own = self._owned.get(id(module), {})
        found = {name: t for name, t in inside.items() if id(t) in self._uncovered and (whole or not t.ruled)}
        found |= {name: t for name, t in own.items() if not t.seen and not t.problem}
        if mixed and found:
            found = {name: t for name, t in inside.items() if not t.problem}
        if found:
            try:
                return self._tap(module, args, kwargs, result, found, whole)
            except Uncovered as problem:
                # A weight of the module's own that was not seen may not have been used at all: its gradient will tell.
                for key in [id(t) for t in found.values() if id(t) in self._uncovered]:
                    t, reason = self._uncovered[key]
                    self._uncovered[key] = (
                        t,
                        reason if "; nor" in reason else f"{reason}; nor can {type(module).__name__}: {problem}",
                    )
        return None

    def finish(self) -> None:
        """What no module took."""
        for t, reason in self._uncovered.values():
            self._capture.not_covered(t, reason)
        self._uncovered.clear()

    def _tap(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, found: dict[str, Tracked], whole: bool
    ) -> Any:
        capture = self._capture
        strict = next((t for t in found.values() if capture.strict), None)

        def run(part: Part, weights: list[Tensor], alone: bool) -> Any:
            state = dict(zip(found, weights, strict=True)) | {name: b.clone() for name, b in module.named_buffers()}
            self.running = True
            attributes = [(m, dict(vars(m))) for m in module.modules()]
            contents = [(x, copy.copy(x)) for _, own in attributes for x in own.values() if type(x) in (list, dict, set)]
            try:
                return torch.func.functional_call(module, state, *map_leaves(part, (args, kwargs)), tie_weights=True)
            finally:
                self.running = False
                for m, before in attributes:  # what a module keeps of a call is to be of the real one
                    vars(m).update(before)
                    for name in vars(m).keys() - before.keys():
                        del vars(m)[name]
                for x, before in contents:
                    x.clear()
                    x.extend(before) if isinstance(x, list) else x.update(before)

        pulls = [t.pull_whole if whole else t.pull for t in found.values()]
        again = _Again(capture, run, [t.parameter for t in found.values()], pulls, list(found.values()))
        with torch._C.DisableTorchFunction():
            random = torch.get_rng_state()
            tapped = again.tap(result, (args, kwargs))
            if not torch.equal(random, torch.get_rng_state()):
                torch.set_rng_state(random)
                raise Uncovered("it draws random numbers")
        if strict is not None:
            capture.not_covered(strict, f"used by an operation of {type(module).__name__} that no rule covers")
        for t in found.values():
            t.covered_by(f"{type(module).__name__}, run again for each example")
            t.defer()
            if whole:
                t.replace()
            t.seen = True
            self._uncovered.pop(id(t), None)
        return tapped


class _Again:
    """A call that is run again for each example, as ``run(part, weights, alone)`` with its part of the operands."""

    def __init__(
        self,
        capture: Capture,
        run: Callable[[Part, list[Tensor], bool], Any],
        weights: list[Tensor],
        pulls: Sequence[Callable[[int, Piece, Use], None]],
        tracked: list[Tracked],
    ) -> None:
        self.capture = capture
        self.examples = capture.provenance.examples
        self.pass_number = capture.pass_number
        self._run = run
        self._weights = weights
        self._pulls = pulls
        self._tracked = tracked
        device = weights[0].device.type
        self._autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._axes: list[int] = []  # of each differentiable output: the dimension of examples
        self._versions: list[tuple[Tensor, int]] = []

    def tap(self, result: Any, inputs: Any) -> Any:
        """The result, whose backward does it. Raises :class:`Uncovered` where one example does not give its part of the result."""
        if why := self.capture.provenance.inseparable:
            raise Uncovered(why)
        if not self.examples:
            raise Uncovered("the number of examples is not known yet")
        self._versions = [(x, x._version) for x in flatten((inputs,)) if isinstance(x, Tensor)]
        outs = [r for r in flatten((result,)) if isinstance(r, Tensor) and r.requires_grad]
        weights, first = self._one(0)
        if len(first) != len(outs):
            raise Uncovered("one example gives other results")
        self._axes = [_axis_of_examples(r, one, self.examples) for r, one in zip(outs, first, strict=True)]
        parts = [one.shape[axis] for one, axis in zip(first, self._axes, strict=True)]
        with unhooked():
            used = torch.autograd.grad([r.sum() for r in first], weights, allow_unused=True) if first else []
        if all(g is None for g in used):
            raise Uncovered("they do not depend on the weight")
        with unhooked():
            tested = _check_apart(self.capture, lambda part: self._run(part, self._weights, False), self._axes)
        # Integers have no gradients to ask. Where examples were seen to meet on the way, each has to show that it did not matter.
        N = self.examples
        if self.capture.provenance.mixed and not tested and any(torch.finfo(r.dtype).eps > 1e-6 for r in outs):
            raise Uncovered("examples seem to have met, and the results are too coarse to tell")
        others = range(1, N) if self.capture.provenance.mixed else () if tested else sorted({N // 2, N - 1} - {0})
        for i in others:
            for r, one, axis in zip(outs, self._one(i)[1], self._axes, strict=True):
                _check_part(r, one, axis, i)
        taps = _Tap.apply(self, *outs)
        for out, axis, count in zip(taps, self._axes, parts, strict=True):
            self.capture.provenance.declare(out, Moved(axis) if count == 1 else Rows(count, count * self.examples))
        tapped = iter(taps)
        return map_leaves(lambda r: next(tapped) if isinstance(r, Tensor) and r.requires_grad else r, result)

    def _one(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        device = self._weights[0].device.type
        dtype, enabled = self._autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled), unhooked():
            weights = [w.detach().requires_grad_() for w in self._weights]
            try:
                result = self._run(partial(_one, self.capture, i), weights, True)
            except Exception as error:  # whatever it does not like of one example alone
                raise Uncovered(f"{type(error).__name__} ({str(error).splitlines()[0]})") from error
            return weights, [r for r in flatten((result,)) if isinstance(r, Tensor) and r.requires_grad]

    def leave_gradients(self, grads: Sequence[Tensor | None]) -> None:
        if any(x._version != version for x, version in self._versions):
            for t in self._tracked:
                t.refuse("an input of an operation that is run again for each example was modified in place")
            return
        per_example: list[list[Tensor]] = [[] for _ in self._weights]
        for i in range(self.examples):
            weights, outs = self._one(i)
            mine = [
                (r, g.narrow(axis, i * r.shape[axis], r.shape[axis]))
                for r, g, axis in zip(outs, grads, self._axes, strict=True)
                if g is not None
            ]
            with unhooked():
                found = torch.autograd.grad([r for r, _ in mine], weights, [g for _, g in mine], allow_unused=True)
            for to, w, g in zip(per_example, weights, found, strict=True):
                to.append(torch.zeros_like(w) if g is None else g.to_dense() if g.is_sparse else g)
        for pull, w, gs in zip(self._pulls, self._weights, per_example, strict=True):
            pull(self.pass_number, Piece.of(w), Dense(torch.stack(gs)))


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, again: _Again, *outs: Tensor) -> tuple[Tensor, ...]:
        ctx.again = again
        ctx.set_materialize_grads(False)
        # Not views: those could not be modified in place.
        return tuple(torch.ops.aten._unsafe_view(out, out.shape) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.again.capture.open and any(g is not None for g in grads):
            with torch._C.DisableTorchFunction():
                ctx.again.leave_gradients([None if g is None else g.detach() for g in grads])
        return None, *grads


def _axis_of_examples(whole: Tensor, one: Tensor, N: int) -> int:
    axes = [d for d, (n, m) in enumerate(zip(whole.shape, one.shape, strict=False)) if n == N * m] if whole.ndim == one.ndim else []
    axes = [d for d in axes if N == 1 or whole.shape[d] != one.shape[d]]
    if not axes:
        raise Uncovered(f"one example gives {tuple(one.shape)} of {tuple(whole.shape)}")
    _check_part(whole, one, axes[0], 0)
    return axes[0]


def _check_part(whole: Tensor, one: Tensor, axis: int, example: int) -> None:
    """Raises unless ``one`` is that example's part of ``whole``."""
    count = one.shape[axis]
    part = whole.narrow(axis, example * count, count)
    if part.shape != one.shape or (axis and count != 1):
        raise Uncovered(f"one example gives {tuple(one.shape)} of {tuple(whole.shape)}")
    error, size = (part.detach() - one.detach()).abs(), one.detach().abs()
    if one.numel() and not error.max() <= 256 * torch.finfo(one.dtype).eps * size.max():
        raise Uncovered("one example alone gives another result than among the others")


def _check_apart(capture: Capture, call: Callable[[Part], Any], axes: list[int]) -> bool:
    """Raises unless an example's part of the results depends on no other example's part of the operands.

    The gradients say so, exactly, whatever the values and their precision. False where no operand has one.
    """
    N = capture.provenance.examples
    leaves: list[tuple[Tensor, int, int]] = []  # with the examples' dimension and their number of parts in it

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or capture.ref(x) or _one(capture, 0, x) is x:
            return x
        layout = capture.provenance.layout(x, 0)
        y = x.detach().requires_grad_()
        leaves.append((y, layout.axis, layout.per or 1))
        return y

    if N < 2:
        return True
    with torch.enable_grad():
        outs = [r for r in flatten((call(leaf),)) if isinstance(r, Tensor) and r.requires_grad]
        if not leaves:
            return False
        generator = torch.Generator().manual_seed(0)  # of the CPU: the same numbers on every device
        for i in sorted({0, N // 2, N - 1}):
            mine = [r.narrow(axis, i * (r.shape[axis] // N), r.shape[axis] // N) for r, axis in zip(outs, axes, strict=True)]
            weights = [torch.rand(r.shape, generator=generator, dtype=r.dtype).to(r.device) + 0.5 for r in mine]
            found = torch.autograd.grad(mine, [x for x, _, _ in leaves], weights, retain_graph=True, allow_unused=True)
            for g, (_, axis, per) in zip(found, leaves, strict=True):
                if g is None:
                    continue
                own = g.detach().clone()
                own.narrow(axis, i * per, per).zero_()
                if own.any():
                    capture.provenance.mixed = capture.provenance.proven = True
                    raise Uncovered("one example's result depends on another's")
    return True


def unhooked() -> Any:
    """What a checkpoint or an offload does with saved tensors is not for what is run again here."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def verify(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Notes where the examples are in the result of a function that is not known, by calling it for the first and the last."""
    provenance = capture.provenance
    N = provenance.examples
    outs = [r for r in flatten((result,)) if isinstance(r, Tensor) and r.requires_grad]
    try:
        if provenance.inseparable or not N or writes(getattr(func, "__name__", "")):
            raise Uncovered("it cannot be run again")
        random = torch.get_rng_state()
        with torch.no_grad(), unhooked():
            axes: list[int] = []
            one_args, one_kwargs = map_leaves(partial(_one, capture, 0), (args, kwargs))
            ones = list(flatten((func(*one_args, **one_kwargs),)))
            for r, one in zip(flatten((result,)), ones, strict=True):
                if any(r is out for out in outs):
                    axis = _axis_of_examples(r, one, N)
                    axes.append(axis)
                    provenance.declare(r, Moved(axis) if one.shape[axis] == 1 else Rows(one.shape[axis], one.shape[axis] * N))
            _check_apart(capture, lambda part: func(*map_leaves(part, args), **map_leaves(part, kwargs)), axes)
        if not torch.equal(random, torch.get_rng_state()):
            torch.set_rng_state(random)
            raise Uncovered("it draws random numbers")
    except Exception as problem:
        for r in outs:
            provenance.declare(r, Nobodys(f"{getattr(func, '__name__', func)} may have mixed them ({problem})"))


def _one(capture: Capture, i: int, x: Any) -> Any:
    """Example i's part of an operand."""
    if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) or capture.provenance.is_constant(x):
        return x
    try:
        layout = capture.provenance.layout(x, 0)
    except Uncovered:
        if x.is_leaf and not x.requires_grad and capture.provenance.note(x) is None:
            return x  # of another size, and not computed: everybody's
        raise
    if layout.ids is not None:
        raise Uncovered("rows that are not in the order of the examples")
    if layout.per is not None:
        return x.detach().narrow(0, i * layout.per, layout.per)
    return x.detach().narrow(layout.axis, i, 1)


def map_leaves(function: Callable[[Any], Any], x: Any) -> Any:
    """``function`` of the leaves of nested lists, tuples and dictionaries."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(map_leaves(function, y) for y in x))
    if isinstance(x, (list, tuple)):
        return type(x)(map_leaves(function, y) for y in x)
    if isinstance(x, dict):
        y = copy.copy(x)  # of its own type: transformers' outputs are dictionaries with attributes
        for key, value in x.items():
            y[key] = map_leaves(function, value)
        return y
    return function(x)
