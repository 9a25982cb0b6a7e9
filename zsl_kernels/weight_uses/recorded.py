"""Records calls of the CUDA backend, which the uses of weights (csrc/bindings/uses.cpp) then repeat on a device without Python."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import call_cache
from zsl_kernels.backends.cuda import hopper, module
from zsl_kernels.backends.cuda.recorded import record
from zsl_kernels.backends.dispatch import CUDA, impls_for, plan_call
from zsl_kernels.ops.registration import outside_autocast
from zsl_kernels.types import InterferenceSums

IMPL = "auto"


def setting() -> int:
    """Return the precision settings of torch that the results depend on, encoded in a number."""
    return 2 * torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction + module.exact()


def product(a: Tensor, b: Tensor, direction: Tensor | None, gram: bool) -> Any:
    """Record ``zk.interference(a, b, ...)``. Return None if this is impossible or the plan does not choose the CUDA backend."""
    if not _on_device(a):
        return None
    plan = plan_call("interference", a, b, impl=IMPL, gram=gram)
    if plan.impl != "cuda" or (gram and plan.way == "hopper" and not hopper.in_one_slab(plan, a.dtype)):
        return None
    return _record(lambda a, b, u: CUDA.interference(plan, a, b, u, gram), a, b, direction)


def of_bias(b: Tensor, direction: Tensor | None, gram: bool) -> Any:
    """Record ``zk.dense_interference(zk.bias_grad(b), ...)``, or return None."""
    if not _has_rows(b):
        return None
    return _record(lambda b, u: _dense(CUDA.scale_bias_grad(None, b, None, None, None, len(b), True)[1], u, gram), b, direction)


def of_norm(
    x: Tensor,
    b: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: tuple[Tensor | None, bool] | None,
    shift: tuple[Tensor | None, bool] | None,
) -> Any:
    """Record ``zk.dense_interference`` of the results of ``zk.scale_bias_grad(x, b, mean=mean, rstd=rstd)``, or return None.

    ``scale`` and ``shift`` are (direction, whether the Gram matrix is wanted), or None if the layer has no such parameter.
    """
    if not _has_rows(b):
        return None
    (u, of_scale), (v, of_shift) = scale or (None, False), shift or (None, False)

    def run(x: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        scales, shifts = CUDA.scale_bias_grad(x if scale else None, b, mean, rstd, None, len(b), shift is not None)
        found: tuple[Tensor | None, ...] = ()
        if scale:
            found += tuple(_dense(scales, u, of_scale))
        return found + tuple(_dense(shifts, v, of_shift)) if shift else found

    return _record(run, x, b, mean, rstd, u, v)


def _dense(g: Tensor | None, direction: Tensor | None, gram: bool) -> InterferenceSums:
    assert g is not None
    return CUDA.dense_interference(g, direction, gram)


def _on_device(x: Tensor) -> bool:
    return CUDA.takes(x.device) and x.dtype in CUDA.dtypes and CUDA.why_not(x.device) is None


def _has_rows(x: Tensor) -> bool:
    """Return whether an op on this device uses the row kernels of the CUDA backend."""
    return _on_device(x) and impls_for(x.device, IMPL, "dense_interference", x.dtype)[0] == "cuda"


def _record(call: Callable[..., tuple[Tensor | None, ...]], *operands: Tensor | None) -> Any:
    return record(call_cache.below_autograd(outside_autocast(functools.wraps(call)(call))), operands)[1]
