"""A cache of the functions that repeated calls of the ops run.

A probe calls the same op once for every weight of a model. Most weights are small, so Python overhead dominates a call: the checks,
the plan, and the dispatch of a registered op, which serves autograd, tracing, transforms and modes. The first call of a kind goes
through all of these and stores the function that calls its kernel. Later calls of that kind use the stored function, unless
something observes which ops run. They run the same kernel, so their results are bitwise identical.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Kind = tuple[object, ...]

_PLAIN = (Tensor, torch.nn.Parameter)
_PLAIN_OR_NONE = {*_PLAIN, type(None)}
# Emulated kernels are not in this list: tests switch them on and off.
_ON_CPU = ("auto", "cpu", "chunked")
_ON_CUDA = ("auto", "chunked", "triton", "cuda")
_MOST = 4096  # cached kinds: shapes that change with every batch must not accumulate

_known: dict[Kind, Callable[..., Any]] = {}
find = _known.get

_threads = torch.get_num_threads
_is_grad_enabled = torch.is_grad_enabled
_any_requires_grad = torch._C._any_requires_grad
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._is_torch_function_mode_enabled
_transforms = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state


def _unseen() -> bool:
    """Return whether no trace, transform or mode observes which ops run."""
    return not (
        torch.compiler.is_compiling() or _dispatch_modes() or _function_modes() or _transforms() is not None or _trace() is not None
    )


def plain(*lists: Sequence[object]) -> bool:
    """Return whether ops on these tensors (or None) may skip dispatch when no derivative is needed."""
    return _unseen() and {type(x) for each in lists for x in each} <= _PLAIN_OR_NONE


def kind_of(op: str, impl: str, options: object, *tensors: Tensor | None) -> Kind | None:
    """Return a key of everything that the checks and the choice of a kernel depend on, or None if the call cannot be cached.

    A call cannot be cached if

    - a derivative, a trace or a transform is active;
    - a mode or a tensor subclass observes which ops run;
    - the device has no kernels.

    The first of ``tensors`` determines the device. The key omits the CPU's instruction set: the kernels select it themselves.
    """
    if not _unseen():
        return None
    parts: list[object] = [op, impl, options]
    for x in tensors:
        if x is None:
            parts.append(None)
        elif type(x) in _PLAIN and not x.is_neg():  # kernels read memory directly and would miss a pending negation
            parts += (x.shape, x.dtype, x.device)
        else:
            return None
    if _is_grad_enabled() and _any_requires_grad(*tensors):
        return None
    first = tensors[0]
    if first is not None and first.is_cpu and impl in _ON_CPU:
        parts.append(_threads())
    elif first is not None and first.is_cuda and impl in _ON_CUDA:
        parts += (os.environ.get("TRITON_INTERPRET"), os.environ.get("ZSL_GPU_ARCH"))
    else:
        return None
    return tuple(parts)


def keep(kind: Kind, call: Callable[..., Any]) -> Callable[..., Any]:
    """Store ``call`` for later calls of this kind, whose checks have passed, and return it."""
    if len(_known) >= _MOST:
        _known.clear()
    _known[kind] = call
    return call


def forget() -> None:
    """Clear the cache, because something else that the choice of a kernel depends on has changed."""
    _known.clear()


def below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an op's implementation to run below autograd, as the dispatcher does when no derivative is needed."""

    def run(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return function(*arguments)

    return run
