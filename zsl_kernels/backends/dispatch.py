"""All backends, which of them a call may use, and the plan of the call among them.

``impl`` is the name of a backend, "reference", or "auto". A named one is used or refused, never replaced.
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
# In the order in which "auto" prefers them where several have an op.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CPU, TRITON, CUDA, CHUNKED)}
IMPLS = ("auto", "reference", "chunked", "cpu", "triton", "cuda")


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import, and the first call loads the backend
def why_not(impl: str, device: torch.device | None = None) -> str | None:
    """Why ``impl`` is not available on this machine, or on this device of it, or None if it is."""
    return None if impl in ("auto", "reference") else BACKENDS[impl].why_not(device)


def impls_for(device: torch.device, impl: str, op: str | None = None, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """The backends that a call of ``op`` on ``device`` may use, the preferred one first."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "reference":
        return (impl,)
    if impl == "auto":
        # Emulated kernels take tensors of the CPU only where they are named.
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
            f"impl: {impl!r} expects float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}; 'chunked' takes it"
        )
    # The classification head takes any backend for its statistics; what it asks for by name are its own kernels.
    if not backend.has(op, dtype) and op != "linear_cross_entropy":
        raise ValueError(f"impl: {impl!r} has no kernel for {op}; expected 'auto' or 'chunked'")
    if reason := backend.lacks(op, device):
        raise ValueError(f"impl: {impl!r} has no kernel for {op} on this device: {reason}; expected 'auto' or 'chunked'")
    return (impl,)


def backend_for(op: str, device: torch.device, impl: str, dtype: torch.dtype) -> Backend:
    """That of an op which needs no plan."""
    return BACKENDS[impls_for(device, impl, op, dtype)[0]]


def derivative_impl(impl: str, op: str, device: torch.device) -> str:
    """What computes the derivative ``op`` of a call of ``impl``: the same where it has a kernel for it, else the device's own."""
    if impl in ("auto", "reference"):
        return impl
    return impl if BACKENDS[impl].has(op, None) and BACKENDS[impl].lacks(op, device) is None else "auto"


def _gpu(device: torch.device, impls: tuple[str, ...], arch: int | None = None) -> Gpu | None:
    """That of a call which may use the GPU's kernels, or is PyTorch's there."""
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
        on_gpus = ("triton", "cuda", "chunked")
        having = (name for name in on_gpus if BACKENDS[name].has(op, dtype) and BACKENDS[name].lacks(op, device, arch) is None)
        impls = tuple(name for name in having if impl in ("auto", name))
        if not impls:
            raise ValueError(f"impl: expected 'auto' or one with a kernel for {op} of {dtype} on GPUs, got {impl!r}")
    return choose(_call(op, N, T, K, O, M, gram, dtype, irregular, _gpu(device, impls, arch)), impls)


def build_info() -> dict[str, object]:
    """What was compiled, and what is live on this machine: a dictionary of plain values."""
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
