"""What real training does around a step with a probe: mixed precision, micro-batches, checkpointing, compilation, and the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zerosum
from tests.inputs import sums_of
from tests.zerosum.models import (
    BiasOnly,
    Conv1D,
    Convolution,
    Dropout,
    Frozen,
    Functional,
    LayerNorms,
    Mixture,
    MixtureOfModules,
    OneUseDetached,
    PositionsOnce,
    Products,
    Residual,
    Tied,
    TwoLayers,
    Unreached,
    UsedTwice,
)
from tests.zerosum.oracle import (
    PASSES,
    assert_covers,
    assert_truth,
    assert_unchanged,
    direction_for,
    gradients,
    per_example_gradients,
    snapshot,
    trainable,
)
from zerosum.training.model import GPT, GPTConfig, token_losses

N, T, VOCAB = 3, 6, 11
MODELS = [TwoLayers, UsedTwice, Tied, Mixture, LayerNorms, PositionsOnce, Residual, Convolution]


def setup(kind: type[TwoLayers], dtype: torch.dtype = torch.float64) -> tuple[TwoLayers, Tensor]:
    torch.manual_seed(0)
    return kind().to(dtype).train(), torch.randint(0, VOCAB, (N, T))


def losses_of(output: Tensor) -> Tensor:
    return output.square().flatten(1).mean(1)


def truth_of(model: TwoLayers, tokens: Tensor) -> dict[str, Tensor]:
    return per_example_gradients(losses_of(model(tokens)), model, trainable(model))


def joined(*truths: dict[str, Tensor]) -> dict[str, Tensor]:
    """The truth of several micro-batches, one after another."""
    return {name: torch.cat([truth[name] for truth in truths]) for name in truths[0]}


def scaled(values: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: factor * value for name, value in values.items()}


# Mixed precision.


@pytest.mark.parametrize(
    "kind", [TwoLayers, UsedTwice, Tied, Functional, Conv1D, LayerNorms, PositionsOnce, Products, BiasOnly, Frozen]
)
def test_autocast_to_bfloat16(kind: type[TwoLayers]) -> None:
    """The truth under the same autocast: the products are in bfloat16 there, and so is an example's gradient when it leaves one.

    A dot of such a gradient with a random direction is a difference of rounded numbers: 3 units of it.
    """
    model, tokens = setup(kind, torch.float32)
    direction = direction_for(model)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(tokens)
        return losses_of(output.float())

    truth = per_example_gradients(losses(), model, trainable(model))
    probe = zerosum.Probe(model, direction=direction, gram=True)
    how = []
    for _ in range(PASSES):
        with probe:
            losses().sum().backward()
        how.append(probe.report().coverage.covered)
        assert_truth(probe.report(), truth, direction, rtol=3 * torch.finfo(torch.bfloat16).eps)
        assert_covers(probe.report(), model, truth)
    assert how[0] == how[1] == how[2]
    assert probe.report()["head.weight"].abs_sum.dtype == torch.float32


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_gradient_scaler_is_undone_in_the_results_and_left_in_the_gradients(
    kind: type[TwoLayers], reduction: str, enabled: bool
) -> None:
    model, tokens = setup(kind)
    truth, direction = truth_of(model, tokens), direction_for(model)
    getattr(losses_of(model(tokens)), reduction)().backward()
    plain = gradients(model)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, enabled=enabled)
    probe = zerosum.Probe(model, direction=direction, gram=True, loss_reduction=reduction, grad_scaler=scaler)
    with probe:
        scaler.scale(getattr(losses_of(model(tokens)), reduction)()).backward()
    assert_truth(probe.report(), truth, direction)
    torch.testing.assert_close(gradients(model), scaled(plain, 1000.0 if enabled else 1.0), rtol=1e-9, atol=1e-12)


def test_a_gradient_scalers_later_change_does_not_reach_an_earlier_report() -> None:
    """The scale is that of the backward pass, not that of the day on which a result is read."""
    model, tokens = setup(TwoLayers, torch.float32)
    truth = truth_of(model, tokens)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    probe = zerosum.Probe(model, grad_scaler=scaler)
    with probe:
        scaler.scale(losses_of(model(tokens)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0
    expected = sums_of(truth["head.weight"])
    for field in ("abs_sum", "sq_sum", "l1", "sq_norm"):
        torch.testing.assert_close(getattr(probe.report()["head.weight"], field), expected[field], rtol=1e-5, atol=1e-8)


# Micro-batches, and what else happens between them.


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("sizes", [[(3, 6), (3, 6)], [(3, 6), (4, 5), (1, 4)]], ids=["alike", "different"])
@pytest.mark.parametrize("kind", [*MODELS, MixtureOfModules])  # an expert that one micro-batch alone chooses
def test_micro_batches_add_up_and_their_examples_follow_each_other(
    kind: type[TwoLayers], sizes: list[tuple[int, int]], reduction: str
) -> None:
    model, _ = setup(kind)
    batches = [torch.randint(0, VOCAB, size) for size in sizes]
    truth, direction = joined(*(truth_of(model, tokens) for tokens in batches)), direction_for(model)
    probe = zerosum.Probe(model, direction=direction, gram=True, loss_reduction=reduction)
    with probe:
        for tokens in batches:
            getattr(losses_of(model(tokens)), reduction)().backward()
    report = probe.report()
    assert report.num_examples == sum(n for n, _ in sizes)
    # Inner products of examples in different micro-batches are not there to be had.
    present = torch.block_diag(*(torch.ones(n, n) for n, _ in sizes)).bool()
    assert_truth(report, truth, direction, gram=present)
    assert report.gram is not None
    assert torch.equal(report.gram.isnan(), ~present)


def test_micro_batches_leave_the_gradient_of_the_plain_loop() -> None:
    model, _ = setup(Residual)
    batches = [torch.randint(0, VOCAB, size) for size in ((3, 6), (4, 5))]
    for tokens in batches:
        losses_of(model(tokens)).sum().backward()
    plain = gradients(model)
    model.zero_grad()
    with zerosum.Probe(model):
        for tokens in batches:
            losses_of(model(tokens)).sum().backward()
    torch.testing.assert_close(gradients(model), plain, rtol=1e-10, atol=1e-13)


def test_two_batches_in_two_blocks_and_several_probes_one_after_another() -> None:
    model, first = setup(Residual)
    second = torch.randint(0, VOCAB, (4, 5))
    direction = direction_for(model)
    again, other = zerosum.Probe(model, gram=True), zerosum.Probe(model, direction=direction)
    for probe, tokens in ((again, first), (other, second), (again, second), (again, first)):
        model.zero_grad()
        with probe:
            losses_of(model(tokens)).sum().backward()
        assert_truth(probe.report(), truth_of(model, tokens), direction if probe is other else None, gram=probe is again)


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_without_gradients_in_between_is_not_measured(kind: type[TwoLayers]) -> None:
    model, tokens = setup(kind)
    truth = truth_of(model, tokens)
    probe = zerosum.Probe(model, gram=True)
    with probe:
        with torch.no_grad():
            model(tokens[:2])
        losses = losses_of(model(tokens))
        model.eval()
        with torch.inference_mode():
            model(torch.cat([tokens, tokens]))
        model.train()
        losses.sum().backward()
        with torch.no_grad():
            model(tokens[:1])
    assert probe.report().num_examples == N
    assert_truth(probe.report(), truth)


def test_a_forward_pass_whose_graph_is_thrown_away_is_not_measured() -> None:
    """Or else what it makes unsure is named."""
    model, tokens = setup(Residual)
    truth = truth_of(model, tokens)
    probe = zerosum.Probe(model, gram=True)
    with probe:
        losses_of(model(tokens.flip(1)))
        losses_of(model(tokens)).sum().backward()
    assert_truth(probe.report(), truth, refusable=True)


@pytest.mark.parametrize("kind", [Frozen, OneUseDetached, Unreached])
def test_frozen_and_detached_branches_over_micro_batches(kind: type[TwoLayers]) -> None:
    model, tokens = setup(kind)
    truth = joined(truth_of(model, tokens), truth_of(model, tokens.flip(0)))
    probe = zerosum.Probe(model)
    with probe:
        losses_of(model(tokens)).sum().backward()
        losses_of(model(tokens.flip(0))).sum().backward()
    assert_truth(probe.report(), truth, gram=False)
    assert_covers(probe.report(), model, truth)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_training_with_probes_is_training_without_them(optimizer: str) -> None:
    plain, tokens = setup(Residual)
    model = copy.deepcopy(plain)
    batches = [(tokens + step) % VOCAB for step in range(3)]
    for trained in (plain, model):
        step = getattr(torch.optim, optimizer)(trained.parameters(), lr=1e-2)
        for tokens in batches:
            step.zero_grad()
            probe = zerosum.Probe(trained, gram=True)
            truth = truth_of(trained, tokens)
            if trained is plain:
                losses_of(trained(tokens)).sum().backward()
            else:
                with probe:
                    losses_of(trained(tokens)).sum().backward()
            step.step()
            if trained is model:  # the results are those of the parameters before the step
                head, expected = probe.report()["head.weight"], sums_of(truth["head.weight"])
                for field in ("abs_sum", "sq_sum", "l1", "sq_norm", "gram"):
                    torch.testing.assert_close(getattr(head, field), expected[field], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-8, atol=1e-10)


def test_a_copy_and_a_state_are_plain_during_a_probe_and_after_it() -> None:
    model, tokens = setup(Residual)
    truth, before, keys = truth_of(model, tokens), snapshot(model), list(model.state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    probe = zerosum.Probe(model, gram=True)
    with probe:
        losses = losses_of(model(tokens))
        during = copy.deepcopy(model)
        assert list(model.state_dict()) == keys
        losses_of(during(tokens.flip(1))).sum().backward()  # its parameters are others
        losses.sum().backward()
    assert_truth(probe.report(), truth)
    after = copy.deepcopy(model)
    for other in (during, after):
        other.load_state_dict(state)
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=0)
    model.zero_grad()
    with probe:
        model.load_state_dict({key: 2 * value for key, value in state.items()})
        model.load_state_dict(state)
        losses_of(model(tokens)).sum().backward()
    assert_truth(probe.report(), truth)
    model.load_state_dict(state)
    now = snapshot(model)
    assert now["modules"] == before["modules"]
    torch.testing.assert_close(now["values"], before["values"], rtol=0, atol=0)


# Activation checkpointing: a forward pass runs again during the backward pass.


class Checkpointed(Residual):
    """Its first block runs twice, each time under a checkpoint, with dropout; without ``reentrant`` nothing is checkpointed."""

    reentrant: bool | None = None

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return F.dropout(block(torch.tanh(x)), 0.2, self.training)

        return body(x) if self.reentrant is None else checkpoint(body, x, use_reentrant=self.reentrant)

    def middle(self, x: Tensor) -> Tensor:
        for block in (self.blocks[0], self.blocks[1], self.blocks[0]):
            x = self.run(block, x)
        return x + self.extra[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model, tokens = setup(Checkpointed)
    direction = direction_for(model)

    def losses() -> Tensor:
        torch.manual_seed(2)
        return losses_of(model(tokens))

    # One backward pass for each example through a reentrant checkpoint cannot be had from torch.autograd.grad: without it.
    truth = per_example_gradients(losses(), model, trainable(model))
    model.reentrant = reentrant
    probe = zerosum.Probe(model, direction=direction, gram=True)
    with probe:
        losses().sum().backward()
    assert_truth(probe.report(), truth, direction)
    assert_covers(probe.report(), model, truth)
    torch.testing.assert_close(gradients(model), {name: g.sum(0) for name, g in truth.items()}, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_over_micro_batches(reentrant: bool) -> None:
    model, tokens = setup(Checkpointed)
    model.eval()  # dropout off: the micro-batches' truths are joined
    batches = [tokens, (tokens[:2] + 1) % VOCAB]
    truth = joined(*(truth_of(model, batch) for batch in batches))
    model.reentrant = reentrant
    probe = zerosum.Probe(model)
    with probe:
        for batch in batches:
            losses_of(model(batch)).sum().backward()
    assert_truth(probe.report(), truth, gram=False)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2-sdpa-left-padded", "llama-sdpa"])
def test_activation_checkpointing_of_transformers(name: str, reentrant: bool) -> None:
    pytest.importorskip("transformers")
    from tests.zerosum.transformers_models import ARCHITECTURES

    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, inputs = architecture.model(), architecture.inputs(N, 7)
    direction = direction_for(model)
    truth = per_example_gradients(architecture.losses(model, inputs), model, trainable(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    probe = zerosum.Probe(model, direction=direction, gram=True)
    with probe:
        architecture.losses(model, inputs).sum().backward()
    assert_truth(probe.report(), truth, direction, rtol=1e-6 if architecture.rounds else 1e-9)
    assert_covers(probe.report(), model, truth)


# Compilation.


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [TwoLayers, Tied, Residual])
def test_a_compiled_model(kind: type[TwoLayers], backend: str, warm: bool) -> None:
    """A graph that was compiled before the probe opened must not be taken past it, nor one from inside it be used later."""
    model, tokens = setup(kind)
    truth, direction, plain = truth_of(model, tokens), direction_for(model), model(tokens)
    compiled = torch.compile(model, backend=backend)
    if warm:
        losses_of(compiled(tokens)).sum().backward()
        model.zero_grad()
    probe = zerosum.Probe(model, direction=direction, gram=True)
    for _ in range(2):
        model.zero_grad()
        with probe:
            losses_of(compiled(tokens)).sum().backward()
        assert_truth(probe.report(), truth, direction)
        assert_covers(probe.report(), model, truth)
    model.zero_grad()
    output = compiled(tokens)
    losses_of(output).sum().backward()
    torch.testing.assert_close(output, plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients(model), {name: g.sum(0) for name, g in truth.items()}, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_probe_on_the_compiled_module_itself() -> None:
    model, tokens = setup(TwoLayers)
    compiled = torch.compile(model, backend="eager")
    probe = zerosum.Probe(compiled)
    truth = {f"_orig_mod.{name}": g for name, g in truth_of(model, tokens).items()}
    with probe:
        losses_of(compiled(tokens)).sum().backward()
    assert_truth(probe.report(), truth, gram=False)


# What is differentiated.


@pytest.mark.parametrize("kind", MODELS)
def test_losses_divided_by_a_number_for_each_example(kind: type[TwoLayers]) -> None:
    model, tokens = setup(kind)
    truth, direction = truth_of(model, tokens), direction_for(model)
    d = torch.rand(N, dtype=torch.float64) + 0.5
    probe = zerosum.Probe(model, direction=direction, gram=True, loss_reduction=d)
    with probe:
        (losses_of(model(tokens)) / d).sum().backward()
    assert_truth(probe.report(), truth, direction)
    expected = {name: (g / d.view(-1, *[1] * (g.ndim - 1))).sum(0) for name, g in truth.items()}
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)


def classes_and_targets(kind: type[TwoLayers], ignored: bool) -> tuple[TwoLayers, Tensor, Tensor]:
    """The model's outputs are logits of 5 classes; examples have different numbers of targets."""
    model, tokens = setup(kind)
    targets = torch.randint(0, 5, (N, T))
    return model, tokens, targets.masked_fill(torch.arange(T) >= T - torch.arange(N)[:, None], -100) if ignored else targets


def sums_of_tokens(model: TwoLayers, tokens: Tensor, targets: Tensor) -> Tensor:
    """(N,): the summed losses of an example's valid tokens."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").view(N, T).sum(1)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("kind", [TwoLayers, UsedTwice, Residual])
def test_the_mean_over_all_valid_tokens_with_their_number_as_denominator(kind: type[TwoLayers], integers: bool) -> None:
    """ℓ_i is the sum over example i's tokens, and d_i the number of valid tokens of the whole batch. No warning: d says it."""
    model, tokens, targets = classes_and_targets(kind, ignored=True)
    truth = per_example_gradients(sums_of_tokens(model, tokens, targets), model, trainable(model))
    valid = (targets != -100).sum()
    d = valid.expand(N) if integers else valid.double().expand(N).clone()
    probe = zerosum.Probe(model, gram=True, loss_reduction=d)
    with probe:
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    assert_truth(probe.report(), truth)


@pytest.mark.parametrize(("reduction", "ignored"), [("sum", False), ("sum", True), ("mean", True)])
def test_a_mean_over_tokens_that_couples_examples_is_warned_of(reduction: str, ignored: bool) -> None:
    model, tokens, targets = classes_and_targets(TwoLayers, ignored)
    with pytest.warns(UserWarning, match="couples"), zerosum.Probe(model, loss_reduction=reduction):
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="mean").backward()


def test_a_mean_over_tokens_without_ignored_ones_is_the_mean_of_the_examples_means() -> None:
    """And is not warned of: warnings are errors in these tests."""
    model, tokens, targets = classes_and_targets(TwoLayers, ignored=False)
    truth = per_example_gradients(sums_of_tokens(model, tokens, targets) / T, model, trainable(model))
    probe = zerosum.Probe(model, loss_reduction="mean")
    with probe:
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    assert_truth(probe.report(), truth, gram=False)


@pytest.mark.parametrize("kind", [TwoLayers, Residual])
def test_a_loss_that_does_not_couple_examples_is_not_warned_of(kind: type[TwoLayers]) -> None:
    model, tokens, targets = classes_and_targets(kind, ignored=True)
    truth = per_example_gradients(sums_of_tokens(model, tokens, targets), model, trainable(model))
    probe = zerosum.Probe(model)
    with probe:
        sums_of_tokens(model, tokens, targets).sum().backward()
    assert_truth(probe.report(), truth, gram=False)


def test_denominators_of_another_shape_are_refused() -> None:
    model, tokens = setup(TwoLayers)

    def step() -> None:
        probe = zerosum.Probe(model, loss_reduction=torch.ones(N + 1))
        with probe:
            losses_of(model(tokens)).sum().backward()
        probe.report()

    with pytest.raises((ValueError, RuntimeError), match=rf"loss_reduction.*\({N + 1},\)"):
        step()


# Positions as examples.


class Add(nn.Module):
    """A bias by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Scale(nn.Module):
    """The scale of a norm written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Positions(nn.Module):
    """Linear layers with and without a bias, one of them used twice, an embedding, norms and a bias, and attention between them."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.add, self.scale = nn.Embedding(VOCAB, 8), Add(8), Scale(8)
        self.layer_norm, self.rms_norm = nn.LayerNorm(8), nn.RMSNorm(8)
        self.value, self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layer_norm(self.add(self.embedding(tokens)))
        x = x + F.scaled_dot_product_attention(x, x, self.value(x), is_causal=True)
        x = self.rms_norm(self.twice(torch.tanh(self.twice(x))))
        return self.head(torch.tanh(self.scale(x)))


def position_gradients(model: nn.Module, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
    """(N·T, *parameter.shape): an output's gradient times the input, position by position, over all uses; from one backward pass.

    For modules of the kinds in ``Positions`` and in the project's own GPT.
    """
    uses: list[tuple[nn.Module, Tensor, list[Tensor]]] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        uses.append((module, args[0].detach(), found := []))
        output.register_hook(lambda grad: found.append(grad.flatten(0, 1)))

    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, Add, Scale)
    handles = [module.register_forward_hook(watch) for module in model.modules() if isinstance(module, kinds)]
    losses().sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    parts: dict[nn.Parameter, Tensor] = {}

    def add(parameter: nn.Parameter | None, g: Tensor) -> None:
        if parameter is not None:
            parts[parameter] = parts.get(parameter, 0.0) + g

    for module, x, (b,) in uses:
        a = x.flatten(0, 1)
        if isinstance(module, nn.Linear):
            add(module.weight, b[:, :, None] * a[:, None, :])
        elif isinstance(module, nn.Embedding):
            add(module.weight, F.one_hot(a, module.num_embeddings).to(b)[:, :, None] * b[:, None, :])
        elif isinstance(module, nn.LayerNorm):
            add(module.weight, b * F.layer_norm(a, module.normalized_shape, eps=module.eps))
        elif isinstance(module, nn.RMSNorm):
            add(module.weight, b * F.rms_norm(a, module.normalized_shape, eps=module.eps))
        elif isinstance(module, Scale):
            add(module.weight, b * a)
        add(getattr(module, "bias", None), b)
    return {name: parts[parameter] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_an_examples_positions_sum_to_its_gradient(tied: bool) -> None:
    """What the next test holds a probe to is itself held to the oracle here."""
    torch.manual_seed(0)
    network, (tokens, targets) = Positions(tied).double(), torch.randint(0, VOCAB, (2, N, T))
    positions = position_gradients(network, lambda: token_losses(network, tokens, targets))
    truth = per_example_gradients(token_losses(network, tokens, targets).sum(1), network, trainable(network))
    sums = {name: g.unflatten(0, (N, T)).sum(1) for name, g in positions.items()}
    torch.testing.assert_close(sums, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", [T, N], ids=["T != N", "T == N"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("model", ["plain", "tied", "gpt"])
def test_every_position_is_an_example(model: str, reduction: str, t: int) -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab=VOCAB, width=8, layers=2, heads=2, positions=T)
    network = (GPT(config) if model == "gpt" else Positions(model == "tied")).double()
    tokens, targets = torch.randint(0, VOCAB, (2, N, t))
    truth = position_gradients(network, lambda: token_losses(network, tokens, targets))
    direction = direction_for(network)
    probe = zerosum.Probe(network, examples="position", direction=direction, gram=True, loss_reduction=reduction)
    with probe:
        getattr(token_losses(network, tokens, targets), reduction)().backward()
    report = probe.report()
    assert report.num_examples == N * t
    assert_truth(report, truth, direction)
    assert_covers(report, network, truth)


# Coverage.


class Regularized(TwoLayers):
    """Weight decay in the loss: a part of a gradient that belongs to no example."""

    def penalty(self) -> Tensor:
        return self.head.weight.square().sum()


@pytest.mark.parametrize("strict", [False, True])
def test_a_gradient_that_belongs_to_no_example_is_not_reported_as_one(strict: bool) -> None:
    model, tokens = setup(Regularized)
    truth = truth_of(model, tokens)
    probe = zerosum.Probe(model, gram=True, strict=strict)

    def step() -> zerosum.Report:
        with probe:
            (losses_of(model(tokens)).sum() + model.penalty()).backward()
        return probe.report()

    if strict:
        with pytest.raises((RuntimeError, ValueError), match=r"head\.weight"):
            step()
        return
    report = step()
    assert "head.weight" in report.coverage.not_covered
    assert_truth(report, truth, refusable=True)
    torch.testing.assert_close(model.head.weight.grad, truth["head.weight"].sum(0) + 2 * model.head.weight, rtol=1e-9, atol=0)


def test_strict_raises_where_an_operation_would_be_run_again() -> None:
    model, tokens = setup(Convolution)
    with (
        pytest.raises(NotImplementedError, match=r"full\.weight is used by conv1d, which no rule covers"),
        zerosum.Probe(model, strict=True),
    ):
        losses_of(model(tokens)).sum().backward()


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind is not Convolution])
def test_strict_is_silent_where_all_is_covered(kind: type[TwoLayers]) -> None:
    model, tokens = setup(kind)
    truth = truth_of(model, tokens)
    probe = zerosum.Probe(model, strict=True)
    with probe:
        losses_of(model(tokens)).sum().backward()
    assert_truth(probe.report(), truth, gram=False)


@pytest.mark.parametrize("kind", [Dropout, Residual])
def test_nothing_stays_behind_in_the_model_after_an_exception_in_the_block(kind: type[TwoLayers]) -> None:
    model, tokens = setup(kind)
    torch.manual_seed(1)
    model(tokens)
    before = snapshot(model)
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), zerosum.Probe(model, gram=True):
        losses_of(model(tokens))[1 // 0]
    assert_unchanged(snapshot(model), before)
