"""embedding_interference against its definition with one-hot rows."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import zsl_kernels as zk
from tests import error_budgets
from tests.inputs import DTYPES, LAYOUTS, VALUES, assert_exact, assert_within_budget, expectations, sums_of
from zsl_kernels.backends import dispatch
from zsl_kernels.types import sum_dtype

ONE_OF_EACH = pytest.mark.parametrize("impl", ["chunked", "cpu"], indirect=True)


@dataclass(frozen=True)
class Case:
    """N examples of T positions, K features, V rows."""

    N: int
    T: int
    K: int
    V: int
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    values: str = "normal"
    ragged: bool = False

    def make(self):
        generator = torch.Generator().manual_seed(0)
        lay, draw = LAYOUTS[self.layout], VALUES[self.values]
        # The lowest rows are common, the highest rare.
        ids = (torch.rand(self.N, self.T, generator=generator) ** 2 * self.V).long()
        b = lay(draw((1 if self.layout == "shared" else self.N, self.T, self.K), generator).to(self.dtype))
        b, u = b.expand(self.N, -1, -1), lay(draw((self.V, self.K), generator).to(self.dtype))
        options = {"direction": u, "gram": True}
        if self.ragged:
            example_ids = torch.randint(0, self.N + 1, (self.N * self.T,), generator=generator)  # some examples have none
            options |= {"example_ids": example_ids, "num_examples": self.N + 2}
            ids, b = ids.reshape(-1), b.flatten(0, 1)
        return ids, b, options

    def call(self, impl, ids, b, options, **more):
        return zk.embedding_interference(ids, b, self.V, impl=impl, **options, **more)


def fields(sums):
    return {name: x for name, x in sums._asdict().items() if x is not None}


def definition(ids, b, *, direction, example_ids=None, num_examples=None, padding_idx=None, **_):
    K, dtype = b.shape[-1], sum_dtype(b.dtype)
    example = torch.arange(ids.shape[0]).repeat_interleave(math.prod(ids.shape[1:])) if example_ids is None else example_ids.long()
    N, flat = ids.shape[0] if num_examples is None else num_examples, ids.reshape(-1).long()
    used = (flat >= 0) & (flat != (-1 if padding_idx is None else padding_idx))
    rows = flat[used].unique()
    onehot = ((flat[:, None] == rows) & used[:, None]).to(dtype)
    member = (example[:, None] == torch.arange(N)).to(dtype)
    g = torch.einsum("pn,pu,pk->nuk", member, onehot, b.reshape(flat.shape[0], K).to(dtype))
    return rows, sums_of(g, None if direction is None else direction[rows])


def expected(ids, b, options):
    rest = {name: x for name, x in options.items() if name != "direction"}
    tensors = {"b": b, "direction": options["direction"]}
    return expectations(lambda x: definition(ids, x["b"], direction=x["direction"], **rest)[1], tensors, errors(ids, b, options))


def most_rows(ids, options):
    """Of one example."""
    return int(options["example_ids"].long().bincount().max()) if "example_ids" in options else math.prod(ids.shape[1:])


def errors(ids, b, options):
    N, (V, K) = options.get("num_examples", ids.shape[0]), options["direction"].shape
    return error_budgets.embedding(N, most_rows(ids, options), K, V, sum_dtype(b.dtype))


def check(got, ids, b, options):
    assert torch.equal(got.rows, definition(ids, b, **options)[0])
    for name, e in expected(ids, b, options).items():
        assert_within_budget(getattr(got, name), e, name)


SIZES = {
    "one number": (1, 1, 1, 1),
    "few": (3, 5, 7, 4),
    "all one row": (6, 9, 33, 1),
    "one row, examples past the Gram's panels": (70, 2, 21, 1),
    "past one block": (3, 8, 1030, 3),
    "past two blocks": (2, 5, 2100, 2),
    "many positions of one row": (2, 300, 33, 2),
    "many examples": (300, 1, 20, 5),
    "nearly distinct": (4, 30, 40, 5000),
    "on a vector": (4, 16, 64, 9),
}
CASES = [
    *(Case(*size) for size in SIZES.values()),
    *(Case(3, 11, 35, 6, dtype=dtype, layout=layout) for dtype in DTYPES for layout in LAYOUTS),
    *(Case(5, 40, 45, 9, dtype=dtype, values="wide") for dtype in DTYPES),
    *(Case(3, 11, 35, 6, dtype=dtype, layout=layout, ragged=True) for dtype in DTYPES for layout in ("contiguous", "sliced")),
    Case(2, 300, 1030, 2, ragged=True),
    # 16 bytes at a time, past a warp's columns; one row that is touched by far most often, by one example and by many.
    *(Case(3, 11, 264, 6, dtype=dtype) for dtype in DTYPES),
    *(Case(*size, V=1) for size in ((1, 3000, 12), (60, 50, 12))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stays_in_the_error_budget(case, impl):
    ids, b, options = case.make()
    check(case.call(impl, ids, b, options), ids, b, options)


def test_the_reference_is_the_definition():
    for ragged in (False, True):
        case = Case(3, 11, 35, 6, ragged=ragged)
        ids, b, options = case.make()
        check(case.call("reference", ids, b, options, padding_idx=2), ids, b, {**options, "padding_idx": 2})


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_exact_on_integers(dtype, layout, ragged, impl):
    case = Case(6, 40, 37, 8, dtype=dtype, layout=layout, values="integers", ragged=ragged)
    ids, b, options = case.make()
    got = case.call(impl, ids, b, options)
    for name, e in expected(ids, b, options).items():
        assert_exact(getattr(got, name), e, name)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_ids_of_any_integer_dtype(dtype, impl):
    case = Case(3, 11, 35, 6, ragged=True)
    ids, b, options = case.make()
    want = case.call(impl, ids, b, options)
    narrow = {**options, "example_ids": options["example_ids"].to(dtype)}
    for name, field in fields(case.call(impl, ids.to(dtype), b, narrow)).items():
        assert torch.equal(field, getattr(want, name)), name


@pytest.mark.parametrize("padding_idx", [0, 3, 5, -1, -6])
def test_padding_and_negative_ids_are_absent(padding_idx, impl):
    case = Case(4, 20, 35, 6)
    ids, b, options = case.make()
    ids[1:3, ::4] = -7
    b[ids == padding_idx % 6] = math.nan
    b[ids < 0] = math.nan
    got = case.call(impl, ids, b, options, padding_idx=padding_idx)
    assert not (got.rows == padding_idx % 6).any()
    check(got, ids, b.nan_to_num(), {**options, "padding_idx": padding_idx % 6})


def test_of_absent_positions_alone_nothing_is_touched(impl):
    got = zk.embedding_interference(torch.full((3, 4), 2), torch.ones(3, 4, 5), 7, padding_idx=2, gram=True, impl=impl)
    assert got.rows.shape == (0,)
    assert got.grad_sum.shape == (0, 5)
    assert torch.equal(got.l1, torch.zeros(3))
    assert torch.equal(got.gram, torch.zeros(3, 3))


@pytest.mark.parametrize("size", [(0, 4, 5, 6), (3, 0, 5, 6), (3, 4, 0, 6), (3, 0, 5, 0)], ids=str)
def test_of_nothing_is_zero(size, impl):
    N, T, K, V = size
    ids = torch.zeros(N, T, dtype=torch.int64)
    sums = zk.embedding_interference(ids, torch.ones(N, T, K), V, direction=torch.ones(V, K), gram=True, impl=impl)
    U = int(N * T > 0)
    for name, field in fields(sums).items():
        want = {"rows": (U,), "gram": (N, N)}.get(name, (U, K) if name.endswith("_sum") else (N,))
        assert field.shape == want, name
        assert not field.any(), name


@pytest.mark.parametrize("shape", [(5,), (5, 2, 3)], ids=str)
def test_positions_may_have_any_number_of_dimensions(shape, impl):
    ids, b = torch.arange(math.prod(shape)).view(shape) % 4, torch.randn(*shape, 6)
    got = zk.embedding_interference(ids, b, 4, gram=True, impl=impl)
    want = zk.embedding_interference(ids.reshape(5, -1), b.reshape(5, -1, 6), 4, gram=True, impl=impl)
    for name, field in fields(got).items():
        assert torch.equal(field, getattr(want, name)), name


def test_rows_of_examples_in_any_order_are_the_batch(impl):
    """A batch as rows, shuffled, with example ids."""
    case = Case(5, 20, 35, 6)
    ids, b, options = case.make()
    want = case.call(impl, ids, b, options)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    example_ids = torch.arange(5).repeat_interleave(20)[order]
    got = zk.embedding_interference(
        ids.view(-1)[order], b.flatten(0, 1)[order], 6, example_ids=example_ids, num_examples=5, impl=impl, **options
    )
    for name, field in fields(got).items():
        torch.testing.assert_close(field, getattr(want, name), rtol=1e-5, atol=1e-5)


def test_memory_follows_the_touched_rows(impl):
    """(V, K) would take 31 GB for each sum; the largest row is beyond 32 bits of elements."""
    V, N, T, K = 10_000_019, 3, 8, 768
    ids = torch.randint(0, V, (N, T), generator=torch.Generator().manual_seed(0))
    ids[1, 2] = ids[2, 3] = V - 1
    b = torch.randn(N, T, K, generator=torch.Generator().manual_seed(0))
    got = zk.embedding_interference(ids, b, V, gram=True, impl=impl)
    rows, small = ids.unique(return_inverse=True)
    want = zk.embedding_interference(small, b, rows.shape[0], gram=True, impl=impl)
    assert torch.equal(got.rows, rows)
    for name, field in fields(want).items():
        assert name == "rows" or torch.equal(getattr(got, name), field), name


def test_ids_that_are_out_of_range_are_skipped_where_nobody_looks():
    """On a device, whose values the host does not read: nothing past the weight or the examples is touched."""
    ids, examples = torch.tensor([[0, 5, 2, 1, 2**62, 1]]), torch.tensor([0, 1, 2, -1, 0, 7])
    b, u = torch.ones(1, 6, 4), torch.ones(3, 4)
    sums = dispatch.CHUNKED.embedding_interference(ids, b, examples, 2, 3, -1, u, True, None)
    assert sums.rows.tolist() == [0]
    assert sums.l1.tolist() == [4, 0]
    assert sums.gram.tolist() == [[4, 0], [0, 0]]


def test_only_what_was_asked_for(impl):
    ids, b, options = Case(3, 11, 35, 6).make()
    everything = zk.embedding_interference(ids, b, 6, impl=impl, **options)
    for direction in (None, options["direction"]):
        for gram in (False, True):
            sums = zk.embedding_interference(ids, b, 6, direction=direction, gram=gram, impl=impl)
            assert (sums.dot is None) == (sums.abs_dot is None) == (direction is None)
            assert (sums.gram is None) == (not gram)
            for name, field in fields(sums).items():
                torch.testing.assert_close(field, getattr(everything, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_stays_where_it_is(value, impl):
    ids, b, options = Case(4, 9, 35, 6).make()
    b[1, 2, 34] = value
    want = definition(ids, b.nan_to_num(0, 0, 0), **options)[1]
    got = zk.embedding_interference(ids, b, 6, impl=impl, **options)
    row = int((got.rows == ids[1, 2]).nonzero())
    for name in ("grad_sum", "abs_sum", "sq_sum"):
        bad = torch.zeros_like(want[name], dtype=torch.bool)
        bad[row, 34] = True
        assert torch.equal(~getattr(got, name).isfinite(), bad), name
    for name in ("l1", "sq_norm", "dot", "abs_dot"):
        assert (~getattr(got, name).isfinite()).tolist() == [False, True, False, False], name
    touches = torch.tensor([bool((ids[n] == ids[1, 2]).any()) for n in range(4)])
    unharmed = ~(touches[:, None] & touches) | (torch.arange(4)[:, None] != 1) & (torch.arange(4) != 1)
    assert got.gram[unharmed].isfinite().all()
    assert not got.gram[1, 1].isfinite()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("V", [1, 7, 300])
def test_threads_change_rounding_at_most_and_repetition_nothing(V, count, threads, impl):
    threads(count)
    case = Case(9, 40, 400, V)
    ids, b, options = case.make()
    first = case.call(impl, ids, b, options)
    check(first, ids, b, options)
    for _ in range(3):
        for name, field in fields(case.call(impl, ids, b, options)).items():
            assert torch.equal(field, getattr(first, name)), name


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("more", [0, 1, 30])
def test_max_rows_pads_what_comes_without_it(more, ragged, impl):
    """To the bit, but for the Gram. As many as can be touched, and more; fewer are in the test below."""
    case = Case(4, 20, 35, 6, ragged=ragged)
    ids, b, options = case.make()
    ids[ids == 4] = -1
    want = case.call(impl, ids, b, options, padding_idx=2)
    U = want.rows.shape[0]
    assert U < 6
    for _ in range(2):  # the second call goes the short way
        got = case.call(impl, ids, b, options, padding_idx=2, max_rows=6 + more)
        assert got.rows.tolist() == [*want.rows.tolist(), *[-1] * (6 + more - U)]
        for name, field in fields(got).items():
            if name.endswith("_sum"):
                assert field.shape == (6 + more, 35)
                assert not field[U:].any()
                field = field[:U]
            if name == "gram":  # products over zeros besides, and so in another order
                torch.testing.assert_close(field, want.gram, rtol=1e-5, atol=1e-4)
            else:
                assert name == "rows" or torch.equal(field, getattr(want, name)), name


@pytest.mark.parametrize("size", [(0, 4, 5, 6), (3, 0, 5, 6), (3, 4, 0, 6), (3, 0, 5, 0)], ids=str)
def test_max_rows_of_nothing(size, impl):
    N, T, K, V = size
    ids = torch.full((N, T), -1)
    sums = zk.embedding_interference(ids, torch.ones(N, T, K), V, direction=torch.ones(V, K), gram=True, max_rows=12, impl=impl)
    assert torch.equal(sums.rows, torch.full((12,), -1))
    for name, field in fields(sums).items():
        want = {"rows": (12,), "gram": (N, N)}.get(name, (12, K) if name.endswith("_sum") else (N,))
        assert field.shape == want, name
        assert name == "rows" or not field.any(), name


def test_on_the_cpu_max_rows_may_be_what_is_touched(impl):
    ids, b = torch.tensor([[5, 3, 5], [3, 9, -1]]), torch.ones(2, 3, 4)
    try:
        assert zk.embedding_interference(ids, b, 50, max_rows=3, impl=impl).rows.tolist() == [3, 5, 9]
    except ValueError as error:
        assert "max_rows: expected at least 6 on cuda" in str(error)  # noqa: PT017
    for _ in range(2):
        with pytest.raises(ValueError, match="max_rows: expected at least"):
            zk.embedding_interference(ids, b, 50, max_rows=2, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_directions_of_any_dtype(dtype, impl):
    case = Case(3, 11, 35, 6)
    ids, b, options = case.make()
    u = options["direction"].to(dtype)
    got, want = (case.call(name, ids, b, {"direction": x}) for name, x in ((impl, u), ("reference", u.float())))
    torch.testing.assert_close(got.dot, want.dot, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.abs_dot, want.abs_dot, rtol=1e-5, atol=1e-4)


def test_rows_past_31_bits_are_told_apart(impl):
    """Also with the examples, by which a key is multiplied."""
    V = 2**40
    ids = torch.tensor([[V - 1, 2**31, 2**32], [2**32, 5, V - 1], [5 + 2**32, 2**31, 5]])
    b = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0))
    got = zk.embedding_interference(ids, b, V, gram=True, impl=impl)
    rows, small = ids.unique(return_inverse=True)
    want = zk.embedding_interference(small, b, rows.shape[0], gram=True, impl="reference")
    assert torch.equal(got.rows, rows)
    for name, field in fields(want).items():
        if name != "rows":
            torch.testing.assert_close(getattr(got, name), field, rtol=1e-5, atol=1e-5)


def test_gram_is_symmetric_to_the_bit(impl):
    ids, b, options = Case(37, 20, 130, 9).make()
    gram = zk.embedding_interference(ids, b, 9, impl=impl, **options).gram
    assert torch.equal(gram, gram.T)


def test_inputs_are_left_as_they_were(impl):
    ids, b, options = Case(3, 11, 35, 6, layout="sliced", ragged=True).make()
    before = [x.clone() for x in (ids, b, options["direction"], options["example_ids"])]
    zk.embedding_interference(ids, b, 6, impl=impl, **options)
    for x, y in zip((ids, b, options["direction"], options["example_ids"]), before, strict=True):
        assert torch.equal(x, y)


def leaves_of(case):
    ids, b, options = case.make()
    return ids, b.contiguous().requires_grad_(), {**options, "direction": options["direction"].contiguous().requires_grad_()}


@ONE_OF_EACH
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("wanted", [("b",), ("direction",), ("b", "direction")], ids=str)
def test_gradcheck(wanted, ragged, impl):
    ids, b, options = Case(3, 5, 4, 4, dtype=torch.float64, ragged=ragged).make()
    ids[0] = -1
    leaves = {"b": b, "direction": options.pop("direction")}

    def function(*tensors):
        x = {**leaves, **dict(zip(wanted, tensors, strict=True))}
        sums = zk.embedding_interference(ids, x["b"], 4, direction=x["direction"], padding_idx=1, impl=impl, **options)
        return tuple(field for field in sums if field.requires_grad)

    assert torch.autograd.gradcheck(function, [leaves[name].requires_grad_() for name in wanted])


@ONE_OF_EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("field", zk.EmbeddingSums._fields[1:])
def test_each_fields_derivative_is_the_definitions(field, dtype, impl):
    case = Case(4, 9, 33, 5, dtype=dtype)
    ids, b, options = leaves_of(case)
    u = options["direction"]
    got = torch.autograd.grad(getattr(case.call(impl, ids, b, options), field).square().sum(), (b, u), allow_unused=True)

    def derivatives(x):
        leaves = [x[name].detach().requires_grad_() for name in ("b", "direction")]
        truth = definition(ids, leaves[0], **{**options, "direction": leaves[1]})[1][field].square().sum()
        return dict(zip(("b", "direction"), torch.autograd.grad(truth, leaves, allow_unused=True), strict=True))

    of_square = error_budgets.gradients_of_square(field, errors(ids, b, options), error_budgets.chain(case.T), case.N)
    tensors = {"b": b.detach(), "direction": u.detach()}
    named = {"b": of_square["g"], "direction": of_square["direction"]}
    want = expectations(derivatives, tensors, named, dict.fromkeys(tensors, dtype))
    for name, x in zip(tensors, got, strict=True):
        assert (x is not None) == (name in want)
        if x is not None:
            assert_within_budget(x, want[name], name)


@ONE_OF_EACH
def test_the_derivative_of_a_gram_in_slabs(impl, monkeypatch):
    """The portable forms hold every example's rows for some rows at a time: here for one."""
    case = Case(4, 9, 33, 5, dtype=torch.float64)
    ids, b, options = leaves_of(case)
    want = case.call("reference", ids, b, options).gram
    (want_b,) = torch.autograd.grad(want.square().sum(), b)
    monkeypatch.setattr("zsl_kernels.backends.chunked.embedding.CHUNKED_BYTES", 1)
    got = case.call(impl, ids, b, options).gram
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), b)[0], want_b)


@ONE_OF_EACH
def test_rows_that_nobody_touches_count_for_nothing_in_a_derivative(impl):
    case = Case(4, 9, 33, 7, dtype=torch.float64)
    ids, b, options = leaves_of(case)
    leaves = (b, options["direction"])
    ids[ids == 3] = 2
    weights = torch.randn(9, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = [case.call(impl, ids, b, options, max_rows=max_rows) for max_rows in (None, 9)]
    for field in zk.EmbeddingSums._fields[1:]:
        found = []
        for sums in results:
            x = getattr(sums, field)
            total = (x.square() * weights[: x.shape[0]]).sum() if field.endswith("_sum") else x.square().sum()
            found.append(torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True))
        for x, y in zip(*found, strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x, y), field


@ONE_OF_EACH
def test_second_derivatives_are_refused(impl):
    case = Case(3, 5, 4, 4, dtype=torch.float64)
    ids, b, options = leaves_of(case)
    (first,) = torch.autograd.grad(case.call(impl, ids, b, options).sq_norm.square().sum(), b, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        first.sum().backward()


@ONE_OF_EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(ragged, dtype, impl):
    ids, b, options = leaves_of(Case(3, 5, 4, 4, dtype=dtype, ragged=ragged))
    u, example_ids, N = options["direction"], options.get("example_ids"), options.get("num_examples", 3)
    if ragged:
        ids, b = ids.unsqueeze(0), b.detach().unsqueeze(0).requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float64:
        checks.append("test_aot_dispatch_dynamic")
    op = torch.ops.zsl.embedding_interference.default
    for direction, gram in ((None, False), (u, True)):
        for max_rows in ((), (None,), (7,)):
            opcheck(op, (ids, b, example_ids, N, 4, -1, direction, gram, impl, *max_rows), test_utils=checks)
    sums = op(ids, b.detach(), example_ids, N, 4, 2, u.detach(), True, impl)
    cotangents = [torch.ones_like(x) for x in sums[:8]]
    for want in ((True, True), (True, False), (False, True)):
        arguments = (ids, b.detach(), example_ids, N, 4, 2, u.detach(), *cotangents, *want)
        opcheck(torch.ops.zsl.embedding_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    """How many rows are touched depends on values: torch wants to be told that a graph may have such sizes."""
    torch._dynamo.reset()
    case = Case(3, 5, 4, 4, dtype=torch.float64)
    ids, b, options = leaves_of(case)

    def function(ids, b, u):
        return tuple(zk.embedding_interference(ids, b, 4, direction=u, gram=True, padding_idx=1))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for given in (ids, torch.zeros_like(ids)):
            results = [f(given, b, options["direction"]) for f in (compiled, function)]
            torch.testing.assert_close(*results)
            grads = [torch.autograd.grad(sum(x.sum() for x in r[1:]), (b, options["direction"])) for r in results]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_with_max_rows_compiles_as_one_graph_without_a_setting(dynamic, impl):
    torch._dynamo.reset()
    case = Case(3, 5, 4, 4, dtype=torch.float64)
    ids, b, options = leaves_of(case)
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops

    def function(ids, b, u):
        return tuple(zk.embedding_interference(ids, b, 4, direction=u, gram=True, padding_idx=1, max_rows=6, impl=impl))

    if impl == "reference":  # which is plain PyTorch, whose shapes depend on values
        assert function(ids, b, options["direction"])[0].shape == (6,)
        return
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for given in (ids, torch.zeros_like(ids)):
        results = [f(given, b, options["direction"]) for f in (compiled, function)]
        torch.testing.assert_close(*results)
        grads = [torch.autograd.grad(sum(x.sum() for x in r[1:]), (b, options["direction"])) for r in results]
        torch.testing.assert_close(*grads)


ZEROS = {"ids": torch.zeros(3, 4, dtype=torch.int64), "b": torch.zeros(3, 4, 5), "num_embeddings": 7}
RAGGED = {
    "ids": torch.zeros(6, dtype=torch.int64),
    "b": torch.zeros(6, 5),
    "num_embeddings": 7,
    "example_ids": torch.zeros(6, dtype=torch.int64),
    "num_examples": 3,
}


@pytest.mark.parametrize(
    ("good", "change", "error", "words"),
    [
        (ZEROS, {"ids": [0]}, TypeError, ["ids:", "Tensor", "list"]),
        (ZEROS, {"ids": torch.zeros(3, 4)}, TypeError, ["ids:", "integers", "float32"]),
        (ZEROS, {"ids": torch.zeros(3, 4, dtype=torch.bool)}, TypeError, ["ids:", "integers", "bool"]),
        (ZEROS, {"b": None}, TypeError, ["b:", "Tensor", "NoneType"]),
        (ZEROS, {"b": torch.zeros(3, 4, 5, dtype=torch.int64)}, TypeError, ["b:", "float32", "int64"]),
        (ZEROS, {"b": torch.zeros(3, 5)}, ValueError, ["b:", "(3, 4)", "(3, 5)"]),
        (ZEROS, {"b": torch.zeros(3, 4)}, ValueError, ["b:", "(3, 4)", "K"]),
        (ZEROS, {"ids": torch.tensor(1), "b": torch.zeros(5)}, ValueError, ["ids:", "(N, ...)", "()"]),
        (ZEROS, {"b": torch.zeros(3, 4, 5, device="meta")}, ValueError, ["ids:", "meta", "cpu"]),
        (ZEROS, {"num_embeddings": 7.0}, TypeError, ["num_embeddings:", "integer", "float"]),
        (ZEROS, {"num_embeddings": -1}, ValueError, ["num_embeddings:", ">= 0", "-1"]),
        (ZEROS, {"ids": torch.full((3, 4), 7)}, IndexError, ["ids:", "[0, 7)", "got 7"]),
        (ZEROS, {"padding_idx": 7}, ValueError, ["padding_idx:", "-7 to 6", "got 7"]),
        (ZEROS, {"padding_idx": -8}, ValueError, ["padding_idx:", "-7 to 6", "got -8"]),
        (ZEROS, {"direction": torch.zeros(5, 7)}, ValueError, ["direction:", "(7, 5)", "(5, 7)"]),
        (ZEROS, {"direction": torch.zeros(7, 5, device="meta")}, ValueError, ["direction:", "cpu", "meta"]),
        (ZEROS, {"direction": 1.0}, TypeError, ["direction:", "Tensor", "float"]),
        (ZEROS, {"max_rows": 3.0}, TypeError, ["max_rows:", "integer", "float"]),
        (ZEROS, {"max_rows": -1}, ValueError, ["max_rows:", ">= 0", "-1"]),
        (ZEROS, {"max_rows": 0}, ValueError, ["max_rows:", "at least 1", "got 0"]),
        (ZEROS, {"num_examples": 3}, ValueError, ["num_examples:", "example_ids", "3"]),
        (ZEROS, {"impl": "fast"}, ValueError, ["impl:", "chunked", "'fast'"]),
        (RAGGED, {"num_examples": None}, ValueError, ["num_examples:", "None"]),
        (RAGGED, {"num_examples": "3"}, TypeError, ["num_examples:", "integer", "str"]),
        (RAGGED, {"example_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, ["example_ids:", "(6,)", "(5,)"]),
        (RAGGED, {"example_ids": torch.zeros(6)}, TypeError, ["example_ids:", "integers", "float32"]),
        (RAGGED, {"example_ids": torch.full((6,), 3)}, IndexError, ["example_ids:", "[0, 3)", "3"]),
        (RAGGED, {"example_ids": torch.full((6,), -1)}, IndexError, ["example_ids:", "-1"]),
        (RAGGED, {"ids": torch.zeros(6, 1, dtype=torch.int64), "b": torch.zeros(6, 1, 5)}, ValueError, ["ids:", "(R,)", "(6, 1)"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
def test_bad_arguments(impl, good, change, error, words):
    arguments = {"impl": impl, **good, **change}
    with pytest.raises(error) as raised:
        zk.embedding_interference(arguments.pop("ids"), arguments.pop("b"), arguments.pop("num_embeddings"), **arguments)
    assert all(word in str(raised.value) for word in words), raised.value


def test_on_a_device_max_rows_must_be_enough_for_any_ids():
    """Looking at them would be to wait. Such a call traces without a device."""
    with FakeTensorMode():
        ids, b = torch.zeros(3, 4, dtype=torch.int64, device="cuda"), torch.zeros(3, 4, 5, device="cuda")
        for V, most in ((50, 12), (7, 7)):
            with pytest.raises(ValueError, match=f"max_rows: expected at least {most} on cuda"):
                zk.embedding_interference(ids, b, V, max_rows=most - 1)
            sums = zk.embedding_interference(ids, b, V, max_rows=most)
            assert sums.rows.shape == (most,)
            assert sums.grad_sum.shape == (most, 5)


def test_tensors_without_data_are_refused():
    with pytest.raises(ValueError, match="touched rows depend"):
        zk.embedding_interference(torch.zeros(3, 4, dtype=torch.int64, device="meta"), torch.zeros(3, 4, 5, device="meta"), 7)
