"""The functions that repeated calls go to.

A probe calls the same op once for every weight of a model. Most weights are small, and a call's time is then Python's: the checks,
the plan, and a registered op, whose dispatch serves autograd, traces, transforms and modes. The first call of a kind takes all of
these and stores the function that calls its kernel. Later calls of the kind look that function up, where no one observes which ops
run. The kernel is the same, and so are the bits of its results.
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
# Kernels that are emulated on tensors of the CPU come and go.
_ON_CPU = ("auto", "cpu", "chunked")
_ON_CUDA = ("auto", "chunked", "triton", "cuda")
_MOST = 4096  # kinds: shapes that change with each batch must not add up

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
    """Whether no trace, transform or mode sees which ops run."""
    return not (
        torch.compiler.is_compiling() or _dispatch_modes() or _function_modes() or _transforms() is not None or _trace() is not None
    )


def plain(*lists: Sequence[object]) -> bool:
    """Whether ops on these tensors, and Nones, may go the short way where nothing is differentiated."""
    return _unseen() and {type(x) for each in lists for x in each} <= _PLAIN_OR_NONE


def kind_of(op: str, impl: str, options: object, *tensors: Tensor | None) -> Kind | None:
    """All that the checks and the choice of a kernel depend on, or None where the call must go the long way.

    It must where a derivative, a trace or a transform is wanted, where a mode or a tensor's class sees which ops run, and on
    devices without kernels. The CPU's kernels follow ``use_isa`` by themselves. The first of ``tensors`` says the device.
    """
    if not _unseen():
        return None
    parts: list[object] = [op, impl, options]
    for x in tensors:
        if x is None:
            parts.append(None)
        elif type(x) in _PLAIN and not x.is_neg():  # kernels read memory as it is
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
    """From now on calls of this kind, whose checks have passed, are ``call`` of their tensors."""
    if len(_known) >= _MOST:
        _known.clear()
    _known[kind] = call
    return call


def forget() -> None:
    """Of all kinds: the choice of a kernel depends on something else from now on."""
    _known.clear()


def below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """A registered op's implementation as the op runs it when nothing is differentiated."""

    def run(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return function(*arguments)

    return run
