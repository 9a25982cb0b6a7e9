"""Every token's own gradient, exactly, against one backward pass for each token."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zerosum
import zsl_kernels as zk
from tests.inputs import sums_of
from tests.zerosum import models
from tests.zerosum.models import Between, SquaredProduct, Tied, TwoLayers, varied
from tests.zerosum.oracle import (
    assert_covers,
    assert_truth,
    assert_unchanged,
    direction_for,
    error,
    per_example_gradients,
    snapshot,
    trainable,
)
from tests.zerosum.transformers_models import ARCHITECTURES, IGNORED, Architecture, gpt2, plain
from zerosum.probe import contributions
from zerosum.tokens import measure
from zerosum.tokens.cut import separators
from zerosum.tokens.measure import LARGEST_CHUNK
from zerosum.tokens.passes import Cut, find_cut
from zerosum.training.model import GPT, GPTConfig, token_losses

Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]
VOCAB = 17


def cross_entropies(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N, T) losses of a model whose output is logits or has them; 0 where a target is ignored."""
    output = model(x)
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none", ignore_index=IGNORED).view(y.shape)


def squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N, T) losses of a model with any outputs, which weigh by the target."""
    return model(x).square().flatten(2).mean(2) * (1 + y)


def gpt(dtype: torch.dtype = torch.float64, positions: int = 40) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=VOCAB, width=16, layers=2, heads=2, positions=positions))
    with torch.no_grad():
        model.head.weight.mul_(10)
    return model.to(dtype).train()


def small(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().train()


def batch(n: int = 3, t: int = 7, vocab: int = 11, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (n, t), generator=generator), torch.randint(0, vocab, (n, t), generator=generator)


def truth_of(model: nn.Module, x: Tensor, y: Tensor, losses: Losses) -> dict[str, Tensor]:
    """(N·T, *parameter.shape): one backward pass for each token, of each sequence by itself."""
    model.eval()
    parts = [
        per_example_gradients(losses(model, x[i : i + 1], y[i : i + 1]).flatten(), model, trainable(model)) for i in range(len(x))
    ]
    model.train()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_exact(
    model: nn.Module, x: Tensor, y: Tensor, losses: Losses, rtol: float = 1e-9, refusable: bool = False, **options: Any
) -> zerosum.Report:
    """The report, after every field of it was found right."""
    truth, direction = truth_of(model, x, y, losses), direction_for(model)
    report = zerosum.token_report(model, x, y, losses=losses, direction=direction, **options)
    assert isinstance(report, zerosum.Report)
    assert report.num_examples == x.numel()
    assert_truth(report, truth, direction, rtol=rtol, gram=False, refusable=refusable)
    if not refusable:
        assert_covers(report, model, truth)
    return report


def least_memory(
    model: nn.Module, x: Tensor, y: Tensor, losses: Losses, sample: int | None = None
) -> tuple[int, int, int, int, int]:
    """What a report takes, in its own words: in all, throughout, for a sequence's losses, for going back, and for each token."""
    with pytest.raises(ValueError, match="memory: expected at least") as caught:
        zerosum.token_report(model, x, y, losses=losses, memory=1, sample=sample)
    least, got, *parts = map(int, re.findall(r"\d+", str(caught.value)))
    assert got == 1
    throughout, sequence, back, token = parts
    assert least == throughout + max(sequence, back + token)
    return least, throughout, sequence, back, token


# Parity.


@pytest.mark.parametrize(("n", "t"), [(3, 7), (1, 5), (4, 1), (1, 1), (2, 35), (4, 4)])
def test_our_gpt(n: int, t: int) -> None:
    report = assert_exact(gpt(), *batch(n, t, VOCAB), token_losses)
    assert report.metrics["D_grad"].n == n * t


def test_rows_of_tables_may_be_padded_as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def most_rows(lookup: contributions.RowGather) -> int:
        asked.append(lookup)
        return min(lookup.num_rows, lookup.rows.numel())

    monkeypatch.setattr(contributions, "most_rows", most_rows)
    x, y = batch(3, 7, VOCAB)
    assert_exact(gpt(), x % 3, y, token_losses)
    assert asked


@pytest.mark.parametrize("size", [1, 3, LARGEST_CHUNK])
def test_results_do_not_depend_on_the_chunk(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LARGEST_CHUNK", size)
    model, (x, y) = gpt(), batch(2, 34, VOCAB)
    done: list[tuple[int, int]] = []
    progress = lambda d, total: done.append((d, total))  # noqa: E731
    assert_exact(model, x, y, token_losses, progress=progress)
    ends = [min(start + size, 34) + before for before in (0, 34) for start in range(0, 34, size)]
    assert done == [(end, 68) for end in ends]


def test_memory_sets_the_chunk_and_the_sequences_of_a_pass() -> None:
    model, (x, y) = gpt(), batch(7, 34, VOCAB)
    least, throughout, sequence, back, token = least_memory(model, x, y, token_losses)
    ran: list[int] = []

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[1] == 34 and torch.is_grad_enabled():
            ran.append(len(x))
        return token_losses(model, x, y)

    for memory, together in ((least, 1), (throughout + 3 * sequence, 3)):
        ran.clear()
        done: list[int] = []
        assert_exact(model, x, y, losses, memory=memory, progress=lambda d, total, done=done: done.append(d))
        assert max(ran) == together
        # (What several sequences have at the cut is kept besides.)
        rows = together * 34 * 16 * 8
        assert done[0] in range((memory - throughout - rows - back) // token, (memory - throughout - back) // token + 1)
    with pytest.raises(ValueError, match=f"memory: expected at least {least} bytes, got {least - 1}"):
        zerosum.token_report(model, x, y, memory=least - 1)


@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if not a.name.startswith("t5")], ids=lambda architecture: architecture.name
)
def test_transformers(architecture: Architecture) -> None:
    """Of plain sequences, whatever batch the architecture is for."""
    model, inputs = architecture.model(architecture.dtype), plain(3, 7)
    x, y = inputs["input_ids"], inputs["targets"]
    truth, direction = truth_of(model, x, y, cross_entropies), direction_for(model)
    report = zerosum.token_report(model, x, y, losses=cross_entropies, direction=direction)
    rtol = 1e-5 if architecture.dtype == torch.float32 else 1e-6 if architecture.rounds else 1e-9
    assert_truth(report, truth, direction, rtol=rtol, gram=False, vanishing=architecture.vanishing)
    assert_covers(report, model, truth)


# Those whose output is no row for each token, that draw random numbers, or whose derivative torch warns that it cannot vectorize.
NO_ROWS = {
    *(models.Pooled, models.FourDimensional, models.ChannelsFirst, models.LoopOverExamples, models.PositionParameter),
    *(models.ClassToken, models.PromptTokens, models.MeanOfEmbeddings, models.BagOfEmbeddings),
}
OTHERS = {models.Dropout, models.Bilinear, models.Packed}
# What only a second run for each example covers, and tokens have none.
NOT_COVERED = {
    *(models.Products, models.Heads, models.BatchedProduct, models.MixtureDense, models.IndexedTable),
    *(models.Convolution, models.Recurrent, models.RecurrentSequenceFirst, models.TorchAttention, models.CustomFunction),
}


@pytest.mark.parametrize("kind", [kind for kind in models.ZOO if kind not in NO_ROWS | OTHERS])
def test_the_zoo(kind: type[TwoLayers]) -> None:
    model, (x, y) = small(kind), batch(3, 6)
    assert_exact(model, x, y, squares, rtol=kind.rtol, refusable=kind in NOT_COVERED)


@pytest.mark.parametrize("kind", [models.Tied, models.SplitQKV, models.Mixture, models.SequenceFirst, models.PositionsOnceTwice])
@pytest.mark.parametrize("size", [1, 2])
def test_the_zoo_in_small_chunks(kind: type[TwoLayers], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LARGEST_CHUNK", size)
    model, (x, y) = small(kind), batch(3, 6)
    assert_exact(model, x, y, squares)


class Mixing(Between):
    """Positions are mixed causally between linear layers, so that these lie before the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x).cumsum(1))


class NoTail(Mixing):
    """Nothing is a position's own."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).cumsum(1)


class Reused(Mixing):
    """One block runs three times, the last of them mixing too."""

    def middle(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + super().middle(x) / 3
        return x


class ReusedOnBothSides(Mixing):
    """A layer before and behind the last mixing."""

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(super().middle(x)))


class Norms(Mixing):
    """Norms with weights before the mixing, whose derivative a rule takes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.rms, self.whole = varied(nn.RMSNorm(12)), varied(nn.LayerNorm((3, 4)))

    def middle(self, x: Tensor) -> Tensor:
        return super().middle(self.whole(self.rms(x).unflatten(-1, (3, 4))).flatten(-2))


class TiedSequenceFirst(Tied):
    """A tied head on (T, N, K)."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens))).cumsum(1)
        return self.head(x.transpose(0, 1)).transpose(0, 1)


class InPlaceSum(Mixing):
    """What is written to where the cut might be."""

    def middle(self, x: Tensor) -> Tensor:
        y = self.layer(x).cumsum(1)
        y.add_(self.layer(x.sin()).cumsum(1))
        return y


@pytest.mark.parametrize("kind", [Mixing, NoTail, Reused, ReusedOnBothSides, Norms, TiedSequenceFirst, InPlaceSum])
@pytest.mark.parametrize("size", [3, 32])
def test_where_positions_are_mixed(kind: type[TwoLayers], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LARGEST_CHUNK", size)
    model, (x, y) = small(kind), batch()
    assert_exact(model, x, y, squares)


class Headless(nn.Module):
    """Hidden states of a GPT; its head is the loss's."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.gpt = gpt()
        if tied:
            self.gpt.head.weight = self.gpt.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden: list[Tensor] = []
        handle = self.gpt.head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        try:
            self.gpt(x)
        finally:
            handle.remove()
        return hidden[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_never_holds_its_logits(tied: bool) -> None:
    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return zk.linear_cross_entropy(model(x), model.gpt.head.weight, y)

    torch.manual_seed(0)
    model, (x, y) = Headless(tied).train(), batch(2, 9, VOCAB)
    y[0, 3] = IGNORED
    truth = truth_of(model, x, y, lambda model, x, y: cross_entropies(model.gpt, x, y))  # type: ignore[arg-type]
    truth = {name: g[y.flatten() != IGNORED] for name, g in truth.items()}
    direction = direction_for(model)
    report = zerosum.token_report(model, x, y, losses=losses, direction=direction)
    assert_truth(report, truth, direction, gram=False)
    assert_covers(report, model, truth)


@pytest.mark.parametrize("kind", [gpt, lambda: varied(gpt2("eager")()).double()], ids=["own", "gpt2"])
def test_ignored_targets_are_no_examples(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, (x, y) = kind(), batch(3, 7, VOCAB)
    y[0, 2:4] = y[2] = IGNORED
    truth, direction = truth_of(model, x, y, cross_entropies), direction_for(model)
    report = zerosum.token_report(model, x, y, losses=cross_entropies, direction=direction)
    assert isinstance(report, zerosum.Report)
    assert report.num_examples == 12
    assert_truth(report, {name: g[y.flatten() != IGNORED] for name, g in truth.items()}, direction, gram=False)


def test_frozen_parameters_are_left_out() -> None:
    model, (x, y) = gpt(), batch(2, 9, VOCAB)
    for name, p in model.named_parameters():
        p.requires_grad_("qkv" in name or "blocks.1.mlp.up" in name)
    report = assert_exact(model, x, y, token_losses)
    assert sorted(report) == ["blocks.0.attention.qkv.weight", "blocks.1.attention.qkv.weight", "blocks.1.mlp.up.weight"]


def test_only_what_lies_behind_the_cut_or_before_it_is_trained() -> None:
    for trained in ("head", "embedding"):
        model, (x, y) = gpt(), batch(2, 9, VOCAB)
        for name, p in model.named_parameters():
            p.requires_grad_(trained in name)
        assert list(assert_exact(model, x, y, token_losses)) == [f"{trained}.weight"]


def test_an_unused_parameter_is_said_to_be_unused() -> None:
    model, (x, y) = small(models.Unreached), batch()
    report = zerosum.token_report(model, x, y, losses=squares)
    assert sorted(report.coverage.not_covered) == [
        f"{module}.{kind}" for module in ("detached", "dropped", "never") for kind in ("bias", "weight")
    ]


def test_dropout_is_off_and_comes_back() -> None:
    model, (x, y) = small(models.Dropout), batch()
    assert_exact(model, x, y, squares)
    assert all(module.training for module in model.modules())


def narrow(dtype: torch.dtype) -> tuple[GPT, Tensor, Tensor]:
    return gpt(dtype), *batch(2, 9, VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_one_backward_pass_for_each_token(dtype: torch.dtype) -> None:
    """Against the float64 truth of the same weights: at most twice the error that plain gradients have, and a rounding."""
    model, x, y = narrow(dtype)
    true = gpt()
    true.load_state_dict(model.state_dict())
    truth = {name: sums_of(g) for name, g in truth_of(true, x, y, token_losses).items()}
    naive = {name: sums_of(g.double()) for name, g in truth_of(model, x, y, token_losses).items()}
    report = zerosum.token_report(model, x, y)
    assert report.coverage.share == 1
    band = 4 * torch.finfo(dtype).eps
    for name, fields in truth.items():
        for field in ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm"):
            found = getattr(report[name], field)
            assert error(found, fields[field]) <= 2 * error(naive[name][field], fields[field]) + band, (name, field)


def test_autocast_in_the_loss() -> None:
    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return token_losses(model, x, y).float()

    model, x, y = narrow(torch.float32)
    truth = truth_of(model, x, y, losses)
    report = zerosum.token_report(model, x, y, losses=losses)
    assert report.coverage.share == 1
    for name, g in truth.items():
        assert error(report[name].abs_sum, g.double().abs().sum(0)) < 0.03


def test_two_runs_agree_to_the_bit() -> None:
    model, (x, y) = gpt(torch.float32), batch(2, 35, VOCAB)
    first, second = (zerosum.token_report(model, x, y, seed=seed) for seed in (0, 1))
    for name in first:
        for field in ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm"):
            assert torch.equal(getattr(first[name], field), getattr(second[name], field))


def test_tokens_are_not_positions() -> None:
    """The cheap proxy has other norms: what reaches earlier positions through attention is not its own."""
    model, (x, y) = gpt(), batch(3, 7, VOCAB)
    tokens = zerosum.token_report(model, x, y)
    probe = zerosum.Probe(model, "position")
    with probe:
        token_losses(model, x, y).sum().backward()
    positions = probe.report()
    torch.testing.assert_close(tokens["blocks.0.mlp.up.weight"].grad_sum, positions["blocks.0.mlp.up.weight"].grad_sum)
    assert error(positions["blocks.0.mlp.up.weight"].abs_sum, tokens["blocks.0.mlp.up.weight"].abs_sum) > 0.05
    # Behind the last attention they are the same.
    torch.testing.assert_close(tokens["head.weight"].abs_sum, positions["head.weight"].abs_sum)


# Nothing of the model changes.


@pytest.mark.parametrize("sample", [None, 8])
def test_the_model_stays_as_it_was(sample: int | None) -> None:
    model, (x, y) = gpt(), batch(2, 7, VOCAB)
    model.blocks[0].eval()
    kept = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = kept[name]
    before = snapshot(model)
    zerosum.token_report(model, x, y, sample=sample, direction=kept)
    assert_unchanged(snapshot(model), before)
    for name, p in model.named_parameters():
        assert p.grad is kept[name]
        assert (kept[name] == 3).all()


@pytest.mark.parametrize("sample", [None, 8])
@pytest.mark.parametrize("calls", [0, 1, 3, 4, 5, 6])
def test_the_model_stays_as_it_was_when_the_loss_fails(sample: int | None, calls: int) -> None:
    model, (x, y) = gpt(), batch(2, 7, VOCAB)
    left = calls

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        nonlocal left
        values = token_losses(model, x, y)
        if not left:
            raise ZeroDivisionError
        left -= 1
        return values

    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        zerosum.token_report(model, x, y, losses=losses, sample=sample)
    assert_unchanged(snapshot(model), before)


@pytest.mark.parametrize("sample", [None, 8])
def test_the_model_stays_as_it_was_when_it_is_interrupted(sample: int | None) -> None:
    model, (x, y) = gpt(), batch(2, 7, VOCAB)

    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        zerosum.token_report(model, x, y, sample=sample, progress=progress)
    assert_unchanged(snapshot(model), before)
    assert_exact(model, x, y, token_losses)


def test_without_gradients_around_it() -> None:
    model, (x, y) = gpt(), batch(2, 7, VOCAB)
    with torch.no_grad():
        report = zerosum.token_report(model, x, y)
    assert report.coverage.share == 1


# The cut.


def cut_of(model: nn.Module, losses: Losses = cross_entropies, vocab: int = VOCAB) -> tuple[set[str], set[str]]:
    """The names of the parameters behind it, and on both sides."""
    names = {id(p): name for name, p in model.named_parameters()}
    cut: Cut = find_cut(model.eval(), losses, *batch(1, 7, vocab), torch.Generator().manual_seed(0))
    return {names[key] for key in cut.tail}, {names[key] for key in cut.tied}


def architecture_called(name: str) -> nn.Module:
    return next(a for a in ARCHITECTURES if a.name == name).model()


def test_the_cut_is_behind_the_last_attention() -> None:
    assert cut_of(gpt()) == ({"blocks.1.mlp.up.weight", "blocks.1.mlp.down.weight", "head.weight"}, set())
    mlp = {f"transformer.h.1.{x}.{kind}" for x in ("ln_2", "mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")}
    final = {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert cut_of(architecture_called("gpt2-eager")) == (mlp | final, {"transformer.wte.weight"})
    tail, tied = cut_of(architecture_called("mixtral-eager"))
    assert {"model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.gate.weight", "lm_head.weight"} <= tail
    assert not tied


def test_rows_that_are_sorted_by_expert_are_named_by_position() -> None:
    """So that the cut does not depend on how the experts are computed."""
    eager, grouped = (
        next(a for a in ARCHITECTURES if a.name == f"mixtral-{name}").model(torch.float32) for name in ("eager", "grouped_mm")
    )
    assert cut_of(grouped) == cut_of(eager)


def test_without_a_tail_the_losses_are_the_cut() -> None:
    assert cut_of(small(NoTail), squares, 11) == (set(), set())
    assert cut_of(small(ReusedOnBothSides), squares, 11) == ({"head.weight"}, {"layer.weight", "layer.bias"})


def found_separators(loss: Tensor, activations: list[Tensor]) -> list[int]:
    """Which of the activations they are, from the loss on."""
    nodes = {x.grad_fn: k for k, x in enumerate(activations)}
    return [nodes[edge.node] for edge in separators(loss, nodes)]  # type: ignore[arg-type]


def test_separators_of_a_chain_and_of_branches() -> None:
    w = torch.randn(3, requires_grad=True)
    a = w * 2
    b = a.sin()
    c = b.cos()
    assert found_separators(c.exp(), [a, b, c]) == [2, 1, 0]
    # A residual: nothing inside of the branch separates, what it leaves and where it ends do.
    d = b + c
    assert found_separators(d.exp(), [a, b, c, d]) == [3, 1, 0]
    # Two branches from the leaf: nothing but their sum separates.
    e, f = w.sin(), w.cos()
    g = e + f
    assert found_separators(g.exp(), [e, f, g])[0] == 2
    # Weights alone lead to no activation.
    v = torch.randn(3, requires_grad=True)
    h = b * v.exp()
    assert found_separators(h.exp(), [a, b, h]) == [2, 1, 0]


def test_a_node_of_several_results_is_no_separator() -> None:
    w = torch.randn(4, requires_grad=True)
    a = w * 2
    left, right = a.chunk(2)
    b = left * right.sin()
    assert found_separators(b.exp(), [a, left, right, b]) == [3, 0]


# Bidirectional models.


@pytest.mark.parametrize("kind", [models.SplitQKV, models.HeadNorms, models.HalfOfThePositions])
def test_later_positions_are_kept_where_they_matter(kind: type[TwoLayers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LARGEST_CHUNK", 2)
    model, (x, y) = small(kind), batch(2, 9)
    assert_exact(model, x, y, squares)


# What cannot be measured.


class SeenAndUnseen(Mixing):
    """A weight of a linear layer and of an autograd.Function, which nothing shows."""

    def middle(self, x: Tensor) -> Tensor:
        return super().middle(x + SquaredProduct.apply(x, self.layer.weight))


class DerivedAndUnseen(Mixing):
    """The same for a function of the weight."""

    def middle(self, x: Tensor) -> Tensor:
        mixed = F.linear(x, 1 + self.layer.weight, self.layer.bias).cumsum(1)
        return torch.tanh(mixed + SquaredProduct.apply(x, self.layer.weight).cumsum(1))


class UnseenTail(Mixing):
    """The unseen operation is behind the mixing."""

    def forward(self, tokens: Tensor) -> Tensor:
        return SquaredProduct.apply(self.middle(torch.tanh(self.first(self.embedding(tokens)))), self.head.weight)


class UnseenTied(Tied):
    """Of a tied weight, the head is unseen."""

    def forward(self, tokens: Tensor) -> Tensor:
        return SquaredProduct.apply(torch.tanh(self.first(self.embedding(tokens))).cumsum(1), self.embedding.weight)


@pytest.mark.parametrize("sample", [None, 8])
@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (models.CustomFunction, "weight"),
        (SeenAndUnseen, "layer.weight"),
        (DerivedAndUnseen, "layer.weight"),
        (UnseenTail, "head.weight"),
        (UnseenTied, "embedding.weight"),
    ],
)
def test_an_operation_that_the_probe_cannot_see(kind: type[TwoLayers], missing: str, sample: int | None) -> None:
    model, (x, y) = small(kind), batch()
    truth = truth_of(model, x, y, squares)
    report = zerosum.token_report(model, x, y, losses=squares, sample=sample)
    assert list(report.coverage.not_covered) == [missing]
    assert "an operation that the probe cannot see" in report.coverage.not_covered[missing]
    if isinstance(report, zerosum.Report):
        assert_truth(report, truth, gram=False, refusable=True)


@pytest.mark.parametrize(
    ("reentrant", "message"), [(False, "uses activation checkpointing or offloading"), (True, "use_reentrant=True")]
)
@pytest.mark.parametrize("behind", [False, True])
def test_a_checkpoint_is_refused(reentrant: bool, behind: bool, message: str) -> None:
    class Checkpointed(Mixing):
        def middle(self, x: Tensor) -> Tensor:
            if behind:
                return checkpoint(self.layer, super().middle(x), use_reentrant=reentrant)
            return checkpoint(super().middle, x, use_reentrant=reentrant)

    model, (x, y) = small(Checkpointed), batch()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=message):
        zerosum.token_report(model, x, y, losses=squares)
    assert_unchanged(snapshot(model), before)


def test_a_checkpoint_in_training_alone_does_not_matter() -> None:
    """As transformers have it: the model is measured in eval mode."""

    class Checkpointed(Mixing):
        def middle(self, x: Tensor) -> Tensor:
            if self.training:
                raise AssertionError
            return super().middle(x)

    truth_model = small(Mixing)
    model, (x, y) = small(Checkpointed), batch()
    truth = truth_of(truth_model, x, y, squares)
    assert_truth(zerosum.token_report(model, x, y, losses=squares), truth, gram=False)


class Branching(Mixing):
    """Does more for some sequences: one addition more before the mixing, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(12, 12)

    def special(self, tokens: Tensor) -> bool:
        return bool(tokens[0, 0] % 2 == 0)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens)))
        if self.special(tokens):
            x = x + 0.5
        for _ in range(2):
            x = x + self.layer(x).cumsum(1)
        return self.head(x + torch.tanh(self.more(x)))


class BranchingByLength(Branching):
    """... for short ones, ..."""

    def special(self, tokens: Tensor) -> bool:
        return tokens.shape[1] < 5


@pytest.mark.parametrize("sample", [None, 8])
@pytest.mark.parametrize("kind", [Branching, BranchingByLength])
def test_sequences_by_different_operations_are_never_silently_wrong(kind: type[TwoLayers], sample: int | None) -> None:
    refused = 0
    for first in ([1, 2], [2, 1]):
        model, (x, y) = small(kind), batch(2, 9)
        x[:, 0] = torch.tensor(first)
        truth = truth_of(model, x, y, squares)
        try:
            report = zerosum.token_report(model, x, y, losses=squares, sample=sample, memory=2**31)
        except RuntimeError as problem:
            assert "by the same operations" in str(problem)  # noqa: PT017
            refused += 1
            continue
        refused += bool(report.coverage.not_covered)
        for name in report:
            assert error(report[name].grad_sum, truth[name].sum(0)) < 1e-9
        if isinstance(report, zerosum.Report):
            assert_truth(report, truth, gram=False, refusable=True)
    assert refused == (2 if kind is Branching else refused)


class RareExpert(Mixing):
    """A module behind the mixing that few sequences go through."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Linear(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        x = super().middle(x)
        return torch.where(self.special, self.rare(x), x) if self.special.any() else x

    def forward(self, tokens: Tensor) -> Tensor:
        self.special = (tokens[:, :1] == 2).unsqueeze(2)
        return super().forward(tokens)


@pytest.mark.parametrize("sample", [None, 8])
def test_a_weight_that_the_first_sequence_does_not_use_behind_the_cut(sample: int | None) -> None:
    model, (x, y) = small(RareExpert), batch(2, 9)
    x[:, 0] = torch.tensor([1, 2])
    report = zerosum.token_report(model, x, y, losses=squares, sample=sample)
    assert set(report.coverage.not_covered) == {"rare.weight", "rare.bias"}
    assert "some sequences use it before the last mixing" in report.coverage.not_covered["rare.weight"]
    truth = truth_of(model, x, y, squares)
    for name in report:
        assert error(report[name].grad_sum, truth[name].sum(0)) < 1e-9


# Bad arguments.


def test_bad_arguments_are_named() -> None:
    model, (x, y) = gpt(), batch(2, 7, VOCAB)
    direction = direction_for(model)
    report: Any = zerosum.token_report
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        report([], x, y)
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got list"):
        report(model, [1], y)
    with pytest.raises(TypeError, match=r"y: expected a torch\.Tensor, got NoneType"):
        report(model, x, None)
    for bad in ((x[0], y[0]), (x, y[:, 1:]), (x[:0], y[:0]), (x[:, :0], y[:, :0])):
        with pytest.raises(ValueError, match=r"x, y: expected \(N, T\) token ids and targets, got shapes"):
            report(model, *bad)
    with pytest.raises(TypeError, match=r"losses: expected a function of \(model, x, y\), got str"):
        report(model, x, y, losses="mean")
    for sample in (7, 0, -1, 8.0, "all", True):
        with pytest.raises(ValueError, match="sample: expected None or at least 8 draws, got"):
            report(model, x, y, sample=sample)
    for memory in (0, -5, 1.5e9, None):
        with pytest.raises(ValueError, match="memory: expected a positive number of bytes, got"):
            report(model, x, y, memory=memory)
    for sample in (None, 8):
        with pytest.raises(ValueError, match=r"memory: expected at least \d+ bytes, got 100: "):
            report(model, x, y, memory=100, sample=sample)
        with pytest.raises(TypeError, match="direction: expected a mapping"):
            report(model, x, y, direction=[1], sample=sample)
        with pytest.raises(ValueError, match="direction: 'what' is not a parameter of the model"):
            report(model, x, y, direction={"what": x}, sample=sample)
        with pytest.raises(ValueError, match=r"direction\['head.weight'\]: expected a tensor of shape \(17, 16\), got \(16, 17\)"):
            report(model, x, y, direction=direction | {"head.weight": direction["head.weight"].T}, sample=sample)
        some = {name: u for name, u in direction.items() if name != "head.weight"}
        with pytest.raises(ValueError, match=r"direction: expected one for every trainable parameter, got none for head.weight"):
            report(model, x, y, direction=some, sample=sample)


def test_bad_losses_are_named() -> None:
    model, (x, y) = gpt(), batch(2, 7, VOCAB)
    report: Any = zerosum.token_report
    with pytest.raises(ValueError, match=r"losses: expected one loss per token, shape \(1, 7\), got shape \(1,\)"):
        report(model, x, y, losses=lambda m, x, y: token_losses(m, x, y).mean(1))
    with pytest.raises(ValueError, match=r"losses: expected one loss per token, shape \(1, 7\), got float"):
        report(model, x, y, losses=lambda m, x, y: 1.0)
    with pytest.raises(ValueError, match=r"losses: expected a function that autograd can differentiate"):
        report(model, x, y, losses=lambda m, x, y: token_losses(m, x, y).detach())
    with pytest.raises(ValueError, match=r"losses: expected finite numbers, got infinities or NaN"):
        report(model, x, y, losses=lambda m, x, y: token_losses(m, x, y) / 0)


def test_a_tied_weight_s_direction_may_have_either_name() -> None:
    model, (x, y) = small(Tied), batch()
    direction = direction_for(model)
    other = {("head.weight" if name == "embedding.weight" else name): u for name, u in direction.items()}
    first, second = (zerosum.token_report(model, x, y, losses=squares, direction=u) for u in (direction, other))
    assert first.dot is not None
    assert second.dot is not None
    assert torch.equal(first.dot, second.dot)
