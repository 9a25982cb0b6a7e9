"""Every shipped configuration of the Triton kernels, compiled for its architecture without a GPU: what the machine code shows."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.sass import compile_triton
from benchmarks.gpu.variants import variants
from zsl_kernels.configs import CONFIGS, UNALIGNED
from zsl_kernels.gpus import GPUS

# The instructions that multiply on the matrix unit.
UNITS = {80: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA", "UTCQMMA", "UTCMMA"}}
# Of a block that is smaller than the unit of that architecture takes: that of the one before, too.
SMALL_ROWS = 64


def look(arch, at):
    """What is wrong with one variant. Variants are made anew in each process: kernels do not travel."""
    variant = list(variants(arch))[at]
    compiled = compile_triton(variant, arch)
    usage, wrong = compiled.usage, []
    if usage.registers > 255 or usage.stack or usage.spills:
        wrong.append(f"{usage.registers} registers, {usage.stack} bytes of stack, {usage.spills} spills")
    if compiled.shared > GPUS[arch].shared_bytes:
        wrong.append(f"{compiled.shared} bytes of shared memory")
    if "PRECISION" in variant.constants:
        units = UNITS[arch] | ({"HMMA"} if variant.config.rows < SMALL_ROWS else set())
        in_loops = {name for loop in usage.hot for name in loop.matrix}
        scalar = any(loop.instructions["FFMA"] > loop.matrix.total() for loop in usage.hot)
        if not in_loops & units or not set(usage.matrix) <= units or scalar:
            wrong.append(f"products by {dict(usage.matrix)}, in loops by {in_loops or 'none'}, not by {units} alone")
    return f"{variant.name}, {variant.dtype}, {tuple(variant.config)}", wrong


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("arch", CONFIGS)
def test_no_spills_no_stack_shared_memory_in_bounds_and_the_matrix_unit_in_the_loop(arch, pool):
    count = len(list(variants(arch)))
    found = dict(pool.map(look, [arch] * count, range(count), chunksize=4))
    assert len(found) == count  # and no two have one name
    assert not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_configuration_is_among_them(arch):
    compiled = {(variant.dtype, variant.config) for variant in variants(arch)}
    for kernel, kinds in CONFIGS[arch].items():
        for kind, configs in kinds.items():
            assert {(kind, config) for config in configs} <= compiled, kernel
    assert {("half", config) for config in UNALIGNED.values()} <= compiled
