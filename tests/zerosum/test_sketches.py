"""Sketches of examples' gradients, against gradients that are held."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum
import zsl_kernels as zk
from tests.zerosum.oracle import assert_unchanged, error, per_example_gradients, snapshot, trainable
from tests.zerosum.test_grams import T, V, gpt, losses_of, tokens
from zerosum.sketches import as_matrix


class Uses(nn.Module):
    """Uses of weights of every kind: slices of one, a head tied to an embedding, a convolution, a scale, experts' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 6, padding_idx=0)
        self.fused = nn.Parameter(torch.randn(12, 6))
        self.columns = nn.Parameter(torch.randn(6, 10))
        self.across = nn.Parameter(torch.randn(6, 6))
        self.convolution = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        h = F.linear(h, self.fused[:6]) * F.linear(h, self.fused[6:]).sigmoid()
        h = F.linear(h, self.columns[:, 2:8]) + h @ self.across
        h = self.norm(h + self.convolution(h.mT).mT)
        flat, which = h.flatten(0, 1), x.flatten() % 2
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            out = out.index_add(0, (mine := (which == k).nonzero().flatten()), expert(flat[mine]))
        return (h + out.view_as(h)) @ self.embedding.weight.T


class Streamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Embedding(V, 6), nn.Linear(6, V, bias=False)


def uses_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).mT, y, reduction="none").mean(1)


def streamed_losses(model: Streamed, x: Tensor, y: Tensor) -> Tensor:
    return zk.linear_cross_entropy(model.body(x), model.head.weight, y).mean(1)


def projected(sketch: zerosum.Sketch, model: nn.Module, gradients: dict[str, Tensor]) -> Tensor:
    """By the definition: the inner products with the matrices of signs."""
    total = 0
    for name, g in gradients.items():
        rows, columns = sketch._probe.signs(name, model.get_parameter(name))
        assert set(rows.unique().tolist()) == {-1, 1}
        R, C = as_matrix(model.get_parameter(name).shape)
        columns = torch.ones(1, rows.shape[1], dtype=rows.dtype) if columns is None else columns
        assert (len(rows), len(columns)) == (R, C)
        total = total + torch.einsum("nrc,rk,ck->nk", g.reshape(len(g), R, C), rows, columns)
    return total / rows.shape[1] ** 0.5


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "gpt": (gpt, losses_of),
    "uses": (Uses, uses_losses),
    "streamed head": (Streamed, streamed_losses),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sketch_is_the_gradients_inner_products_with_the_signs(case: str) -> None:
    torch.manual_seed(0)
    build, losses = CASES[case]
    model = build().double()
    sketch = zerosum.Sketch(model, losses, width=7, seed=3)
    for n in (4, 9, 9, 9):  # when it is proved, and after
        batch = tokens(n, n)
        found = sketch(*batch)
        truth = per_example_gradients(losses(model, *batch), model, trainable(model))
        assert found.dtype == torch.float64
        assert error(found, projected(sketch, model, truth)) < 1e-10


def test_its_columns_are_unbiased_and_within_their_bound() -> None:
    """Of 20,000 independent columns. A mean of them is within 5 of its standard errors; and E ⟨g, p qᵀ⟩² ⟨h, p qᵀ⟩² ≤ 9 ‖g‖² ‖h‖²,
    with equality for one row and one column of many entries."""
    model, batch, width = gpt(), tokens(5, 1), 20_000
    rows = zerosum.Sketch(model, losses_of, width=width)(*batch)
    g = per_example_gradients(losses_of(model, *batch), model, trainable(model))
    flat = torch.cat([part.flatten(1) for part in g.values()], 1)
    exact, norms = flat @ flat.T, flat.norm(dim=1)
    products = rows[:, None, :] * rows[None, :, :] * width  # (N, N, width): one estimate for each column
    spread = products.std(2)
    assert ((products.mean(2) - exact).abs() <= 5 * spread / width**0.5).all()
    scale = norms[:, None] * norms
    assert (spread <= 3 * scale).all()
    # Near Gaussian directions' here, within a factor: many weights share the gradient.
    gaussian = (scale.square() + exact.square()).sqrt()
    assert ((spread > 0.5 * gaussian) & (spread < 2 * gaussian)).all()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(40, 40, dtype=torch.float64))

    def one_row_one_column(model: Outer, a: Tensor) -> Tensor:
        return (F.linear(a, model.weight) * torch.ones(40, dtype=a.dtype)).sum(1)

    model, a = Outer(), torch.ones(1, 40, dtype=torch.float64)
    rows = zerosum.Sketch(model, one_row_one_column, width=width)(a)
    fourth = (rows**4).mean() * width**2 / 1600.0**2
    expected = (3 - 2 / 40) ** 2  # of sums of 40 signs
    assert abs(fourth - expected) < 0.1 * expected
    assert expected < 9


def test_sketches_of_one_seed_go_together() -> None:
    """In other batches, objects and processes; those of another seed do not."""
    model, batch = gpt(), tokens(6, 1)
    whole = zerosum.Sketch(model, losses_of, width=16)(*batch)
    sketch = zerosum.Sketch(model, losses_of, width=16)
    parts = torch.cat([sketch(*(x[k : k + 3] for x in batch)) for k in (0, 3)])
    assert error(parts, whole) < 1e-11
    assert error(zerosum.Sketch(model, losses_of, width=16, seed=1)(*batch), whole) > 0.5
    assert sketch._probe.signs("head.weight", model.head.weight)[0][:8, 0].tolist() == [1, 1, 1, -1, -1, -1, 1, 1]


def test_some_parameters_and_the_model_as_it_was() -> None:
    model, batch = gpt(torch.float32), tokens(4, 1)
    losses_of(model, *batch).sum().backward()
    kept = {name: p.grad for name, p in model.named_parameters()}
    before = snapshot(model)
    sketch = zerosum.Sketch(model, losses_of, width=5, parameters=["head.weight"])
    found = sketch(*batch)
    assert_unchanged(snapshot(model), before)
    assert all(p.grad is kept[name] for name, p in model.named_parameters())
    truth = per_example_gradients(losses_of(model, *batch), model, ["head.weight"])
    assert found.dtype == torch.float32
    # Sums of 5 positions, 8 columns and 11 rows in float32, of terms whose squares have the mean ‖g‖² / width.
    assert error(found, projected(sketch, model, truth)) < 30 * torch.finfo(torch.float32).eps * T


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_parameter_that_is_not_covered_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def mixed(model: nn.Module, x: Tensor) -> Tensor:
        h = model[0](x)
        return model[1]((h - h.mean(0)).relu()).square().sum(1)

    with pytest.raises(RuntimeError, match=r"parameters: the per-example gradients of '0.(weight|bias)' are not known"):
        zerosum.Sketch(model, mixed)(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"losses": 3}, TypeError, "losses: expected a function"),
        ({"width": 0}, ValueError, "width: expected a positive integer, got 0"),
        ({"seed": "one"}, TypeError, "seed: expected an integer, got str"),
        ({"parameters": ["nothing"]}, ValueError, "parameters: 'nothing' is not a trainable parameter"),
        ({"losses": lambda model, x, y: 3.0}, ValueError, r"losses: expected one for each of 4 examples, \(4,\), got float"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_not_expected_is_refused_by_name(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        zerosum.Sketch(gpt(), **({"losses": losses_of} | change))(*tokens(4, 1))
