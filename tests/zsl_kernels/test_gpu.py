"""What only a device can show: streams, graphs, no waiting, bounded memory. Accuracy is that of the other files, whose ``impl``
fixture goes over the device's implementations too. ``pytest -m gpu`` runs all of them."""

import pytest
import torch

import zsl_kernels as zk
from tests.devices import waiting_is_an_error
from tests.inputs import CALLS as OPS
from tests.inputs import DTYPES, Problem, assert_within_budget, expected
from zsl_kernels.planning.gpu_cost import SLAB_BYTES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device that torch can use"),
]
HALF = torch.bfloat16


def make(N=8, T=64, K=256, O=192, dtype=HALF):
    x = Problem(N, T, K, O, dtype=dtype).make()
    return x.a.cuda(), x.b.cuda(), x.direction.cuda()


# With and without a direction and the Gram.
CALLS = {
    "sums": lambda a, b, u, impl: zk.interference(a, b, impl=impl),
    "direction": lambda a, b, u, impl: zk.interference(a, b, direction=u, impl=impl),
    "gram of sums": lambda a, b, u, impl: zk.interference(a, b, direction=u, gram=True, impl=impl),
    "gram": lambda a, b, u, impl: (zk.gram(a, b, impl=impl),),
}
# What the kernels of compute capability 9.0 do, and elsewhere PyTorch or an implementation among others.
OTHERS = {
    "sq_norm": lambda a, b, u, impl: (zk.sq_norm(a, b, impl=impl),),
    "dot": lambda a, b, u, impl: (zk.dot(a, b, u, impl=impl),),
    "weighted_grad": lambda a, b, u, impl: (zk.weighted_grad(a, b, u[: len(a), 0], impl=impl),),
    "weighted, signed": lambda a, b, u, impl: (torch.ops.zsl.weighted_grad(a, b, u[: len(a), 0], u[0, : len(a)], u, impl),),
}
IMPLS = ("auto", "triton", "cuda")
WAYS = [(call, impl) for call in CALLS for impl in IMPLS] + [(call, "auto") for call in OTHERS]
CALLS |= OTHERS
each_way = pytest.mark.parametrize(("call", "impl"), WAYS)
each_impl = pytest.mark.parametrize("impl", IMPLS)


def fields(results):
    return [x for x in results if x is not None]


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_the_kernels_are_live(name):
    assert zk.build_info()[name] == "live"


@each_way
def test_a_graph_replays_it(call, impl):
    a, b, u = make()
    expected = fields(CALLS[call](a, b, u, impl))  # compiles, outside of the capture
    x, y = torch.zeros_like(a), torch.zeros_like(b)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        CALLS[call](x, y, u, impl)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = fields(CALLS[call](x, y, u, impl))
    x.copy_(a)
    y.copy_(b)
    graph.replay()
    for found, want in zip(results, expected, strict=True):
        assert torch.equal(found, want)


@each_way
def test_runs_on_the_current_stream(call, impl):
    """What is written on that stream just before is read; on another it would not have been written yet."""
    a, b, u = make()
    expected = fields(CALLS[call](a, b, u, impl))
    late_a, late_b = torch.full_like(a, float("nan")), torch.full_like(b, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_a.copy_(a)
        late_b.copy_(b)
        results = fields(CALLS[call](late_a, late_b, u, impl))
    stream.synchronize()
    for found, want in zip(results, expected, strict=True):
        assert torch.equal(found, want)


@each_way
def test_never_waits_for_the_device(call, impl):
    a, b, u = make()
    CALLS[call](a, b, u, impl)
    with waiting_is_an_error():
        CALLS[call](a, b, u, impl)


def lookups(dtype=HALF, frequent=False, N=8, T=300, K=264, V=90):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, V, (N, T), generator=generator)
    if frequent:
        ids[:, ::8] = ids[:, 1::4] = 5
    b, u = torch.randn(N, T, K, generator=generator).to(dtype), torch.randn(V, K, generator=generator)
    return ids.cuda(), b.cuda(), u.cuda()


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_an_embedding_with_max_rows_never_waits_and_a_graph_replays_it(ragged, gram):
    ids, b, u = lookups()
    if ragged:
        ids, b = ids.flatten(), b.flatten(0, 1)
    options = {"example_ids": torch.arange(2400).cuda() % 8, "num_examples": 8} if ragged else {}

    def call(ids, b, **more):
        return zk.embedding_interference(ids, b, 90, padding_idx=2, direction=u, gram=gram, **options, **more)

    want = call(ids, b)
    call(ids, b, max_rows=100)
    with waiting_is_an_error():
        call(ids, b, max_rows=100)
    x, y = torch.zeros_like(ids), torch.zeros_like(b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = call(x, y, max_rows=100)
    x.copy_(ids)
    y.copy_(b)
    graph.replay()
    U = want.rows.shape[0]
    assert (sums.rows[U:] == -1).all()
    for name, field in sums._asdict().items():
        if field is not None:
            field = field[:U] if name == "rows" or name.endswith("_sum") else field
            torch.testing.assert_close(field, getattr(want, name), rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("frequent", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_an_embedding_is_bitwise_repeatable(dtype, frequent):
    ids, b, u = lookups(dtype, frequent)
    first, second = (fields(zk.embedding_interference(ids, b, 90, direction=u, gram=True)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@each_impl
def test_runs_on_the_operands_device(impl):
    problem = Problem(8, 64, 256, 192, dtype=HALF)
    x = problem.make()
    there = x.replace(**{name: tensor.to("cuda:1") for name, tensor in x.tensors().items()})
    with torch.cuda.device(0):
        found = OPS["interference, all"](there, impl)
    for name, want in expected(problem, "interference, all").items():
        assert found[name].device == there.a.device
        assert_within_budget(found[name].cpu(), want, name)


@each_way
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_is_bitwise_repeatable(dtype, call, impl):
    a, b, u = make(dtype=dtype)
    first, second = (fields(CALLS[call](a, b, u, impl)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def peak(N):
    a, b, u = make(N=N, K=512, O=512)
    zk.interference(a, b, direction=u)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    zk.interference(a, b, direction=u)
    return torch.cuda.max_memory_allocated() - before


def test_memory_does_not_grow_with_the_examples():
    """But for what is bounded: totals of a few parts of the examples, or a slab of their gradients."""
    few, many = peak(8), peak(128)
    assert many - few <= SLAB_BYTES, (few, many)  # the gradients of 120 more examples are 126 MB


def test_the_choice_is_what_the_plan_prints():
    a, b, _ = make()
    N, T, K, O = 8, 64, 256, 192
    plan = zk.plan("interference", N=N, T=T, K=K, O=O, dtype=HALF, device="cuda")
    assert plan.impl in ("triton", "cuda")
    assert torch.equal(zk.interference(a, b).abs_sum, zk.interference(a, b, impl=plan.impl).abs_sum)
