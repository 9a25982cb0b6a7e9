"""The compiled CUDA kernels, without a device: what the machine code shows, and how a launch fails."""

import subprocess
import sys
from pathlib import Path

import pytest

import zsl_kernels
from benchmarks.gpu import sass
from zsl_kernels.planning.devices import GPUS
from zsl_kernels.planning.tiles import CUDA_TILES

LIBRARY = Path(zsl_kernels.__file__).with_name("_cuda.so")
ELEMENTS = ("Float32", "Bfloat16", "Float16")

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA kernels were not built: there is no nvcc")


@pytest.fixture(scope="module")
def kernels():
    """By architecture, of which 9.0 has kernels of its own alone, "90a"."""
    found = {}
    for name, cubin in sass.cubins(LIBRARY).items():
        arch = name.rsplit("sm_", 1)[1].removesuffix(".cubin")
        found.setdefault(int(arch) if arch.isdigit() else arch, []).extend(sass.inspect(cubin))
    return found


@pytest.mark.parametrize("arch", GPUS)
def test_every_kernel_is_there_without_stack_or_spills(arch, kernels):
    usages = kernels[arch]
    products = [usage for usage in usages if "gram_kernel" in usage.kernel and "slab" not in usage.kernel]
    assert len(products) == len(CUDA_TILES) * len(ELEMENTS)
    # Of an embedding the sums of each element in two ways, what joins their windows in two, and five others.
    embeddings = 2 * len(ELEMENTS) + 2 + 5
    # Of held gradients three elements with and without a direction, of scales nine pairs of elements and three of a bias alone, of
    # slabs' Grams two elements by three sizes and one of two slabs, and the sums of partial results.
    rows = 3 * 2 + 9 + 3 + 2 * 4 + 1
    assert len(usages) == len(products) + embeddings + rows
    assert len({usage.kernel for usage in usages}) == len(usages)
    for usage in usages:
        assert (usage.stack, usage.spills) == (0, 0), usage
        assert 256 * usage.registers <= 65536, usage


@pytest.mark.parametrize("arch", GPUS)
def test_products_are_those_of_the_matrix_unit(arch, kernels):
    for usage in (usage for usage in kernels[arch] if "gram_kernel" in usage.kernel and "slab" not in usage.kernel):
        assert usage.matrix["HMMA"] > 0, usage
        looped = [loop for loop in usage.loops if loop.matrix["HMMA"]]
        assert looped, usage
        if "Float16" in usage.kernel or "Bfloat16" in usage.kernel:
            # Most steps of the product go through a loop of copies, a barrier and products, and nothing else.
            assert any(sum(loop.instructions.values()) <= 25 * loop.matrix["HMMA"] for loop in looped), usage


@pytest.mark.parametrize("arch", GPUS)
def test_row_kernels_read_16_bytes_at_a_time(arch, kernels):
    """Of four examples, or positions, together: of x and b each, of float32 beside half precision two times."""
    for usage in kernels[arch]:
        if "dense_kernel" in usage.kernel or "scale_bias_kernel" in usage.kernel:
            assert usage.wide_loads >= 4, usage
            if "scale_bias_kernel" in usage.kernel and "Lb1E" in usage.kernel:
                assert usage.wide_loads >= 8, usage
            assert usage.registers <= 128, usage  # two blocks of 256 threads to a multiprocessor


def test_the_kernels_of_hopper_have_no_stack_or_spills(kernels):
    usages = kernels["90a"]
    # By two elements five of sums and slabs, one of scalars, one of weighted sums; three that end launches, one that copies.
    assert len(usages) == 2 * 7 + 3 + 1
    for usage in usages:
        assert (usage.stack, usage.spills) == (0, 0), usage
    # 168 at the start: the warps that copy give theirs to those that multiply.
    assert {usage.registers for usage in usages if "hopper_kernel" in usage.kernel} == {168}


def test_products_of_hopper_are_those_of_a_warpgroup_on_boxes(kernels):
    for usage in kernels["90a"]:
        if "hopper_kernel" in usage.kernel:
            assert usage.instructions["UTMALDG"] >= 4, usage
            (loop,) = usage.hot  # the first step of a tile may stand before it
            assert loop.own["HGMMA"] % 4 == 0, usage  # of a step, with little beside them
            assert sum(loop.own.values()) < 25 * loop.own["HGMMA"], usage


@pytest.mark.parametrize("arch", GPUS)
def test_products_of_slabs_are_those_of_the_matrix_unit(arch, kernels):
    found = [usage for usage in kernels[arch] if "slab_gram_kernel" in usage.kernel]
    assert len(found) == 8
    for usage in found:
        assert any(loop.matrix["HMMA"] for loop in usage.loops), usage


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("tile", CUDA_TILES, ids=lambda tile: f"{tile.rows}x{tile.cols}")
def test_shared_memory_is_within_the_limit(tile, arch, kernels):
    fixed = max(usage.shared for usage in kernels[arch])
    assert fixed <= 1024  # the system's own
    assert tile.shared_bytes(tile.slots, False) <= GPUS[arch].shared_bytes


def test_the_module_imports_without_a_device_and_a_launch_says_what_failed():
    program = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", {str(LIBRARY)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
assert len(module.tiles()) == {len(CUDA_TILES)}
built, driver = module.versions()
assert built >= 12000 and driver >= 0
try:
    module.cross_gram((0, 1, 1, 0), 0, (1, 1, 2, 1, True), (0, 0, 0, 1), (0, 0, 0, 1), 1, 1, (0, 0, 0, 1), (0, 0, 0, 1), 1, 1, 0)
except RuntimeError as error:
    assert str(error).startswith("gram_kernel: "), error
    print("refused")
"""
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "refused\n", done.stderr
