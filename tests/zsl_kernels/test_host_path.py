"""Calls like an earlier one (zsl_kernels/call_cache.py): the same results, and the long way wherever it must be."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import zsl_kernels as zk
from tests.inputs import running
from zsl_kernels import call_cache

N, T, K, O, V = 3, 5, 7, 6, 11


def operands(dtype=torch.float32, N=N):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "a": draw(N, T, K),
        "b": draw(N, T, O),
        "x": draw(N, T, O),
        "mean": draw(N, T, 1),
        "rstd": draw(N, T),
        "u": draw(O, K),
        "g": draw(N, O, K),
        "table": draw(V, O),
        "ids": torch.randint(-1, V, (N, T), generator=generator),
    }


CALLS = {
    "interference": lambda x, **o: zk.interference(x["a"], x["b"], **o),
    "interference, all": lambda x, **o: zk.interference(x["a"], x["b"], direction=x["u"], gram=True, **o),
    "dense": lambda x, **o: zk.dense_interference(x["g"], **o),
    "dense, all": lambda x, **o: zk.dense_interference(x["g"], direction=x["u"], gram=True, **o),
    "bias": lambda x, **o: zk.bias_grad(x["b"], **o),
    "scale": lambda x, **o: zk.scale_grad(x["x"], x["b"], **o),
    "scale, normed": lambda x, **o: zk.scale_grad(x["x"], x["b"], mean=x["mean"], rstd=x["rstd"], **o),
    "scale and bias": lambda x, **o: zk.scale_bias_grad(x["x"], x["b"], rstd=x["rstd"], **o),
    "embedding": lambda x, **o: zk.embedding_interference(x["ids"], x["b"], V, **o),
    "embedding, all": lambda x, **o: zk.embedding_interference(
        x["ids"], x["b"], V, padding_idx=-3, direction=x["table"], gram=True, **o
    ),
    "embedding, max_rows": lambda x, **o: zk.embedding_interference(x["ids"], x["b"], V, direction=x["table"], max_rows=15, **o),
}
each_call = pytest.mark.parametrize("call", CALLS)


def flat(result):
    return list(result) if isinstance(result, tuple | list) else [result]


def detached(result):
    return [None if y is None else y.detach() for y in flat(result)]


def assert_same(found, want):
    for x, y in zip(flat(found), flat(want), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x.dtype, x.shape, x.requires_grad) == (y.dtype, y.shape, y.requires_grad)
            assert torch.equal(x, y)


class Ops(TorchDispatchMode):
    """The names of the library's ops that are seen."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "zsl":
            self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nothing_known():
    call_cache._known.clear()
    yield
    call_cache._known.clear()


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_later_calls_have_the_bits_of_the_registered_op(call, dtype, impl):
    x = operands(dtype)
    with Ops() as ops:
        long = CALLS[call](x, impl=impl)
    if ops.seen:  # the operands stay on the CPU
        assert not call_cache._known
    first = CALLS[call](x, impl=impl)
    assert_same(first, long)
    for _ in range(2):
        assert_same(CALLS[call](x, impl=impl), long)
    strided = {name: y.mT.contiguous().mT if y.ndim > 1 else y for name, y in x.items()}
    with Ops():
        long = CALLS[call](strided, impl=impl)
    assert_same(CALLS[call](strided, impl=impl), long)


@each_call
def test_results_are_tensors_of_their_own(call):
    """Written to, none changes another: they are no views, and no workspace of the next call."""
    results = [y for _ in range(3) for y in flat(CALLS[call](operands())) if y is not None]
    assert len({y.untyped_storage().data_ptr() for y in results}) == len(results)
    assert all(y._base is None for y in results)


@each_call
def test_the_short_way_is_taken_and_kept(call):
    x = operands()
    CALLS[call](x)
    (short,) = call_cache._known.values()
    taken = []
    call_cache._known.update({kind: lambda *tensors: taken.append(tensors) or short(*tensors) for kind in call_cache._known})
    CALLS[call](x)
    assert len(taken) == 1


@each_call
def test_what_differs_in_anything_is_another_kind(call):
    settings = [
        lambda: CALLS[call](operands()),
        lambda: CALLS[call](operands(N=N + 1)),
        lambda: CALLS[call](operands(torch.float64)),
        lambda: CALLS[call](operands(), impl="cpu"),
        lambda: CALLS[call](operands(), impl="chunked"),
    ]
    for seen, setting in enumerate(settings):
        setting()
        # The portable form of an embedding is not kept: its time is that of the kernels.
        assert len(call_cache._known) == seen + 1 - (call.startswith("embedding") and setting is settings[-1])


@each_call
@pytest.mark.parametrize("watch", ["derivative", "dispatch mode", "function mode", "subclass", "transform"])
def test_what_watches_sees_the_registered_op(call, watch):
    x = operands()
    want = CALLS[call](x)
    call_cache._known.update({kind: lambda *tensors: pytest.fail("the short way") for kind in call_cache._known})
    if watch == "derivative":
        leaves = {name: y.requires_grad_() if y.is_floating_point() else y for name, y in x.items()}
        found = CALLS[call](leaves)
        assert all(y is None or y.requires_grad or not y.is_floating_point() for y in flat(found))
        assert_same(detached(found), want)
    elif watch == "dispatch mode":
        with Ops() as ops:
            assert_same(CALLS[call](x), want)
        assert len(ops.seen) == 1
    elif watch == "function mode":

        class Mode(TorchFunctionMode):
            seen = 0

            def __torch_function__(self, function, types, args=(), kwargs=None):
                Mode.seen += "zsl." in str(function)
                return function(*args, **(kwargs or {}))

        with Mode():
            assert_same(CALLS[call](x), want)
        assert Mode.seen == 1
    elif watch == "subclass":

        class Sub(torch.Tensor):
            pass

        found = CALLS[call]({name: y.as_subclass(Sub) for name, y in x.items()})
        assert_same([y if y is None else y.as_subclass(torch.Tensor) for y in flat(found)], want)
    else:

        def inside(y):
            assert call_cache.kind_of(call, "auto", None, x["b"]) is None
            return y

        torch.func.vmap(inside)(torch.zeros(2))


@each_call
def test_with_gradients_off_operands_may_want_them(call):
    x = operands()
    want = CALLS[call](x)
    leaves = {name: torch.nn.Parameter(y) if y.is_floating_point() else y for name, y in x.items()}
    with torch.no_grad():
        assert_same(CALLS[call](leaves), want)
    assert len(call_cache._known) == 1
    with torch.inference_mode():
        found = CALLS[call](leaves)
    assert all(y is None or y.is_inference() for y in flat(found))


@each_call
def test_disabled_function_modes_do_not_watch(call):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    x = operands()
    with Mode(), torch._C.DisableTorchFunction():
        CALLS[call](x)
    assert len(call_cache._known) == 1


@each_call
def test_traces_hold_the_registered_op(call):
    if call.startswith("embedding"):
        pytest.skip("the number of rows depends on values, or ids would be traced: test_embedding.py compiles it")
    x = operands()
    CALLS[call](x)
    names = [name for name, y in x.items() if y.is_floating_point()]
    tensors = [x[name] for name in names]

    def function(*tensors):
        return [y for y in flat(CALLS[call](dict(zip(names, tensors, strict=True)))) if y is not None]

    graph = make_fx(function)(*tensors)
    assert sum("zsl." in str(node.target) for node in graph.graph.nodes) == 1
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for _ in range(3):
        assert_same(compiled(*tensors), function(*tensors))
        CALLS[call](operands(N=N + counter.frame_count))  # another kind is no reason to compile again
    assert counter.frame_count == 1


@each_call
def test_a_change_of_threads_or_instruction_set_is_honored(call):
    x = operands()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for isa in torch.ops.zsl_cpu.isas():
                with running(f"cpu-{isa}") as impl:
                    with Ops():
                        want = CALLS[call](x, impl=impl)
                    for _ in range(2):
                        assert_same(CALLS[call](x, impl=impl), want)
            assert len(call_cache._known) == threads
    finally:
        torch.set_num_threads(before)


@each_call
def test_autocast_leaves_the_short_way_alone(call):
    x = operands()
    for impl in ("cpu", "chunked"):
        want = CALLS[call](x, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(CALLS[call](x, impl=impl), want)


@each_call
def test_negated_views_are_read_as_negated(call):
    """A tensor whose negation is pending: its memory holds the opposite."""
    x = operands()
    lazy = {name: torch._neg_view(-y) if y.is_floating_point() else y for name, y in x.items()}
    want = CALLS[call](x)
    assert_same(CALLS[call](lazy), want)


def test_bad_arguments_are_refused_after_good_ones():
    x = operands()
    for _ in range(2):
        zk.interference(x["a"], x["b"])
        with pytest.raises(ValueError, match="impl:"):
            zk.interference(x["a"], x["b"], impl="fast")
        with pytest.raises(ValueError, match="impl:"):
            zk.interference(x["a"], x["b"], impl=["cpu"])
        with pytest.raises(TypeError, match="b:"):
            zk.interference(x["a"], x["b"].double())
        with pytest.raises(ValueError, match="num_examples:"):
            zk.interference(x["a"], x["b"], num_examples=N)
        with pytest.raises(TypeError, match="a:"):
            zk.interference(None, x["b"])
        with pytest.raises(IndexError, match=r"ids: expected values in \[0, 11\), got 11"):
            zk.embedding_interference(torch.full((N, T), V), x["b"], V)
        zk.embedding_interference(x["ids"], x["b"], V, max_rows=V)
        with pytest.raises(ValueError, match="max_rows: expected at least"):
            zk.embedding_interference(x["ids"], x["b"], V, max_rows=1)
        with pytest.raises(TypeError, match="ids:"):
            zk.embedding_interference(x["ids"].bool(), x["b"], V)
        zk.embedding_interference(x["ids"], x["b"], V, padding_idx=1)
        for wrong in (float(V), [V]):
            with pytest.raises(TypeError, match="num_embeddings: expected an integer"):
                zk.embedding_interference(x["ids"], x["b"], wrong, padding_idx=1)
            with pytest.raises(TypeError, match="max_rows: expected an integer"):
                zk.embedding_interference(x["ids"], x["b"], V, max_rows=wrong)
        with pytest.raises(TypeError, match="padding_idx: expected None or an integer"):
            zk.embedding_interference(x["ids"], x["b"], V, padding_idx=1.0)


def test_kinds_do_not_add_up(monkeypatch):
    monkeypatch.setattr(call_cache, "_MOST", 4)
    for n in range(20):
        zk.bias_grad(torch.ones(n, 2, 3))
        assert len(call_cache._known) <= 4
