"""The ops and a training step on a device: against the plain product, materialized gradients, vmap, and peers.

``benchmarks/gpu.sh`` runs them on a machine that has one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zsl_kernels as zk
from benchmarks.cases import Case, inputs, weight_gradient
from benchmarks.gpu.peers import PEERS, installed
from benchmarks.heads import HEADS, Head, HeadCase
from benchmarks.parametrize import over
from benchmarks.training_steps import STEPS, Workload, plain
from tests.devices import moved
from zerosum.training.model import GPTConfig
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
STEP = (
    "training step on a device, {}",
    "The project's GPT of width 768, 12 layers, vocabulary 50304, T=1024: forward and backward with every statistic of every "
    "parameter, as a ratio to the plain step. vmap materializes the gradients, loop takes one example at a time.",
)
PEAK = ("peak memory of a training step on a device", "MB allocated beyond the plain step's peak.")
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


@pytest.fixture(scope="module")
def work(request, device) -> Workload:
    if request.config.option.quick:
        return Workload.make(GPTConfig(vocab=128, width=32, layers=1, heads=2, positions=16), 3, device)
    return Workload.make(GPTConfig(vocab=50304, width=768, layers=12, heads=12, positions=1024), 8, device)


@pytest.mark.filterwarnings("ignore:Full backward hook")  # of peers
@pytest.mark.parametrize("precision", ["float32", "autocast to bfloat16"])
@pytest.mark.parametrize("column", [*(name for name in STEPS if name != "plain"), *PEERS])
def test_step(compare, table, device, work, precision, column):
    if column in PEERS and not installed(column):
        pytest.skip(f"{column} is not installed")
    step = PEERS[column](work) if column in PEERS else lambda: STEPS[column](work)

    def run(function):
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=precision != "float32"):
            function()

    try:
        compare(
            table(STEP[0].format(precision), STEP[1]),
            f"N={len(work.x)}",
            column,
            lambda: run(step),
            lambda: run(lambda: plain(work)),
            against="plain",
        )
    except torch.cuda.OutOfMemoryError:
        pytest.skip("out of memory")


@pytest.mark.parametrize("column", [name for name in STEPS if name != "plain"])
def test_peak_memory(table, device, work, column):
    from benchmarks.tables import Cell

    if device.split(":")[0] != "cuda":
        pytest.skip("of a CUDA device's allocator")

    def peak(step):
        torch.cuda.reset_peak_memory_stats()
        step(work)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6

    before = peak(plain)
    try:
        extra = peak(STEPS[column]) - before
    except torch.cuda.OutOfMemoryError:
        pytest.skip("out of memory")
    table(*PEAK).add(f"N={len(work.x)}", "plain, in all", Cell(before, "MB"))
    table(*PEAK).add(f"N={len(work.x)}", column, Cell(extra, "MB"))


def test_results_are_right(device):
    """What is timed above is the truth, on this device: one call of each column against float64."""
    cpu = inputs(Case(5, 33, 45, 70))
    x = cpu.replace(**{name: moved(tensor, device) for name, tensor in cpu.tensors().items()})
    truth = zk.interference(cpu.a.double(), cpu.b.double(), direction=cpu.direction.double(), gram=True, impl="reference")
    found = zk.interference(x.a, x.b, direction=x.direction, gram=True)
    for name, want in truth._asdict().items():
        torch.testing.assert_close(getattr(found, name).double().cpu(), want, rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(found.grad_sum.flatten(), weight_gradient(x.a, x.b).flatten(), 0) > 0.9999
