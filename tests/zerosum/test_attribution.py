"""Whose row is it? Rows that move, join and meet, at sizes that coincide, against one backward pass for each example.

Each kind runs at sizes where N is the number of positions, the width, the number of heads, experts or table rows, where N is one,
and where all sizes differ: what tells the examples apart by a size goes wrong at some of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zerosum
import zsl_kernels as zk
from tests.zerosum.models import parameter
from tests.zerosum.oracle import direction_for, gradients
from tests.zerosum.steps import assert_gradients, assert_one_truth, check, check_or_told, quiet, square_losses, truth_of

WIDTH = 4
# (N, T) at width 4: all different, all alike, N = T, N or T the width, one example, one position; and further ones.
SIZES = [(3, 5), (4, 4), (5, 5), (4, 6), (6, 4), (1, 5), (5, 1)]
sizes = pytest.mark.parametrize(("n", "t"), SIZES)
more_sizes = pytest.mark.parametrize(("n", "t"), [*SIZES, (2, 2), (1, 1), (1, 4)])

Middle = Callable[[Any, Tensor], Tensor]


class Around(nn.Module):
    """``first``, then a ``middle`` on (N, T, 4), then ``last``. The middle has two layers, a matrix and a vector to use."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 5)
        self.again, self.more = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.w, self.b = parameter(WIDTH, WIDTH), parameter(WIDTH)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self, torch.tanh(self.first(x)))))


def check_middle(middle: Middle, n: int, t: int, **options: Any) -> zerosum.Report:
    torch.manual_seed(0)
    model, x = Around(middle).double(), torch.randn(n, t, 3, dtype=torch.float64)
    return check(model, lambda: square_losses(model(x)), **options)


# Joins along a dimension that is not the examples'.

JOINS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "stack 1": lambda columns: torch.stack(columns, dim=1),
    "stack -1": lambda columns: torch.stack(columns, dim=-1),
    "stack 0, transposed": lambda columns: torch.stack(columns).T,
    "stack of slices": lambda columns: torch.stack([c[:, None] for c in columns], dim=-1).squeeze(1),
    "cat 1": lambda columns: torch.cat([c[:, None] for c in columns], dim=1),
    "cat -1": lambda columns: torch.cat([c[:, None] for c in columns], dim=-1),
    "cat 0, transposed": lambda columns: torch.cat([c[None] for c in columns]).T,
    "cat of all, reshaped": lambda columns: torch.cat(columns).view(len(columns), -1).T,
    "column_stack": torch.column_stack,
    "hstack": lambda columns: torch.hstack([c[:, None] for c in columns]),
    "vstack": lambda columns: torch.vstack(columns).T,
    "dstack": lambda columns: torch.dstack(columns)[0],
    "written into columns": lambda columns: written(columns),
    "padded and added": lambda columns: sum(
        (F.pad(c[:, None], (k, len(columns) - 1 - k)) for k, c in enumerate(columns)), torch.zeros(())
    ),
}


def written(columns: list[Tensor]) -> Tensor:
    out = columns[0].new_zeros(len(columns[0]), len(columns))
    for k, c in enumerate(columns):
        out[:, k] = c
    return out


class Columns(nn.Module):
    """Numbers (N,) for each of the features, which are joined to a sequence: each feature is a token."""

    def __init__(self, join: Callable[[list[Tensor]], Tensor], learned: bool) -> None:
        super().__init__()
        self.join, self.learned = join, learned
        self.scale, self.token, self.last = parameter(1), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, *columns: Tensor) -> Tensor:
        joined = self.join([c * self.scale if self.learned else c for c in columns])
        return self.last(torch.tanh(self.token(joined.unsqueeze(-1))).mean(1))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("n", "t"), [(5, 2), (2, 2), (2, 5), (4, 4), (3, 4), (1, 3), (1, 1)])
@pytest.mark.parametrize("join", JOINS)
def test_columns_that_are_joined_to_sequences(join: str, n: int, t: int, learned: bool) -> None:
    torch.manual_seed(0)
    model = Columns(JOINS[join], learned).double()
    columns = [torch.randn(n, dtype=torch.float64) for _ in range(t)]
    check(model, lambda: square_losses(model(*columns)))


STACKS: dict[str, Middle] = {
    "pairs behind": lambda m, x: m.again(torch.stack([x, x.exp()], -2)).sum(-2),
    "pairs of features": lambda m, x: m.again(torch.stack([x[..., :2], x[..., 2:]], -1).flatten(-2)),
    "pairs before the positions": lambda m, x: m.again(torch.stack([x, x.exp()], 1)).mean(1),
    "pairs before the examples": lambda m, x: m.again(torch.stack([x, x.exp()])).mean(0),
    "as many as examples, in front": lambda m, x: m.again(torch.stack([x] * len(x))).mean(0),
    "as many as examples, behind": lambda m, x: m.again(torch.stack([x] * len(x), 1)).mean(1),
    "list of layers, mean": lambda m, x: torch.stack([m.again(x), m.more(x), x]).mean(0),
    "list of layers, weighted": lambda m, x: torch.einsum(
        "k,kntd->ntd", m.b.softmax(0)[:3], torch.stack([m.again(x), x, m.more(x)])
    ),
    "list of layers, the largest": lambda m, x: torch.stack([m.again(x), m.more(x)]).amax(0),
    "list of layers, cat and chunk": lambda m, x: sum(torch.cat([m.again(x), m.more(x)]).chunk(2), torch.zeros(())),
    "list of layers, behind the positions": lambda m, x: torch.cat([m.again(x), m.more(x)], 1).unflatten(1, (2, -1)).sum(1),
    "positions unbound and stacked": lambda m, x: m.again(torch.stack(x.unbind(1), 1)),
    "positions unbound, stacked in front": lambda m, x: m.again(torch.stack(x.unbind(1))).transpose(0, 1),
    "examples unbound and stacked behind": lambda m, x: m.again(torch.stack(x.unbind(0), 1)).transpose(0, 1),
    "features unbound and stacked": lambda m, x: m.again(torch.stack(x.unbind(2), 2)),
}


@more_sizes
@pytest.mark.parametrize("stack", STACKS)
def test_tensors_that_are_stacked(stack: str, n: int, t: int) -> None:
    check_middle(STACKS[stack], n, t)


# Operations by index along a dimension that is not the examples'.


def turned(size: int) -> Tensor:
    """An order that is not its own inverse from three on."""
    return torch.arange(size).roll(1)


def along(x: Tensor, order: Tensor) -> Tensor:
    """Ids of the shape of x for gather and scatter along dim 1."""
    return order.view(1, -1, 1).expand_as(x)


BY_INDEX: dict[str, Middle] = {
    "index_add": lambda m, x: torch.zeros_like(x).index_add(1, turned(x.shape[1]), x),
    "index_add, from behind": lambda m, x: torch.zeros_like(x).index_add(-2, turned(x.shape[1]), x),
    "index_add, flipped": lambda m, x: torch.zeros_like(x).index_add(1, torch.arange(x.shape[1]).flip(0), x),
    "index_add, all to one": lambda m, x: torch.zeros_like(x).index_add(1, torch.zeros(x.shape[1], dtype=torch.long), x),
    "index_add to itself": lambda m, x: x.index_add(1, turned(x.shape[1]), x, alpha=0.5),
    "index_add_": lambda m, x: torch.zeros_like(x).index_add_(1, turned(x.shape[1]), x),
    "index_add of features": lambda m, x: torch.zeros_like(x).index_add(2, turned(WIDTH), x),
    "index_add of features, from behind": lambda m, x: torch.zeros_like(x).index_add(-1, turned(WIDTH), x),
    "index_copy": lambda m, x: torch.zeros_like(x).index_copy(1, turned(x.shape[1]), x),
    "index_copy_": lambda m, x: torch.zeros_like(x).index_copy_(1, turned(x.shape[1]), x),
    "index_copy of features": lambda m, x: torch.zeros_like(x).index_copy(-1, turned(WIDTH), x),
    "index_select": lambda m, x: x.index_select(1, turned(x.shape[1])),
    "index_select of features": lambda m, x: x.index_select(-1, turned(WIDTH)),
    "index_fill": lambda m, x: x.index_fill(1, torch.tensor([0]), 0.5) + x.index_fill(2, torch.tensor([1]), 0.5),
    "index_reduce": lambda m, x: torch.ones_like(x).index_reduce(1, turned(x.shape[1]), x, "mean", include_self=False),
    "scatter": lambda m, x: torch.zeros_like(x).scatter(1, along(x, turned(x.shape[1])), x),
    "scatter_add": lambda m, x: torch.zeros_like(x).scatter_add(1, along(x, turned(x.shape[1])), x),
    "scatter_reduce": lambda m, x: torch.zeros_like(x).scatter_reduce(1, along(x, turned(x.shape[1])), x, "sum"),
    "gather": lambda m, x: x.gather(1, along(x, turned(x.shape[1]))),
    "gather by data": lambda m, x: x.gather(1, x.detach().argsort(1)),
    "take_along_dim": lambda m, x: x.take_along_dim(along(x, turned(x.shape[1])), 1),
    "positions by a list": lambda m, x: x[:, turned(x.shape[1]).tolist()],
    "positions written": lambda m, x: torch.zeros_like(x).index_put((torch.arange(len(x))[:, None], turned(x.shape[1])), x),
    "positions written by a slice": lambda m, x: sliced(x),
    "roll": lambda m, x: x.roll(1, 1) + x.roll(-1, -1),
    "flip": lambda m, x: x.flip(1) - x.flip(-1),
    "rolled features": lambda m, x: x.roll((1, 1), (1, 2)),
    "select_scatter": lambda m, x: x.select_scatter(x[:, -1], 1, 0),
    "slice_scatter": lambda m, x: x.slice_scatter(x[:, :1] * 2, 1, 0, 1),
    "masked_scatter": lambda m, x: torch.zeros_like(x).masked_scatter((x > 0).any(-1, keepdim=True), x),
    "sorted positions": lambda m, x: x.sort(1)[0],
    "largest positions": lambda m, x: x.topk(1, dim=1)[0].expand_as(x),
    "cumsum": lambda m, x: x.cumsum(1) + x.cumsum(2),
    "logcumsumexp": lambda m, x: x.logcumsumexp(1),
    "softmax over positions": lambda m, x: x.softmax(1) + x.log_softmax(2),
    "constant product over positions": lambda m, x: torch.eye(x.shape[1], dtype=x.dtype).roll(1, 0) @ x,
    "constant einsum over positions": lambda m, x: torch.einsum("ts,nsk->ntk", torch.eye(x.shape[1], dtype=x.dtype).roll(1, 0), x),
    "constant layer over positions": lambda m, x: F.linear(x.mT, torch.eye(x.shape[1], dtype=x.dtype).roll(1, 1)).mT,
    "windows": lambda m, x: F.pad(x.mT, (1, 1)).unfold(2, 3, 1).sum(-1).mT,
}


def sliced(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, :-1]
    out[:, 0] += x[:, -1]
    return out


@pytest.mark.filterwarnings("ignore:index_reduce")  # torch's own: it is new
@sizes
@pytest.mark.parametrize("use", BY_INDEX)
def test_positions_and_features_by_index(use: str, n: int, t: int) -> None:
    f = BY_INDEX[use]
    check_middle(lambda m, x: m.more(torch.tanh(f(m, m.again(x)))) * m.b, n, t)


# Examples by index: they change their order and come back, or are sent in another order to the loss.

REORDERED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda x, order: x[order],
    "index_select": lambda x, order: x.index_select(0, order),
    "index_select, from behind": lambda x, order: x.index_select(-x.ndim, order),
    "take_along_dim": lambda x, order: x.take_along_dim(order.view(-1, *[1] * (x.ndim - 1)), 0),
    "gather": lambda x, order: x.gather(0, order.view(-1, *[1] * (x.ndim - 1)).expand_as(x)),
    "index_copy": lambda x, order: torch.zeros_like(x).index_copy(0, order.argsort(), x),
    "index_add": lambda x, order: torch.zeros_like(x).index_add(0, order.argsort(), x),
    "index_put": lambda x, order: torch.zeros_like(x).index_put((order.argsort(),), x),
    "scatter": lambda x, order: torch.zeros_like(x).scatter(0, order.argsort().view(-1, *[1] * (x.ndim - 1)).expand_as(x), x),
    "one-hot product": lambda x, order: torch.tensordot(F.one_hot(order, len(order)).to(x.dtype), x, dims=1),
    "one-hot einsum": lambda x, order: torch.einsum("ij,j...->i...", F.one_hot(order, len(order)).to(x.dtype), x),
    "split and joined": lambda x, order: torch.cat([x.split(1)[i] for i in order.tolist()]),
}


@sizes
@pytest.mark.parametrize("reorder", REORDERED)
def test_examples_in_another_order(reorder: str, n: int, t: int) -> None:
    """There and back between two layers, and there alone, where the labels' order is the one to count."""
    move, order = REORDERED[reorder], turned(n)
    check_middle(lambda m, x: move(m.again(move(x, order)), order.argsort()), n, t)
    torch.manual_seed(0)
    model, x = Around(lambda m, y: m.more(move(m.again(y), order))).double(), torch.randn(n, t, 3, dtype=torch.float64)
    check(model, lambda: square_losses(model(x)))


# Tables that are no parameters.


class Lookup(nn.Module):
    """A table of constants that the model keeps where no hook and no state dictionary sees it."""

    def __init__(self, rows: int, kept: str, look: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.kept, self.look = kept, look
        table = torch.randn(rows, WIDTH, dtype=torch.float64)
        self.tables, self.named, self.closed = [table], {"table": table}, lambda: table
        self.numbers = table.numpy()
        self.register_buffer("buffer", table, persistent=False)
        self.layer, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        table = {
            "list": lambda: self.tables[0],
            "dict": lambda: self.named["table"],
            "closure": lambda: self.closed(),
            "numpy": lambda: torch.from_numpy(self.numbers),
            "buffer": lambda: self.buffer,
        }[self.kept]()
        return self.last(torch.tanh(self.layer(self.look(table, ids))))


LOOKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda table, ids: table[ids],
    "embedding": lambda table, ids: F.embedding(ids, table),
    "index_select": lambda table, ids: table.index_select(0, ids.flatten()).view(*ids.shape, WIDTH),
    "gather": lambda table, ids: table.expand(*ids.shape, -1, -1).gather(-2, ids[..., None, None].expand(*ids.shape, 1, WIDTH))[
        ..., 0, :
    ],
    "take_along_dim": lambda table, ids: table.take_along_dim(ids.flatten()[:, None], 0).view(*ids.shape, WIDTH),
    "one-hot": lambda table, ids: F.one_hot(ids, len(table)).to(table.dtype) @ table,
}


@pytest.mark.parametrize("kept", ["list", "dict", "closure", "numpy", "buffer"])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("shape", [(3,), (4,), (1,), (3, 3), (4, 4), (3, 5), (1, 4)])
def test_a_table_that_is_no_parameter(look: str, kept: str, shape: tuple[int, ...]) -> None:
    """The table has N rows, T rows, or another number; the ids of an example are anywhere."""
    for rows in {shape[0], shape[-1], 7}:
        torch.manual_seed(0)
        model = Lookup(rows, kept, LOOKS[look]).double()
        ids = torch.randint(rows, shape)
        check(model, lambda model=model, ids=ids: square_losses(model(ids)))


@sizes
def test_a_constant_that_looks_like_examples(n: int, t: int) -> None:
    """(N, N), (T, N) and (N, 4) constants beside activations."""
    constants = torch.randn(n, n, dtype=torch.float64), torch.randn(n, WIDTH, dtype=torch.float64)

    def middle(m: Any, x: Tensor) -> Tensor:
        y = m.again(x) @ constants[1].T @ constants[0] @ constants[1]
        return y + m.more(constants[1]).sum(0) * x

    check_middle(middle, n, t)


# Mixing, then what no mode sees into.


class Signed(torch.autograd.Function):
    """A function of the user's, without weights: x|x|, which cuts no example off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0].abs()


class Squared(torch.autograd.Function):
    """The same, where negative numbers have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu().square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0].relu()


class Centered(torch.autograd.Function):
    """A function of the user's that mixes the examples itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(0)


@functools.cache
def scripted() -> Callable[[Tensor], Tensor]:
    """A function of TorchScript, made when a test asks for it: torch warns that its compiler is old."""
    with quiet():
        return torch.jit.trace(lambda x: torch.tanh(x) * 2 + x, torch.zeros(2, 2, 2, dtype=torch.float64), check_trace=False)


OPAQUE: dict[str, Callable[[Tensor], Tensor]] = {
    "custom function": Signed.apply,
    "vmap over examples": torch.vmap(lambda row: torch.tanh(row) * row.mean()),
    "vmap over positions": torch.vmap(lambda row: torch.tanh(row) + row.square(), in_dims=1, out_dims=1),
    "script": lambda x: scripted()(x),
    "reentrant checkpoint": lambda x: checkpoint(torch.tanh, x, use_reentrant=True),
    "checkpoint": lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
    "nothing": torch.tanh,
}
MIXINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "centered": lambda x: x - x.mean(0),
    "one added": lambda x: x + 0.1 * x[:1],
    "rolled and added": lambda x: x + x.roll(1, 0),
    "softmax": lambda x: x.softmax(0) + x,
    "rows cumulated": lambda x: x.flatten(0, 1).cumsum(0).view_as(x),
    "batch norm": lambda x: F.batch_norm(x.mT, None, None, training=True).mT,
    "custom function": Centered.apply,
    "vmap": torch.vmap(lambda column: column - column.mean(), in_dims=2, out_dims=2),
    "reentrant checkpoint": lambda x: checkpoint(lambda y: y - y.mean(0), x, use_reentrant=True),
}
# Below the mixing no example has a gradient of its own.
BELOW = ("first", "again")


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (6, 4)])
@pytest.mark.parametrize("opaque", OPAQUE)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_weights_below_a_mixing_are_refused_and_those_above_are_covered(mixing: str, opaque: str, n: int, t: int) -> None:
    mix, hide = MIXINGS[mixing], OPAQUE[opaque]
    report = check_middle(lambda m, x: m.more(hide(mix(m.again(x)))) * m.b, n, t, refused=BELOW)
    assert {"more.weight", "more.bias", "b", "last.weight", "last.bias"} <= set(report)
    # Further functions on both sides change nothing of it.
    report = check_middle(lambda m, x: hide(m.more(hide(mix(hide(m.again(x)))))), n, t, refused=BELOW)
    assert {"more.weight", "more.bias", "last.weight", "last.bias"} <= set(report)


# What cuts examples off: negative numbers have no gradient, and where a sum is large the hyperbolic tangent has none.
CUTTING: dict[str, Callable[[Tensor], Tensor]] = {
    "custom function": Squared.apply,
    "vmap over examples": torch.vmap(lambda row: torch.tanh(row) * row.sum()),
}


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (6, 4)])
@pytest.mark.parametrize("opaque", CUTTING)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_mixing_whose_examples_are_cut_off_is_refused_or_exact(mixing: str, opaque: str, n: int, t: int) -> None:
    """Where all but one example's gradients vanish above a mixing, its rows are that example's alone, and may be covered."""
    mix, hide = MIXINGS[mixing], CUTTING[opaque]
    report = check_middle(lambda m, x: hide(m.more(hide(mix(hide(m.again(x)))))), n, t, optional=BELOW)
    assert {"more.weight", "more.bias", "last.weight", "last.bias"} <= set(report)


@pytest.mark.parametrize("opaque", OPAQUE)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_strict_raises_for_weights_below_a_mixing(mixing: str, opaque: str) -> None:
    torch.manual_seed(0)
    mix, hide = MIXINGS[mixing], OPAQUE[opaque]
    model = Around(lambda m, x: m.more(hide(mix(m.again(x))))).double()
    del model.w, model.b  # what is not used is not covered either
    x = torch.randn(4, 4, 3, dtype=torch.float64)
    with quiet(), pytest.raises(NotImplementedError, match=r"(first|again)\.(weight|bias)"), zerosum.Probe(model, strict=True):
        square_losses(model(x)).sum().backward()


@pytest.mark.parametrize("opaque", OPAQUE)
@sizes
def test_what_no_mode_sees_into_keeps_examples_apart(opaque: str, n: int, t: int) -> None:
    hide = OPAQUE[opaque]
    check_middle(lambda m, x: m.more(hide(m.again(hide(x)))) * m.b, n, t)


@more_sizes
def test_a_branch_that_mixes_refuses_its_own_weights_only(n: int, t: int) -> None:
    """The weights of the branch below the mixing, and what lies below both; not those of the other branch."""
    refused = ("first", "again") if n > 1 else ()
    report = check_middle(lambda m, x: m.again(x).mean(0).tanh() + m.more(x) * m.b, n, t, refused=refused)
    assert {"more.weight", "b", "last.weight"} <= set(report)


@sizes
def test_a_mixing_without_a_gradient_is_no_mixing(n: int, t: int) -> None:
    """Statistics of the batch that are detached are constants to every example's gradient."""
    check_middle(lambda m, x: m.more(m.again(x) - m.again(x).mean(0).detach()) / (1 + x.detach().var(0, correction=0)), n, t)


@pytest.mark.parametrize(("n", "t"), [(1, 5), (1, 1), (1, 4)])
@pytest.mark.parametrize("mixing", sorted({*MIXINGS} - {"batch norm"}))
def test_one_example_meets_nobody(mixing: str, n: int, t: int) -> None:
    """What mixes examples, over one: its gradient is its own. (Centered alone would leave zeros.)"""
    mix = MIXINGS[mixing]
    # A column that is centered over its positions too does not depend on what is added to it.
    check_middle(lambda m, x: m.more(x + mix(m.again(x))), n, t, vanishing=("again.bias",) if mixing == "vmap" else ())


# Rows that are picked by number and meet (N, …) tensors.


class Policy(nn.Module):
    """Logits (N, T, 5) and values (N, T), of which a loss takes some."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.actor, self.critic, self.twin = (
            nn.Linear(3, WIDTH),
            nn.Linear(WIDTH, 5),
            nn.Linear(WIDTH, 1),
            nn.Linear(WIDTH, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.actor(h), self.critic(h).squeeze(-1), self.twin(h).squeeze(-1)


@pytest.fixture
def examples(n: int, t: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "x": torch.randn(n, t, 3, dtype=torch.float64),
        "last": torch.randint(t, (n,)),
        "action": torch.randint(5, (n,)),
        "advantage": torch.randn(n, dtype=torch.float64),
        "target": torch.randn(n, dtype=torch.float64),
    }


def at_last(m: Policy, e: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Each output at one position of each example."""
    rows = torch.arange(len(e["x"]))
    logits, value, twin = m(e["x"])
    return logits[rows, e["last"]], value[rows, e["last"]], twin[rows, e["last"]]


def surrogate(m: Policy, e: dict[str, Tensor]) -> Tensor:
    logits, _, _ = at_last(m, e)
    logp = logits.log_softmax(-1)[torch.arange(len(logits)), e["action"]]
    ratio = (logp + 1.5).exp()
    return -torch.min(ratio * e["advantage"], ratio.clamp(0.8, 1.2) * e["advantage"])


def pooled_by_mask(m: Policy, e: dict[str, Tensor]) -> Tensor:
    logits, _, _ = m(e["x"])
    mask = (torch.arange(logits.shape[1]) <= e["last"][:, None]).to(logits.dtype)
    return F.cross_entropy((logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), e["action"], reduction="none")


PICKS: dict[str, Callable[[Policy, dict[str, Tensor]], Tensor]] = {
    "last token, cross entropy": lambda m, e: F.cross_entropy(at_last(m, e)[0], e["action"], reduction="none"),
    "last token, gathered": lambda m, e: F.cross_entropy(
        m(e["x"])[0].gather(1, e["last"][:, None, None].expand(-1, 1, 5)).squeeze(1), e["action"], reduction="none"
    ),
    "pooled by a mask": pooled_by_mask,
    "log-probability times advantage": lambda m, e: (
        -at_last(m, e)[0].log_softmax(-1)[torch.arange(len(e["x"])), e["action"]] * e["advantage"]
    ),
    "log-probability, gathered, times advantage": lambda m, e: (
        -at_last(m, e)[0].log_softmax(-1).gather(1, e["action"][:, None]).squeeze(1) * e["advantage"]
    ),
    "clipped surrogate": surrogate,
    "actor and critic": lambda m, e: (
        (at_last(m, e)[1] - e["target"]).square() - at_last(m, e)[0].log_softmax(-1)[torch.arange(len(e["x"])), e["action"]]
    ),
    "advantage from the critic, detached": lambda m, e: (
        -at_last(m, e)[0].log_softmax(-1)[torch.arange(len(e["x"])), e["action"]] * (e["target"] - at_last(m, e)[1]).detach()
    ),
    "the smaller of two": lambda m, e: (torch.min(at_last(m, e)[1], at_last(m, e)[2]) - e["target"]).square(),
    "the larger of two": lambda m, e: (torch.maximum(at_last(m, e)[1], at_last(m, e)[2]) - e["target"]).square(),
    "one or the other": lambda m, e: torch.where(e["advantage"] > 0, at_last(m, e)[1], at_last(m, e)[2] - e["target"]).square(),
    "a position by the largest value": lambda m, e: (
        m(e["x"])[1][torch.arange(len(e["x"])), m(e["x"])[2].argmax(1)] - e["target"]
    ).square(),
    "Huber": lambda m, e: F.smooth_l1_loss(at_last(m, e)[1], e["target"], reduction="none"),
    "numbers zipped": lambda m, e: torch.stack(
        [-row.log_softmax(-1)[a] for row, a in zip(at_last(m, e)[0], e["action"], strict=True)]
    ),
}


@sizes
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("pick", PICKS)
def test_rows_that_are_picked_and_meet(pick: str, explicit: bool, n: int, t: int, examples: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Policy().double()
    options = {"loss_reduction": "sum"} if explicit else {}
    check(model, lambda: PICKS[pick](model, examples), **options)


def preference(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -F.logsigmoid(0.5 * (chosen - rejected))


PAIRED: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "joined and cut": lambda m, a, b: preference(*m(torch.cat([a, b])).mean((1, 2)).chunk(2)),
    "joined and sliced": lambda m, a, b: preference(
        m(torch.cat([a, b])).mean((1, 2))[: len(a)], m(torch.cat([a, b])).mean((1, 2))[len(a) :]
    ),
    "interleaved": lambda m, a, b: preference(*m(torch.stack([a, b], 1).flatten(0, 1)).mean((1, 2)).view(-1, 2).unbind(1)),
    "stacked behind": lambda m, a, b: preference(*m(torch.stack([a, b], 1)).mean((2, 3)).unbind(1)),
    "stacked in front": lambda m, a, b: preference(*m(torch.stack([a, b])).mean((2, 3))),
    "two passes": lambda m, a, b: preference(m(a).mean((1, 2)), m(b).mean((1, 2))),
    "a reference without gradients": lambda m, a, b: preference(m(a).mean((1, 2)), m(b).mean((1, 2)).detach()),
    "triplet": lambda m, a, b: F.triplet_margin_loss(m(a).mean(1), m(b).mean(1), m(a + b).mean(1), margin=10.0, reduction="none"),
    "cosine": lambda m, a, b: 1 - F.cosine_similarity(m(a).mean(1), m(b).mean(1)),
}


# Both inputs enter the model as one tensor's first dimension.
ONE_INPUT = ("joined and cut", "joined and sliced", "interleaved", "stacked in front")


@sizes
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("pair", PAIRED)
def test_an_example_is_a_pair_of_inputs(pair: str, told: bool, n: int, t: int) -> None:
    """2 N rows enter the model, and N losses leave: an example's gradient is the sum over its two rows."""
    torch.manual_seed(0)
    model = Around(lambda m, x: m.again(x) * m.b).double()
    a, b = torch.randn(2, n, t, 3, dtype=torch.float64)
    if not told and n == 1 and pair in ONE_INPUT:
        # Two rows and one loss that couples them: two examples that meet, or a pair. The probe refuses, and says how to tell.
        argument = "num_examples" if pair == "stacked in front" else "num_examples=1"
        check_or_told(model, lambda: PAIRED[pair](model, a, b), argument=argument)
        return
    # What compares two outputs does not depend on what is added to both.
    check(model, lambda: PAIRED[pair](model, a, b), vanishing=("last.bias",), **({"num_examples": n} if told else {}))


# Recurrent cells and networks.


class Cells(nn.Module):
    """A cell over the positions, which starts from constants."""

    def __init__(self, kind: str, start: str) -> None:
        super().__init__()
        self.cell, self.last, self.start = getattr(nn, kind)(3, WIDTH), nn.Linear(WIDTH, 2), start

    def forward(self, x: Tensor) -> Tensor:
        zeros, state, outputs = x.new_zeros(len(x), WIDTH), None, []
        if self.start != "none":
            h = torch.zeros(len(x), WIDTH, dtype=x.dtype) if self.start == "zeros" else zeros[:1].expand(len(x), -1)
            state = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.last(torch.stack(outputs, 1))


@sizes
@pytest.mark.parametrize("start", ["none", "zeros", "expanded"])
@pytest.mark.parametrize("kind", ["LSTMCell", "RNNCell", "GRUCell"])
def test_a_recurrent_cell_whose_first_step_sees_constants(kind: str, start: str, n: int, t: int) -> None:
    torch.manual_seed(0)
    model, x = Cells(kind, start).double(), torch.randn(n, t, 3, dtype=torch.float64)
    check(model, lambda: square_losses(model(x)))


class Unrolled(nn.Module):
    """A recurrent network by hand whose first input and state are constants: only what follows knows the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.state, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.enter = nn.Linear(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        step, h = x.new_zeros(len(x), WIDTH), x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            h = torch.tanh(self.input(step) + self.state(h))
            step = self.enter(x[:, t])
        return self.last(torch.tanh(self.input(step) + self.state(h)))


@more_sizes
def test_a_loop_whose_first_inputs_are_constants(n: int, t: int) -> None:
    torch.manual_seed(0)
    model, x = Unrolled().double(), torch.randn(n, t, 3, dtype=torch.float64)
    check(model, lambda: square_losses(model(x)))


class Recurrences(nn.Module):
    """A recurrent network with a norm behind it, as a stack of blocks under checkpoints or not."""

    def __init__(self, kind: str, how: str) -> None:
        super().__init__()
        self.rnn, self.norm, self.last, self.how = (
            getattr(nn, kind)(WIDTH, WIDTH, batch_first=True),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2),
            how,
        )
        self.first = nn.Linear(3, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        return self.norm(self.rnn(x)[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "reentrant, between two uses":
            x = checkpoint(lambda y: torch.tanh(self.norm(y)), self.rnn(x)[0], use_reentrant=True)
            return self.last(self.rnn(x)[0])
        if self.how == "plain":
            return self.last(self.block(self.block(x)))
        x = checkpoint(self.block, x, use_reentrant=self.how == "reentrant")
        return self.last(checkpoint(self.block, x, use_reentrant=self.how == "reentrant"))


@sizes
@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant", "reentrant, between two uses"])
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_recurrent_networks_under_checkpoints(kind: str, how: str, n: int, t: int) -> None:
    torch.manual_seed(0)
    model, x = Recurrences(kind, how).double(), torch.randn(n, t, 3, dtype=torch.float64)
    check(model, lambda: square_losses(model(x)))


# Transformers of torch's own, sequence first too.


class Encoder(nn.Module):
    """torch's encoder layers and a norm, under checkpoints or not."""

    def __init__(self, batch_first: bool, how: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(3, 8), nn.Linear(8, 2), how
        layers = [nn.TransformerEncoderLayer(8, 2, 12, dropout=dropout, batch_first=batch_first) for _ in range(2)]
        self.blocks = nn.ModuleList(nn.Sequential(layer, nn.LayerNorm(8)) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.how == "plain" else checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return self.last(x)


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (2, 4), (2, 2), (8, 3), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder_layers(batch_first: bool, how: str, n: int, t: int) -> None:
    """With N the number of heads among the sizes; sequence first, the losses (N,) alone say what N is.

    They do not where there is one example or one position: (T, 1) and one loss may be T examples, and (1, N) and N losses one.
    """
    torch.manual_seed(0)
    model = Encoder(batch_first, how).double()
    x = torch.randn((n, t, 3) if batch_first else (t, n, 3), dtype=torch.float64)
    options = {"num_examples": n} if not batch_first and 1 in (n, t) and n != t else {}
    check(model, lambda: square_losses(model(x) if batch_first else model(x).transpose(0, 1)), **options)


@pytest.mark.parametrize(("n", "t"), [(1, 5), (5, 1)])
@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant"])
def test_one_example_or_one_position_with_sequences_first_is_told(how: str, n: int, t: int) -> None:
    torch.manual_seed(0)
    model = Encoder(False, how).double()
    x = torch.randn((t, n, 3), dtype=torch.float64)
    check_or_told(model, lambda: square_losses(model(x).transpose(0, 1)), argument="num_examples")


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", ["linear", "GRU", "LSTM", "attention", "convolution", "embedding"])
def test_sequences_first_with_a_loss_for_each_example(kind: str, told: bool, n: int, t: int) -> None:
    """(T, N, ·) all the way: (N,) losses are what tells the examples from the positions, at N = T too.

    With one example or one position nothing tells, and the probe asks; but for a convolution, whose input is (N, ·, T).
    """
    torch.manual_seed(0)
    x: Tensor = torch.randn(t, n, WIDTH, dtype=torch.float64)
    layers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(WIDTH, WIDTH),
        "GRU": lambda: nn.GRU(WIDTH, WIDTH),
        "LSTM": lambda: nn.LSTM(WIDTH, WIDTH),
        "attention": lambda: nn.MultiheadAttention(WIDTH, 2),
        "convolution": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
        "embedding": lambda: nn.Embedding(7, WIDTH),
    }
    model = nn.ModuleDict({"layer": layers[kind](), "last": nn.Linear(WIDTH, 3)}).double()
    ids = torch.randint(7, (t, n))

    def losses() -> Tensor:
        layer = model["layer"]
        if kind == "attention":
            h = layer(x, x, x, need_weights=False)[0]
        elif kind == "convolution":
            h = layer(x.permute(1, 2, 0)).permute(2, 0, 1)
        else:
            h = layer(ids if kind == "embedding" else x)
        h = h[0] if isinstance(h, tuple) else h
        return model["last"](torch.tanh(h)).square().mean((0, 2))

    if not told and 1 in (n, t) and kind != "convolution":
        check_or_told(model, losses, argument="num_examples")
    else:
        check(model, losses, **({"num_examples": n} if told else {}))


# Mixtures of experts by hand.


class Mixture(nn.Module):
    """A router, and experts of which every row takes two."""

    def __init__(self, experts: int, send: str, balance: float = 0.0) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, experts, bias=False), nn.Linear(WIDTH, 2)
        self.up, self.down = parameter(experts, WIDTH, 6), parameter(experts, 6, WIDTH)
        self.send, self.balance_factor, self.balance = send, balance, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.first(x)).flatten(0, 1)
        probabilities = self.router(rows).softmax(-1)
        weights, chosen = probabilities.topk(min(2, len(self.up)), dim=-1)
        if self.balance_factor:
            load = F.one_hot(chosen, len(self.up)).to(rows.dtype).mean((0, 1))
            self.balance = self.balance_factor * (load * probabilities.mean(0)).sum()
        return self.last(getattr(self, self.send)(rows, weights, chosen)).view(*x.shape[:-1], -1)

    def expert(self, rows: Tensor, k: int) -> Tensor:
        return torch.tanh(rows @ self.up[k]) @ self.down[k]

    def by_adding(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for k in range(len(self.up)):
            row, rank = torch.where(chosen == k)
            out.index_add_(0, row, self.expert(rows[row], k) * weights[row, rank, None])
        return out

    def by_masks(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        scores = torch.zeros(len(rows), len(self.up), dtype=rows.dtype).scatter(1, chosen, weights)
        return sum((scores[:, k, None] * self.expert(rows, k) for k in range(len(self.up))), torch.zeros_like(rows))

    def by_sorting(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.up)).tolist()
        sent = rows[order // chosen.shape[1]].split(counts)
        out = torch.cat([self.expert(part, k) for k, part in enumerate(sent)])[order.argsort()]
        return (out.view(*chosen.shape, -1) * weights[..., None]).sum(1)

    def by_gathering(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("rk,rekh->reh", rows, self.up[chosen]))
        return torch.einsum("reh,rehk,re->rk", hidden, self.down[chosen], weights)

    def by_capacity(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Buffers (experts, places, width), as in Switch: a one-hot tensor sends the rows and brings them back."""
        mask = F.one_hot(chosen, len(self.up)).flatten(0, 1)
        place = (mask.cumsum(0) * mask).sum(-1) - 1
        send = F.one_hot(place, int(place.max()) + 1)[:, None, :] * mask[..., None]
        send = send.view(len(rows), -1, *send.shape[1:]).to(rows.dtype)
        buffers = torch.einsum("rcep,rk->epk", send, rows)
        out = torch.bmm(torch.tanh(torch.bmm(buffers, self.up)), self.down)
        return torch.einsum("rcep,epk,rc->rk", send, out, weights)


SENDS = ["by_adding", "by_masks", "by_sorting", "by_gathering", "by_capacity"]


@pytest.mark.parametrize(
    ("n", "t", "experts"), [(3, 5, 4), (4, 3, 4), (4, 4, 4), (2, 4, 8), (8, 2, 8), (6, 1, 6), (1, 6, 4), (3, 4, 1)]
)
@pytest.mark.parametrize("send", SENDS)
def test_rows_that_are_sent_to_as_many_experts_as_examples(send: str, n: int, t: int, experts: int) -> None:
    torch.manual_seed(0)
    model, x = Mixture(experts, send).double(), torch.randn(n, t, 3, dtype=torch.float64)
    check(model, lambda: square_losses(model(x)))


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4)])
@pytest.mark.parametrize("send", ["by_adding", "by_gathering"])
def test_a_balance_loss_that_is_marked_belongs_to_no_example(send: str, n: int, t: int) -> None:
    """The report is of the examples' own losses, all of it; the gradient is that of both."""
    torch.manual_seed(0)
    model, x = Mixture(4, send, balance=0.3).double(), torch.randn(n, t, 3, dtype=torch.float64)

    def step() -> None:
        losses = square_losses(model(x))
        (losses.sum() + zerosum.auxiliary(model.balance)).backward()

    check(model, lambda: square_losses(model(x)), step)


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4)])
@pytest.mark.parametrize("send", ["by_adding", "by_gathering"])
def test_a_balance_loss_that_is_not_marked_refuses_what_it_reaches(send: str, n: int, t: int) -> None:
    """The router and what lies below it; an expert and the head have the examples' gradients alone."""
    torch.manual_seed(0)
    model, x = Mixture(4, send, balance=0.3).double(), torch.randn(n, t, 3, dtype=torch.float64)

    def step() -> None:
        losses = square_losses(model(x))
        (losses.sum() + model.balance).backward()

    check(model, lambda: square_losses(model(x)), step, refused=("router", "first"))


def test_auxiliary_returns_the_loss_and_is_the_identity_without_a_probe() -> None:
    torch.manual_seed(0)
    model, x = Mixture(4, "by_adding", balance=0.3).double(), torch.randn(3, 5, 3, dtype=torch.float64)
    (square_losses(model(x)).sum() + model.balance).backward()
    plain = gradients(model)
    model.zero_grad()
    losses = square_losses(model(x))
    marked = zerosum.auxiliary(model.balance)
    assert torch.equal(marked, model.balance)
    (losses.sum() + marked).backward()
    assert_gradients(gradients(model), plain, 1e-12)


@pytest.mark.parametrize("own", ["decay", "orthogonality"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_weights_own_term_in_the_loss(own: str, marked: bool) -> None:
    """Refused where it is not marked, and where it is, the examples' own gradients."""
    torch.manual_seed(0)
    model, x = Around(lambda m, y: m.again(y)).double(), torch.randn(4, 4, 3, dtype=torch.float64)

    def step() -> None:
        losses = square_losses(model(x))
        w = model.again.weight
        term = w.square().sum() if own == "decay" else (w @ w.T - torch.eye(WIDTH, dtype=w.dtype)).square().sum()
        (losses.sum() + (zerosum.auxiliary(0.1 * term) if marked else 0.1 * term)).backward()

    check(model, lambda: square_losses(model(x)), step, refused=() if marked else ("again.weight",))


# Prompts, and sequences that are packed.


class Prompted(nn.Module):
    """Learned rows before every example's, as prompt tuning has them; the rest of the model may be frozen."""

    def __init__(self, prompts: int, join: str, frozen: bool) -> None:
        super().__init__()
        self.join = join
        self.embedding, self.prompt = nn.Embedding(11, 8), nn.Embedding(prompts, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)
        for p in itertools.chain(self.embedding.parameters(), self.attention.parameters()) if frozen else ():
            p.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        n, x = len(tokens), self.embedding(tokens)
        numbers = torch.arange(self.prompt.num_embeddings)
        prompt = {
            "expanded": lambda: self.prompt(numbers).unsqueeze(0).expand(n, -1, -1),
            "repeated": lambda: self.prompt(numbers).repeat(n, 1, 1),
            "looked up for each": lambda: self.prompt(numbers.unsqueeze(0).expand(n, -1)),
            "the weight itself": lambda: self.prompt.weight.expand(n, -1, -1),
            "stacked": lambda: torch.stack([self.prompt(numbers)] * n),
            "weight times a mask": lambda: self.prompt.weight * x.new_ones(n, 1, 1),
        }[self.join]()
        return self.head(self.attention(torch.cat([prompt, x], 1)))


PROMPTS = ["expanded", "repeated", "looked up for each", "the weight itself", "stacked", "weight times a mask"]


@pytest.mark.parametrize(("n", "t", "prompts"), [(3, 5, 2), (4, 4, 4), (3, 5, 3), (5, 5, 2), (1, 4, 3), (4, 1, 4), (1, 1, 1)])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("join", PROMPTS)
def test_prompts_that_are_learned(join: str, frozen: bool, n: int, t: int, prompts: int) -> None:
    """The prompt's places have no targets."""
    torch.manual_seed(0)
    model, tokens = Prompted(prompts, join, frozen).double(), torch.randint(11, (n, t))
    targets = torch.cat([torch.full((n, prompts), -100), tokens], 1)

    def losses() -> Tensor:
        return F.cross_entropy(model(tokens).mT, targets, reduction="none").sum(1)

    check(model, losses, vanishing=("self_attn.in_proj_bias",))


class PackedModel(nn.Module):
    """Documents one after another in one sequence, (R,) or (1, R), whose attention stays within a document."""

    def __init__(self, attend: bool, leading: bool) -> None:
        super().__init__()
        self.attend, self.leading = attend, leading
        self.embedding, self.position = nn.Embedding(11, 8), nn.Embedding(16, 8)
        self.qkv, self.out, self.norm, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Logits (R, 11)."""
        starts = torch.searchsorted(ids, ids)
        x = self.embedding(tokens) + self.position(torch.arange(len(ids)) - starts)
        if self.attend:
            mask = (ids[:, None] == ids) & torch.ones(len(ids), len(ids)).tril().bool()
            y = x if self.leading else x[None]
            q, k, v = (z.unflatten(-1, (2, 4)).transpose(1, 2) for z in self.qkv(y).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)
            x = x + self.out(y if self.leading else y[0])
        x = self.head(self.norm(torch.tanh(x)))
        return x[0] if self.leading else x


@pytest.mark.parametrize("lengths", [(5, 9, 10), (3, 3, 3), (1, 1, 1, 1), (4, 1, 2), (6,), (1,), (2, 2)])
@pytest.mark.parametrize("named", ["ids", "number", "nothing"])
@pytest.mark.parametrize("attend", [True, False])
@pytest.mark.parametrize("leading", [True, False])
def test_documents_that_are_packed(leading: bool, attend: bool, named: str, lengths: tuple[int, ...]) -> None:
    """(R,) or (1, R) tokens, and losses (N,) by index_add. Ids name the examples, or their number does, or nothing.

    With nothing the probe says that there may be others. It cannot where one total is formed: the rows are then the examples, as
    those of any batch are. Where they meet, that is what is said.
    """
    torch.manual_seed(0)
    model, n = PackedModel(attend, leading).double(), len(lengths)
    ids = torch.arange(n).repeat_interleave(torch.tensor(lengths))
    tokens, targets = torch.randint(11, (2, len(ids)))
    tokens = tokens[None] if leading else tokens

    def losses(mark: bool = False) -> Tensor:
        marked = zerosum.example_ids(tokens, ids) if mark else tokens
        rows = F.cross_entropy(model(marked, ids), targets, reduction="none")
        return rows.new_zeros(n).index_add(0, ids, rows)

    step = (lambda: losses(mark=True).sum().backward()) if named == "ids" else None
    if named == "nothing" and not leading and not attend and n == 1 < len(ids):
        check(model, lambda: F.cross_entropy(model(tokens, ids), targets, reduction="none"), lambda: losses().sum().backward())
    elif named == "nothing":
        one_total = not leading and n == 1
        check_or_told(model, losses, argument="serve several examples" if one_total and n < len(ids) else "num_examples")
    else:
        check(model, losses, step, num_examples=n)


@pytest.mark.parametrize("lengths", [(5, 9, 10), (3, 3, 3), (4, 1, 2)])
def test_packed_documents_whose_examples_are_not_in_order(lengths: tuple[int, ...]) -> None:
    """Rows of the examples that lie anywhere, at ids that are a view with strides."""
    torch.manual_seed(0)
    n = len(lengths)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11)).double()
    order = torch.arange(n).repeat_interleave(torch.tensor(lengths))[torch.randperm(sum(lengths))]
    ids = torch.stack([order, -order - 1], 1)[:, 0]
    assert len(ids) == 1 or not ids.is_contiguous()
    tokens, targets = torch.randint(11, (2, len(ids)))

    def losses(mark: bool = False) -> Tensor:
        rows = F.cross_entropy(model(zerosum.example_ids(tokens, ids) if mark else tokens), targets, reduction="none")
        return rows.new_zeros(n).index_add(0, ids, rows)

    check(model, losses, num_examples=n)
    check(model, losses, lambda: losses(mark=True).sum().backward(), num_examples=n)


# Heads that are hidden in a function.


class FusedCrossEntropy(torch.autograd.Function):
    """A head and its cross entropy in one: gradients are computed on the way forward, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        with torch.enable_grad():
            h, w = rows.detach().requires_grad_(), weight.detach().requires_grad_()
            losses = F.cross_entropy(h @ w.T, targets, reduction="none")
            total = losses.sum() / ((targets != -100).sum() if reduction == "mean" else 1)
        ctx.separate = reduction == "none"
        ctx.save_for_backward(rows, weight, targets, *torch.autograd.grad(total, (h, w)))
        return losses.detach() if ctx.separate else total.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, targets, dh, dw = ctx.saved_tensors
        if not ctx.separate:
            return dh * grad, dw * grad, None, None
        dh = dh * grad[:, None]
        valid = (targets != -100)[:, None]
        p = ((rows @ weight.T).softmax(-1) - F.one_hot(targets.clamp(min=0), len(weight))) * valid * grad[:, None]
        return dh, p.T @ rows, None, None


class Fused(nn.Module):
    """An embedding, attention, and a head that no mode sees."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.qkv, self.norm = nn.Embedding(11, 8), nn.Linear(8, 24, bias=False), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def body(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.norm(x + F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True))

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(N, T), in the plain way."""
        return F.cross_entropy(self.head(self.body(tokens)).mT, targets, reduction="none")


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (1, 6), (8, 2)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_head_that_a_function_hides(reduction: str, tied: bool, n: int, t: int) -> None:
    """The body is covered, whatever is said of the head: that is named, or right."""
    torch.manual_seed(0)
    model, tokens = Fused(tied).double(), torch.randint(11, (n, t))
    targets = tokens.roll(-1, 1).masked_fill(torch.arange(t) == t - 1, -100)
    valid = (targets != -100).sum().item()

    def step() -> None:
        out = FusedCrossEntropy.apply(model.body(tokens).flatten(0, 1), model.head.weight, targets.flatten(), reduction)
        (out.view(n, t).sum(1) if reduction == "none" else out).sum().backward()

    hidden = ("embedding",) if tied else ("head",)
    number = float(valid) if reduction == "mean" else "sum"
    report = check(
        model, lambda: model.losses(tokens, targets).sum(1), step, optional=hidden, loss_reduction=number, num_examples=n
    )
    assert {"qkv.weight", "norm.weight"} <= set(report)
    if report.coverage.not_covered:
        assert report.coverage.share < 1


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (1, 6)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_scale_of_a_total_that_a_function_hides_is_known_or_nothing_is_said(reduction: str, n: int, t: int) -> None:
    """By default: the examples' losses up to one factor, or no parameter."""
    torch.manual_seed(0)
    model, tokens = Fused(False).double(), torch.randint(11, (n, t))
    targets = tokens.roll(-1, 1).masked_fill(torch.arange(t) == t - 1, -100)
    valid = (targets != -100).sum().item()
    factor = 1.0 if reduction == "sum" else 1 / valid

    def step() -> None:
        FusedCrossEntropy.apply(model.body(tokens).flatten(0, 1), model.head.weight, targets.flatten(), reduction).backward()

    # What was differentiated, its N-th part's mean, or the mean of an example's tokens.
    factors = (factor, n * factor, n / valid)
    check(model, lambda: model.losses(tokens, targets).sum(1), step, optional=("",), factors=factors)


@pytest.mark.parametrize(("n", "t"), [(3, 5), (4, 4), (1, 6)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_the_library_is_no_hidden_one(tied: bool, n: int, t: int) -> None:
    torch.manual_seed(0)
    model, tokens = Fused(tied).double(), torch.randint(11, (n, t))
    targets = tokens.roll(-1, 1).masked_fill(torch.arange(t) == t - 1, -100)
    check(
        model,
        lambda: model.losses(tokens, targets).sum(1),
        lambda: zk.linear_cross_entropy(model.body(tokens), model.head.weight, targets).sum(1).sum().backward(),
    )


# Verification: a structure is proved once, each time, or every k-th time, and the numbers do not depend on it.


def check_steps(model: nn.Module, **options: Any) -> None:
    """Steps of one probe, of several shapes in turn."""
    probe = zerosum.Probe(model, gram=True, **options)
    for k, (n, t) in enumerate([(3, 5), (3, 5), (4, 4), (3, 5), (5, 3), (1, 5), (4, 4)]):
        torch.manual_seed(k)
        x = torch.randn(n, t, 3, dtype=torch.float64)
        model.zero_grad()
        truth = truth_of(model, lambda x=x: square_losses(model(x)))
        with probe:
            square_losses(model(x)).sum().backward()
        assert probe.report().num_examples == n
        assert {name for name, g in truth.items() if g.any()} <= set(probe.report())
        assert_one_truth(probe.report(), truth, None, (1.0,), rtol=1e-9)


@pytest.mark.parametrize("verify", ["once", "always", 2])
@pytest.mark.parametrize("send", ["by_masks", "by_sorting"])
def test_several_steps_of_one_probe(send: str, verify: str | int) -> None:
    """Routing differs from step to step, and so may N: what was proved of one structure is no proof of another."""
    torch.manual_seed(0)
    check_steps(Mixture(4, send).double(), verify=verify)


@pytest.mark.parametrize("verify", ["once", "always", 2, "never"])
def test_several_steps_of_one_probe_on_rows_in_order(verify: str | int) -> None:
    """(N, T, ·) all the way, which is right without a proof too."""
    torch.manual_seed(0)
    model = Around(lambda m, x: F.layer_norm(m.more(torch.tanh(m.again(x))), (WIDTH,), m.b)).double()
    check_steps(model, verify=verify, loss_reduction="sum")


def test_a_structure_that_begins_to_mix_is_noticed() -> None:
    """The same operations on the same shapes, but for an order that changes: always verified, it is refused where examples meet."""
    torch.manual_seed(0)
    order = torch.arange(4)
    model = Around(lambda m, x: m.more(x[order] + m.again(x))).double()
    probe, x = zerosum.Probe(model, verify="always"), torch.randn(4, 4, 3, dtype=torch.float64)  # type: ignore[call-arg]
    for turn, mixed in ((0, False), (1, True), (0, False)):
        order = torch.arange(4).roll(turn)
        truth = truth_of(model, lambda: square_losses(model(x)))
        model.zero_grad()
        with quiet(), probe:
            square_losses(model(x)).sum().backward()
        report = probe.report()
        assert ("first.weight" in report) != mixed
        assert "last.weight" in report
        assert_one_truth(report, truth, direction=None, factors=(1.0,), rtol=1e-9, gram=False)


def test_directions_cover_what_is_covered() -> None:
    """A direction for every parameter, some of which are refused."""
    torch.manual_seed(0)
    model = Around(lambda m, x: m.more(Squared.apply(m.again(x) - m.again(x).mean(0)))).double()
    x, direction = torch.randn(4, 4, 3, dtype=torch.float64), direction_for(model)
    truth = truth_of(model, lambda: square_losses(model(x)))
    with quiet(), zerosum.Probe(model, direction=direction) as probe:
        square_losses(model(x)).sum().backward()
    assert {"more.weight", "last.weight"} <= set(probe.report())
    assert_one_truth(probe.report(), truth, direction, (1.0,), rtol=1e-9, gram=False)
