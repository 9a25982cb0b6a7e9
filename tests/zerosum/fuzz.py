"""Random models with random losses, each held to one backward pass for each example.

    python -m tests.zerosum.fuzz --count 2000 --seed 0 --jobs 2

composes models of the blocks in :mod:`tests.zerosum.fuzz_blocks`, at sizes that coincide more often than not, with a random way in
and a random loss, in one batch or in micro-batches. Of each it asks:

1. The step runs without a probe, so it must run with one: else "crash". Losses and random numbers are the same: else "changed".
2. Every number of every covered parameter is the truth: else "wrong".
3. Which share of the parameters is covered, but for those below a place where examples meet.

``--show SEED`` prints one model and its outcome. A failure is made smaller by leaving out blocks as long as it stays a failure.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import random
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum
import zsl_kernels as zk
from tests.inputs import sums_of
from tests.zerosum.fuzz_blocks import BLOCKS, MIXING, OF_THE_BATCH, RESHAPING, WRAPPERS, Block, Draw
from tests.zerosum.oracle import PASSES, direction_for, gradients, trainable
from tests.zerosum.steps import SEED, quiet

RTOL = 1e-8
LEAST = 1e-6  # what a model whose numbers are of order one cannot tell from rounding, times RTOL
CLASSES = 5
VOCAB = 11
Data = dict[str, Tensor]


# Ways in: (N, …) of some kind to (N, T, W).


def tokens_of(n: int, t: int) -> Tensor:
    return torch.randint(VOCAB, (n, t))


def floats_of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@dataclass(frozen=True)
class Entry:
    """The inputs of N examples, which of their dimensions is the examples', and the module that takes them."""

    make: Callable[[int, int], Any]
    module: Callable[[Draw], nn.Module]
    dim: int = 0


def packed(m: Any, batch: dict[str, Tensor]) -> Tensor:
    """Rows (R, 3) of documents one after another, put where the examples' positions are."""
    kept = batch["kept"]
    rows = torch.tanh(m.l(batch["rows"][kept]))
    return torch.zeros(*kept.shape, rows.shape[-1], dtype=rows.dtype).masked_scatter(kept[..., None], rows)


def documents(n: int, t: int) -> dict[str, Tensor]:
    return {"rows": floats_of(n, t, 3), "kept": torch.arange(t) <= torch.randint(t, (n, 1))}


ENTRIES: dict[str, Entry] = {
    "tokens": Entry(tokens_of, lambda d: Block(lambda m, x: m.e(x), e=nn.Embedding(VOCAB, d.w))),
    "tokens, indexed": Entry(tokens_of, lambda d: Block(lambda m, x: m.e[x], e=d.matrix(VOCAB, d.w))),
    "tokens, flat": Entry(tokens_of, lambda d: Block(lambda m, x: m.e(x.flatten()).view(*x.shape, -1), e=nn.Embedding(VOCAB, d.w))),
    "tokens, one-hot": Entry(tokens_of, lambda d: Block(lambda m, x: m.l(F.one_hot(x, VOCAB).double()), l=d.linear(i=VOCAB))),
    "floats": Entry(lambda n, t: floats_of(n, t, 3), lambda d: Block(lambda m, x: torch.tanh(m.l(x)), l=d.linear(i=3))),
    "standardized floats": Entry(
        lambda n, t: floats_of(n, t, 3),
        lambda d: Block(lambda m, x: torch.tanh(m.l((x - x.mean((0, 1))) / (1 + x.std((0, 1), correction=0)))), l=d.linear(i=3)),
    ),
    "tokens and floats": Entry(
        lambda n, t: (tokens_of(n, t), floats_of(n, t, 3)),
        lambda d: Block(lambda m, x: m.e(x[0]) + torch.tanh(m.l(x[1])), e=nn.Embedding(VOCAB, d.w), l=d.linear(i=3)),
    ),
    "a dictionary": Entry(
        lambda n, t: {"context": floats_of(n, 3), "tokens": tokens_of(n, t)},
        lambda d: Block(lambda m, x: m.e(x["tokens"]) + m.l(x["context"])[:, None], e=nn.Embedding(VOCAB, d.w), l=d.linear(i=3)),
    ),
    "a list of positions": Entry(
        lambda n, t: [floats_of(n, 3) for _ in range(t)],
        lambda d: Block(lambda m, x: torch.tanh(m.l(torch.stack(x, 1))), l=d.linear(i=3)),
    ),
    "a list of positions, each by itself": Entry(
        lambda n, t: [floats_of(n, 3) for _ in range(t)],
        lambda d: Block(lambda m, x: torch.stack([torch.tanh(m.l(row)) for row in x], 1), l=d.linear(i=3)),
    ),
    "columns": Entry(
        lambda n, t: [floats_of(n) for _ in range(t)],
        lambda d: Block(lambda m, x: torch.tanh(m.l(torch.stack(x, 1).unsqueeze(-1))), l=d.linear(i=1)),
    ),
    "sequence first": Entry(
        lambda n, t: floats_of(t, n, 3), lambda d: Block(lambda m, x: torch.tanh(m.l(x)).transpose(0, 1), l=d.linear(i=3)), dim=1
    ),
    "channels first": Entry(
        lambda n, t: floats_of(n, 3, t), lambda d: Block(lambda m, x: m.c(x).mT, c=nn.Conv1d(3, d.w, 3, padding=1))
    ),
    "images": Entry(
        lambda n, t: floats_of(n, 2, t, 3),
        lambda d: Block(lambda m, x: torch.tanh(m.c(x)).mean(-1).mT, c=nn.Conv2d(2, d.w, 3, padding=1)),
    ),
    "documents": Entry(documents, lambda d: Block(packed, l=d.linear(i=3))),
}


def cut(inputs: Any, part: slice, dim: int) -> Any:
    """Some examples' inputs."""
    if isinstance(inputs, Tensor):
        return inputs[(slice(None),) * dim + (part,)]
    if isinstance(inputs, dict):
        return {key: cut(x, part, dim) for key, x in inputs.items()}
    return type(inputs)(cut(x, part, dim) for x in inputs)


# Models.


class Wrapped(nn.Module):
    """A block whose rows go another way."""

    def __init__(self, way: str, inner: nn.Module) -> None:
        super().__init__()
        self.way, self.inner = WRAPPERS[way], inner

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.inner, x)


class Meeting(nn.Module):
    """A place where examples meet. ``grads`` collects the gradients of its input, once it is a list."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.grads = MIXING[how], None

    def forward(self, x: Tensor) -> Tensor:
        if self.grads is not None and x.requires_grad:
            x.register_hook(self.grads.append)
        return self.how(x)


class Composed(nn.Module):
    """A way in, blocks with a tanh behind some of them, and a head from W to the classes for the loss to use."""

    def __init__(self, entry: nn.Module, blocks: list[nn.Module], squashed: list[bool], head: nn.Module) -> None:
        super().__init__()
        self.entry, self.blocks, self.squashed, self.head = entry, nn.ModuleList(blocks), squashed, head

    def forward(self, inputs: Any) -> Tensor:
        x = self.entry(inputs)
        for block, squashed in zip(self.blocks, self.squashed, strict=True):
            x = block(x)
            if squashed:
                x = torch.tanh(x)
        return x


# Losses: what is differentiated, and the examples' own.


@dataclass(frozen=True)
class End:
    """``total`` of a model, its hidden states (N, T', W) and data is differentiated; ``own`` (N,) are the examples' losses.

    ``adds``: over micro-batches too, whatever their sizes. ``options`` are the probe's.
    """

    total: Callable[[Composed, Tensor, Data], Tensor]
    own: Callable[[Composed, Tensor, Data], Tensor]
    adds: bool = False
    options: Callable[[Data], dict[str, Any]] = lambda data: {}


def make_data(n: int, t: int) -> Data:
    """Data of all kinds for N outputs of T' positions. Each example has a target."""
    targets = torch.randint(CLASSES, (n, t)).masked_fill(torch.rand(n, t) < 0.3, -100)
    targets[:, 0] = torch.randint(CLASSES, (n,))
    return {
        "targets": targets,
        "labels": torch.randint(CLASSES, (n,)),
        "vectors": torch.randn(n, CLASSES, dtype=torch.float64),
        "tensors": torch.randn(n, t, CLASSES, dtype=torch.float64),
        "weights": torch.rand(n, dtype=torch.float64) + 0.5,
        "signs": torch.randn(n, dtype=torch.float64),
        "positions": torch.randint(t, (n,)),
    }


def squares(m: Composed, h: Tensor, d: Data) -> Tensor:
    return m.head(h).square().flatten(1).mean(1)


def pooled(m: Composed, h: Tensor) -> Tensor:
    return m.head(h.mean(1))


def classes(m: Composed, h: Tensor, d: Data) -> Tensor:
    return F.cross_entropy(pooled(m, h), d["labels"], reduction="none")


def token_losses(m: Composed, h: Tensor, d: Data, **options: Any) -> Tensor:
    """(N, T')."""
    return F.cross_entropy(m.head(h).mT, d["targets"], reduction="none", **options)


def token_sums(m: Composed, h: Tensor, d: Data) -> Tensor:
    return token_losses(m, h, d).sum(1)


def valid(d: Data) -> Tensor:
    return (d["targets"] != -100).sum()


def of_average_weight(m: Composed, h: Tensor, d: Data) -> Tensor:
    return token_sums(m, h, d) * len(h) / valid(d)


def smooth_of_average_weight(m: Composed, h: Tensor, d: Data) -> Tensor:
    return token_losses(m, h, d, label_smoothing=0.2).sum(1) * len(h) / valid(d)


def flat(m: Composed, h: Tensor, d: Data) -> tuple[Tensor, Tensor]:
    return m.head(h).flatten(0, 1), d["targets"].flatten()


def at_a_position(m: Composed, h: Tensor, d: Data) -> Tensor:
    return m.head(h)[torch.arange(len(h)), d["positions"]]


def log_probabilities(m: Composed, h: Tensor, d: Data) -> Tensor:
    return at_a_position(m, h, d).log_softmax(-1)[torch.arange(len(h)), d["labels"]]


def clipped(m: Composed, h: Tensor, d: Data) -> Tensor:
    ratio = (log_probabilities(m, h, d) + 1.6).exp()
    return -torch.min(ratio * d["signs"], ratio.clamp(0.8, 1.2) * d["signs"])


def by_hand(m: Composed, h: Tensor, d: Data) -> Tensor:
    logits = m.head(h)
    picked = logits.gather(-1, d["targets"].clamp(min=0)[..., None]).squeeze(-1)
    return (logits.logsumexp(-1) - picked) * (d["targets"] != -100)


def margins(m: Composed, h: Tensor, d: Data) -> Tensor:
    return F.relu(1 - pooled(m, h) * d["vectors"].sign()).sum(1)


def head_losses(m: Composed, h: Tensor, d: Data) -> Tensor:
    """(N, T') by the library's head. Its biases, if it has any, are not used."""
    return zk.linear_cross_entropy(h.contiguous(), m.head.weight, d["targets"])


def head_sums(m: Composed, h: Tensor, d: Data) -> Tensor:
    return F.cross_entropy((h @ m.head.weight.T).mT, d["targets"], reduction="none").sum(1)


def elements(function: Callable[..., Tensor], reduction: str) -> End:
    return End(
        lambda m, h, d: function(m.head(h), d["tensors"], reduction=reduction),
        lambda m, h, d: function(m.head(h), d["tensors"], reduction="none").flatten(1).mean(1),
    )


def sum_of(own: Callable[[Composed, Tensor, Data], Tensor], **options: Any) -> End:
    return End(lambda m, h, d: own(m, h, d).sum(), own, adds=True, options=lambda d: options)


ENDS: dict[str, End] = {
    "squares, sum": sum_of(squares),
    "squares, mean": End(lambda m, h, d: squares(m, h, d).mean(), squares),
    "squares, sum over a number": End(lambda m, h, d: squares(m, h, d).sum() / 4, squares, adds=True),
    "squares, added by Python": End(lambda m, h, d: sum(squares(m, h, d)), squares, adds=True),
    "squares, by a product": End(lambda m, h, d: squares(m, h, d) @ torch.ones_like(d["weights"]), squares, adds=True),
    "squares, weighted": End(
        lambda m, h, d: squares(m, h, d) @ d["weights"], lambda m, h, d: squares(m, h, d) * d["weights"] / d["weights"].mean()
    ),
    "squares of all, explicit mean": End(
        lambda m, h, d: m.head(h).square().mean(), squares, options=lambda d: {"loss_reduction": "mean"}
    ),
    "squares of all, explicit sum": End(
        lambda m, h, d: m.head(h).square().sum(),
        lambda m, h, d: m.head(h).square().flatten(1).sum(1),
        adds=True,
        options=lambda d: {"loss_reduction": "sum"},
    ),
    "squares, explicit denominators": End(
        lambda m, h, d: (squares(m, h, d) / d["weights"]).sum(),
        squares,
        adds=True,
        options=lambda d: {"loss_reduction": d["weights"]},
    ),
    "classes, sum": sum_of(classes),
    "classes, mean": End(lambda m, h, d: F.cross_entropy(pooled(m, h), d["labels"]), classes),
    "classes, mean over a number": End(lambda m, h, d: F.cross_entropy(pooled(m, h), d["labels"]) / 8, classes),
    "classes at a position": sum_of(lambda m, h, d: F.cross_entropy(at_a_position(m, h, d), d["labels"], reduction="none")),
    "classes at a position, mean": End(
        lambda m, h, d: F.cross_entropy(at_a_position(m, h, d), d["labels"]),
        lambda m, h, d: F.cross_entropy(at_a_position(m, h, d), d["labels"], reduction="none"),
    ),
    "advantages, explicit sum": sum_of(lambda m, h, d: -log_probabilities(m, h, d) * d["signs"], loss_reduction="sum"),
    "clipped, explicit sum": sum_of(clipped, loss_reduction="sum"),
    "margins": sum_of(margins),
    "cosines": sum_of(lambda m, h, d: 1 - F.cosine_similarity(pooled(m, h), d["vectors"])),
    "tokens, (N,)": sum_of(token_sums),
    "tokens, (N,), mean": End(lambda m, h, d: token_sums(m, h, d).mean(), token_sums),
    "tokens, (N, T)": End(lambda m, h, d: token_losses(m, h, d).sum(), of_average_weight),
    "tokens by hand, (N, T)": End(lambda m, h, d: by_hand(m, h, d).sum() / valid(d), of_average_weight),
    "tokens, flat mean": End(lambda m, h, d: F.cross_entropy(*flat(m, h, d)), of_average_weight),
    "tokens, flat sum": End(lambda m, h, d: F.cross_entropy(*flat(m, h, d), reduction="sum"), of_average_weight),
    "tokens, mean": End(lambda m, h, d: F.cross_entropy(m.head(h).mT, d["targets"]), of_average_weight),
    "tokens, likelihood": End(lambda m, h, d: F.nll_loss(flat(m, h, d)[0].log_softmax(-1), flat(m, h, d)[1]), of_average_weight),
    "tokens, smoothed": End(lambda m, h, d: F.cross_entropy(*flat(m, h, d), label_smoothing=0.2), smooth_of_average_weight),
    "tokens, selected": End(lambda m, h, d: token_losses(m, h, d)[d["targets"] != -100].mean(), of_average_weight),
    "tokens, explicit number": End(
        lambda m, h, d: F.cross_entropy(*flat(m, h, d)), token_sums, options=lambda d: {"loss_reduction": float(valid(d))}
    ),
    "tokens and classes": End(
        lambda m, h, d: 0.7 * F.cross_entropy(*flat(m, h, d)) + 0.3 * F.cross_entropy(pooled(m, h), d["labels"]),
        lambda m, h, d: 0.7 * of_average_weight(m, h, d) + 0.3 * classes(m, h, d),
    ),
    "head of the library, (N,)": End(lambda m, h, d: head_losses(m, h, d).sum(1).sum(), head_sums, adds=True),
    "head of the library, mean": End(
        lambda m, h, d: head_losses(m, h, d).sum() / valid(d), lambda m, h, d: head_sums(m, h, d) * len(h) / valid(d)
    ),
    "mse, mean": elements(F.mse_loss, "mean"),
    "mse, sum": elements(F.mse_loss, "sum"),
    "huber, mean": elements(F.huber_loss, "mean"),
    "smooth l1, sum": elements(F.smooth_l1_loss, "sum"),
    "binary, mean": End(
        lambda m, h, d: F.binary_cross_entropy_with_logits(pooled(m, h), (d["vectors"] > 0).double()),
        lambda m, h, d: F.binary_cross_entropy_with_logits(pooled(m, h), (d["vectors"] > 0).double(), reduction="none").mean(1),
    ),
    "example by example": End(lambda m, h, d: torch.stack([m.head(row).square().mean() for row in h]).sum(), squares, adds=True),
}


# Cases.


@dataclass(frozen=True)
class Step:
    """One block of a plan. ``index`` is what its numbers are drawn from, and stays when others are left out."""

    index: int
    block: str
    way: str = ""
    squashed: bool = False

    def __str__(self) -> str:
        return self.block + (f" {self.way}" if self.way else "")


@dataclass(frozen=True)
class Plan:
    """All of a case but its numbers."""

    seed: int
    n: int
    t: int
    w: int
    entry: str
    steps: tuple[Step, ...]
    end: str
    tied: bool
    sizes: tuple[int, ...]  # of the micro-batches
    gram: bool = True

    def __str__(self) -> str:
        steps = ", ".join(map(str, self.steps)) or "no block"
        batches = "" if len(self.sizes) == 1 else f", micro-batches {self.sizes}"
        tied = ", tied" if self.tied else ""
        return f"N {self.n}, T {self.t}, W {self.w}: {self.entry} | {steps} | {self.end}{tied}{batches}"

    @property
    def options(self) -> dict[str, Any]:
        """What the probe must be told: N, where positions come first and no losses (N,) say what it is, or examples meet."""
        told = ENTRIES[self.entry].dim == 1 and (self.n == 1 or self.mixes or not ENDS[self.end].adds or "of all" in self.end)
        return {"num_examples": self.n} if told else {}

    @property
    def mixes(self) -> bool:
        return any(step.block in MIXING_NAMES for step in self.steps)


MIXING_NAMES = {f"examples meet: {name}": name for name in MIXING}


def draw_sizes(r: random.Random) -> tuple[int, int, int]:
    """(N, T, W); two or all of them coincide more often than not."""
    w = r.choice([4, 4, 6, 8, 12])
    n, t = r.choice([2, 3, 4, 5, 6]), r.choice([2, 3, 4, 5, 7])
    kind = r.random()
    if kind < 0.2:
        t = n
    elif kind < 0.3:
        n = t = w = r.choice([4, 6])
    elif kind < 0.4:
        n = w
    elif kind < 0.5:
        t = w
    elif kind < 0.6:
        n = 1
    elif kind < 0.7:
        t = 1
    elif kind < 0.75:
        n = 2  # the heads
    return n, t, w


def draw_plan(seed: int, only: str | None = None) -> Plan:
    r = random.Random(seed)
    n, t, w = draw_sizes(r)
    steps = []
    for index in range(r.choice([1, 2, 2, 3, 3, 4])):
        kind, squashed = r.random(), r.random() < 0.5
        if kind < 0.05:
            step = Step(index, r.choice(sorted(MIXING_NAMES)), squashed=squashed)
        elif kind < 0.17:
            step = Step(index, r.choice(sorted(RESHAPING)), squashed=squashed)
        elif kind < 0.45:
            step = Step(index, r.choice(sorted(BLOCKS)), r.choice(sorted(WRAPPERS)), squashed)
            if step.block == "moving average":  # a checkpoint moves it again, for the plain step too
                step = replace(step, way="")
        else:
            step = Step(index, r.choice(sorted(BLOCKS)), squashed=squashed)
        steps.append(step)
    if only is not None:
        at = r.randrange(len(steps))
        way = only if only in WRAPPERS else steps[at].way if only in BLOCKS and only != "moving average" else ""
        block = only if only in {*BLOCKS, *RESHAPING, *MIXING_NAMES} else r.choice(sorted({*BLOCKS} - {"moving average"}))
        steps[at] = replace(steps[at], block=block, way=way)
    entry, end = r.choice(sorted(ENTRIES)), r.choice(sorted(ENDS))
    if only in ENTRIES:
        entry = only
    if only in ENDS:
        end = only
    if entry == "sequence first" and n > 1:
        t = t + n  # where N = T (or N of a micro-batch is), nothing but the first dimension says which are the examples
    sizes = (n,)
    if r.random() < 0.3 and n > 1 and ENDS[end].adds:
        first = r.randrange(1, n)
        # (One example whose positions come first looks like as many examples as it has positions.)
        sizes = (first, n - first) if ENTRIES[entry].dim == 0 or 1 < first < n - 1 else sizes
    plan = Plan(seed, n, t, w, entry, tuple(steps), end, tied=r.random() < 0.2, sizes=sizes)
    return replace(plan, sizes=(n,)) if plan.options else plan


class Case:
    """A plan with its numbers: the model, the inputs and the data of each micro-batch."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.end, entry = plan, ENDS[plan.end], ENTRIES[plan.entry]
        d = Draw(random.Random(plan.seed), plan.n, plan.t, plan.w)
        self.seed(0)
        way_in, inputs = entry.module(d), entry.make(plan.n, plan.t)
        head = nn.Linear(plan.w, CLASSES)
        if plan.tied and plan.entry == "tokens":
            head = nn.Linear(plan.w, VOCAB, bias=False)
            head.weight = way_in.e.weight
        if "head of the library" in plan.end:
            head.bias = None
        blocks = [self.make(step, d) for step in plan.steps]
        self.model = Composed(way_in, blocks, [step.squashed for step in plan.steps], head).double().train()
        self.state = copy.deepcopy(self.model.state_dict())
        self.seed(1)
        with torch.no_grad():
            shape = self.model(inputs).shape
        data = make_data(plan.n, shape[1])
        if head.out_features != CLASSES:  # vectors of the size of the output
            data |= {"vectors": floats_of(plan.n, VOCAB), "tensors": floats_of(plan.n, shape[1], VOCAB)}
        self.data, bounds = data, [sum(plan.sizes[:k]) for k in range(len(plan.sizes) + 1)]
        self.parts = [
            (cut(inputs, slice(a, b), entry.dim), {key: x[a:b] for key, x in data.items()}) for a, b in itertools.pairwise(bounds)
        ]
        self.reset()

    def seed(self, k: int) -> None:
        torch.manual_seed(self.plan.seed * 1000 + k)

    def make(self, step: Step, d: Draw) -> nn.Module:
        self.seed(10 + step.index)
        own = replace(d, r=random.Random(self.plan.seed * 1000 + step.index))
        if step.block in MIXING_NAMES:
            return Meeting(MIXING_NAMES[step.block])
        block = (BLOCKS[step.block] if step.block in BLOCKS else RESHAPING[step.block])(own)
        return Wrapped(step.way, block) if step.way else block

    def reset(self) -> None:
        self.model.load_state_dict(self.state)
        self.model.zero_grad()
        torch.manual_seed(SEED)

    def step(self) -> list[Tensor]:
        """The training step: hidden states and totals, to compare."""
        found = []
        for inputs, data in self.parts:
            h = self.model(inputs)
            total = self.end.total(self.model, h, data)
            total.backward()
            found += [h.detach().clone(), total.detach().clone()]
        return found

    def truth(self) -> dict[str, Tensor]:
        """One backward pass for each example's own loss, (N, *parameter.shape)."""
        self.reset()
        rows: dict[str, list[Tensor]] = {name: [] for name in trainable(self.model)}
        self.meet = set[int]()
        meetings = [(k, block) for k, block in enumerate(self.model.blocks) if isinstance(block, Meeting)]
        for inputs, data in self.parts:
            for _, block in meetings:
                block.grads = []
            losses = self.end.own(self.model, self.model(inputs), data)
            for i, loss in enumerate(losses):
                self.model.zero_grad()
                for _, block in meetings:
                    block.grads.clear()
                loss.backward(retain_graph=True)
                for k, block in meetings:
                    self.meet |= {k} if reaches_others(block.grads, i) else set()
                for name, parts in rows.items():
                    p = self.model.get_parameter(name)
                    parts.append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
            for _, block in meetings:
                block.grads = None
        return {name: torch.stack(parts) for name, parts in rows.items()}

    def below(self) -> set[str]:
        """The parameters that are used below a place where examples do meet."""
        if not self.meet:
            return set()
        under = [self.model.entry, *list(self.model.blocks)[: max(self.meet)]]
        used = {p for module in under for p in module.parameters()}
        return {name for name, p in self.model.named_parameters() if p in used}


def reaches_others(grads: list[Tensor], i: int) -> bool:
    """Whether the gradient of example i's loss at a meeting's input is not i's alone."""
    for g in grads:
        others = torch.cat([g[:i], g[i + 1 :]])
        if others.numel() and others.norm() > 1e-9 * g.norm():
            return True
    return False


# Outcomes.


@dataclass
class Outcome:
    """``kind``: "right", "wrong", "crash", "changed"; or "invalid" where the case does not work without a probe."""

    plan: Plan
    kind: str
    detail: str = ""
    covered: int = 0
    reached: int = 0  # parameters that some loss depends on
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> bool:
        return self.kind != "right"


def examine(plan: Plan) -> Outcome:
    """Runs the case of a plan without a probe and with one."""
    with quiet():
        return compared(plan)


def compared(plan: Plan) -> Outcome:
    try:
        case = Case(plan)
        truth = case.truth()
        case.reset()
        plain, state = case.step(), torch.get_rng_state()
        expected = gradients(case.model)
        if not all(x.isfinite().all() for x in [*plain, *expected.values(), *truth.values()]):
            return Outcome(plan, "invalid", "not finite")
        if (message := inconsistent(truth, expected, case)) is not None:
            return Outcome(plan, "invalid", message)
    except Exception:
        return Outcome(plan, "invalid", traceback.format_exc(limit=-3))
    below = case.below()
    case.reset()
    direction = direction_for(case.model)
    probe = zerosum.Probe(case.model, direction=direction, gram=plan.gram, **plan.options, **case.end.options(case.data))
    for _ in range(PASSES):
        outcome = measured(plan, case, probe, truth, expected, plain, state, direction, below)
        if outcome.failed:
            break
    return outcome


def measured(
    plan: Plan,
    case: Case,
    probe: zerosum.Probe,
    truth: dict[str, Tensor],
    expected: dict[str, Tensor],
    plain: list[Tensor],
    state: Tensor,
    direction: dict[str, Tensor],
    below: set[str],
) -> Outcome:
    """One pass of the probe over the case, whose gradients, results and random state without a probe are given."""
    outcome = Outcome(plan, "right")
    case.reset()
    try:
        with probe:
            found = case.step()
        report = probe.report()
    except Exception:
        return replace(outcome, kind="crash", detail=traceback.format_exc(limit=-4))
    if not torch.equal(torch.get_rng_state(), state):
        return replace(outcome, kind="changed", detail="random numbers were drawn")
    for a, b in zip(found, plain, strict=True):
        if not torch.equal(a, b):
            return replace(outcome, kind="changed", detail=f"losses or states differ by {(a - b).abs().max():.1e}")
    largest = max(LEAST, *(g.norm().item() for g in expected.values()))
    for name, g in gradients(case.model).items():
        if name not in expected or (g - expected[name]).norm().item() > RTOL * largest:
            return replace(outcome, kind="changed", detail=f"the gradient of {name}")
    reached = {name for name, g in truth.items() if g.any()}
    outcome.reached, outcome.covered = len(reached - below), len(reached & set(report) - below)
    for name in reached - below:
        if name not in report:
            outcome.reasons[general(report.coverage.not_covered[name])] += 1
    if len(report) and report.num_examples != plan.n:
        return replace(outcome, kind="wrong", detail=f"{report.num_examples} examples, not {plan.n}")
    if errors := list(differences(report, truth, direction, plan.sizes)):
        where = "below a place where examples meet: " if below & set(report) else ""
        return replace(outcome, kind="wrong", detail=where + ", ".join(errors[:6]))
    return outcome


def inconsistent(truth: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> str | None:
    """The step's gradient is that of the sum of the examples' losses up to one factor, and each of them is its own."""
    if case.plan.end == "squares, explicit denominators":
        d = case.data["weights"]
        truth = {name: g / d.view(-1, *[1] * (g.ndim - 1)) for name, g in truth.items()}
    total = torch.cat([truth[name].sum(0).flatten() for name in expected])
    step = torch.cat([g.flatten() for g in expected.values()])
    cosine = F.cosine_similarity(total, step, dim=0).item()
    return None if cosine > 1 - 1e-9 or total.norm() < 1e-9 else f"the truth is not that of the step: cosine {cosine}"


def apart(plan: Plan) -> float | None:
    """How far each example alone is from its part of the truth, by the angle; None for cases that need the others."""
    names = {step.block for step in plan.steps}
    if plan.mixes or names & OF_THE_BATCH or plan.entry == "standardized floats" or plan.end == "tokens and classes":
        return None
    case = Case(plan)
    truth = case.truth()
    worst, i = 0.0, 0
    dim = ENTRIES[plan.entry].dim
    for (inputs, data), size in zip(case.parts, plan.sizes, strict=True):
        for k in range(size):
            case.reset()
            one = {key: x[k : k + 1] for key, x in data.items()}
            case.end.own(case.model, case.model(cut(inputs, slice(k, k + 1), dim)), one).sum().backward()
            g = gradients(case.model)
            alone = torch.cat([g.get(name, torch.zeros_like(rows[i])).flatten() for name, rows in truth.items()])
            among = torch.cat([rows[i].flatten() for rows in truth.values()])
            if among.norm() > 1e-9:
                worst = max(worst, (alone / alone.norm() - among / among.norm()).norm().item())
            i += 1
    return worst


def differences(
    report: zerosum.Report, truth: dict[str, Tensor], direction: dict[str, Tensor], sizes: tuple[int, ...]
) -> Iterator[str]:
    """The fields that are not the truth. Errors are relative to the field, or where that vanishes to its largest."""
    known = torch.block_diag(*[torch.ones(size, size) for size in sizes]).bool()
    expected = {name: sums_of(truth[name], direction[name]) for name in report}
    largest: dict[str, float] = {}
    for fields in expected.values():
        for key, value in fields.items():
            largest[key] = max(largest.get(key, LEAST), value.norm().item())
    for name, fields in expected.items():
        for key, value in fields.items():
            found = getattr(report[name], key)
            if key == "gram":
                if len(sizes) > 1 and not found[~known].isnan().all():
                    yield f"{name}.gram of two micro-batches"
                value, found = value[known], found[known]
            if found.shape != value.shape:
                yield f"{name}.{key}: {tuple(found.shape)}"
                continue
            scale = max(value.norm().item(), 1e-6 * largest[key], LEAST)
            error = (found - value).norm().item()
            if not error <= RTOL * scale:
                yield f"{name}.{key} by {error / scale if scale else float('inf'):.1e}"


def general(reason: str) -> str:
    """A reason without its numbers."""
    return re.sub(r"\d+", "#", reason)[:110]


def smaller(outcome: Outcome) -> Outcome:
    """Blocks and ways are left out as long as the outcome stays of its kind."""
    while True:
        plan = outcome.plan
        tries = [replace(plan, steps=plan.steps[:k] + plan.steps[k + 1 :]) for k in range(len(plan.steps))]
        tries += [
            replace(plan, steps=(*plan.steps[:k], replace(step, way=""), *plan.steps[k + 1 :]))
            for k, step in enumerate(plan.steps)
            if step.way
        ]
        tries += [replace(plan, sizes=(plan.n,))] if len(plan.sizes) > 1 else []
        tries += [replace(plan, entry="floats")] if plan.entry != "floats" else []
        tries += [replace(plan, end="squares, sum")] if plan.end != "squares, sum" else []
        tries += [replace(plan, tied=False)] if plan.tied else []
        for attempt in tries:
            other = examine(attempt)
            if other.kind == outcome.kind:
                outcome = other
                break
        else:
            return outcome


def outcome_of(seed: int, only: str | None = None, shrink: bool = False) -> tuple[Outcome, Outcome]:
    """An outcome, and if it is a failure the smallest one like it."""
    torch.set_num_threads(1)
    outcome = examine(draw_plan(seed, only))
    return outcome, smaller(outcome) if shrink and outcome.failed and outcome.kind != "invalid" else outcome


def angle_of(seed: int, only: str | None = None) -> tuple[Plan, float | None]:
    torch.set_num_threads(1)
    plan = draw_plan(seed, only)
    with quiet():
        return plan, apart(plan)


def mapped(jobs: int, f: Callable[[int], Any], seeds: range) -> Iterator[Any]:
    if jobs == 1:
        yield from map(f, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(f, seeds, chunksize=4)


@dataclass
class Summary:
    """What many outcomes come to."""

    kinds: Counter[str] = field(default_factory=Counter)
    covered: int = 0
    reached: int = 0
    whole: int = 0  # models of which all is covered
    right: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    blamed: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.kinds[outcome.kind] += 1
        self.reasons += outcome.reasons
        if outcome.kind == "right":
            self.covered += outcome.covered
            self.reached += outcome.reached
            self.right += 1
            self.whole += outcome.covered == outcome.reached

    @property
    def share(self) -> float:
        return self.covered / self.reached if self.reached else float("nan")

    def __str__(self) -> str:
        failures = ", ".join(f"{self.kinds[kind]} {kind}" for kind in ("wrong", "crash", "changed", "invalid"))
        lines = [
            f"{sum(self.kinds.values())} models: {failures}; {self.share:.2%} of the parameters for which examples are kept "
            f"apart are covered, all of them in {self.whole} of {self.right} models without a failure"
        ]
        lines += [f"{count:7} parameters refused: {reason}" for reason, count in self.reasons.most_common(15)]
        if self.blamed:
            lines += ["smallest failures have:"]
            lines += [f"{count:7} {name}" for name, count in self.blamed.most_common(25)]
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many models (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--only", help="a block, wrapper, way in or loss that every model has")
    parser.add_argument("--whole", action="store_true", help="leave failures as they are, do not make them smaller")
    parser.add_argument("--alone", action="store_true", help="check the truth against each example alone, without a probe")
    parser.add_argument("--show", type=int, metavar="SEED", help="print one model and its outcome")
    args = parser.parse_args()
    if args.show is not None:
        outcome = examine(draw_plan(args.show, args.only))
        print(Case(outcome.plan).model, outcome.plan, f"{outcome.kind}: {outcome.detail}", *outcome.reasons.items(), sep="\n")
        return int(outcome.failed)
    seeds = range(args.seed, args.seed + args.count)
    if args.alone:
        return compare_alone(args.jobs, seeds, args.only)
    summary = Summary()
    for outcome, shown in mapped(args.jobs, functools.partial(outcome_of, only=args.only, shrink=not args.whole), seeds):
        summary.add(outcome)
        if outcome.failed:
            summary.blamed.update({str(step) for step in shown.plan.steps} or {shown.plan.entry, shown.plan.end})
            detail = "\n    ".join(shown.detail.strip().splitlines())
            print(f"seed {outcome.plan.seed}: {outcome.kind}: {shown.plan}\n    {detail}", flush=True)
    print(summary)
    return int(any(summary.kinds[kind] for kind in ("wrong", "crash", "changed", "invalid")))


def compare_alone(jobs: int, seeds: range, only: str | None) -> int:
    checked, failed = 0, 0
    for plan, angle in mapped(jobs, functools.partial(angle_of, only=only), seeds):
        checked += angle is not None
        if angle is not None and angle > 1e-7:
            failed += 1
            print(f"seed {plan.seed}: {angle:.1e}: {plan}")
    print(f"{checked} models checked against each example alone, {failed} differ")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
