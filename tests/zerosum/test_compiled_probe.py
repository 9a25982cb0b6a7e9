"""Measured steps of compiled models stay compiled: held to one backward pass for each example, to the plain compiled step, and to a
count of the graphs that the compiler is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import zerosum
from tests.zerosum.oracle import assert_covers, assert_truth, direction_for, error, gradients
from tests.zerosum.steps import assert_gradients, truth_of
from zerosum.probe.capture import Capture
from zerosum.probe.rules import APPLIED
from zerosum.training.model import GPT, GPTConfig, token_losses

N, T, VOCAB = 9, 6, 23  # (8 examples or more are proved once)
PROOFS = 2  # steps that run uncompiled: the first is proved, and the second shows that it comes again
CONFIG = GPTConfig(vocab=VOCAB, width=16, layers=1, heads=2, positions=T + 2)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of uses that have run in compiled code, in the order in which they ran."""
    seen: list[str] = []
    plain = Capture.enter_traced

    def enter(self: Capture, stamp: int, kind: str, tensors: Any) -> None:
        seen.append(kind)
        plain(self, stamp, kind, tensors)

    monkeypatch.setattr(Capture, "enter_traced", enter)
    return seen


class TiedGPT(GPT):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.head.weight = self.embedding.weight


class Small(nn.Module):
    """Few kernels to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(self.embedding(tokens))))


class Vocabulary(Small):
    """Logits."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, VOCAB)


class Autocast(Small):
    """What autocast computes in the lower precision, and a norm that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.transposed = nn.LayerNorm(8), Transposed()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.norm(self.transposed(self.first(self.embedding(tokens)))))


class Transposed(nn.Module):
    """The layer of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8) * 0.3), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(x.shape)


class Norms(nn.Module):
    """Biases, and norms with scales and shifts. A layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8, padding_idx=3)
        self.first, self.twice, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.layer_norm, self.rms_norm, self.shift = nn.LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm(8)
        self.transposed = Transposed()
        self.shift.weight.requires_grad_(False)
        for p in (self.layer_norm.weight, self.layer_norm.bias, self.rms_norm.weight, self.shift.weight, self.shift.bias):
            nn.init.normal_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layer_norm(F.gelu(self.transposed(self.first(self.embedding(tokens)))))
        x = self.rms_norm(x + torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        return self.last(self.shift(x))


def gpt() -> GPT:
    return GPT(CONFIG)


def llama() -> nn.Module:
    """Norms that are products with a weight."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ids, use_cache=False))


def gpt2() -> nn.Module:
    """A position table, layers whose matrix is transposed, a tied head."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCAB,
        "n_positions": T + 2,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, use_cache=False))


class Positions(Small):
    """A position table whose ids have one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(T + 2, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.positions(torch.arange(tokens.shape[1]))
        return self.last(torch.tanh(self.first(self.embedding(tokens) + positions)))


def make(kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype).train()


def tokens_of(n: int = N, t: int = T, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (n, t), generator=torch.Generator().manual_seed(seed))


def losses_of(output: Any) -> Tensor:
    """(N,)"""
    output = output if isinstance(output, Tensor) else output.logits
    return output.square().flatten(1).mean(1)


class Steps:
    """A model, compiled, and a probe."""

    def __init__(
        self, model: nn.Module, backend: str = "aot_eager", regional: bool = False, fullgraph: bool = True, **options: Any
    ):
        self.model = model
        self.counter = CompileCounterWithBackend(backend)
        self.compiled: Any = model
        if regional:
            for block in model.blocks:
                block.compile(backend=self.counter, fullgraph=fullgraph)
        else:
            self.compiled = torch.compile(model, backend=self.counter, fullgraph=fullgraph)
        self.direction = direction_for(model)
        self.probe = zerosum.Probe(model, direction=self.direction, gram=True, **options)

    def plain(self, tokens: Tensor) -> None:
        self.model.zero_grad()
        losses_of(self.compiled(tokens)).sum().backward()

    def probed(self, tokens: Tensor) -> zerosum.Report:
        self.model.zero_grad()
        with self.probe:
            losses_of(self.compiled(tokens)).sum().backward()
        return self.probe.report()

    def check(self, tokens: Tensor, rtol: float = 1e-9) -> None:
        """One probed step."""
        truth = self.truth(tokens)
        report = self.probed(tokens)
        found = gradients(self.model)
        assert all(name in found or not g.any() for name, g in truth.items())
        assert_gradients(found, {name: truth[name].sum(0) for name in found}, rtol)
        assert_truth(report, truth, self.direction, rtol=rtol)
        assert_covers(report, self.model, truth)

    def truth(self, tokens: Tensor) -> dict[str, Tensor]:
        with torch.compiler.set_stance("force_eager"):
            return truth_of(self.model, lambda: losses_of(self.model(tokens)))


COUNTS = {Small: 3, gpt: 6, TiedGPT: 6, Norms: 9, llama: 12, gpt2: 11, Positions: 5}


@pytest.mark.parametrize("kind", [gpt, TiedGPT, Norms, Positions, llama, gpt2])
def test_a_step_stays_compiled(kind: Callable[[], nn.Module], uses: list[str]) -> None:
    steps, tokens = Steps(make(kind)), tokens_of()
    steps.plain(tokens)
    assert steps.counter.frame_count == 1
    for _ in range(PROOFS):
        steps.check(tokens)
    assert not uses, "the first steps are to be proved"
    for k in range(1, 4):
        steps.check(tokens_of(seed=k))
        assert len(uses) == k * COUNTS[kind]
        assert steps.counter.frame_count == 2
    for _ in range(2):
        steps.plain(tokens)
        steps.check(tokens)
    assert steps.counter.frame_count == 2, "entering or leaving the block has compiled anew"


class Drawn(nn.Module):
    """Layers in random order, of which some are used again, on rows in other layouts, or beside a tied head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.embedding, self.layers = nn.Embedding(VOCAB, 8), nn.ModuleList([nn.Linear(8, 8)])
        self.plan: list[tuple[str, int]] = []
        for _ in range(rng.randint(2, 5)):
            kind = rng.choice(["linear", "LayerNorm", "RMSNorm", "again", "positions first", "flat", "tied", "scale", "table"])
            if kind in ("LayerNorm", "RMSNorm"):
                self.layers.append(getattr(nn, kind)(8))
            elif kind in ("scale", "table"):
                self.layers.append(nn.RMSNorm(8) if kind == "scale" else nn.Embedding(T, 8))
            elif kind != "again":
                self.layers.append(nn.Linear(8, 8, bias=rng.random() < 0.7))
            self.plan.append((kind, 0 if kind == "again" else len(self.layers) - 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for kind, k in self.plan:
            layer = self.layers[k]
            if kind == "positions first":
                x = torch.tanh(layer(x.mT.permute(2, 0, 1))).transpose(0, 1)
            elif kind == "flat":
                x = torch.tanh(layer(x.flatten(0, 1))).view(x.shape)
            elif kind == "tied":
                x = x + torch.tanh(F.linear(layer(x), self.embedding.weight))[..., :8]
            elif kind == "scale":
                x = layer.weight * torch.tanh(x)
            elif kind == "table":
                x = x + layer(torch.arange(x.shape[1])[None])
            else:
                x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("seed", range(5))
def test_drawn_models(seed: int, uses: list[str]) -> None:
    """In a shape that is proved first, and in another that comes later."""
    steps = Steps(make(lambda: Drawn(seed)), fullgraph=False)
    for k, n in enumerate((N, N, N, N + 1, N, N + 1, N, N + 1)):
        steps.check(tokens_of(n, seed=k))
    assert uses or sum(kind == "table" for kind, _ in steps.model.plan) > 1


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_inductor(uses: list[str]) -> None:
    """What waits for another use of a weight is not written over: the compiler uses its memory again."""

    class Waiting(Small):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.first(self.embedding(tokens))
            for _ in range(2):
                x = torch.tanh(self.first(x).sin())
            return x

    steps, tokens = Steps(make(Waiting), "inductor"), tokens_of()
    for _ in range(PROOFS + 2):
        steps.check(tokens)
    steps.plain(tokens)
    steps.check(tokens)
    assert len(uses) == 3 * 4
    assert steps.counter.frame_count == 2


def test_a_compiler_that_runs_the_graph_as_it_is(uses: list[str]) -> None:
    steps, tokens = Steps(make(Norms), "eager"), tokens_of()
    for _ in range(PROOFS + 2):
        steps.check(tokens)
    assert len(uses) == 2 * COUNTS[Norms]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
def test_regional_compilation(uses: list[str]) -> None:
    """What is not compiled is seen as ever, in the same step. The layers have one graph."""
    steps = Steps(make(lambda: GPT(replace(CONFIG, layers=2))), regional=True)
    for k in range(PROOFS + 3):
        steps.check(tokens_of(seed=k))
    assert len(uses) == 3 * 8
    count = steps.counter.frame_count
    steps.plain(tokens_of())
    plain = steps.counter.frame_count - count
    steps.check(tokens_of())
    steps.plain(tokens_of())
    assert steps.counter.frame_count == count + plain, "entering or leaving the block has compiled anew"
    assert (count, plain) == (1, 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_graph_break(uses: list[str]) -> None:
    class Broken(Small):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.first(self.embedding(tokens))
            torch._dynamo.graph_break()
            return self.last(x)

    steps = Steps(make(Broken), fullgraph=False)
    for k in range(PROOFS + 2):
        steps.check(tokens_of(seed=k))
    assert len(uses) == 2 * COUNTS[Small]


def test_new_shapes_are_proved_before_they_are_compiled(uses: list[str]) -> None:
    """The shapes come in turns, so that no block has the shape of the one before."""
    steps = Steps(make(Small))
    shapes = [(N, T), (N + 1, T), (N, T - 2)]
    for _ in range(3):
        for n, t in shapes:
            steps.check(tokens_of(n, t))
    uses.clear()
    count = steps.counter.frame_count
    for n, t in shapes:
        steps.check(tokens_of(n, t))
    assert len(uses) == 3 * COUNTS[Small]
    assert steps.counter.frame_count == count


def test_a_shape_that_comes_when_another_is_compiled(uses: list[str]) -> None:
    """It is measured in the block in which it comes, and no graph is made for it unless it comes again soon."""
    steps = Steps(make(Small))
    for _ in range(PROOFS + 1):
        steps.check(tokens_of())
    count = steps.counter.frame_count
    for _ in range(2):
        steps.check(tokens_of(N + 1))
        for _ in range(6):
            steps.check(tokens_of())
    assert steps.counter.frame_count == count
    assert len(uses) == (1 + 12) * COUNTS[Small]


def test_as_few_examples_as_need_several_proofs(uses: list[str]) -> None:
    steps = Steps(make(Small))
    for k in range(5):
        steps.check(tokens_of(5, seed=k))
        assert bool(uses) == (k > 2)


def test_micro_batches(uses: list[str]) -> None:
    steps = Steps(make(Norms))
    parts = [tokens_of(seed=1), tokens_of(seed=2)]
    truths = [steps.truth(tokens) for tokens in parts]
    truth = {name: torch.cat([t[name] for t in truths]) for name in truths[0]}
    known = torch.block_diag(torch.ones(N, N), torch.ones(N, N)) > 0
    for set_to_none in (True, True, False):
        steps.model.zero_grad(set_to_none)
        with steps.probe:
            for tokens in parts:
                losses_of(steps.compiled(tokens)).sum().backward()
        assert_truth(steps.probe.report(), truth, steps.direction, gram=known)
        assert_gradients(gradients(steps.model), {name: g.sum(0) for name, g in truth.items()}, 1e-9)
    assert len(uses) == 4 * COUNTS[Norms]


def test_asking_what_a_weight_is_like(uses: list[str]) -> None:
    """Compiled code of torch 2.11 asks its weights' numel() before it runs."""
    model = make(Small)
    compiled = torch.compile(model, backend="aot_eager")
    probe = zerosum.Probe(model)
    for _ in range(6):
        tokens = tokens_of()
        with probe:
            if uses_compiled := bool(uses):
                assert all(p.numel() for p in model.parameters())
            losses_of(compiled(tokens)).sum().backward()
        assert len(probe.report()) == len(list(model.parameters())), probe.report().coverage
    assert uses_compiled


def test_every_other_block(uses: list[str]) -> None:
    steps, tokens = Steps(make(Small), every=2), tokens_of()
    for k in range(8):
        steps.probed(tokens)
        if k % 2 == 0:
            assert_truth(steps.probe.report(), steps.truth(tokens), steps.direction)
    assert len(uses) == 2 * COUNTS[Small]
    assert steps.counter.frame_count == 2


def test_train_and_eval_mode(uses: list[str]) -> None:
    steps, tokens = Steps(make(Small)), tokens_of()
    for train in (True, True, True, False, False, False, True, False):
        steps.model.train(train)
        steps.check(tokens)
    assert len(uses) == 5 * COUNTS[Small]  # in the first step of each mode none, nor in the second of all
    with steps.probe, torch.no_grad():
        assert not steps.compiled(tokens).requires_grad
    assert len(uses) == 5 * COUNTS[Small]


@pytest.mark.parametrize("divided", [1.0, 7.0])
def test_the_scale_is_read_off_the_loss(divided: float, uses: list[str]) -> None:
    """A mean over tokens, of which each step ignores others."""
    model = make(Vocabulary)
    compiled, probe = torch.compile(model, backend="aot_eager"), zerosum.Probe(model)
    for k in range(PROOFS + 2):
        x, y = tokens_of(seed=k), tokens_of(seed=k + 1)
        y = torch.where(torch.rand(y.shape) < 0.3, -100, y)

        def losses(x: Tensor = x, y: Tensor = y) -> Tensor:
            rows = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(N, T).sum(1)
            return rows * N / (y != -100).sum()

        truth = truth_of(model, losses)
        model.zero_grad()
        with probe:
            (F.cross_entropy(compiled(x).flatten(0, 1), y.flatten()) / divided).backward()
        assert_truth(probe.report(), truth, gram=False)
    assert len(uses) == 2 * COUNTS[Small]


def test_losses_that_the_model_returns(uses: list[str]) -> None:
    """The end of the losses' path is the compiled model itself."""

    class Losses(Small):
        def forward(self, tokens: Tensor) -> Tensor:
            return losses_of(super().forward(tokens))

    model, tokens = make(Losses), tokens_of()
    compiled, probe = torch.compile(model, backend="aot_eager"), zerosum.Probe(model)
    truth = truth_of(model, lambda: model(tokens))
    for _ in range(PROOFS + 2):
        model.zero_grad()
        with probe:
            compiled(tokens).mean().backward()
        assert_truth(probe.report(), truth, gram=False)
    assert len(uses) == 2 * COUNTS[Small]


def test_half_precision(uses: list[str]) -> None:
    model, wide, tokens = make(Norms, torch.bfloat16), make(Norms, torch.bfloat16).float(), tokens_of()
    truth = truth_of(wide, lambda: losses_of(wide(tokens)))
    compiled, probe = torch.compile(model, backend="aot_eager"), zerosum.Probe(model)
    for _ in range(PROOFS + 2):
        model.zero_grad()
        with probe:
            losses_of(compiled(tokens)).sum().backward()
        found = probe.report()
        assert set(found) == set(truth)
        for name, g in truth.items():
            assert error(found[name].grad_sum, g.sum(0), g.abs().sum(0).norm().item()) < 0.03
            assert error(found[name].abs_sum, g.abs().sum(0)) < 0.03
            assert error(found[name].sq_norm, g.flatten(1).square().sum(1)) < 0.03
    assert len(uses) == 2 * COUNTS[Norms]


def test_autocast(uses: list[str]) -> None:
    model, tokens = make(Autocast, torch.float32), tokens_of()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    probe, uncompiled = zerosum.Probe(model), zerosum.Probe(model)

    def step(model: Any) -> None:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses_of(model(tokens).float()).sum().backward()

    for _ in range(PROOFS + 2):
        with uncompiled:
            step(model)
        expected, grads = uncompiled.report(), gradients(model)
        with probe:
            step(compiled)
        found = probe.report()
        assert set(found) == set(expected) == set(grads)
        for name in expected:
            assert error(gradients(model)[name], grads[name], expected[name].abs_sum.norm().item()) < 0.01
            for field in ("abs_sum", "sq_norm"):
                assert error(getattr(found[name], field), getattr(expected[name], field)) < 0.02
    assert len(uses) == 2 * 5


def test_reports_outlive_the_next_step() -> None:
    steps = Steps(make(Norms))
    reports, truths = [], []
    for k in range(PROOFS + 3):
        truths.append(steps.truth(tokens_of(seed=k)))
        reports.append(steps.probed(tokens_of(seed=k)))
    for report, truth in zip(reports, truths, strict=True):
        assert_truth(report, truth, steps.direction)
    torch.nn.utils.clip_grad_norm_(steps.model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="modified in place"):
        _ = reports[-1]["first.weight"].grad_sum


def test_a_second_probe_has_the_graphs_of_the_first(uses: list[str]) -> None:
    steps, tokens = Steps(make(Norms)), tokens_of()
    for _ in range(PROOFS + 1):
        steps.check(tokens)
    steps.probe, steps.direction = zerosum.Probe(steps.model, gram=True), None
    uses.clear()
    for _ in range(3):
        steps.check(tokens)
    assert len(uses) == 2 * COUNTS[Norms], "only the first step is to be proved"
    assert steps.counter.frame_count == 1


# What is not known.


def assert_refused(report: zerosum.Report, reason: str) -> None:
    assert not len(report)
    assert all(reason in why for why in report.coverage.not_covered.values()), report.coverage


def test_a_step_that_was_not_proved_is_refused(uses: list[str]) -> None:
    """Two forward passes in one step, each of which has the shape of one that was proved. The next steps run uncompiled."""
    steps, tokens = Steps(make(Norms)), tokens_of()
    for _ in range(PROOFS + 1):
        steps.check(tokens)
    truth = {name: 2 * g for name, g in steps.truth(tokens).items()}
    for k in range(3):
        steps.model.zero_grad()
        with steps.probe:
            (losses_of(steps.compiled(tokens)) + losses_of(steps.compiled(tokens))).sum().backward()
        assert_gradients(gradients(steps.model), {name: g.sum(0) for name, g in truth.items()}, 1e-9)
        if k == 0:
            assert_refused(steps.probe.report(), "before a step like it was proved")
            uses.clear()
        else:
            assert_truth(steps.probe.report(), truth, steps.direction)
    steps.check(tokens)
    assert not uses


def test_backward_passes_in_another_order() -> None:
    """The uses of both forward passes come before the first backward pass."""
    steps, tokens = Steps(make(Small)), tokens_of()
    for _ in range(PROOFS + 1):
        steps.check(tokens)
    with steps.probe:
        first, second = (losses_of(steps.compiled(tokens_of(seed=k))).sum() for k in range(2))
        first.backward()
        second.backward()
    assert_refused(steps.probe.report(), "before a step like it was proved")


@torch._functorch.config.patch(donated_buffer=False)  # torch refuses such a backward pass otherwise
def test_the_graph_of_an_earlier_step() -> None:
    """The second step looks like the one that was proved, and its backward pass is of the first's graph."""
    steps = Steps(make(Small))
    for _ in range(PROOFS + 1):
        steps.check(tokens_of())
    with steps.probe:
        first = losses_of(steps.compiled(tokens_of(seed=1))).sum()
        first.backward(retain_graph=True)
        losses_of(steps.compiled(tokens_of(seed=2)))
        first.backward()
    assert not len(steps.probe.report())


def test_a_weight_that_only_compiled_code_uses_otherwise() -> None:
    """Of uses that are not known the weights are refused, and no others."""

    class Hidden(Small):
        hidden = False

        def forward(self, tokens: Tensor) -> Tensor:
            y = super().forward(tokens)
            return y * self.first.weight.sum() if self.hidden or torch.compiler.is_compiling() else y

    steps, tokens = Steps(make(Hidden)), tokens_of()
    for _ in range(PROOFS):
        steps.check(tokens)
    steps.plain(tokens)
    plain = gradients(steps.model)
    report = steps.probed(tokens)
    assert_gradients(gradients(steps.model), plain, 1e-12)
    assert set(report.coverage.not_covered) == {"first.weight"}
    assert "did not run when the step was proved" in report.coverage.not_covered["first.weight"]
    steps.model.hidden = True
    truth = steps.truth(tokens)
    for name in report:
        torch.testing.assert_close(report[name].abs_sum, truth[name].abs().sum(0))


# What runs uncompiled.


def test_a_loss_in_compiled_code_runs_uncompiled(uses: list[str]) -> None:
    model = make(Vocabulary)
    probe = zerosum.Probe(model)

    @torch.compile(backend="aot_eager")
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return token_losses(model, x, y).mean()

    x, y = tokens_of(), tokens_of(seed=2)
    truth = truth_of(model, lambda: token_losses(model, x, y).mean(1))
    for _ in range(PROOFS + 2):
        model.zero_grad()
        with probe:
            loss(x, y).backward()
        assert_truth(probe.report(), truth, gram=False)
    assert not uses


def test_a_loss_of_ones_own_in_compiled_code(uses: list[str]) -> None:
    """Nothing shows before that the loss is compiled: one step is refused."""
    model, tokens = make(Small), tokens_of()
    probe = zerosum.Probe(model)
    loss = torch.compile(lambda tokens: losses_of(model(tokens)).sum(), backend="aot_eager")
    truth = truth_of(model, lambda: losses_of(model(tokens)))
    for k in range(PROOFS + 3):
        model.zero_grad()
        with probe:
            loss(tokens).backward()
        assert_gradients(gradients(model), {name: g.sum(0) for name, g in truth.items()}, 1e-9)
        if k == PROOFS:
            assert_refused(probe.report(), "before a step like it was proved")
        else:
            assert_truth(probe.report(), truth, gram=False)
    assert len(uses) == COUNTS[Small]


class Checkpointed(Small):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, self.embedding(tokens), use_reentrant=False))


class Weighted(Small):
    """A function of a weight."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.embedding(tokens), 1 + self.first.weight)


@pytest.mark.parametrize("kind", [Checkpointed, Weighted])
def test_models_that_run_uncompiled(kind: type[nn.Module], uses: list[str]) -> None:
    steps, tokens = Steps(make(kind), fullgraph=False), tokens_of()
    for _ in range(PROOFS + 2):
        steps.check(tokens)
    assert not uses


@pytest.mark.parametrize("options", [{"verify": "always"}, {"strict": True}, {"verify": 2}])
def test_options_that_run_uncompiled(options: dict[str, Any], uses: list[str]) -> None:
    steps, tokens = Steps(make(Small), **options), tokens_of()
    for _ in range(PROOFS + 2):
        steps.check(tokens)
    assert not uses


def test_hooks_run_uncompiled(uses: list[str]) -> None:
    """They come after some steps that stayed compiled, and see the training's own passes alone."""
    steps, tokens, calls = Steps(make(Small)), tokens_of(), []
    for _ in range(PROOFS + 1):
        steps.check(tokens)
    assert uses
    uses.clear()
    steps.model.first.register_full_backward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        steps.probed(tokens)
    assert len(calls) == 2
    assert not uses


class Doubled(torch.autograd.Function):
    """2 x wᵀ"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * grad @ w, 2 * grad.flatten(0, -2).T @ x.flatten(0, -2)


class WithDoubled(Small):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(torch.tanh(Doubled.apply(self.embedding(tokens), self.first.weight) + self.first.bias))


@pytest.mark.parametrize(("kind", "compiled"), [(Small, True), (WithDoubled, False)])
def test_a_rule_of_a_function_runs_models_uncompiled_that_call_it(kind: type[nn.Module], compiled: bool, uses: list[str]) -> None:
    """And no others: a library may have registered it."""
    zerosum.rule(Doubled)(lambda x, w: 2 * F.linear(x, w))
    try:
        steps, tokens = Steps(make(kind)), tokens_of()
        for _ in range(PROOFS + 2):
            steps.check(tokens)
        assert bool(uses) == compiled
    finally:
        del APPLIED[Doubled]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_graph_that_is_differentiated_again_runs_uncompiled(uses: list[str]) -> None:
    steps, tokens = Steps(make(Small)), tokens_of()
    truth = steps.truth(tokens)
    for _ in range(PROOFS + 2):
        steps.model.zero_grad()
        with steps.probe:
            losses_of(steps.compiled(tokens)).sum().backward(create_graph=True)
        assert_truth(steps.probe.report(), truth, steps.direction)
        steps.model.zero_grad()
    assert not uses
