"""The CUDA backend: loads the compiled kernels and calls the one that the plan names.

The kernels' module knows pointers, sizes and a stream; tensors are checked and allocated here. It is the same for devices and for
the emulation of the kernels on the CPU, which the tests use.
"""

from __future__ import annotations

from types import ModuleType

_emulation: ModuleType | None = None


def emulate(module: ModuleType | None) -> None:
    """Runs the kernels of ``module``, built from csrc/simt, on CPU tensors from now on; None ends it."""
    global _emulation
    _emulation = module


def emulated() -> bool:
    return _emulation is not None


def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    return None if emulated() else "it was not built: reinstall with nvcc and ZSL_BUILD_CUDA unset"
