"""Provides what the figures share: colors, panels, axes, legends, and saving to files.

matplotlib is imported only when a figure is drawn, so that ``zerosum plot --help`` can list the figures without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zerosum.files import replacing
from zerosum.records import Curve
from zerosum.terminal import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colors, which color-blind readers can tell apart, without yellow, which is hard to see on white. The order keeps
# the first four distinct in grayscale. Markers distinguish runs of the same color. The numbers of markers and colors are coprime,
# so a pair repeats only after 56 runs.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#000000", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ERROR_BAND = "error-band"  # the SVG id of the bands of standard errors
BLUE, VERMILION, GREEN, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#666666"


class Style(NamedTuple):
    color: str
    marker: str


class Entry(NamedTuple):
    """One line of a legend."""

    handle: Artist
    label: str


def styles(count: int) -> list[Style]:
    return [Style(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i in range(count)]


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Create a grid of panels. Panels in a column share their steps; panels in a row share their values."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, wspace=0.03))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, [list(row) for row in grid]


def sample(**style: Any) -> Line2D:
    """Create a line for a legend that is drawn in no panel."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def measured(axes: Axes, c: Curve, style: Style, label: str | None = None, banded: bool = False) -> None:
    """Draw the values with their null, and their standard errors as bars or as a band."""
    axes.plot(c.steps, c.values, "-", color=style.color, marker=style.marker, markersize=4, label=label)
    axes.plot(
        c.steps, c.nulls, "--", color=style.color, linewidth=1.2, alpha=0.8, label=label and f"{label.split(' (')[0]}, random signs"
    )
    if banded:
        band(axes, c, style)
    elif c.errors is not None and np.isfinite(c.errors).any():
        axes.errorbar(c.steps, c.values, yerr=c.errors, fmt="none", ecolor=style.color, elinewidth=1.0, capsize=2.5)


def band(axes: Axes, c: Curve, style: Style) -> None:
    """Fill from one standard error below the values to one above."""
    if c.errors is not None and np.isfinite(c.errors).any():
        low, high = c.values - c.errors, c.values + c.errors
        axes.fill_between(c.steps, low, high, color=style.color, alpha=0.2, linewidth=0, gid=ERROR_BAND)


def has_band(axes: Axes) -> bool:
    """Whether :func:`band` has drawn in a panel."""
    return any(shape.get_gid() == ERROR_BAND for shape in axes.collections)


def positive(values: np.ndarray) -> np.ndarray:
    """Replace values that a log axis cannot show with NaN, which leaves a gap."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def step_axis(axes: Axes, steps: np.ndarray, label: str = "optimizer step") -> None:
    """Put log steps along x. Step 0, which a log axis cannot show, is drawn a short distance before step 1."""
    low, high = (float(steps.min()), float(steps.max())) if len(steps) else (1.0, 10.0)
    if low == 0:
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xlim(-0.15, max(high, 1) * 1.25)
    else:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.25, high * 1.25)
    first = max(low, 1.0)
    decades = math.log10(max(high, 1.0) / first)
    powers = 10.0 ** np.arange(math.floor(math.log10(first)), math.log10(max(high, 10)) + 1)
    marks = (powers[:, None] * np.array([1, 2, 5] if decades < 2.5 else [1])).ravel()
    if decades < 0.7:
        own = np.unique(steps)
        marks = own if 0 < len(own) <= 6 else _round(first, high, 7, integer=True)
    _fix(axes, "x", np.append(marks, 0.0) if low == 0 else marks, lambda step, _: count(step))
    axes.set_xlabel(label)


def count(x: float) -> str:
    """Format as 1, 10, 100, 1k, 10k or 1M, and as 2,048 if the number is not that round."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            short = f"{x / size:.10g}{unit}"
            return short if len(short) <= 4 else f"{x:,.10g}"
    return f"{x:.10g}"


def value_axis(axes: Axes, values: np.ndarray, along: str = "y") -> None:
    """Make a log axis with readable ticks, since matplotlib draws none over less than a decade.

    Values that are not positive become gaps. The axis stays linear if no value is positive.
    """
    values = values[positive(values) > 0]
    if not len(values):
        return
    (axes.set_yscale if along == "y" else axes.set_xscale)("log", nonpositive="mask")
    margin = max((values.max() / values.min()) ** 0.05, 1.05)
    low, high = values.min() / margin, values.max() * margin
    (axes.set_ylim if along == "y" else axes.set_xlim)(low, high)
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    marks = _round(low, high)
    if high / low >= 3:
        spaced = [(decades[:, None] * np.array(parts)).ravel() for parts in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,))]
        room = 8 if along == "y" else 6
        marks = next(
            (marks for marks in spaced if np.sum((marks >= low) & (marks <= high)) <= room), decades[:: len(decades) // 6 + 1]
        )
    _fix(axes, along, marks[marks > 0], lambda x, _: f"{x:g}")


def interference_axis(axes: Axes, values: np.ndarray, label: str) -> None:
    """Put D along y, spaced by log(1 − D): the distance from 0.9 to 0.99 equals that from 0.99 to 0.999.

    The ticks show D. The axis cannot show D = 1.
    """
    values = values[np.isfinite(values) & (values < 1)]
    away = 1 - values if len(values) else np.array([0.1, 1.0])
    low, high = max(away.min() / 1.3, 1e-15), min(away.max() * 1.3, max(1.0, away.max()) * 1.08)
    axes.set_yscale("function", functions=(_nines, lambda y: 1 - 10.0**-y))
    axes.set_ylim(1 - high, 1 - low)
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), 1)
    if high / low < 4:
        marks = _round(1 - high, 1 - low)
    else:
        parts = [1, 2, 3, 5, 7] if high / low < 30 else [1, 2, 5] if high / low < 1e4 else [1]
        marks = 1 - (decades[:, None] * np.array(parts)).ravel()
    _fix(axes, "y", marks[marks < 1], lambda d, _: f"{d:.10g}".replace("-", "−"))
    axes.set_ylabel(label)


def _nines(d: np.ndarray) -> np.ndarray:
    """Return −log₁₀(1 − D), the number of nines of D."""
    return -np.log10(np.maximum(1 - np.asarray(d), 1e-300))


def _round(low: float, high: float, most: int = 6, integer: bool = False) -> np.ndarray:
    """Return round numbers between the two, and one beyond each."""
    from matplotlib.ticker import MaxNLocator

    return np.asarray(MaxNLocator(most, integer=integer, steps=[1, 2, 5, 10]).tick_values(low, high))


def _fix(axes: Axes, along: str, marks: np.ndarray, words: Callable[[float, int | None], str]) -> None:
    """Put ticks only at the marks that are in sight."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis, (low, high) = (axes.yaxis, axes.get_ylim()) if along == "y" else (axes.xaxis, axes.get_xlim())
    axis.set_major_locator(FixedLocator([float(mark) for mark in np.unique(marks) if low <= mark <= high]))
    axis.set_major_formatter(FuncFormatter(words))
    axis.set_minor_locator(NullLocator())


def titles(titled: Sequence[tuple[Axes, str, str]], characters: int = 72, gap: int = 6) -> None:
    """Write the titles of panels in a row. Below each title, in smaller letters, write what the panel's values are over.

    The lower text is ``gap`` points above the panel.
    """
    below = [wrap(over, characters) for _, _, over in titled]
    most = max(map(len, below))
    for (axes, text, _), lines in zip(titled, below, strict=True):
        axes.set_title(text, fontsize=11, loc="left", pad=gap + 2 + 11 * most)
        said = "\n".join(lines + [""] * (most - len(lines)))
        style: dict[str, Any] = {"fontsize": 8, "color": "#444444", "va": "bottom", "parse_math": False}
        axes.annotate(said, (0, 1), xytext=(0, gap), xycoords="axes fraction", textcoords="offset points", **style)


def legend(figure: Figure, entries: Sequence[Entry], columns: int = 4) -> None:
    """Draw the legend below the panels, where it hides no data. The figure grows by the legend's height."""
    letters = int(figure.get_figwidth() * 13)  # how many fit into a line
    labels = ["\n".join(wrap(entry.label, letters - 8)) for entry in entries]
    lengths = [max(map(len, label.split("\n"))) + 8 for label in labels]
    columns = next(n for n in range(min(columns, len(entries)), 0, -1) if n == 1 or _width(lengths, n) <= letters)
    rows = math.ceil(len(entries) / columns)
    heights = [label.count("\n") + 1 for label in labels]
    lines = sum(heights) if columns == 1 else rows * max(heights)
    figure.set_figheight(figure.get_figheight() + 0.19 * lines + 0.1)
    made = figure.legend(
        [entry.handle for entry in entries],
        [label if not label.startswith("_") else f" {label}" for label in labels],  # matplotlib hides labels that start with _
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    for text in made.get_texts():
        text.set_parse_math(False)  # a $ in a run's name does not start math


def _width(lengths: Sequence[int], columns: int) -> int:
    """Return the width of a legend whose columns are filled one after the other, as evenly as possible."""
    rows, long = divmod(len(lengths), columns)
    starts = np.cumsum([0] + [rows + (column < long) for column in range(columns)])
    return sum(max(lengths[start:end]) for start, end in pairwise(starts))


def legend_of(figure: Figure, axes: Axes, columns: int) -> None:
    """Draw a legend of the panel's own lines, below the panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, according to the path's suffix, and replace the file as a whole.

    The same figure gives the same bytes.

    Raises:
        OSError: the file cannot be written; ``filename`` is its path.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else None
    for text in figure.findobj(Text):
        if (said := printable(text.get_text(), kept="\n")) != text.get_text():  # XML, and so SVG, does not allow control characters
            text.set_text(said)
    with replacing(path) as new, rc_context({"svg.hashsalt": "zerosum"}):
        figure.savefig(new, format=kind, dpi=150, metadata=metadata)
