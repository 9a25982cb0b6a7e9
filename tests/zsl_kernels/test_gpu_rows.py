"""What only a device can show of the row kernels: streams, graphs, no waiting. Accuracy is that of the files whose
``impl`` fixture goes over the device's implementations too."""

import pytest
import torch

import zsl_kernels as zk
from tests.devices import waiting_is_an_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device that torch can use"),
]


def make(device="cuda"):
    """Of such sizes that every call has partial results, which a second launch adds."""
    generator = torch.Generator().manual_seed(0)
    x, b = (torch.randn(8, 600, 768, generator=generator).bfloat16().to(device) for _ in range(2))
    mean, rstd = (torch.randn(8, 600, generator=generator).to(device) for _ in range(2))
    return x, b, mean, rstd


def rows(x, b, mean, rstd, impl):
    """Ragged, in an order of their own."""
    ids = torch.arange(8 * 600, device=x.device) % 8
    flat = (y.flatten(0, 1) for y in (mean, rstd))
    options = dict(zip(("mean", "rstd"), flat, strict=True))
    return zk.scale_bias_grad(x.flatten(0, 1), b.flatten(0, 1), example_ids=ids, num_examples=8, impl=impl, **options)


CALLS = {
    "dense": lambda x, b, mean, rstd, impl: zk.dense_interference(x[:, 0], impl=impl),
    "dense, all": lambda x, b, mean, rstd, impl: zk.dense_interference(x[:, :9], direction=b[0, :9], gram=True, impl=impl),
    "dense, many": lambda x, b, mean, rstd, impl: zk.dense_interference(x.flatten(0, 1), direction=b[0, 0], impl=impl),
    "scale and bias": lambda x, b, mean, rstd, impl: zk.scale_bias_grad(x, b, mean=mean, rstd=rstd, impl=impl),
    "ragged scale and bias": rows,
}
each_call = pytest.mark.parametrize("call", CALLS)


def run(call, operands, impl="cuda"):
    return [x for x in CALLS[call](*operands, impl) if x is not None]


@each_call
def test_auto_is_the_kernel_and_repeats_its_bits(call):
    operands = make()
    first = run(call, operands)
    for impl in ("auto", "cuda"):
        assert all(torch.equal(x, y) for x, y in zip(run(call, operands, impl), first, strict=True))


@each_call
def test_a_graph_replays_it(call):
    operands = make()
    expected = run(call, operands)
    held = [torch.zeros_like(x) for x in operands]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(call, held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(call, held)
    for x, y in zip(held, operands, strict=True):
        x.copy_(y)
    graph.replay()
    for found, want in zip(results, expected, strict=True):
        assert torch.equal(found, want)


@each_call
def test_calls_on_two_streams_at_once_do_not_meet(call):
    """Workspaces are each call's own."""
    first, second = make(), [x.flip(0).contiguous() for x in make()]
    expected = [run(call, first), run(call, second)]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], [[], []]
    for _ in range(20):
        for stream, operands, found in zip(streams, (first, second), results, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(call, operands))
    torch.cuda.synchronize()
    for found, want in zip(results, expected, strict=True):
        for each in found:
            assert all(torch.equal(x, y) for x, y in zip(each, want, strict=True))


@each_call
def test_never_waits_for_the_device(call):
    operands = make()
    run(call, operands)
    with waiting_is_an_error():
        run(call, operands)
