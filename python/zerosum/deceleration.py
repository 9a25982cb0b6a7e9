"""Fits loss curves and locates loss deceleration: the bend after which a curve, straight on log-log axes, falls less steeply.

The curve is a smoothly broken power law with one break and no offset (Caballero et al. 2023), fitted as in Mircea et al. (2025):

    ln L(t) = ln b − c0 ln t − c1 f1 ln(1 + exp((ln t − ln d1) / f1))

Its log-log slope is −c0 before the break and −(c0 + c1) after it; f1 is the width of the bend in e-folds of t. Deceleration means
c1 < 0. The fit needs scipy (``pip install 'zsl_kernels[demo]'``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from zerosum.curves import CurveError, check, thin
from zerosum.records import smooth

FEWEST = 12  # the fewest points for a fit of five parameters
BESIDE = 3  # the fewest points on each side of a break
LOCATED = 0.5  # the largest error of ln t_d at which a break counts as located: a factor of 1.6
# The BIC difference that is called strong evidence (Kass and Raftery 1995). The break's position was searched for, too.
STRONG = 6.0
UNITS = 1000  # below it, fractional steps are in another unit: t_d, an integer, would lose its digits
PUBLISHED_SPLIT = 6000.0  # where the published fits start
ENOUGH = 2000  # points that suffice for the first fit of a longer curve
SHARPEST = 1e-3  # lower bound of f1: below the distance of two points, so that the data cannot determine it
LEVEL = 0.95  # of the bootstrap's intervals
NAMES = ("b", "c0", "c1", "log_d1", "f1")
RESULTS = (*NAMES, "L_d", "t_d", "r_d", "L_T_hat")
# Where the fit stops: relative changes of the squared errors and the parameters. Three digits are enough for the bootstrap.
TOLERANCE, ROUGH = 1e-10, 1e-6

HEAD = ["L_d", "t_d", "r_d", "L̂_T", "L_T", "RSLE", "n", "verdict"]


@dataclass(frozen=True)
class Deceleration:
    """The fit of one loss curve.

    ``errors`` and ``intervals`` have one entry for each of b, c0, c1, log_d1, f1, L_d, t_d, r_d and L_T_hat.

    Attributes:
        b, c0, c1, log_d1, f1: the curve's parameters, log_d1 = ln d1.
        L_d, t_d: where the two straight segments meet, L_d = b t_d^−c0 at step t_d = ⌊d1⌋. The smooth curve lies above L_d there.
        r_d: the slope after the break, c0 + c1: L falls as t^−r_d.
        L_T: the last point of the curve that was fitted. L_T_hat: L_d (T / t_d)^−r_d at step T = ``final``.
        rsle: root mean squared error of ln L.
        errors: standard errors, from the covariance of least squares with ``n_effective`` in place of n, because the errors of
            averaged losses are correlated. NaN where the data do not determine a value, such as the width f1 of a break sharper
            than the distance of the points.
        intervals: 95 % percentile intervals of the bootstrap; empty without one. Like the errors, they describe noise around this
            curve, not the choice of its form. Their coverage of the truth in 200 simulated curves: with independent noise and 200
            points, ± 1.96 errors 96 to 98 %, the intervals 90 to 97 %; with 30 points, 91 to 97 and 75 to 88 %; with neighbors
            correlated by 0.9 (``n_effective`` 27, in truth 11), 74 to 80 and 60 to 80 %. For averages of 60000 single steps, both
            are too wide by a factor of 2 to 4, except those of b and c0, which the noisy beginning determines: 93 and 75 %.
        n: the number of points fitted. n_effective: the equivalent number of independent points, from the autocorrelation of the
            residuals and from how unevenly they are spread over the curve: the average over a log-scaled window is noisiest at its
            beginning.
        one_b, one_c: the single segment L = one_b t^−one_c that the curve is compared with.
        bic_one, bic_two: ν ln(RSS/n) + k ln ν, with k = 2 and 5 and ν = n_effective − 5; the lower one is the better description.
        found: whether the curve decelerates. All of these must hold:

            - Two segments describe the curve better, with a BIC that is lower by 6.
            - The loss falls before the break and falls less steeply after it. It does not rise there by more than two errors of
              r_d.
            - The break has points on both sides, and the error of ln t_d is below 0.5.

            Of simulated straight curves with independent, autocorrelated or averaged noise, 0 to 5 % passed. A curve that bends
            everywhere, such as E + A t^−α, has no break but may pass, too; an f1 above 1 and a large error of r_d show this.
        verdict: the result in words, including why no deceleration was found.
    """

    b: float
    c0: float
    c1: float
    log_d1: float
    f1: float
    L_d: float
    t_d: int
    r_d: float
    L_T: float
    L_T_hat: float
    final: float
    rsle: float
    errors: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    n: int
    n_effective: float
    one_b: float
    one_c: float
    bic_one: float
    bic_two: float
    found: bool
    verdict: str

    @property
    def d1(self) -> float:
        return math.exp(self.log_d1)

    def at(self, steps: ArrayLike) -> np.ndarray:
        """Return the fitted losses at ``steps``."""
        return np.exp(_curve(np.log(np.asarray(steps, dtype=float)), *self._parameters()))

    def early(self, steps: ArrayLike) -> np.ndarray:
        """Return the segment before the break, b t^−c0."""
        return self.b * np.asarray(steps, dtype=float) ** -self.c0

    def late(self, steps: ArrayLike) -> np.ndarray:
        """Return the segment after the break, L_d (t / t_d)^−r_d."""
        return self.L_d * (np.asarray(steps, dtype=float) / self.t_d) ** -self.r_d

    def one(self, steps: ArrayLike) -> np.ndarray:
        """Return the single segment, one_b t^−one_c."""
        return self.one_b * np.asarray(steps, dtype=float) ** -self.one_c

    def __str__(self) -> str:
        if not self.found:
            return f"{self.verdict}; RSLE {self.rsle:.4f} over {self.n} points"
        parts = (f"{name} = {with_error(getattr(self, name), self.errors[name])}" for name in ("L_d", "t_d", "r_d"))
        return f"{self.verdict}: {', '.join(parts)}; RSLE {self.rsle:.4f} over {self.n} points"

    def cells(self) -> list[str]:
        """Return the fit's row of a table with the columns ``HEAD``. It omits the break's parameters if no deceleration was
        found."""
        broken = [with_error(getattr(self, key), self.errors[key]) for key in ("L_d", "t_d", "r_d")] + [f"{self.L_T_hat:.4g}"]
        verdict = "deceleration" if self.found else self.verdict.split(":")[0]
        return [*(broken if self.found else ["–"] * 4), f"{self.L_T:.4g}", f"{self.rsle:.4f}", str(self.n), verdict]

    def _parameters(self) -> tuple[float, ...]:
        return math.log(self.b), self.c0, self.c1, self.log_d1, self.f1


def fit(
    steps: ArrayLike,
    losses: ArrayLike,
    *,
    smoothed: bool = False,
    first: float = 100,
    final: float | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> Deceleration:
    """Fit ln L(t) with ``scipy.optimize.curve_fit`` (dogbox) from several starting points, and return the best fit.

    The procedure is that of Mircea et al. (2025). The losses are averaged over a log-scaled window
    (:func:`zerosum.records.smooth`), then thinned (:func:`zerosum.curves.thin`). The window looks back, so a break is located some
    9 % of its step too late, as in the published numbers.

    Args:
        steps: (n,), increasing.
        losses: (n,), > 0, in any unit.
        smoothed: fit every row as it is, because the losses are already averages or come from whole evaluation sets.
        first: fit only later steps than this one.
        final: the step T of L_T_hat; the last step if None.
        bootstrap: the number of bootstrap samples for the intervals; 0 for none. They resample the residuals in moving blocks,
            because the errors of neighboring points are correlated.
        seed: the seed of the bootstrap.

    Raises:
        CurveError: the curve is too short, or has a NaN, a loss <= 0 or a step that does not increase; the message says where.
        ModuleNotFoundError: scipy is missing.
    """
    x, y, final = _points(steps, losses, smoothed, first, final)
    some = slice(None, None, max(len(x) // ENOUGH, 1))
    best = _fit(x, y, [_fit(x[some], y[some], _starts(x[some], y[some]), TOLERANCE)], TOLERANCE)
    residuals = y - _curve(x, *best)
    one = np.polyfit(x, y, 1)
    n_effective = _effective(residuals)
    bics = [_bic(y - fitted, n_effective, k) for fitted, k in ((np.polyval(one, x), 2), (_curve(x, *best), 5))]
    derived = _derived(best, final)
    errors = _errors(x, best, residuals, n_effective, derived, final)
    found, verdict = _verdict(x, best, errors, -float(one[0]), *bics)
    resampled = _resample(x, best, residuals, n_effective, bootstrap, seed, final)
    with np.errstate(invalid="ignore"):  # between infinities, if the data are no loss curve
        edges = np.percentile(resampled, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0).T if bootstrap else []
    return Deceleration(
        **derived | {"t_d": int(derived["t_d"])},  # type: ignore[arg-type]
        L_T=float(np.exp(y[-1])),
        final=final,
        rsle=float(np.sqrt(np.mean(residuals**2))),
        errors=errors,
        intervals={name: (float(low), float(high)) for name, (low, high) in zip(derived, edges, strict=False)},
        n=len(x),
        n_effective=n_effective,
        one_b=float(np.exp(one[1])),
        one_c=-float(one[0]),
        bic_one=bics[0],
        bic_two=bics[1],
        found=found,
        verdict=verdict,
    )


def _points(
    steps: ArrayLike, losses: ArrayLike, smoothed: bool, first: float, final: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return ln t and ln L of the points to fit, and the step of the prediction."""
    t, y = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    if t.ndim != 1 or t.shape != y.shape:
        raise CurveError(f"steps, losses: expected two arrays of the same length, got shapes {t.shape} and {y.shape}")
    if not 0 <= first < math.inf:
        raise CurveError(f"first: expected a step >= 0, got {first}")
    check(t, y, lambda i: f"row {i}")
    rows = len(t)
    if rows and t[-1] < UNITS and (fractions := t[t % 1 != 0]).size:
        raise CurveError(
            f"steps: expected numbers of steps, got {fractions[0]:g} and at most {t[-1]:g}: are they epochs, or thousands of steps?"
        )
    if not smoothed and len(t):
        kept = thin(t)
        t, averaged = t[kept], smooth(y)[kept]
        if (averaged <= 0).any():  # rounding of a running sum can lose a loss that is 10^16 times smaller
            raise CurveError(f"losses: the range from {y.min():g} to {y.max():g} is too wide to average")
        y = averaged
    t, y = t[t > first], y[t > first]
    if len(t) < FEWEST:
        raise CurveError(
            f"the curve is too short: expected at least {FEWEST} points after step {first:g}, got {len(t)} "
            f"of {rows} rows{'' if smoothed else ', after averaging and thinning'}"
        )
    if final is not None and not 0 < final < math.inf:
        raise CurveError(f"final: expected a step > 0, got {final}")
    return np.log(t), np.log(y), float(t[-1] if final is None else final)


def _curve(x: np.ndarray, log_b: float, c0: float, c1: float, log_d1: float, f1: float) -> np.ndarray:
    return log_b - c0 * x - c1 * f1 * np.logaddexp(0.0, (x - log_d1) / f1)


def _jacobian(x: np.ndarray, log_b: float, c0: float, c1: float, log_d1: float, f1: float) -> np.ndarray:
    """Return the derivatives of the curve with respect to its parameters, (n, 5)."""
    z = (x - log_d1) / f1
    after = 0.5 * (1 + np.tanh(0.5 * z))  # the completed share of the bend, 1 / (1 + e^−z)
    bend = np.logaddexp(0.0, z)
    return np.stack((np.ones_like(x), -x, -f1 * bend, c1 * after, -c1 * (bend - z * after)), axis=1)


def with_error(value: float, error: float) -> str:
    """Format both numbers to the error's second digit, unless that takes too many digits."""
    if not (math.isfinite(error) and error > 0):
        return f"{value:.4g}"
    digits = max(1 - math.floor(math.log10(error)), 0)
    if digits > 8 or abs(value) >= 1e7:
        return f"{value:.6g} ± {error:.2g}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


class _Start(NamedTuple):
    rss: float
    parameters: np.ndarray


def _starts(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Return the published start, if its split lies inside the curve, and the best starts of a grid of breaks.

    At a given log_d1 and f1 the curve is linear in the other three: a grid costs a small least-squares problem for each point.
    """
    grid = []
    for log_d1 in np.linspace(x[0], x[-1], 18):
        for f1 in (0.03, 0.2, 0.8):
            design = np.stack((np.ones_like(x), -x, -f1 * np.logaddexp(0.0, (x - log_d1) / f1)), axis=1)
            solution = np.linalg.lstsq(design, y, rcond=None)[0]
            rss = float(np.sum((y - design @ solution) ** 2))
            grid.append(_Start(rss, np.array([*solution, log_d1, f1])))
    starts = [start.parameters for start in sorted(grid, key=lambda start: start.rss)[:6]]
    split = math.log(PUBLISHED_SPLIT)
    before, after = x < split, x >= split
    if min(before.sum(), after.sum()) >= 2:
        early, late = ((y[part][-1] - y[part][0]) / (x[part][-1] - x[part][0]) for part in (before, after))
        starts.append(np.array([y[0] - early * x[0], -early, early - late, split, 0.3]))
    return starts


def _fit(x: np.ndarray, y: np.ndarray, starts: list[np.ndarray], tolerance: float) -> np.ndarray:
    """Return the best of the fits from ``starts``."""
    # Imported here because `import zerosum` must work without scipy.
    from scipy.optimize import OptimizeWarning, curve_fit

    # A break far outside the points, or wider than all of them, is not determined by the data.
    reach = x[-1] - x[0]
    lower = [-np.inf, -np.inf, -np.inf, x[0] - 1, SHARPEST]
    upper = [np.inf, np.inf, np.inf, x[-1] + 1, max(reach, 1.0)]
    fits = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # about a singular covariance: `_errors` computes its own
        for start in starts:
            found = np.clip(start, lower, upper)
            # Without a break, log_d1 and f1 are undetermined and the fit may not converge. Then the start itself is used.
            with suppress(RuntimeError):
                options = {"ftol": tolerance, "xtol": tolerance, "gtol": tolerance, "max_nfev": 200}
                found, _ = curve_fit(_curve, x, y, found, bounds=(lower, upper), method="dogbox", jac=_jacobian, **options)
            fits.append(_Start(float(np.sum((y - _curve(x, *found)) ** 2)), found))
    return min(fits, key=lambda fitted: fitted.rss).parameters


def _derived(parameters: np.ndarray, final: float) -> dict[str, float]:
    """Return the parameters and the values derived from them, in the order of the errors and the intervals."""
    log_b, c0, c1, log_d1, f1 = parameters
    r_d, t_d = c0 + c1, max(math.floor(math.exp(log_d1)), 1)
    logs = {"b": log_b, "t_d": log_d1, "L_d": log_b - c0 * math.log(t_d)}
    logs["L_T_hat"] = logs["L_d"] - r_d * math.log(final / t_d)
    with np.errstate(over="ignore"):  # if the data are no loss curve
        values = {"c0": c0, "c1": c1, "log_d1": log_d1, "f1": f1, "r_d": r_d} | {name: np.exp(log) for name, log in logs.items()}
    return {name: float(values[name]) for name in RESULTS}


def _errors(
    x: np.ndarray, parameters: np.ndarray, residuals: np.ndarray, n_effective: float, derived: dict[str, float], final: float
) -> dict[str, float]:
    """Return standard errors by the delta method; NaN for values that the data do not determine."""
    jacobian = _jacobian(x, *parameters)
    _, c0, c1, log_d1, f1 = parameters
    told = np.linalg.norm(jacobian, axis=0) > 1e-9
    if f1 <= SHARPEST * 1.01:
        told[4] = False
    variance = float(np.sum(residuals**2)) / _free(n_effective)
    covariance = np.full((5, 5), np.nan)
    covariance[np.ix_(told, told)] = variance * np.linalg.pinv(jacobian[:, told].T @ jacobian[:, told])
    # The gradient of each result, or of its logarithm, with respect to (ln b, c0, c1, ln d1, f1).
    rows = dict(zip(NAMES, np.eye(5), strict=True))
    rows["t_d"] = rows["log_d1"]
    rows["r_d"] = rows["c0"] + rows["c1"]
    rows["L_d"] = np.array([1, -log_d1, 0, -c0, 0])
    rows["L_T_hat"] = np.array([1, -math.log(final), log_d1 - math.log(final), c1, 0])
    errors = {}
    for name in RESULTS:
        used = rows[name] != 0
        row = rows[name][used]
        error = math.sqrt(max(row @ covariance[np.ix_(used, used)] @ row, 0.0))
        errors[name] = error * derived[name] if name in ("b", "t_d", "L_d", "L_T_hat") else error
    return errors


def _effective(residuals: np.ndarray) -> float:
    """Return the equivalent number of independent residuals of the same size."""
    time = _autocorrelation_time(residuals)
    power = np.add.reduceat(residuals**2, np.arange(0, len(residuals), math.ceil(time)))
    # (Σ e)² / Σ e² of the squares e of k independent normal numbers is about k / 3.
    evenly = 3 * power.sum() ** 2 / (power**2).sum() if power.any() else math.inf
    return float(min(len(residuals) / time, evenly))


def _autocorrelation_time(residuals: np.ndarray) -> float:
    """Return 1 + 2 Σ ρ_h over the lags before the first correlation that is not positive: the correlation length in points."""
    centered = residuals - residuals.mean()
    power = float(centered @ centered)
    if not power:
        return 1.0
    # A Fourier transform, because averages of a million rows are correlated over hundreds of thousands of neighbors.
    transformed = np.fft.rfft(centered, 2 * len(centered))
    correlations = np.fft.irfft(np.abs(transformed) ** 2)[1 : len(centered)] / power
    ends = np.flatnonzero(correlations <= 0)
    return 1 + 2 * float(correlations[: ends[0] if len(ends) else None].sum())


def _free(n_effective: float) -> float:
    """Return the number of independent residuals minus the five fitted parameters."""
    return max(n_effective - len(NAMES), 1.5)


def _bic(residuals: np.ndarray, n_effective: float, k: int) -> float:
    rounding = 1e-12**2  # of the logarithms: smaller residuals carry no information
    return _free(n_effective) * math.log(float(np.mean(residuals**2)) + rounding) + k * math.log(_free(n_effective))


def _verdict(
    x: np.ndarray, parameters: np.ndarray, errors: Mapping[str, float], slope: float, bic_one: float, bic_two: float
) -> tuple[bool, str]:
    _, c0, c1, log_d1, _ = parameters
    if bic_one <= bic_two + STRONG:
        return False, f"no break found: two segments are not surely better than one, L ∝ t^{-slope:.3g}"
    inside = min((x < log_d1).sum(), (x > log_d1).sum()) >= BESIDE
    if not inside:
        return False, "no break found inside the curve: it bends, but towards its first or last points only"
    slopes = f"slope {-c0:.3g} before and {-(c0 + c1):.3g} after step {int(math.exp(log_d1))}"
    if c0 <= 0:
        return False, f"no deceleration: the loss does not fall before the break, {slopes}"
    if c1 >= 0:
        return False, f"no deceleration: the loss falls faster after the break, {slopes}"
    if c0 + c1 < -2 * errors["r_d"]:
        return False, f"no deceleration: the loss rises after the break, {slopes}"
    if not errors["log_d1"] < LOCATED:
        step = with_error(math.exp(log_d1), errors["t_d"])
        return False, f"no break located: the loss decelerates, but too gradually for this curve to say where, t_d = {step}"
    return True, "deceleration found"


def _resample(
    x: np.ndarray, parameters: np.ndarray, residuals: np.ndarray, n_effective: float, resamples: int, seed: int, final: float
) -> np.ndarray:
    """Fit the fitted curve plus residuals resampled in blocks of neighbors. Return the results, (resamples, 9)."""
    generator = np.random.default_rng(seed)
    n, fitted = len(x), _curve(x, *parameters)
    block = max(round(n ** (1 / 3)), min(math.ceil(2 * n / n_effective), n // 4), 1)
    # Fitting five parameters made the residuals smaller than the noise, which this corrects.
    noise = (residuals - residuals.mean()) * math.sqrt(n_effective / _free(n_effective))
    results = []
    for _ in range(resamples):
        starts = generator.integers(0, n - block + 1, math.ceil(n / block))
        drawn = noise[(starts[:, None] + np.arange(block)).ravel()[:n]]
        found = _fit(x, fitted + drawn, [parameters], ROUGH)
        results.append(list(_derived(found, final).values()))
    return np.array(results)
