"""Integers that say where rows belong: ids and example ids of any dtype and layout, and values that are out of range."""

import math

import pytest
import torch

import zsl_kernels as zk

N, R, Q, K, O, V = 4, 30, 20, 7, 6, 9

# Every dtype, and every way in which an integer's place in memory is not its index.
DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
LAYOUTS = {
    "strided": lambda x: x.repeat_interleave(3, -1)[..., ::3],
    "column": lambda x: torch.stack([torch.full_like(x, 100), x, torch.full_like(x, 101)], -1)[..., 1],
    "offset": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    "permuted": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "expanded": lambda x: x[..., :1].expand(x.shape),
}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(high, *shape, seed=0, low=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def ragged(call):
    """A call on (R, ·) rows, of ``example_ids``."""
    return {"example_ids": integers(N, R)}, lambda ids, impl: call({"num_examples": N, "impl": impl, **ids})


def of_embedding(ids, **options):
    """An embedding's rows (N, ·) of ids (N, T), or with example ids rows (R,)."""
    b = draw(*ids["ids"].shape, K)
    rest = {"num_examples": N, "example_ids": ids["example_ids"]} if "example_ids" in ids else {}
    return zk.embedding_interference(ids["ids"], b, V, direction=draw(V, K), gram=True, **rest, **options)


def tied(ids, impl):
    return zk.interference(draw(N, 5, K), draw(N, 5, O), embedding=(ids["ids"], draw(N, 5, K)), impl=impl)


def ragged_and_tied(ids, impl):
    embedding = ids["ids"], draw(Q, K), ids["embedding examples"]
    options = {"example_ids": ids["example_ids"], "num_examples": N, "impl": impl}
    return zk.interference(draw(R, K), draw(R, O), embedding=embedding, **options)


# By name: the integers of a call as they are in memory as a rule, and the call.
CALLS = {
    "interference": ragged(lambda o: zk.interference(draw(R, K), draw(R, O), direction=draw(O, K), gram=True, **o)),
    "gram": ragged(lambda o: zk.gram(draw(R, K), draw(R, O), **o)),
    "dot": ragged(lambda o: zk.dot(draw(R, K), draw(R, O), draw(O, K), **o)),
    "sq_norm": ragged(lambda o: zk.sq_norm(draw(R, K), draw(R, O), **o)),
    "weighted_grad": ragged(lambda o: zk.weighted_grad(draw(R, K), draw(R, O), draw(N), **o)),
    "bias_grad": ragged(lambda o: zk.bias_grad(draw(R, K), **o)),
    "scale_grad": ragged(lambda o: zk.scale_grad(draw(R, K), draw(R, K, seed=1), mean=draw(R), **o)),
    "scale_bias_grad": ragged(lambda o: zk.scale_bias_grad(draw(R, K), draw(R, K, seed=1), rstd=draw(R), **o)),
    "embedding_interference": ({"ids": integers(V, N, 5)}, lambda ids, impl: of_embedding(ids, impl=impl, padding_idx=-1)),
    "embedding_interference, 3-D": ({"ids": integers(V, N, 3, 2)}, lambda ids, impl: of_embedding(ids, impl=impl)),
    "embedding_interference, ragged": (
        {"ids": integers(V, R), "example_ids": integers(N, R, seed=1)},
        lambda ids, impl: of_embedding(ids, impl=impl),
    ),
    "interference, tied": ({"ids": integers(O, N, 5)}, tied),
    "interference, ragged and tied": (
        {"example_ids": integers(N, R), "ids": integers(O, Q), "embedding examples": integers(N, Q, seed=1)},
        ragged_and_tied,
    ),
}
EACH = [(call, name) for call, (ids, _) in CALLS.items() for name in ids]
each_operand = pytest.mark.parametrize(("call", "operand"), EACH, ids=["-".join(each) for each in EACH])


def flat(result):
    return [x for x in result if x is not None] if isinstance(result, tuple) else [result]


def assert_same(found, want):
    assert len(flat(found)) == len(flat(want))
    for x, y in zip(flat(found), flat(want), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x, y)


@each_operand
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_any_layout(layout, call, operand, impl):
    ids, function = CALLS[call]
    changed = {**ids, operand: LAYOUTS[layout](ids[operand])}
    plain = {**ids, operand: changed[operand].clone(memory_format=torch.contiguous_format)}
    assert layout == "offset" or ids[operand].ndim == 1 or not changed[operand].is_contiguous()
    for form in (impl, "reference"):
        assert_same(function(changed, form), function(plain, form))


@each_operand
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_any_integer_dtype(dtype, call, operand, impl):
    ids, function = CALLS[call]
    narrow = ids[operand].to(dtype)
    for form in (impl, "reference"):
        want = function(ids, form)
        assert_same(function({**ids, operand: narrow}, form), want)
        # Strided and narrow: the distance of elements is not that of int64.
        assert_same(function({**ids, operand: torch.stack([narrow, narrow], -1)[..., 0]}, form), want)


@each_operand
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (100, torch.int64),
        (100, torch.int32),
        (2**40, torch.int64),
        (2**64 - 1, torch.uint64),
        (-1, torch.int64),
        (-(2**62), torch.int64),
    ],
    ids=str,
)
@pytest.mark.parametrize("strided", [False, True])
def test_values_out_of_range_are_named(strided, value, dtype, call, operand, impl, request):
    """On the CPU, where looking does not wait; negative ids of an embedding are skipped instead."""
    if request.node.callspec.params["impl"].endswith("@cuda"):
        pytest.skip("looking would wait; a device stops at such a value, and with it the process")
    ids, function = CALLS[call]
    bad = ids[operand].to(dtype, copy=True)
    bad.view(-1)[3] = torch.tensor(value, dtype=dtype)
    if strided:
        bad = torch.stack([bad, bad], -1)[..., 0]
    size = {"ids": O if "tied" in call else V}.get(operand, N)
    name = {"embedding examples": "embedding: example ids", "ids": "embedding: ids" if "tied" in call else "ids"}
    for form in (impl, "reference"):
        if operand == "ids" and value < 0:
            skipped = function({**ids, operand: bad}, form)
            want = function({**ids, operand: torch.where(bad < 0, -5, bad)}, form)
            assert_same(skipped, want)
            continue
        with pytest.raises(IndexError) as raised:
            function({**ids, operand: bad}, form)
        message = f"{name.get(operand, operand)}: expected values in [0, {size}), got {value}"
        assert message in str(raised.value)


@pytest.mark.parametrize("call", ["bias_grad", "scale_grad", "scale_bias_grad", "embedding_interference, ragged", "interference"])
def test_derivatives_of_any_layout_and_dtype(call, impl):
    """The integers are kept for the way back."""

    def gradients(example_ids):
        leaves = [draw(R, K).requires_grad_(), draw(R, K, seed=1).requires_grad_()]
        options = {"example_ids": example_ids, "num_examples": N, "impl": impl}
        if call == "bias_grad":
            found = zk.bias_grad(leaves[0], **options)
        elif call.startswith("scale"):
            found = getattr(zk, call)(*leaves, **options)
        elif call == "interference":
            found = zk.interference(*leaves, **options)
        else:
            found = zk.embedding_interference(integers(V, R), leaves[0], V, **options)
        sum(x.square().sum() for x in flat(found) if x.is_floating_point()).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    ids = integers(N, R)
    for changed in (ids.int(), ids.to(torch.uint8), ids.repeat_interleave(2)[::2], torch.stack([ids, ids], -1).int()[:, 0]):
        for x, y in zip(gradients(changed), gradients(ids), strict=True):
            assert torch.equal(x, y)


def test_ids_of_an_op_that_is_called_by_itself(impl):
    """The registered ops take what the public functions take."""
    ids, b, example_ids = integers(V, 1, R), draw(1, R, K), integers(N, R, seed=1)
    if impl in ("triton", "cuda"):
        pytest.skip("the registered ops are not moved to a device")
    want = torch.ops.zsl.embedding_interference(ids, b, example_ids, N, V, -1, None, True, impl)
    narrow = ids.int().repeat_interleave(2, 1)[:, ::2], b, example_ids.to(torch.int16)
    for x, y in zip(torch.ops.zsl.embedding_interference(*narrow, N, V, -1, None, True, impl), want, strict=True):
        assert torch.equal(x, y)
    want = torch.ops.zsl.scale_bias_grad(None, b, None, None, example_ids, N, True, impl)[1]
    assert torch.equal(torch.ops.zsl.scale_bias_grad(None, b, None, None, example_ids.int(), N, True, impl)[1], want)


# The Gram of embeddings that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["dimension", "example ids"])
def test_grams_of_embeddings_that_are_not_finite(given, dtype, value, impl):
    """Zero times what is not finite is NaN: an example's whole gradient is zero in the rows that it does not touch."""
    ids = torch.tensor([[0, 1, 1], [2, 2, 3], [0, 5, 5], [4, 4, 4]])
    b = draw(4, 3, K, dtype=torch.float64).to(dtype)
    b[0, 1, 2] = value  # in row 1, which example 0 alone touches
    options = {"gram": True}
    if given:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
        options |= {"example_ids": (torch.arange(12) // 3)[order], "num_examples": 4}
        ids, b = ids.flatten()[order], b.flatten(0, 1)[order]
    want = zk.embedding_interference(ids, b, V, impl="reference", **options).gram
    found = zk.embedding_interference(ids, b, V, impl=impl, **options).gram
    assert want[0, 1:].isnan().all()
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.isinf(), want.isinf())
    assert found.isfinite()[1:, 1:].all()
    assert torch.equal(found.isnan(), found.isnan().T)


def test_a_row_that_all_touch_has_products(impl):
    """There the kernel multiplies: infinity times one is infinity."""
    ids, b = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, K)
    b[1, 0, 0] = math.inf
    gram = zk.embedding_interference(ids, b, V, gram=True, impl=impl).gram
    want = zk.embedding_interference(ids, b, V, gram=True, impl="reference").gram
    assert torch.equal(gram, want)
    assert gram[0, 1] == math.inf
