"""What runs of several sizes say side by side: where each loss decelerates, and how far the gradients cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from zerosum import deceleration, tables
from zerosum.curves import CurveError
from zerosum.records import Curve, Record, curve

# As in the published fits; well after the warm-up, which shapes the loss for a while, and the moving average looks back.
FIRST = 100


class Comparison(NamedTuple):
    """A table with a line for each size, what follows from it, and how to read it."""

    cells: list[list[str]]
    findings: list[str]
    notes: list[str]

    def text(self) -> str:
        return tables.text(self.cells, self._lists())

    def markdown(self) -> str:
        return tables.markdown(self.cells, self._lists())

    def _lists(self) -> tables.Lists:
        return [("What was seen", self.findings), ("How to read it", self.notes)]


def compare_sizes(runs: Mapping[int, Sequence[Record]]) -> Comparison:
    """Of the records of runs that differ in nothing but their width, by width. Needs scipy."""
    *numbers, verdict = deceleration.HEAD
    cells = [["width", *numbers, "D_grad", "random signs", verdict]]
    findings = []
    for width, records in runs.items():
        loss, d_grad = curve(records, "step", "train.loss"), curve(records, "probe", "tokens.D_grad")
        try:
            fit = deceleration.fit(loss.steps, loss.values, first=FIRST)
            *fitted, seen = fit.cells()
            findings.append(f"Width {width}: {fit}.")
        except CurveError as error:
            fitted, seen = ["–"] * len(numbers), "not fitted"
            findings.append(f"Width {width}: not fitted, {error}.")
        cells.append([str(width), *fitted, *_last(d_grad), seen])
    return Comparison(cells, findings, _notes(runs))


def _last(d_grad: Curve) -> list[str]:
    return [f"{d_grad.values[-1]:.3f}", f"{d_grad.nulls[-1]:.3f}"] if len(d_grad) else ["–", "–"]


def _notes(runs: Mapping[int, Sequence[Record]]) -> list[str]:
    n = max(curve(records, "probe", "tokens.D_grad").n for records in runs.values())
    return [
        "L_d and t_d: the loss (nats per byte, training batches) and the step where two lines on log-log axes meet; r_d: the loss "
        f"falls as t^−r_d after it. They are fitted to the steps after {FIRST}, ± one standard error. L̂_T: the loss that the "
        "second line predicts for the last step. L_T: the one there, averaged over the steps before. RSLE: the fit's error of ln L "
        "over n points.",
        "“No break found”: two lines are not surely better than one; “no break located”: it bends, but too gradually to say where.",
        f"D_grad: interference between the gradients of the losses of {n} held-out tokens, one each, after the last step. “Random "
        "signs”: what it would be if each kept its size and got a random sign.",
        "One seed: a difference between sizes that is not well above both errors may be chance.",
    ]
