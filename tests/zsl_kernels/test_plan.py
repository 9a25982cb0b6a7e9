"""The cost model: a pure function, whose choices are those of DESIGN §2, and which the calls follow."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zsl_kernels as zk
from tests.inputs import CALLS, Problem, cpu_isas
from zsl_kernels.planning import choose as model
from zsl_kernels.planning import cpu_cost
from zsl_kernels.planning.call import Call

BOTH = ("cpu", "chunked")


def choose(op, N=8, T=256, K=768, O=768, M=None, gram=False, itemsize=4, threads=2, impls=BOTH):
    return model.choose(Call(op, N, T, K, O, M, gram, itemsize, threads), impls)


sizes = st.integers(0, 3000)
plans = st.builds(
    choose,
    st.sampled_from(model.OPS),
    N=st.integers(0, 600),
    T=sizes,
    K=sizes,
    O=sizes,
    gram=st.booleans(),
    itemsize=st.sampled_from([4, 8]),
    threads=st.sampled_from([1, 2, 64]),
    impls=st.sampled_from([BOTH, ("cpu",), ("chunked",)]),
)


@given(plans)
def test_the_cheapest_candidate_is_chosen(plan):
    assert plan.chosen.time == min(c.time for c in plan.candidates)
    assert (plan.impl, plan.way, plan.tile) == (plan.chosen.impl, plan.chosen.way, plan.chosen.tile)


@given(plans)
def test_direct_tiles_are_whole_register_tiles_within_the_limits(plan):
    for c in plan.candidates:
        if c.way == "direct":
            rows, cols = c.tile
            assert 0 < rows <= cpu_cost.TILE_O
            assert 0 < cols <= cpu_cost.TILE_K
            assert rows % cpu_cost.ROWS == 0
            assert cols % cpu_cost.COLS == 0


@given(plans)
def test_prints_every_candidate_and_marks_the_choice(plan):
    first, *lines = str(plan).splitlines()
    assert plan.way in first
    assert len(lines) == len(plan.candidates)
    assert [line.lstrip().startswith("->") for line in lines] == [True] + [False] * (len(lines) - 1)


def test_is_a_pure_function_of_its_arguments():
    with pytest.raises(dataclasses.FrozenInstanceError):
        choose("gram").candidates = ()
    before = str(choose("gram"))
    model.choose.cache_clear()
    assert str(choose("gram")) == before
    assert not any("torch" in vars(module) for module in (model, cpu_cost))


@pytest.mark.parametrize(
    ("op", "sizes", "way"),
    [
        # The Gram: ghost where T²(O + K) is well below OK(1 + T/N), as for short sequences in wide layers and single positions.
        ("gram", {"N": 32, "T": 1}, "ghost"),
        ("gram", {"N": 32, "T": 4, "K": 2048, "O": 2048}, "ghost"),
        ("gram", {"N": 32, "T": 1024}, "direct"),
        ("gram", {"N": 8, "T": 256, "K": 256, "O": 256}, "direct"),
        # Norms: ghost where T(O + K) is well below OK.
        ("sq_norm", {"N": 32, "T": 8, "K": 3072, "O": 3072}, "ghost"),
        ("sq_norm", {"N": 32, "T": 1024}, "direct"),
        ("interference", {"N": 32, "T": 256}, "direct"),
    ],
)
def test_ghost_wins_where_the_design_says(op, sizes, way):
    assert choose(op, impls=("cpu",), **sizes).way == way


@pytest.mark.parametrize("op", ["interference", "gram", "sq_norm"])
def test_single_positions_factorize_in_the_chunked_form(op):
    assert choose(op, T=1, impls=("chunked",)).way == "rank-one"
    assert choose(op, T=2, impls=("chunked",)).way == "chunked"


@pytest.mark.parametrize("op", model.OPS)
def test_workspace_does_not_grow_with_positions(op):
    def workspaces(T):
        return {(c.impl, c.way): c.workspace for c in choose(op, N=4, T=T).candidates if c.way != "matmul"}

    assert workspaces(1 << 20) == workspaces(1 << 12)


@pytest.mark.parametrize("N", [1, 8, 64, 512])
@pytest.mark.parametrize("op", ["interference", "gram"])
def test_stored_tiles_of_the_gram_are_bounded(op, N):
    (direct,) = [c for c in choose(op, N=N, T=512, gram=op == "interference").candidates if c.way == "direct"]
    packed = 4 * (cpu_cost.CHUNK * (cpu_cost.TILE_O + cpu_cost.TILE_K) + 7 * cpu_cost.TILE_O * cpu_cost.TILE_K)
    assert direct.workspace <= cpu_cost.STORED_BYTES + packed


def test_work_of_every_thread_where_there_are_tiles_enough():
    rows, cols = choose("interference", K=768, O=768, threads=64).tile
    assert -(-768 // rows) * -(-768 // cols) >= 64


@pytest.mark.skipif(not cpu_isas(), reason="the CPU kernels are not live")
def test_a_call_of_one_tile_is_cut_for_the_threads_that_there_are(threads):
    tiles = []
    for count in (1, 2):
        threads(count)
        tiles.append(zk.plan("interference", N=8, T=64, K=cpu_cost.TILE_K, O=cpu_cost.TILE_O, impl="cpu").tile)
    assert tiles[0] == (cpu_cost.TILE_O, cpu_cost.TILE_K)
    assert tiles[1][0] * tiles[1][1] <= tiles[0][0] * tiles[0][1] // 2


@pytest.mark.skipif(not cpu_isas(), reason="the CPU kernels are not live")
@pytest.mark.parametrize(("call", "direct"), [("gram", "gram_direct"), ("sq_norm", "sq_norm_direct")])
@pytest.mark.parametrize("size", [(20, 1, 500, 500), (2, 300, 20, 20)])
def test_calls_go_the_way_that_the_plan_prints(size, call, direct):
    N, T, K, O = size
    way = zk.plan(call, N=N, T=T, K=K, O=O, impl="cpu").way
    x = Problem(*size).make()
    with torch.autograd.profiler.profile() as profile:
        CALLS[call](x, "cpu")
    kernels = {event.name for event in profile.function_events if event.name.startswith("zsl_cpu::")}
    assert kernels == {f"zsl_cpu::{'ghost' if way == 'ghost' else direct}"}


def test_public_plan_is_that_of_the_sizes():
    plan = zk.plan("gram", N=3, T=5, K=7, O=11, M=2, dtype=torch.bfloat16)
    assert "N=3, T=5, K=7, O=11, M=2" in str(plan)
    assert zk.plan("interference", N=3, T=5, K=7, O=11, impl="chunked").impl == "chunked"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"op": "norm"}, ValueError, ["op", "sq_norm", "'norm'"]),
        ({"N": -1}, ValueError, ["N", "-1"]),
        ({"T": 2.5}, ValueError, ["T", "2.5"]),
        ({"M": -2}, ValueError, ["M", "-2"]),
        ({"dtype": torch.int32}, TypeError, ["dtype", "float32", "int32"]),
        ({"impl": "reference"}, ValueError, ["impl", "reference"]),
        ({"impl": "fast"}, ValueError, ["impl", "chunked", "'fast'"]),
        ({"impl": "triton"}, (RuntimeError, ValueError), ["impl", "triton"]),
        ({"gram": True}, ValueError, ["gram", "interference", "'gram'"]),
        ({"op": "interference", "M": 2}, ValueError, ["M", "'gram'", "'interference'"]),
        ({"M": 2, "irregular": True}, ValueError, ["M", "regular", "irregular"]),
        ({"arch": 90}, ValueError, ["arch", "device='cuda'", "cpu"]),
        ({"arch": [90], "device": "cuda"}, ValueError, ["arch", "80, 90, 100", "[90]"]),
        ({"arch": 90, "device": "cuda", "impl": "cpu"}, ValueError, ["impl", "auto", "'cpu'"]),
        ({"impl": "cpu", "device": "meta"}, (ValueError, RuntimeError), ["impl", "cpu"]),
    ],
    ids=str,
)
def test_errors_name_the_argument_what_was_expected_and_what_came(change, error, words):
    arguments = {"op": "gram", "N": 2, "T": 3, "K": 4, "O": 5, **change}
    with pytest.raises(error) as raised:
        zk.plan(arguments.pop("op"), **arguments)
    assert all(word in str(raised.value) for word in words), raised.value
