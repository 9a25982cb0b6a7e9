"""Loads the module of the compiled CUDA kernels, and converts tensors to its arguments.

The compiled module takes pointers, sizes and a stream. Python checks and allocates the tensors. The tests replace the module with
an emulation of the kernels on the CPU, which has the same interface.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor

_NO_GUARD: AbstractContextManager[object] = nullcontext()
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Launches(Protocol):
    """The compiled functions. Each launches one or two kernels of the named header in csrc/cuda.

    csrc/bindings/cuda_module.cpp defines them and documents their tuples. A pointer is a tensor's ``data_ptr()``, or 0 for None.
    """

    def gram(self, *arguments: Any) -> None:
        """gram.cuh: sums and the Gram matrix, from tiles that stay in shared memory."""

    def cross_gram(self, *arguments: Any) -> None:
        """gram.cuh: inner products between two sets of examples."""

    def slab_gram(self, *arguments: Any) -> None:
        """slab_gram.cuh: inner products of the rows of a slab."""

    def dense(self, *arguments: Any) -> None:
        """dense.cuh: statistics of materialized gradients."""

    def scale_bias(self, *arguments: Any) -> None:
        """scale_bias.cuh: gradients of scales and biases."""

    def add_partials(self, *arguments: Any) -> None:
        """add_partials.cuh: add up the partial results of blocks."""

    def embedding_keys(self, *arguments: Any) -> None:
        """embedding.cuh: the sort keys of the positions."""

    def embedding_places(self, *arguments: Any) -> None:
        """embedding.cuh: where rows and (row, example) pairs begin among the sorted positions."""

    def embedding(self, *arguments: Any) -> None:
        """embedding.cuh: sums and scalars."""

    def embedding_clear(self, *arguments: Any) -> None:
        """embedding.cuh: write zeros to a slab."""

    def embedding_finish(self, *arguments: Any) -> None:
        """embedding.cuh: the scalars of the examples, and the padding after the touched rows."""

    def hopper(self, *arguments: Any) -> None:
        """hopper.cuh: the kernel for compute capability 9.0. Like ``pack``, it is only built by nvcc 12 or newer."""

    def pack(self, *arguments: Any) -> None:
        """pack.cuh: copy operands to the layout that bulk tensor copies need."""

    def versions(self) -> tuple[int, int]:
        """Return the CUDA versions of the build and of the driver."""
        ...

    # C++ functions by the names of the launches. They take their arguments as flat numbers.
    flat: dict[str, object]


_NOT_EVERYWHERE = {"hopper", "pack"}
LAUNCHES = frozenset(name for name in vars(Launches) if not name.startswith("_")) - {"versions"}
_REQUIRED = sorted(LAUNCHES - _NOT_EVERYWHERE | {"flat", "versions"})
_emulation: Launches | None = None


class _Stream(int):
    """An int subclass, so that the placeholder of the stream can be recognized by identity."""


class _StandingIn(threading.local):
    recorder: Any = None


STREAM = _Stream(0)  # the placeholder of the current stream while a call is recorded
_standing_in = _StandingIn()


def emulate(module: Any) -> None:
    """Emulate the kernels on CPU tensors with ``module``, which is built from tests/native/simt. None ends the emulation."""
    global _emulation
    _emulation = module


def emulated() -> bool:
    return _emulation is not None


@contextmanager
def standing_in(recorder: Any) -> Iterator[None]:
    """Within this context, :func:`compiled` returns ``recorder`` and :func:`stream` returns :data:`STREAM` in this thread."""
    _standing_in.recorder = recorder
    try:
        yield
    finally:
        _standing_in.recorder = None


def compiled() -> Launches:
    return _standing_in.recorder or _emulation or cast(Launches, importlib.import_module("zsl_kernels._cuda"))


def has_boxes() -> bool:
    """Return whether the kernels for compute capability 9.0 were built, which needs nvcc 12 or newer."""
    try:
        return hasattr(compiled(), "hopper")
    except ImportError:
        return False


def missing() -> str | None:
    """Return why the kernels cannot run on this machine, or None if they can."""
    try:
        built, driver = compiled().versions()
    except (ImportError, AttributeError) as error:  # an older build has no ``versions``
        return f"it was not built, or does not load ({error}): reinstall with nvcc and ZSL_BUILD_CUDA unset"
    if lacking := [name for name in _REQUIRED if not hasattr(compiled(), name)]:
        return f"the build is out of date and lacks {', '.join(lacking)}: reinstall"
    if driver // 1000 < built // 1000:  # CUDA is compatible across minor versions
        return f"it was built with CUDA {_version(built)}, but the driver supports {_version(driver)}: update the driver or rebuild"
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def exact() -> bool:
    """Return whether float32 products must be exact. The fp32_precision setting of torch can allow tf32 instead."""
    return torch.backends.cuda.matmul.fp32_precision != "tf32"


def current_stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def stream(x: Tensor) -> int:
    """Return the stream for the next launch on operands like x."""
    if _standing_in.recorder is not None:
        return STREAM
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0


def guard(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the tensor's device is current. Entering it takes longer than a launch, so avoid it if possible."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _NO_GUARD


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def strided(x: Tensor) -> tuple[int, int, int, int]:
    """Return the pointer and the strides (examples, positions, features) of x (N, T, features) or of rows (R, features)."""
    position, feature = x.stride()[-2:]
    return x.data_ptr(), x.stride(0) if x.ndim == 3 else 0, position, feature


def written(x: Tensor) -> Tensor:
    """Materialize a pending negation, because kernels read memory directly."""
    return x.resolve_neg()
