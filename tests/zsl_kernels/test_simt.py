"""The CUDA kernels on threads of a CPU (tests/native/simt): right, within their memory, ordered by their barriers.

The parity suites run in a process of their own. The module alone, on NumPy arrays (tests/native/simt_checks.py), runs under the
sanitizers, and copies of the kernels with a mistake planted in each show that the checks can fail.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zerosum
import zsl_kernels as zk
from tests import error_budgets, simt
from tests.inputs import (
    CALLS,
    IRREGULAR_CALLS,
    Irregular,
    Problem,
    assert_within_budget,
    cotangents,
    expectations,
    expected,
    expected_gradients,
    expected_irregular,
    gradients,
    ways_of_cuda,
)
from zerosum.probe import rules
from zerosum.probe.rules import linear, norm
from zsl_kernels import call_cache
from zsl_kernels.backends import dispatch
from zsl_kernels.backends.cuda import backend as cuda_backend
from zsl_kernels.backends.cuda import embedding, hopper, module, persistent
from zsl_kernels.backends.cuda import rows as row_ops
from zsl_kernels.backends.cuda.recorded import Repeated
from zsl_kernels.ops import scale_bias_grad
from zsl_kernels.planning import gpu_cost
from zsl_kernels.planning.devices import GPUS, of_device
from zsl_kernels.planning.tiles import CUDA_SUMS_HELD, CUDA_TILES
from zsl_kernels.weight_uses import recorded

CHECKS = simt.ROOT / "tests" / "native" / "simt_checks.py"
SUITES = ("interference", "gram", "dot_norm_weighted", "autograd", "ragged", "tied", "embedding", "integer_operands")
ROW_SUITES = ("dense", "scale_bias", "row_kernels")  # the kernels of which are the same on every device
ROW_SOURCES = ("cuda/dense.cuh", "cuda/scale_bias.cuh", "cuda/add_partials.cuh", "cuda/numbers.cuh")
# Of the build. "early": copies of boxes happen at once, in place of as late as may be.
VARIANTS = {
    "address": ("-fsanitize=address", "-O1", "-g1", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread", "-O1", "-g1"),
    "early": ("-DZSL_SIMT_EARLY",),
}

pytestmark = pytest.mark.skipif(
    shutil.which(simt.COMPILER) is None or sys.platform != "linux", reason="needs a C++ compiler on Linux"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds of the kernels, made when they are first asked for: by sanitizer, and by what is changed in a copy of the sources."""
    folder, made = tmp_path_factory.mktemp("simt"), {}

    def get(variant=None, plant=None):
        key = (variant, plant)
        if key not in made:
            own, flags = Path(tempfile.mkdtemp(dir=folder)), (*VARIANTS.get(variant, ()), "-Werror")
            if plant is None:
                made[key] = simt.build(own, *flags)
            else:
                source = simt.KERNELS[1 if "hopper" in plant[0] else 2 if plant[0] in ROW_SOURCES else 0]
                made[key] = simt.build(own, *flags, "-Wno-error", root=changed(own, *plant), changed=source)
        return made[key]

    return get


def changed(folder, file, old, new):
    """A copy of the sources in which one place of one file differs."""
    shutil.copytree(simt.ROOT / "csrc", folder / "csrc")
    path = folder / "csrc" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))
    return folder


def run_checks(library, *cases, sanitizer=None):
    # numpy's threads are not what is watched.
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if sanitizer is not None:
        runtime = "libasan.so" if sanitizer == "address" else "libtsan.so"
        found = subprocess.run([simt.COMPILER, f"-print-file-name={runtime}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"the compiler has no {runtime}")
        environment |= {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66:halt_on_error=1"}
    command = [sys.executable, str(CHECKS), str(library), *cases]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def assert_ok(done):
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.endswith("ok\n")


@pytest.fixture
def emulated(built):
    module.emulate(simt.load(built()))
    with error_budgets.computing_by(error_budgets.EMULATED_CUDA):
        yield
    module.emulate(None)


OTHER_CASES = pytest.mark.slow("the further cases of emulated kernels")


@pytest.mark.parametrize(
    ("kernels", "tier", "least"),
    [
        ("cuda", "not slow", 300),
        ("hopper", "not slow", 150),
        pytest.param("cuda", "slow", 900, marks=OTHER_CASES),
        pytest.param("hopper", "slow", 200, marks=OTHER_CASES),
    ],
)
def test_the_parity_suites_pass(kernels, tier, least, built, project_environment):
    files = [
        str(simt.ROOT / "tests" / "zsl_kernels" / f"test_{name}.py")
        for name in (*SUITES, *(ROW_SUITES if kernels == "cuda" else ()))
    ]
    environment = {**project_environment, "ZSL_TEST_EMULATED": kernels, "ZSL_SIMT": str(built())}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "tests.simt", "-p", "no:cacheprovider", "-m", tier, *files]
    done = subprocess.run(command, cwd=simt.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    # So many that it is not the filter that passes.
    assert int(done.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1]) > least, done.stdout[-300:]


def test_the_module_alone_is_right_on_numpy_arrays(built):
    assert_ok(run_checks(built()))


@pytest.mark.slow("another build of the kernels")
def test_boxes_that_are_copied_at_once_make_no_difference(built):
    assert_ok(run_checks(built("early"), "hopper"))


def test_offsets_past_31_bits(built):
    assert_ok(run_checks(built(), "far", "short"))


@pytest.mark.slow("sanitizers")
def test_under_the_address_sanitizer(built):
    assert_ok(run_checks(built("address"), sanitizer="address"))


@pytest.mark.slow("sanitizers")
def test_under_the_thread_sanitizer(built):
    assert_ok(run_checks(built("thread"), "short", sanitizer="thread"))


# file, what is there, what is planted instead; what reports it, in which cases
PLANTED = {
    "a read past the held tiles": (
        ("cuda/fold.cuh", "(slot < count ? slot : count - 1)", "slot"),
        "address",
        ("regular", "heap-buffer-overflow"),
    ),
    "a read past an operand": (
        ("cuda/product.cuh", "features > 0 ? length(slot) - t : 0", "features > -4 ? length(slot) - t + 4 : 0"),
        "address",
        ("regular", "heap-buffer-overflow"),
    ),
    "no barrier before a step is read": (
        ("cuda/product.cuh", "copy_async_wait<Tile::stages - 2>();\n    __syncthreads();", "copy_async_wait<Tile::stages - 2>();"),
        "thread",
        ("regular", "data race"),
    ),
    "no barrier before numbers are overwritten": (
        ("cuda/embedding.cuh", "__syncthreads();  // the numbers of the places before have been read", ""),
        "thread",
        ("embedding", "data race"),
    ),
    "a read past the last place": (
        ("cuda/embedding.cuh", "from + i < args.count ? args.places[from + i]", "from + i <= args.count ? args.places[from + i]"),
        "address",
        ("embedding", "heap-buffer-overflow"),
    ),
    "a read past the end of a row": (
        ("cuda/embedding.cuh", "vectors && columns.has(E::numbers - 1)", "vectors && columns.has(0)"),
        None,
        ("embedding", "wrong: "),
    ),
    "a pair taken for whole at a window's end": (
        ("cuda/embedding.cuh", "if (pieces.open != open_throughout) {", "{"),
        None,
        ("embedding", "wrong: "),
    ),
    "pieces of a row left with another": (
        ("cuda/embedding.cuh", "own_row ? tail_sums : head_sums", "head_sums"),
        None,
        ("embedding", "wrong: "),
    ),
    "a slab that is not cleared": (
        ("cuda/embedding.cuh", "args.first_row - args.slab_rows >= *args.touched", "args.first_row >= *args.touched"),
        None,
        ("embedding", "wrong: "),
    ),
    "a row that nobody touched and nobody filled": (
        ("cuda/embedding.cuh", "at = touched * args.K + mine", "at = (touched + 1) * args.K + mine"),
        None,
        ("embedding", "wrong: "),
    ),
    "no wait for a copy": (
        ("cuda/product.cuh", "copy_async_wait<Tile::stages - 2>();", "copy_async_wait<Tile::stages>();"),
        None,
        ("regular", "wrong: "),
    ),
    "a wrong tile edge": (
        ("cuda/tile.cuh", "col_of(at) < K;", "col_of(at) + 1 < K;"),
        None,
        ("regular", "wrong: "),
    ),
    "a phase that does not expect its copies": (
        ("cuda/hopper.cuh", "barrier_expect(full, 4 * box_bytes);", "barrier_arrive(full);"),
        None,
        ("hopper", "wrong: "),
    ),
    "a box read from another row": (
        ("cuda/hopper.cuh", "further(a, at)", "further(a, at / 2)"),
        None,
        ("hopper", "wrong: "),
    ),
    "a stage released before it is read": (
        ("cuda/hopper.cuh", "products_wait<1>();", ""),
        "early",
        ("hopper", "wrong: "),
    ),
    "a stage that nobody releases": (
        ("cuda/hopper.cuh", "if (speaks) barrier_arrive(&shared.empty[ring.before()]);\n    }", "}"),
        None,
        ("hopper", "not every thread reaches"),
    ),
    "a part added twice": (
        ("cuda/hopper.cuh", "total.v[j] += part.v[j];", "total.v[j] += (p ? 1 : 2) * part.v[j];"),
        None,
        ("hopper", "wrong: "),
    ),
    "a direction in a stage that is in use": (
        ("cuda/hopper.cuh", "fold == Fold::sums && out.direction ? hopper_stages - 2 : hopper_stages", "hopper_stages"),
        None,
        ("hopper", "wrong: "),
    ),
    "the weight of another example": (
        ("cuda/hopper.cuh", "weighted ? out.weights[n] : 0", "weighted ? out.weights[n > run ? n - 1 : n] : 0"),
        None,
        ("hopper", "weighted: "),
    ),
    "magnitudes without the direction's sign": (
        ("cuda/hopper.cuh", "sign_of(u.v[j]) * size", "size"),
        None,
        ("hopper", "weighted, signed: "),
    ),
    "a weighted run that is added to nothing": (
        ("cuda/hopper.cuh", "const bool begins = run == from;", "const bool begins = weighted || run == from;"),
        None,
        ("hopper", "weighted: "),
    ),
    "a product with half of the direction": (
        ("cuda/hopper.cuh", "dot = of_warp(dot);", "dot = of_warp(my.warp < 4 ? dot : 0);"),
        None,
        ("hopper", ": dot of dot: "),
    ),
    "a norm of what is outside of the weight": (
        ("cuda/hopper.cuh", "if (!tile.whole()) {", "if (fold != Fold::scalars && !tile.whole()) {"),
        None,
        ("hopper", "norms of an infinite gradient"),
    ),
    "a barrier that some threads skip": (
        ("cuda/embedding.cuh", "__syncthreads();  // the numbers", "if (threadIdx.x) __syncthreads();  // the numbers"),
        None,
        ("embedding", "not every thread reaches"),
    ),
    "a row of lanes left out": (
        ("cuda/scale_bias.cuh", "for (int half = rows / 2; half > 0; half /= 2)", "for (int half = rows / 2; half > 1; half /= 2)"),
        None,
        ("rows", "wrong: "),
    ),
    "no barrier between the rows of lanes": (
        ("cuda/scale_bias.cuh", "    __syncthreads();\n    if (row < half)", "    if (row < half)"),
        "thread",
        ("rows", "data race"),
    ),
    "a position that two parts have": (
        (
            "cuda/scale_bias.cuh",
            "to = first + count * (blockIdx.y + 1) / gridDim.y;",
            "to = first + (count * (blockIdx.y + 1) + 1) / gridDim.y;",
        ),
        None,
        ("rows", "wrong: "),
    ),
    "a warp's partial added twice": (
        ("cuda/add_partials.cuh", "for (int w = 1; w < row_warps; ++w)", "for (int w = 0; w < row_warps; ++w)"),
        None,
        ("rows", "wrong: "),
    ),
    "a Gram that is not mirrored": (
        ("cuda/add_partials.cuh", "r > c ? c * x.side + r : at", "at"),
        None,
        ("rows", "wrong: "),
    ),
    "a warp's examples left out": (
        ("cuda/dense.cuh", "for (int l = 0; l < lanes; ++l)", "for (int l = 0; l + 1 < lanes; ++l)"),
        None,
        ("rows", "wrong: "),
    ),
    "scalars of another example": (
        ("cuda/dense.cuh", "const bool upper = lane & mask;", "const bool upper = !(lane & mask);"),
        None,
        ("rows", "wrong: "),
    ),
    "no barrier before sums are overwritten": (
        ("cuda/dense.cuh", "__syncthreads();  // before the next sums overwrite these", ""),
        "thread",
        ("rows", "data race"),
    ),
    "a read past the coordinates": (
        ("cuda/numbers.cuh", "if (from[i] && at < left)", "if (from[i])"),
        "address",
        ("rows", "heap-buffer-overflow"),
    ),
}


# The mistakes that `make test` plants, one for each of the checks' families: each takes a build of its own.
ALWAYS_PLANTED = ("a wrong tile edge", "a slab that is not cleared", "a box read from another row", "a Gram that is not mirrored")


@pytest.mark.parametrize(
    "name",
    [
        name if name in ALWAYS_PLANTED else pytest.param(name, marks=pytest.mark.slow("a build for each mistake"))
        for name in PLANTED
    ],
)
def test_a_planted_mistake_is_caught(name, built):
    plant, variant, (case, words) = PLANTED[name]
    sanitizer = variant if variant in ("address", "thread") else None
    done = run_checks(built(variant, plant), case, "short", sanitizer=sanitizer)
    assert done.returncode != 0, f"not caught: {done.stdout[-300:]}"
    assert words in done.stdout + done.stderr, (done.stdout + done.stderr)[-2000:]


def test_python_and_cpp_have_the_same_tiles(built):
    module = simt.load(built())
    assert module.tiles() == [tuple(tile) for tile in CUDA_TILES]
    for index, tile in enumerate(CUDA_TILES):
        for held in {1, 3, CUDA_SUMS_HELD, tile.slots}:
            for runs in (False, True):
                assert module.shared_bytes(index, held, runs) == tile.shared_bytes(held, runs)
        for gpu in GPUS.values():
            assert tile.shared_bytes(tile.slots, False) <= gpu.shared_bytes
            assert tile.shared_bytes(CUDA_SUMS_HELD, True) <= gpu.shared_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_call_gives_the_same_bits(dtype, emulated):
    x = Problem(70, 3, 41, 35, dtype=dtype).make()
    first, second = (zk.interference(x.a, x.b, direction=x.direction, gram=True, impl="cuda") for _ in range(2))
    for name, field in first._asdict().items():
        assert torch.equal(field, getattr(second, name)), name
    assert torch.equal(first.gram, first.gram.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gram", [False, True], ids=["sums", "gram"])
@pytest.mark.parametrize("along", [False, True], ids=["", "direction"])
def test_a_repeated_call_gives_the_bits_of_the_first(along, gram, dtype, emulated, monkeypatch):
    """With fresh operands, of odd sizes too, which are copied before they are read."""
    monkeypatch.setenv("ZSL_GPU_ARCH", "90")
    for N, T, K, O in ((3, 70, 136, 144), (2, 65, 135, 145)):
        draw = torch.Generator().manual_seed(N)
        first, second = (
            (torch.randn(N, T, K, generator=draw).to(dtype), torch.randn(N, T, O, generator=draw).to(dtype)) for _ in range(2)
        )
        u = torch.randn(O, K, generator=draw) if along else None
        plan = dispatch.plan_call("interference", *first, impl="cuda", gram=gram)
        plan = replace(plan, candidates=tuple(c for c in plan.candidates if c.way == "hopper"))
        run, ran = partial(_interference, plan, gram), []
        call = dispatch.CUDA.prepare_interference(plan, *first, u, partial(_noted, ran, run))
        for operands in (first, second, first):
            v = None if u is None else u.clone()
            assert_same_bits(call(*operands, v), run(*operands, v))
        assert len(ran) == 1  # the first, which was recorded


def _noted(ran, run, *operands):
    """As an op calls it: below autograd, where PyTorch's composite operations are not taken apart."""
    ran.append(operands)
    return call_cache.below_autograd(run)(*operands)


def _interference(plan, gram, a, b, u):
    return dispatch.CUDA.interference(plan, a, b, u, gram)


def assert_same_bits(found, want):
    assert type(found) is type(want)
    for x, y in zip(found, want, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x.shape == y.shape and x.is_contiguous() and torch.equal(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_repeated_calls_of_all_kinds_give_the_bits_of_the_first(arch, dtype, emulated, monkeypatch):
    """Of every op that is repeated so, whose later calls run no Python."""
    monkeypatch.setenv("ZSL_GPU_ARCH", str(arch))
    draw = torch.Generator().manual_seed(0)

    def randn(*shape, as_dtype=dtype):
        return torch.randn(*shape, generator=draw).to(as_dtype)

    N, T, K, O = 5, 33, 72, 40
    plan = dispatch.plan_call("interference", randn(N, T, K), randn(N, T, O), impl="cuda", gram=True)
    cuda = dispatch.CUDA
    calls = {
        "interference": (
            partial(_interference, plan, True),
            lambda: (randn(N, T, K), randn(N, T, O), randn(O, K, as_dtype=torch.float32)),
        ),
        "dense": (lambda g, u: cuda.dense_interference(g, u, True), lambda: (randn(N, 700), randn(700, as_dtype=torch.float32))),
        "dense, sums": (lambda g: cuda.dense_interference(g, None, False), lambda: (randn(N, 7, 30),)),
        "bias": (lambda b: cuda.scale_bias_grad(None, b, None, None, None, N, True), lambda: (randn(N, T, O),)),
        "norm": (
            lambda x, b, *moments: cuda.scale_bias_grad(x, b, *moments, None, N, True),
            lambda: (randn(N, T, K), randn(N, T, K), *(randn(N, T, as_dtype=torch.float32) for _ in range(2))),
        ),
    }
    calls["dense, copied"] = (lambda g: cuda.dense_interference(g.mT, None, True), lambda: (randn(N, 9, 30),))
    for name, (run, make) in calls.items():
        ran, kind = [], type(run(*make()))
        repeated = Repeated(partial(_noted, ran, run), getattr(kind, "_make", kind))
        for operands in (make(), make(), make()):
            assert_same_bits(repeated(*operands), run(*operands))
        assert len(ran) == (3 if name == "dense, copied" else 1), name  # reshape is a copy there


def test_what_a_call_was_not_recorded_for_goes_the_long_way(emulated, monkeypatch):
    monkeypatch.setenv("ZSL_GPU_ARCH", "90")
    N, T, K, O = 2, 16, 24, 32

    def operands(dtype=torch.bfloat16, offset=0):
        held = torch.zeros(offset + N * T * K, dtype=dtype)
        return held[offset:].view(N, T, K), torch.zeros(N, T, O, dtype=dtype)

    def after_a_first(a, b, u=None, gram=False):
        """A call after one of these operands, and whether it went the long way."""
        plan, ran = dispatch.plan_call("interference", a, b, impl="cuda", gram=gram), []
        repeated = dispatch.CUDA.prepare_interference(plan, a, b, u, partial(_noted, ran, partial(_interference, plan, gram)))
        repeated(a, b, u)
        ran.clear()

        def long(*operands):
            ran.clear()
            assert_same_bits(repeated(*operands), _interference(plan, gram, *operands))
            return bool(ran)

        return long

    a, b = operands()
    u = torch.zeros(O, K)
    long = after_a_first(a, b, u)
    assert not long(a, b, u)
    assert long(a, b, u.T.contiguous().T)
    assert long(a, b, u.half())
    assert long(operands(offset=1)[0], b, u)
    assert long(a.transpose(0, 1).contiguous().transpose(0, 1), b, u)
    assert long(torch._neg_view(a), b, u)
    assert not long(a, b, u)

    coarse, exact = after_a_first(a, b, gram=True), after_a_first(*operands(torch.float32))
    assert not coarse(a, b, None)
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = not before
    try:
        assert coarse(a, b, None)
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before
    assert not exact(*operands(torch.float32), None)
    monkeypatch.setattr(hopper, "exact", lambda: False)
    assert exact(*operands(torch.float32), None)

    # PyTorch's operations are not recorded, nor are slabs that come one after the other.
    for other in (u.half(), u.double()):  # is float32 before it is recorded
        assert not after_a_first(a, b, other)(a, b, other)
    assert after_a_first(a, b, torch._neg_view(u))(a, b, torch._neg_view(u))
    assert after_a_first(a[:0], b[:0])(a[:0], b[:0], None)
    monkeypatch.setattr(gpu_cost, "HOPPER_SLAB_BYTES", 1)
    wide = torch.zeros(N, T, 200, dtype=torch.bfloat16)
    assert after_a_first(wide, b, gram=True)(wide, b, None)


@pytest.mark.parametrize("arch", [80, 90])
def test_operands_that_share_memory_are_not_recorded(arch, emulated, monkeypatch):
    """One tensor twice, and two of one buffer: nothing says which of them an address is of. Later calls have other ones."""
    monkeypatch.setenv("ZSL_GPU_ARCH", str(arch))
    draw = torch.Generator().manual_seed(0)
    one, *others = (torch.randn(3, 16, 40, generator=draw) for _ in range(3))
    packed = torch.randn(3, 16, 80, generator=draw)
    apart = torch.cat([packed, packed], -1)
    plan = dispatch.plan_call("interference", one, one, impl="cuda")
    for first, second in (((one, one), others), (packed.chunk(2, -1), (apart[..., :40], apart[..., 80:120]))):
        run, ran = partial(_interference, plan, False), []
        repeated = dispatch.CUDA.prepare_interference(plan, *first, None, partial(_noted, ran, run))
        for operands in (first, second, second, others):
            assert_same_bits(repeated(*operands, None), run(*operands, None))
    assert len(ran) >= 3
    repeated = dispatch.CUDA.prepare_interference(plan, one, one, None, partial(_noted, ran, run))
    ran.clear()
    for operands in ((one, one), others, others, (one, one)):
        assert_same_bits(repeated(*operands, None), run(*operands, None))
    assert len(ran) == 2  # the first of all, and the first of two tensors, which was recorded


def test_what_a_repeated_call_keeps(emulated, monkeypatch):
    """The gradient holds no other result's memory, and the sums hold none of the workspace's."""
    monkeypatch.setenv("ZSL_GPU_ARCH", "90")
    a, b = torch.randn(3, 16, 136), torch.randn(3, 16, 144)
    plan = dispatch.plan_call("interference", a, b, impl="cuda", gram=True)
    call = dispatch.CUDA.prepare_interference(plan, a, b, None, partial(_interference, plan, True))
    call(a, b, None)
    found = call(a, b, None)
    held = {name: x.untyped_storage().nbytes() for name, x in found._asdict().items() if x is not None}
    size, grad = 4 * 136 * 144, found.grad_sum.untyped_storage()
    assert held["grad_sum"] == size
    assert held["abs_sum"] == held["sq_sum"] == 2 * size
    assert held["l1"] == held["gram"] < 4096
    assert [x.untyped_storage().data_ptr() == grad.data_ptr() for x in found if x is not None] == [True, *[False] * 5]


def test_every_architecture_gives_results_within_rounding(emulated, monkeypatch):
    """Their tiles and blocks differ, and so does the order of summation."""
    problem = Problem(12, 9, 130, 70)
    x = problem.make()
    for arch in GPUS:
        monkeypatch.setenv("ZSL_GPU_ARCH", str(arch))
        got = zk.interference(x.a, x.b, gram=True, impl="cuda")
        for name, e in expected(problem, "interference, gram").items():
            assert_within_budget(getattr(got, name), e, name)


def test_a_device_of_little_shared_memory_is_asked_for_no_more(emulated, monkeypatch):
    """Compute capability 8.6, 8.9 and 12.0: 99 KiB. Fewer examples are held, in more groups."""
    gpu, asked, launch = of_device(89, 128, 101376), [], persistent._launch

    def recorded(gpu, tile, N, M, gram, O, K):
        found = launch(gpu, tile, N, M, gram, O, K)
        asked.append(tile.shared_bytes(found.held, found.held < N and not gram))
        return found

    monkeypatch.setattr(persistent, "_launch", recorded)
    monkeypatch.setattr(dispatch, "gpu_of", lambda *_: gpu)
    for N in (4, 8, 33, 70):
        problem = Problem(N, 3, 41, 35)
        x, want = problem.make(), expected(problem, "interference, gram")
        for gram in (False, True):
            got = zk.interference(x.a, x.b, gram=gram, impl="cuda")
            for name, e in expected(problem, "interference, gram" if gram else "interference").items():
                assert_within_budget(getattr(got, name), e, name)
        cross = zk.gram(x.a, x.b, x.a[:3], x.b[:3], impl="cuda")
        first = replace(want["gram"], truth=want["gram"].truth[:, :3], scale=want["gram"].scale[:, :3])
        assert_within_budget(cross, first)
    assert max(asked) <= 101376


@pytest.mark.parametrize(
    ("built_with", "driver", "words"), [(13000, 12080, "CUDA 13.0, but the driver supports 12.8"), (12090, 12020, None)]
)
def test_a_driver_that_is_too_old_is_found_before_a_launch(built_with, driver, words):
    """The static runtime refuses every call then; a newer minor version is compatible."""
    built = SimpleNamespace(**dict.fromkeys(module._REQUIRED))
    built.versions = lambda: (built_with, driver)
    module.emulate(built)
    try:
        found = module.missing()
    finally:
        module.emulate(None)
    assert found is None if words is None else words in found


def test_a_build_of_other_sources_is_refused_by_what_it_lacks():
    built = SimpleNamespace(**dict.fromkeys(module._REQUIRED))
    built.versions = lambda: (13000, 13000)
    del built.dense
    module.emulate(built)
    try:
        assert "lacks dense: reinstall" in module.missing()
    finally:
        module.emulate(None)


def test_of_an_embeddings_direction_only_the_touched_rows_are_copied(emulated):
    """In float32 this one would be 64 GiB."""
    V, K = 2**31, 8
    row = torch.randn(1, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, b = torch.tensor([[5, V - 1], [7, 5]]), torch.ones(2, 2, K)
    got = zk.embedding_interference(ids, b, V, direction=row.expand(V, K), impl="cuda")
    torch.testing.assert_close(got.dot, row.float().sum().expand(2) * 2, rtol=1e-5, atol=1e-5)


class Waits(TorchDispatchMode):
    """The ops that a device would make the host wait for."""

    NAMES = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "repeat_interleave", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        to_cpu = name.startswith("_to_copy") and (kwargs or {}).get("device") is not None
        if to_cpu or name.startswith(self.NAMES) or (name.startswith("index") and any(_is_mask(x) for x in args)):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def _is_mask(x):
    return any(map(_is_mask, x)) if isinstance(x, list | tuple) else isinstance(x, torch.Tensor) and x.dtype == torch.bool


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_an_embedding_waits_once_at_most(ragged, gram, emulated, monkeypatch):
    """For the number of rows, and with max_rows for nothing. On a device everything else is a launch."""
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("tolist"))
    monkeypatch.setattr(embedding, "SLAB_BYTES", 1)
    ids, b, u = torch.arange(12).view(3, 4) % 7, torch.randn(3, 4, 9), torch.randn(7, 9)
    examples = torch.arange(12) % 3 if ragged else None
    if ragged:
        ids, b = ids.view(1, 12), b.view(1, 12, 9)
    for max_rows, want in ((None, ["_local_scalar_dense"]), (7, []), (9, [])):
        with Waits() as waits:
            dispatch.CUDA.embedding_interference(ids, b, examples, 3, 7, 2, u, gram, max_rows)
        assert waits.seen == want
    with Waits() as waits:  # what is looked for is found
        ids.nonzero()
        int(ids.sum())
    assert len(waits.seen) == 2


@pytest.mark.parametrize("max_rows", [None, 9, 14])
@pytest.mark.parametrize("slab_rows", [1, 2, 5])
def test_an_embeddings_gram_in_several_slabs(slab_rows, max_rows, emulated, monkeypatch):
    # Of 128 columns four rows at least, for the product; with five there is room for eight.
    monkeypatch.setattr(embedding, "SLAB_BYTES", 4 * 12 * 128 * slab_rows)
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(-1, 9, (12, 20), generator=generator)
    ids[:, ::3] = 7
    b, u = torch.randn(12, 20, 128, generator=generator), torch.randn(9, 128, generator=generator)

    def sums(x, impl, **options):
        found = zk.embedding_interference(ids, x["b"], 9, direction=x["u"], padding_idx=3, gram=True, impl=impl, **options)
        return {name: field for name, field in found._asdict().items() if name != "rows"}

    want = expectations(lambda x: sums(x, "reference"), {"b": b, "u": u}, error_budgets.embedding(12, 20, 128, 9, torch.float32))
    for name, field in sums({"b": b, "u": u}, "cuda", max_rows=max_rows).items():
        assert_within_budget(field[:8] if name.endswith("_sum") else field, want[name], name)


def test_ids_that_are_out_of_range_are_skipped_where_nobody_looks(emulated):
    """On a device, whose values the host does not read: nothing past the weight or the examples is touched."""
    ids, examples = torch.tensor([[0, 5, 2, 1, 2**62]]), torch.tensor([0, 1, 2, -1, 0])
    b, u = torch.ones(1, 5, 4), torch.ones(3, 4)
    sums = dispatch.CUDA.embedding_interference(ids, b, examples, 2, 3, -1, u, True)
    assert sums.rows.tolist() == [0]
    assert sums.l1.tolist() == [4, 0]
    assert sums.gram.tolist() == [[4, 0], [0, 0]]


def test_more_positions_than_the_kernels_count_are_refused(emulated):
    ids = torch.zeros(1, dtype=torch.int64).expand(2, 1 << 29)
    with pytest.raises(ValueError, match="fewer than 1073741824 positions"):
        dispatch.CUDA.embedding_interference(ids, torch.zeros(1, 1, 1).expand(2, 1 << 29, 1), None, 2, 3, -1, None, False)
    with pytest.raises(ValueError, match=r"num_embeddings: expected .* < 2\^63 for 4 examples, got"):
        dispatch.CUDA.embedding_interference(ids[:, :4], torch.zeros(2, 4, 1), None, 4, 1 << 61, -1, None, False)


def test_views_with_a_pending_negation_are_read_negated(emulated):
    z = torch.view_as_complex(torch.randn(3, 5, 7, 2, generator=torch.Generator().manual_seed(0)))
    a, b = z.conj().imag, torch.ones(3, 5, 4)
    assert a.is_neg()
    want = zk.interference(a.clone(), b, direction=torch.ones(4, 7), gram=True, impl="reference")
    got = zk.interference(a, b, direction=a.new_ones(4, 7), gram=True, impl="cuda")
    for name, field in got._asdict().items():
        torch.testing.assert_close(field, getattr(want, name), rtol=1e-5, atol=1e-4)


def test_a_gram_of_very_many_examples_has_a_kernel():
    """More pairs of groups than a grid's second dimension may have."""
    plan = zk.plan("gram", N=12000, T=1, K=1, O=1, device="cuda", arch=90, impl="cuda")
    launch = persistent._launch(GPUS[90], CUDA_TILES[-1], 12000, None, True, 1, 1)
    assert (plan.impl, launch.pairs, launch.blocks) == ("cuda", 70500, 1)


def test_a_grid_that_no_device_has_is_refused(built):
    """Of (pairs of groups, blocks) the second dimension is limited to 65535."""
    module, x = simt.load(built()), (0, 0, 0, 1)
    for blocks, pairs in ((65536, 1), (0, 1), (1, 0)):
        with pytest.raises(RuntimeError, match="gram_kernel: the grid"):
            module.cross_gram((0, blocks, pairs, 0), 0, (1, 1, 2, 1, True), x, x, 1, 1, x, x, 1, 1, 0)


def test_float32_products_are_float32_unless_torch_allows_tf32(emulated, monkeypatch):
    problem = Problem(3, 40, 33, 29)
    x, want = problem.make(), expected(problem, "interference")["grad_sum"]
    assert_within_budget(zk.interference(x.a, x.b, impl="cuda").grad_sum, want)
    monkeypatch.setattr(persistent, "exact", lambda: False)
    less = zk.interference(x.a, x.b, impl="cuda").grad_sum
    assert want.share(less) > 10
    assert (less - want.truth).abs().max() < 0.1


def launches(monkeypatch):
    """The names of the kernels that are called from now on."""
    module, called = row_ops.compiled(), []

    def recorded(name):
        def run(*arguments):
            called.append(name)
            return getattr(module, name)(*arguments)

        return run

    names = ("dense", "scale_bias", "slab_gram", "add_partials")
    monkeypatch.setattr(row_ops, "compiled", lambda: SimpleNamespace(**{name: recorded(name) for name in names}))
    return called


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_calls_of_row_kernels_are_one_launch_or_two(emulated, monkeypatch):
    """And of PyTorch's operations none that would be a launch on a device."""
    called = launches(monkeypatch)
    g, u = torch.randn(9, 6, 100), torch.randn(6, 100)
    x, y = torch.randn(3, 200, 40), torch.randn(3, 200)
    calls = {
        ("dense",): lambda: dispatch.CUDA.dense_interference(g[:, 0], u[0], False),
        ("dense", "add_partials"): lambda: dispatch.CUDA.dense_interference(g, u, False),
        ("dense", "slab_gram", "add_partials"): lambda: dispatch.CUDA.dense_interference(g, u, True),
        ("scale_bias", "add_partials"): lambda: dispatch.CUDA.scale_bias_grad(x, x, y, y, None, 3, True),
        ("scale_bias",): lambda: dispatch.CUDA.scale_bias_grad(x[:, :5], x[:, :5], y[:, :5], None, None, 3, False),
    }
    for names, call in calls.items():
        called.clear()
        with Operations() as operations:
            call()
        assert tuple(called) == names
        assert operations.called <= {"empty", "view", "_unsafe_view", "select", "slice", "alias"}, operations.called


def test_float64_is_refused_whichever_operand_has_it(emulated):
    x, wide = torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.float64)
    calls = (
        lambda: zk.dense_interference(wide, impl="cuda"),
        lambda: zk.bias_grad(wide, impl="cuda"),
        lambda: zk.scale_bias_grad(x, wide, impl="cuda"),
        lambda: zk.scale_bias_grad(wide, x, impl="cuda"),
        lambda: scale_bias_grad._call(wide, x, True, "cuda"),
    )
    for call in calls:
        with pytest.raises(TypeError, match="impl: 'cuda' expects float32, bfloat16 or float16, got float64"):
            call()


def test_row_kernels_with_a_pending_negation_are_read_negated(emulated):
    z = torch.view_as_complex(torch.randn(3, 5, 7, 2, generator=torch.Generator().manual_seed(0)))
    x = z.conj().imag
    assert x.is_neg()
    for impl in ("reference", "cuda"):
        sums = zk.dense_interference(x, direction=x[0], impl=impl)
        scale, bias = zk.scale_bias_grad(x, x, mean=x[..., 0], rstd=x[..., 1], impl=impl)
        found = (sums.grad_sum, sums.dot, scale, bias)
        if impl == "reference":
            want = found
    for got, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiles", [1, 4], ids="{} tiles".format)
@pytest.mark.parametrize("N", [3, 40])
def test_slabs_add_up(N, tiles, dtype, emulated, monkeypatch):
    """Six tiles, one after another, or four and then two; with 40 examples in two groups of 32."""
    monkeypatch.setenv("ZSL_GPU_ARCH", "90")
    # Whole waves of a device with two multiprocessors. A cross Gram has slabs of both sets.
    for used in (dispatch, cuda_backend):
        monkeypatch.setattr(used, "gpu_of", lambda *_: of_device(90, 2, GPUS[90].shared_bytes))
    problem = Problem(N, 5, 140, 300, M=2, dtype=dtype)
    itemsize = 2 if dtype == torch.bfloat16 else 4
    monkeypatch.setattr(gpu_cost, "HOPPER_SLAB_BYTES", tiles * N * gpu_cost.HOPPER_TILE**2 * itemsize)
    with ways_of_cuda("hopper"), error_budgets.computing_by(error_budgets.EMULATED_HOPPER):
        for call in ("interference, all", "gram", "cross gram"):
            for name, field in CALLS[call](problem.make(), "cuda").items():
                if field is not None:
                    assert_within_budget(field, expected(problem, call)[name], (call, name))


# dot, sq_norm and weighted_grad, which compute capability 9.0 alone has -----------------------------------------------------------

OF_HOPPER = ("dot", "sq_norm", "weighted_grad")


@pytest.fixture(params=[1, 2, 132], ids="{} multiprocessors".format)
def of_hopper(request, emulated, monkeypatch):
    """One multiprocessor gives every tile a block of its own. Two split the last of an odd number of tiles over the examples, and
    132 split each of a few."""
    gpu = of_device(90, request.param, GPUS[90].shared_bytes)
    for used in (dispatch, cuda_backend):
        monkeypatch.setattr(used, "gpu_of", lambda *_: gpu)


@pytest.mark.usefixtures("of_hopper")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(130, 2, 20, 12), (3, 70, 130, 257), (5, 3, 300, 100)], ids=str)
def test_whole_and_split_tiles_stay_in_the_error_budget(size, dtype):
    problem = Problem(*size, dtype=dtype)
    for call in OF_HOPPER:
        first, second = (CALLS[call](problem.make(), "cuda")[call] for _ in range(2))
        assert_within_budget(first, expected(problem, call)[call], call)
        assert torch.equal(first, second), call


@pytest.mark.usefixtures("of_hopper")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ragged_rows_in_whole_and_split_tiles_stay_in_the_error_budget(dtype):
    problem = Irregular((0, 70, 1, 64, 0, 130, 3), 20, 140, dtype=dtype, layout="sliced")
    for call in OF_HOPPER:
        assert_within_budget(IRREGULAR_CALLS[call](problem.make(), "cuda")[call], expected_irregular(problem, call)[call], call)


@pytest.mark.usefixtures("of_hopper")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(130, 2, 20, 12), (3, 70, 130, 257)], ids=str)
def test_the_derivative_along_the_direction_is_the_weighted_sum(size, dtype, monkeypatch):
    """Of dot and of abs_dot, whose own term has the direction's sign."""
    calls, run = [], hopper.weighted_grad

    def recorded(*arguments):
        calls.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(hopper, "weighted_grad", recorded)
    problem, call = Problem(*size, dtype=dtype), "interference, direction"
    for fields in (("dot",), ("abs_dot",), ("dot", "abs_dot")):
        got = gradients(call, problem.make(), "cuda", cotangents(problem, call, fields), ("direction",))
        assert_within_budget(got["direction"], expected_gradients(problem, call, fields)["direction"], fields)
    assert len(calls) == 3


@pytest.mark.parametrize("call", OF_HOPPER)
def test_three_products_are_float32s_where_torch_allows_tf32(call, emulated, monkeypatch):
    """Of six that a product of float32 takes. Those left out are 2⁻¹⁶ of it."""
    monkeypatch.setenv("ZSL_GPU_ARCH", "90")
    problem = Problem(3, 70, 33, 29)
    x, want = problem.make(), expected(problem, call)[call]
    exact = CALLS[call](x, "cuda")[call]
    assert_within_budget(exact, want)
    monkeypatch.setattr(hopper, "exact", lambda: False)
    less = CALLS[call](x, "cuda")[call]
    assert (less - want.truth).abs().median() > 8 * (exact - want.truth).abs().median()
    assert ((less - want.truth).abs() < 2**-14 * want.scale).all()


def test_weights_and_directions_may_lie_anywhere(emulated, monkeypatch):
    monkeypatch.setenv("ZSL_GPU_ARCH", "90")
    x = Problem(5, 7, 33, 13, dtype=torch.bfloat16, values="integers").make()
    spread, one = torch.zeros(5, 2, dtype=torch.float64), torch.ones(()).expand(5)
    spread[:, 1] = x.weights
    for weights in (spread[:, 1], one, x.weights.float()._neg_view()):
        want = zk.weighted_grad(x.a, x.b, weights.clone(), impl="reference")
        assert torch.equal(zk.weighted_grad(x.a, x.b, weights, impl="cuda"), want)
    for u in (x.direction.T.contiguous().T, x.direction.float()._neg_view(), x.direction[:1].expand(13, -1).double()):
        assert torch.equal(zk.dot(x.a, x.b, u, impl="cuda"), zk.dot(x.a, x.b, u.clone(), impl="reference"))


# Uses of weights under a probe ---------------------------------------------------------------------------------------------------


class _Model(torch.nn.Module):
    """A matrix, a transposed one and a head, all with biases, and a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = torch.nn.Linear(24, 16), torch.nn.LayerNorm(16), torch.nn.Linear(40, 8)
        self.weight, self.bias = torch.nn.Parameter(torch.randn(16, 40) / 4), torch.nn.Parameter(torch.randn(40))

    def forward(self, x):
        h = self.norm(self.first(x))
        h = torch.addmm(self.bias, h.reshape(-1, 16), self.weight).view(*h.shape[:-1], 40)
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("gram", [False, True], ids=["", "gram"])
@pytest.mark.parametrize("along", [False, True], ids=["", "direction"])
def test_a_probed_step_repeats_recorded_calls(along, gram, autocast, emulated, monkeypatch):
    """As on a device: after the pass that records them no rule's Python runs in a backward pass. Results are those of the CPU."""
    monkeypatch.setenv("ZSL_GPU_ARCH", "90")
    torch.manual_seed(0)
    model, x = _Model(), torch.randn(4, 10, 24)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()} if along else None
    ran = []
    for rule, name in ((linear, "_backward"), (norm, "layer_norm_backward")):
        function = getattr(rule, name)
        monkeypatch.setattr(rule, name, lambda *x, function=function: ran.append(function) or function(*x))
    monkeypatch.setitem(
        rules.KNOWN,
        torch.nn.functional.layer_norm,
        rules.KNOWN[torch.nn.functional.layer_norm]._replace(backward=norm.layer_norm_backward),
    )

    def measured(probe):
        model.zero_grad()
        ran.clear()
        with probe, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = model(x).float().square().flatten(1).mean(1)
            losses.sum().backward()
        return probe.report()

    expected_report = measured(zerosum.Probe(model, gram=gram, direction=direction))
    expected_report = {name: expected_report[name] for name in expected_report}
    monkeypatch.setattr(recorded, "IMPL", "cuda")
    made, record = [], recorded._record
    monkeypatch.setattr(recorded, "_record", lambda *x: made.append(record(*x)) or made[-1])
    probe = zerosum.Probe(model, gram=gram, direction=direction)
    for _ in range(3):
        measured(probe)
    if not autocast:  # where a norm of the CPU has a rule; otherwise it has a way of its own there, and is recorded by hand
        call = next(c for c in probe._structures.calls.values() if c.func is torch.nn.functional.layer_norm)
        wanted = [(None if direction is None else direction[f"norm.{name}"], gram) for name in ("weight", "bias")]
        x_and_b, moments = torch.randn(2, 4, 10, 16), torch.rand(2, 4, 10)
        call.short.native.record(4, None, recorded.of_norm(*x_and_b, *moments, *wanted))
    found = measured(probe)
    assert not ran
    assert sum(x is not None for x in made) == (6 if autocast else 7)  # products and their biases, three of each, and the norm
    rtol = 2e-2 if autocast else 1e-5
    for name, want in expected_report.items():
        for field in ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm", "dot", "abs_dot", "gram"):
            got, wanted = getattr(found[name], field), getattr(want, field)
            assert (got is None) == (wanted is None)
            assert got is None or (got - wanted).norm() <= rtol * max(wanted.norm(), 1e-3), (name, field)
        assert torch.equal(found[name].grad_sum, dict(model.named_parameters())[name].grad)
