"""What was differentiated, and whose losses the report is of: every way in which a training step ends, by default.

With losses ℓ (N,) in the step, those are the examples' losses, and what they are multiplied by on the way to the total enters as
c / mean(c). Otherwise the rows r of known loss functions are, with their own factors c: ℓ_i = Σ_r c_r ℓ_r over i's rows, divided by
the mean over examples of Σ_r c_r. So neither a reduction, nor accumulation, nor a scaler changes what is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum
import zsl_kernels as zk
from tests.zerosum.fuzz_blocks import HiddenProduct
from tests.zerosum.oracle import gradients
from tests.zerosum.steps import assert_gradients, assert_one_truth, check, quiet, truth_of

CLASSES, WIDTH = 7, 6
# (N, T): all different, N = T, N = classes, N = width, one example, one position.
sizes = pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (7, 3), (6, 4), (1, 5), (5, 1)])


class Model(nn.Module):
    """An embedding, attention over an example's positions, a head for each position and one for the example."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.pooled, self.norm = nn.Linear(WIDTH, CLASSES, bias=False), nn.Linear(WIDTH, 3), nn.LayerNorm(WIDTH)

    def body(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.norm(x + F.scaled_dot_product_attention(x, x, torch.tanh(self.mix(x)), is_causal=True))


@dataclass
class Batch:
    """A model and its data. Outputs are computed at most once for each step."""

    model: Model
    tokens: Tensor
    ignored: bool
    kept: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, t = self.tokens.shape
        g = torch.Generator().manual_seed(3)
        self.targets = torch.randint(CLASSES, (n, t), generator=g)
        if self.ignored:  # different numbers of targets, but at least one
            self.targets = self.targets.masked_fill(torch.arange(t) > (torch.arange(n) % t)[:, None], -100)
        self.classes = torch.randint(3, (n,), generator=g)
        self.vectors = torch.randn(n, 3, generator=g, dtype=torch.float64)
        self.weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.5
        self.valid = self.targets != -100

    @property
    def n(self) -> int:
        return len(self.tokens)

    @property
    def v(self) -> int:
        """The number of valid tokens."""
        return int(self.valid.sum())

    def hidden(self) -> Tensor:
        if "hidden" not in self.kept:
            self.kept["hidden"] = self.model.body(self.tokens)
        return self.kept["hidden"]

    def logits(self) -> Tensor:
        return self.model.head(self.hidden())

    def pooled(self) -> Tensor:
        """(N, 3)."""
        return self.model.pooled(self.hidden().mean(1))

    def rows(self, **options: object) -> Tensor:
        """(N, T) losses of the tokens."""
        return F.cross_entropy(self.logits().mT, self.targets, reduction="none", **options)  # type: ignore[arg-type]

    def each(self) -> Tensor:
        """(N,) losses of the examples."""
        return F.cross_entropy(self.pooled(), self.classes, reduction="none")

    def tokens_of_each(self) -> Tensor:
        """(N,): what the mean over all valid tokens makes of an example."""
        return self.rows().sum(1) * self.n / self.v


@pytest.fixture
def batch(n: int, t: int, ignored: bool) -> Batch:
    torch.manual_seed(0)
    return Batch(Model().double(), torch.randint(11, (n, t)), ignored)


@pytest.fixture
def ignored() -> bool:
    return False


Loss = Callable[[Batch], Tensor]


def check_end(
    batch: Batch,
    total: Loss,
    own: Loss,
    factors: tuple[float, ...] = (1.0,),
    backward: Callable[[Tensor], None] | None = None,
    **options: object,
) -> zerosum.Report:
    def step() -> None:
        batch.kept.clear()
        (Tensor.backward if backward is None else backward)(total(batch))

    def losses() -> Tensor:
        batch.kept.clear()
        return own(batch)

    return check(batch.model, losses, step, factors=factors, **options)


# Losses (N,).

OF_EACH: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda losses: losses.sum(),
    "mean": lambda losses: losses.mean(),
    "sum over a number": lambda losses: losses.sum() / 4,
    "mean over a number": lambda losses: losses.mean() / 8,
    "mean times a number": lambda losses: 1024.0 * losses.mean(),
    "mean over a tensor": lambda losses: losses.mean() / torch.tensor(3.0),
    "sum divided in place": lambda losses: losses.sum().div_(5),
    "sum over dim 0": lambda losses: losses.sum(0),
    "sum with the dimension kept": lambda losses: losses.sum(0, keepdim=True).squeeze(),
    "mean over all dims": lambda losses: losses.mean(dim=(0,)),
    "added by Python": lambda losses: sum(losses),
    "added by Python, divided": lambda losses: sum(losses) / len(losses),
    "added one by one": lambda losses: sum((losses[i] for i in range(len(losses))), torch.zeros((), dtype=losses.dtype)),
    "unbound and stacked": lambda losses: torch.stack(losses.unbind()).mean(),
    "ones": lambda losses: losses @ torch.ones_like(losses),
    "einsum": lambda losses: torch.einsum("n->", losses),
    "a column": lambda losses: losses[:, None].sum(),
    "in another order": lambda losses: losses[torch.arange(len(losses)).flip(0)].mean(),
    "scaled by a detached number": lambda losses: losses.sum() / losses.sum().detach(),
    "in float32": lambda losses: losses.mean().float(),
    "with a constant": lambda losses: losses.mean() + 3,
    "negated twice": lambda losses: -(-losses).mean(),
    "nested means": lambda losses: torch.stack([losses.mean(), losses.mean()]).mean(),
    "halves": lambda losses: losses[: len(losses) // 2].sum() + losses[len(losses) // 2 :].sum(),
}


@sizes
@pytest.mark.parametrize("end", OF_EACH)
def test_the_losses_of_the_examples_whatever_their_reduction(end: str, batch: Batch) -> None:
    check_end(batch, lambda b: OF_EACH[end](b.each()), lambda b: b.each())


@sizes
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("end", ["sum", "mean", "mean over a number", "added by Python", "in another order"])
@pytest.mark.parametrize("of_tokens", ["sum", "mean", "mean of the valid", "squares"])
def test_the_losses_of_sequences_whatever_their_reduction(of_tokens: str, end: str, batch: Batch) -> None:
    """(N,) of (N, T): those are the examples' losses, however they came about."""
    own: dict[str, Loss] = {
        "sum": lambda b: b.rows().sum(1),
        "mean": lambda b: b.rows().mean(1),
        "mean of the valid": lambda b: b.rows().sum(1) / b.valid.sum(1),
        "squares": lambda b: b.logits().square().mean((1, 2)),
    }
    check_end(batch, lambda b: OF_EACH[end](own[of_tokens](b)), own[of_tokens])


def test_losses_that_are_divided_before_they_are_added() -> None:
    """The examples' losses are those before or after the division."""
    torch.manual_seed(0)
    batch = Batch(Model().double(), torch.randint(11, (3, 5)), False)
    check_end(batch, lambda b: (b.each() / 4).sum(), lambda b: b.each(), factors=(1.0, 0.25))


WEIGHTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda losses, w: losses @ w,
    "dot": lambda losses, w: torch.dot(w, losses),
    "einsum": lambda losses, w: torch.einsum("n,n->", losses, w),
    "product over the weights": lambda losses, w: losses @ w / w.sum(),
    "times and sum": lambda losses, w: (losses * w).sum(),
    "times and mean": lambda losses, w: (w * losses).mean(),
    "weighted mean": lambda losses, w: (losses * w).sum() / w.sum(),
    "times a detached function of itself": lambda losses, w: (losses * losses.detach().sigmoid()).sum(),
}


@sizes
@pytest.mark.parametrize("end", WEIGHTED)
def test_losses_with_weights(end: str, batch: Batch) -> None:
    """c_i / mean(c) times the loss; a tensor of weighted losses may also be taken as it is."""
    w = batch.each().detach().sigmoid() if "itself" in end else batch.weights
    taken = ("product", "dot", "einsum", "product over the weights")
    multiplied = end == "einsum" and batch.n == 1  # that is how torch's einsum treats two tensors of one entry
    factors = (1.0,) if end in taken and not multiplied else (1.0, w.mean().item())
    # torch's einsum forms a tensor (1,) on the way. With (5, 1) tokens that may be one example's loss, and the probe asks.
    options = {"num_examples": batch.n} if end == "einsum" and batch.tokens.shape == (5, 1) else {}
    check_end(batch, lambda b: WEIGHTED[end](b.each(), w), lambda b: b.each() * w / w.mean(), factors=factors, **options)


@sizes
@pytest.mark.parametrize("weights", ["ones", "N-th parts", "different"])
def test_a_backward_pass_with_weights(weights: str, batch: Batch) -> None:
    c = {"ones": torch.ones_like(batch.weights), "N-th parts": torch.ones_like(batch.weights) / batch.n, "different": batch.weights}
    w = c[weights]
    check_end(batch, lambda b: b.each(), lambda b: b.each() * w / w.mean(), backward=lambda losses: losses.backward(w))


# Losses (N, T), and totals of known functions.


def by_hand(b: Batch) -> Tensor:
    """(N, T) losses that no known function made; zero where the target is ignored."""
    targets = b.targets.clamp(min=0)[..., None]
    return (b.logits().logsumexp(-1) - b.logits().gather(-1, targets).squeeze(-1)) * b.valid


OF_ROWS: dict[str, Loss] = {
    "sum": lambda b: b.rows().sum(),
    "sum over their number": lambda b: b.rows().sum() / b.valid.sum(),
    "masked and divided": lambda b: (b.rows() * b.valid).sum() / b.valid.sum(),
    "selected": lambda b: b.rows()[b.valid].mean(),
    "flat and selected": lambda b: b.rows().flatten()[b.valid.flatten()].sum(),
    "sum of the positions' sums": lambda b: b.rows().sum(0).sum(),
    "positions first": lambda b: F.cross_entropy(b.logits().transpose(0, 1).mT, b.targets.T, reduction="none").sum(),
    "by hand, masked": lambda b: by_hand(b).sum() / b.v,
    "by hand, selected": lambda b: by_hand(b)[b.valid].mean(),
    "flat rows": lambda b: F.cross_entropy(b.logits().flatten(0, 1), b.targets.flatten(), reduction="none").sum(),
    "mean, flat": lambda b: F.cross_entropy(b.logits().flatten(0, 1), b.targets.flatten()),
    "mean, view": lambda b: F.cross_entropy(b.logits().view(-1, CLASSES), b.targets.view(-1)),
    "mean, transposed": lambda b: F.cross_entropy(b.logits().transpose(1, 2), b.targets),
    "mean, sequence first": lambda b: F.cross_entropy(b.logits().transpose(0, 1).flatten(0, 1), b.targets.T.flatten()),
    "mean, valid alone": lambda b: F.cross_entropy(b.logits()[b.valid], b.targets[b.valid]),
    "mean, a module": lambda b: nn.CrossEntropyLoss()(b.logits().flatten(0, 1), b.targets.flatten()),
    "mean, another number ignored": lambda b: F.cross_entropy(
        b.logits().flatten(0, 1), b.targets.masked_fill(~b.valid, 99).flatten(), ignore_index=99
    ),
    "mean, a class that is ignored": lambda b: F.cross_entropy(
        F.pad(b.logits(), (1, 0), value=-1e9).flatten(0, 1), (b.targets + 1).clamp(min=0).flatten(), ignore_index=0
    ),
    "total": lambda b: F.cross_entropy(b.logits().flatten(0, 1), b.targets.flatten(), reduction="sum"),
    "total over the number": lambda b: F.cross_entropy(b.logits().flatten(0, 1), b.targets.flatten(), reduction="sum") / b.v,
    "total over another number": lambda b: F.cross_entropy(b.logits().mT, b.targets, reduction="sum") / 1000,
    "mean over steps": lambda b: F.cross_entropy(b.logits().flatten(0, 1), b.targets.flatten()) / 8,
    "mean, scaled": lambda b: F.cross_entropy(b.logits().flatten(0, 1), b.targets.flatten()) * 2.0**10,
    "mean, over its own value": lambda b: (loss := F.cross_entropy(b.logits().flatten(0, 1), b.targets.flatten())) / loss.detach(),
    "negative log-likelihood": lambda b: F.nll_loss(b.logits().flatten(0, 1).log_softmax(-1), b.targets.flatten()),
    "negative log-likelihood, total": lambda b: F.nll_loss(b.logits().log_softmax(-1).mT, b.targets, reduction="sum"),
    "the library's head, sum": lambda b: zk.linear_cross_entropy(b.hidden(), b.model.head.weight, b.targets).sum(),
    "the library's head, mean": lambda b: zk.linear_cross_entropy(b.hidden(), b.model.head.weight, b.targets).sum() / b.v,
    "chunks of the positions": lambda b: (
        sum(
            F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum")
            for x, y in zip(b.logits().split(2, 1), b.targets.split(2, 1), strict=True)
        )
        / b.v
    ),
    "example by example": lambda b: (
        sum(F.cross_entropy(x, y, reduction="sum") for x, y in zip(b.logits(), b.targets, strict=True)) / b.v
    ),
}


@sizes
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("end", OF_ROWS)
def test_the_losses_of_rows_whatever_their_reduction(end: str, batch: Batch) -> None:
    """An average example's tokens weigh one: N / V times the sum of an example's valid tokens' losses."""
    # (T, 1) rows are added up to one loss: these are N examples, or one with its positions first. The probe asks.
    options = {"num_examples": batch.n} if end == "sum of the positions' sums" and batch.tokens.shape == (5, 1) else {}
    check_end(batch, OF_ROWS[end], lambda b: b.tokens_of_each(), **options)


@sizes
@pytest.mark.parametrize("ignored", [False, True])
def test_the_mean_of_all_rows_ignored_ones_too(batch: Batch) -> None:
    """``rows.mean()`` divides by N·T. Ignored rows count as rows there, or they do not."""
    factors = (1.0, batch.v / batch.targets.numel())
    check_end(batch, lambda b: b.rows().mean(), lambda b: b.tokens_of_each(), factors=factors)


@pytest.mark.parametrize("end", ["mean, flat", "total", "sum over their number", "mean, transposed"])
@pytest.mark.parametrize("lengths", [(0, 3, 4), (2, 0, 0, 4), (0, 5)])
def test_an_example_without_a_target_has_no_part_in_the_mean(end: str, lengths: tuple[int, ...]) -> None:
    """Its gradient is zero; an average one of the others weighs one."""
    torch.manual_seed(0)
    n, t = len(lengths), 5
    batch = Batch(Model().double(), torch.randint(11, (n, t)), False)
    batch.valid = torch.arange(t) < torch.tensor(lengths)[:, None]
    batch.targets = batch.targets.masked_fill(~batch.valid, -100)
    count = sum(length > 0 for length in lengths)
    check_end(batch, OF_ROWS[end], lambda b: b.rows().sum(1) * count / b.v)


@sizes
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing(smoothing: float, reduction: str, batch: Batch) -> None:
    check_end(
        batch,
        lambda b: F.cross_entropy(b.logits().flatten(0, 1), b.targets.flatten(), reduction=reduction, label_smoothing=smoothing),
        lambda b: b.rows(label_smoothing=smoothing).sum(1) * b.n / b.v,
    )


@sizes
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_of_classes(reduction: str, batch: Batch) -> None:
    """A row's loss has its class's weight in it, or the weight is the row's factor: one number for all is between them."""
    w = torch.rand(CLASSES, dtype=torch.float64) + 0.5
    mean = w[batch.targets[batch.valid]].mean().item()
    check_end(
        batch,
        lambda b: F.cross_entropy(b.logits().flatten(0, 1), b.targets.flatten(), weight=w, reduction=reduction),
        lambda b: b.rows(weight=w).sum(1) * b.n / b.v,
        factors=(1.0, 1 / mean),
    )


@sizes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_targets_that_are_distributions(reduction: str, batch: Batch) -> None:
    soft = torch.randn(batch.n, 3, dtype=torch.float64).softmax(-1)
    check_end(
        batch,
        lambda b: F.cross_entropy(b.pooled(), soft, reduction=reduction),
        lambda b: F.cross_entropy(b.pooled(), soft, reduction="none"),
    )


ELEMENTS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "mse_loss": lambda p, y, reduction: F.mse_loss(p, y, reduction=reduction),
    "l1_loss": lambda p, y, reduction: F.l1_loss(p, y, reduction=reduction),
    "smooth_l1_loss": lambda p, y, reduction: F.smooth_l1_loss(p, y, reduction=reduction, beta=0.5),
    "huber_loss": lambda p, y, reduction: F.huber_loss(p, y, reduction=reduction, delta=0.7),
    "binary_cross_entropy": lambda p, y, reduction: F.binary_cross_entropy(p.sigmoid(), y.sigmoid(), reduction=reduction),
    "binary_cross_entropy_with_logits": lambda p, y, reduction: F.binary_cross_entropy_with_logits(
        p, (y > 0).to(y.dtype), reduction=reduction
    ),
    "binary_cross_entropy_with_logits, weighted positives": lambda p, y, reduction: F.binary_cross_entropy_with_logits(
        p, (y > 0).to(y.dtype), reduction=reduction, pos_weight=torch.full(y.shape[-1:], 2.5, dtype=y.dtype)
    ),
    "kl_div": lambda p, y, reduction: F.kl_div(p.log_softmax(-1), y.softmax(-1), reduction=reduction),
    "kl_div of logarithms": lambda p, y, reduction: F.kl_div(
        p.log_softmax(-1), y.log_softmax(-1), reduction=reduction, log_target=True
    ),
    "MSELoss": lambda p, y, reduction: nn.MSELoss(reduction=reduction)(p, y),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's own, of divergences
@sizes
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("outputs", ["(N, 3)", "(N, T, 7)", "(N,)"])
@pytest.mark.parametrize("function", ELEMENTS)
def test_losses_of_elements(function: str, outputs: str, reduction: str, batch: Batch) -> None:
    """Rows are the elements: an example's loss is the mean over its own, whatever the reduction.

    A divergence may also be taken as a row's, the sum over its classes.
    """
    if reduction == "batchmean" and "kl_div" not in function:
        pytest.skip("of divergences alone")
    if outputs == "(N,)" and "kl_div" in function:
        pytest.skip("a distribution has classes")
    f = ELEMENTS[function]
    predict: dict[str, Loss] = {
        "(N, 3)": lambda b: b.pooled(),
        "(N, T, 7)": lambda b: b.logits(),
        "(N,)": lambda b: b.pooled()[:, 0],
    }
    g = torch.Generator().manual_seed(5)
    y = torch.randn(predict[outputs](batch).shape, generator=g, dtype=torch.float64) + 1.5  # signs that do not cancel
    own: Loss = lambda b: f(predict[outputs](b), y, "none").flatten(1).mean(1) if y.ndim > 1 else f(predict[outputs](b), y, "none")  # noqa: E731
    check_end(
        batch, lambda b: f(predict[outputs](b), y, reduction), own, factors=(1.0, y.shape[-1]) if "kl_div" in function else (1.0,)
    )


# Several losses.


def mean_of(b: Batch, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@sizes
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_two_known_losses_with_weights(factor: float, batch: Batch) -> None:
    """Tokens' and an example's: each row has its own factor, and all together weigh one on average."""
    check_end(
        batch,
        lambda b: mean_of(b, b.logits(), b.targets) + factor * F.cross_entropy(b.pooled(), b.classes),
        lambda b: b.n * (b.rows().sum(1) / b.v + factor * b.each() / b.n) / (1 + factor),
    )


@sizes
@pytest.mark.parametrize("ignored", [False, True])
def test_losses_of_two_kinds(batch: Batch) -> None:
    """Cross entropy of the tokens, and squares of an example's three numbers."""
    check_end(
        batch,
        lambda b: 0.7 * mean_of(b, b.logits(), b.targets) + 0.3 * F.mse_loss(b.pooled(), b.vectors),
        lambda b: 0.7 * b.tokens_of_each() + 0.3 * (b.pooled() - b.vectors).square().mean(1),
    )


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (7, 3), (1, 5)])
@pytest.mark.parametrize("ignored", [False, True])
def test_several_tokens_are_predicted_at_once(batch: Batch) -> None:
    """The next token's loss and the one after it, of different numbers of targets."""
    rows = batch.targets[:, 1:].clamp(min=0)

    def own(b: Batch) -> Tensor:
        second = F.cross_entropy(b.logits()[:, :-1].mT, rows, reduction="none").sum(1) / rows.numel()
        return b.n * (b.rows().sum(1) / b.v + 0.5 * second) / 1.5

    check_end(batch, lambda b: mean_of(b, b.logits(), b.targets) + 0.5 * mean_of(b, b.logits()[:, :-1], rows), own)


@sizes
def test_two_losses_of_each_example(batch: Batch) -> None:
    """Totals of two tensors (N,): their sum with its weights, or with weights that are one together."""
    check_end(
        batch,
        lambda b: b.each().sum() + 0.5 * b.rows().sum(1).sum(),
        lambda b: b.each() + 0.5 * b.rows().sum(1),
        factors=(1.0, 1 / 1.5),
    )
    check_end(batch, lambda b: (b.each() + 0.5 * b.rows().sum(1)).mean(), lambda b: b.each() + 0.5 * b.rows().sum(1))


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"squares": torch.square, "the states themselves": lambda h: h}


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (7, 3), (1, 5)])
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_on_hidden_states_beside_the_losses(penalty: str, seen: bool, batch: Batch) -> None:
    """The losses are computed from the states: their gradient there is not to be counted with the penalty's and again."""
    below = nn.Linear(WIDTH, WIDTH, bias=False).double()
    batch.model.below = below

    def states(b: Batch) -> Tensor:
        x = b.hidden()
        return torch.sigmoid(below(x) if seen else HiddenProduct.apply(x, below.weight))

    def each(b: Batch, h: Tensor) -> Tensor:
        return F.cross_entropy(b.model.pooled(h.mean(1)), b.classes, reduction="none")

    def total(b: Batch) -> Tensor:
        h = states(b)
        return each(b, h).mean() + 0.1 * PENALTIES[penalty](h).mean()

    def own(b: Batch) -> Tensor:
        h = states(b)
        return each(b, h) + 0.1 * PENALTIES[penalty](h).mean((1, 2))

    check_end(batch, total, own)


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (7, 3)])
@pytest.mark.parametrize("marked", [True, False])
def test_a_penalty_on_hidden_states_with_a_term_of_its_own(marked: bool, batch: Batch) -> None:
    """A marked term is set apart in a backward pass from the losses and the penalty; one on a weight is named."""

    def total(b: Batch) -> Tensor:
        term = 0.2 * b.model.pooled.weight.square().sum()
        return b.each().mean() + 0.1 * b.hidden().square().mean() + (zerosum.auxiliary(term) if marked else term)

    def step() -> None:
        batch.kept.clear()
        total(batch).backward()

    def losses() -> Tensor:
        batch.kept.clear()
        return batch.each() + 0.1 * batch.hidden().square().mean((1, 2))

    check(batch.model, losses, step, refused=() if marked else ("pooled.weight",))


# Micro-batches, and scalers.


def parts(n: int) -> list[slice]:
    return [slice(0, n // 2), slice(n // 2, n)]


def known(n: int) -> Tensor:
    """Which entries of the Gram there are."""
    first = torch.arange(n) < n // 2
    return first[:, None] == first


@pytest.mark.parametrize(("n", "t"), [(4, 5), (8, 4), (2, 3), (14, 3)])
@pytest.mark.parametrize("end", ["sum", "mean", "mean over a number", "sum over a number"])
def test_accumulation_over_micro_batches(end: str, n: int, t: int) -> None:
    torch.manual_seed(0)
    whole = Batch(Model().double(), torch.randint(11, (n, t)), False)

    def each(part: slice) -> Tensor:
        return F.cross_entropy(
            whole.model.pooled(whole.model.body(whole.tokens[part]).mean(1)), whole.classes[part], reduction="none"
        )

    def step() -> None:
        for part in parts(n):
            (OF_EACH[end](each(part)) / 2).backward()

    check(whole.model, lambda: each(slice(None)), step, gram=known(n))


@pytest.mark.parametrize(("n", "t"), [(4, 5), (8, 4), (2, 3), (14, 3)])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("divisor", ["steps", "tokens of the batch"])
def test_means_of_tokens_over_micro_batches(divisor: str, ignored: bool, n: int, t: int) -> None:
    """Each micro-batch's own mean, or one number for all, as trainers have it: an average example, of a micro-batch or of all,
    weighs one."""
    torch.manual_seed(0)
    batch = Batch(Model().double(), torch.randint(11, (n, t)), ignored)
    numbers = [batch.valid[part].sum().item() for part in parts(n)]

    def step() -> None:
        for part in parts(n):
            logits, targets = batch.model.head(batch.model.body(batch.tokens[part])).flatten(0, 1), batch.targets[part].flatten()
            if divisor == "steps":
                (F.cross_entropy(logits, targets) / 2).backward()
            else:
                (F.cross_entropy(logits, targets, reduction="sum") / batch.v).backward()

    def own(together: bool) -> Tensor:
        batch.kept.clear()
        if together:
            return batch.tokens_of_each()
        scale = torch.cat([torch.full((n // 2,), n // 2 / number, dtype=torch.float64) for number in numbers])
        return batch.rows().sum(1) * scale

    if divisor == "steps" or numbers[0] == numbers[1]:
        check(batch.model, lambda: own(together=False), step, gram=known(n))
    else:
        either_of(batch.model, [lambda: own(together=True), lambda: own(together=False)], step, known(n))


def either_of(model: nn.Module, losses: list[Callable[[], Tensor]], step: Callable[[], None], gram: Tensor) -> None:
    """The report is of one of several definitions of the examples' losses."""
    model.zero_grad()
    with (probe := zerosum.Probe(model, gram=True)):
        step()
    truths = [truth_of(model, each) for each in losses]
    assert {name for name, g in truths[0].items() if g.any()} <= set(probe.report())
    for k, truth in enumerate(truths):
        try:
            assert_one_truth(probe.report(), truth, None, (1.0,), rtol=1e-9, gram=gram)
        except AssertionError:
            if k == len(truths) - 1:
                raise
        else:
            return


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4)])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("end", ["mean, flat", "total over another number", "sum"])
def test_a_gradient_scaler_changes_nothing(end: str, told: bool, batch: Batch) -> None:
    """Whether or not the probe is told of it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def step() -> None:
        batch.kept.clear()
        scaler.scale(OF_ROWS[end](batch)).backward()

    def losses() -> Tensor:
        batch.kept.clear()
        return batch.tokens_of_each()

    check(batch.model, losses, step, **({"grad_scaler": scaler} if told else {}))


# What was said to be differentiated goes before what is seen.


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (1, 5)])
@pytest.mark.parametrize("reduction", ["sum", "mean", 8.0, "tensor"])
def test_an_explicit_reduction_keeps_its_meaning(reduction: str | float, batch: Batch) -> None:
    """Denominators are what each loss was divided by; "sum" is of what was differentiated, with all its factors."""
    d = batch.weights if reduction == "tensor" else reduction
    total: dict[str | float, Loss] = {
        "sum": lambda b: (b.each() * 0.25).sum(),
        "mean": lambda b: b.each().mean(),
        8.0: lambda b: b.each().sum() / 8,
        "tensor": lambda b: (b.each() / b.weights).sum(),
    }

    def step() -> None:
        batch.kept.clear()
        total[reduction](batch).backward()

    def losses() -> Tensor:
        batch.kept.clear()
        return batch.each() * (0.25 if reduction == "sum" else 1)

    check(batch.model, losses, step, loss_reduction=d)


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4)])
@pytest.mark.parametrize("ignored", [False, True])
def test_an_explicit_number_of_tokens_keeps_its_meaning(batch: Batch) -> None:
    def step() -> None:
        batch.kept.clear()
        OF_ROWS["mean, flat"](batch).backward()

    def losses() -> Tensor:
        batch.kept.clear()
        return batch.rows().sum(1)

    check(batch.model, losses, step, loss_reduction=batch.v)


# Totals that are no sums over examples.

COUPLED: dict[str, Loss] = {
    "product": lambda b: b.each().prod(),
    "standard deviation": lambda b: b.each().std(),
    "logarithm of the mean": lambda b: b.each().mean().log(),
    "root of the sum": lambda b: b.each().sum().sqrt(),
    "square of the mean": lambda b: b.each().mean().square(),
    "logsumexp": lambda b: b.each().logsumexp(0),
    "weighted by all": lambda b: (b.each() * b.each().softmax(0)).sum(),
    "mean and deviation": lambda b: b.each().mean() + b.each().std(),
    "mean of one times mean of another": lambda b: b.each().mean() * b.rows().mean(),
    "perplexity": lambda b: F.cross_entropy(b.logits().flatten(0, 1), b.targets.flatten()).exp(),
    "square of a total": lambda b: F.cross_entropy(b.pooled(), b.classes, reduction="sum") ** 2,
    "times a balance of the rows": lambda b: b.each().mean() * (1 + b.logits().flatten(0, 1).mean(0).square().sum()),
    "over a balance of the rows": lambda b: b.rows().mean() / (1 + b.pooled().mean(0).square().sum()),
    "ratio of two": lambda b: b.each().sum() / b.rows().sum(),
    "contrast": lambda b: F.cross_entropy(b.pooled() @ b.pooled().T, torch.arange(b.n)),
    "norm": lambda b: b.logits().norm(),
}


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (7, 3)])
@pytest.mark.parametrize("end", COUPLED)
def test_a_total_that_couples_examples_is_not_reported(end: str, batch: Batch) -> None:
    """Nothing is covered, the step is the plain one, and something is said."""
    COUPLED[end](batch).backward()
    plain = gradients(batch.model)
    batch.model.zero_grad()
    batch.kept.clear()
    probe = zerosum.Probe(batch.model)
    with pytest.warns(UserWarning, match="examples"), probe:
        COUPLED[end](batch).backward()
    assert_gradients(gradients(batch.model), plain, 1e-9)
    assert not probe.report().coverage.covered
    assert all(probe.report().coverage.not_covered.values())


UNKNOWN: dict[str, Loss] = {
    "squares": lambda b: b.logits().square().mean(),
    "squares, sum": lambda b: b.logits().square().sum(),
    "differences": lambda b: (b.pooled() - b.vectors).pow(2).mean(),
    "differences of all": lambda b: (b.pooled() - b.vectors).abs().sum() / 5,
    "log-probabilities": lambda b: -(b.pooled().log_softmax(-1) * b.vectors.softmax(-1)).sum(),
}


@sizes
@pytest.mark.parametrize("end", UNKNOWN)
def test_totals_of_elements_without_a_known_function(end: str, batch: Batch) -> None:
    """By default the examples' losses up to one factor, or nothing; with a reduction that is said, exactly."""

    def own(b: Batch) -> Tensor:
        return torch.stack([UNKNOWN[end](alone(b, i)) for i in range(b.n)])

    for options in ({}, {"loss_reduction": "mean" if "mean" in end or end in ("squares", "differences") else "sum"}):
        batch.kept.clear()
        truth = truth_of(batch.model, lambda: own(batch))
        batch.model.zero_grad()
        probe = zerosum.Probe(batch.model, gram=True, **options)  # type: ignore[arg-type]
        with quiet(), probe:
            UNKNOWN[end](batch).backward()
        report = probe.report()
        if options:
            assert {name for name, g in truth.items() if g.any()} <= set(report)
        if not len(report):
            continue
        assert report.num_examples == batch.n
        name = max(report, key=lambda name: truth[name].norm().item())
        factor = (report[name].sq_norm.sum() / truth[name].flatten(1).square().sum()).sqrt().item()
        assert_one_truth(report, truth, None, (1.0,) if options else (factor,), rtol=1e-9)


def alone(b: Batch, i: int) -> Batch:
    """One example as a batch, with its own data."""
    one = Batch(b.model, b.tokens[i : i + 1], b.ignored)
    one.targets, one.valid, one.classes = b.targets[i : i + 1], b.valid[i : i + 1], b.classes[i : i + 1]
    one.vectors, one.weights = b.vectors[i : i + 1], b.weights[i : i + 1]
    return one
