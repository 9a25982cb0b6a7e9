"""Which implementations are live on this machine, and the plan of one call among them."""

from __future__ import annotations

import torch
from torch import Tensor

from zsl_kernels import cpu
from zsl_kernels.plan import OPS, Call, Plan, choose
from zsl_kernels.types import INPUT_DTYPES, sum_dtype

IMPLS = ("auto", "reference", "chunked", "cpu", "triton", "cuda")


# Loaded once, on import: a cache on a function would be traced by torch.compile, which warns of it.
_CPU_MISSING = cpu.load()


def why_not(impl: str) -> str | None:
    """Why ``impl`` is not available on this machine, or None if it is."""
    if impl in ("auto", "reference", "chunked"):
        return None
    if impl == "cpu":
        return _CPU_MISSING
    return "this version has no GPU kernels yet"


def impls_for(device: torch.device, impl: str) -> tuple[str, ...]:
    """The implementations that a call on ``device`` may use. A named one is used or refused, never replaced."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        return ("cpu", "chunked") if device.type == "cpu" and why_not("cpu") is None else ("chunked",)
    if reason := why_not(impl):
        raise RuntimeError(f"impl: {impl!r} is not available: {reason}")
    if impl == "cpu" and device.type != "cpu":
        raise ValueError(f"impl: 'cpu' expects CPU tensors, got tensors on {device}")
    return (impl,)


def _call(op: str, N: int, T: int, K: int, O: int, M: int | None, gram: bool, dtype: torch.dtype, irregular: bool) -> Call:
    return Call(op, N, T, K, O, M, gram, sum_dtype(dtype).itemsize, torch.get_num_threads(), irregular)


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
    call = _call(op, N, T, a.shape[-1], b.shape[-1], M, gram, a.dtype, ragged or added)
    return choose(call, impls_for(a.device, impl))


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
    impl: str = "auto",
) -> Plan:
    """The choice that a call of ``op`` with these sizes makes, printable with its candidates.

    Args:
        op: "interference", "gram", "dot", "sq_norm" or "weighted_grad".
        N, T, K, O: examples, positions, input features and output features, as everywhere.
        M: examples of the second set of a cross ``gram``.
        gram: with "interference", whether the Gram is asked for too.
        irregular: whether the rows are ragged, T being the mean of an example's, rounded up, or ``embedding`` is given.
        dtype, device, impl: as the call will have them.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    for name, size in {"N": N, "T": T, "K": K, "O": O, "M": M or 0}.items():
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"{name}: expected a size >= 0, got {size!r}")
    if dtype not in INPUT_DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, INPUT_DTYPES))}, got {dtype}")
    if impl == "reference":
        raise ValueError("impl: the reference has no plan; it materializes every gradient")
    return choose(_call(op, N, T, K, O, M, gram, dtype, irregular), impls_for(torch.device(device), impl))


def build_info() -> dict[str, object]:
    """What was compiled, and what is live on this machine: a dictionary of plain values."""
    missing = why_not("cpu")
    return {
        "torch": torch.__version__,
        "cpu": "live" if missing is None else missing,
        "cpu_isa": None if missing else torch.ops.zsl_cpu.isa(),
        "cpu_isas": [] if missing else list(torch.ops.zsl_cpu.isas()),
        "threads": torch.get_num_threads(),
        "triton": why_not("triton"),
        "cuda": why_not("cuda"),
    }
