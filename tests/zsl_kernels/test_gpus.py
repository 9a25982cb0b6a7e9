"""The cost model of GPUs: its candidates are legal, its choice is the fastest of them, and its predictions behave like times."""

import dataclasses
import warnings
from types import FunctionType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zsl_kernels as zk
from tests.devices import FUNCTIONS, waiting_is_an_error
from zsl_kernels.backends import dispatch
from zsl_kernels.backends.cuda import module as cuda_module
from zsl_kernels.backends.gpu import gpu_of
from zsl_kernels.planning import gpu_cost
from zsl_kernels.planning.call import Call
from zsl_kernels.planning.choose import OPS, choose
from zsl_kernels.planning.devices import A100, GPUS, H100, nearest
from zsl_kernels.planning.tiles import CONFIGS, CUDA_SUMS_HELD, CUDA_TILES, Config, kind

ALL = ("triton", "cuda", "chunked")
HALF = torch.bfloat16
DTYPES = ("float32", "bfloat16", "float16")


def call(op, N=8, T=1024, K=768, O=768, M=None, gram=False, irregular=False, dtype="bfloat16", gpu=H100):
    return Call(op, N, T, K, O, M, gram, 4, 2, irregular, dtype, gpu)


sizes = st.one_of(st.integers(0, 70), st.integers(0, 5000))
calls = st.builds(
    call,
    st.sampled_from((*OPS, "interference_backward")),
    N=st.one_of(st.integers(0, 66), st.integers(0, 3000)),
    T=st.one_of(st.just(1), sizes),
    K=sizes,
    O=sizes,
    gram=st.booleans(),
    irregular=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    gpu=st.sampled_from(list(GPUS.values())),
)


@settings(max_examples=1500)
@given(calls, st.sampled_from([ALL, ("triton", "chunked"), ("cuda", "chunked"), ("chunked",)]))
def test_the_fastest_of_legal_candidates_is_chosen(call, impls):
    plan = choose(call, impls)
    assert plan.chosen.time == min(c.time for c in plan.candidates)
    assert {c.impl for c in plan.candidates} <= set(impls)
    assert choose(call, ("chunked",)).candidates  # PyTorch can compute everything
    for c in plan.candidates:
        assert c.time > 0
        assert min(c.work, c.bytes, c.l2_bytes, c.workspace) >= 0
        assert 1 <= c.splits <= max(1, call.formed)
        assert c.way != "direct" or not call.pairs or c.impl == "cuda" or call.op == "interference_backward"
        assert not call.irregular or c.way not in ("ghost", "rank-one")
        if c.impl == "triton":
            assert c.config in CONFIGS[call.gpu.arch][c.kernel][kind(call.dtype)]
            assert c.tile == c.config[:2]
        if c.way == "hopper":
            assert call.gpu.arch == 90
        elif c.impl == "cuda":
            (tile,) = (tile for tile in CUDA_TILES if c.tile == (tile.rows, tile.cols))
            held = tile.groups(call.N, call.M, tile.fitting(call.gpu.shared_bytes))[0] if call.pairs else CUDA_SUMS_HELD
            assert tile.shared_bytes(held, not call.pairs) <= call.gpu.shared_bytes
    _, *lines = str(plan).splitlines()
    assert len(lines) == len({(c.impl, c.way, c.kernel, c.config or c.tile) for c in plan.candidates})
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("op", OPS)
def test_each_way_of_an_op_has_one_owner(op, gpu):
    for gram in (False, True)[: 2 if op == "interference" else 1]:
        for T in (1, 8, 512):
            candidates = choose(call(op, N=16, T=T, gram=gram, gpu=gpu), ALL).candidates
            assert len({(c.way, c.impl) for c in candidates}) == len({c.way for c in candidates})
    sums = choose(call("interference", N=16, T=512, gpu=gpu), ALL).candidates
    assert {c.impl for c in sums if c.way == "direct"} == {"triton"}
    grams = choose(call("interference", N=16, T=512, gram=True, gpu=gpu), ALL).candidates
    assert {c.impl for c in grams if c.way == "direct"} == {"cuda"}


def _same(plan, candidate):
    found = [c for c in plan.candidates if all(getattr(c, k) == getattr(candidate, k) for k in ("impl", "way", "config", "splits"))]
    return found[0] if found else None


@settings(max_examples=500)
@given(calls.filter(lambda call: not call.gram and call.op != "interference_backward"), st.sampled_from("NTKO"))
def test_more_takes_no_less_time_in_the_same_way(call, letter):
    larger = dataclasses.replace(call, **{letter: getattr(call, letter) + 1 + getattr(call, letter) // 3})
    for c in choose(call, ALL).candidates:
        other = _same(choose(larger, ALL), c)
        if other is not None and c.way in ("direct", "matmul"):
            assert other.time >= c.time * (1 - 1e-12), (c, other)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_fill_the_device_and_no_more(gpu, dtype):
    found = [
        c
        for c in choose(call("interference", N=64, K=256, O=256, dtype=dtype, gpu=gpu), ("triton",)).candidates
        if c.way == "direct"
    ]
    assert {c.splits for c in found} > {1}
    for c in found:
        rows, cols = c.tile
        assert c.splits == 1 or -(-256 // rows) * -(-256 // cols) * c.splits // 2 < gpu.sms * 32
    large = choose(call("interference", N=64, K=8192, O=8192, dtype=dtype, gpu=gpu), ("triton",))
    assert {c.splits for c in large.candidates if c.way == "direct"} == {1}


@pytest.mark.parametrize(
    ("sizes", "tiles"),
    [
        ({"N": 8}, {(64, 64), (64, 32), (32, 32), (32, 16)}),
        ({"N": 16}, {(64, 32), (32, 32), (32, 16)}),
        ({"N": 32}, {(32, 32), (32, 16)}),
        ({"N": 64}, {(32, 16)}),
        ({"N": 65}, {(32, 16)}),  # in groups
    ],
    ids=str,
)
def test_tiles_of_all_examples_fit_in_shared_memory(sizes, tiles):
    for gram in ({"op": "gram"}, {"op": "interference", "gram": True}):
        plan = choose(call(**gram, **sizes), ALL)
        assert {c.tile for c in plan.candidates if c.impl == "cuda" and c.way == "direct"} == tiles
    ways = [c.way for c in choose(call("interference", **sizes), ("cuda",)).candidates]
    assert sorted(ways) == ["direct"] * len(CUDA_TILES) + ["hopper"]


def test_tiles_that_do_not_fit_are_no_candidates():
    small = dataclasses.replace(H100, shared_bytes=CUDA_TILES[-1].shared_bytes(8, False))
    found = {c.tile for c in choose(call("gram", N=8, gpu=small), ALL).candidates if c.impl == "cuda"}
    assert found
    assert found < {(tile.rows, tile.cols) for tile in CUDA_TILES}


def test_kernels_that_were_not_built_are_no_candidates():
    """nvcc 11 knows compute capability 9.0 without its own instructions."""
    old = dataclasses.replace(H100, boxes=False)
    assert {c.way for c in choose(call("gram", N=8, gpu=old), ("cuda",)).candidates} == {"direct"}
    for module, boxes in ((SimpleNamespace(hopper=None), True), (SimpleNamespace(), False)):
        cuda_module.emulate(module)
        try:
            assert cuda_module.has_boxes() == boxes
        finally:
            cuda_module.emulate(None)


def test_a_program_alone_waits_for_each_tiles_operands():
    plan = choose(call("interference", N=64, T=16, K=32, O=32), ("triton",))
    for c in plan.candidates:
        if c.way == "direct":
            assert c.time > 64 / c.splits * gpu_cost.FILL


def test_slabs_are_bounded_and_of_whole_tiles():
    for N, O, K, rows in [(8, 768, 768, 64), (32, 4096, 4096, 128), (2000, 4096, 4096, 64), (1, 10, 10, 64)]:
        config = Config(rows, 64, 32, 4, 3)
        height, width = gpu_cost.slab_of(N, O, K, config)
        assert (height % rows, width % 64) == (0, 0)
        assert (height, width) == (rows, 64) or 4 * N * height * width <= gpu_cost.SLAB_BYTES


def test_the_backward_pass_is_predicted_with_the_workspace_that_it_takes():
    (found,) = choose(call("interference_backward", N=32, K=2048, O=2048), ("triton",)).candidates
    assert found.workspace == gpu_cost.BACKWARD_BYTES


def test_a_faster_device_is_predicted_to_be_faster():
    # (By the same kernels: one of them is of compute capability 9.0 alone.)
    times = [choose(call("interference", N=32, K=2048, O=2048, gpu=gpu), ("triton",)).chosen.time for gpu in GPUS.values()]
    assert times == sorted(times, reverse=True)
    times = [gpu_cost.plain_product(gpu, 32, 1024, 2048, 2048, "bfloat16").device for gpu in GPUS.values()]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_predicted_to_beat_the_device(gpu, dtype):
    peak = gpu.half_flops if dtype != "float32" else gpu.tf32_flops
    for sizes in ({}, {"K": 64}, {"N": 1, "T": 16}, {"N": 64, "K": 4096, "O": 4096}):
        plan = choose(call("interference", dtype=dtype, gpu=gpu, **sizes), ALL)
        for c in plan.candidates:
            assert c.time > plan.call.product / peak
            assert c.time > (plan.call.operand_bytes + plan.call.result_bytes) / gpu.bandwidth


def test_plans_for_a_named_architecture_need_no_device():
    plan = zk.plan("interference", N=8, T=1024, K=768, O=768, gram=True, dtype=torch.bfloat16, device="cuda", arch=90)
    assert {"cuda", "triton", "chunked"} == {c.impl for c in plan.candidates}
    for word in ("H100", "GFLOP", "MB", "ms", "tile", "warps", "->"):
        assert word in str(plan), word
    assert max(map(len, str(plan).splitlines())) <= 130


@pytest.mark.parametrize(
    ("op", "dtype", "impl"), [("dot", torch.float64, "auto"), ("gram", torch.float64, "auto"), ("gram", HALF, "chunked")]
)
def test_what_pytorch_owns_is_predicted_for_the_device_too(op, dtype, impl):
    plan = zk.plan(op, N=8, T=64, K=768, O=768, dtype=dtype, device="cuda", arch=90, impl=impl)
    assert plan.impl == "chunked"
    assert plan.call.gpu is H100


@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("op", "elsewhere"), [("dot", {"chunked"}), ("weighted_grad", {"chunked"}), ("sq_norm", {"triton", "chunked"})]
)
def test_kernels_of_one_architecture_are_candidates_there_alone(op, elsewhere, dtype):
    for arch in GPUS:
        sizes = {"N": 8, "T": 4096, "K": 2048, "O": 2048, "dtype": dtype, "device": "cuda", "arch": arch}
        plan = zk.plan(op, **sizes)
        if arch == 90:
            assert plan.way == "hopper"
            assert {c.impl for c in plan.candidates} == elsewhere | {"cuda"}
            assert zk.plan(op, **sizes, impl="cuda", irregular=True).way == "hopper"
        else:
            assert {c.impl for c in plan.candidates} == elsewhere
            with pytest.raises(ValueError, match=f"one with a kernel for {op}"):
                zk.plan(op, **sizes, impl="cuda")


@pytest.mark.parametrize("op", ["dot", "weighted_grad"])
def test_pytorchs_products_are_predicted_in_float32_whatever_the_operands_are(op):
    half, single = (choose(call(op, dtype=dtype), ("chunked",)).chosen for dtype in ("bfloat16", "float32"))
    assert half.time > half.work / gpu_cost.library_rate(H100, "float32")
    assert half.workspace - single.workspace == 4 * 8 * 1024 * (768 + 768)  # the widened operands


def test_ragged_rows_of_many_lengths_have_few_plans():
    def planned(T, irregular):
        return zk.plan("interference", N=8, T=T, K=768, O=768, device="cuda", arch=90, irregular=irregular).call.T

    assert [planned(T, True) for T in (0, 1, 15, 16, 17, 255, 257)] == [0, 1, 15, 16, 18, 256, 288]
    assert len({planned(T, True) for T in range(1, 4097)}) < 90
    assert planned(257, False) == 257


def test_an_unknown_architecture_is_planned_as_the_newest_that_it_can_run():
    assert [nearest(arch).arch for arch in (75, 80, 89, 90, 100, 120)] == [80, 80, 80, 90, 100, 80]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("sizes", [(8, 64, 512, 512), (128, 64, 512, 512), (4, 2048, 4096, 4096)], ids=str)
def test_the_workspace_that_is_chosen_is_bounded(gpu, sizes):
    """What the memory test of a device (test_gpu.py) allows."""
    N, T, K, O = sizes
    assert choose(call("interference", N=N, T=T, K=K, O=O, gpu=gpu), ALL).chosen.workspace <= gpu_cost.SLAB_BYTES


def test_the_mode_of_a_device_test_survives_torch_s_warning(monkeypatch):
    """torch warns when the mode is first set, and warnings are errors here: the mode would stay for all tests that follow."""
    modes = []

    def set_mode(mode):
        modes.append(mode)
        if len(modes) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with waiting_is_an_error():
        assert modes == ["error"]
    assert modes == ["error", "default"]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_a_slab_of_very_many_examples_is_neither_held_for_sums_nor_taken_to_be_cached(gpu):
    plan = choose(call("interference", N=100_000, T=16, gpu=gpu), ALL)
    assert "stored" not in {c.way for c in plan.candidates}
    for c in choose(call("gram", N=20_000, T=16, gpu=gpu), ALL).candidates:
        if c.way == "stored":
            assert c.bytes > 2 * 4 * plan.call.O * plan.call.K * 20_000


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_widens_the_operands_pays_for_it(gpu, dtype):
    for op in ("interference", "sq_norm"):
        one = call(op, N=100_000, T=1, dtype=dtype, gpu=gpu)
        widened = 8.0 * one.N * (one.O + one.K)
        ways = [c for c in choose(one, ALL).candidates if c.way == "rank-one"]
        assert ways
        for c in ways:
            assert c.workspace >= widened
            assert c.time > 2 * widened / gpu.bandwidth


def test_every_public_function_is_run_on_a_device_by_its_tests():
    """One that is not is handed CPU tensors and the name of a GPU's backend, which refuses them."""
    functions = {name for name in zk.__all__ if isinstance(getattr(zk, name), FunctionType)}
    assert set(FUNCTIONS) == functions - {"build_info", "plan"}


class Device:
    """In place of torch.cuda, a device of compute capability ``major``.``minor``."""

    def __init__(self, monkeypatch, major, minor, sms=82, shared=102400):
        about = SimpleNamespace(
            name="Name", major=major, minor=minor, multi_processor_count=sms, shared_memory_per_multiprocessor=shared
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
        for backend in (dispatch.TRITON, dispatch.CUDA):
            monkeypatch.setattr(backend, "_loaded", True)
            monkeypatch.setattr(backend, "_missing", None)
            monkeypatch.setattr(backend, "_live", set())


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0)], ids=str)
def test_a_device_is_planned_with_the_shared_memory_that_it_has(capability, monkeypatch):
    """Those of the same generation as a larger part have less: a block that asks for more would not be launched."""
    Device(monkeypatch, *capability)
    gpu = gpu_of(torch.device("cuda"))
    assert (gpu.sms, gpu.shared_bytes) == (82, 101376)
    assert gpu.half_flops / gpu.sms == pytest.approx(A100.half_flops / A100.sms)
    for N, M, gram in ((1, None, True), (8, None, False), (8, None, True), (64, None, True), (300, None, True), (5, 90, True)):
        op = "interference" if M is None else "gram"
        asked = {"M": M} if M else {"gram": gram}
        found = zk.plan(op, N=N, T=64, K=256, O=256, **asked, device="cuda", impl="cuda").candidates
        for c in found:
            (tile,) = (tile for tile in CUDA_TILES if c.tile == (tile.rows, tile.cols))
            held = tile.groups(N, M, tile.fitting(gpu.shared_bytes))[0] if gram else CUDA_SUMS_HELD
            assert tile.shared_bytes(held, not gram) <= 101376


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_tensors_of_the_cpu_and_what_has_no_kernel_are_refused_by_name(impl, monkeypatch):
    Device(monkeypatch, 9, 0)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ValueError, match=f"impl: '{impl}' expects CUDA tensors, got tensors on cpu"):
        dispatch.impls_for(cpu, impl, "interference", torch.float32)
    with pytest.raises(ValueError, match=f"impl: '{impl}' has no kernel for weighted_grad"):
        dispatch.impls_for(cuda, impl, "weighted_grad", torch.float32)
    with pytest.raises(TypeError, match=f"impl: '{impl}' expects float32, bfloat16 or float16, got float64"):
        dispatch.impls_for(cuda, impl, "interference", torch.float64)


@pytest.mark.parametrize(
    ("capability", "shared", "module", "there"),
    [
        ((9, 0), 233472, SimpleNamespace(hopper=None), True),
        ((9, 0), 233472, SimpleNamespace(), False),  # built by an older nvcc
        ((9, 0), 102400, SimpleNamespace(hopper=None), False),
        ((8, 0), 167936, SimpleNamespace(hopper=None), False),
        ((10, 0), 233472, SimpleNamespace(hopper=None), False),
    ],
    ids=str,
)
def test_kernels_of_one_architecture_are_refused_by_name_elsewhere(capability, shared, module, there, monkeypatch):
    Device(monkeypatch, *capability, sms=132, shared=shared)
    device = torch.device("cuda")
    cuda_module.emulate(module)
    try:
        for op, owners in (("dot", ()), ("weighted_grad", ()), ("sq_norm", ("triton",))):
            live = (*owners, *(("cuda",) if there else ()), "chunked")
            assert dispatch.impls_for(device, "auto", op, HALF) == live
            assert dispatch.derivative_impl("cuda", op, device) == ("cuda" if there else "auto")
            if there:
                assert dispatch.impls_for(device, "cuda", op, HALF) == ("cuda",)
            else:
                with pytest.raises(ValueError, match=f"impl: 'cuda' has no kernel for {op} on this device: .* 9.0"):
                    dispatch.impls_for(device, "cuda", op, HALF)
        assert dispatch.impls_for(device, "cuda", "interference", HALF) == ("cuda",)
    finally:
        cuda_module.emulate(None)


def test_a_device_without_the_matrix_instructions_is_refused_by_name_and_not_chosen(monkeypatch):
    Device(monkeypatch, 7, 5)
    device = torch.device("cuda")
    assert dispatch.impls_for(device, "auto", "interference", torch.float32) == ("chunked",)
    for impl in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match=f"impl: '{impl}' is not available: Name has compute capability 7.5; .* 8.0"):
            dispatch.impls_for(device, impl, "interference", torch.float32)
        assert "7.5" in zk.build_info()[impl]
    Device(monkeypatch, 8, 0)
    assert dispatch.impls_for(device, "auto", "interference", torch.float32) == ("triton", "cuda", "chunked")
