"""The Triton kernels themselves, under the interpreter: every way, tile and number of parts, whatever the plan would choose.

Runs in the process that test_triton.py starts.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import zsl_kernels as zk
from tests import error_budgets
from tests.inputs import Irregular, Problem, assert_exact, assert_within_budget, expectations, expected, irregular_options
from zsl_kernels.backends import dispatch
from zsl_kernels.backends.dispatch import TRITON as triton
from zsl_kernels.backends.triton import interference as tiled
from zsl_kernels.backends.triton import rank_one
from zsl_kernels.ops import interference as interference_op
from zsl_kernels.planning import gpu_cost
from zsl_kernels.planning.tiles import CONFIGS, UNALIGNED, Config

# Aligned operands, whose tiles are the shipped ones: past every tile's edge, and the examples past one run.
PROBLEM = Problem(5, 37, 144, 272, dtype=torch.bfloat16, values="integers")
MANY = Problem(150, 3, 16, 16)


def planned(op, x, way, config, splits=1, gram=False):
    """The plan of a call with another choice than its own."""
    plan = dispatch.plan_call(op, x.a, x.b, impl="triton", gram=gram)
    chosen = dataclasses.replace(plan.chosen, way=way, config=config, tile=config[:2], splits=splits)
    return dataclasses.replace(plan, candidates=(chosen,))


def tiles(kernel, kind):
    return sorted({config for kernels in CONFIGS.values() for config in kernels[kernel][kind]})


def assert_same(sums, problem, call):
    for name, e in expected(problem, call).items():
        assert_exact(getattr(sums, name), e, name)


@pytest.mark.parametrize("config", tiles("interference", "half"), ids=str)
def test_every_tile_of_the_direct_way(config):
    x = PROBLEM.make()
    sums = triton.interference(planned("interference", x, "direct", config, 2), x.a, x.b, x.direction, False)
    assert_same(sums, PROBLEM, "interference, direction")


@pytest.mark.parametrize("config", tiles("sq_norm", "half"), ids=str)
@pytest.mark.parametrize("slab_bytes", [1, 2 << 20, 32 << 20])
def test_every_tile_of_the_stored_way(config, slab_bytes, monkeypatch):
    """Slabs of one tile, of some, of all."""
    monkeypatch.setattr(gpu_cost, "SLAB_BYTES", slab_bytes)
    x = PROBLEM.make()
    sums = triton.interference(planned("interference", x, "stored", config, 2, True), x.a, x.b, x.direction, True)
    assert_same(sums, PROBLEM, "interference, all")
    gram = triton.gram(planned("gram", x, "stored", config), x.a, x.b, x.a2, x.b2)
    assert_exact(gram, expected(PROBLEM, "cross gram")["gram"])


@pytest.mark.parametrize("config", tiles("sq_norm", "half"), ids=str)
def test_every_tile_of_the_norms(config):
    x = PROBLEM.make()
    got = triton.sq_norm(planned("sq_norm", x, "direct", config, 3), x.a, x.b)
    assert_exact(got, expected(PROBLEM, "sq_norm")["sq_norm"])


@pytest.mark.parametrize("splits", [1, 2, 4, 97, 150])
@pytest.mark.parametrize("way", ["direct", "stored"])
def test_parts_and_runs_of_examples(way, splits):
    """150 examples are three runs; 97 parts of two leave some of the parts without any."""
    x = MANY.make()
    config = Config(16, 16, 16, 4, 2)
    sums = triton.interference(planned("interference", x, way, config, splits), x.a, x.b, x.direction, False)
    for name, e in expected(MANY, "interference, direction").items():
        assert_within_budget(getattr(sums, name), e, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "splits"), [(1, 1), (5, 4), (300, 1), (300, 3)])
@pytest.mark.parametrize("sizes", [(48, 80), (45, 33)])
def test_rank_one_sums(sizes, N, splits, dtype):
    """One run and two, one part and several, aligned and not."""
    O, K = sizes
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(N, size, generator=generator).to(dtype) for size in (K, O))
    plan = SimpleNamespace(chosen=SimpleNamespace(config=Config(32, 64, 16, 4, 2), splits=splits))
    names = ("grad_sum", "abs_sum", "sq_sum")

    def definition(x):
        forms = (x, {name: y.abs() for name, y in x.items()}, {name: y.square() for name, y in x.items()})
        return {name: form["b"].T @ form["a"] for name, form in zip(names, forms, strict=True)}

    want = expectations(definition, {"a": a, "b": b}, error_budgets.interference(error_budgets.Sizes(N, 1, K, O)))
    for name, got in zip(names, rank_one.sums(plan, a, b), strict=True):
        assert_within_budget(got, want[name], name)


@pytest.mark.parametrize("change", ["permuted", "odd row", "offset", "odd size"])
def test_operands_that_are_not_aligned_take_a_tile_of_their_own(change, monkeypatch):
    x = Problem(2, 3, 64, 64).make()
    used = []
    kernel = tiled.interference_kernel
    a = {
        "permuted": lambda a: a.transpose(1, 2).contiguous().transpose(1, 2),
        "odd row": lambda a: torch.cat((a, a[..., :3]), 2)[..., :64],
        "offset": lambda a: torch.cat((a.flatten(), a.flatten()[:1]))[1:].view_as(a),
        "odd size": lambda a: a[..., :63],
    }[change](x.a)

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: (used.append((options["ROWS"], options["COLS"])), kernel[grid](*args, **options))

    monkeypatch.setattr(tiled, "interference_kernel", Spy())
    plan = planned("interference", x, "direct", Config(32, 32, 16, 4, 2))
    got = triton.interference(plan, a, x.b, None, False).grad_sum
    assert used == [UNALIGNED["interference"][:2]]
    torch.testing.assert_close(got, torch.einsum("nto,ntk->ok", x.b, a))
    used.clear()
    triton.interference(plan, x.a, x.b, None, False)
    assert used == [(32, 32)]


@pytest.mark.parametrize("odd", [0, 1], ids=["first", "second"])
def test_two_sets_of_which_one_is_not_aligned_share_their_slabs(odd, monkeypatch):
    """A slab of the one's tiles would not be whole tiles of the other's."""
    monkeypatch.setattr(gpu_cost, "SLAB_BYTES", 1)
    x = PROBLEM.make()
    sets = [[x.a, x.b], [x.a2, x.b2]]
    sets[odd][0] = sets[odd][0].transpose(1, 2).contiguous().transpose(1, 2)
    plan = planned("gram", x, "stored", Config(128, 128, 32, 8, 3))
    assert_exact(triton.gram(plan, *sets[0], *sets[1]), expected(PROBLEM, "cross gram")["gram"])


@pytest.mark.parametrize("call", ["direct", "stored", "rank-one"])
def test_offsets_past_31_bits(call, tmp_path):
    """Strides of 2³¹ elements, over a sparse file of which a few pages are touched."""
    stride, (N, T, K, O) = 2**31 + 3, (2, 1 if call == "rank-one" else 2, 3, 2)
    size = (N - 1) * stride + (T - 1) * 1000 + K
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2 * size)
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    a = storage.as_strided((N, T, K), (stride, 1000, 1))
    a.copy_(torch.arange(N * T * K).view(N, T, K))
    b = torch.ones(N, T, O, dtype=torch.bfloat16)
    x = SimpleNamespace(a=a, b=b)
    sums = triton.interference(planned("interference", x, call, Config(16, 16, 16, 4, 2)), a, b, None, False)
    assert torch.equal(sums.grad_sum, a.float().sum((0, 1)).expand(O, K))


@pytest.mark.parametrize("way", ["direct", "stored"])
def test_added_rows_reach_every_tile(way):
    problem = Irregular((3, 0, 40, 5), 80, 144, S=30, values="integers")
    x = problem.make()
    options = irregular_options(x)
    want = zk.interference(x["a"], x["b"], direction=x["direction"], gram=True, impl="reference", **options)
    plan_call = dispatch.plan_call

    def forced(op, a, b, **arguments):
        plan = plan_call(op, a, b, **arguments)
        chosen = dataclasses.replace(plan.chosen, way=way, config=Config(32, 32, 16, 4, 2), splits=2)
        return dataclasses.replace(plan, candidates=(chosen,))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interference_op, "plan_call", forced)
        got = zk.interference(x["a"], x["b"], direction=x["direction"], gram=way == "stored", impl="triton", **options)
    for name, field in got._asdict().items():
        if field is not None:
            assert torch.equal(field, getattr(want, name)), name


@pytest.mark.parametrize("size", [(13, 33), (48, 80)])
def test_infinities_next_to_padding_do_not_become_nan(size):
    """Outside of the weight zero would meet infinity, in the direct way too, which a Gram does not take."""
    O, K = size
    a, b = torch.ones(2, 3, K), torch.ones(2, 3, O)
    a[0, 1], b[1, 2] = float("inf"), float("inf")
    x = SimpleNamespace(a=a, b=b)
    config = Config(32, 64, 16, 4, 2)
    sums = triton.interference(planned("interference", x, "direct", config), a, b, torch.ones(O, K), False)
    norms = triton.sq_norm(planned("sq_norm", x, "direct", config), a, b)
    for field in (*sums[:-1], norms):
        assert (field == float("inf")).all()


@pytest.mark.parametrize("way", ["direct", "stored", "rank-one"])
@pytest.mark.parametrize(("N", "splits"), [(4, 1), (4, 2), (0, 1)])
def test_results_do_not_keep_each_other_s_memory(way, N, splits):
    """The sum that becomes the weight's gradient would hold the other two, and an op's outputs may not share storage."""
    x = Problem(4, 1 if way == "rank-one" else 3, 48, 32).make()
    plan = planned("interference", x, way, Config(16, 16, 16, 4, 2), splits, way == "stored")
    sums = triton.interference(plan, x.a[:N], x.b[:N], x.direction, way == "stored")
    found = [field for field in sums if field is not None]
    assert len({field.untyped_storage()._cdata for field in found}) == len(found)
    for field in found:
        assert field.untyped_storage().nbytes() == field.numel() * field.element_size()


def test_the_same_call_gives_the_same_bits():
    x = Problem(9, 20, 48, 80).make()
    first, second = (zk.interference(x.a, x.b, direction=x.direction, gram=True, impl="triton") for _ in range(2))
    for name, field in first._asdict().items():
        assert torch.equal(field, getattr(second, name)), name
