"""Every shipped configuration of the Triton kernels, compiled for its architecture without a GPU: what the machine code shows."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.sass import compile_triton
from benchmarks.gpu.variants import variants
from zsl_kernels.planning.devices import GPUS
from zsl_kernels.planning.tiles import CONFIGS, UNALIGNED

# The instructions that multiply on the matrix unit.
UNITS = {80: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA", "UTCQMMA", "UTCMMA"}}
# Of a block that is smaller than the unit of that architecture takes: that of the one before, too.
SMALL_ROWS = 64
# Bytes of shared memory that a block of architectures 86, 89 and 120 may ask for, which take the tiles of 80.
DESKTOP = 101376


def look(arch, at):
    """What is wrong with one variant. Variants are made anew in each process: kernels do not travel."""
    variant = list(variants(arch))[at]
    compiled = compile_triton(variant, arch)
    usage, wrong = compiled.usage, []
    if usage.registers > 255 or usage.stack or usage.spills:
        wrong.append(f"{usage.registers} registers, {usage.stack} bytes of stack, {usage.spills} spills")
    if compiled.shared > (DESKTOP if arch == 80 else GPUS[arch].shared_bytes):
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


def one_of_each(arch):
    """The places among the variants of the first of every kernel, for each kind of elements."""
    first = {}
    for at, variant in enumerate(variants(arch)):
        first.setdefault((variant.kernel.__name__, variant.dtype), at)
    return list(first.values())


def assert_nothing_wrong(found, count):
    """``found``: pairs of a variant's name and what is wrong."""
    found = dict(found)
    assert len(found) == count  # and no two have one name
    assert not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("arch", CONFIGS)
def test_one_of_each_kernel_compiles_well(arch):
    """No spills and no stack, shared memory within the device's bounds, and products on the matrix unit in the loop."""
    places = one_of_each(arch)
    assert_nothing_wrong((look(arch, at) for at in places), len(places))


@pytest.mark.slow("over a hundred builds for each architecture")
@pytest.mark.parametrize("arch", CONFIGS)
def test_every_other_configuration_compiles_well(arch, pool):
    places = sorted(set(range(len(list(variants(arch))))) - {*one_of_each(arch)})
    assert_nothing_wrong(pool.map(look, [arch] * len(places), places, chunksize=4), len(places))


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_configuration_is_among_them(arch):
    compiled = {(variant.dtype, variant.config) for variant in variants(arch)}
    for kernel, kinds in CONFIGS[arch].items():
        for kind, configs in kinds.items():
            assert {(kind, config) for config in configs} <= compiled, kernel
    assert {("half", config) for config in UNALIGNED.values()} <= compiled


def test_counts_that_change_from_call_to_call_do_not_compile_anew():
    """As a launch tells its arguments apart: whether an integer is one, or a multiple of sixteen."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    counts = {"N", "M", "R", "Q", "parts", "per_part", "examples", "first_task", "first_row", "first_col", "num_rows", "num_cols"}
    backend = make_backend(GPUTarget("cuda", 80, 32))
    for kernel in {variant.kernel.__name__: variant.kernel for variant in variants(80)}.values():
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        found = []
        for value in (1, 16, 17):
            arguments = {parameter.name: value if parameter.name in counts else 16 for parameter in kernel.params}
            found.append(bind(**arguments, debug=False)[1])
        assert found[0] == found[1] == found[2], kernel.__name__
