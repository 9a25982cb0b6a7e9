"""The Triton kernels of coordinate_sums, compiled for each architecture without a GPU: what the machine code shows."""

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.sass import Variant, compile_triton
from zsl_kernels.backends.triton.coordinates import BLOCK, PROGRAMS, WARPS, coordinate_parts_kernel, coordinate_totals_kernel
from zsl_kernels.planning.tiles import CONFIGS, Config

CONFIG = Config(0, 0, 0, WARPS, 1)
KERNELS = {
    "parts": (coordinate_parts_kernel, {"p_table": "*i64", "p_parts": "*fp64"}, {"BLOCK": BLOCK}),
    "totals": (
        coordinate_totals_kernel,
        {"p_table": "*i64", "p_parts": "*fp64", "p_totals": "*fp64", "most": "i32"},
        {"PROGRAMS": PROGRAMS},
    ),
}


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_and_no_stack(name, arch):
    kernel, signature, constants = KERNELS[name]
    odd = tuple(signature.keys() & {"most"})
    usage = compile_triton(Variant(name, kernel, "float32", CONFIG, signature, constants, odd), arch).usage
    assert usage.registers <= 168  # three programs of 128 threads at a time
    assert not usage.stack
    assert not usage.spills
