"""The head that never holds its logits: against PyTorch's cross entropy in float64 and the reference's statistics."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import zsl_kernels as zk
from tests import error_budgets
from tests.inputs import LAYOUTS, Expected, assert_within_budget
from zsl_kernels import streamed_head as head
from zsl_kernels.backends import cpu, reference
from zsl_kernels.backends.chunked import linear_cross_entropy as portable
from zsl_kernels.types import sum_dtype

# What the statistics are computed with; the instruction sets are the interference tests' business.
ONE_OF_EACH = pytest.mark.parametrize("impl", ["chunked", "cpu"], indirect=True)
IGNORED = -100


@dataclass(frozen=True)
class Head:
    """A head's operands, the derivatives c of the losses, and a direction."""

    h: Tensor
    weight: Tensor
    targets: Tensor
    c: Tensor
    direction: Tensor

    def to(self, dtype: torch.dtype) -> Head:
        return Head(self.h.to(dtype), self.weight.to(dtype), self.targets, self.c.to(sum_dtype(dtype)), self.direction.to(dtype))


def make(N: int, T: int, K: int, V: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Head:
    generator = torch.Generator().manual_seed(0)
    lay = LAYOUTS[layout]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    h = lay(draw(1, T, K).to(dtype)).expand(N, -1, -1) if layout == "shared" else lay(draw(N, T, K).to(dtype))
    weight, direction = (lay(draw(V, K).mul_(0.5).to(dtype)) for _ in range(2))
    targets = torch.randint(V, (N, T), generator=generator)
    targets.view(-1)[1::4] = IGNORED
    return Head(h, weight, targets, draw(N, T).to(sum_dtype(dtype)), direction)


Results = dict[str, Tensor]


def fused(x: Head, chunk: int | None, impl: str, ignore_index: int = IGNORED) -> Results:
    """The losses, both gradients and every statistic."""
    h, weight = (leaf.detach().requires_grad_() for leaf in (x.h, x.weight))
    found: list[zk.InterferenceSums] = []
    losses = zk.linear_cross_entropy(
        h,
        weight,
        x.targets,
        ignore_index,
        statistics=found.append,
        direction=x.direction,
        gram=True,
        vocabulary_chunk=chunk,
        impl=impl,
    )
    grad_h, grad_weight = torch.autograd.grad(losses, (h, weight), x.c)
    assert len(found) == 1, "statistics: once in each backward pass"
    return {"losses": losses.detach(), "h.grad": grad_h, "weight.grad": grad_weight, **found[0]._asdict()}


def plain(x: Head, ignore_index: int = IGNORED) -> Results:
    """The same by PyTorch, which holds the logits, and by the reference, which holds every gradient."""
    logits = (x.h @ x.weight.T).to(sum_dtype(x.h.dtype)).requires_grad_()
    losses = F.cross_entropy(logits.movedim(-1, 1), x.targets, ignore_index=ignore_index, reduction="none")
    (b,) = torch.autograd.grad(losses, logits, x.c)
    b = b.to(x.h.dtype)
    sums = reference.interference(x.h, b, x.direction, True)
    grad_weight = sums.grad_sum.to(x.weight.dtype)
    return {"losses": losses.detach(), "h.grad": b @ x.weight, "weight.grad": grad_weight, **sums._asdict()}


def expected(x: Head, ignore_index: int = IGNORED) -> dict[str, Expected]:
    """The truth of the given inputs, and what the arithmetic allows. The gradients have two errors: that of their own sums, and
    that of b, which comes from the logits and, in half precision, from b's rounding."""
    dtype, sums = x.h.dtype, sum_dtype(x.h.dtype)
    wide, valid = x.to(torch.float64), x.targets != ignore_index
    h, weight, direction = (y.abs() for y in (wide.h, wide.weight, wide.direction))
    onehot = F.one_hot(x.targets.where(valid, 0), x.weight.shape[0]).double()
    of_b = error_budgets.head(wide.h, wide.weight, onehot, wide.c.where(valid, 0), dtype)
    scale = {
        **reference.interference(h, of_b.b_size, direction, True)._asdict(),
        "losses": torch.zeros_like(wide.c),
        "h.grad": of_b.b_size @ weight,
    }
    # What b's error makes of each: of a square (g + δ)² − g².
    g, d = (reference.per_example_grad(h, y) for y in (of_b.b_size, of_b.b))
    pairs = g.flatten(1) @ d.flatten(1).T
    pairs = pairs + pairs.T + d.flatten(1) @ d.flatten(1).T
    beside = {
        **reference.interference(h, of_b.b, direction, False)._asdict(),
        "sq_sum": ((2 * g + d) * d).sum(0),
        "sq_norm": pairs.diagonal(),
        "gram": pairs,
        "losses": of_b.losses * valid,
        "h.grad": of_b.b @ weight,
    }
    for of in (scale, beside):
        of["weight.grad"] = of["grad_sum"]
    (N, T, K), V = x.h.shape, x.weight.shape[0]
    sizes = error_budgets.Sizes(N, T, K, V, dtype=sums)
    errors = {**error_budgets.interference(sizes), **error_budgets.head_gradients(sizes), "losses": error_budgets.EXACT}
    dtypes = {"h.grad": dtype, "weight.grad": dtype}
    return {
        name: Expected(exact, scale[name], errors[name], dtypes.get(name, sums), sums, dtype != sums, beside[name])
        for name, exact in plain(wide, ignore_index).items()
    }


def assert_in_budget(x: Head, chunk: int | None, impl: str, ignore_index: int = IGNORED) -> None:
    got = fused(x, chunk, impl, ignore_index)
    for name, e in expected(x, ignore_index).items():
        assert_within_budget(got[name], e, name)


# Values -----------------------------------------------------------------------------------------------------------------------

# Sizes (N, T, K, V) and the chunk: V off it, on it, below it, columns one by one, and the default's.
SIZES = {
    "last chunk partial": ((3, 5, 33, 401), 100),
    "whole chunks": ((3, 5, 33, 400), 100),
    "one chunk": ((3, 5, 33, 401), 401),
    "below one chunk": ((3, 5, 33, 150), 192),
    "a column each": ((2, 3, 5, 13), 1),
    "default": ((3, 5, 33, 401), None),
    "one position": ((7, 1, 40, 50), 16),
    "one example": ((1, 9, 70, 50), 16),
    "past one tile": ((2, 70, 40, 500), 210),
    "one number": ((1, 1, 1, 1), None),
}


@ONE_OF_EACH
@pytest.mark.parametrize("size", SIZES)
def test_stays_in_the_error_budget(size, impl):
    sizes, chunk = SIZES[size]
    assert_in_budget(make(*sizes), chunk, impl)


@ONE_OF_EACH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_layouts(dtype, layout, impl):
    assert_in_budget(make(3, 5, 33, 401, dtype, layout), 100, impl)


@ONE_OF_EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_only_what_it_says(dtype, impl):
    """The truth of the inputs in their dtype, b rounded, each gradient rounded: a plain head's logits err by far more."""
    x = make(4, 6, 33, 401, dtype)
    x = Head(x.h, x.weight * 0.1, x.targets, x.c * 16, x.direction)  # so that no b is below float16's normal numbers
    got, rounded = fused(x, 100, impl), plain(x)
    for name, e in expected(x).items():
        assert_within_budget(got[name], e, name)
        assert name != "losses" or e.share(rounded[name]) > 10


@ONE_OF_EACH
def test_a_class_can_be_the_ignored_one(impl):
    x = make(3, 5, 33, 401)
    x.targets.clamp_(min=0)
    assert (x.targets == 0).any()
    assert_in_budget(x, 100, impl, ignore_index=0)


@ONE_OF_EACH
def test_an_ignored_example_has_no_gradient(impl):
    x = make(3, 5, 33, 401)
    x.targets[1] = IGNORED
    x.c[1] = torch.nan  # as 0/0 of a mean over none
    got = fused(x, 100, impl)
    for name in ("losses", "h.grad", "l1", "sq_norm", "dot", "abs_dot"):
        assert torch.equal(got[name][1], torch.zeros_like(got[name][1])), name
    assert not got["gram"][1].any()
    assert not got["gram"][:, 1].any()
    x.c[1] = 0
    for name, e in expected(x).items():
        assert_within_budget(got[name], e, name)


@ONE_OF_EACH
def test_when_all_are_ignored_all_is_zero(impl):
    x = make(3, 5, 33, 401)
    x.targets.fill_(IGNORED)
    for name, result in fused(x, 100, impl).items():
        assert not result.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_huge_logits(dtype):
    """±1e4: nothing overflows, and the losses near 0 are exact, which a difference of float32 numbers near 1e4 would not be."""
    x = make(4, 6, 33, 401, dtype)
    x = Head(x.h * 2000, x.weight, x.targets, x.c, x.direction)
    assert (x.h.double() @ x.weight.double().T).abs().max() > 1e4
    got = fused(x, 100, "auto")
    for name, e in expected(x).items():
        assert got[name].isfinite().all(), name
        assert_within_budget(got[name], e, name)


def test_losses_near_zero_at_huge_logits_are_exact():
    """Logits 10000 and 9999, integers: log(1 + 1/e) comes out as accurately as of 1 and 0."""
    h, weight = torch.ones(1, 1, 1), torch.tensor([[10000.0], [9999.0], [-10000.0]])
    targets = torch.zeros(1, 1, dtype=torch.int64)
    for chunk in (1, 2, 3):
        losses, lse = head.forward(h, weight, targets, IGNORED, chunk)
        want = torch.log1p(torch.tensor(-1.0, dtype=torch.float64).exp())
        torch.testing.assert_close(losses.double().squeeze(), want, rtol=1e-7, atol=0)
        torch.testing.assert_close(lse.squeeze(), 10000 + want, rtol=1e-11, atol=0)
        c = torch.ones(1, 1)
        ((_, _, b),) = head.output_gradients(h, weight, targets, lse, c, IGNORED, 3)
        p = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(0)
        torch.testing.assert_close(b.squeeze().double(), torch.stack([p[0] - 1, p[1], 0 * p[0]]), rtol=1e-6, atol=0)


def test_a_logit_of_minus_infinity_is_a_probability_of_zero():
    """First, so that the running maximum begins with it."""
    h, weight = torch.ones(1, 1, 1), torch.tensor([[-torch.inf], [1.0], [0.0]])
    targets = torch.ones(1, 1, dtype=torch.int64)
    want = F.cross_entropy((h @ weight.T).movedim(-1, 1), targets, reduction="none")
    losses, lse = head.forward(h, weight, targets, IGNORED, 1)
    torch.testing.assert_close(losses, want)
    b = torch.cat([b.clone() for _, _, b in head.output_gradients(h, weight, targets, lse, torch.ones(1, 1), IGNORED, 1)], 2)
    torch.testing.assert_close(b.squeeze(), weight.squeeze().softmax(0) - torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("sizes", [(0, 4, 5, 6), (3, 0, 5, 6), (3, 4, 0, 6)], ids=["no examples", "no positions", "no inputs"])
@ONE_OF_EACH
def test_of_nothing_is_nothing(sizes, impl):
    x = make(*sizes)
    got, want = fused(x, 4, impl), plain(x)
    for name, result in want.items():
        torch.testing.assert_close(got[name], result, msg=lambda m, name=name: f"{name}: {m}")


def test_without_a_vocabulary_all_must_be_ignored():
    x = make(2, 3, 4, 1)
    with pytest.raises(ValueError, match=r"targets: .*\[0, 0\)"):
        zk.linear_cross_entropy(x.h, x.weight[:0], x.targets)
    h = x.h.requires_grad_()
    losses = zk.linear_cross_entropy(h, x.weight[:0], x.targets.fill_(IGNORED))
    losses.sum().backward()
    assert not losses.any()
    assert not h.grad.any()


# The budgets themselves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_a_plain_head_in_any_order_is_within_the_budgets(seed, dtype):
    x = make(3, 5, 33, 401, dtype)
    generator = torch.Generator().manual_seed(seed)
    examples, positions, features, classes = (torch.randperm(size, generator=generator) for size in (3, 5, 33, 401))

    def rows(y: Tensor) -> Tensor:
        return y[examples][:, positions]

    targets = classes.argsort()[rows(x.targets).clamp(min=0)].where(rows(x.targets) != IGNORED, IGNORED)
    weights = [y[classes][:, features] for y in (x.weight, x.direction)]
    moved = plain(Head(rows(x.h)[..., features], weights[0], targets, rows(x.c), weights[1]))
    back = examples.argsort(), positions.argsort(), features.argsort(), classes.argsort()
    for name, e in expected(x).items():
        found = moved[name]
        if name == "losses":
            found = found[back[0]][:, back[1]]
        elif name == "h.grad":
            found = found[back[0]][:, back[1]][..., back[2]]
        elif name == "gram":
            found = found[back[0]][:, back[0]]
        else:
            found = found[back[3]][:, back[2]] if found.ndim == 2 else found[back[0]]
        assert_within_budget(found, e, name)


def test_the_budgets_refuse_less_precision_and_a_missing_position():
    x = make(3, 5, 33, 401, torch.float64)
    narrow, want = plain(x.to(torch.float32)), expected(x)
    x.targets[2, 4] = IGNORED
    missing = plain(x)
    for name, e in want.items():
        assert e.share(narrow[name]) > 1e4, name
        assert e.share(missing[name]) > 1e6, name


# Autograd -----------------------------------------------------------------------------------------------------------------------


def test_gradcheck():
    x = make(2, 3, 4, 7, torch.float64)
    h, weight = x.h.requires_grad_(), x.weight.requires_grad_()
    for wanted in ((h, weight), (h, weight.detach()), (h.detach(), weight)):
        assert torch.autograd.gradcheck(lambda h, w: zk.linear_cross_entropy(h, w, x.targets, vocabulary_chunk=3), wanted)


@pytest.mark.parametrize("wanted", ["h", "weight", "both"])
@pytest.mark.parametrize("statistics", [None, lambda sums: None], ids=["alone", "with statistics"])
def test_only_what_requires_a_gradient_gets_one(wanted, statistics):
    x = make(3, 5, 33, 401)
    h, weight = (leaf.requires_grad_(wanted in (name, "both")) for name, leaf in (("h", x.h), ("weight", x.weight)))
    losses = zk.linear_cross_entropy(h, weight, x.targets, statistics=statistics, vocabulary_chunk=100)
    losses.backward(x.c)
    want = expected(Head(h.detach(), weight.detach(), x.targets, x.c, x.direction))
    for name, leaf in (("h", h), ("weight", weight)):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            assert_within_budget(leaf.grad, want[f"{name}.grad"], name)


def test_statistics_of_a_frozen_weight():
    x = make(3, 5, 33, 401)
    found = []
    losses = zk.linear_cross_entropy(x.h.requires_grad_(), x.weight, x.targets, statistics=found.append)
    losses.backward(x.c)
    assert x.weight.grad is None
    assert_within_budget(found[0].l1, expected(Head(x.h.detach(), x.weight, x.targets, x.c, x.direction))["l1"])


def test_the_weights_gradient_is_the_statistics_own_tensor():
    x = make(3, 5, 33, 401)
    found = []
    weight = x.weight.requires_grad_()
    losses = zk.linear_cross_entropy(x.h, weight, x.targets, statistics=found.append)
    assert found == []
    (grad,) = torch.autograd.grad(losses, weight, x.c, retain_graph=True)
    (sums,) = found
    assert grad.data_ptr() == sums.grad_sum.data_ptr()
    assert (sums.dot, sums.abs_dot, sums.gram) == (None, None, None)
    losses.backward(x.c)
    assert len(found) == 2, "once in each backward pass"
    assert all(torch.equal(a, b) for a, b in zip(found[0][:5], found[1][:5], strict=True)), "the same bits each time"


def test_a_transposed_weight_and_one_used_twice():
    """Tied heads: the gradients of both uses add up."""
    x = make(2, 3, 7, 40, torch.float64)
    stored = x.weight.T.contiguous().requires_grad_()
    losses = zk.linear_cross_entropy(x.h @ stored @ stored.T, stored.T, x.targets, vocabulary_chunk=16)
    (grad,) = torch.autograd.grad(losses, stored, x.c)
    logits = x.h @ stored @ stored.T @ stored
    (want,) = torch.autograd.grad(F.cross_entropy(logits.movedim(-1, 1), x.targets, reduction="none"), stored, x.c)
    torch.testing.assert_close(grad, want)


def test_no_graph_without_grad_mode():
    x = make(3, 5, 33, 401)
    with torch.no_grad():
        losses = zk.linear_cross_entropy(x.h.requires_grad_(), x.weight.requires_grad_(), x.targets)
    assert not losses.requires_grad
    assert_within_budget(losses, expected(Head(x.h.detach(), x.weight.detach(), x.targets, x.c, x.direction))["losses"])


def test_a_second_derivative_is_refused():
    x = make(2, 3, 4, 7)
    losses = zk.linear_cross_entropy(x.h.requires_grad_(), x.weight, x.targets)
    with pytest.raises(NotImplementedError, match=r"linear_cross_entropy: .*create_graph=False"):
        torch.autograd.grad(losses.sum(), x.h, create_graph=True)


def test_inputs_changed_in_place_are_noticed():
    x = make(2, 3, 4, 7)
    h = x.h.requires_grad_() * 1
    losses = zk.linear_cross_entropy(h, x.weight, x.targets)
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("given", [torch.float32, None], ids=["float32 h", "lower h"])
def test_autocast(dtype, inside, given):
    """As on inputs cast beforehand, except that the weight's gradient keeps the sums' precision."""
    x = make(3, 5, 33, 401)
    h, weight = x.h.to(given or dtype).requires_grad_(), x.weight.requires_grad_()
    found = []
    with torch.autocast("cpu", dtype=dtype):
        losses = zk.linear_cross_entropy(h, weight, x.targets, statistics=found.append, gram=True, vocabulary_chunk=100)
        if inside:
            losses.backward(x.c)
    if not inside:
        losses.backward(x.c)
    lower = Head(x.h.detach().to(dtype), x.weight.detach().to(dtype), x.targets, x.c, x.direction.to(dtype))
    want = fused(lower, 100, "auto")
    assert (losses.dtype, h.grad.dtype, weight.grad.dtype) == (torch.float32, h.dtype, torch.float32)
    assert torch.equal(losses, want["losses"])
    assert torch.equal(h.grad, want["h.grad"].to(h.dtype))
    assert torch.equal(weight.grad, want["grad_sum"])
    for name in ("abs_sum", "sq_sum", "l1", "sq_norm", "gram"):
        assert torch.equal(getattr(found[0], name), want[name]), name


def test_autocast_leaves_float64_alone():
    x = make(2, 3, 4, 7, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = zk.linear_cross_entropy(x.h, x.weight, x.targets)
        assert torch.equal(losses, zk.linear_cross_entropy(x.h, x.weight, x.targets))
    assert_within_budget(losses, expected(x)["losses"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_call_gives_the_same_bits(count, threads):
    threads(count)
    x = make(4, 40, 70, 500)
    first, again = fused(x, 192, "auto"), fused(x, 192, "auto")
    for name, result in first.items():
        assert torch.equal(result, again[name]), name
    for name, e in expected(x).items():
        assert_within_budget(first[name], e, name)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own
def test_compile_leaves_it_alone():
    """The compiler would unroll the chunks and keep what is to be recomputed. What is around it is compiled."""
    torch._dynamo.reset()
    x = make(3, 5, 33, 401, torch.float64)
    h, weight = x.h.requires_grad_(), x.weight.requires_grad_()
    graphs = []

    def loss(h: Tensor, weight: Tensor) -> Tensor:
        return zk.linear_cross_entropy(h.sin(), weight, x.targets, vocabulary_chunk=100).cos().sum()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph.code)
        return graph

    want = torch.autograd.grad(loss(h, weight), (h, weight))
    got = torch.autograd.grad(torch.compile(loss, backend=backend)(h, weight), (h, weight))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    code = "".join(graphs)
    assert ".sin()" in code
    assert ".cos()" in code
    assert "exp_" not in code


# Products of half precision with float32 results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (13, 33, 45), (197, 300, 391), (5, 0, 3), (0, 4, 3)], ids=str)
@pytest.mark.usefixtures("cpu_isa")
def test_wide_products_are_exact_on_integers(sizes, dtype, layout):
    rows, inner, cols = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, inner), (inner, cols))
    x, y = (LAYOUTS[layout](torch.randint(-3, 4, shape, generator=generator).to(dtype)) for shape in shapes)
    out = torch.empty(rows, cols)
    assert portable.product(x, y, out) is out
    assert torch.equal(out, (x.double() @ y.double()).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_the_kernels_operands_are_widened_in_parts(dtype, monkeypatch):
    x = make(4, 70, 33, 401, dtype)  # more rows than are widened at a time
    want = fused(x, 300, "chunked")
    monkeypatch.setattr(cpu, "MISSING", "not built")
    assert_in_budget(x, 300, "chunked")
    found = fused(x, 300, "chunked")
    for name, e in expected(x).items():  # another order of summation, which moves b's roundings
        assert ((found[name].double() - want[name].double()).abs() <= 2 * (e.allowed() + e.rounding())).all(), name


@pytest.mark.skipif(not zk.build_info()["cpu_isas"], reason="the CPU kernels are not live")
@pytest.mark.parametrize(
    "out",
    [torch.empty(3, 4), torch.empty(2, 5), torch.empty(4, 2).T, torch.empty(2, 4, dtype=torch.bfloat16)],
    ids=["rows", "columns", "transposed", "dtype"],
)
def test_a_product_refuses_an_unfit_result(out):
    x, y = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"out: expected a contiguous \(2, 4\)"):
        torch.ops.zsl_cpu.product(x, y, out, 12, 32)


# What others see of it ------------------------------------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_one_call_with_its_arguments():
    x = make(3, 5, 33, 401)
    want = zk.linear_cross_entropy(x.h, x.weight, x.targets, IGNORED, vocabulary_chunk=100)
    statistics = [].append
    with Watch() as watch:
        losses = zk.linear_cross_entropy(x.h, x.weight, x.targets, IGNORED, statistics=statistics, vocabulary_chunk=100)
    ((func, args, kwargs),) = watch.calls
    assert func is zk.linear_cross_entropy
    assert all(a is b for a, b in zip(args, (x.h, x.weight, x.targets, IGNORED), strict=True))
    assert kwargs == {"statistics": statistics, "direction": None, "gram": False, "vocabulary_chunk": 100, "impl": "auto"}
    assert torch.equal(losses, want)


class Allocations(TorchDispatchMode):
    """The elements of every storage that an op returns, but for the workspaces of kernels, which are bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[int, int] = {}
        self._alive: list[Tensor] = []  # no storage is given out twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.dtype != torch.uint8:
                self._alive.append(x)
                self.elements[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("statistics", [None, lambda sums: None], ids=["alone", "with statistics"])
def test_no_tensor_has_the_size_of_the_logits(dtype, statistics):
    N, T, K, V, chunk = 4, 16, 3, 2000, 192
    x = make(N, T, K, V, dtype)
    h, weight = x.h.requires_grad_(), x.weight.requires_grad_()
    with Allocations() as seen:
        zk.linear_cross_entropy(h, weight, x.targets, statistics=statistics, vocabulary_chunk=chunk).backward(x.c)
    large = [size for size in seen.elements.values() if size > V * K]
    # On the way forward and on the way back the chunk's logits, and there the rounded b.
    buffers = 3 if dtype == torch.bfloat16 else 2
    assert large == [N * T * chunk] * buffers
    with Allocations() as seen:
        F.cross_entropy((h @ weight.T).movedim(-1, 1), x.targets, reduction="none").backward(x.c)
    assert max(seen.elements.values()) >= N * T * V, "the mode sees what it looks for"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_pieces_give_the_whole_in_one_buffer(dtype):
    x = make(3, 5, 33, 401, dtype)
    with torch.no_grad():
        losses, lse = head.forward(x.h, x.weight, x.targets, IGNORED, 100)
        chunks, buffers = [], set()
        for lo, hi, b in head.output_gradients(x.h, x.weight, x.targets, lse, x.c, IGNORED, 100):
            assert (b.shape, b.dtype, b.is_contiguous()) == ((3, 5, hi - lo), dtype, True)
            chunks.append((lo, hi, b.clone()))
            buffers.add(b.data_ptr())
    assert [(lo, hi) for lo, hi, _ in chunks] == [(0, 100), (100, 200), (200, 300), (300, 400), (400, 401)]
    assert len(buffers) == 1
    got = fused(x, 100, "auto")
    assert torch.equal(losses, got["losses"])
    sums = zk.interference(x.h, torch.cat([b for _, _, b in chunks], 2))
    for name in ("grad_sum", "abs_sum", "sq_sum"):
        torch.testing.assert_close(getattr(sums, name), got[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("V", [1, 192, 193, 50257, 262144])
@pytest.mark.parametrize("rows", [0, 1, 100, 2048, 10**6])
def test_the_default_chunk_fits_its_bytes_in_whole_tiles(rows, V, dtype):
    chunk = head.default_chunk(rows, V, dtype)
    needed = rows * chunk * (6 if dtype == torch.bfloat16 else dtype.itemsize)
    assert chunk % 192 == 0
    assert needed <= head.CHUNK_BYTES or chunk == 192
    assert chunk < V + 192
    last = V % chunk or chunk
    assert chunk >= V or chunk - last <= 192 * -(-V // chunk), "the chunks are about equal"


# Errors ---------------------------------------------------------------------------------------------------------------------------

N, T, K, V = 3, 4, 5, 6


def good() -> dict[str, object]:
    targets = torch.zeros(N, T, dtype=torch.int64)
    return {"h": torch.zeros(N, T, K), "weight": torch.zeros(V, K), "targets": targets, "statistics": lambda sums: None}


def wrong_target(value: int) -> Tensor:
    targets = torch.zeros(N, T, dtype=torch.int64)
    targets[2, 1] = value
    return targets


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"h": [1.0]}, TypeError, ["h:", "Tensor", "list"]),
        ({"h": torch.zeros(N, K)}, ValueError, ["h:", "N, T, K", "(3, 5)"]),
        ({"h": torch.zeros(N, T, K, dtype=torch.int64)}, TypeError, ["h:", "float32", "int64"]),
        ({"weight": None}, TypeError, ["weight:", "Tensor", "NoneType"]),
        ({"weight": torch.zeros(V, K, 1)}, ValueError, ["weight:", "V, K", "(6, 5, 1)"]),
        ({"weight": torch.zeros(V, K + 1)}, ValueError, ["weight:", "(V, 5)", "(6, 6)"]),
        ({"weight": torch.zeros(V, K, dtype=torch.bfloat16)}, TypeError, ["weight:", "float32, the dtype of h", "bfloat16"]),
        ({"weight": torch.zeros(V, K, device="meta")}, ValueError, ["weight:", "cpu", "meta"]),
        ({"targets": [[0]]}, TypeError, ["targets:", "Tensor", "list"]),
        ({"targets": torch.zeros(N, T)}, TypeError, ["targets:", "integers", "float32"]),
        ({"targets": torch.zeros(N, T, dtype=torch.bool)}, TypeError, ["targets:", "integers", "bool"]),
        ({"targets": torch.zeros(N * T, dtype=torch.int64)}, ValueError, ["targets:", "(3, 4)", "(12,)"]),
        ({"targets": torch.zeros(N, T, dtype=torch.int64, device="meta")}, ValueError, ["targets:", "cpu", "meta"]),
        ({"targets": wrong_target(V)}, ValueError, ["targets:", "[0, 6)", "ignore_index = -100", "got 6 at (2, 1)"]),
        ({"targets": wrong_target(-1)}, ValueError, ["targets:", "[0, 6)", "got -1 at (2, 1)"]),
        ({"targets": wrong_target(-100), "ignore_index": -1}, ValueError, ["targets:", "= -1", "got -100"]),
        ({"ignore_index": None}, TypeError, ["ignore_index:", "integer", "NoneType"]),
        ({"statistics": 1}, TypeError, ["statistics:", "callable", "int"]),
        ({"statistics": None, "direction": torch.zeros(V, K)}, ValueError, ["direction:", "statistics"]),
        ({"statistics": None, "gram": True}, ValueError, ["gram:", "statistics"]),
        ({"direction": torch.zeros(K, V)}, ValueError, ["direction:", "(6, 5)", "(5, 6)"]),
        ({"direction": "u"}, TypeError, ["direction:", "Tensor", "str"]),
        ({"direction": torch.zeros(V, K, device="meta")}, ValueError, ["direction:", "cpu", "meta"]),
        ({"vocabulary_chunk": 0}, ValueError, ["vocabulary_chunk:", "positive", "0"]),
        ({"vocabulary_chunk": 1.5}, ValueError, ["vocabulary_chunk:", "positive", "1.5"]),
        ({"impl": "fast"}, ValueError, ["impl:", "chunked", "'fast'"]),
        ({"impl": "reference"}, ValueError, ["impl:", "reference"]),
        ({"impl": "cuda"}, RuntimeError, ["impl:", "cuda", "not available"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, (dict, list)) else x.__name__,
)
def test_bad_arguments(change, error, words):
    zk.linear_cross_entropy(**good())
    with pytest.raises(error) as raised:
        zk.linear_cross_entropy(**{**good(), **change})
    assert all(word in str(raised.value) for word in words), raised.value


def test_tensors_without_data_give_shapes():
    arguments = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in good().items()}
    losses = zk.linear_cross_entropy(**arguments)
    assert losses.is_meta
    assert (losses.shape, losses.dtype) == ((N, T), torch.float32)
