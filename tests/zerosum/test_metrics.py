"""The metrics against their definitions on materialized numbers, their nulls against random signs, and the exact identities."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zerosum
import zsl_kernels as zk
from zerosum.metrics import Metric, NumberSums, add_coordinates, block_diagonal, gradient_metrics, number_interference


def metrics_of(g: Tensor, u: Tensor | None = None, gram: bool = False) -> dict[str, Metric]:
    """Through the sums, as a report does it; g is (N, P)."""
    coordinates = zk.coordinate_sums(g.sum(0), g.abs().sum(0), g.square().sum(0), direction=u)
    dot = None if u is None else g @ u
    return gradient_metrics(coordinates, g.abs().sum(1), g.square().sum(1), dot, g @ g.T if gram else None, size=g.shape[1])


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
        "touched": p.shape[1],
        "untouched": 0,
        "mean_cosine": cosine.mean(),
        "cosine_std": cosine.std(),
        "cosine_q05": cosine.quantile(0.05),
        "cosine_median": cosine.quantile(0.5),
        "cosine_q95": cosine.quantile(0.95),
        "negative_pairs": (cosine < 0).double().mean(),
        "opposed_examples": ((g * (g.sum(0) - g)).sum(1) < 0).double().mean(),
        "noise_trace": g.var(0).sum(),  # with Bessel's correction
        "grad_norm_sq": pair_dot,
        # tr Σ over |G|² less its own noise
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


# What random signs give.


SIGNS = 2000


@cache
def under_random_signs(n: int) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
    """The metrics of some gradients, and those of the same gradients with random signs, drawn again and again."""
    g, u = draw(n, 300, seed=3)
    signs = torch.randint(0, 2, (SIGNS, n), generator=torch.Generator().manual_seed(4)).double() * 2 - 1
    drawn = [metrics_of(g * s[:, None], u, gram=True) for s in signs]
    return metrics_of(g, u, gram=True), {name: np.array([metrics[name].value for metrics in drawn]) for name in drawn[0]}


# Relative to the null. √(2/π) is the limit of many examples; see gradient_metrics for the others that are not exact.
APPROXIMATE = {
    "D_grad": 0.01,
    "C_g": 0.02,
    "C_uG": 0.03,
    "C": 0.02,
    "D": 0.01,
    "grad_norm": 0.02,
    "cosine_q05": 0.06,
    "cosine_q95": 0.06,
}
EXACT = (
    "noise_trace",
    "grad_norm_sq",
    "mean_dot_ratio",
    "mean_cosine",
    "cosine_median",
    "negative_pairs",
    "cosine_std",
    "opposed_examples",
)


@pytest.mark.parametrize("n", [16, 40])
def test_every_null_is_what_random_signs_give(n: int) -> None:
    found, flipped = under_random_signs(n)
    assert {name for name, metric in found.items() if metric.null is not None} == {*APPROXIMATE, *EXACT}
    for name, metric in found.items():
        if metric.null is not None:
            noise = 4 * flipped[name].std() / math.sqrt(SIGNS)
            assert flipped[name].mean() == pytest.approx(metric.null, rel=APPROXIMATE.get(name, 0.005), abs=noise), name


def test_what_has_no_null_does_not_depend_on_signs() -> None:
    found, flipped = under_random_signs(16)
    for name in found.keys() - {*APPROXIMATE, *EXACT, "noise_scale"}:  # (random signs have no gradient, hence no noise scale)
        np.testing.assert_allclose(flipped[name], found[name].value, rtol=1e-9)


def test_the_nulls_of_numbers_are_what_random_signs_give() -> None:
    x = draw(30, 1, seed=5)[0].flatten()
    found = number_interference(x)
    signs = torch.randint(0, 2, (SIGNS, 30), generator=torch.Generator().manual_seed(6)).double() * 2 - 1
    drawn = [number_interference(x * s) for s in signs]
    for name in ("C", "D", "mean"):
        values = np.array([metrics[name].value for metrics in drawn])
        assert values.mean() == pytest.approx(found[name].null, rel=0.02, abs=4 * values.std() / math.sqrt(SIGNS)), name
    assert found["M"].null is None


# What infinitely many examples would give.


def test_debiased_interference_is_nearer_to_that_of_infinitely_many() -> None:
    n, repeats = 16, 10_000
    noise = torch.randn(repeats, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    worst = {"value": 0.0, "debiased": 0.0}
    for errors in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 8.0):  # standard errors from the mean to zero
        mean = errors / math.sqrt(n)
        x = noise + mean
        size = math.sqrt(2 / math.pi) * math.exp(-(mean**2) / 2) + mean * math.erf(mean / math.sqrt(2))  # E|x|
        found = [NumberSums(n, *sums).metrics() for sums in torch.stack([x.sum(1), x.abs().sum(1), x.square().sum(1)], 1).tolist()]
        bias = {key: np.mean([getattr(metrics["C"], key) for metrics in found]) - mean / size for key in worst}
        assert all(metrics["D"].debiased == 1 - metrics["C"].debiased for metrics in found)
        if errors <= 0.5:
            assert abs(bias["debiased"]) < 0.5 * bias["value"], errors
        worst = {key: max(worst[key], abs(bias[key])) for key in worst}
    assert worst["debiased"] < 0.5 * worst["value"]


@pytest.mark.parametrize("signal", [0.0, 0.02, 0.1])
def test_the_debiased_gradient_norm_is_nearer_to_the_true_one(signal: float) -> None:
    n, p, repeats = 8, 200, 400
    generator = torch.Generator().manual_seed(8)
    mean = signal * torch.randn(p, generator=generator, dtype=torch.float64)
    found = [metrics_of(mean + torch.randn(n, p, generator=generator, dtype=torch.float64))["grad_norm"] for _ in range(repeats)]
    plain, debiased = (np.mean([getattr(metric, key) for metric in found]) - mean.norm().item() for key in ("value", "debiased"))
    assert abs(debiased) < 0.25 * plain


def test_debiased_values_of_equal_and_of_single_examples() -> None:
    equal = number_interference(torch.full((5,), 3.0))
    assert equal["C"].debiased == pytest.approx(1)
    opposed = number_interference(torch.tensor([1.0, -1.0]))
    assert opposed["C"].debiased == 0
    assert number_interference(torch.ones(1))["C"].debiased is None
    assert metrics_of(torch.ones(1, 3, dtype=torch.float64))["grad_norm"].debiased is None


# Degenerate examples and coordinates.


def test_opposed_examples_cancel_and_equal_ones_do_not() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    assert metrics_of(torch.cat([x, -x]))["D_grad"].value == 1
    assert metrics_of(torch.cat([x, x]))["D_grad"].value == 0


def test_coordinates_that_no_example_touches_do_not_count_and_are_counted() -> None:
    g, _ = draw(p=10)
    padded = metrics_of(torch.cat([g, torch.zeros(len(g), 7, dtype=torch.float64)], 1))
    assert padded["D_grad"].value == pytest.approx(metrics_of(g)["D_grad"].value, rel=1e-12)
    assert (padded["touched"].value, padded["untouched"].value) == (10, 7)
    nothing = metrics_of(torch.zeros(3, 4, dtype=torch.float64))
    assert math.isnan(nothing["D_grad"].value)
    assert (nothing["touched"].value, nothing["untouched"].value) == (0, 4)


class Language(nn.Module):
    """An embedding, and a layer and a head behind it, of which there may be none or which may be tied to it."""

    def __init__(self, tied: bool, layer: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6) if layer else None
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x if self.layer is None else self.layer(x).tanh())


def probed(model: nn.Module) -> zerosum.Report:
    tokens = torch.tensor([[1, 2, 3], [3, 4, 5], [1, 5, 5]])
    probe = zerosum.Probe(model.double())
    with probe:
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="sum").backward()
    return probe.report()


@pytest.mark.parametrize("tied", [False, True])
def test_d_grad_leaves_embeddings_and_heads_tied_to_one_out(tied: bool) -> None:
    torch.manual_seed(9)
    report = probed(Language(tied))
    outside = ["layer.weight", "layer.bias"] + ([] if tied else ["head.weight"])
    shares = torch.cat([(report[name].grad_sum.abs() / report[name].abs_sum).flatten() for name in outside])
    everything = torch.cat([(report[name].grad_sum.abs() / report[name].abs_sum).flatten() for name in report])
    found = report.metrics
    assert found["D_grad"].value == pytest.approx(1 - shares.nanmean().item(), rel=1e-12)
    assert found["D_grad_all"].value == pytest.approx(1 - everything.nanmean().item(), rel=1e-12)
    assert (found["touched"].value, found["untouched"].value) == (len(shares), 0)
    untouched = 0 if tied else 6 * 6  # rows of the embedding that were not looked up; a head reaches them all
    assert (found["touched_all"].value, found["untouched_all"].value) == (len(everything) - untouched, untouched)
    own = report["embedding.weight"].metrics
    assert own["D_grad"].value == pytest.approx(1 - everything[: 11 * 6].nanmean().item(), rel=1e-12)
    assert "D_grad_all" not in own


def test_where_all_is_embedding_d_grad_has_no_value() -> None:
    found = probed(Language(tied=True, layer=False)).metrics
    assert math.isnan(found["D_grad"].value)
    assert found["touched"].value == 0
    assert 0 < found["D_grad_all"].value < 1


def test_experts_that_are_looked_up_are_no_embedding() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(11, 4))
            self.experts = nn.Parameter(torch.randn(3, 4, 11))

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.einsum("ntk,ntko->nto", self.table[tokens], self.experts[tokens % 3])

    torch.manual_seed(12)
    report = probed(Experts())
    assert {name: report[name].is_embedding for name in report} == {"table": True, "experts": False}
    assert report.metrics["D_grad"].value == report["experts"].metrics["D_grad"].value


# Micro-batches.


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


def test_sums_of_numbers_add_in_any_grouping() -> None:
    x = torch.randn(31, generator=torch.Generator().manual_seed(10))
    a, b, c = (NumberSums.of(part) for part in x.split([7, 1, 23]))
    whole = NumberSums.of(x)
    for merged in ((a + b) + c, a + (b + c), (c + a) + b):
        assert vars(merged) == pytest.approx(vars(whole), rel=1e-12)
    for name, metric in (a + b + c).metrics().items():
        expected = whole.metrics()[name]
        assert metric.n == expected.n == 31
        assert (metric.value, metric.null or 0, metric.debiased or 0) == pytest.approx(
            (expected.value, expected.null or 0, expected.debiased or 0), rel=1e-12
        )


def test_pairs_in_different_micro_batches_do_not_count() -> None:
    g, _ = draw(9)
    blocks = [part @ part.T for part in g.split([4, 1, 4])]
    found = gradient_metrics(zk.coordinate_sums(*[g.abs().sum(0)] * 3), g[:, 0], g[:, 0], gram=block_diagonal(blocks))
    known = torch.cat(
        [nn.functional.cosine_similarity(x[:, None], x[None], dim=2)[torch.ones(4, 4).triu(1).bool()] for x in (g[:4], g[5:])]
    )
    assert found["mean_cosine"].value == pytest.approx(known.mean().item(), rel=1e-9)
    assert found["cosine_std"].value == pytest.approx(known.std().item(), rel=1e-9)
    assert found["negative_pairs"].value == pytest.approx((known < 0).double().mean().item())
    others = torch.cat([(x * (x.sum(0) - x)).sum(1) for x in (g[:4], g[5:])])  # without the fifth example, which is alone
    assert found["opposed_examples"].value == pytest.approx((others < 0).double().mean().item())
    alone = gradient_metrics(
        zk.coordinate_sums(*[g.abs().sum(0)] * 3), g[:, 0], g[:, 0], gram=block_diagonal([x[:1, :1] for x in blocks])
    )
    assert math.isnan(alone["mean_cosine"].value)


def test_an_example_that_is_not_a_number_shows_in_the_cosines() -> None:
    g, _ = draw(4)
    g[2, 0] = math.nan
    found = metrics_of(g, gram=True)
    names = ("mean_cosine", "cosine_std", "cosine_q95", "negative_pairs", "opposed_examples")
    assert all(math.isnan(found[name].value) for name in names)


def test_examples_that_the_others_step_hurts_are_counted() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], dtype=torch.float64)
    assert metrics_of(x, gram=True)["opposed_examples"].value == 0.25
    apart = metrics_of(torch.eye(3, dtype=torch.float64), gram=True)["opposed_examples"]
    assert (apart.value, apart.null) == (0, 0)  # no example helps or hurts another, whatever the signs are


def test_enormous_numbers_overflow_to_no_exception() -> None:
    assert number_interference(torch.full((3,), 1e200, dtype=torch.float64))["M"].value == pytest.approx(1e200)
