"""What fine-tuning libraries do to weights: heads on rows in no regular order, and frozen weights that are wrapped anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zerosum
import zsl_kernels as zk
from tests.zerosum.oracle import assert_covers, assert_truth, per_example_gradients, trainable


class Picked(nn.Module):
    """A head that never holds logits, on the rows that have targets, in an order of their own; tied to the embedding or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(13, 6, dtype=torch.float64)
        self.body = nn.Linear(6, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 13, bias=False, dtype=torch.float64)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        h = self.body(self.embedding(x)).tanh().flatten(0, 1)
        found = zk.linear_cross_entropy(h[rows][None], self.head.weight, targets.flatten()[rows][None], vocabulary_chunk=5)
        return h.new_zeros(len(h)).index_put((rows,), found[0]).view(x.shape)


@pytest.mark.parametrize("tied", [False, True])
def test_a_streamed_head_on_picked_rows_is_covered(tied: bool) -> None:
    model = Picked(tied)
    x, targets = torch.randint(13, (4, 5)), torch.randint(13, (4, 5))
    rows = torch.randperm(20)[:15]
    losses = model(x, targets, rows).sum(1)
    truth = per_example_gradients(losses, model, trainable(model))
    direction = {name: torch.randn_like(model.get_parameter(name)) for name in trainable(model)}
    probe = zerosum.Probe(model, gram=True, direction=direction, loss_reduction="sum")
    for _ in range(3):
        model.zero_grad()
        with probe:
            model(x, targets, rows).sum(1).sum().backward()
        assert_truth(probe.report(), truth, direction)
        assert_covers(probe.report(), model, truth)


class Magnitude(nn.Module):
    """DoRA of a transposed frozen weight: its norm is made of a new Parameter, and detached."""

    def __init__(self, of_data: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Parameter(torch.randn(5, 7, dtype=torch.float64), requires_grad=False)
        self.magnitude = nn.Parameter(torch.rand(7, dtype=torch.float64) + 1)
        self.of_data = of_data

    def forward(self, x: Tensor) -> Tensor:
        weight = nn.Parameter(self.frozen.T)
        norm = torch.linalg.norm(weight + (x.mean((0, 1)) if self.of_data else 0.5), dim=1).detach()
        return (x @ self.frozen) * (self.magnitude / norm).view(1, -1)


def test_a_frozen_weight_in_a_new_parameter_is_no_data() -> None:
    model = Magnitude(of_data=False)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    truth = per_example_gradients(model(x).square().flatten(1).sum(1), model, trainable(model))
    probe = zerosum.Probe(model)
    with probe:
        model(x).square().flatten(1).sum(1).sum().backward()
    assert_truth(probe.report(), truth, gram=False)
    assert_covers(probe.report(), model, truth)


@pytest.mark.filterwarnings("ignore:zerosum.Probe:UserWarning")
def test_with_data_added_it_is_never_wrong() -> None:
    """The norm is then made of all examples' data, and may be refused."""
    model = Magnitude(of_data=True)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    truth = per_example_gradients(model(x).square().flatten(1).sum(1), model, trainable(model))
    probe = zerosum.Probe(model)
    with probe:
        model(x).square().flatten(1).sum(1).sum().backward()
    assert_truth(probe.report(), truth, gram=False, refusable=True)
