"""Draws the demo's figures from one run's records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zerosum.plots.axes import BLACK, BLUE, VERMILION, Style, legend_of, measured, panels, positive, save, step_axis, value_axis
from zerosum.records import Record, curve, slopes, smooth
from zerosum.training.summary import ratio, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss(records: Sequence[Record]) -> Figure:
    """Draw the training loss at every step, the held-out loss at every probe, and the two slopes that reveal deceleration."""
    train, held_out = curve(records, "step", "train.loss"), curve(records, "probe", "held_out.loss")
    figure, ((axes,),) = panels(1, 1, width=7.4, height=4.8)
    axes.plot(
        train.steps, positive(train.values), color=BLUE, alpha=0.25, linewidth=0.8, label=f"training batch (N = {train.n} tokens)"
    )
    axes.plot(train.steps, positive(smooth(train.values)), color=BLUE, linewidth=1.8, label="training batch, log moving average")
    axes.plot(
        held_out.steps,
        positive(held_out.values),
        "o",
        color=VERMILION,
        markersize=4,
        label=f"held-out text (N = {held_out.n} tokens)",
    )
    for fit, where in zip(slopes(train) or (), ("steepest", "last"), strict=False):
        ends = np.array([fit.first, fit.last])
        style = {"steepest": "-", "last": ":"}[where]
        label = f"{where} half decade: slope {signed(fit.slope)}"
        axes.plot(ends, fit.at(ends) * 0.93, style, color=BLACK, linewidth=1.6, label=label)
    value_axis(axes, np.concatenate((train.values, held_out.values)))
    axes.set_ylabel("loss before the step (nats per byte)")
    axes.set_title("Loss, log-log")
    step_axis(axes, train.steps)
    legend_of(figure, axes, columns=2)
    return figure


def loss_interference(records: Sequence[Record]) -> Figure:
    """Draw D and M of the tokens' loss changes over one optimizer step, on the step's own batch and on held-out text."""
    figure, ((left, right),) = panels(1, 2, width=10.4, height=5.0)
    for name, where, color in (("train", "training batch", BLUE), ("held_out", "held-out text", VERMILION)):
        d, m = (curve(records, "probe", f"{name}.{key}") for key in ("D", "M"))
        measured(left, d, Style(color, "o"), f"{where} (N = {d.n} tokens)")
        right.plot(m.steps, positive(m.values), "o-", color=color, markersize=4)
    left.set_ylim(-0.03, 1.05)
    left.set_ylabel("D = 1 − |Σ Δℓ| / Σ |Δℓ|")
    left.set_title("Destructive interference of loss changes")
    value_axis(right, np.concatenate([line.get_ydata() for line in right.lines]))
    right.set_ylabel("M = mean |Δℓ| (nats)")
    right.set_title("Magnitude of loss changes")
    for axes in (left, right):
        step_axis(axes, curve(records, "probe", "train.D").steps)
    legend_of(figure, left, columns=2)
    return figure


def decomposition(records: Sequence[Record]) -> Figure:
    """Draw D_grad, and C_g and C_uG / C_ug along the step's update, whose product is C of the first-order loss changes."""
    c_g, c_uG, c_ug, d_grad = (curve(records, "probe", name) for name in ("C_g", "C_uG", "C_ug", "D_grad"))
    style = Style(BLUE, "o")
    figure, ((left, middle, right),) = panels(1, 3, width=13.2, height=4.6)
    measured(left, c_g, style, f"training batch (N = {c_g.n} sequences)")
    measured(middle, ratio(c_uG, c_ug), style)
    measured(right, d_grad, style)
    left.set_ylim(0, 1.03)
    left.set_ylabel("C_g along the update")
    left.set_title("Agreement of sequences")
    middle.set_ylim(bottom=0)
    middle.set_ylabel("C_uG / C_ug along the update")
    middle.set_title("Agreement of coordinates")
    right.set_ylim(0, 1.03)
    right.set_ylabel("D_grad")
    right.set_title("Gradient interference, all coordinates")
    for axes in (left, middle, right):
        step_axis(axes, d_grad.steps)
    legend_of(figure, left, columns=2)
    return figure


FIGURES: dict[str, Callable[[Sequence[Record]], Figure]] = {
    "loss": loss,
    "interference": loss_interference,
    "decomposition": decomposition,
}


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw every figure into ``folder`` as a PNG; return their paths. Each figure is replaced as a whole."""
    paths = []
    for name, draw in FIGURES.items():
        path = folder / f"{name}.png"
        save(draw(records), path)
        paths.append(path)
    return paths
