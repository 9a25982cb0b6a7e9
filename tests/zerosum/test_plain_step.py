"""Training with a probe is training without it: losses to the bit, random numbers, buffers, hooks, and gradients to rounding.

Each case runs two micro-batches of one seeded step, once without a probe and once with one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zerosum
from tests.zerosum.models import Mixture, varied
from tests.zerosum.oracle import gradients
from tests.zerosum.steps import SEED, assert_gradients, quiet, square_losses

WIDTH = 8
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch's own, where an input is a constant


class Between(nn.Module):
    """An embedding and a layer, a middle on (N, T, 8), and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(torch.tanh(self.first(self.embedding(tokens)))))


class Dropouts(Between):
    """Masks of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.drop, self.alpha = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.AlphaDropout(0.2)

    def middle(self, x: Tensor) -> Tensor:
        return F.dropout(self.again(self.drop(x)), 0.2, self.training) + self.alpha(x)


class DropoutsThatMix(Dropouts):
    """Examples meet behind a mask."""

    def middle(self, x: Tensor) -> Tensor:
        x = super().middle(x)
        return torch.tanh(x - x.mean(0))


class Noise(Between):
    """Random numbers that the model draws itself."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        keep = torch.bernoulli(torch.full((len(x), 1, 1), 0.5, dtype=x.dtype))
        return x + keep * self.again(x + 0.1 * torch.randn_like(x)) + F.gumbel_softmax(self.again(x), hard=True)


class Encoder(Between):
    """torch's encoder layer with dropout inside of its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.2, batch_first=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Stacked(Between):
    """A recurrent network of two layers, with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, 2, dropout=0.3, batch_first=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Convolutional(Between):
    """A convolution, batch norm with fixed statistics, and channels that are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.drop = (
            nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
            varied(nn.BatchNorm1d(WIDTH)),
            nn.Dropout1d(0.3),
        )
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def middle(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.convolution(x.mT))).mT


class FixedStatistics(Convolutional):
    """Batch norm in evaluation, the rest in training."""

    def train(self, mode: bool = True) -> FixedStatistics:
        super().train(mode)
        self.norm.eval()
        return self


class MovingStatistics(Convolutional):
    """Batch norm in training: its statistics move once for each forward pass."""


class Averages(Between):
    """A buffer with a moving average, a counter, and a codebook that is moved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.average.lerp_(x.mean((0, 1)), 0.1)
                self.calls += 1
        return self.again(x - self.average)


class Checkpointed(Between):
    """Dropout and attention under checkpoints, one in another."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.2, batch_first=True) for _ in range(2))
        self.norm, self.drop = varied(nn.LayerNorm(WIDTH)), nn.Dropout(0.3)

    def middle(self, x: Tensor) -> Tensor:
        def both(y: Tensor) -> Tensor:
            if self.reentrant:  # torch warns of a reentrant one in another
                return self.drop(self.norm(self.layers[1](y)))
            return checkpoint(lambda z: self.drop(self.norm(z)), self.layers[1](y), use_reentrant=False)

        x = checkpoint(self.layers[0], x, use_reentrant=self.reentrant)
        return checkpoint(both, self.drop(x), use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    """The same in the older way, one after another."""

    reentrant = True


class RecurrentAndCheckpoint(Between):
    """A recurrent network, a reentrant checkpoint, and the network again."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.again = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        x = self.rnn(x)[0]
        x = checkpoint(lambda y: F.dropout(torch.tanh(self.again(y)), 0.2), x, use_reentrant=True)
        return self.rnn(x)[0]


class EncoderAndNorm(Between):
    """torch's encoder layer and a norm, in one checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.1, batch_first=True), nn.LayerNorm(WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


class Experts(Between):
    """Rows that are sent to experts, with noise in the router."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mixture, self.up = nn.Linear(WIDTH, 12), Mixture(), nn.Linear(12, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        return self.up(self.mixture.middle(F.dropout(torch.tanh(self.down(x)), 0.1)))


class Tied(Between):
    """A tied head, a weight that runs twice, and a function of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.twice = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        return self.twice(F.dropout(torch.tanh(self.twice(x)), 0.1))


class InPlace(Between):
    """Outputs that are changed in place, and a view that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        y = self.again(x)
        y.add_(x).mul_(2)
        y[:, 0] = 0
        return F.dropout(y.relu_(), 0.2)


class Frozen(Between):
    """A frozen body behind a trained embedding, a branch that is detached, and one under no_grad that draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side = nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            noise = F.dropout(self.side(x), 0.5)
        return self.body(x) + self.side(x).detach() + noise


class Opaque(Between):
    """vmap with random numbers of its own, and a custom function."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(WIDTH, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        return Scaled.apply(torch.vmap(lambda row: F.dropout(torch.tanh(row), 0.2), randomness="different")(self.again(x)))


class Scaled(torch.autograd.Function):
    """Twice its input, by a function of the user's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


MODELS = [
    *(Between, Dropouts, DropoutsThatMix, Noise, Encoder, Stacked, Convolutional, FixedStatistics, MovingStatistics, Averages),
    *(Checkpointed, CheckpointedReentrant, RecurrentAndCheckpoint, EncoderAndNorm, Experts, Tied, InPlace, Frozen, Opaque),
]


@dataclass
class Trace:
    """What a step did that somebody could notice."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    random: Tensor = field(default_factory=lambda: torch.zeros(0))
    calls: Counter[str] = field(default_factory=Counter)
    seen: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


def hooked(model: nn.Module, trace: Trace) -> list[Any]:
    """Hooks of every kind that a user may have set, each of which counts its calls and keeps what it saw."""
    handles: list[Any] = []

    def count(key: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            trace.calls[key] += 1

        return hook

    def on_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            trace.calls[f"forward {name}"] += 1
            # What is changed in place may lose its hook, depending on the operation that it comes from.
            if isinstance(output, Tensor) and output.requires_grad and not isinstance(model, InPlace):
                output.register_hook(seen(f"output of {name}"))

        return hook

    def seen(key: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            trace.calls[key] += 1
            trace.seen[key].append(grad.detach().clone())

        return hook

    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(count(f"before {name}")), module.register_forward_hook(on_output(name))]
        # Torch warns of a backward hook where no input has a gradient, and refuses one whose output is changed in place.
        if name not in ("", "embedding") and not isinstance(model, InPlace):
            handles.append(module.register_full_backward_hook(count(f"backward {name}")))
    for name, p in model.named_parameters():
        if p.requires_grad:
            handles += [
                p.register_hook(count(f"gradient of {name}")),
                p.register_post_accumulate_grad_hook(count(f"accumulated {name}")),
            ]
    return handles


def run(model: nn.Module, batches: list[Tensor], reduction: str, probe: zerosum.Probe | None, hooks: bool) -> Trace:
    """One step of two micro-batches, from one seed and one state of the buffers."""
    trace = Trace()
    handles = hooked(model, trace) if hooks else []
    model.zero_grad()
    torch.manual_seed(SEED)

    def step() -> None:
        for tokens in batches:
            losses = square_losses(model(tokens))
            trace.losses.append(losses.detach().clone())
            getattr(losses, reduction)().div(len(batches)).backward()
            trace.losses.append(torch.rand(2))  # the loop draws numbers too

    if probe is None:
        step()
    else:
        with quiet(), probe:
            step()
    trace.random = torch.get_rng_state().clone()
    trace.gradients, trace.buffers = gradients(model), {name: b.clone() for name, b in model.named_buffers()}
    for handle in handles:
        handle.remove()
    return trace


def compare(kind: Callable[[], nn.Module], batches: list[Tensor], reduction: str, hooks: bool, **options: Any) -> None:
    traces = []
    for probed in (False, True):
        torch.manual_seed(0)
        model = kind().double().train()
        probe = zerosum.Probe(model, gram=True, **options) if probed else None
        traces.append(run(model, batches, reduction, probe, hooks))
    plain, watched = traces
    torch.testing.assert_close(watched.losses, plain.losses, rtol=0, atol=0, msg="the losses are others")
    assert torch.equal(watched.random, plain.random), "the probe drew random numbers"
    torch.testing.assert_close(watched.buffers, plain.buffers, rtol=0, atol=0)
    changed = {key for key in plain.calls | watched.calls if plain.calls[key] != watched.calls[key]}
    assert not changed, {key: (plain.calls[key], watched.calls[key]) for key in sorted(changed)}
    for key, grads in plain.seen.items():
        torch.testing.assert_close(watched.seen[key], grads, rtol=1e-9, atol=1e-12)
    assert_gradients(watched.gradients, plain.gradients, 1e-9)


HOOKS_OF_DERIVED = "gradients of functions of weights alone go past the hooks on them (a parametrization's module)"


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (1, 5)])
@pytest.mark.parametrize("kind", MODELS)
def test_two_micro_batches_are_those_of_the_plain_step(kind: type[Between], n: int, t: int, hooks: bool) -> None:
    if hooks and kind is Tied:
        pytest.xfail(HOOKS_OF_DERIVED)
    torch.manual_seed(1)
    compare(kind, [torch.randint(11, (n, t)) for _ in range(2)], "mean" if hooks else "sum", hooks)


@pytest.mark.parametrize("kind", MODELS)
def test_micro_batches_of_other_sizes_are_those_of_the_plain_step(kind: type[Between]) -> None:
    torch.manual_seed(1)
    compare(kind, [torch.randint(11, shape) for shape in ((3, 5), (5, 3), (1, 4), (3, 5))], "sum", hooks=False)


@pytest.mark.parametrize("kind", [Dropouts, Encoder, Checkpointed, CheckpointedReentrant, Experts, MovingStatistics, Opaque])
@pytest.mark.parametrize("verify", ["always", 2, "never"])
def test_verification_changes_nothing(kind: type[Between], verify: str | int) -> None:
    torch.manual_seed(1)
    compare(kind, [torch.randint(11, (3, 5)) for _ in range(4)], "sum", hooks=True, verify=verify)


@pytest.mark.parametrize("kind", [Dropouts, Encoder, Checkpointed, Tied, Experts])
def test_positions_as_examples_change_nothing(kind: type[Between]) -> None:
    if kind is Tied:
        pytest.xfail(HOOKS_OF_DERIVED)
    torch.manual_seed(1)
    compare(kind, [torch.randint(11, (3, 5)) for _ in range(2)], "sum", hooks=True, examples="position")


@pytest.mark.parametrize("kind", MODELS)
def test_several_steps_of_training_are_those_without_a_probe(kind: type[Between]) -> None:
    """An optimizer that follows: every second step is measured, and all weights stay those of the plain run."""
    results = []
    for probed in (False, True):
        torch.manual_seed(0)
        model = kind().double().train()
        optimizer, probe = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), zerosum.Probe(model)
        for k in range(4):
            tokens = torch.randint(11, (3, 5))
            optimizer.zero_grad()
            if probed and k % 2 == 0:
                with quiet(), probe:
                    square_losses(model(tokens)).sum().backward()
            else:
                square_losses(model(tokens)).sum().backward()
            optimizer.step()
        results.append((dict(model.named_parameters()), torch.get_rng_state()))
    (plain, state), (watched, watched_state) = results
    assert torch.equal(state, watched_state)
    assert_gradients({name: p.detach() for name, p in watched.items()}, {name: p.detach() for name, p in plain.items()}, 1e-9)


class Scalar(torch.autograd.Function):
    """The sum of its rows. Fails if its backward pass runs twice, as functions do that free what they kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = [x]
        return x.square().flatten(1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if not ctx.kept:
            raise RuntimeError("what the function kept is gone")
        return 2 * ctx.kept.pop() * grad.view(-1, 1, 1)


@pytest.mark.xfail(raises=RuntimeError, strict=True, reason="the passes that prove attribution run it before the training does")
@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4)])
def test_a_function_whose_backward_pass_can_run_once(n: int, t: int) -> None:
    """The step works as it does without a probe; what is covered is right."""
    torch.manual_seed(0)
    model, tokens = Between().double(), torch.randint(11, (n, t))
    Scalar.apply(model(tokens)).sum().backward()
    plain = gradients(model)
    model.zero_grad()
    with quiet(), (probe := zerosum.Probe(model)):
        Scalar.apply(model(tokens)).sum().backward()
    assert_gradients(gradients(model), plain, 1e-9)
    truth = [torch.autograd.grad(model(tokens)[i].square().sum(), list(model.parameters())) for i in range(n)]
    for (name, _), rows in zip(model.named_parameters(), zip(*truth, strict=True), strict=True):
        if name in probe.report():
            torch.testing.assert_close(probe.report()[name].abs_sum, torch.stack(rows).abs().sum(0), rtol=1e-9, atol=1e-12)
