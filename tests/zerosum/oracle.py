"""The truth for a probe: one backward pass for each example."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def per_example_gradients(losses: Tensor, model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """(N, *parameter.shape) for each name; zeros where a loss does not depend on the parameter."""
    names = list(names)
    parameters = [model.get_parameter(name) for name in names]
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return {
        name: torch.stack([torch.zeros_like(parameters[k]) if row[k] is None else row[k] for row in rows])
        for k, name in enumerate(names)
    }


def expected_fields(g: Tensor, direction: Tensor | None = None) -> dict[str, Tensor]:
    """Every raw result of a parameter from its materialized gradients."""
    flat = g.flatten(1)
    fields = {
        "grad_sum": g.sum(0),
        "abs_sum": g.abs().sum(0),
        "sq_sum": g.square().sum(0),
        "l1": flat.abs().sum(1),
        "sq_norm": flat.square().sum(1),
        "gram": flat @ flat.T,
    }
    if direction is not None:
        p = flat * direction.flatten()
        fields |= {"dot": p.sum(1), "abs_dot": p.abs().sum(1)}
    return fields
