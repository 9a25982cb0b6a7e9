"""What the row kernels do beside their ops' definitions, which test_dense.py and test_scale_bias.py have: many
examples, calls laid out over blocks in every way, operands of several dtypes, views."""

import math

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import assert_within_budget
from tests.zsl_kernels import test_dense as dense
from tests.zsl_kernels import test_scale_bias as scales
from zsl_kernels.backends import dispatch
from zsl_kernels.backends.cuda import rows as row_ops
from zsl_kernels.backends.cuda.slabs import product_blocks
from zsl_kernels.planning.devices import GPUS
from zsl_kernels.types import INPUT_DTYPES

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[1, 3, 400], ids=lambda n: f"{n} multiprocessors")
def sms(request, monkeypatch):
    """Of the device, which decides how a call is laid out; implementations but the kernels take no notice."""
    monkeypatch.setattr(row_ops, "multiprocessors", lambda _: request.param)


def check_dense(g, u, impl, gram=True):
    got = dense.fields(zk.dense_interference(g, direction=u, gram=gram, impl=impl))
    for name, e in dense.expected(g, u).items():
        if name in got:
            assert_within_budget(got[name], e, name)


def check_scales(x, options, impl):
    got = scales.call(x, options, impl)
    for name, e in scales.expected(x, options).items():
        assert_within_budget(got[name], e, name)


# One and several parts of the examples; coordinates that one block has, and more than the blocks have at a time.
@pytest.mark.parametrize("shape", [(200, 33), (200, 1100), (9, 5000), (65, 700), (1, 3000)], ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_dense_of_many_examples_and_coordinates(dtype, shape, sms, impl):
    check_dense(*dense.make(shape, dtype), impl)


def test_dense_of_more_examples_than_a_part_has(sms, impl):
    check_dense(*dense.make((1100, 10)), impl, gram=False)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("direction", INPUT_DTYPES, ids=str)
def test_the_direction_has_any_dtype_and_layout(direction, dtype, impl):
    g = dense.make((5, 7, 90), dtype)[0]
    u = dense.make((5, 7, 90), dtype, values="integers")[1]  # which every dtype has
    wide = torch.stack([u, torch.full_like(u, math.nan)], -1).to(direction)[..., 0]
    got = dense.fields(zk.dense_interference(g, direction=wide, impl=impl))
    for name, e in dense.expected(g, u).items():
        if name in got:
            assert_within_budget(got[name], e, name)


VIEWS = {
    "a slice of the coordinates": lambda g: g[:, 3:70],
    "every other example, from the last on": lambda g: g.flip(0)[::2],
    "coordinates that do not collapse": lambda g: g[:, :60].unflatten(1, (6, 10)).transpose(1, 2)[:, 1:7],
    "one coordinate, expanded": lambda g: g[:, :1].expand(-1, 77),
    "one example, expanded": lambda g: g[:1].expand(9, -1),
    "examples innermost": lambda g: g.T.contiguous().T,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_dense_of_views(dtype, view, impl):
    g = VIEWS[view](dense.make((8, 128), dtype)[0])
    check_dense(g, dense.make(g.shape, dtype)[1], impl)


@pytest.mark.parametrize("P", [512, 1024, 513])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_the_gram_of_rows_that_are_read_as_they_are_and_of_others(dtype, P, impl):
    g, u = dense.make((20, P + 8), dtype)
    check_dense(g[:, :P].contiguous(), u[:P], impl)
    check_dense(g[:, :P], u[:P], impl)
    check_dense(g[:, 1 : P + 1], u[:P], impl)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_the_gram_of_more_rows_than_are_copied_at_a_time(dtype, sms, impl, monkeypatch):
    monkeypatch.setattr(row_ops, "COPY_BYTES", 10_000)
    check_dense(*dense.make((6, 2345), dtype), impl)
    check_dense(*dense.make((70, 600), dtype), impl)


def test_results_of_dense_share_no_storage(impl):
    sums = zk.dense_interference(*dense.make((5, 33))[:1], direction=torch.ones(33), gram=True, impl=impl)
    assert len({x.untyped_storage().data_ptr() for x in sums}) == len(sums)


@pytest.mark.parametrize("case", [(200, 5, 30), (2, 900, 20), (1, 1500, 1), (3, 200, 300)], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_scales_of_many_examples_and_positions(ragged, case, sms, impl):
    check_scales(*scales.Case(*case, ragged=ragged).make(), impl)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("x", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("b", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("K", [72, 45])
def test_scales_of_every_mix_of_dtypes(K, b, x, ragged, sms, impl):
    check_scales(*scales.Case(3, 40, K, dtype=x, b_dtype=b, ragged=ragged).make(), impl)


@pytest.mark.parametrize("statistics", INPUT_DTYPES, ids=str)
def test_statistics_have_any_dtype(statistics, impl):
    x, options = scales.Case(3, 40, 45, dtype=torch.bfloat16).make()  # whose numbers all of them have
    want = scales.call(x, options, impl)
    got = scales.call({**x, "mean": x["mean"].to(statistics), "rstd": x["rstd"].to(statistics)}, options, impl)
    if statistics != torch.float16:  # has not all of bfloat16's
        for name in got:
            assert torch.equal(got[name], want[name]), name


def test_repetition_changes_no_bit(sms, impl):
    g, u = dense.make((130, 700))
    x, options = scales.Case(3, 500, 45).make()
    ragged, ragged_options = scales.Case(5, 90, 45, ragged=True).make()
    calls = (
        lambda: dense.fields(zk.dense_interference(g, direction=u, gram=True, impl=impl)),
        lambda: scales.call(x, options, impl),
        lambda: scales.call(ragged, ragged_options, impl),
    )
    for call in calls:
        first = call()
        for _ in range(2):
            for name, field in call().items():
                assert torch.equal(field, first[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_goes_where_pytorch_has_it(value, sms, impl):
    """In rows that share a thread with others, and in a part of the examples."""
    g, u = dense.make((70, 45))
    g[66, 40] = value
    want = dense.sums_of(g.double(), u.double())
    for name, field in dense.fields(zk.dense_interference(g, direction=u, gram=True, impl=impl)).items():
        assert torch.equal(field.isnan(), want[name].isnan()), name
        assert torch.equal(field.isinf(), want[name].isinf()), name
    x, options = scales.Case(3, 90, 45, ragged=True).make()
    row = int((options["example_ids"] == 1).nonzero()[-1])
    x["b"][row, 44] = value
    for name, field in scales.call(x, options, impl).items():
        bad = torch.zeros_like(field, dtype=torch.bool)
        bad[1, 44] = True
        assert torch.equal(~field.isfinite(), bad), name


@pytest.mark.parametrize("sms", [1, 40, 108, 148])
def test_every_layout_of_dense_is_one_that_the_kernel_takes(sms):
    for N in (1, 2, 3, 8, 9, 63, 64, 65, 200, 512, 513, 5000, 100_000):
        for pieces in (1, 2, 7, 8, 100, 5000, 10**7):
            lanes, blocks, parts, part = row_ops._dense_launch(sms, N, pieces)
            assert lanes in (1, 2, 4, 8)
            assert part <= row_ops.RUN * lanes
            assert (parts - 1) * part < N <= parts * part
            assert 1 <= parts <= 65535
            assert 1 <= blocks <= max(1, -(-pieces * lanes // 8))


@pytest.mark.parametrize("sms", [1, 40, 108, 148])
def test_parts_of_positions_are_no_more_than_fill_the_device(sms):
    for blocks in (1, 24, 264, 10**6):
        for positions in (1, 31, 64, 5000, 10**7):
            parts = row_ops._scale_parts(sms, blocks, positions, 8)
            assert 1 <= parts <= min(65535, max(1, positions // 32))
            assert parts == 1 or blocks * (parts - 1) <= 3 * sms


@pytest.mark.parametrize("op", ["dense_interference", "scale_bias_grad"])
def test_auto_takes_the_kernels_but_for_float64(op, monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    device = torch.device("cuda")
    assert [dispatch.impls_for(device, "auto", op, dtype)[0] for dtype in INPUT_DTYPES] == ["cuda", "cuda", "cuda", "chunked"]
    with pytest.raises(TypeError, match="impl: 'cuda' expects float32, bfloat16 or float16, got float64"):
        dispatch.impls_for(device, "cuda", op, torch.float64)


def test_the_gram_has_as_many_blocks_as_a_device_of_any_size():
    for gpu in GPUS.values():
        for N in (1, 32, 33, 4000):
            for elements in (512, 8192, 2**30):
                products = product_blocks(gpu.sms, N, None, elements)
                assert 1 <= products <= 2 * gpu.sms
                assert products <= max(1, elements // 4096)
