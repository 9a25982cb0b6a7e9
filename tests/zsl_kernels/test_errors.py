"""Bad arguments: the error's type, and that its message names the argument, what was expected and what came."""

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import CALLS, Problem
from zsl_kernels.backends import cpu, dispatch

N, T, K, O, M = 3, 4, 5, 6, 2


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


GOOD = {
    "a": zeros(N, T, K),
    "b": zeros(N, T, O),
    "direction": zeros(O, K),
    "weights": zeros(N),
    "a2": zeros(M, T, K),
    "b2": zeros(M, T, O),
}
FUNCTIONS = {
    "interference": lambda x, **o: zk.interference(x["a"], x["b"], direction=x["direction"], **o),
    "gram": lambda x, **o: zk.gram(x["a"], x["b"], **o),
    "cross gram": lambda x, **o: zk.gram(x["a"], x["b"], x["a2"], x["b2"], **o),
    "dot": lambda x, **o: zk.dot(x["a"], x["b"], x["direction"], **o),
    "sq_norm": lambda x, **o: zk.sq_norm(x["a"], x["b"], **o),
    "weighted_grad": lambda x, **o: zk.weighted_grad(x["a"], x["b"], x["weights"], **o),
}
PAIR = list(FUNCTIONS)

# Functions, what is changed, the error, and words of its message: the argument, the expected, the given.
CASES = [
    (PAIR, {"a": [[1.0]]}, TypeError, ["a:", "Tensor", "list"]),
    (PAIR, {"b": None}, TypeError, ["b:", "Tensor", "NoneType"]),
    (PAIR, {"a": zeros(N, T, K, dtype=torch.int64)}, TypeError, ["a:", "float32", "int64"]),
    (PAIR, {"b": zeros(N, T, O, dtype=torch.complex64)}, TypeError, ["b:", "float32", "complex64"]),
    (PAIR, {"a": zeros(T, K)}, ValueError, ["a:", "N, T, K", "(4, 5)", "unsqueeze"]),
    (PAIR, {"b": zeros(N, 1, T, O)}, ValueError, ["b:", "N, T, O", "(3, 1, 4, 6)"]),
    (PAIR, {"b": zeros(N, T, O, dtype=torch.bfloat16)}, TypeError, ["b:", "float32", "bfloat16"]),
    (PAIR, {"b": zeros(N, T, O, device="meta")}, ValueError, ["b:", "cpu", "meta"]),
    (PAIR, {"b": zeros(N + 1, T, O)}, ValueError, ["b:", "(3, 4, O)", "(4, 4, 6)"]),
    (PAIR, {"b": zeros(N, T + 1, O)}, ValueError, ["b:", "(3, 4, O)", "(3, 5, 6)"]),
    (["interference", "dot"], {"direction": 1.0}, TypeError, ["direction:", "Tensor", "float"]),
    (["interference", "dot"], {"direction": zeros(K, O)}, ValueError, ["direction:", "(6, 5)", "(5, 6)"]),
    (["interference", "dot"], {"direction": zeros(O * K)}, ValueError, ["direction:", "(6, 5)", "(30,)"]),
    (["interference", "dot"], {"direction": zeros(O, K, dtype=torch.int32)}, TypeError, ["direction:", "float32", "int32"]),
    (["interference", "dot"], {"direction": zeros(O, K, device="meta")}, ValueError, ["direction:", "cpu", "meta"]),
    (["weighted_grad"], {"weights": [1.0] * N}, TypeError, ["weights:", "Tensor", "list"]),
    (["weighted_grad"], {"weights": zeros(N, 1)}, ValueError, ["weights:", "(3,)", "(3, 1)"]),
    (["weighted_grad"], {"weights": zeros(N + 1)}, ValueError, ["weights:", "(3,)", "(4,)"]),
    (["weighted_grad"], {"weights": zeros(N, dtype=torch.bool)}, TypeError, ["weights:", "float32", "bool"]),
    (["weighted_grad"], {"weights": zeros(N, device="meta")}, ValueError, ["weights:", "cpu", "meta"]),
    (["cross gram"], {"b2": None}, ValueError, ["a2, b2:", "both", "a2 alone"]),
    (["cross gram"], {"a2": None}, ValueError, ["a2, b2:", "both", "b2 alone"]),
    (["cross gram"], {"a2": "x"}, TypeError, ["a2:", "Tensor", "str"]),
    (["cross gram"], {"a2": zeros(T, K)}, ValueError, ["a2:", "N, T, K", "(4, 5)"]),
    (["cross gram"], {"b2": zeros(M + 1, T, O)}, ValueError, ["b2:", "(2, 4, O)", "(3, 4, 6)"]),
    (["cross gram"], {"b2": zeros(M, T, O + 1)}, ValueError, ["b2:", "(M, 4, 6)", "(2, 4, 7)"]),
    (["cross gram"], {"a2": zeros(M, T, K + 1)}, ValueError, ["a2:", "(M, 4, 5)", "(2, 4, 6)"]),
    (["cross gram"], {"a2": zeros(M, 7, K), "b2": zeros(M, 7, O)}, ValueError, ["a2:", "(M, 4, 5)", "(2, 7, 5)"]),
    (
        ["cross gram"],
        {"a2": zeros(M, T, K, dtype=torch.float64), "b2": zeros(M, T, O, dtype=torch.float64)},
        TypeError,
        ["a2:", "float32", "float64"],
    ),
]
FLAT = [(name, change, error, words) for names, change, error, words in CASES for name in names]


def assert_raises(error, words, call, *args, **options):
    with pytest.raises(error) as raised:
        call(*args, **options)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(("name", "change", "error", "words"), FLAT, ids=[f"{c[0]}-{'-'.join(c[1])}-{c[3][-1]}" for c in FLAT])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_bad_operands(impl, name, change, error, words):
    assert_raises(error, words, FUNCTIONS[name], {**GOOD, **change}, impl=impl)


@pytest.mark.parametrize("name", PAIR)
def test_unknown_impl(name):
    assert_raises(ValueError, ["impl:", "chunked", "'fast'"], FUNCTIONS[name], GOOD, impl="fast")


@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("name", PAIR)
def test_a_backend_that_is_not_built_is_refused(name, impl):
    if dispatch.why_not(impl) is None:
        pytest.skip(f"{impl} is live")
    assert_raises(RuntimeError, ["impl:", impl, "not available"], FUNCTIONS[name], GOOD, impl=impl)


def test_a_library_that_was_not_built_is_refused_by_name_and_replaced_by_auto(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    reason = cpu._load()
    assert "not built" in reason
    assert "ZSL_BUILD_NATIVE" in reason
    monkeypatch.setattr(dispatch, "why_not", lambda impl, *_: reason if impl == "cpu" else None)
    assert zk.plan("gram", N=N, T=T, K=K, O=O).impl == "chunked"
    assert zk.gram(GOOD["a"], GOOD["b"]).shape == (N, N)
    assert_raises(RuntimeError, ["impl:", "cpu", reason], FUNCTIONS["gram"], GOOD, impl="cpu")


@pytest.mark.skipif(not zk.build_info()["cpu_isas"], reason="the CPU kernels are not live")
def test_cpu_kernels_refuse_tensors_elsewhere():
    elsewhere = {name: x.to("meta") for name, x in GOOD.items()}
    for name in PAIR:
        assert_raises(ValueError, ["impl:", "CPU", "meta"], FUNCTIONS[name], elsewhere, impl="cpu")


@pytest.mark.parametrize("call", CALLS)
def test_tensors_without_data_give_shapes(call):
    """The meta device runs the fakes: the same fields, shapes and dtypes as the results have."""
    x = Problem(N, T, K, O, M, dtype=torch.bfloat16).make()
    elsewhere = type(x)(**{name: tensor.to("meta") for name, tensor in x.tensors().items()})
    want = CALLS[call](x, "auto")
    for name, field in CALLS[call](elsewhere, "auto").items():
        assert field.is_meta
        assert (field.shape, field.dtype) == (want[name].shape, want[name].dtype)


SUMS = {"grad_sum": zeros(O, K), "abs_sum": zeros(O, K), "sq_sum": zeros(O, K), "direction": zeros(O, K)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"grad_sum": None}, TypeError, ["grad_sum:", "Tensor", "NoneType"]),
        ({"abs_sum": zeros(K, O)}, ValueError, ["abs_sum:", "(6, 5)", "(5, 6)"]),
        ({"sq_sum": zeros(O)}, ValueError, ["sq_sum:", "(6, 5)", "(6,)"]),
        ({"direction": zeros(K)}, ValueError, ["direction:", "(6, 5)", "(5,)"]),
        ({"sq_sum": zeros(O, K, dtype=torch.bfloat16)}, TypeError, ["sq_sum:", "float32 or float64", "bfloat16"]),
        ({"impl": "fast"}, ValueError, ["impl:", "chunked", "'fast'"]),
        ({"impl": "reference"}, ValueError, ["impl:", "reference"]),
        ({"sq_sum": zeros(O, K, device="meta")}, ValueError, ["sq_sum:", "cpu", "meta"]),
        ({"direction": zeros(O, K, device="meta")}, ValueError, ["direction:", "cpu", "meta"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict | list) else x.__name__,
)
def test_bad_sums(change, error, words):
    arguments = {**SUMS, **change}
    tensors = [arguments.pop(name) for name in ("grad_sum", "abs_sum", "sq_sum")]
    assert_raises(error, words, zk.coordinate_sums, *tensors, **arguments)


# Sizes past all bounds, which tensors of stride 0 may have, and operands shorter than what a kernel reads -------------------------

BIG = 2**62


def ones(*shape):
    """That hold no memory."""
    return torch.ones(1).expand(shape)


def ids(*shape):
    return torch.zeros(1, dtype=torch.int64).expand(shape)


IDS = {"example_ids": ids(3), "num_examples": BIG}
TOO_LARGE = {
    "interference, N": ("a", lambda impl: zk.interference(ones(BIG, 1, 1), ones(BIG, 1, 1), impl=impl)),
    "interference, T": ("a", lambda impl: zk.interference(ones(1, BIG, 1), ones(1, BIG, 1), impl=impl)),
    "interference, K": ("a", lambda impl: zk.interference(ones(1, 1, BIG), ones(1, 1, 1), impl=impl)),
    "interference, O": ("b", lambda impl: zk.interference(ones(1, 1, 1), ones(1, 1, BIG), impl=impl)),
    "interference, weight": ("a, b", lambda impl: zk.interference(ones(1, 1, 2**31), ones(1, 1, 2**31), impl=impl)),
    "interference, Gram": ("gram", lambda impl: zk.interference(ones(2**31, 1, 1), ones(2**31, 1, 1), gram=True, impl=impl)),
    "interference, num_examples": ("num_examples", lambda impl: zk.interference(ones(3, 1), ones(3, 1), impl=impl, **IDS)),
    "interference, embedding": (
        "embedding",
        lambda impl: zk.interference(ones(1, 1, 1), ones(1, 1, 1), embedding=(ids(1, BIG), ones(1, BIG, 1)), impl=impl),
    ),
    "interference, embedding's keys": (
        "embedding",
        lambda impl: zk.interference(
            ones(0, 1), ones(0, 2**30), example_ids=ids(0), num_examples=2**40, embedding=(ids(1), ones(1, 1), ids(1)), impl=impl
        ),
    ),
    "gram": ("gram", lambda impl: zk.gram(ones(2**32, 1, 1), ones(2**32, 1, 1), impl=impl)),
    "gram, a2": ("a2", lambda impl: zk.gram(ones(1, 1, 1), ones(1, 1, 1), ones(BIG, 1, 1), ones(BIG, 1, 1), impl=impl)),
    "gram, of two": (
        "gram",
        lambda impl: zk.gram(ones(2**31, 1, 1), ones(2**31, 1, 1), ones(2**31, 1, 1), ones(2**31, 1, 1), impl=impl),
    ),
    "dot": ("a", lambda impl: zk.dot(ones(1, BIG, 1), ones(1, BIG, 1), ones(1, 1), impl=impl)),
    "sq_norm": ("a", lambda impl: zk.sq_norm(ones(1, BIG, 1), ones(1, BIG, 1), impl=impl)),
    "weighted_grad": ("a", lambda impl: zk.weighted_grad(ones(BIG, 1, 1), ones(BIG, 1, 1), ones(BIG), impl=impl)),
    "dense_interference": ("g", lambda impl: zk.dense_interference(ones(BIG), impl=impl)),
    "dense_interference, of nothing": ("g", lambda impl: zk.dense_interference(ones(0, 2**31, 2**31), impl=impl)),
    "dense_interference, Gram": ("gram", lambda impl: zk.dense_interference(ones(2**33, 1), gram=True, impl=impl)),
    "bias_grad, N": ("b", lambda impl: zk.bias_grad(ones(BIG, 1, 1), impl=impl)),
    "bias_grad, no positions": ("b", lambda impl: zk.bias_grad(torch.ones(BIG, 0, 1), impl=impl)),
    "bias_grad, rows": ("b", lambda impl: zk.bias_grad(ones(BIG, 1), example_ids=ids(BIG), num_examples=1, impl=impl)),
    "bias_grad, num_examples": ("num_examples", lambda impl: zk.bias_grad(ones(3, 1), impl=impl, **IDS)),
    "bias_grad, result": (
        "num_examples",
        lambda impl: zk.bias_grad(ones(3, 2**9), example_ids=ids(3), num_examples=2**40, impl=impl),
    ),
    "scale_grad": ("x", lambda impl: zk.scale_grad(ones(1, BIG, 1), ones(1, BIG, 1), impl=impl)),
    "embedding_interference, T": ("b", lambda impl: zk.embedding_interference(ids(1, BIG), ones(1, BIG, 1), 3, impl=impl)),
    "embedding_interference, V": (
        "num_embeddings",
        lambda impl: zk.embedding_interference(ids(3, 1), ones(3, 1, 1), BIG, impl=impl),
    ),
    "embedding_interference, past int64": (
        "num_embeddings",
        lambda impl: zk.embedding_interference(ids(1, 1), ones(1, 1, 1), 2**64, impl=impl),
    ),
    "embedding_interference, num_examples": (
        "num_examples",
        lambda impl: zk.embedding_interference(ids(3), ones(3, 1), 1, impl=impl, **IDS),
    ),
    "embedding_interference, Gram": (
        "gram",
        lambda impl: zk.embedding_interference(ids(2**31, 1), ones(2**31, 1, 1), 1, gram=True, impl=impl),
    ),
    "embedding_interference, max_rows": (
        "max_rows",
        lambda impl: zk.embedding_interference(ids(1, 1), ones(1, 1, 1), 1, max_rows=2**64, impl=impl),
    ),
}


@pytest.mark.parametrize("call", TOO_LARGE)
@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_sizes_past_all_bounds_are_refused(impl, call):
    name, function = TOO_LARGE[call]
    assert_raises(ValueError, [f"{name}:", "expected"], function, impl)


def test_a_heads_and_sums_sizes_past_all_bounds_are_refused():
    assert_raises(ValueError, ["h:", "2**48"], zk.linear_cross_entropy, ones(1, BIG, 1), ones(3, 1), ids(1, BIG))
    assert_raises(ValueError, ["weight:", "2**48"], zk.linear_cross_entropy, ones(1, 1, 1), ones(BIG, 1), ids(1, 1))
    assert_raises(ValueError, ["ignore_index:", "64 bits"], zk.linear_cross_entropy, ones(1, 1, 1), ones(2, 1), ids(1, 1), 2**64)
    assert_raises(ValueError, ["grad_sum:", "2**48"], zk.coordinate_sums, ones(BIG), ones(BIG), ones(BIG))


def test_a_number_of_examples_that_does_not_fit_the_memory_is_an_error():
    """Not the end of the process, which growing until there is no more would be."""
    for impl in ("auto", "chunked"):
        with pytest.raises((RuntimeError, MemoryError)):
            zk.bias_grad(ones(3, 1), example_ids=ids(3), num_examples=2**46, impl=impl)


needs_kernels = pytest.mark.skipif(not zk.build_info()["cpu_isas"], reason="the CPU kernels are not live")
kernels = cpu.kernels
a, b, short = torch.randn(N, T, K), torch.randn(N, T, O), torch.randn(1)
rows, positions = torch.randn(1, N * T, K), ids(N * T)


def backward(**changes):
    names = ("direction", "c_grad", "c_abs", "c_sq", "c_l1", "c_sqn", "c_dot", "c_absdot", "mix")
    return kernels.backward(a, b, *(changes.get(name) for name in names), *changes.get("second", (a, b)), True, True, False, 64, 64)


# What a kernel would read past an operand's end: they are called by names that are not public, but can be.
SHORT = {
    "interference": (["direction:", "30", "[1]"], lambda: kernels.interference(a, b, short, False, 64, 64)),
    "interference, sizes": (["a:", "2^48"], lambda: kernels.interference(ones(1, BIG, 1), ones(1, BIG, 1), None, False, 64, 64)),
    "interference, Gram": (["gram:"], lambda: kernels.interference(ones(2**32, 1, 1), ones(2**32, 1, 1), None, True, 64, 64)),
    "interference, weight": (["a, b:"], lambda: kernels.interference(ones(1, 1, 2**40), ones(1, 1, 2**40), None, False, 64, 64)),
    "dot": (["direction:", "30", "[1]"], lambda: kernels.dot_direct(a, b, short, 64, 64)),
    "gram": (["a2", "[2, 1, 6]"], lambda: kernels.gram_direct(a, b, a[:2], b[:2, :1], False, 64, 64)),
    "ghost": (["a2", "[2, 1, 6]"], lambda: kernels.ghost(a, b, a[:2], b[:2, :1], False, False)),
    "ghost, of two": (["one set"], lambda: kernels.ghost(a, b, a[:2], b[:2], False, True)),
    "weighted_grad": (["weights:", "3", "[1]"], lambda: kernels.weighted_grad(a, b, short, None, None, 64, 64)),
    "weighted_grad, |g|": (["abs_weights:"], lambda: kernels.weighted_grad(a, b, torch.ones(N), short, torch.ones(O, K), 64, 64)),
    "weighted_grad, u": (["direction:"], lambda: kernels.weighted_grad(a, b, torch.ones(N), torch.ones(N), short, 64, 64)),
    "weighted_grad, no u": (["direction:"], lambda: kernels.weighted_grad(a, b, torch.ones(N), torch.ones(N), None, 64, 64)),
    **{
        f"backward, {name}": ([f"{name}:", "[1]"], lambda name=name: backward(**{name: short}))
        for name in ("direction", "c_grad", "c_abs", "c_sq", "c_l1", "c_sqn", "c_dot", "c_absdot", "mix")
    },
    "backward, a2": (["a2", "[2, 1, 1]"], lambda: backward(mix=torch.ones(N, 2), second=(ones(2, 1, 1), ones(2, 1, 1)))),
    "backward, dtype": (["a2"], lambda: backward(mix=torch.ones(N, N), second=(a.half(), b.half()))),
    "dense": (["direction:", "6", "[1]"], lambda: kernels.dense_interference(torch.randn(3, 6), short, True)),
    "dense, sizes": (["g:", "2^48"], lambda: kernels.dense_interference(ones(BIG), None, False)),
    "embedding, ids": (
        ["ids:", "expected 12", "got 3"],
        lambda: kernels.embedding_interference(ids(3), rows, positions, N, 9, -1, None, True),
    ),
    "embedding, example ids": (
        ["example_ids:", "12", "3"],
        lambda: kernels.embedding_interference(positions, rows, ids(3), N, 9, -1, None, True),
    ),
    "embedding, range": (
        ["ids: expected values in [0, 9), got 9"],
        lambda: kernels.embedding_interference(positions + 9, rows, positions, N, 9, -1, None, True),
    ),
    "embedding, u": (
        ["direction:", "(9, 5)", "[9, 1]"],
        lambda: kernels.embedding_interference(positions, rows, positions, N, 9, -1, torch.ones(9, 1), True),
    ),
    "embedding, N": (["num_examples:", "3", "1"], lambda: kernels.embedding_interference(ids(N, T), a, None, 1, 9, -1, None, True)),
    "embedding, N ragged": (
        ["num_examples:"],
        lambda: kernels.embedding_interference(positions, rows, positions, BIG, 9, -1, None, False),
    ),
    "embedding, V": (
        ["num_embeddings:", "2^63"],
        lambda: kernels.embedding_interference(positions, rows, positions, N, BIG, -1, None, False),
    ),
    "embedding, b": (
        ["b:", "[12]"],
        lambda: kernels.embedding_interference(positions, torch.ones(12), None, N, 9, -1, None, False),
    ),
    "scale, N": (["num_examples:", "3", "100000"], lambda: kernels.scale_bias_grad(None, b, None, None, None, 100_000, True)),
    "scale, N ragged": (["num_examples:"], lambda: kernels.scale_bias_grad(None, rows, None, None, positions, BIG, True)),
    "scale, negative N": (["num_examples:"], lambda: kernels.scale_bias_grad(None, rows, None, None, positions, -1, True)),
    "scale, range": (
        ["example_ids: expected values in [0, 3), got 3"],
        lambda: kernels.scale_bias_grad(None, rows, None, None, positions + 3, N, True),
    ),
    "scale, floats": (
        ["example_ids: expected integers"],
        lambda: kernels.scale_bias_grad(None, rows, None, None, positions.float(), N, True),
    ),
    "scale, mean": (["mean:", "12", "[1]"], lambda: kernels.scale_bias_grad(a, a, short, None, None, N, True)),
    "scale, rstd": (["rstd:", "12", "[1]"], lambda: kernels.scale_bias_grad(a, a, None, short, None, N, True)),
    "scale, x": (["x:"], lambda: kernels.scale_bias_grad(a[:1], a, None, None, None, N, True)),
    "coordinates": (["sums of one shape"], lambda: kernels.coordinate_sums(torch.ones(9), short, torch.ones(9), None)),
    "coordinates, dtype": (["float32 or float64"], lambda: kernels.coordinate_sums(*[torch.ones(9).bfloat16()] * 3, None)),
}


@needs_kernels
@pytest.mark.parametrize("call", SHORT)
def test_kernels_read_no_further_than_their_operands(call):
    words, function = SHORT[call]
    assert_raises((RuntimeError, ValueError, IndexError), words, function)


@pytest.mark.parametrize("impl", ["chunked", pytest.param("cpu", marks=needs_kernels)])
def test_derivatives_called_by_themselves_check_ids(impl):
    wrong, row = torch.full((N * T,), N), torch.ones(N, K)
    with pytest.raises(IndexError, match=r"^example_ids: expected values"):
        torch.ops.zsl.interference_backward(
            rows[0], rows[0], None, row.T @ row, *[None] * 7, rows[0], rows[0], True, True, False, impl, wrong, N, None, None, None
        )
    for where, example_ids, name in ((positions[None] + 9, positions, "ids"), (positions[None], wrong, "example_ids")):
        with pytest.raises(IndexError, match=f"^{name}: expected values"):
            torch.ops.zsl.embedding_backward(
                where, rows, example_ids, N, 9, -1, None, *[None] * 3, torch.ones(N), *[None] * 4, True, False
            )
