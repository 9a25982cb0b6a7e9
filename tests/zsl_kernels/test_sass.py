"""What the compile tests of the GPU kernels rely on: that a spill, a stack and a loop without the matrix unit are recognized."""

import shutil
import subprocess

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from benchmarks.gpu import sass  # noqa: E402
from zsl_kernels.planning.tiles import Config  # noqa: E402

TARGETS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@triton.jit
def matrix_kernel(p_a, p_b, p_c, N, T, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr):
    """Σ_i |b_iᵀ a_i|: a loop with products inside of a loop that folds them."""
    o, k, t = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for _ in range(N):
        g = tl.zeros((ROWS, COLS), tl.float32)
        for step in range(0, T, DEPTH):
            # (ROWS, DEPTH) and (DEPTH, COLS)
            b = tl.load(p_b + (step + t)[None, :] * ROWS + o[:, None])
            a = tl.load(p_a + (step + t)[:, None] * COLS + k[None, :])
            if DOT:
                g = tl.dot(b, a, g)
            else:
                g += tl.sum(b, 1)[:, None].to(tl.float32) * tl.sum(a, 0)[None, :].to(tl.float32)
        total += tl.abs(g)
    tl.store(p_c + o[:, None] * COLS + k[None, :], total)


def variant(rows=128, cols=64, warps=8, dot=True):
    signature = {"p_a": "*bf16", "p_b": "*bf16", "p_c": "*fp32", "N": "i32", "T": "i32"}
    constants = {"ROWS": rows, "COLS": cols, "DEPTH": 32, "DOT": dot}
    return sass.Variant("matrix", matrix_kernel, "half", Config(rows, cols, 32, warps, 3), signature, constants, odd=("N",))


def additions(instructions):
    return instructions["FADD"] + 2 * instructions["FADD2"]


@pytest.mark.parametrize("arch", TARGETS)
def test_the_inner_loop_of_products_is_found(arch):
    found = sass.compile_triton(variant(), arch)
    usage = found.usage
    assert usage.kernel == "matrix_kernel"
    assert (usage.stack, usage.spills) == (0, 0)
    assert 32 < usage.registers <= 255
    assert found.shared >= 2 * 2 * 32 * (128 + 64)
    assert set(usage.matrix) == {TARGETS[arch]}
    # One loop of products, in a loop that folds: |g| is added there, and not in the first.
    (hot,) = usage.hot
    assert 0 < hot.matrix[TARGETS[arch]] <= usage.matrix[TARGETS[arch]]
    assert additions(hot.instructions) == 0
    outer = usage.loops[-1]
    assert additions(outer.own) == additions(outer.instructions) >= 128 * 64 / 256
    assert not sass._matrix(outer.own) or arch == 100  # where the first product of a tile stands before the loop


def test_a_loop_without_the_matrix_unit_is_recognized():
    usage = sass.compile_triton(variant(dot=False), 80).usage
    assert not usage.matrix
    assert not usage.hot
    assert usage.ffma_in_loops > 0


def test_spills_are_recognized():
    usage = sass.compile_triton(variant(256, 128, warps=4), 80).usage  # two tiles in registers: 512 for each thread
    assert usage.spills > 0
    assert usage.stack > 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_reads_what_nvcc_builds(tmp_path):
    """A capped number of registers spills; a kernel of the same file without a cap does not."""
    body = "float x[64]; for (int i = 0; i < 64; ++i) x[i] = p[i * 32 + threadIdx.x]; __syncthreads();" + (
        "for (int n = 0; n < count; ++n) for (int i = 0; i < 64; ++i) x[i] = x[i] * x[(i + 1) % 64] + x[i];"
        "for (int i = 0; i < 64; ++i) p[i * 32 + threadIdx.x] = x[i];"
    )
    source = tmp_path / "spill.cu"
    source.write_text(
        f'extern "C" __global__ void roomy(float* p, int count) {{ {body} }}\n'
        f'extern "C" __global__ void __maxnreg__(32) cramped(float* p, int count) {{ {body} }}\n'
    )
    library = tmp_path / "spill.o"
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    subprocess.run(["nvcc", "-c", *gencode, "-o", library, source], check=True, capture_output=True)
    found = sass.cubins(library)
    assert [name.split(".")[-2] for name in found] == ["sm_80", "sm_90"]
    for cubin in found.values():
        usages = {usage.kernel: usage for usage in sass.inspect(cubin)}
        assert set(usages) == {"roomy", "cramped"}
        assert usages["roomy"].spills == 0
        assert usages["cramped"].spills > 0
        assert usages["cramped"].registers <= 32
        assert usages["roomy"].ffma_in_loops >= 64


def test_loops_are_those_of_the_control_flow():
    """Not every branch backwards is one: a wait that stands at the end returns to the middle."""
    code = sass.Code(
        """
        /*0000*/                   MOV R0, R1 ;
.L_x_0:
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R0, R0, R0, R0 ;
.L_x_2:
        /*0030*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0040*/                   BRA.U UP0, `(.L_x_2) ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   NANOSLEEP 0x10 ;
        /*0080*/              @!P0 BRA `(.L_x_3) ;
        /*0090*/                   BRA `(.L_x_1) ;
"""
    )
    loops = sorted(map(sorted, code.loops))
    assert loops == [[1, 2, 3, 4, 5, 7, 8, 9], [3, 4], [7, 8]]
