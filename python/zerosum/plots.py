"""Plots of a run: functions from its records to figures. Null lines, what random signs would give, are dashed.

Needs matplotlib, which ``pip install 'zsl_kernels[demo]'`` brings. No display is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from zerosum.records import Curve, Record, curve, slopes, smooth
from zerosum.training.summary import ratio, signed

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#222222"


def loss(records: Sequence[Record]) -> Figure:
    """The training loss at every step, the held-out loss at every probe, and the two slopes that say whether it decelerated."""
    train, held_out = curve(records, "step", "train.loss"), curve(records, "probe", "held_out.loss")
    figure, (axes,) = _figure(1, width=7.4, height=4.8)
    axes.plot(
        train.steps, _positive(train.values), color=BLUE, alpha=0.25, linewidth=0.8, label=f"training batch (N = {train.n} tokens)"
    )
    axes.plot(train.steps, _positive(smooth(train.values)), color=BLUE, linewidth=1.8, label="training batch, log moving average")
    axes.plot(
        held_out.steps,
        _positive(held_out.values),
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
    axes.set_yscale("log")
    _plain_ticks(axes, np.concatenate((train.values, held_out.values)))
    axes.set_ylabel("loss before the step (nats per byte)")
    axes.set_title("Loss, log-log")
    _legend(figure, axes, columns=2)
    return figure


def loss_interference(records: Sequence[Record]) -> Figure:
    """D and M of the tokens' loss changes over one optimizer step, on the step's own batch and on held-out text."""
    figure, (left, right) = _figure(2, width=10.4, height=5.0)
    for name, where, color in (("train", "training batch", BLUE), ("held_out", "held-out text", VERMILION)):
        d, m = (curve(records, "probe", f"{name}.{key}") for key in ("D", "M"))
        _measured(left, d, color, f"{where} (N = {d.n} tokens)")
        right.plot(m.steps, _positive(m.values), "o-", color=color, markersize=4)
    left.set_ylim(-0.03, 1.05)
    left.set_ylabel("D = 1 − |Σ Δℓ| / Σ |Δℓ|")
    left.set_title("Destructive interference of loss changes")
    right.set_yscale("log")
    _plain_ticks(right, np.concatenate([line.get_ydata() for line in right.lines]))
    right.set_ylabel("M = mean |Δℓ| (nats)")
    right.set_title("Magnitude of loss changes")
    _legend(figure, left, columns=2)
    return figure


def decomposition(records: Sequence[Record]) -> Figure:
    """C_g and C_uG / C_ug along the step's update, whose product is C of the first-order loss changes, and D_grad."""
    c_g, c_uG, c_ug, d_grad = (curve(records, "probe", name) for name in ("C_g", "C_uG", "C_ug", "D_grad"))
    figure, (left, middle, right) = _figure(3, width=13.2, height=4.6)
    _measured(left, c_g, BLUE, f"training batch (N = {c_g.n} sequences)")
    _measured(middle, ratio(c_uG, c_ug), BLUE)
    _measured(right, d_grad, BLUE)
    left.set_ylim(0, 1.03)
    left.set_ylabel("C_g along the update")
    left.set_title("Agreement of sequences")
    middle.set_ylim(bottom=0)
    middle.set_ylabel("C_uG / C_ug along the update")
    middle.set_title("Agreement of coordinates")
    right.set_ylim(0, 1.03)
    right.set_ylabel("D_grad")
    right.set_title("Gradient interference, all coordinates")
    _legend(figure, left, columns=2)
    return figure


FIGURES: dict[str, Callable[[Sequence[Record]], Figure]] = {
    "loss": loss,
    "interference": loss_interference,
    "decomposition": decomposition,
}


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draws every figure into ``folder`` as a PNG; returns their paths. A figure is replaced as a whole."""
    paths = []
    for name, draw in FIGURES.items():
        path = folder / f"{name}.png"
        new = path.with_suffix(".png.new")
        draw(records).savefig(new, format="png", dpi=150)
        os.replace(new, path)
        paths.append(path)
    return paths


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Panels side by side with log steps along x."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, wspace=0.03))
    row = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in row:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))
        axes.set_xlabel("optimizer step")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, row


def _measured(axes: Axes, c: Curve, color: str, label: str | None = None) -> None:
    axes.plot(c.steps, c.values, "o-", color=color, markersize=4, label=label)
    axes.plot(
        c.steps, c.nulls, "--", color=color, linewidth=1.2, alpha=0.8, label=label and f"{label.split(' (')[0]}, random signs"
    )


def _positive(values: np.ndarray) -> np.ndarray:
    """What a log axis can show; the rest becomes a gap."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Below the panels, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _plain_ticks(axes: Axes, values: np.ndarray) -> None:
    """A log axis over a decade or less has no ticks worth reading: label 1, 1.5, 2, 3, 5 and 7 of each decade in sight."""
    values = values[_positive(values) > 0]
    if not len(values):
        return
    low, high = values.min() / 1.15, values.max() * 1.1
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = np.array([1, 1.5, 2, 3, 4, 5, 7]) if high / low < 30 else np.array([1, 3])
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator((decades[:, None] * steps).ravel().tolist()))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
