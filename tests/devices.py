"""The tests on a device: the library's functions, handed CPU tensors, run there.

The tests make operands and hold results to their truth on the CPU. Within :func:`running_on`, the public functions move the
operands to the device, at the very strides and offsets that they have, and the results back. Gradients follow. So a test knows no
devices. What the kernels of a GPU do not do, which PyTorch owns, is skipped; kernels that run on the CPU, emulated, skip it too.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import zsl_kernels as zk

FUNCTIONS = [name for name in zk.__all__ if name[0].islower() and name not in ("build_info", "plan")]


# What a GPU's backend says to a call that PyTorch owns; test_errors.py holds it to these words.
# The last are what the plan says where a test leaves a backend some of its ways alone.
_NO_KERNEL = re.compile(
    "^impl: ('(triton|cuda)' (has no kernel for|expects float32, bfloat16 or float16, got float64)|expected one with a kernel for)"
)


class _Moved(torch.autograd.Function):
    """The same values in the same layout on the device: a copy of the storage as far as the tensor reaches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: str) -> Tensor:
        ctx.set_materialize_grads(False)  # what a result does not depend on has no gradient, on a device as on the CPU
        return _move(x, device)

    @staticmethod
    def backward(ctx: Any, c: Tensor | None) -> tuple[Tensor | None, None]:
        return None if c is None else c.cpu(), None


def _move(x: Tensor, device: str) -> Tensor:
    if x.numel() == 0:
        return x.to(device)
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    held = x.as_strided((reach,), (1,)).to(device, copy=True)
    return held.as_strided(x.shape, x.stride())


def moved(x: Any, device: str) -> Any:
    """Tensors, the containers of the library's arguments and results, and the arguments of what is called back."""
    if isinstance(x, Tensor):
        if device == "cpu":
            return x.cpu()
        return _Moved.apply(x, device) if x.requires_grad and torch.is_grad_enabled() else _move(x.detach(), device)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(moved(y, device) for y in x))
    if isinstance(x, tuple | list):
        return type(x)(moved(y, device) for y in x)
    if callable(x):
        return lambda *arguments: x(*(moved(y, "cpu") for y in arguments))
    return x


def _on(device: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        if options.get("impl") == "reference":
            return function(*arguments, **options)
        arguments = moved(arguments, device)
        try:
            return moved(function(*arguments, **{name: moved(x, device) for name, x in options.items()}), "cpu")
        except (TypeError, ValueError) as error:
            if _NO_KERNEL.match(str(error)):
                pytest.skip(str(error))
            raise

    return run


@contextmanager
def running_on(device: str) -> Iterator[None]:
    originals = {name: getattr(zk, name) for name in FUNCTIONS}
    for name, function in originals.items():
        setattr(zk, name, _on(device, function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(zk, name, function)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Of CUDA: an operation that would wait for the device raises. Once in a process, torch warns that this is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
