"""The metrics against their definitions on materialized numbers, their nulls against random signs, and the exact identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import zsl_kernels as zk
from zerosum.metrics import add_coordinates, gradient_metrics, number_interference


def metrics_of(g: Tensor, u: Tensor | None = None, gram: bool = False) -> dict:
    """Through the sums, as a report does it; g is (N, P)."""
    coordinates = zk.coordinate_sums(g.sum(0), g.abs().sum(0), g.square().sum(0), direction=u)
    dot = None if u is None else g @ u
    return gradient_metrics(coordinates, g.abs().sum(1), g.square().sum(1), dot, g @ g.T if gram else None)


def draw(n: int = 6, p: int = 500, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, p, generator=generator, dtype=torch.float64) + 0.3 * torch.randn(p, generator=generator, dtype=torch.float64)
    return g, torch.randn(p, generator=generator, dtype=torch.float64)


def test_each_metric_is_its_definition() -> None:
    g, u = draw()
    n = len(g)
    found = {name: metric.value for name, metric in metrics_of(g, u, gram=True).items()}
    p = g * u
    cosine = torch.nn.functional.cosine_similarity(g[:, None], g[None], dim=2)[torch.ones(n, n).triu(1).bool()]
    pair_dot = (g @ g.T)[~torch.eye(n, dtype=torch.bool)].mean()
    expected = {
        "D_grad": (1 - g.sum(0).abs() / g.abs().sum(0)).mean(),
        "grad_norm": g.mean(0).norm(),
        "example_norm": g.norm(dim=1).square().mean().sqrt(),
        "example_l1": g.abs().sum(1).mean(),
        "mean_dot_ratio": pair_dot / g.square().sum(1).mean(),
        "C_g": p.sum(0).abs().sum() / p.abs().sum(),
        "C_uG": p.sum().abs() / p.sum(0).abs().sum(),
        "C_ug": p.sum(1).abs().sum() / p.abs().sum(),
        "C": p.sum().abs() / p.sum(1).abs().sum(),
        "D": 1 - p.sum().abs() / p.sum(1).abs().sum(),
        "M": p.sum(1).abs().mean(),
        "mean_cosine": cosine.mean(),
        "negative_pairs": (cosine < 0).double().mean(),
        # tr Σ with Bessel's correction over |G|² less its own noise
        "noise_scale": g.var(0).sum() / (g.mean(0).square().sum() - g.var(0).sum() / n),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-9), name


def test_the_identity_of_the_decomposition_is_exact() -> None:
    found = metrics_of(*draw(seed=1))
    assert found["C"].value == pytest.approx(found["C_g"].value * found["C_uG"].value / found["C_ug"].value, rel=1e-12)


def test_mean_change_is_magnitude_times_constructive_interference() -> None:
    found = number_interference(torch.randn(50, generator=torch.Generator().manual_seed(2)))
    assert abs(found["mean"].value) == pytest.approx(found["M"].value * (1 - found["D"].value), rel=1e-12)
    assert found["C"].value + found["D"].value == pytest.approx(1)


@pytest.mark.parametrize("n", [16, 64])
def test_the_null_is_what_random_signs_give(n: int) -> None:
    g, _ = draw(n, 2000, seed=3)
    signs = torch.randint(0, 2, (200, n), generator=torch.Generator().manual_seed(4)) * 2.0 - 1
    flipped = torch.stack([1 - ((g * s[:, None]).sum(0).abs() / g.abs().sum(0)).mean() for s in signs.double()])
    # √(2/π) is the limit of many examples: the Gaussian approximation is off by O(1/n).
    assert metrics_of(g)["D_grad"].null == pytest.approx(flipped.mean().item(), abs=1 / (4 * n))
    x = g[:, 0]
    numbers = ((signs.double() @ x).abs() / x.abs().sum()).mean().item()
    assert number_interference(x)["C"].null == pytest.approx(numbers, rel=0.2)


def test_opposed_examples_cancel_and_equal_ones_do_not() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    assert metrics_of(torch.cat([x, -x]))["D_grad"].value == 1
    assert metrics_of(torch.cat([x, x]))["D_grad"].value == 0


def test_coordinates_that_no_example_touches_do_not_count() -> None:
    g, _ = draw(p=10)
    padded = torch.cat([g, torch.zeros(len(g), 7, dtype=torch.float64)], 1)
    assert metrics_of(padded)["D_grad"].value == pytest.approx(metrics_of(g)["D_grad"].value, rel=1e-12)
    nothing = metrics_of(torch.zeros(3, 4, dtype=torch.float64))
    assert math.isnan(nothing["D_grad"].value)


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    g, u = draw()
    parts = [
        zk.coordinate_sums(x.sum(0), x.abs().sum(0), x.square().sum(0), direction=v)
        for x, v in zip(g.split(123, 1), u.split(123), strict=True)
    ]
    whole = zk.coordinate_sums(g.sum(0), g.abs().sum(0), g.square().sum(0), direction=u)
    assert add_coordinates(parts) == pytest.approx(whole, rel=1e-12)


def test_nan_and_a_single_example_come_through() -> None:
    g, u = draw(n=1)
    single = metrics_of(g, u, gram=True)
    assert single["D_grad"].value == 0
    assert math.isnan(single["noise_scale"].value)
    g[0, 0] = math.nan
    assert math.isnan(metrics_of(g)["D_grad"].value)
    assert math.isnan(number_interference(torch.tensor([1.0, math.nan]))["D"].value)
    assert math.isnan(number_interference(torch.tensor([]))["D"].value)
