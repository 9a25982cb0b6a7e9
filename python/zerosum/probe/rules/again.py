"""The fallback for calls that no rule covers: it differentiates the operation again for each example.

The result is exact for any operation in which each row of the results belongs to one example: the vector-Jacobian product is taken
with each example's part of the gradient alone. Nothing runs forward again, and no random number is drawn. It is slow: it takes N
times the operation's own backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from zerosum.probe.contributions import Dense
from zerosum.probe.layout import Layout, Uncovered
from zerosum.probe.parameters import Ref
from zerosum.probe.rules.broadcast import lift
from zerosum.probe.rules.site import Phase, RuleContext, Site, elements


def call(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function; the backward pass of its result takes the gradients of its weights for each example."""
    if context.inseparable:
        raise Uncovered(f"it cannot be differentiated again for each example: {context.inseparable}")
    name = getattr(func, "__name__", str(func))
    if name in ("__setitem__", "copy_"):
        return _written(context, func, args, kwargs)
    refs: list[Ref] = []
    operands: list[Tensor] = []

    def anchored(x: Any) -> Any:
        if (ref := context.ref(x)) is None:
            return x
        operands.append(_Anchor.apply(ref.tensor(), context.anchor))
        refs.append(ref)
        return operands[-1]

    new_args, new_kwargs = map_leaves(anchored, args), map_leaves(anchored, kwargs)
    if writes(name):
        raise Uncovered("it works in place")
    result = func(*new_args, **new_kwargs)
    outs = [r for r in leaves(result) if isinstance(r, Tensor) and r.requires_grad]
    if not outs:
        return result
    how = f"{name}, differentiated again for each example"
    for ref in refs:
        ref.covered_by(how)
        for parameter in ref.source.parameters:
            parameter.defer()
    # The first site holds the weights. Each result has its own rows.
    sites = [Site(context, name, refs if k == 0 else (), out.shape, elements) for k, out in enumerate(outs)]
    again = _Again(context, refs, [get_gradient_edge(x) for x in operands], [get_gradient_edge(x) for x in outs], sites)
    tapped = iter(_Tap.apply(again, context.anchor, *outs))
    return map_leaves(lambda r: next(tapped) if isinstance(r, Tensor) and r.requires_grad else r, result)


def _written(context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write a weight into an activation."""
    x, value = args[0], args[-1] if len(args) > 1 else kwargs["src"]
    ref = context.ref(value)
    if ref is None or context.ref(x) is not None or not isinstance(x, Tensor):
        raise Uncovered("it writes into a weight")
    with torch._C.DisableTorchFunction():
        into = x if func.__name__ == "copy_" else x.detach()[args[1]]
    if value.dtype != x.dtype:
        raise Uncovered("it writes into another dtype")
    return func(*args[:-1], lift(context, ref, into.shape, "written"))


class _Anchor(torch.autograd.Function):
    """The identity function; it adds a path from the result to the anchor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Again:
    """A call that is differentiated again for each example."""

    def __init__(
        self,
        context: RuleContext,
        refs: Sequence[Ref],
        operands: list[GradientEdge],
        outs: list[GradientEdge],
        sites: list[Site],
    ) -> None:
        self.context, self.refs, self.sites = context, refs, sites
        self._operands, self._outs = operands, outs

    def leave_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Store with each weight its per-example gradients (E, *piece)."""
        now = self.context.current
        if now is None or all(ref.source.refused for ref in self.refs):
            return
        taken: list[tuple[GradientEdge, Tensor, Layout]] = []
        for edge, grad, site in zip(self._outs, grads, self.sites, strict=True):
            if grad is None:
                continue
            if site.layout is None or self.context.poison:
                for ref in self.refs:
                    ref.source.refuse(
                        site.problem or self.context.poison or f"used by {site.label} where no loss was seen to lead before"
                    )
                return
            taken.append((edge, grad, site.layout))
        found: list[list[Tensor]] = [[] for _ in self.refs]
        for i in range(now.examples):
            mine = [part(grad, layout, i) for _, grad, layout in taken]
            with self.context.silenced(Phase.PLAIN):
                gs = torch.autograd.grad(
                    [edge for edge, *_ in taken],
                    self._operands,
                    mine,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=False,
                )
            for parts, g, ref in zip(found, gs, self.refs, strict=True):
                like = ref.source.tensor
                parts.append(like.new_zeros(ref.piece.size) if g is None else (g.to_dense() if g.is_sparse else g).detach())
        for ref, parts in zip(self.refs, found, strict=True):
            if parts and not ref.source.refused:
                ref.source.pull(ref.piece, Dense(torch.stack(parts)))


def part(grad: Tensor, layout: Layout, example: int) -> Tensor:
    """Return the gradient with the rows of other examples set to zero. Each element is a row."""
    if layout.examples == 1:
        return grad
    if layout.ids is None and layout.outer == 1 and not layout.positions and grad.ndim:
        mine = torch.zeros_like(grad)
        at = (layout.axis, example * layout.inner, layout.inner)
        mine.narrow(*at).copy_(grad.narrow(*at))
        return mine
    ids = layout.all_ids(grad.shape, grad.device).view(grad.shape)
    return torch.where(ids == example, grad, 0)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, again: _Again, anchor: Tensor, *outs: Tensor) -> tuple[Tensor, ...]:
        ctx.again = again
        ctx.set_materialize_grads(False)
        # The results are not views, because views from a custom function cannot be modified in place.
        return tuple(torch.ops.aten._unsafe_view(out, out.shape) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        again: _Again = ctx.again
        with torch._C.DisableTorchFunction():
            if again.context.phase is Phase.NAMING:
                for site, grad in zip(again.sites, grads, strict=True):
                    if grad is not None:
                        site.named(grad)
            elif again.context.phase is Phase.MEASURING and any(g is not None for g in grads):
                again.leave_gradients([None if g is None else g.detach() for g in grads])
        return None, None, *grads


def writes(name: str) -> bool:
    """Whether a function works in place, judged by its name."""
    return (
        name == "__setitem__"
        or (name.endswith("_") and not name.endswith("__"))
        or (name.startswith("__i") and name not in ("__invert__", "__iter__", "__index__", "__int__"))
    )


def leaves(*values: Any) -> Iterator[Any]:
    """Yield the leaves of nested lists, tuples, dictionaries and dataclasses."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from leaves(*value)
        elif isinstance(value, dict):
            yield from leaves(*value.values())
        elif is_dataclass(value) and not isinstance(value, type):
            yield from leaves(*vars(value).values())
        else:
            yield value


def map_leaves(function: Callable[[Any], Any], x: Any) -> Any:
    """Apply ``function`` to the leaves of nested lists, tuples and dictionaries."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(map_leaves(function, y) for y in x))
    if isinstance(x, (list, tuple)):
        if type(x).__module__ == "torch.return_types":
            return type(x)([map_leaves(function, y) for y in x])
        return type(x)(map_leaves(function, y) for y in x)
    if isinstance(x, dict):
        y = copy.copy(x)  # keeps the type: transformers' outputs are dictionaries with attributes
        for key, value in x.items():
            y[key] = map_leaves(function, value)
        return y
    return function(x)
