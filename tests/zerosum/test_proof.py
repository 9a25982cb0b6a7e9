"""What a probe keeps from block to block: structures that are proved once, weights that have one use, and what goes wrong then."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zerosum
from tests.zerosum.models import Mixture, Tied, TwoLayers, UsedTwice
from tests.zerosum.oracle import assert_truth, gradients, per_example_gradients, trainable
from zerosum.probe.capture import Capture
from zerosum.probe.parameters import ParameterProbe
from zerosum.probe.proof import Proof, Prover
from zerosum.probe.rules.site import Site


def losses_of(output: Tensor) -> Tensor:
    return output.square().flatten(1).mean(1)


def setup(kind: type[TwoLayers], n: int = 8, t: int = 6) -> tuple[TwoLayers, Tensor]:
    torch.manual_seed(0)
    return kind().double(), torch.randint(0, 11, (n, t))


def step(probe: zerosum.Probe, model: nn.Module, tokens: Tensor) -> zerosum.Report:
    model.zero_grad()
    with probe:
        losses_of(model(tokens)).sum().backward()
    return probe.report()


def held() -> Counter[str]:
    """Objects of the probe's, and tensors, that are alive."""
    gc.collect()
    kinds = (Tensor, Capture, Site, Proof, Prover, ParameterProbe)
    names = (type(x).__name__ for x in gc.get_objects() if issubclass(type(x), kinds))
    return Counter(names)


def one_more(probe: zerosum.Probe, model: nn.Module, tokens: Tensor) -> None:
    step(probe, model, tokens)


def one_that_fails(probe: zerosum.Probe, model: nn.Module, tokens: Tensor) -> None:
    with contextlib.suppress(KeyError), probe:
        losses_of(model(tokens)).sum().backward()
        raise KeyError


def one_without_a_backward_pass(probe: zerosum.Probe, model: nn.Module, tokens: Tensor) -> None:
    with probe:
        losses_of(model(tokens))


def one_with_micro_batches(probe: zerosum.Probe, model: nn.Module, tokens: Tensor) -> None:
    with probe:
        for _ in range(3):
            losses_of(model(tokens)).sum().backward()
    model.zero_grad()


@pytest.mark.parametrize("block", [one_more, one_that_fails, one_without_a_backward_pass, one_with_micro_batches])
@pytest.mark.parametrize("new", [False, True], ids=["", "new probes"])
def test_nothing_is_left_of_a_block(block: Callable[..., None], new: bool) -> None:
    cases = [(kind, verify) for kind in (TwoLayers, Tied, UsedTwice, Mixture) for verify in ("once", "always")]
    models = [(*setup(kind), verify) for kind, verify in cases]
    probes = [zerosum.Probe(model, verify=verify) for model, _, verify in models]
    counts = []
    for _ in range(3):
        if new:
            probes = [zerosum.Probe(model, verify=verify) for model, _, verify in models]
        for probe, (model, tokens, _) in zip(probes, models, strict=True):
            for _ in range(4):
                block(probe, model, tokens)
        counts.append(held())
    assert counts[1] == counts[2]


@pytest.mark.parametrize("kind", [TwoLayers, Tied, UsedTwice])
def test_a_structure_is_proved_once(kind: type[TwoLayers]) -> None:
    model, tokens = setup(kind)
    probe = zerosum.Probe(model, gram=True)
    extra = []
    for k in range(4):
        tokens = (tokens + k) % 11
        report = step(probe, model, tokens)
        assert_truth(report, per_example_gradients(losses_of(model(tokens)), model, trainable(model)))
        extra.append(report.proof.extra)
    assert extra[0] > 0
    assert extra[1:] == [0, 0, 0]
    assert "proved before" in str(report.proof)


def test_another_shape_is_another_structure() -> None:
    model, _ = setup(TwoLayers)
    probe, extra = zerosum.Probe(model, gram=True), []
    for n, t in [(8, 6), (9, 9), (8, 6), (9, 9), (20, 2)]:
        tokens = torch.randint(0, 11, (n, t))
        report = step(probe, model, tokens)
        assert_truth(report, per_example_gradients(losses_of(model(tokens)), model, trainable(model)))
        extra.append(report.proof.extra)
    assert [e > 0 for e in extra] == [True, True, False, False, True]
    assert extra[4] == extra[0] + 1  # 20 examples are named by two digits


@pytest.mark.parametrize(
    ("verify", "proved"), [("once", [1, 0, 0, 0, 0]), ("always", [1] * 5), (2, [1, 0, 1, 0, 1]), ("never", [0] * 5)]
)
def test_how_often_attribution_is_proved(verify: str | int, proved: list[int]) -> None:
    model, tokens = setup(TwoLayers)
    probe = zerosum.Probe(model, verify=verify)
    truth = per_example_gradients(losses_of(model(tokens)), model, trainable(model))
    found = []
    for _ in proved:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without proof the losses' factors are not read
            report = step(probe, model, tokens)
        assert_truth(report, truth, gram=False)
        found.append(report.proof.proved)
    assert found == proved
    assert bool(report.proof.trusted) == (verify == "never")


def test_rows_in_no_order_are_named_in_every_pass() -> None:
    """Experts: the routing changes with the tokens."""
    model, tokens = setup(Mixture)
    probe = zerosum.Probe(model, gram=True)
    for k in range(3):
        tokens = (tokens * 3 + k) % 11
        report = step(probe, model, tokens)
        assert report.proof.proved == 1
        assert_truth(report, per_example_gradients(losses_of(model(tokens)), model, trainable(model)))


class Sorted(nn.Module):
    """A layer on examples that the data puts in order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x.detach()[:, 0].argsort()
        return self.head(torch.tanh(self.layer(x[order]))[order.argsort()])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_rows_that_were_in_order_by_chance_are_named_again(n: int) -> None:
    torch.manual_seed(0)
    model, x = Sorted().double(), torch.randn(n, 5, dtype=torch.float64).sort(0)[0]
    probe = zerosum.Probe(model, gram=True)
    for data in (x, x.flip(0), x, x, x.roll(1, 0)):
        model.zero_grad()
        with probe:
            losses_of(model(data)).sum().backward()
        report = probe.report()
        assert report.proof.proved == 1
        assert_truth(report, per_example_gradients(losses_of(model(data)), model, trainable(model)))


@pytest.mark.parametrize(("n", "proofs"), [(1, 0), (2, 14), (3, 6), (4, 3), (5, 2), (7, 2), (8, 1), (20, 1)])
def test_few_examples_are_proved_until_chance_is_ruled_out(n: int, proofs: int) -> None:
    model, tokens = setup(TwoLayers, n)
    probe = zerosum.Probe(model)
    proved = [step(probe, model, tokens).proof.proved for _ in range(proofs + 2)]
    assert proved == [1] * proofs + [0, 0]


class AddedMatrix(nn.Module):
    """Calls of addmm and F.linear with operands that the rule does not take, or takes by keyword."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.shift, self.weight = nn.Parameter(torch.randn(n, 6)), nn.Parameter(torch.randn(6, 6))
        self.bias, self.last = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(torch.addmm(self.shift, x, self.weight))
        x = torch.tanh(torch.addmm(self.bias, x, self.weight, beta=0.5))
        return F.linear(x, self.last.weight, bias=self.last.bias)


def test_calls_that_the_short_way_does_not_take() -> None:
    torch.manual_seed(0)
    model, x = AddedMatrix(8).double(), torch.randn(8, 6, dtype=torch.float64)
    truth = per_example_gradients(losses_of(model(x)), model, trainable(model))
    probe = zerosum.Probe(model, gram=True)
    for _ in range(4):
        model.zero_grad()
        with probe:
            losses_of(model(x)).sum().backward()
        assert_truth(probe.report(), truth)
        torch.testing.assert_close(gradients(model), {name: g.sum(0) for name, g in truth.items()}, rtol=1e-9, atol=1e-12)


class Columns(nn.Module):
    """A layer on each position by itself, or on each example, then a function of all of them."""

    def __init__(self, dim: int, centered: bool) -> None:
        super().__init__()
        self.layer, self.head, self.dim, self.centered = nn.Linear(6, 6), nn.Linear(6, 6), dim, centered

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([torch.tanh(self.layer(part)) for part in x.unbind(self.dim)], self.dim)
        return self.head(h - 0.5 * h.mean(0) if self.centered else h)


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("centered", [False, True])
def test_positions_are_not_taken_for_examples_where_there_are_as_many(dim: int, centered: bool, in_parts: bool) -> None:
    torch.manual_seed(0)
    model, x = Columns(dim, centered).double(), torch.randn(4, 4, 6, dtype=torch.float64)

    def losses() -> Tensor:
        y = model(x)
        return torch.stack([row.square().mean() for row in y]) if in_parts else losses_of(y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if centered else "error")
        with (probe := zerosum.Probe(model, gram=True)):
            sum(losses()).backward() if in_parts else losses().sum().backward()  # type: ignore[union-attr]
    report = probe.report()
    assert_truth(report, per_example_gradients(losses(), model, trainable(model)), refusable=centered)
    assert ("layer.weight" in report) is not centered
    assert "head.weight" in report or in_parts


class Recomputed(nn.Module):
    """A layer in a reentrant checkpoint; after it examples may meet, or the checkpoint's input is added to its result."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.entry, self.inner, self.head, self.kind = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        y = checkpoint(lambda z: torch.tanh(self.inner(z)), x, use_reentrant=True)
        if self.kind == "meet":
            y = y - 0.5 * y.mean(0)
        return self.head(x + y if self.kind == "residual" else y)


@pytest.mark.parametrize(
    ("kind", "covered"),
    [("plain", {"entry", "inner", "head"}), ("meet", {"head"}), ("residual", {"inner", "head"})],
)
def test_reentrant_checkpoints(kind: str, covered: set[str]) -> None:
    torch.manual_seed(0)
    model, x = Recomputed(kind).double(), torch.randn(8, 3, 6, dtype=torch.float64)
    rows = []
    for i in range(8):
        model.zero_grad()
        losses_of(model(x))[i].backward()
        rows.append(gradients(model))
    truth = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    probe = zerosum.Probe(model, gram=True)
    for _ in range(3):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error" if kind == "plain" else "ignore")
            with probe:
                losses_of(model(x)).sum().backward()
        report = probe.report()
        assert {name.split(".")[0] for name in report} == covered
        assert all("reentrant checkpoint" in reason for reason in report.coverage.not_covered.values())
        assert_truth(report, truth, refusable=kind != "plain")
        torch.testing.assert_close(gradients(model), {name: g.sum(0) for name, g in truth.items()}, rtol=1e-9, atol=1e-12)


def test_a_last_batch_of_one_example_whose_positions_come_first() -> None:
    """Batches with more examples have shown where they are."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    probe = zerosum.Probe(model, gram=True)
    for n in (4, 4, 1):
        x = torch.randn(5, n, 3, dtype=torch.float64)
        truth = per_example_gradients(model(x).square().mean((0, 2)), model, trainable(model))
        with probe:
            model(x).square().mean((0, 2)).sum().backward()
        assert probe.report().num_examples == n
        assert_truth(probe.report(), truth)


def test_one_loss_of_an_input_whose_second_dimension_is_one_is_asked_about() -> None:
    """One example whose positions come first, or as many examples as there are rows."""
    model = nn.Linear(3, 3).double()
    with pytest.warns(UserWarning, match="num_examples"), zerosum.Probe(model):
        model(torch.randn(5, 1, 3, dtype=torch.float64)).square().mean((0, 2)).sum().backward()


class Sometimes(TwoLayers):
    """A layer runs twice where ``twice`` says so."""

    twice = False

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.first(self.embedding(tokens)))))
        return self.head(torch.tanh(self.again(x)) if self.twice else x)


def test_a_weight_that_is_used_once_more_is_measured_all_the_same() -> None:
    model, tokens = setup(Sometimes)
    probe = zerosum.Probe(model)
    for twice in (False, False, True, True, False, True):
        model.twice = twice
        truth = per_example_gradients(losses_of(model(tokens)), model, trainable(model))
        report = step(probe, model, tokens)
        torch.testing.assert_close(gradients(model), {name: g.sum(0) for name, g in truth.items()}, rtol=1e-9, atol=1e-12)
        assert_truth(report, truth, gram=False)
        assert not report.coverage.not_covered


def test_blocks_that_are_not_measured_cost_nothing() -> None:
    model, tokens = setup(TwoLayers)
    probe = zerosum.Probe(model, every=3)
    kept = []
    for k in range(6):
        with probe:
            assert probe.measuring == (k % 3 == 0)
            assert bool(torch.overrides._get_current_function_mode_stack()) == probe.measuring
            losses_of(model((tokens + k) % 11)).sum().backward()
        kept.append(probe.report())
    assert kept[0] is kept[1] is kept[2]
    assert kept[3] is kept[5] is not kept[0]
    with pytest.raises(ValueError, match="every: expected a positive integer, got 0"):
        probe.every = 0


def test_a_probe_that_an_exception_left_open_closes_itself() -> None:
    model, tokens = setup(TwoLayers)
    probe = zerosum.Probe(model)
    probe.__enter__()
    model(tokens)
    with pytest.warns(UserWarning, match="left the probe open"):
        report = step(probe, model, tokens)
    assert_truth(report, per_example_gradients(losses_of(model(tokens)), model, trainable(model)), gram=False)
    assert not torch.overrides._get_current_function_mode_stack()
    probe.__enter__()
    probe.close()
    probe.close()
    assert not torch.overrides._get_current_function_mode_stack()
    assert all(p._backward_hooks is None for p in model.parameters())


class Head(torch.autograd.Function):
    """A head in a function of its own, as fused losses are: the mean of the rows' cross entropies."""

    @staticmethod
    def forward(ctx: object, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.enable_grad():
            x, w = h.detach().requires_grad_(), weight.detach().requires_grad_()
            loss = F.cross_entropy(F.linear(x, w), targets)
        ctx.grads = torch.autograd.grad(loss, [x, w])  # type: ignore[attr-defined]
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, c: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dw = ctx.grads  # type: ignore[attr-defined]
        return c * dx, c * dw, None


class Headed(TwoLayers):
    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.first(self.embedding(tokens)))
        return Head.apply(h.flatten(0, 1), self.head.weight, (tokens % 5).flatten())

    def rows(self, tokens: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.first(self.embedding(tokens))))
        return F.cross_entropy(logits.mT, tokens % 5, reduction="none").mean(1)


def test_a_rule_covers_a_head_in_a_function_of_its_own() -> None:
    import zsl_kernels as zk
    from zerosum.probe.rules import APPLIED

    model, tokens = setup(Headed)
    truth = per_example_gradients(model.rows(tokens), model, trainable(model))
    model(tokens).backward()
    plain = gradients(model)
    model.zero_grad()
    probe = zerosum.Probe(model, loss_reduction="mean", gram=True)
    with warnings.catch_warnings(record=True) as caught, probe:
        warnings.simplefilter("always")
        model(tokens).backward()
    report = probe.report()
    assert "head.weight" in report.coverage.not_covered
    assert any("head.weight enters the loss by an operation that the probe cannot see" in str(w.message) for w in caught)
    assert "cannot be differentiated twice" in report.proof.trusted[0]
    assert_truth(report, truth, refusable=True)
    assert set(report.coverage.not_covered) == {"head.weight"}

    @zerosum.rule(Head)
    def head(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return zk.linear_cross_entropy(h[None], weight, targets[None]).mean()

    try:
        model.zero_grad()
        with (probe := zerosum.Probe(model, gram=True)):
            model(tokens).backward()
    finally:
        del APPLIED[Head]
    assert probe.report().coverage.covered["head.weight"] == "linear_cross_entropy"
    assert_truth(probe.report(), truth)
    torch.testing.assert_close(gradients(model), plain, rtol=1e-9, atol=1e-12)
    assert "apply" not in vars(Head)


def test_a_rule_covers_a_function() -> None:
    from zerosum.probe.rules import RULES

    class Bilinear(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.form = nn.Bilinear(12, 12, 12)

        def forward(self, tokens: Tensor) -> Tensor:
            x = torch.tanh(self.first(self.embedding(tokens)))
            return self.head(self.form(x, torch.sin(x)))

    model, tokens = setup(Bilinear)
    truth = per_example_gradients(losses_of(model(tokens)), model, trainable(model))

    @zerosum.rule(F.bilinear)
    def bilinear(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        pairs = (a[..., :, None] * b[..., None, :]).flatten(-2)
        return F.linear(pairs, weight.flatten(1), bias)

    try:
        report = step(zerosum.Probe(model, strict=True), model, tokens)
    finally:
        del RULES[F.bilinear]
    assert report.coverage.covered["form.weight"] == "linear"
    assert_truth(report, truth, gram=False)
    with pytest.raises(TypeError, match=r"function: expected a torch function or an autograd\.Function, got int"):
        zerosum.rule(3)  # type: ignore[arg-type]


def test_arguments_of_verify_and_auxiliary() -> None:
    model, _ = setup(TwoLayers)
    for wrong in ("twice", 0, True, 1.5):
        with pytest.raises(ValueError, match="verify: expected 'once', 'always', 'never' or a positive integer"):
            zerosum.Probe(model, verify=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loss: expected a torch\.Tensor, got float"):
        zerosum.auxiliary(1.0)  # type: ignore[arg-type]
