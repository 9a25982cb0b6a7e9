"""coordinate_sums against its definition."""

import math

import pytest
import torch

import zsl_kernels as zk
from tests.devices import waiting_is_an_error
from tests.inputs import EMULATED


def definition(grad_sum, abs_sum, sq_sum, u):
    G, A, Q = (x.double() for x in (grad_sum, abs_sum, sq_sum))
    U = torch.zeros_like(G) if u is None else u.double().abs()
    touched = A != 0
    return zk.CoordinateSums(
        touched=touched.sum().item(),
        ratio=(G.abs() / A)[touched].sum().item(),
        root_ratio=(Q.sqrt() / A)[touched].sum().item(),
        grad_sq=G.square().sum().item(),
        sq=Q.sum().item(),
        p_sum=(G.abs() * U).sum().item(),
        p_abs=(A * U).sum().item(),
        p_root=(Q.sqrt() * U).sum().item(),
    )


def sums(*shape, dtype=torch.float32):
    """As interference gives them, from four examples of which none touches every fifth coordinate."""
    g = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g.view(4, -1)[:, ::5] = 0
    return [x.to(dtype) for x in (g.sum(0), g.abs().sum(0), g.square().sum(0))]


# Below, on and past a vector; the kernel's block; a worker's block; the chunked form's.
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (16, 16), (33, 31), (1 << 14,), (129, 513), (0,), (0, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", [False, True])
def test_is_the_definition(direction, dtype, shape, impl):
    tensors = sums(*shape, dtype=dtype)
    u = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)) if direction else None
    got = zk.coordinate_sums(*tensors, direction=u, impl=impl)
    # Terms are positive and float32's last digits average out: far less than the 1e-6 of each.
    assert got == pytest.approx(definition(*tensors, u), rel=1e-6)
    assert all(isinstance(x, float) for x in got)


def test_reads_any_layout(impl):
    tensors = sums(33, 31)
    u = torch.randn(31, 33).T
    transposed = [x.T.contiguous().T for x in tensors]
    assert zk.coordinate_sums(*transposed, direction=u, impl=impl) == pytest.approx(definition(*tensors, u), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_comes_through(value, impl):
    tensors = sums(33, 31)
    for x in tensors:
        x[7, 11] = value
    got = zk.coordinate_sums(*tensors, direction=torch.ones(33, 31), impl=impl)
    assert [name for name, x in got._asdict().items() if math.isfinite(x)] == ["touched"]


def test_is_bitwise_repeatable(impl):
    tensors = sums(300, 301)
    assert zk.coordinate_sums(*tensors, impl=impl) == zk.coordinate_sums(*tensors, impl=impl)


# Of many weights ------------------------------------------------------------------------------------------------------------------


def many(dtype=torch.float32):
    """The sums of weights of every size, the direction of every other one, and layouts of all kinds."""
    shapes = [(), (3, 5), (0, 7), (33, 31), (1 << 14,), (129, 513), (5,), (300, 301)]
    weights = [sums(*shape, dtype=dtype) for shape in shapes]
    weights[3] = [x.T.contiguous().T for x in weights[3]]
    weights[6] = [x.repeat_interleave(2)[::2] for x in weights[6]]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(shape, generator=generator) if i % 2 else None for i, shape in enumerate(shapes)]
    directions[3] = torch.randn(31, 33, generator=generator, dtype=torch.float64).T
    return [*map(list, zip(*weights, strict=True)), directions]


def assert_rows_are_those_of_single_calls(grad_sums, abs_sums, sq_sums, directions, impl):
    found = zk.coordinate_sums_of_many(grad_sums, abs_sums, sq_sums, directions, impl=impl)
    assert found.dtype == torch.float64
    assert found.shape == (len(grad_sums), len(zk.CoordinateSums._fields))
    given = [None] * len(grad_sums) if directions is None else directions
    for row, *tensors, u in zip(found, grad_sums, abs_sums, sq_sums, given, strict=True):
        assert zk.CoordinateSums(*row.tolist()) == zk.coordinate_sums(*tensors, direction=u, impl=impl)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", [False, True])
def test_of_many_weights_each_row_is_the_same_bits_as_alone(direction, dtype, impl):
    *tensors, directions = many(dtype)
    found = assert_rows_are_those_of_single_calls(*tensors, directions if direction else None, impl)
    for row, *each, u in zip(found, *tensors, directions, strict=True):
        assert row.tolist() == pytest.approx(definition(*each, u if direction else None), rel=1e-6)


def test_of_many_weights_of_mixed_dtypes(impl):
    wide, narrow = many(torch.float64), many(torch.float32)
    *mixed, directions = [[*a[:4], *b[4:]] for a, b in zip(wide, narrow, strict=True)]
    mixed[1][5] = mixed[1][5].double()  # abs_sum alone, read in grad_sum's dtype
    directions[1] = directions[1].bfloat16()
    assert_rows_are_those_of_single_calls(*mixed, directions, impl)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_of_many_weights_on_any_number_of_threads(threads, cpu_isa):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        *tensors, directions = many()
        assert_rows_are_those_of_single_calls(*tensors, directions, "cpu")
        small = [[x.flatten()[:50].clone() for x in sums(50)] for _ in range(40)]
        assert_rows_are_those_of_single_calls(*map(list, zip(*small, strict=True)), None, "cpu")
    finally:
        torch.set_num_threads(before)


def test_of_no_weights(impl):
    for directions in (None, []):
        found = zk.coordinate_sums_of_many([], [], [], directions, impl=impl)
        assert found.shape == (0, len(zk.CoordinateSums._fields))
        assert found.dtype == torch.float64


def test_of_one_weight_in_any_sequence(impl):
    found = zk.coordinate_sums_of_many(*[(x,) for x in sums(33, 31)], impl=impl)
    assert found[0].tolist() == list(zk.coordinate_sums(*sums(33, 31), impl=impl))


def test_of_many_weights_differentiates_nothing(impl):
    tensors = [[x.requires_grad_() for x in sums(33, 31)] for _ in range(3)]
    assert not zk.coordinate_sums_of_many(*tensors, impl=impl).requires_grad


@pytest.mark.parametrize("impl", ["auto", "chunked"])
def test_of_many_weights_compiles_as_one_graph(impl):
    torch._dynamo.reset()
    *tensors, directions = many()
    compiled = torch.compile(lambda *x: zk.coordinate_sums_of_many(*x, impl=impl), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, directions), zk.coordinate_sums_of_many(*tensors, directions, impl=impl))


@pytest.mark.parametrize("impl", ["auto", "chunked"])
def test_of_many_weights_passes_opcheck(impl):
    *tensors, directions = many()
    for given in (directions, []):
        torch.library.opcheck(torch.ops.zsl.coordinate_sums_of_many.default, (*tensors, given, impl))


ONE = [[torch.zeros(6, 5), torch.zeros(4)] for _ in range(3)]


@pytest.mark.parametrize(
    ("place", "value", "error", "words"),
    [
        ((0, 1), None, TypeError, ["grad_sums[1]:", "Tensor", "NoneType"]),
        ((1, 0), torch.zeros(5, 6), ValueError, ["abs_sums[0]:", "(6, 5)", "(5, 6)"]),
        ((1, 0), None, TypeError, ["abs_sums[0]:", "Tensor", "NoneType"]),
        ((2, 1), torch.zeros(4, dtype=torch.bfloat16), TypeError, ["sq_sums[1]:", "float32 or float64", "bfloat16"]),
        ((2, 1), torch.zeros(4, device="meta"), ValueError, ["sq_sums[1]:", "cpu", "meta"]),
        ((3, 0), torch.zeros(6), ValueError, ["directions[0]:", "(6, 5)", "(6,)"]),
        ((3, 1), torch.zeros(4, dtype=torch.int32), TypeError, ["directions[1]:", "float32", "int32"]),
        ((3, 1), torch.zeros(4, device="meta"), ValueError, ["directions[1]:", "cpu", "meta"]),
        ((2,), [torch.zeros(6, 5)], ValueError, ["sq_sums:", "2", "1"]),
        ((3,), [None], ValueError, ["directions:", "2", "1"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) and isinstance(x[0], str) else "",
)
def test_bad_sums_of_many(place, value, error, words):
    arguments = [*map(list, ONE), [None, None]]
    if len(place) == 1:
        arguments[place[0]] = value
    else:
        arguments[place[0]][place[1]] = value
    with pytest.raises(error) as raised:
        zk.coordinate_sums_of_many(*arguments)
    assert all(word in str(raised.value) for word in words), raised.value


def test_weights_of_several_devices_are_refused():
    elsewhere = [[torch.zeros(4), torch.zeros(4, device="meta")] for _ in range(3)]
    with pytest.raises(ValueError, match=r"grad_sums\[1\]: expected .* got one on meta"):
        zk.coordinate_sums_of_many(*elsewhere)


@pytest.mark.parametrize("impl", ["fast", "reference"])
@pytest.mark.parametrize("weights", [0, 2])
def test_of_many_weights_by_unknown_implementations(impl, weights):
    with pytest.raises(ValueError, match="impl:"):
        zk.coordinate_sums_of_many(*[x[:weights] for x in ONE], impl=impl)


# On devices -----------------------------------------------------------------------------------------------------------------------


def test_a_program_that_goes_through_many_blocks(impl, monkeypatch):
    if EMULATED != "triton":
        pytest.skip("of Triton's kernels, whose programs are so many elsewhere")
    from zsl_kernels.backends.triton import coordinates as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    *tensors, directions = ([x[5]] for x in many())
    found = assert_rows_are_those_of_single_calls(*tensors, directions, impl)
    assert found[0].tolist() == pytest.approx(definition(*(x[0] for x in (*tensors, directions))), rel=1e-6)


on_a_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device that torch can use")


@pytest.mark.gpu
@on_a_device
@pytest.mark.parametrize("impl", ["auto", "chunked", "triton"])
def test_of_many_weights_nothing_waits_for_the_device(impl):
    tensors = [[None if x is None else x.cuda() for x in each] for each in many()]
    want = zk.coordinate_sums_of_many(*tensors, impl=impl)
    with waiting_is_an_error():
        found = zk.coordinate_sums_of_many(*tensors, impl=impl)
    assert torch.equal(found, want)


@pytest.mark.gpu
@on_a_device
def test_of_many_weights_in_a_graph():
    """Which reads the sums that are there when it runs, whatever the host's memory holds by then."""
    *tensors, directions = [[None if x is None else x.cuda() for x in each] for each in many()]
    changed = [[x + 1 for x in each] for each in tensors]
    want = zk.coordinate_sums_of_many(*changed, directions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = zk.coordinate_sums_of_many(*tensors, directions)
    for each, others in zip(tensors, changed, strict=True):
        for x, y in zip(each, others, strict=True):
            x.copy_(y)
    graph.replay()
    assert torch.equal(found, want)


@pytest.mark.gpu
@on_a_device
def test_of_many_weights_of_dtypes_that_different_kernels_own():
    tensors = [[None if x is None else x.cuda() for x in each] for each in many()]
    for each in tensors[:3]:
        each[::3] = [x.double() for x in each[::3]]
    assert_rows_are_those_of_single_calls(*tensors, "auto")
