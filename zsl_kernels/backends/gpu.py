"""The common base of the GPU backends: their availability, and the description of a device for the planner."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch

from zsl_kernels.backends.base import Backend
from zsl_kernels.backends.cuda import module
from zsl_kernels.planning.devices import GPUS, OLDEST, Gpu, nearest, of_device


class GpuBackend(Backend):
    """A backend for CUDA devices, whose kernels can also be emulated on CPU tensors."""

    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def __init__(self) -> None:
        # The first call that may use the kernels loads them: looking for a device initializes CUDA, which must not precede a fork.
        self._loaded = False
        self._missing: str | None = None
        self._live: set[torch.device] = set()  # a cache of available devices: the checks take longer than a launch

    @abstractmethod
    def load(self) -> str | None:
        """Load the kernels. Return why this is not possible, or None."""

    @abstractmethod
    def emulated(self) -> bool:
        """Return whether the kernels are emulated on CPU tensors in this process."""

    def takes(self, device: torch.device) -> bool:
        return device.type == "cuda" or (device.type == "cpu" and self.emulated())

    def why_not(self, device: torch.device | None = None) -> str | None:
        if device in self._live:
            return None
        if not self.emulated():
            if torch.version.hip is not None:
                return "the kernels are for NVIDIA devices; this torch is built for ROCm"
            if not torch.cuda.is_available():
                return "this machine has no CUDA device that torch can use"
            if device is not None and device.type == "cuda":
                about = torch.cuda.get_device_properties(device)  # torch.compile treats this as a constant
                if 10 * about.major + about.minor < OLDEST:
                    return f"{about.name} has compute capability {about.major}.{about.minor}; the kernels need 8.0 or newer"
        if not self._loaded:
            try:
                self._missing = self.load()
            except ImportError as error:
                self._missing = f"{error}; install {self.name}"
            self._loaded = True
        if device is not None and device.type == "cuda" and not (self._missing or self.emulated() or torch.compiler.is_compiling()):
            self._live.add(device)
        return self._missing


def gpu_of(device: torch.device, arch: int | None = None) -> Gpu:
    """Return the GPU to plan for: the device itself, or for emulated kernels the one of ``ZSL_GPU_ARCH``, by default the newest."""
    if arch is None and device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        shared = about.shared_memory_per_multiprocessor - 1024  # the system reserves 1 KiB of every block
        gpu = of_device(10 * about.major + about.minor, about.multi_processor_count, shared)
        return gpu if not gpu.boxes or module.has_boxes() else replace(gpu, boxes=False)
    return nearest(arch or int(os.environ.get("ZSL_GPU_ARCH", max(GPUS))))


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors. This is faster than ``gpu_of``, which matters for many small calls."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else gpu_of(device).sms
