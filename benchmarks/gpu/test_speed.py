"""The ops and a head on a device: against the plain product, materialized gradients and a plain head.

``benchmarks/gpu.sh`` runs them on a machine that has one, and ``zerosum bench`` for a training step.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zsl_kernels as zk
from benchmarks.cases import Case, inputs
from benchmarks.heads import HEADS, Head, HeadCase
from benchmarks.parametrize import over
from tests.devices import moved
from zerosum.bench.ops import weight_gradient
from zsl_kernels.backends import reference

QUICK = [Case(4, 64, 64, 64)]
# A block's matrices of width 768 and 2048, few and many examples, short ones, a head's chunk, single positions.
CASES = [
    *QUICK,
    Case(8, 1024, 768, 768),
    Case(32, 1024, 768, 768),
    Case(8, 1024, 2304, 768),
    Case(8, 1024, 2048, 2048),
    Case(32, 1024, 2048, 2048),
    Case(64, 128, 2048, 2048),
    Case(8, 1024, 12288, 768),
    Case(8192, 1, 768, 768),
]
OPS = (
    "ops on a device, {}",
    "Time as a ratio to the dW product of torch in the same dtype. einsum materializes every gradient.",
)
HEAD = ("linear_cross_entropy on a device", "Forward and backward with all statistics, as a ratio to a plain head with the same.")
HEAD_CASES = [HeadCase(2, 8, 32, 500, "bfloat16"), HeadCase(8, 1024, 768, 50304, "bfloat16"), HeadCase(8, 1024, 768, 50304)]

COLUMNS = {
    "sums": lambda x: zk.interference(x.a, x.b),
    "+ direction": lambda x: zk.interference(x.a, x.b, direction=x.direction),
    "+ Gram": lambda x: zk.interference(x.a, x.b, gram=True),
    "+ Gram, triton": lambda x: zk.interference(x.a, x.b, gram=True, impl="triton"),
    "+ Gram, cuda": lambda x: zk.interference(x.a, x.b, gram=True, impl="cuda"),
    "gram": lambda x: zk.gram(x.a, x.b),
    "sq_norm": lambda x: zk.sq_norm(x.a, x.b),
    "chunked": lambda x: zk.interference(x.a, x.b, impl="chunked"),
    "einsum": lambda x: reference.interference(x.a, x.b, None, False),
}
EINSUM_BYTES = 16 << 30  # a case whose gradients would not fit beside their temporaries has no such column


@pytest.fixture(scope="module")
def device(request) -> str:
    return request.config.option.device


@over(CASES, QUICK)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("column", COLUMNS)
def test_ops(compare, table, device, case, dtype, column):
    named = column.rpartition(", ")[2]
    if named in ("triton", "cuda") and (reason := zk.build_info()[named]) != "live":
        pytest.skip(f"{named} is not live: {reason}")
    if column == "einsum" and 4 * case.N * case.O * case.K > EINSUM_BYTES:
        pytest.skip("the materialized gradients would not fit")
    if "Gram" in column and case.N > 512:
        pytest.skip("the Gram of so many examples is work of another kind")
    cpu = inputs(case, getattr(torch, dtype))
    x = cpu.replace(**{name: moved(tensor, device) for name, tensor in cpu.tensors().items()})
    compare(
        table(OPS[0].format(dtype), OPS[1]),
        str(case),
        column,
        lambda: COLUMNS[column](x),
        lambda: weight_gradient(x.a, x.b),
        flops=case.flops if column == "sums" else None,
        microseconds=True,
    )


@over(HEAD_CASES, HEAD_CASES[:1])
def test_linear_cross_entropy(compare, table, device, case):
    x = Head.make(case, device)
    compare(table(*HEAD), str(case), "fused", lambda: HEADS["fused"](x), lambda: HEADS["plain"](x), against="plain")


def test_results_are_right(device):
    """What is timed above is the truth, on this device: one call of each column against float64."""
    cpu = inputs(Case(5, 33, 45, 70))
    x = cpu.replace(**{name: moved(tensor, device) for name, tensor in cpu.tensors().items()})
    truth = zk.interference(cpu.a.double(), cpu.b.double(), direction=cpu.direction.double(), gram=True, impl="reference")
    found = zk.interference(x.a, x.b, direction=x.direction, gram=True)
    for name, want in truth._asdict().items():
        torch.testing.assert_close(getattr(found, name).double().cpu(), want, rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(found.grad_sum.flatten(), weight_gradient(x.a, x.b).flatten(), 0) > 0.9999
