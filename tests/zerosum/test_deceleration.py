"""The fit of a broken power law: known truth, honest errors, and curves that do not decelerate."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

from zerosum.curves import CurveError, read_curve, thin
from zerosum.deceleration import FEWEST, Deceleration, _autocorrelation_time, fit, with_error

TRUTH = {"b": 20.0, "c0": 0.2, "c1": -0.17, "log_d1": math.log(5000), "f1": 0.3}
OWN_CURVE = Path(__file__).parent.parent / "data" / "tiny_gpt_loss.csv"


def curve(steps: np.ndarray, b: float, c0: float, c1: float, log_d1: float, f1: float) -> np.ndarray:
    """The definition, as it is printed."""
    x = np.log(steps.astype(float))
    return np.exp(math.log(b) - c0 * x - c1 * f1 * np.log1p(np.exp((x - log_d1) / f1)))


def spaced(points: int, last: float = 2e5) -> np.ndarray:
    return np.unique(np.geomspace(101, last, points).round())


def noise(size: int, seed: int, correlation: float = 0.0) -> np.ndarray:
    """Of variance 1; neighbours are correlated."""
    drawn = np.random.default_rng(seed).normal(size=size)
    for i in range(1, size):
        drawn[i] = correlation * drawn[i - 1] + math.sqrt(1 - correlation**2) * drawn[i]
    return drawn


def check_truth(found: Deceleration, truth: dict[str, float], rtol: float) -> None:
    for name, value in truth.items():
        assert getattr(found, name) == pytest.approx(value, rel=rtol), name
    t_d = int(math.exp(truth["log_d1"]))
    assert found.t_d == pytest.approx(t_d, abs=1 + rtol * t_d)
    assert found.L_d == pytest.approx(truth["b"] * t_d ** -truth["c0"], rel=rtol)
    assert found.r_d == pytest.approx(truth["c0"] + truth["c1"], rel=rtol)


@pytest.mark.parametrize("log_d1", [math.log(500.5), math.log(6000.5), math.log(60000.5)])
@pytest.mark.parametrize("f1", [0.05, 0.3, 1.0])
def test_the_truth_is_recovered_wherever_the_break_is(log_d1: float, f1: float) -> None:
    truth = TRUTH | {"log_d1": log_d1, "f1": f1}
    steps = spaced(300)
    found = fit(steps, curve(steps, **truth), smoothed=True, bootstrap=0)
    assert found.found
    check_truth(found, truth, 1e-5)
    assert found.rsle < 1e-8
    np.testing.assert_allclose(found.at(steps), curve(steps, **truth), rtol=1e-7)


def test_the_published_start_is_not_needed() -> None:
    """A curve that ends long before step 6000."""
    steps = np.arange(10, 1500, 5.0)
    truth = {"b": 9.0, "c0": 0.3, "c1": -0.2, "log_d1": math.log(200), "f1": 0.2}
    check_truth(fit(steps, curve(steps, **truth), smoothed=True, first=10, bootstrap=0), truth, 1e-4)


def test_segments_meet_at_the_deceleration_and_the_curve_follows_them() -> None:
    steps = spaced(300)
    found = fit(steps, curve(steps, **TRUTH), smoothed=True, final=1e6, bootstrap=0)
    assert found.early(found.t_d) == pytest.approx(found.L_d)
    assert found.late(found.t_d) == pytest.approx(found.L_d)
    assert found.at(found.t_d) == pytest.approx(found.L_d * 2 ** (-found.c1 * found.f1))  # the bend lies above
    assert found.early(101) == pytest.approx(found.at(101), rel=1e-4)
    assert found.late(1e6) == pytest.approx(found.at(1e6), rel=1e-3)
    assert found.L_T_hat == pytest.approx(found.late(1e6))
    np.testing.assert_allclose(found.L_T, curve(steps[-1:], **TRUTH))
    assert found.d1 == pytest.approx(5000, rel=1e-5)


def test_losses_of_single_steps_are_averaged_and_thinned() -> None:
    """The window looks back by a factor of 0.91 in t, and so does everything that it shows."""
    steps = np.arange(1, 60001)
    found = fit(steps, curve(steps, **TRUTH) * np.exp(0.03 * noise(len(steps), 0)), bootstrap=0)
    assert found.found
    assert found.n == 90 + 90 + 51 - 1
    assert found.r_d == pytest.approx(0.03, abs=0.003)
    assert found.c0 == pytest.approx(0.2, abs=0.005)
    assert found.t_d == pytest.approx(5000 * 1.095, rel=0.05)
    assert found.L_d == pytest.approx(20 * 5000**-0.2, rel=0.01)
    raw = fit(steps, curve(steps, **TRUTH) * np.exp(0.03 * noise(len(steps), 0)), smoothed=True, bootstrap=0)
    assert raw.n == 60000 - 100
    assert raw.t_d == pytest.approx(5000, rel=0.05)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_intervals_and_errors_cover_the_truth(correlation: float) -> None:
    """Of 30 draws: 95 % intervals with room for chance and for the little that correlated noise tells of itself."""
    steps = spaced(200)
    truth = {"L_d": 20 * 5000**-0.2, "t_d": 5000.0, "r_d": 0.03, "L_T_hat": 20 * 5000**-0.2 * (steps[-1] / 5000) ** -0.03}
    inside: dict[str, list[tuple[bool, bool]]] = {name: [] for name in truth}
    for seed in range(30):
        losses = curve(steps, **TRUTH) * np.exp(0.01 * noise(len(steps), seed, correlation))
        found = fit(steps, losses, smoothed=True, bootstrap=60, seed=seed)
        assert found.found
        for name, value in truth.items():
            low, high = found.intervals[name]
            inside[name].append((low <= value <= high, abs(getattr(found, name) - value) <= 1.96 * found.errors[name]))
    for name, hits in inside.items():
        for share in np.mean(hits, axis=0):
            assert share >= 0.7, (name, share)
    everything = np.mean([hit for hits in inside.values() for hit in hits])
    assert 0.82 <= everything < 1


def test_errors_are_as_large_as_the_estimates_spread() -> None:
    steps = spaced(150)
    fits = [
        fit(steps, curve(steps, **TRUTH) * np.exp(0.01 * noise(len(steps), seed)), smoothed=True, bootstrap=0, final=1e7)
        for seed in range(60)
    ]
    ratios = {
        name: np.mean([one.errors[name] for one in fits]) / np.std([getattr(one, name) for one in fits]) for name in fits[0].errors
    }
    # The noise's size is guessed alike for all of them, with some caution; what each makes of it is no guess.
    middle = np.median(list(ratios.values()))
    assert 0.9 < middle < 1.3
    for name, ratio in ratios.items():
        assert ratio == pytest.approx(middle, rel=0.1), name


def test_errors_shrink_with_the_noise_and_not_with_copies_of_it() -> None:
    steps = spaced(200)
    quiet, loud = (fit(steps, curve(steps, **TRUTH) * np.exp(s * noise(len(steps), 1)), smoothed=True) for s in (0.001, 0.01))
    assert loud.errors["L_d"] / quiet.errors["L_d"] == pytest.approx(10, rel=0.2)
    # Each noise ten times over adds points, and no knowledge.
    many = spaced(2000)
    repeated = np.repeat(noise(200, 1), 10)[: len(many)]
    copies = fit(many, curve(many, **TRUTH) * np.exp(0.01 * repeated), smoothed=True)
    assert copies.n_effective < 0.2 * len(many)
    assert 0.5 < copies.errors["L_d"] / loud.errors["L_d"] < 2


@pytest.mark.parametrize("sigma", [0.0, 0.001, 0.03])
@pytest.mark.parametrize("kind", ["steps", "evaluations", "few"])
def test_a_power_law_has_no_break(sigma: float, kind: str) -> None:
    wrong = 0
    for seed in range(6):
        steps = {"steps": np.arange(1.0, 5001), "evaluations": spaced(100), "few": spaced(12)}[kind]
        losses = 12 * steps**-0.15 * np.exp(sigma * noise(len(steps), seed))
        found = fit(steps, losses, smoothed=kind != "steps", bootstrap=0)
        wrong += found.found
        if not found.found:
            assert "no break found" in found.verdict or "no deceleration" in found.verdict
            assert found.one_c == pytest.approx(0.15, abs=0.03)
    assert wrong == 0


def test_correlated_noise_is_not_taken_for_a_break() -> None:
    """Neighbours that err together look like bends: counted as independent, they would be found in most of these."""
    steps = spaced(200)
    found = [
        fit(steps, 12 * steps**-0.15 * np.exp(0.01 * noise(len(steps), seed, 0.9)), smoothed=True, bootstrap=0)
        for seed in range(20)
    ]
    assert sum(one.found for one in found) <= 2
    naive = [
        200 * math.log(np.mean((np.log(one.one(steps) / one.at(steps))) ** 2) / one.rsle**2 + 1) > 3 * math.log(200)
        for one in found
    ]
    assert sum(naive) >= 10


def test_what_is_found_in_place_of_a_deceleration_is_said() -> None:
    steps = spaced(200)
    wiggle = np.exp(0.001 * noise(len(steps), 0))
    faster = fit(steps, curve(steps, **TRUTH | {"c0": 0.05, "c1": 0.2}) * wiggle, smoothed=True, bootstrap=0)
    assert (faster.found, faster.verdict.split(",")[0]) == (False, "no deceleration: the loss falls faster after the break")
    rising = fit(steps, curve(steps, **TRUTH | {"c0": -0.05, "c1": -0.1}) * wiggle, smoothed=True, bootstrap=0)
    assert (rising.found, rising.verdict.split(",")[0]) == (False, "no deceleration: the loss does not fall before the break")
    diverging = fit(steps, curve(steps, **TRUTH | {"c1": -0.3}) * wiggle, smoothed=True, bootstrap=0)
    assert (diverging.found, diverging.verdict.split(",")[0]) == (False, "no deceleration: the loss rises after the break")
    assert diverging.cells()[:4] == ["–"] * 4
    begun = [column[:850] for column in read_curve(OWN_CURVE)]
    gradual = fit(*begun, first=50, bootstrap=0)
    assert (gradual.found, gradual.verdict.split(":")[0]) == (False, "no break located")
    few = spaced(30)
    spike = 12 * few**-0.15 * np.exp(0.001 * noise(len(few), 0))
    spike[-1] *= 1.2
    outside = fit(few, spike, smoothed=True, bootstrap=0)
    assert (outside.found, outside.verdict.split(":")[0]) == (False, "no break found inside the curve")


def test_a_break_too_sharp_to_measure_is_fitted_all_the_same() -> None:
    steps = spaced(100)
    losses = np.where(steps < 5000, 20 * steps**-0.2, 20 * 5000**-0.2 * (steps / 5000) ** -0.03)
    found = fit(steps, losses * np.exp(1e-5 * noise(len(steps), 0)), smoothed=True, bootstrap=20)
    assert found.found
    assert found.t_d == pytest.approx(5000, rel=0.01)
    assert found.r_d == pytest.approx(0.03, rel=0.01)
    assert all(math.isfinite(error) for name, error in found.errors.items() if name != "f1")


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    steps = spaced(60)
    losses = curve(steps, **TRUTH) * np.exp(0.005 * noise(len(steps), 0))
    found, scaled = (fit(steps, losses * s, smoothed=True, bootstrap=10) for s in (1.0, scale))
    assert scaled.L_d / scale == pytest.approx(found.L_d, rel=1e-5)
    assert scaled.t_d == pytest.approx(found.t_d, abs=2)
    assert scaled.errors["r_d"] == pytest.approx(found.errors["r_d"], rel=1e-3)


def test_the_seed_fixes_the_intervals_and_nothing_else_depends_on_it() -> None:
    steps = spaced(60)
    losses = curve(steps, **TRUTH) * np.exp(0.01 * noise(len(steps), 0))
    a, b, c = (fit(steps, losses, smoothed=True, bootstrap=20, seed=seed) for seed in (0, 0, 1))
    assert a == b
    assert a.intervals != c.intervals
    assert (a.errors, a.bic_two, a.L_d) == (c.errors, c.bic_two, c.L_d)
    assert fit(steps, losses, smoothed=True, bootstrap=0).intervals == {}


def test_a_small_run_of_our_own() -> None:
    """``zerosum demo --width 32 --steps 1500`` on Python 3.11's library: train.loss of each step. The numbers are of this fit."""
    steps, losses = read_curve(OWN_CURVE)
    found = fit(steps, losses, first=50)
    assert found.found
    for name, value in OWN.items():
        assert getattr(found, name) == pytest.approx(value, rel=5e-3)
    for name in ("L_d", "t_d", "r_d"):
        low, high = found.intervals[name]
        assert low < getattr(found, name) < high


OWN = {"L_d": 2.0749, "t_d": 221, "r_d": 0.10894, "L_T_hat": 1.6842, "L_T": 1.6832}


def test_its_words() -> None:
    steps = spaced(200)
    found = fit(steps, curve(steps, **TRUTH) * np.exp(0.001 * noise(len(steps), 0)), smoothed=True, bootstrap=0)
    assert str(found).startswith("deceleration found: L_d = 3.6")
    assert "± " in str(found)
    none = fit(steps, 12 * steps**-0.15 * np.exp(0.001 * noise(len(steps), 0)), smoothed=True, bootstrap=0)
    assert str(none).startswith("no break found: two segments are not surely better than one, L ∝ t^-0.15; RSLE 0.001")


def test_thinning_keeps_the_published_rows() -> None:
    steps = np.arange(0, 23457)
    kept = steps[thin(steps)]
    expected = [*range(10, 100), *range(100, 1000, 10), *range(1000, 10000, 100), *range(10000, 23001, 1000), 23456]
    assert kept.tolist() == expected
    # Where a mark has no row of its own, the next one stands for it.
    sparse = np.arange(1, 5000, 50)
    assert sparse[thin(sparse)].tolist() == [51, *range(101, 1000, 50), *range(1001, 5000, 100), 4951]


def test_thinning_takes_steps_that_count_tokens() -> None:
    steps = np.arange(1, 2001) * 6e8  # a trillion: a mark at every thousand would not fit into memory
    assert thin(steps).tolist() == list(range(2000))
    assert thin(np.arange(1, 30) * 400.0).tolist() == [*range(25), 27, 28]  # 10000, then 11200 for 11000, and the last


def test_units_that_are_no_steps_are_refused() -> None:
    epochs = np.linspace(0.001, 3, 3000)
    with pytest.raises(CurveError, match=r"^steps: expected numbers of steps, got 0.001 and at most 3: are they epochs"):
        fit(epochs, 9 * epochs**-0.1, first=0)


def test_the_correlation_of_neighbours_is_the_sum_of_its_definition() -> None:
    residuals = np.convolve(noise(3000, 5), np.ones(40))
    centered = residuals - residuals.mean()
    correlations = [centered[lag:] @ centered[:-lag] / (centered @ centered) for lag in range(1, 300)]
    expected = 1 + 2 * sum(correlations[: next(i for i, c in enumerate(correlations) if c <= 0)])
    assert _autocorrelation_time(residuals) == pytest.approx(expected, rel=1e-9)
    assert _autocorrelation_time(np.zeros(20)) == 1
    assert _autocorrelation_time(np.tile([1.0, -1.0], 10)) == 1


def test_numbers_with_errors_are_short() -> None:
    assert with_error(5877.4, 906.3) == "5877 ± 906"
    assert with_error(0.0125, 0.0062) == "0.0125 ± 0.0062"
    assert with_error(3.6411284, 1e-15) == "3.64113 ± 1e-15"
    assert with_error(3.6e300, 1.4e298) == "3.6e+300 ± 1.4e+298"
    assert with_error(5.0, math.nan) == "5"


GOOD = np.arange(1.0, 2001), 9 * np.arange(1.0, 2001) ** -0.1


@pytest.mark.parametrize(
    ("row", "step", "loss", "said"),
    [
        (300, None, math.nan, "row 300: loss: expected a finite number > 0, got nan"),
        (300, None, math.inf, "row 300: loss: expected a finite number > 0, got inf"),
        (7, None, 0.0, "row 7: loss: expected a finite number > 0, got 0"),
        (7, None, -2.5, "row 7: loss: expected a finite number > 0, got -2.5"),
        (9, math.nan, None, "row 9: step: expected a finite number, got nan"),
        (9, 9.0, None, "row 9: step: expected steps that increase, got 9 after 9"),
        (9, 3.0, None, "row 9: step: expected steps that increase, got 3 after 9"),
    ],
)
def test_a_bad_row_is_named(row: int, step: float | None, loss: float | None, said: str) -> None:
    steps, losses = (x.copy() for x in GOOD)
    if step is not None:
        steps[row] = step
    if loss is not None:
        losses[row] = loss
    with pytest.raises(CurveError) as refusal:
        fit(steps, losses)
    assert str(refusal.value) == said


def test_a_curve_that_is_too_short_is_refused() -> None:
    steps = np.arange(1.0, 101 + FEWEST)
    assert fit(steps, 9 / steps, smoothed=True, bootstrap=0).n == FEWEST
    with pytest.raises(CurveError, match=f"too short: expected at least {FEWEST} points after step 100, got {FEWEST - 1}"):
        fit(steps[:-1], 9 / steps[:-1], smoothed=True)
    with pytest.raises(CurveError, match="got 0"):
        fit([], [])
    with pytest.raises(CurveError, match=r"same length, got shapes \(3,\) and \(2,\)"):
        fit([1, 2, 3], [1, 2])
    with pytest.raises(CurveError, match=r"losses: the range from .* is too wide to average"):
        fit(np.arange(1, 200), np.where(np.arange(1, 200) == 50, 1e30, 1.0))
    for option in ("first", "final"):
        with pytest.raises(CurveError, match=f"^{option}: expected a step"):
            fit(*GOOD, **{option: -1.0})  # type: ignore[arg-type]


def test_importing_it_needs_no_scipy(project_environment: dict[str, str]) -> None:
    code = "import sys; sys.modules.update(scipy=None, tensorboard=None); import zerosum.deceleration, zerosum.cli"
    subprocess.run([sys.executable, "-c", code], check=True, env=project_environment)
