"""Integers that say where rows belong, drawn: every op takes them in any dtype and layout, or names what is wrong."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import zsl_kernels as zk
from tests import error_budgets
from tests.error_budgets import Sizes
from tests.inputs import assert_within_budget, expectations, implementations, running
from tests.zsl_kernels.test_integer_operands import DTYPES, LAYOUTS

live = [name for name in implementations() if name != "cpu"]
everywhere = st.sampled_from(live)
layouts = {
    "contiguous": torch.Tensor.contiguous,
    "shared": lambda x: x.flatten()[:1].expand(x.shape) if x.numel() else x,
    **LAYOUTS,
}
sum_names = ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm", "dot", "abs_dot", "gram")


@dataclass(frozen=True)
class Drawn:
    """Sizes of a call with R rows of N examples, Q rows of an embedding with V, which is also a weight's O."""

    N: int
    R: int
    Q: int
    K: int
    V: int
    seed: int

    def make(self):
        """Operands by name. The integers are int64, contiguous and in range."""
        generator = torch.Generator().manual_seed(self.seed)
        N, R, Q, K, V = self.N, self.R, self.Q, self.K, self.V

        def draw(*shape):
            return torch.randn(shape, generator=generator)

        def below(end, *shape):
            return torch.randint(0, end, shape, generator=generator)

        x = {"a": draw(R, K), "b": draw(R, V), "x": draw(R, K), "rstd": draw(R), "weights": draw(N)}
        x |= {"direction": draw(V, K), "e": draw(Q, K), "e3": draw(N, Q, K), "h": draw(N, Q, K)}
        return x | {
            "example_ids": below(N, R),
            "ids": below(V, Q),
            "e_examples": below(N, Q),
            "row_ids": below(V, R),
            "ids2": below(V, N, Q),
            "targets": below(V, N, Q),
        }


sizes = st.builds(
    Drawn,
    N=st.integers(1, 6),
    R=st.one_of(st.integers(0, 12), st.sampled_from([63, 64, 65, 200])),
    Q=st.integers(1, 9),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)


def fields(sums):
    return {name: getattr(sums, name) for name in sum_names if getattr(sums, name) is not None}


def ragged(x):
    return {"example_ids": x["example_ids"], "num_examples": len(x["weights"])}


def scales(x, impl):
    found = zk.scale_bias_grad(x["x"], x["a"], rstd=x["rstd"], impl=impl, **ragged(x))
    return dict(zip(("scale", "bias"), found, strict=True))


def interference(x, impl):
    options = {"direction": x["direction"], "gram": True, "embedding": (x["ids"], x["e"], x["e_examples"]), "impl": impl}
    return fields(zk.interference(x["a"], x["b"], **options, **ragged(x)))


def embedding(x, impl, ids="ids2", b="e3", **options):
    return fields(
        zk.embedding_interference(x[ids], x[b], len(x["direction"]), direction=x["direction"], gram=True, impl=impl, **options)
    )


def head(x, impl):
    if impl == "reference":
        logits = x["h"] @ x["direction"].T
        return {"losses": F.cross_entropy(logits.movedim(-1, 1), x["targets"].long(), reduction="none")}
    return {"losses": zk.linear_cross_entropy(x["h"], x["direction"], x["targets"], impl=impl)}


# The public function's results by name, and the registered op's, whose integers are not checked before.
OPS = {
    "interference": (
        ("example_ids", "ids", "e_examples"),
        interference,
        lambda x, N, V, impl: torch.ops.zsl.interference(
            x["a"], x["b"], x["direction"], True, impl, x["example_ids"], N, x["ids"], x["e"], x["e_examples"]
        ),
    ),
    "gram": (
        ("example_ids",),
        lambda x, impl: {"gram": zk.gram(x["a"], x["b"], impl=impl, **ragged(x))},
        lambda x, N, V, impl: torch.ops.zsl.gram(x["a"], x["b"], None, None, impl, x["example_ids"], N),
    ),
    "dot": (
        ("example_ids",),
        lambda x, impl: {"dot": zk.dot(x["a"], x["b"], x["direction"], impl=impl, **ragged(x))},
        lambda x, N, V, impl: torch.ops.zsl.dot(x["a"], x["b"], x["direction"], impl, x["example_ids"], N),
    ),
    "sq_norm": (
        ("example_ids",),
        lambda x, impl: {"sq_norm": zk.sq_norm(x["a"], x["b"], impl=impl, **ragged(x))},
        lambda x, N, V, impl: torch.ops.zsl.sq_norm(x["a"], x["b"], impl, x["example_ids"], N),
    ),
    "weighted_grad": (
        ("example_ids",),
        lambda x, impl: {"weighted_grad": zk.weighted_grad(x["a"], x["b"], x["weights"], impl=impl, **ragged(x))},
        lambda x, N, V, impl: torch.ops.zsl.weighted_grad(x["a"], x["b"], x["weights"], None, None, impl, x["example_ids"], N),
    ),
    "scale_bias_grad": (
        ("example_ids",),
        scales,
        lambda x, N, V, impl: torch.ops.zsl.scale_bias_grad(
            x["x"][None], x["a"][None], None, x["rstd"][None], x["example_ids"], N, True, impl
        ),
    ),
    "embedding_interference": (
        ("ids2",),
        embedding,
        lambda x, N, V, impl: torch.ops.zsl.embedding_interference(x["ids2"], x["e3"], None, N, V, -1, x["direction"], True, impl),
    ),
    "embedding_interference, ragged": (
        ("row_ids", "example_ids"),
        lambda x, impl: embedding(x, impl, "row_ids", "a", **ragged(x)),
        lambda x, N, V, impl: torch.ops.zsl.embedding_interference(
            x["row_ids"][None], x["a"][None], x["example_ids"], N, V, -1, x["direction"], True, impl
        ),
    ),
    "linear_cross_entropy": (("targets",), head, None),
}
# As the messages name them.
NAMES = {"ids": "embedding: ids", "e_examples": "embedding: example ids", "ids2": "ids", "row_ids": "ids"}


def errors(op, s):
    dtype = torch.float32
    if op == "scale_bias_grad":
        return error_budgets.scale_bias(s.R)
    if op.startswith("embedding"):
        return error_budgets.embedding(s.N, s.R if "ragged" in op else s.Q, s.K, s.V, dtype)
    if op == "interference":
        return error_budgets.interference(Sizes(s.N, s.R, s.K, s.V, S=s.Q))
    return error_budgets.call(op, Sizes(s.N, s.R, s.K, s.V))


def laid(x, op, data):
    """The operands with their integers in a drawn dtype and layout, and the same values as they are in memory as a rule."""
    changed, plain = dict(x), dict(x)
    for name in OPS[op][0]:
        dtype = data.draw(st.sampled_from(DTYPES), label=f"{name}'s dtype")
        layout = data.draw(st.sampled_from(list(layouts)), label=f"{name}'s layout")
        changed[name] = layouts[layout](x[name].to(dtype)) if x[name].numel() else x[name].to(dtype)
        plain[name] = changed[name].long().contiguous()
    return changed, plain


@settings(max_examples=150)
@given(sizes, st.sampled_from(list(OPS)), everywhere, st.data())
def test_results_are_those_of_the_values(s, op, implementation, data):
    x, plain = laid(s.make(), op, data)
    _, public, registered = OPS[op]
    with running(implementation) as impl:
        found, same = public(x, impl), public(plain, impl)
        for name in same:
            assert torch.equal(found[name], same[name]), name
        if registered is not None:
            for y, z in zip(registered(x, s.N, s.V, impl), registered(plain, s.N, s.V, impl), strict=True):
                assert torch.equal(y, z)
    if op != "linear_cross_entropy":  # whose error is that of its logits: tests/zsl_kernels/test_linear_cross_entropy.py
        want = expectations(lambda y: public(y, "reference"), plain, errors(op, s), operands=torch.float32)
        for name, result in found.items():
            assert_within_budget(result, want[name], name)


@settings(max_examples=150)
@given(sizes, st.sampled_from(list(OPS)), everywhere, st.data())
def test_a_value_out_of_range_is_named(s, op, implementation, data):
    x = s.make()
    operands, public, registered = OPS[op]
    full = [name for name in operands if x[name].numel()]
    if not full:
        return
    name = data.draw(st.sampled_from(full))
    dtype = data.draw(st.sampled_from(DTYPES))
    end = s.N if name in ("example_ids", "e_examples") else s.V
    values = st.sampled_from([end, end + 1, torch.iinfo(dtype).max, torch.iinfo(dtype).max - 99])
    if dtype.is_signed and name not in ("ids", "ids2", "row_ids"):  # where negative ones are skipped
        values |= st.sampled_from([-1, torch.iinfo(dtype).min])
    value = data.draw(values)
    bad = x[name].to(dtype, copy=True)
    bad.view(-1)[data.draw(st.integers(0, bad.numel() - 1))] = torch.tensor(value, dtype=dtype)
    layout = data.draw(st.sampled_from([layout for layout in layouts if layout not in ("shared", "expanded")]))
    x[name] = layouts[layout](bad)
    expected = (ValueError, IndexError)
    message = f"^{NAMES.get(name, name)}: expected .*got {value}"
    with running(implementation) as impl:
        for form in (impl, "reference"):
            if (op, form) != ("linear_cross_entropy", "reference"):
                with pytest.raises(expected, match=message):
                    public(x, form)
        if registered is not None:
            with pytest.raises(expected, match=message):
                registered(x, s.N, s.V, impl)


@settings(max_examples=60)
@given(sizes, st.sampled_from([op for op in OPS if op != "linear_cross_entropy"]), everywhere, st.data())
def test_what_is_no_integer_is_refused(s, op, implementation, data):
    x = s.make()
    operands, public, registered = OPS[op]
    name = data.draw(st.sampled_from(operands))
    x[name] = x[name].to(data.draw(st.sampled_from([torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.complex64])))
    with running(implementation) as impl:
        for call in (lambda: public(x, impl), lambda: public(x, "reference"), lambda: registered(x, s.N, s.V, impl)):
            with pytest.raises((TypeError, RuntimeError), match=f"^{NAMES.get(name, name)}: expected integers"):
                call()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_targets_that_are_no_integers_are_refused(dtype):
    with pytest.raises(TypeError, match="targets: expected integers"):
        zk.linear_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=dtype))


# Targets: an ignored one is no class, whatever its dtype can hold -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 2, 156, 2**40])
def test_targets_are_compared_with_the_ignored_one_as_int64(ignore_index, dtype):
    """-100 is 156 as uint8: a class of a vocabulary of 200."""
    h, weight = torch.randn(2, 3, 4), torch.randn(200, 4)
    targets = torch.tensor([[156 if dtype != torch.int8 else 56, 2, 0], [1, 2, 100]])
    leaves = [[x.clone().requires_grad_() for x in (h, weight)] for _ in range(2)]
    found = zk.linear_cross_entropy(*leaves[0], targets.to(dtype), ignore_index)
    want = zk.linear_cross_entropy(*leaves[1], targets, ignore_index)
    assert torch.equal(found, want)
    assert ((want == 0) == (targets == ignore_index)).all()
    found.sum().backward()
    want.sum().backward()
    for x, y in zip(*leaves, strict=True):
        assert torch.equal(x.grad, y.grad)


def test_a_target_past_int64_is_no_ignored_one():
    targets = torch.tensor([[2**64 - 100]], dtype=torch.uint64)
    with pytest.raises(ValueError, match=f"targets: .*got {2**64 - 100} at"):
        zk.linear_cross_entropy(torch.zeros(1, 1, 4), torch.zeros(5, 4), targets)
