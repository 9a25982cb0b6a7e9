"""Uses of weights in compiled code: registered ops that replace the original calls and report to a listener.

The compiler keeps these ops in its graph. In the forward pass an op notifies its listener and gets a stamp, which autograd saves
for the backward pass. In the backward pass, the listener may compute the gradients of the weights together with their statistics.
If it does not, the op computes the gradients in the usual way. A graph can therefore be differentiated at any time, in any order,
and without a listener.

The tensor ``token`` contains the listener's number. If the number were a constant, the graph would be recompiled for each listener.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from zsl_kernels.ops.registration import Grads, define, differentiable

Found = Sequence[Tensor | None]
_NOBODY = (-1, -1)


class Listener(Protocol):
    """The interface of a probe to the ops."""

    def enter(self, kind: str, tensors: Sequence[Tensor | None]) -> int:
        """Register a use and return its stamp. ``tensors`` are those of the call, in the order of its arguments.

        The weight is only known when the graph runs, because several layers can share a graph.
        """

    def leave(self, stamp: int, grad: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]) -> Found:
        """Return the gradients of the weight and the bias, or None for those that are not wanted or that the op must compute.

        The listener must copy the tensors that it keeps, because the compiler reuses their memory.
        """

    def unknown(self, weight: Tensor) -> None:
        """Handle a backward pass through a use of an unknown kind."""


_numbers = itertools.count()
_listeners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def listen(listener: Listener) -> Tensor:
    """Register a listener and return its token. Only a weak reference to the listener is kept."""
    number = next(_numbers)
    _listeners[number] = listener
    return torch.tensor(number)


def _enter(token: Tensor, kind: str, *tensors: Tensor | None) -> Tensor:
    number = int(token)
    listener = _listeners.get(number)
    return torch.tensor(_NOBODY if listener is None else (number, listener.enter(kind, tensors)))


def _leave(stamp: Tensor, grad: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]) -> Found:
    number, mine = stamp.tolist()
    listener = _listeners.get(number)
    return (None, None) if listener is None else listener.leave(mine, grad, saved, wanted)


def _stamp(x: Tensor) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device="cpu")


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _results(like: Tensor, found: Found) -> tuple[Tensor, ...]:
    """Replace None by empty tensors, because a schema has no optional results."""
    return tuple(like.new_empty(0) if x is None else x for x in found)


# Products ------------------------------------------------------------------------------------------------------------------------
#
# ``kind`` is "linear", or "addmm" for a transposed matrix. ``shape`` is the shape of x as plain numbers, because a graph is for one
# shape. The results have the dtype of x, which under autocast has lower precision than the weights.


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, token: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
    with torch._C.DisableTorchFunction():
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if kind == "linear":
            stamp, y = _enter(token, kind, x, weight, bias), torch.ops.aten.linear.default(x, w, b)
        else:
            stamp, y = _enter(token, kind, bias, x, weight), torch.ops.aten.addmm.default(b, x, w)
        return y.contiguous(), stamp


def _product_fake(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0 if kind == "linear" else 1]), _stamp(x)


def _product_backward(grad: Tensor, x: Tensor, weight: Tensor, kind: str, stamp: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    with torch._C.DisableTorchFunction():
        of_weight, of_bias = _leave(stamp, grad, (x, weight), wanted)
        if wanted[0] and of_weight is None:
            left, right = (grad, x) if kind == "linear" else (x, grad)
            of_weight = (_flat(left).mT @ _flat(right)).to(weight.dtype)
        if wanted[1] and of_bias is None:
            of_bias = _flat(grad).sum(0).to(weight.dtype)
        return _results(weight, (of_weight, of_bias))


def _product_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, kind: str, stamp: Tensor, wanted: list[bool]) -> Any:
    return weight.new_empty(weight.shape if wanted[0] else (0,)), weight.new_empty(grad.shape[-1:] if wanted[1] else (0,))


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.kind, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _product_grad(ctx: Any, grad: Tensor | None, _: Any) -> Grads:
    x, weight, stamp = ctx.saved_tensors
    needs_x, *wanted = ctx.needs_input_grad[:3]
    if grad is None:
        return (None,) * 6
    matrix = weight if ctx.kind == "linear" else weight.mT
    grad_x = grad @ matrix.to(grad.dtype) if needs_x else None
    found = torch.ops.zsl.use_product_backward.default(grad, x, weight, ctx.kind, stamp, wanted) if any(wanted) else (None, None)
    return grad_x, *(g if want else None for g, want in zip(found, wanted, strict=True)), None, None, None


define(
    "use_product(Tensor x, Tensor weight, Tensor? bias, str kind, Tensor token, int[] shape) -> (Tensor, Tensor)",
    _product,
    _product_fake,
)
define(
    "use_product_backward(Tensor grad, Tensor x, Tensor weight, str kind, Tensor stamp, bool[] wanted) -> (Tensor, Tensor)",
    _product_backward,
    _product_backward_fake,
)
differentiable(torch.ops.zsl.use_product.default, _product_setup, _product_grad)


# Lookups -------------------------------------------------------------------------------------------------------------------------


def _lookup(ids: Tensor, weight: Tensor, padding_idx: int, token: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
    with torch._C.DisableTorchFunction():
        return torch.ops.aten.embedding.default(weight, ids), _enter(token, "embedding", _rows(ids, padding_idx), weight)


def _rows(ids: Tensor, padding_idx: int) -> Tensor:
    """Replace the ids of padding, which get no gradient, by −1."""
    return ids if padding_idx < 0 else torch.where(ids == padding_idx, -1, ids)


def _lookup_backward(grad: Tensor, ids: Tensor, weight: Tensor, padding_idx: int, stamp: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        (found, _) = _leave(stamp, grad, (_rows(ids, padding_idx), weight), (True, False))
        return torch.ops.aten.embedding_dense_backward(grad, ids, weight.shape[0], padding_idx, False) if found is None else found


def _lookup_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ids, weight, ctx.padding_idx, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(ids, weight, output[1])


def _lookup_grad(ctx: Any, grad: Tensor | None, _: Any) -> Grads:
    ids, weight, stamp = ctx.saved_tensors
    own = None if grad is None else torch.ops.zsl.use_lookup_backward.default(grad, ids, weight, ctx.padding_idx, stamp)
    return None, own, None, None, None


define(
    "use_lookup(Tensor ids, Tensor weight, int padding_idx, Tensor token, int[] shape) -> (Tensor, Tensor)",
    _lookup,
    lambda ids, weight, *_: (weight.new_empty(*ids.shape, weight.shape[1]), _stamp(ids)),
)
define(
    "use_lookup_backward(Tensor grad, Tensor ids, Tensor weight, int padding_idx, Tensor stamp) -> Tensor",
    _lookup_backward,
    lambda grad, ids, weight, *_: grad.new_empty(weight.shape),
)
differentiable(torch.ops.zsl.use_lookup.default, _lookup_setup, _lookup_grad)


# Scales and shifts of normalized inputs, in the dtype of the inputs ---------------------------------------------------------------


def _scale(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, token: Tensor, shape: list[int]
) -> tuple[Tensor, Tensor]:
    with torch._C.DisableTorchFunction():
        stamp = _enter(token, kind, x, weight, bias)
        y = x.clone() if weight is None else x * weight
        return (y if bias is None else y + bias).to(x.dtype).contiguous(), stamp


def _scale_backward(grad: Tensor, x: Tensor, like: Tensor, stamp: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    with torch._C.DisableTorchFunction():
        of_weight, of_bias = _leave(stamp, grad, (x,), wanted)
        if wanted[0] and of_weight is None:
            of_weight = _flat(grad * x).sum(0).to(like.dtype)
        if wanted[1] and of_bias is None:
            of_bias = _flat(grad).sum(0).to(like.dtype)
        return _results(like, (of_weight, of_bias))


def _scale_backward_fake(grad: Tensor, x: Tensor, like: Tensor, stamp: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(grad.shape[-1:] if want else (0,)) for want in wanted)


def _scale_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias if weight is None else weight, output[1])


def _scale_grad(ctx: Any, grad: Tensor | None, _: Any) -> Grads:
    x, weight, like, stamp = ctx.saved_tensors
    needs_x, *wanted = ctx.needs_input_grad[:3]
    if grad is None:
        return (None,) * 6
    grad_x = (grad if weight is None else (grad * weight).to(grad.dtype)) if needs_x else None
    found = torch.ops.zsl.use_scale_backward.default(grad, x, like, stamp, wanted) if any(wanted) else (None, None)
    return grad_x, *(g if want else None for g, want in zip(found, wanted, strict=True)), None, None, None


define(
    "use_scale(Tensor x, Tensor? weight, Tensor? bias, str kind, Tensor token, int[] shape) -> (Tensor, Tensor)",
    _scale,
    lambda x, *_: (x.new_empty(x.shape), _stamp(x)),
)
define(
    "use_scale_backward(Tensor grad, Tensor x, Tensor like, Tensor stamp, bool[] wanted) -> (Tensor, Tensor)",
    _scale_backward,
    _scale_backward_fake,
)
differentiable(torch.ops.zsl.use_scale.default, _scale_setup, _scale_grad)


# Sums of rows of the examples and a tensor that all examples share, such as a position embedding ---------------------------------


def _shared(x: Tensor, same: Tensor, token: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
    with torch._C.DisableTorchFunction():
        stamp = _enter(token, "add", x, same)
        return (x + same).contiguous(), stamp


def _shared_backward(grad: Tensor, shape: Sequence[int], stamp: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        _leave(stamp, grad, (), (True, False))
        return grad.sum_to_size(tuple(shape)).contiguous()


def _shared_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.shape = inputs[1].shape
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _shared_grad(ctx: Any, grad: Tensor | None, _: Any) -> Grads:
    own = None if grad is None else torch.ops.zsl.use_shared_backward.default(grad, ctx.shape, *ctx.saved_tensors)
    return grad, own, None, None


define(
    "use_shared(Tensor x, Tensor same, Tensor token, int[] shape) -> (Tensor, Tensor)",
    _shared,
    lambda x, *_: (x.new_empty(x.shape), _stamp(x)),
)
define(
    "use_shared_backward(Tensor grad, SymInt[] shape, Tensor stamp) -> Tensor",
    _shared_backward,
    lambda grad, shape, stamp: grad.new_empty(shape),
)
differentiable(torch.ops.zsl.use_shared.default, _shared_setup, _shared_grad)


# All other uses -------------------------------------------------------------------------------------------------------------------


def _unknown_backward(grad: Tensor, weight: Tensor, token: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        listener = _listeners.get(int(token))
        if listener is not None:
            listener.unknown(weight)
        return grad.clone(memory_format=torch.contiguous_format)


def _unknown_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _unknown_grad(ctx: Any, grad: Tensor) -> Grads:
    return torch.ops.zsl.use_unknown_backward.default(grad, *ctx.saved_tensors), None


define(
    "use_unknown(Tensor weight, Tensor token) -> Tensor",
    lambda weight, token: weight.clone(memory_format=torch.contiguous_format),
    lambda weight, token: weight.new_empty(weight.shape),
)
define(
    "use_unknown_backward(Tensor grad, Tensor weight, Tensor token) -> Tensor",
    _unknown_backward,
    lambda grad, *_: grad.new_empty(grad.shape),
)
differentiable(torch.ops.zsl.use_unknown.default, _unknown_setup, _unknown_grad)

OPS = frozenset(
    getattr(torch.ops.zsl, f"use_{name}").default
    for name in (
        "product",
        "product_backward",
        "lookup",
        "lookup_backward",
        "scale",
        "scale_backward",
        "shared",
        "shared_backward",
        "unknown",
        "unknown_backward",
    )
)
