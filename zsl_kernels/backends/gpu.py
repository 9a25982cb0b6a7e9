"""What the backends of GPUs share: when they are available, and what the planner knows about a device."""

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
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def __init__(self) -> None:
        # Its library is loaded by the first call that may use it, for looking for a device would tie a process that forks to it.
        self._loaded = False
        self._missing: str | None = None
        self._live: set[torch.device] = set()  # devices of which nothing is missing, for asking takes longer than a launch

    @abstractmethod
    def load(self) -> str | None:
        """Loads the kernels; returns why they cannot be loaded, or None."""

    @abstractmethod
    def emulated(self) -> bool:
        """Whether the kernels run on CPU tensors in this process."""

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
                about = torch.cuda.get_device_properties(device)  # which torch.compile knows for a constant
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
    """What a plan assumes: the device as it is; of emulated kernels the part that ``ZSL_GPU_ARCH`` names, or the newest."""
    if arch is None and device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        shared = about.shared_memory_per_multiprocessor - 1024  # the system has a KiB of every block
        gpu = of_device(10 * about.major + about.minor, about.multi_processor_count, shared)
        return gpu if not gpu.boxes or module.has_boxes() else replace(gpu, boxes=False)
    return nearest(arch or int(os.environ.get("ZSL_GPU_ARCH", max(GPUS))))


def multiprocessors(device: torch.device) -> int:
    """Of the device, without all else that a plan wants to know: small calls are many."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else gpu_of(device).sms
