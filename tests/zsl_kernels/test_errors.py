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
