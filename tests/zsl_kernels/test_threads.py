"""Threads change results by rounding at most, repeated calls not by a bit; no call holds every example's gradient."""

import json
import subprocess
import sys

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import CALLS, DIFFERENTIATED, Problem, assert_within_budget, cotangents, expected, gradients

PROBLEM = Problem(9, 40, 150, 110)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("call", CALLS)
def test_any_number_of_threads_stays_in_the_budget(call, count, threads, impl):
    threads(count)
    for name, result in CALLS[call](PROBLEM.make(), impl).items():
        assert_within_budget(result, expected(PROBLEM, call)[name], name)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("call", DIFFERENTIATED)
def test_the_same_call_gives_the_same_bits(call, count, threads, impl):
    threads(count)
    x, cs = PROBLEM.make(), cotangents(PROBLEM, call)

    def once():
        return {**CALLS[call](x, impl), **{f"d{name}": g for name, g in gradients(call, x, impl, cs).items()}}

    first = once()
    for _ in range(3):
        for name, result in once().items():
            assert torch.equal(result, first[name]), name


# Prints by how much each call raised this process's peak memory, in MiB. N gradients would take 256 MiB.
PEAKS = """
import json, resource, sys
import torch
import zsl_kernels as zk

N, T, K, O = 256, 8, 512, 512
a, b, u = torch.randn(N, T, K), torch.randn(N, T, O), torch.randn(O, K)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
zk.interference(a[:2], b[:2])
found = {}
for impl in sys.argv[1:]:
    for name, call in {
        "interference": lambda: zk.interference(a, b, direction=u, impl=impl),
        "gram": lambda: zk.interference(a, b, gram=True, impl=impl),
        "backward": lambda: zk.interference(a.requires_grad_(), b, impl=impl).abs_sum.sum().backward(),
    }.items():
        before = peak()
        call()
        found[f"{impl} {name}"] = peak() - before
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_peak_memory_does_not_hold_every_gradient(project_environment):
    impls = ["cpu", "chunked"] if zk.build_info()["cpu"] == "live" else ["chunked"]
    run = subprocess.run(
        [sys.executable, "-c", PEAKS, *impls], env=project_environment, capture_output=True, text=True, check=True, timeout=120
    )
    peaks = json.loads(run.stdout)
    assert len(peaks) == 3 * len(impls)
    # The chunked form's two buffers of 32 MiB in all and temporaries of their size; the kernels' 16 MiB of stored tiles a worker.
    for name, mib in peaks.items():
        assert mib < 128, f"{name}: {mib:.0f} MiB"
