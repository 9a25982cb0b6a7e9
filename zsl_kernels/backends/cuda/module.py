"""The module of the compiled CUDA kernels, and how tensors are handed to it.

It knows pointers, sizes and a stream; tensors are checked and allocated in Python. It is the same for devices and for the emulation
of the kernels on the CPU, which the tests use.
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
    """The compiled functions, each a launch or two. csrc/bindings/cuda_module.cpp defines them and says what their tuples are; the
    kernels are in the header that is named. A pointer is a tensor's ``data_ptr()``, or 0 where there is no tensor."""

    def gram(self, *arguments: Any) -> None:
        """gram.cuh: sums and the Gram in tiles that stay in shared memory."""

    def cross_gram(self, *arguments: Any) -> None:
        """gram.cuh: of one set with another."""

    def slab_gram(self, *arguments: Any) -> None:
        """slab_gram.cuh: inner products of a slab's rows."""

    def dense(self, *arguments: Any) -> None:
        """dense.cuh: gradients that are held."""

    def scale_bias(self, *arguments: Any) -> None:
        """scale_bias.cuh: gradients of scales and biases."""

    def add_partials(self, *arguments: Any) -> None:
        """add_partials.cuh: what several blocks have left."""

    def embedding_keys(self, *arguments: Any) -> None:
        """embedding.cuh: what positions are sorted by."""

    def embedding_places(self, *arguments: Any) -> None:
        """embedding.cuh: where rows and pairs begin among sorted positions."""

    def embedding(self, *arguments: Any) -> None:
        """embedding.cuh: sums and scalars."""

    def embedding_clear(self, *arguments: Any) -> None:
        """embedding.cuh: zeros in a slab."""

    def embedding_finish(self, *arguments: Any) -> None:
        """embedding.cuh: scalars of examples, and rows behind the touched ones."""

    def hopper(self, *arguments: Any) -> None:
        """hopper.cuh. There where nvcc is 12 or newer, like ``pack``."""

    def pack(self, *arguments: Any) -> None:
        """pack.cuh: operands as boxes can be copied from."""

    def versions(self) -> tuple[int, int]:
        """Of CUDA: that of the build, and the driver's."""
        ...

    # By the names of the launches, functions in C++ that take their arguments as flat numbers.
    flat: dict[str, object]


_NOT_EVERYWHERE = {"hopper", "pack"}
LAUNCHES = frozenset(name for name in vars(Launches) if not name.startswith("_")) - {"versions"}
_REQUIRED = sorted(LAUNCHES - _NOT_EVERYWHERE | {"flat", "versions"})
_emulation: Launches | None = None


class _Stream(int):
    """A number that is told from others by what it is."""


class _StandingIn(threading.local):
    recorder: Any = None


STREAM = _Stream(0)  # of a call that is recorded, in place of the current one
_standing_in = _StandingIn()


def emulate(module: Any) -> None:
    """Runs the kernels of ``module``, built from tests/native/simt, on CPU tensors from now on; None ends it."""
    global _emulation
    _emulation = module


def emulated() -> bool:
    return _emulation is not None


@contextmanager
def standing_in(recorder: Any) -> Iterator[None]:
    """In which ``recorder`` is what :func:`compiled` returns in this thread, and :func:`stream` is :data:`STREAM`."""
    _standing_in.recorder = recorder
    try:
        yield
    finally:
        _standing_in.recorder = None


def compiled() -> Launches:
    return _standing_in.recorder or _emulation or cast(Launches, importlib.import_module("zsl_kernels._cuda"))


def has_boxes() -> bool:
    """Whether the kernels of compute capability 9.0 were built, which takes nvcc 12 or newer."""
    try:
        return hasattr(compiled(), "hopper")
    except ImportError:
        return False


def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    try:
        built, driver = compiled().versions()
    except (ImportError, AttributeError) as error:  # the latter of an older build
        return f"it was not built, or does not load ({error}): reinstall with nvcc and ZSL_BUILD_CUDA unset"
    if lacking := [name for name in _REQUIRED if not hasattr(compiled(), name)]:
        return f"it was built from other sources, without {', '.join(lacking)}: reinstall"
    if driver // 1000 < built // 1000:  # a newer minor version runs on the driver of an older one
        return (
            f"it was built with CUDA {_version(built)}, and the driver is of {_version(driver)}: update it, or build with its nvcc"
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def exact() -> bool:
    """Whether float32 products are to be those of float32: torch says when those of tf32 will do."""
    return torch.backends.cuda.matmul.fp32_precision != "tf32"


def current_stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def stream(x: Tensor) -> int:
    """That of the next launch on operands like x."""
    if _standing_in.recorder is not None:
        return STREAM
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0


def guard(x: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, where it is not: entering takes longer than a launch."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _NO_GUARD


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def strided(x: Tensor) -> tuple[int, int, int, int]:
    """The pointer and the strides of examples, positions and features of (N, T, features), or of rows (R, features)."""
    position, feature = x.stride()[-2:]
    return x.data_ptr(), x.stride(0) if x.ndim == 3 else 0, position, feature


def written(x: Tensor) -> Tensor:
    """The tensor, or where its negation is pending a copy: kernels read memory as it is."""
    return x.resolve_neg()
