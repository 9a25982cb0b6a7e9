"""Dispatch: the list of backends, the choice of the backends that a call may use, and its plan. Also ``plan`` and ``build_info``.

``impl`` is the name of a backend, "reference", or "auto". A named implementation is used or refused; it is never replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsl_kernels.backends.base import Backend
from zsl_kernels.backends.chunked.backend import Chunked
from zsl_kernels.backends.cpu import Cpu
from zsl_kernels.backends.cpu import kernels as cpu_kernels
from zsl_kernels.backends.cuda.backend import Cuda
from zsl_kernels.backends.gpu import GpuBackend, gpu_of
from zsl_kernels.backends.triton.backend import Triton
from zsl_kernels.planning.call import Call
from zsl_kernels.planning.choose import OPS, Plan, choose
from zsl_kernels.planning.devices import GPUS, Gpu
from zsl_kernels.types import INPUT_DTYPES, sum_dtype

CHUNKED, CPU, TRITON, CUDA = Chunked(), Cpu(), Triton(), Cuda()
# In the order in which "auto" prefers them if several implement an op.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CPU, TRITON, CUDA, CHUNKED)}
IMPLS = ("auto", "reference", "chunked", "cpu", "triton", "cuda")


@torch.compiler.assume_constant_result  # the first call loads the backend, and torch.compile cannot trace an import
def why_not(impl: str, device: torch.device | None = None) -> str | None:
    """Return why ``impl`` is not available on this machine, or on this device, or None if it is available."""
    return None if impl in ("auto", "reference") else BACKENDS[impl].why_not(device)


def impls_for(device: torch.device, impl: str, op: str | None = None, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Return the backends that a call of ``op`` on ``device`` may use, the preferred one first."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "reference":
        return (impl,)
    if impl == "auto":
        # Emulated kernels run on CPU tensors only if they are named.
        natural = ("cpu", "chunked") if device.type == "cpu" else ("triton", "cuda", "chunked")
        found = (name for name in natural if BACKENDS[name].takes(device) and BACKENDS[name].has(op, dtype))
        live = (name for name in found if why_not(name, device) is None and BACKENDS[name].lacks(op, device) is None)
        return tuple(live) or ("chunked",)
    backend = BACKENDS[impl]
    if reason := why_not(impl, device):
        raise RuntimeError(f"impl: {impl!r} is not available: {reason}")
    if not backend.takes(device):
        kind = "CUDA" if isinstance(backend, GpuBackend) else "CPU"
        raise ValueError(f"impl: {impl!r} expects {kind} tensors, got tensors on {device}")
    if dtype is not None and dtype not in backend.dtypes:
        raise TypeError(
            f"impl: {impl!r} expects float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}; use 'chunked'"
        )
    # The classification head accepts any backend: a named one without kernels for the head still computes its statistics.
    if not backend.has(op, dtype) and op != "linear_cross_entropy":
        raise ValueError(f"impl: {impl!r} has no kernel for {op}; expected 'auto' or 'chunked'")
    if reason := backend.lacks(op, device):
        raise ValueError(f"impl: {impl!r} has no kernel for {op} on this device: {reason}; expected 'auto' or 'chunked'")
    return (impl,)


def backend_for(op: str, device: torch.device, impl: str, dtype: torch.dtype) -> Backend:
    """Return the backend for an op that needs no plan."""
    return BACKENDS[impls_for(device, impl, op, dtype)[0]]


def derivative_impl(impl: str, op: str, device: torch.device) -> str:
    """Return the ``impl`` for the derivative ``op`` of a call: the same one if it implements ``op``, otherwise "auto"."""
    if impl in ("auto", "reference"):
        return impl
    return impl if BACKENDS[impl].has(op, None) and BACKENDS[impl].lacks(op, device) is None else "auto"


def _gpu(device: torch.device, impls: tuple[str, ...], arch: int | None = None) -> Gpu | None:
    """Return the GPU of a call that may use GPU kernels or PyTorch's GPU products, otherwise None."""
    there = device.type == "cuda" and torch.version.hip is None
    return gpu_of(device, arch) if there or any(isinstance(BACKENDS[impl], GpuBackend) for impl in impls) else None


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
    if irregular:  # round the mean of ragged rows, which varies between calls, so that few plans are computed and cached
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
    """Return the plan for these operands. ``num_examples`` is needed for ragged rows (R, K) and (R, O)."""
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
    """Return the plan of a call of ``op`` with these sizes. ``print`` it to see all candidates.

    Args:
        op: "interference", "gram", "dot", "sq_norm" or "weighted_grad".
        N, T, K, O: examples, positions, input features and output features.
        M: examples of the second set of a cross ``gram``.
        gram: with "interference", whether the call also computes the Gram matrix.
        irregular: whether the rows are ragged or ``embedding`` is given. With ragged rows, T is their mean number per example,
            rounded up. T is then rounded up further, to four significant binary digits.
        dtype, device, impl: the same as in the call.
        arch: with ``device="cuda"``, the architecture to plan for (80, 90 or 100). The machine does not need such a device. The
            default is the architecture of the device.

    Raises:
        TypeError: ``dtype`` is not supported.
        ValueError: another argument is invalid, or no backend implements the call.
        RuntimeError: the named ``impl`` is not available on this machine, or ``device`` does not exist and ``arch`` is not given.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    for name, size in {"N": N, "T": T, "K": K, "O": O, "M": M or 0}.items():
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"{name}: expected a size >= 0, got {size!r}")
    if gram and op != "interference":
        raise ValueError(f"gram: only valid with op 'interference', got op {op!r}")
    if M is not None and (op != "gram" or irregular):
        raise ValueError(f"M: only valid with op 'gram' and regular rows, got op {op!r}{', irregular' if irregular else ''}")
    if dtype not in INPUT_DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, INPUT_DTYPES))}, got {dtype}")
    if impl == "reference":
        raise ValueError("impl: expected 'auto' or a backend, got 'reference', which materializes every gradient and has no plan")
    device = torch.device(device)
    if arch is None:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device: this machine has no CUDA device; pass arch ({', '.join(map(str, GPUS))}) to plan for one")
        impls = impls_for(device, impl, op, dtype)
    else:
        if device.type != "cuda" or not isinstance(arch, int) or arch not in GPUS:
            raise ValueError(f"arch: expected one of {', '.join(map(str, GPUS))} with device='cuda', got {arch!r} with {device}")
        on_gpus = ("triton", "cuda", "chunked")
        having = (name for name in on_gpus if BACKENDS[name].has(op, dtype) and BACKENDS[name].lacks(op, device, arch) is None)
        impls = tuple(name for name in having if impl in ("auto", name))
        if not impls:
            raise ValueError(f"impl: expected 'auto' or one with a kernel for {op} and {dtype} on GPUs, got {impl!r}")
    return choose(_call(op, N, T, K, O, M, gram, dtype, irregular, _gpu(device, impls, arch)), impls)


def build_info() -> dict[str, object]:
    """Return which backends were compiled and which are available on this machine, as a dictionary of plain values.

    The values of "cpu", "triton" and "cuda" are "live", or the reason why the backend is not available. "cpu_isa" is the
    instruction set of the CPU kernels, and "cpu_isas" lists those that this processor supports. "threads" is the number of CPU
    threads.
    """
    missing = why_not("cpu")
    return {
        "torch": torch.__version__,
        "cpu": "live" if missing is None else missing,
        "cpu_isa": None if missing else cpu_kernels.isa(),
        "cpu_isas": [] if missing else list(cpu_kernels.isas()),
        "threads": torch.get_num_threads(),
        "triton": why_not("triton", torch.device("cuda")) or "live",
        "cuda": why_not("cuda", torch.device("cuda")) or "live",
    }
