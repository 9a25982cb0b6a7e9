"""Compares runs of several widths and seeds: where each loss decelerates, and how far gradients and loss changes cancel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from zerosum import deceleration, tables
from zerosum.curves import CurveError
from zerosum.deceleration import Deceleration, with_error
from zerosum.records import Record, curve

# The first step to fit, as in the published fits. It lies well after the warm-up, because the warm-up shapes the loss for a while
# and the moving average looks back.
FIRST = 100


class Comparison(NamedTuple):
    """Two tables with a line for each width, the conclusions, and how to read the tables."""

    losses: list[list[str]]
    interference: list[list[str]]
    findings: list[str]
    notes: list[str]

    def text(self) -> str:
        return f"{tables.text(self.losses)}\n\n{tables.text(self.interference, self._lists())}"

    def markdown(self) -> str:
        return f"{tables.markdown(self.losses)}\n\n{tables.markdown(self.interference, self._lists())}"

    def _lists(self) -> tables.Lists:
        return [("What was seen", self.findings), ("How to read it", self.notes)]


def compare(runs: Mapping[int, Sequence[Sequence[Record]]]) -> Comparison:
    """Compare runs by width. Each width has the records of the same number of seeds, and nothing else differs between the runs.

    Needs scipy.
    """
    several = max(map(len, runs.values())) > 1
    *numbers, verdict = deceleration.HEAD
    left = ["width", *(["seeds"] if several else [])]
    losses = [[*left, *numbers, "D_grad", "random signs", verdict]]
    interference = [[*left, "loss", "D_grad", "random signs", "D", "random signs", "M"]]
    findings = []
    for width, seeds in runs.items():
        named = [str(width), *([str(len(seeds))] if several else [])]
        fits = [_fit(records) for records in seeds]
        *fitted, seen = _one(fits[0]) if len(fits) == 1 else _mean(fits)
        losses.append([*named, *fitted, *_last(seeds, "tokens.D_grad"), seen])
        changes = [cell for name in ("D_grad", "held_out.D") for cell in _last(seeds, name)]
        interference.append([*named, _last(seeds, "held_out.loss")[0], *changes, _last(seeds, "held_out.M", ".2g")[0]])
        for number, fit in enumerate(fits, 1):
            which = f"Width {width}, seed {number} of {len(fits)}" if len(fits) > 1 else f"Width {width}"
            findings.append(f"{which}: not fitted, {fit}." if isinstance(fit, CurveError) else f"{which}: {fit}.")
    return Comparison(losses, interference, findings, _notes(runs, several))


def mean_and_error(values: Sequence[float], form: str = ".3f") -> str:
    """Format the mean of several seeds' values ± its standard error. A single value has no error, and no value is a dash."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return with_error(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)))


def _fit(records: Sequence[Record]) -> Deceleration | CurveError:
    loss = curve(records, "step", "train.loss")
    try:
        return deceleration.fit(loss.steps, loss.values, first=FIRST)
    except CurveError as error:
        return error


def _one(fit: Deceleration | CurveError) -> list[str]:
    return ["–"] * (len(deceleration.HEAD) - 1) + ["not fitted"] if isinstance(fit, CurveError) else fit.cells()


def _mean(fits: Sequence[Deceleration | CurveError]) -> list[str]:
    """Return the cells for several seeds.

    L_d, t_d, r_d and L̂_T are over the seeds whose loss decelerates; the others are over all fitted seeds.
    """
    fitted = [fit for fit in fits if isinstance(fit, Deceleration)]
    found = [fit for fit in fitted if fit.found]
    broken = [mean_and_error([getattr(fit, key) for fit in found], ".4g") for key in ("L_d", "t_d", "r_d", "L_T_hat")]
    rsle = f"{np.mean([fit.rsle for fit in fitted]):.4f}" if fitted else "–"
    points = str(fitted[0].n) if fitted else "–"
    last = mean_and_error([fit.L_T for fit in fitted], ".4g")
    return [*broken, last, rsle, points, f"deceleration in {len(found)} of {len(fits)}"]


def _last(seeds: Sequence[Sequence[Record]], name: str, form: str = ".3f") -> list[str]:
    """Format a metric at the last probe, and what random signs would give."""
    curves = [c for c in (curve(records, "probe", name) for records in seeds) if len(c)]
    if not curves:
        return ["–", "–"]
    return [mean_and_error([float(c.values[-1]) for c in curves], form), f"{np.mean([c.nulls[-1] for c in curves]):.3f}"]


def _notes(runs: Mapping[int, Sequence[Sequence[Record]]], several: bool) -> list[str]:
    every = [records for seeds in runs.values() for records in seeds]
    tokens, sequences, changes = (
        max(curve(records, "probe", name).n for records in every) for name in ("tokens.D_grad", "D_grad", "held_out.D")
    )
    error = "± one standard error over the seeds, of those that decelerate" if several else "± one standard error"
    return [
        "L_d and t_d: the loss (nats per byte, training batches) and the step where two lines on log-log axes meet; r_d: the loss "
        f"falls as t^−r_d after it. They are fitted to the steps after {FIRST}, {error}. L̂_T: the loss that the "
        "second line predicts for the last step. L_T: the one there, averaged over the steps before. RSLE: the fit's error of ln L "
        "over n points.",
        "“No break found”: two lines are not surely better than one; “no break located”: it bends, but too gradually to say where.",
        f"D_grad in the first table: interference between the gradients of the losses of {tokens} held-out tokens, one each, after "
        "the last step. “Random signs”: what it would be if each kept its size and got a random sign.",
        f"The second table is of the last step. Loss: of held-out text before it, nats per byte. D_grad: between the gradients of "
        f"the {sequences} sequences of its batch. D and M: interference and mean size of the changes that it makes to the losses "
        f"of {changes} held-out tokens, M in nats.",
        "± is one standard error of the mean over the seeds, which also draw other batches. With few seeds it is itself uncertain."
        if several
        else "One seed: a difference between sizes that is not well above both errors may be chance.",
    ]
