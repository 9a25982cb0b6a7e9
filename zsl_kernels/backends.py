"""Which implementations are live on this machine, and the plan of one call among them."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from zsl_kernels import cpu, cuda_module
from zsl_kernels.gpus import GPUS, OLDEST, Gpu, nearest, of_device
from zsl_kernels.plan import OPS, Call, Plan, choose
from zsl_kernels.types import INPUT_DTYPES, sum_dtype

IMPLS = ("auto", "reference", "chunked", "cpu", "triton", "cuda")
# The ops that each has kernels for. The others are plain matrix products, or of small parameters: PyTorch owns them, in `chunked`.
_KERNELS = {
    "triton": (
        "interference",
        "interference_backward",
        "gram",
        "sq_norm",
        "embedding_interference",
        "linear_cross_entropy",
        "coordinate_sums",
    ),
    "cuda": ("interference", "gram", "embedding_interference"),
}

# Loaded once, on import: a cache on a function would be traced by torch.compile, which warns of it.
_CPU_MISSING = cpu.load()
# The GPU's are loaded by the first call that may use them, for looking for a device would tie a process that forks to it.
_gpu_missing: dict[str, str | None] = {}


def emulated(impl: str) -> bool:
    """Whether the kernels run on CPU tensors in this process: Triton's interpreter, and ``cuda.emulate``."""
    if impl == "triton":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return impl == "cuda" and module("cuda").emulated()


def module(impl: str) -> ModuleType:
    """The backend, loaded: its functions are the ops, with the plan before their arguments."""
    return cpu if impl == "cpu" else importlib.import_module(f"zsl_kernels.{impl}")


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import, and the first call loads the backend
def why_not(impl: str, device: torch.device | None = None) -> str | None:
    """Why ``impl`` is not available on this machine, or on this device of it, or None if it is."""
    if impl in ("auto", "reference", "chunked"):
        return None
    if impl == "cpu":
        return _CPU_MISSING
    if not emulated(impl):
        if torch.version.hip is not None:
            return "the kernels are for NVIDIA devices; this torch is built for ROCm"
        if not torch.cuda.is_available():
            return "this machine has no CUDA device that torch can use"
        if device is not None and device.type == "cuda":
            about = torch.cuda.get_device_properties(device)  # which torch.compile knows for a constant
            if 10 * about.major + about.minor < OLDEST:
                return f"{about.name} has compute capability {about.major}.{about.minor}; the kernels need 8.0 or newer"
    if impl not in _gpu_missing:
        _gpu_missing[impl] = _load(impl)
    return _gpu_missing[impl]


def _load(impl: str) -> str | None:
    """Why it cannot be loaded, or None."""
    try:
        return module(impl).missing()
    except ImportError as error:
        return f"{error}; install {impl}"


def impls_for(device: torch.device, impl: str, op: str | None = None, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """The implementations that a call of ``op`` on ``device`` may use. A named one is used or refused, never replaced."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        if device.type == "cpu":
            return ("cpu", "chunked") if why_not("cpu") is None else ("chunked",)
        live = (name for name in _KERNELS if device.type == "cuda" and _has(name, op, dtype) and why_not(name, device) is None)
        return (*live, "chunked")
    if reason := why_not(impl, device):
        raise RuntimeError(f"impl: {impl!r} is not available: {reason}")
    if impl == "cpu" and device.type != "cpu":
        raise ValueError(f"impl: 'cpu' expects CPU tensors, got tensors on {device}")
    if impl in _KERNELS:
        if device.type != "cuda" and not (device.type == "cpu" and emulated(impl)):
            raise ValueError(f"impl: {impl!r} expects CUDA tensors, got tensors on {device}")
        if dtype == torch.float64:
            raise TypeError(f"impl: {impl!r} expects float32, bfloat16 or float16, got float64; 'chunked' takes it")
        if not _has(impl, op, dtype):
            raise ValueError(
                f"impl: {impl!r} has no kernel for {op}, which is PyTorch's own products; expected 'auto' or 'chunked'"
            )
    return (impl,)


def _has(impl: str, op: str | None, dtype: torch.dtype | None) -> bool:
    return dtype != torch.float64 and (op is None or op in _KERNELS[impl])


def derivative_impl(impl: str, op: str) -> str:
    """What computes the derivative ``op`` of a call of ``impl``: the same where it has a kernel for it, else the device's owner."""
    return impl if impl not in _KERNELS or op in _KERNELS[impl] else "auto"


def gpu_of(device: torch.device, arch: int | None = None) -> Gpu:
    """What a plan assumes: the device as it is; of emulated kernels the part that ``ZSL_GPU_ARCH`` names, or the newest."""
    if arch is None and device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        shared = about.shared_memory_per_multiprocessor - 1024  # the system has a KiB of every block
        gpu = of_device(10 * about.major + about.minor, about.multi_processor_count, shared)
        return gpu if not gpu.boxes or cuda_module.has_boxes() else replace(gpu, boxes=False)
    return nearest(arch or int(os.environ.get("ZSL_GPU_ARCH", max(GPUS))))


def _gpu(device: torch.device, impls: tuple[str, ...], arch: int | None = None) -> Gpu | None:
    """That of a call which may use the GPU's kernels, or is PyTorch's there."""
    there = device.type == "cuda" and torch.version.hip is None
    return gpu_of(device, arch) if there or any(impl in _KERNELS for impl in impls) else None


def _call(
    op: str,
    N: int,
    T: int,
    K: int,
    O: int,
    M: int | None,
    gram: bool,
    dtype: torch.dtype,
    irregular: bool,
    gpu: Gpu | None = None,
) -> Call:
    name = str(dtype).removeprefix("torch.")
    if irregular:  # means of ragged rows differ from call to call: few plans for them, which are kept
        unit = 1 << max(0, T.bit_length() - 4)
        T = -(-T // unit) * unit
    return Call(op, N, T, K, O, M, gram, sum_dtype(dtype).itemsize, torch.get_num_threads(), irregular, name, gpu)


def plan_call(
    op: str,
    a: Tensor,
    b: Tensor,
    *,
    impl: str,
    gram: bool = False,
    a2: Tensor | None = None,
    num_examples: int = 0,
    added: bool = False,
) -> Plan:
    """The plan for these operands; ragged ones, (R, K) and (R, O), have ``num_examples``."""
    M = None if a2 is None else a2.shape[0]
    ragged = a.ndim == 2
    N, T = (num_examples, -(-a.shape[0] // max(num_examples, 1))) if ragged else a.shape[:2]
    impls = impls_for(a.device, impl, op, a.dtype)
    gpu = _gpu(a.device, impls)
    return choose(_call(op, N, T, a.shape[-1], b.shape[-1], M, gram, a.dtype, ragged or added, gpu), impls)


def plan(
    op: str,
    *,
    N: int,
    T: int,
    K: int,
    O: int,
    M: int | None = None,
    gram: bool = False,
    irregular: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    arch: int | None = None,
    impl: str = "auto",
) -> Plan:
    """The choice that a call of ``op`` with these sizes makes, printable with its candidates.

    Args:
        op: "interference", "gram", "dot", "sq_norm" or "weighted_grad".
        N, T, K, O: examples, positions, input features and output features, as everywhere.
        M: examples of the second set of a cross ``gram``.
        gram: with "interference", whether the Gram is asked for too.
        irregular: whether the rows are ragged, T being the mean of an example's, rounded up, or ``embedding`` is given. The plan is
            that of the next T with at most four binary digits before zeros.
        dtype, device, impl: as the call will have them.
        arch: with ``device="cuda"``, the architecture to plan for (80, 90 or 100), on any machine; by default that of the device.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    for name, size in {"N": N, "T": T, "K": K, "O": O, "M": M or 0}.items():
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"{name}: expected a size >= 0, got {size!r}")
    if gram and op != "interference":
        raise ValueError(f"gram: expected with op 'interference', got {op!r}")
    if M is not None and (op != "gram" or irregular):
        raise ValueError(f"M: expected with op 'gram' of regular rows, got {op!r}{', irregular' if irregular else ''}")
    if dtype not in INPUT_DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, INPUT_DTYPES))}, got {dtype}")
    if impl == "reference":
        raise ValueError("impl: the reference has no plan; it materializes every gradient")
    device = torch.device(device)
    if arch is None:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(
                f"device: this machine has no CUDA device; expected arch={', '.join(map(str, GPUS))} to plan for one"
            )
        impls = impls_for(device, impl, op, dtype)
    else:
        if device.type != "cuda" or not isinstance(arch, int) or arch not in GPUS:
            raise ValueError(f"arch: expected one of {', '.join(map(str, GPUS))} with device='cuda', got {arch!r} with {device}")
        impls = tuple(
            name for name in (*_KERNELS, "chunked") if impl in ("auto", name) and (name == "chunked" or _has(name, op, dtype))
        )
        if not impls:
            raise ValueError(f"impl: expected 'auto' or one with a kernel for {op} of {dtype} on GPUs, got {impl!r}")
    return choose(_call(op, N, T, K, O, M, gram, dtype, irregular, _gpu(device, impls, arch)), impls)


def build_info() -> dict[str, object]:
    """What was compiled, and what is live on this machine: a dictionary of plain values."""
    missing = why_not("cpu")
    return {
        "torch": torch.__version__,
        "cpu": "live" if missing is None else missing,
        "cpu_isa": None if missing else torch.ops.zsl_cpu.isa(),
        "cpu_isas": [] if missing else list(torch.ops.zsl_cpu.isas()),
        "threads": torch.get_num_threads(),
        "triton": why_not("triton", torch.device("cuda")) or "live",
        "cuda": why_not("cuda", torch.device("cuda")) or "live",
    }
