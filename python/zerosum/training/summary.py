"""Summarizes a run's records: a table, and sentences that follow from its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from zerosum import tables
from zerosum.metrics import METRICS
from zerosum.records import Curve, Record, Slope, curve, slopes

# Within this distance, D and C count as unchanged or as equal to their null.
SAME = 0.02
# |Σ ε_i x_i| with random signs is half-normal: 95% of it lies below 1.96 / √(2/π) times its mean, which is the null.
CHANCE_95 = 1.96 / math.sqrt(2 / math.pi)
COLUMNS = 4


class Row(NamedTuple):
    """A metric at a few probes, what random signs would have given at the last one, and its number of examples."""

    name: str
    values: list[float]
    null: float
    n: str


class Summary(NamedTuple):
    """The steps and rows of the table, the findings, and how to read them."""

    steps: list[int]
    rows: list[Row]
    findings: list[str]
    notes: list[str]

    def text(self) -> str:
        """Format the summary for the terminal."""
        return tables.text(self._cells(), self._lists())

    def markdown(self) -> str:
        return tables.markdown(self._cells(), self._lists())

    def _cells(self) -> list[list[str]]:
        head = ["", *(f"step {step}" for step in self.steps), "random signs", "examples"]
        return [
            head,
            *([row.name, *map(_number, row.values), "" if math.isnan(row.null) else _number(row.null), row.n] for row in self.rows),
        ]

    def _lists(self) -> list[tuple[str, list[str]]]:
        return [("What was seen", self.findings), ("How to read it", self.notes)]


def summarize(records: Sequence[Record]) -> Summary:
    """Summarize the records of one run, finished or not."""
    probes = {name: curve(records, "probe", name) for name in _NAMES}
    steps = probes["D_grad"].steps
    if not len(steps):
        return Summary([], [], ["No step was measured yet."], [])
    probes["C_uG / C_ug"] = ratio(probes["C_uG"], probes["C_ug"])
    wanted = np.geomspace(steps[0], steps[-1], COLUMNS)
    chosen = sorted({int(np.abs(np.log(steps / step)).argmin()) for step in wanted})
    rows = [
        Row(label, [float(probes[name].values[i]) for i in chosen], float(probes[name].nulls[-1]), f"{probes[name].n} {examples}")
        for label, name, examples in _ROWS
        if len(probes[name]) == len(steps)  # older runs have fewer metrics
    ]
    findings = [
        _loss(records, probes),
        _gradients(probes),
        _token_gradients(records),
        *_tokens(probes),
        _decomposition(probes),
        _cost(records),
    ]
    return Summary([int(steps[i]) for i in chosen], rows, [finding for finding in findings if finding], _notes(records, probes))


def ratio(above: Curve, below: Curve) -> Curve:
    """Return C_uG / C_ug. A sign for each example leaves C_ug unchanged, so the null has the same denominator.

    The ratio's standard error treats the two errors as independent. A curve without errors counts as exact.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        values = above.values / below.values
        relative = [np.nan_to_num(np.zeros(1) if c.errors is None else c.errors / c.values) for c in (above, below)]
        errors = np.abs(values) * np.hypot(*relative)
        return replace(above, values=values, nulls=above.nulls / below.values, errors=np.where(errors > 0, errors, np.nan))


# The gradient metrics whose definition has a row label, and C_uG / C_ug, which is not a metric of its own.
_GRADIENTS = {name: metric.label for name, metric in METRICS.items() if metric.label} | {
    "C_uG / C_ug": "C_uG / C_ug along the update"
}
_ROWS = (
    ("loss before the step, training batch", "train.loss", "tokens"),
    ("loss before the step, held-out text", "held_out.loss", "tokens"),
    ("D of loss changes, training batch", "train.D", "tokens"),
    ("D of loss changes, held-out text", "held_out.D", "tokens"),
    ("M of loss changes, training batch", "train.M", "tokens"),
    ("M of loss changes, held-out text", "held_out.M", "tokens"),
    *((label, name, "sequences") for name, label in _GRADIENTS.items()),
)
_NAMES = (
    *METRICS,
    *(f"{where}.{key}" for where in ("train", "held_out") for key in ("loss", "D", "M", "mean")),
)


def _number(x: float) -> str:
    """Format with three decimals, or with two digits if the number is below 0.01."""
    return f"{x:.2g}" if 0 < abs(x) < 0.01 else f"{x:.3f}"


def signed(x: float) -> str:
    """Format with a minus sign that is as wide as the plus sign."""
    return f"{x:.2f}".replace("-", "−")


def _went(c: Curve, same: float = SAME) -> str:
    """Describe how a curve went from its first value to its last, with both numbers. A change up to ``same`` does not count."""
    first, last = c.values[0], c.values[-1]
    if len(c) == 1:
        return f"was {_number(first)}"
    if not np.isfinite([first, last]).all():
        return f"went from {_number(first)} to {_number(last)}"
    if abs(last - first) <= same:
        return f"hardly changed, {_number(first)} to {_number(last)}"
    return f"{'rose' if last > first else 'fell'} from {_number(first)} to {_number(last)}"


def _loss(records: Sequence[Record], probes: dict[str, Curve]) -> str:
    train, held_out = (_went(probes[f"{name}.loss"]) for name in ("train", "held_out"))
    said = f"The loss {train} nats per byte on training batches; on held-out text it {held_out}."
    loss = curve(records, "step", "train.loss")
    if len(loss) and not math.isfinite(loss.values[-1]):
        return said + f" Training stopped at step {loss.steps[-1]}, where it was no longer a number."
    found = slopes(loss)
    if found is None:
        return said
    steepest, last = found
    if steepest.surely >= 0:
        return said + f" It did not fall by more than batches differ: the last log-log slope is {_slope(last)}."
    said += f" It fell fastest between steps {steepest.first} and {steepest.last} (log-log slope {_slope(steepest)})"
    said += f" and went on with a slope of {_slope(last)} between steps {last.first} and {last.last}: "
    if last.slope > 2 * last.error:
        return said + "it rises."
    # Three standard errors, because the steepest slope is the best of many.
    if last.slope - steepest.slope < 3 * math.hypot(last.error, steepest.error) or last.slope < 0.8 * steepest.slope:
        return said + "it has not decelerated yet."
    if last.surely >= 0:
        return said + "it has stopped falling, by more than batches differ."
    return said + f"{steepest.slope / last.slope:.1f} times flatter, it decelerated."


def _slope(fit: Slope) -> str:
    return f"{signed(fit.slope)} ± {fit.error:.2f}"


def _gradients(probes: dict[str, Curve]) -> str:
    d = probes["D_grad"]
    return (
        f"Between the gradients of a batch's {d.n} sequences, interference D_grad {_went(d)} (random signs: {d.nulls[-1]:.3f}): "
        f"{_against(d, 'sequences')}."
    )


def _token_gradients(records: Sequence[Record]) -> str:
    d = curve(records, "probe", "tokens.D_grad")
    if not len(d):
        return ""
    return (
        f"Between the gradients of {d.n} held-out tokens' own losses, after the last step, D_grad is {d.values[-1]:.3f} (random "
        f"signs: {d.nulls[-1]:.3f}): {_against(d, 'tokens')}."
    )


def _against(d: Curve, examples: str) -> str:
    """Describe how the last value compares with random signs."""
    value, null = d.values[-1], d.nulls[-1]
    if math.isnan(value):
        return "at the last probe it had no value"
    if abs(value - null) <= SAME:
        return f"there the {examples} agree no better than random signs"
    if value < null:
        return f"the {examples}' gradients still agree better than random signs"
    return f"the {examples}' gradients oppose each other more than random signs"


def _tokens(probes: dict[str, Curve]) -> list[str]:
    findings = []
    for name, where in (("train", "tokens of the step's own batch"), ("held_out", "held-out tokens")):
        d, m, mean = (probes[f"{name}.{key}"] for key in ("D", "M", "mean"))
        c, null = 1 - d.values[-1], 1 - d.nulls[-1]
        better = f"they add up {c / null:.1f} times as well as random signs"
        against = better if c > CHANCE_95 * null else "they cancel as fully as random signs, within the 95% that chance allows"
        change = f"{'raised' if mean.values[-1] > 0 else 'lowered'} the mean loss by {_number(abs(mean.values[-1]))}"
        if math.isnan(c):
            against, change = "at the last probe it had no value", "left a loss that is not a number"
        findings.append(
            f"Between the loss changes of the {d.n} {where}, interference D {_went(d)} (random signs: {d.nulls[-1]:.3f}): "
            f"{against}. Their mean size M {_went(m, 0)}; the last measured step {change}."
        )
    return findings


def _decomposition(probes: dict[str, Curve]) -> str:
    c_g, rest = probes["C_g"], probes["C_uG / C_ug"]
    return (
        f"Along the update, C_g {_went(c_g)} (random signs: {c_g.nulls[-1]:.3f}) and C_uG / C_ug {_went(rest)} (random signs: "
        f"{rest.nulls[-1]:.3f}). Their product is C of the sequences' first-order loss changes."
    )


def _cost(records: Sequence[Record]) -> str:
    cost = next((entry for entry in records if entry["kind"] == "cost"), None)
    if cost is None:
        return ""
    plain, probed = cost["plain_seconds"], cost["probed_seconds"]
    # Other work on the machine slows passes down but never speeds them up. The fastest passes thus show how far to trust the
    # medians.
    middle, fastest = (best(probed) / best(plain) - 1 for best in (median, min))
    said = (
        f"Gradient sums and the Gram, fused into the backward pass, cost {middle:+.0%} of a forward and backward pass "
        f"({median(probed) * 1e3:.0f} against {median(plain) * 1e3:.0f} ms: medians of {len(plain)} in turns; the fastest "
        f"of each: {fastest:+.0%})."
    )
    share = measuring_share(records)
    return said if math.isnan(share) else f"{said} All measuring took {share:.0%} of the run's time."


def measuring_share(records: Sequence[Record]) -> float:
    """Return the share of a run's time that probes added; NaN if every step was probed."""
    around = {entry["step"]: entry["seconds"] for entry in records if entry["kind"] == "probe"}
    steps = {entry["step"]: entry["seconds"] for entry in records if entry["kind"] == "step"}
    plain = [seconds for step, seconds in steps.items() if step not in around]
    if not plain:
        return math.nan
    within = sum(max(steps[step] - median(plain), 0.0) for step in around)
    return (sum(around.values()) + within) / (sum(steps.values()) + sum(around.values()))


def _notes(records: Sequence[Record], probes: dict[str, Curve]) -> list[str]:
    last: dict[str, Any] = [entry for entry in records if entry["kind"] == "probe"][-1]
    notes = [
        "C = |Σ x_i| / Σ |x_i| says how well examples add up, D = 1 − C how far they cancel, M = mean |x_i| how large they are. "
        "“Random signs” is what C or D would be if each example kept its size and got a random sign.",
        f"D_grad, C_g, C_uG and C_ug: the examples are the {probes['D_grad'].n} sequences of the training batch, the numbers "
        f"their gradients, {last['covered']:.1%} of the coordinates (not covered: {', '.join(last['not_covered']) or 'none'}). "
        "D_grad leaves embeddings out.",
        "D and M of loss changes: the examples are tokens, the numbers the change of each token's loss by one optimizer step, on "
        f"the batch of that step ({probes['train.D'].n}) and on a fixed held-out batch ({probes['held_out.D'].n}).",
    ]
    if not all(entry["finite"] for entry in records if entry["kind"] == "probe"):
        notes.append("Some gradients had a NaN or an infinity: what depends on them is shown as nan.")
    return notes
