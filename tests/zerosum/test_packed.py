"""Packed sequences: each document's statistics are those of the document run alone, whatever the batch around it is.

The truth runs the model on every document by itself, in float64, and one backward pass for each. The packed step gets ids,
cumulative lengths or positions. Documents of length 1, one document, equal lengths and as many documents as rows are among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum
from tests.zerosum.oracle import assert_truth
from tests.zerosum.steps import assert_coverage, check, truth_of

LENGTHS = [(4, 5, 3), (3, 3, 3), (1, 4, 1), (6,), (1, 1, 1, 1), (2, 2)]
lengths_of = pytest.mark.parametrize("lengths", LENGTHS)
VOCAB = 12


class Reader(nn.Module):
    """A transformer layer over rows (R,) or (B, R), whose attention stays within documents; positions come from a shared table.

    The table has as many rows as documents are long at most, the vocabulary is the width of a head's product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, 8), nn.Embedding(16, 8)
        self.qkv, self.out, self.norm, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, VOCAB)

    def body(self, tokens: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(positions)
        rows = x if x.ndim == 3 else x[None]
        ids = ids if ids.ndim == 2 else ids[None]
        mask = (ids[:, :, None] == ids[:, None]) & torch.ones(2 * ids.shape[-1:], dtype=torch.bool).tril()
        q, k, v = (z.unflatten(-1, (2, 4)).transpose(1, 2) for z in self.qkv(rows).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2).flatten(-2)
        return self.norm(torch.tanh(x + self.out(y.view(x.shape))))

    def forward(self, tokens: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.body(tokens, ids, positions))


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader().double()


class Batch:
    """Documents in B rows of R positions, the rest of each row being padding; ``rows`` has the lengths of each row's."""

    def __init__(self, *rows: tuple[int, ...], padding: int = 0, flat: bool = False, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.lengths = [n for row in rows for n in row]
        self.documents = [(torch.randint(VOCAB, (n,)), torch.randint(VOCAB, (n,))) for n in self.lengths]
        R = max(map(sum, rows)) + padding
        self.tokens, self.targets = torch.zeros(len(rows), R).long(), torch.full((len(rows), R), -100)
        self.ids, self.positions = torch.full((len(rows), R), -1), torch.full((len(rows), R), -1)
        number = 0
        for k, row in enumerate(rows):
            first = 0
            for n in row:
                mine = slice(first, first + n)
                self.tokens[k, mine], self.targets[k, mine] = self.documents[number]
                self.ids[k, mine], self.positions[k, mine] = number, torch.arange(n)
                first, number = first + n, number + 1
        if flat:
            for name in ("tokens", "targets", "ids", "positions"):
                setattr(self, name, getattr(self, name)[0])
        self.valid = int((self.targets != -100).sum())

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    def declare(self, how: str) -> Tensor:
        if how == "ids":
            return zerosum.example_ids(self.tokens, self.ids)
        if how == "cu_seqlens":
            return zerosum.example_ids(self.tokens, cu_seqlens=self.cu_seqlens)
        return zerosum.example_ids(self.tokens, position_ids=self.positions)

    def logits(self, model: Reader, how: str) -> Tensor:
        return model(self.declare(how), self.ids, self.positions.clamp(min=0))

    def alone(self, model: Reader) -> Tensor:
        """(N,) losses of the documents, each run by itself, summed over its positions."""
        return torch.stack(
            [
                F.cross_entropy(model(x, torch.zeros(len(x)).long(), torch.arange(len(x))), y, reduction="sum")
                for x, y in self.documents
            ]
        )

    def weighing_one(self, model: Reader) -> Tensor:
        """The same over the mean number of an example's positions: what "auto" makes of any mean or sum."""
        return self.alone(model) * len(self.lengths) / self.valid


# One row, and its losses in any form ----------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Batch, Tensor], Tensor]] = {
    "mean": lambda b, logits: F.cross_entropy(logits.flatten(0, -2), b.targets.flatten()),
    "sum of rows": lambda b, logits: F.cross_entropy(logits.flatten(0, -2), b.targets.flatten(), reduction="none").sum(),
    "classes second": lambda b, logits: F.cross_entropy(logits.movedim(-1, min(1, logits.ndim - 1)), b.targets),
    "own": lambda b, logits: own_mean(logits, b.targets),
}


def own_mean(logits: Tensor, targets: Tensor) -> Tensor:
    """A masked mean that names no loss function."""
    mask = targets >= 0
    rows = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (rows * mask).sum() / mask.sum()


@lengths_of
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(("how", "flat", "loss"), [
    ("ids", True, "mean"),
    ("ids", False, "own"),
    ("cu_seqlens", True, "sum of rows"),
    ("cu_seqlens", False, "classes second"),
    ("position_ids", True, "own"),
    ("position_ids", False, "mean"),
])  # fmt: skip
def test_documents_in_one_row(how: str, flat: bool, loss: str, padding: int, lengths: tuple[int, ...]) -> None:
    model, batch = reader(), Batch(lengths, padding=padding, flat=flat)
    vanishing = ("qkv.weight", "qkv.bias") if max(lengths) == 1 else ("qkv.bias",)
    report = check(
        model,
        lambda: batch.weighing_one(model),
        lambda: LOSSES[loss](batch, batch.logits(model, how)).backward(),
        vanishing=vanishing,
    )
    assert not report.coverage.not_covered


@pytest.mark.parametrize("rows", [((3, 2), (4, 1)), ((2, 3), (5,)), ((1, 1), (1, 1)), ((3,), (3,)), ((2, 2, 1), (1,), (5,))])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("how", ["ids", "position_ids"])
def test_documents_in_several_rows(how: str, loss: str, rows: tuple[tuple[int, ...], ...]) -> None:
    """(B, R): documents end with their rows, and rows of different lengths are padded."""
    model, batch = reader(), Batch(*rows)
    vanishing = ("qkv.weight", "qkv.bias") if max(batch.lengths) == 1 else ("qkv.bias",)
    check(
        model,
        lambda: batch.weighing_one(model),
        lambda: LOSSES[loss](batch, batch.logits(model, how)).backward(),
        vanishing=vanishing,
    )


@pytest.mark.parametrize("rows", [((4, 5, 3),), ((3, 3, 3),), ((2, 3), (5,)), ((3,), (3,))])
@pytest.mark.parametrize("where", ["behind the head", "before the head"])
@pytest.mark.parametrize("first", [0, 1])
def test_losses_of_one_position_fewer(first: int, where: str, rows: tuple[tuple[int, ...], ...]) -> None:
    """Rows without the last position, as for next tokens, or without the first."""
    model, batch = reader(), Batch(*rows)
    kept = slice(first, None if first else -1)
    mask = torch.zeros_like(batch.targets, dtype=torch.bool)
    mask[:, kept] = True
    batch.targets[~mask] = -100
    valid = int((batch.targets != -100).sum())
    for number, (_, y) in enumerate(batch.documents):
        y.copy_(batch.targets[batch.ids == number])

    def step() -> None:
        if where == "behind the head":
            logits = batch.logits(model, "ids")[:, kept]
        else:
            logits = model.head(model.body(batch.declare("ids"), batch.ids, batch.positions.clamp(min=0))[:, kept])
        F.cross_entropy(logits.flatten(0, 1), batch.targets[:, kept].flatten()).backward()

    def losses() -> Tensor:
        return batch.alone(model) * len(batch.lengths) / valid

    check(model, losses, step, vanishing=("qkv.bias",))


@lengths_of
def test_losses_that_are_added_up_by_document(lengths: tuple[int, ...]) -> None:
    """A vector (N,), of documents in any order: ids say which entry is whose, also where there are as many rows as documents."""
    model, batch, n = reader(), Batch(lengths), len(lengths)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    batch.ids = order[batch.ids]

    def step() -> None:
        rows = F.cross_entropy(batch.logits(model, "ids").flatten(0, 1), batch.targets.flatten(), reduction="none")
        rows.new_zeros(n).index_add(0, batch.ids.flatten(), rows).sum().backward()

    vanishing = ("qkv.weight", "qkv.bias") if max(lengths) == 1 else ("qkv.bias",)
    # Where all rows are examples, "auto" cannot tell a vector of totals from the rows' losses, which are the same.
    check(model, lambda: batch.alone(model)[order.argsort()], step, vanishing=vanishing)


def test_losses_that_couple_the_rows_of_a_document() -> None:
    """The losses are no sum over rows, and still one over documents: each is the square of its rows' mean."""
    model, batch = reader(), Batch((4, 5, 3))

    def square(rows: Tensor) -> Tensor:
        return rows.mean().square()

    def step() -> None:
        rows = F.cross_entropy(batch.logits(model, "ids")[0], batch.targets[0], reduction="none")
        sum(square(rows[batch.ids[0] == k]) for k in range(3)).backward()

    def losses() -> Tensor:
        parts = [F.cross_entropy(model(x, 0 * x, torch.arange(len(x))), y, reduction="none") for x, y in batch.documents]
        return torch.stack([square(part) for part in parts])

    with pytest.warns(UserWarning, match="cannot read how the loss was reduced"):
        check(model, losses, step, vanishing=("qkv.bias",))


def picked_batch(lengths: tuple[int, ...]) -> tuple[Batch, Tensor, Callable[[Reader], Tensor]]:
    """A batch some of whose rows have no target, its mask of those that have, and the documents' losses."""
    batch = Batch(lengths, padding=2)
    batch.targets[0, 1::4] = -100
    mask = batch.targets != -100
    for number, (_, y) in enumerate(batch.documents):
        y.copy_(batch.targets[batch.ids == number])
    active = sum(bool((y != -100).any()) for _, y in batch.documents)
    return batch, mask, lambda model: batch.alone(model) * active / int(mask.sum())


@pytest.mark.parametrize("lengths", [(4, 5, 3), (3, 3, 3), (1, 4, 1, 6, 2, 2, 2, 2)])
@pytest.mark.parametrize("where", ["behind the head", "before the head"])
def test_rows_that_are_picked(where: str, lengths: tuple[int, ...]) -> None:
    model = reader()
    batch, mask, losses = picked_batch(lengths)

    def step() -> None:
        if where == "behind the head":
            F.cross_entropy(batch.logits(model, "ids")[mask], batch.targets[mask]).backward()
            return
        h = model.body(batch.tokens, batch.ids, batch.positions.clamp(min=0))
        F.cross_entropy(model.head(zerosum.example_ids(h[mask], batch.ids[mask])), batch.targets[mask]).backward()

    check(model, lambda: losses(model), step, vanishing=("qkv.bias",))


def test_rows_that_are_picked_before_the_head_are_to_be_declared() -> None:
    model = reader()
    batch, mask, _ = picked_batch((4, 5, 3))

    def step() -> None:
        h = model.body(batch.declare("ids"), batch.ids, batch.positions.clamp(min=0))
        F.cross_entropy(model.head(h[mask]), batch.targets[mask]).backward()

    assert_refused(
        model, step, r"has the rows \(1, 14\) that were passed to zerosum.example_ids; if the losses are for selected rows"
    )


# What stays from batch to batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["equal lengths", "other lengths", "one document"])
def test_batches_of_one_shape_have_documents_of_any_lengths(first: str) -> None:
    """One proof serves them all, with 8 documents or more: equal lengths, which look regular, one document, and padding."""
    model = reader()
    even, uneven, one = (2,) * 8, (1, 3, 2, 1, 4, 1, 2, 2), (16,)
    order = {"equal lengths": (even, uneven, one), "other lengths": (uneven, even, one), "one document": (one, uneven, even)}
    batches = [Batch(lengths, seed=k) for k, lengths in enumerate((*order[first], (4, 3, 9), (1,) * 16))]
    batches.append(Batch((6, 6), padding=4, seed=5))
    probe, proved = zerosum.Probe(model, gram=True), []
    for batch in batches:
        truth = truth_of(model, lambda batch=batch: batch.weighing_one(model))
        with probe:
            LOSSES["mean"](batch, batch.logits(model, "cu_seqlens")).backward()
        report = probe.report()
        assert report.num_examples == len(batch.lengths)
        vanishing = ("qkv.weight", "qkv.bias") if max(batch.lengths) == 1 else ("qkv.bias",)
        assert_truth(report, truth, rtol=1e-9, vanishing=vanishing)
        assert_coverage(report, model, truth, (), ())
        proved.append(report.proof.proved)
        model.zero_grad()
    # The first is proved; one document needs no proof; padding is another structure.
    assert proved == ([0, 1, 0, 0, 0, 1] if first == "one document" else [1, 0, 0, 0, 0, 1])


def test_few_documents_are_proved_again_until_their_order_is_no_chance() -> None:
    """Rows that the data sorts come in the declared order by chance: 14 times with two documents, then never again."""
    model, proved = reader(), []
    probe = zerosum.Probe(model)
    for k in range(16):
        batch = Batch((1 + k % 5, 6 - k % 5), seed=k)
        truth = truth_of(model, lambda batch=batch: batch.weighing_one(model))
        with probe:
            LOSSES["mean"](batch, batch.logits(model, "ids")).backward()
        assert_truth(probe.report(), truth, rtol=1e-9, gram=False, vanishing=("qkv.bias",))
        proved.append(probe.report().proof.proved)
        model.zero_grad()
    assert proved == [1] * 14 + [0, 0]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("added", ["by index", "one by one"])
def test_documents_of_equal_lengths_say_nothing_of_the_next_batch(added: str, flat: bool) -> None:
    """Without ids, by totals of each document: rows of the same number are divided otherwise."""
    model = reader()
    probe = zerosum.Probe(model, num_examples=8)
    for lengths in ((2,) * 8, (1, 3, 2, 1, 4, 1, 2, 2)):
        batch = Batch(lengths, flat=flat)
        ids = batch.ids.flatten()
        truth = truth_of(model, lambda batch=batch: batch.alone(model))
        with probe:
            logits = model(batch.tokens, batch.ids, batch.positions).flatten(0, -2)
            rows = F.cross_entropy(logits, batch.targets.flatten(), reduction="none")
            if added == "by index":
                rows.new_zeros(8).index_add(0, ids, rows).sum().backward()
            else:
                torch.stack([part.sum() for part in rows.split(lengths)]).sum().backward()
        assert_truth(probe.report(), truth, rtol=1e-9, gram=False, vanishing=("qkv.bias",))
        model.zero_grad()


class Sorting(nn.Module):
    """Sorts its rows by the data, uses a weight, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.middle, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.tokens(tokens)
        x = x if x.ndim == 3 else x[None]
        order = x.detach()[..., 0].argsort(dim=-1)
        moved = torch.tanh(self.middle(x.gather(1, order[..., None].expand_as(x))))
        return self.head(moved.gather(1, order.argsort(-1)[..., None].expand_as(x))).view(*tokens.shape, -1)


def test_rows_that_the_data_sorts_are_named_in_every_pass() -> None:
    torch.manual_seed(0)
    model = Sorting().double()
    probe = zerosum.Probe(model)
    for k in range(3):
        batch = Batch((1, 3, 2, 1, 4, 1, 2, 2), seed=k)
        truth = truth_of(model, lambda batch=batch: batch.weighing_one(model))
        with probe:
            LOSSES["mean"](batch, batch.logits(model, "ids")).backward()
        assert_truth(probe.report(), truth, rtol=1e-9, gram=False)
        assert probe.report().proof.proved == 1
        model.zero_grad()


def test_micro_batches_have_documents_of_their_own() -> None:
    """Ids hold for one backward pass: what comes without any is not divided by those of the pass before."""
    model = reader()
    batches = [Batch((4, 5, 3)), Batch((6, 6), seed=2), Batch((5, 5, 1, 1), seed=3)]
    valid, count = sum(b.valid for b in batches), sum(len(b.lengths) for b in batches)
    truth = truth_of(model, lambda: torch.cat([b.alone(model) for b in batches]) * count / valid)
    probe = zerosum.Probe(model)
    with probe:
        for batch in batches:
            F.cross_entropy(batch.logits(model, "ids")[0], batch.targets[0], reduction="sum").backward()
    assert probe.report().num_examples == count
    assert_truth(probe.report(), truth, rtol=1e-9, gram=False, vanishing=("qkv.bias",))
    with probe:
        F.cross_entropy(batches[0].logits(model, "ids")[0], batches[0].targets[0]).backward()
        b = batches[1]
        F.cross_entropy(model(b.tokens, b.ids, b.positions)[0], b.targets[0]).backward()
    assert probe.report().num_examples == 3 + 1


@pytest.mark.parametrize("lengths", [(4, 5, 3), (3, 3, 3), (2, 2)])
def test_without_a_proof_shapes_say_whose_rows_are_whose(lengths: tuple[int, ...]) -> None:
    model, batch = reader(), Batch(lengths, padding=1)
    check(
        model,
        lambda: batch.weighing_one(model),
        lambda: LOSSES["mean"](batch, batch.logits(model, "ids")).backward(),
        verify="never",
        vanishing=("qkv.bias",),
    )


def test_where_documents_start() -> None:
    """At position 0, where positions do not increase, behind padding, and with each row, whatever its position is."""
    positions = torch.tensor([[5, 6, -1, 3, 4, 0, 0, 1, 1], [0, 1, 2, 1, 2, 7, -1, -1, -1]])
    model = reader()
    with (probe := zerosum.Probe(model)):
        zerosum.example_ids(torch.zeros_like(positions), position_ids=positions)
        labels = probe._capture.prover.declared.labels
    assert labels.tolist() == [[0, 0, -1, 1, 1, 2, 3, 3, 4], [5, 5, 5, 6, 6, 6, -1, -1, -1]]


def test_padding_counts_for_no_document() -> None:
    """The first document has no loss. Padding has targets, whose losses are multiplied by 0."""
    model, batch = reader(), Batch((2, 4, 3), padding=2)
    batch.targets[0, :2] = -100
    batch.documents[0][1].fill_(-100)
    mask = batch.targets[0] != -100
    batch.targets[0, -2:] = 0

    def step() -> None:
        rows = F.cross_entropy(batch.logits(model, "ids")[0], batch.targets[0], reduction="none")
        ((rows * mask).sum() / mask.sum()).backward()

    check(model, lambda: batch.alone(model) * 2 / int(mask.sum()), step, vanishing=("qkv.bias",))


# What is refused ------------------------------------------------------------------------------------------------------------------


def assert_refused(model: nn.Module, step: Callable[[], None], message: str) -> None:
    """A warning, and no parameter is covered."""
    probe = zerosum.Probe(model)
    with pytest.warns(UserWarning, match=message), probe:
        step()
    assert not list(probe.report()), "covered all the same"


def test_attention_that_crosses_documents_is_said() -> None:
    model, batch = reader(), Batch((4, 5, 3))
    one = torch.zeros_like(batch.ids)
    probe = zerosum.Probe(model)
    with pytest.warns(UserWarning, match="serve several examples"), probe:
        LOSSES["mean"](batch, model(batch.declare("ids"), one, batch.positions)).backward()
    report = probe.report()
    assert set(report.coverage.not_covered) >= {"tokens.weight", "positions.weight", "qkv.weight"}
    truth = truth_of(model, lambda: torch.stack([x.sum() for x in rows_of(model, batch, one)]) * 3 / batch.valid)
    assert_truth(report, {name: truth[name] for name in report}, rtol=1e-9, gram=False, vanishing=("qkv.bias",))


def rows_of(model: Reader, batch: Batch, ids: Tensor) -> list[Tensor]:
    rows = F.cross_entropy(model(batch.tokens, ids, batch.positions)[0], batch.targets[0], reduction="none")
    return [rows[batch.ids[0] == k] for k in range(len(batch.lengths))]


@pytest.mark.parametrize("lengths", [(4, 5, 3), (5,)])
def test_padding_that_has_a_loss_is_refused(lengths: tuple[int, ...]) -> None:
    model, batch = reader(), Batch(lengths, padding=2)
    batch.targets.clamp_(min=0)
    step = lambda: LOSSES["mean"](batch, batch.logits(model, "ids")).backward()  # noqa: E731
    assert_refused(model, step, "rows that belong to no example have a loss")


def test_ids_of_other_rows_than_the_losses_are_refused() -> None:
    """The rows are turned around before the head: their number fits, and they are not the declared ones."""
    model, batch = reader(), Batch((4, 5, 3))

    def step() -> None:
        h = model.body(batch.declare("ids"), batch.ids, batch.positions)
        F.cross_entropy(model.head(h.flip(1))[0], batch.targets[0]).backward()

    assert_refused(model, step, "rows that zerosum.example_ids assigns to other examples")


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({}, TypeError, "expected one of ids, cu_seqlens and position_ids, got none"),
    ({"ids": torch.zeros(5).long(), "position_ids": torch.zeros(5).long()}, TypeError, "got ids, position_ids"),
    ({"ids": [0, 1]}, TypeError, "ids: expected a torch.Tensor of integers, got list"),
    ({"ids": torch.zeros(4).long()}, ValueError, r"ids: expected 5 integers, one per row, got torch.int64 \(4,\)"),
    ({"ids": torch.zeros(5)}, ValueError, "ids: expected 5 integers, one per row, got torch.float32"),
    ({"ids": torch.zeros(2, 5).long()}, ValueError, r"ids: expected integers \(1, 5\), one per row"),
    ({"ids": torch.full((5,), -2)}, ValueError, "ids: expected values >= 0, or -1 for rows of no example, got -2"),
    ({"ids": torch.full((5,), -1)}, ValueError, "ids: expected at least one row that belongs to an example, got none of 5"),
    ({"ids": torch.tensor([0, 1, 2, 3, 4])}, ValueError, r"ids: expected values in \[0, 4\), got 0 to 4; num_examples is 4"),
    ({"position_ids": torch.zeros(3, 1, 5).long()}, ValueError, "position_ids: expected 5 integers"),
    ({"position_ids": torch.zeros(1, 5).long()}, ValueError, "position_ids: expected at most 4 documents, got 5"),
    ({"cu_seqlens": torch.tensor([0])}, ValueError, r"cu_seqlens: expected N \+ 1 integers, got torch.int64 \(1,\)"),
    ({"cu_seqlens": torch.tensor([1, 5])}, ValueError, r"from 0 to at most 5 rows, got \[1, 5\]"),
    ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"from 0 to at most 5 rows, got \[0, 6\]"),
    ({"cu_seqlens": torch.tensor([0, 3, 2])}, ValueError, r"expected increasing numbers .* got \[0, 3, 2\]"),
    ({"cu_seqlens": torch.tensor([0, 3, 3, 5])}, ValueError, r"got an empty one at index 1; cu_seqlens.unique_consecutive\(\)"),
])  # fmt: skip
def test_arguments_that_are_wrong_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    tokens = torch.zeros(1, 5).long()
    with zerosum.Probe(reader(), num_examples=4), pytest.raises(error, match=message):
        zerosum.example_ids(tokens, **arguments)


def test_cumulative_lengths_are_of_one_row() -> None:
    with zerosum.Probe(reader()), pytest.raises(ValueError, match=r"x: expected a single row of documents .* got \(2, 5\)"):
        zerosum.example_ids(torch.zeros(2, 5).long(), cu_seqlens=torch.tensor([0, 5]))


def test_two_batches_before_one_backward_pass_are_refused() -> None:
    tokens = torch.zeros(5).long()
    with zerosum.Probe(reader()):
        zerosum.example_ids(tokens, torch.tensor([0, 0, 1, 1, 1]))
        zerosum.example_ids(tokens, cu_seqlens=torch.tensor([0, 2, 5]))  # the same
        with pytest.raises(ValueError, match="different rows were declared before, without a backward pass in between"):
            zerosum.example_ids(tokens, torch.tensor([0, 0, 0, 1, 1]))
    with zerosum.Probe(reader(), "position"), pytest.raises(RuntimeError, match="expected a probe with examples='sequence'"):
        zerosum.example_ids(tokens, tokens)


def test_without_a_probe_nothing_happens() -> None:
    tokens = torch.zeros(5).long()
    assert zerosum.example_ids(tokens, position_ids=tokens) is tokens
