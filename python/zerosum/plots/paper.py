"""Draws the figures of Mircea et al. (2025) for one or several runs.

They show the loss with its deceleration, interference D and magnitude M of loss changes, gradient interference, and the agreement
of gradients along the update.

Each figure is a function of :class:`zerosum.runs.Run` objects. A run keeps its color and marker in all figures. The text under a
panel's title says what its values are over; if this differs between runs, the legend says it for each run. A run that lacks a
panel's metrics is left out of the panel: :func:`lacking` lists these metrics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zerosum.curves import CurveError
from zerosum.deceleration import STRONG, Deceleration, fit
from zerosum.plots.axes import (
    BLACK,
    GREY,
    Entry,
    Style,
    band,
    has_band,
    interference_axis,
    legend,
    measured,
    panels,
    positive,
    sample,
    save,
    step_axis,
    styles,
    titles,
    value_axis,
)
from zerosum.records import Curve, smooth
from zerosum.runs import Run
from zerosum.training.comparison import mean_and_error
from zerosum.training.summary import ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.9  # width of a panel in inches
# The three ways to measure the change of the tokens' losses.
CHANGES = {
    "train": "Δt = 1, on the step's own batch",
    "held_out": "Δt = 1, on the evaluation set",
    "interval": "Between checkpoints, on the evaluation set",
}


class Part(NamedTuple):
    """A factor of C of the first-order loss changes: a metric, or the ratio of two metrics."""

    title: str
    label: str
    metrics: tuple[str, ...]


PARTS = (
    Part("Agreement of examples", "C_g (no unit)", ("C_g",)),
    Part("Agreement of coordinates", "C_(u,G) / C_(u,g) (no unit)", ("C_uG", "C_ug")),
)
COSINES = ("cosine_median", "cosine_q05", "cosine_q95")
# The names, for messages, of what a figure of single parameters needs.
LAYERS = "D_grad of single parameters"
DEPTHS = "D_grad of single parameters at several depths"
DASHES = (0, (4, 1.5))
POINTS = 3000  # most points to draw of a raw loss curve; more are not visible, and make an SVG large


class Panel(NamedTuple):
    axes: Axes
    title: str
    metric: str  # the metric whose examples the panel's text describes


def loss(runs: Sequence[Run], first: float = 100) -> Figure:
    """Draw loss against steps, log-log.

    The figure shows every training step, the moving average that is fitted, and the fit's two straight segments with the break
    (t_d, L_d) where they meet. It also shows the loss of checkpoints on their evaluation set, which is not fitted.

    Args:
        first: the fit uses only steps after this one, as in :func:`zerosum.deceleration.fit`.
    """
    figure, ((axes,),) = panels(1, 1, 8.6, 5.4)
    _expect([run for run in runs if drawable("loss", run)], "a training loss, or the loss of checkpoints")
    entries, shown, steps = [], [], []
    over = {run.name: _over_training(run) for run in runs if run.loss is not None}
    common, found = len(set(over.values())) == 1, set()
    for run, style in zip(runs, styles(len(runs)), strict=True):
        if run.loss is not None:
            deceleration, said = _fit(run, first) if not run.repeats else _fits(run, first)
            average = _draw_training(axes, run, style)
            steps.append(run.loss.steps)
            shown.append(average)
            if deceleration is not None:
                _draw_fit(axes, run.loss.steps, deceleration, style, first)
                found.add(deceleration.found)
            entries.append(
                Entry(
                    sample(color=style.color, linewidth=2, marker=style.marker),
                    f"{run.name}: {said}{'' if common else f'; {over[run.name]}'}",
                )
            )
        if run.has("loss"):
            c = run.curve("loss")
            axes.plot(c.steps, positive(c.values), style.marker, color=style.color, markersize=6, fillstyle="none")
            open_marker = sample(color=style.color, linestyle="none", marker=style.marker, fillstyle="none")
            entries.append(Entry(open_marker, f"{run.name}: checkpoints, {run.over('loss', runs)[0]}"))
            steps.append(c.steps)
            shown.append(c.values)
    if has_band(axes):
        entries.append(_band())
    if any(run.loss is not None and not run.smoothed for run in runs):
        entries.append(Entry(sample(color=GREY, linewidth=0.8, alpha=0.5), "every step; the strong line is its moving average"))
    if False in found:
        entries.append(Entry(sample(color=BLACK, linestyle=":", linewidth=1.4), "the fit, where no deceleration was found"))
    if True in found:
        entries.append(Entry(sample(color=BLACK, linestyle=DASHES, linewidth=1.2), "the fit's two straight segments"))
    step_axis(axes, np.concatenate(steps))
    value_axis(axes, np.concatenate(shown))
    axes.set_ylabel("loss (nats per token)")
    titles([(axes, "Loss", next(iter(over.values())) if common else "")], 110)
    legend(figure, entries, columns=1)
    return figure


def interference(runs: Sequence[Run]) -> Figure:
    """Draw D = 1 − |Σ Δℓ| / Σ |Δℓ| and M = mean |Δℓ| of the tokens' loss changes against steps, with D's null.

    Each column shows one way to measure the change.
    """
    kinds = _changes(runs)
    figure, (upper, lower) = panels(2, len(kinds), WIDTH * len(kinds) + 1, 6.4)
    top = [Panel(axes, CHANGES[kind], f"{kind}.D") for axes, kind in zip(upper, kinds, strict=True)]
    sizes: dict[str, list[np.ndarray]] = {"one step": [], "interval": []}  # two scales: the magnitudes differ widely
    for d_axes, m_axes, kind in zip(upper, lower, kinds, strict=True):
        steps = []
        for run, style in _with(runs, f"{kind}.D", f"{kind}.M"):
            d, m = run.curves(f"{kind}.D", f"{kind}.M")
            measured(d_axes, d, style, banded=bool(run.repeats))
            measured(m_axes, m, style, banded=bool(run.repeats))
            steps += [d.steps, m.steps]
            sizes[_scale(kind)] += _seen(m)
        for axes in (d_axes, m_axes):
            step_axis(axes, np.concatenate(steps), "optimizer step t" if kind == "interval" else "optimizer step")
        d_axes.set_xlabel("")
        d_axes.set_ylim(-0.03, 1.03)
    for axes, kind in zip(lower, kinds, strict=True):
        value_axis(axes, np.concatenate(sizes[_scale(kind)]))
    upper[0].set_ylabel("D of loss changes (no unit)")
    lower[0].set_ylabel("M = mean |Δℓ| (nats)")
    _explain(figure, runs, top)
    return figure


def plane(runs: Sequence[Run]) -> Figure:
    """Draw D against M with lines of equal |ΔL| = M (1 − D).

    Each panel shows one way to measure the change. The first step has a hollow marker, the last step a large one.
    """
    kinds = _changes(runs)
    figure, (row,) = panels(1, len(kinds), WIDTH * len(kinds) + 1, 4.6)
    spans: dict[str, list[int]] = {}
    for axes, kind in zip(row, kinds, strict=True):
        all_d, all_m = [], []
        for run, style in _with(runs, f"{kind}.D", f"{kind}.M"):
            d, m = run.curves(f"{kind}.D", f"{kind}.M")
            axes.plot(m.values, d.values, "-", color=style.color, marker=style.marker, markersize=3.5, linewidth=1.2)
            both = np.flatnonzero(np.isfinite(d.values) & np.isfinite(m.values))[[0, -1]]
            for end, size, face in zip(both, (7, 10), ("white", style.color), strict=True):
                axes.plot(m.values[end], d.values[end], style.marker, markersize=size, color=style.color, markerfacecolor=face)
            spans.setdefault(run.name, []).extend(int(d.steps[end]) for end in both)
            all_d.append(d.values)
            all_m.append(m.values)
        value_axis(axes, np.concatenate(all_m), "x")
        interference_axis(axes, np.concatenate(all_d), "D of loss changes, spaced by log(1 − D)" if axes is row[0] else "")
        axes.grid(False)
        _iso_lines(axes)
        axes.set_xlabel("M = mean |Δℓ| (nats)")
    iso = Entry(sample(color="#aaaaaa", linewidth=0.8), "equal |ΔL| = M (1 − D), in nats")
    ends = {name: f"steps {min(steps):,} (hollow) to {max(steps):,} (large)" for name, steps in spans.items()}
    shown = [Panel(axes, CHANGES[kind], f"{kind}.D") for axes, kind in zip(row, kinds, strict=True)]
    _explain(figure, runs, shown, ends, [iso], gap=16)  # leaves room for the values above the lines
    return figure


def gradients(runs: Sequence[Run]) -> Figure:
    """Draw D(∇ℓ), the gradients' interference averaged over coordinates, against steps, with its null.

    The axis is spaced by log(1 − D), because late values lie between 0.98 and 0.995, where a plain axis shows no difference.
    """
    _expect(_with(runs, "D_grad"), "D_grad")
    figure, ((axes,),) = panels(1, 1, 7.4, 4.6)
    shown, steps = [], []
    for run, style in _with(runs, "D_grad"):
        c = run.curve("D_grad")
        measured(axes, c, style, banded=bool(run.repeats))
        shown += _seen(c)
        steps.append(c.steps)
    step_axis(axes, np.concatenate(steps))
    interference_axis(axes, np.concatenate(shown), "D(∇ℓ), spaced by log(1 − D)")
    _explain(figure, runs, [Panel(axes, "Gradient interference, mean over coordinates", "D_grad")])
    return figure


def decomposition(runs: Sequence[Run]) -> Figure:
    """Draw C_g and C_(u,G) / C_(u,g) along the update against steps, with their nulls.

    Their product is C of the first-order loss changes.
    """
    shown = [part for part in PARTS if any(run.has(*part.metrics) for run in runs)]
    _expect(shown, "C_g, or C_uG and C_ug")
    figure, (row,) = panels(1, len(shown), WIDTH * len(shown) + 1, 4.6)
    for axes, part in zip(row, shown, strict=True):
        seen, steps = [], []
        for run, style in _with(runs, *part.metrics):
            c = run.each(partial(_part, part=part))
            measured(axes, c, style, banded=bool(run.repeats))
            seen += _seen(c)
            steps.append(c.steps)
        step_axis(axes, np.concatenate(steps))
        value_axis(axes, np.concatenate(seen))
        axes.set_ylabel(part.label)
    _explain(figure, runs, [Panel(axes, part.title, part.metrics[0]) for axes, part in zip(row, shown, strict=True)])
    return figure


def pairs(runs: Sequence[Run]) -> Figure:
    """Draw the cosines of pairs of examples' gradients, and the share of opposed examples, against steps.

    The cosines are drawn as their median, with a band from the 5 % to the 95 % quantile. An example is opposed if a small step
    along the others' gradient raises its loss.
    """
    shown = [metrics for metrics in (COSINES, ("opposed_examples",)) if any(run.has(*metrics) for run in runs)]
    _expect(shown, "the quantiles of the pairs' cosines, or opposed_examples")
    figure, (row,) = panels(1, len(shown), WIDTH * len(shown) + 1, 4.6)
    explained = []
    for axes, metrics in zip(row, shown, strict=True):
        steps = []
        for run, style in _with(runs, *metrics):
            middle, *edges = run.curves(*metrics)
            measured(axes, middle, style, banded=bool(run.repeats))
            if edges:
                axes.fill_between(middle.steps, edges[0].values, edges[1].values, color=style.color, alpha=0.15, linewidth=0)
            steps.append(middle.steps)
        step_axis(axes, np.concatenate(steps))
        of_cosines = len(metrics) > 1
        axes.set_ylim((-1.03, 1.03) if of_cosines else (-0.03, 1.03))
        axes.set_ylabel("cosine of two gradients" if of_cosines else "share of the examples")
        title = "Pairs of examples: median, 5 % to 95 %" if of_cosines else "Examples that the others' step hurts"
        explained.append(Panel(axes, title, metrics[0]))
    _explain(figure, runs, explained)
    return figure


def _band() -> Entry:
    from matplotlib.patches import Patch

    return Entry(Patch(color=GREY, alpha=0.3, linewidth=0), "± one standard error over the seeds")


def _part(run: Run, part: Part) -> Curve:
    curves = run.curves(*part.metrics)
    return ratio(*curves) if len(curves) == 2 else curves[0]


def layers(runs: Sequence[Run]) -> Figure:
    """Draw D(∇ℓ) of each kind of parameter against steps, with its null.

    Each value is the mean over the depths that have the parameter.
    """
    _expect(_with(runs, LAYERS), LAYERS)
    kinds = _kinds(runs)
    figure, shown = _grid(len(kinds))
    seen, panels_of = [], []
    for axes, (kind, title) in zip(shown, kinds.items(), strict=True):
        steps = []
        for run, style in _with(runs, LAYERS):
            if names := [name for name in run.parameters("D_grad") if _place(name)[0] == kind]:
                c = run.each(partial(_mean_of, names=names))
                measured(axes, c, style, banded=bool(run.repeats))
                seen += _seen(c)
                steps.append(c.steps)
                metric = f"D_grad/{names[0]}"
        step_axis(axes, np.concatenate(steps))
        panels_of.append(Panel(axes, title, metric))
    for axes in shown:
        interference_axis(axes, np.concatenate(seen), "D(∇ℓ), spaced by log(1 − D)")
    _outer_labels(shown)
    _explain(figure, runs, panels_of)
    return figure


def depths(runs: Sequence[Run]) -> Figure:
    """Draw D(∇ℓ) of each kind of parameter against its depth in the model.

    Hollow markers show the first measured step, filled ones the last step with its null.
    """
    _expect(_with(runs, DEPTHS), DEPTHS)
    kinds = {kind: title for kind, title in _kinds(runs).items() if any(len(_at_depths(run, kind)) > 1 for run in runs)}
    figure, shown = _grid(len(kinds))
    seen, panels_of, spans = [], [], {}
    for axes, (kind, title) in zip(shown, kinds.items(), strict=True):
        for run, style in _with(runs, DEPTHS):
            if names := _at_depths(run, kind):
                steps = run.curve(f"D_grad/{names[0]}").steps
                first, last = (run.each(partial(_over_depth, names=names, step=step)) for step in (steps[0], steps[-1]))
                axes.plot(first.steps, first.values, ":", color=style.color, marker=style.marker, markersize=5, fillstyle="none")
                measured(axes, last, style, banded=bool(run.repeats))
                seen += [first.values, *_seen(last)]
                spans[run.name] = f"steps {steps[0]:,} (hollow) and {steps[-1]:,}"
                metric = f"D_grad/{names[0]}"
        axes.locator_params(axis="x", nbins=8, integer=True)
        axes.set_xlabel("block, counted from 0 at the input")
        panels_of.append(Panel(axes, title, metric))
    for axes in shown:
        interference_axis(axes, np.concatenate(seen), "D(∇ℓ), spaced by log(1 − D)")
    _outer_labels(shown)
    _explain(figure, runs, panels_of, spans)
    return figure


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """Create ``count`` panels in rows of up to three."""
    columns = _columns(count)
    rows = math.ceil(count / columns)
    figure, grid = panels(rows, columns, 4.0 * columns + 1, 3.3 * rows + 0.6)
    every = [axes for row in grid for axes in row]
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def _columns(count: int) -> int:
    return 2 if count == 4 else min(count, 3)


def _outer_labels(shown: Sequence[Axes]) -> None:
    """Label only the leftmost panels and the lowest panel of each column, because all panels share their labels."""
    columns = _columns(len(shown))
    for number, axes in enumerate(shown):
        if number % columns:
            axes.set_ylabel("")
        if number + columns < len(shown):
            axes.set_xlabel("")


def _place(parameter: str) -> tuple[str, int | None]:
    """Split a parameter's name into its kind, which is the name without its first number, and its depth, which is that number."""
    before, number, after = (*re.split(r"(?:^|(?<=\.))(\d+)(?=\.|$)", parameter, maxsplit=1), "", "")[:3]
    return (f"{before}*{after}", int(number)) if number else (parameter, None)


def _kinds(runs: Sequence[Run]) -> dict[str, str]:
    """Return the kinds of parameters of all runs, with a title for each.

    The title omits the name of the blocks if it is still unique.
    """
    kinds = list(dict.fromkeys(_place(name)[0] for run in runs for name in run.parameters("D_grad")))
    short = [kind.partition("*.")[2].removesuffix(".weight") or kind.removesuffix(".weight") for kind in kinds]
    return {kind: name if short.count(name) == 1 else kind for kind, name in zip(kinds, short, strict=True)}


def _at_depths(run: Run, kind: str) -> list[str]:
    """Return the run's parameters of a kind that are in blocks, by depth."""
    found = [(depth, name) for name in run.parameters("D_grad") for k, depth in [_place(name)] if k == kind and depth is not None]
    return [name for _, name in sorted(found)]


def _mean_of(run: Run, names: Sequence[str]) -> Curve:
    """Return the mean of D_grad over parameters."""
    curves = run.curves(*(f"D_grad/{name}" for name in names))
    values, nulls = (np.mean([getattr(c, key) for c in curves], axis=0) for key in ("values", "nulls"))
    return Curve(curves[0].steps, values, nulls, curves[0].n)


def _over_depth(run: Run, names: Sequence[str], step: int) -> Curve:
    """Return D_grad of parameters at one step as a curve over their depths instead of over steps."""
    curves = run.curves(*(f"D_grad/{name}" for name in names))
    at = curves[0].steps == step
    depth = np.array([_place(name)[1] for name in names])
    values, nulls = (np.concatenate([getattr(c, key)[at] for c in curves]) for key in ("values", "nulls"))
    return Curve(depth, values, nulls, curves[0].n)


class Drawing(NamedTuple):
    """A figure, the metrics that it needs, and its description for ``zerosum plot --help``.

    ``needs`` lists sets of metrics. A run is drawn if it has all metrics of one set. If the list is empty, the run needs a training
    loss.
    """

    draw: Callable[[Sequence[Run]], Figure]
    needs: tuple[tuple[str, ...], ...]
    shows: str


FIGURES = {
    "loss": Drawing(loss, (("loss",),), "log-log loss, the two straight segments of its fit and the break between them"),
    "interference": Drawing(
        interference,
        tuple((f"{kind}.D", f"{kind}.M") for kind in CHANGES),
        "D and M of the tokens' loss changes against steps: over one step, between checkpoints",
    ),
    "plane": Drawing(
        plane,
        tuple((f"{kind}.D", f"{kind}.M") for kind in CHANGES),
        "D against M, with lines of equal |change of the mean loss| = M (1 - D)",
    ),
    "gradients": Drawing(gradients, (("D_grad",),), "D of the gradients against steps, on an axis that shows the last per cent"),
    "decomposition": Drawing(
        decomposition, tuple(part.metrics for part in PARTS), "C_g and C_(u,G) / C_(u,g) along the update against steps"
    ),
    "pairs": Drawing(
        pairs,
        (COSINES, ("opposed_examples",)),
        "cosines of pairs of gradients, and the share of examples that the others' step hurts",
    ),
    "layers": Drawing(layers, ((LAYERS,),), "D of the gradients of each kind of parameter against steps, mean over depths"),
    "depths": Drawing(depths, ((DEPTHS,),), "D of the gradients of each kind of parameter against its depth, first and last step"),
}


def write(
    runs: Sequence[Run],
    folder: Path,
    names: Sequence[str] = tuple(FIGURES),
    kinds: Sequence[str] = ("png", "svg"),
    first: float = 100,
) -> list[Path]:
    """Draw the figures that some run has the metrics for, each with all runs that have them. Return the paths.

    Args:
        folder: the folder for the files NAME.KIND. Each file is replaced as a whole.
        names: keys of ``FIGURES``. kinds: "png", "svg".
        first: as in :func:`loss`.

    Raises:
        OSError: a file cannot be written; ``filename`` is its path.
    """
    paths = []
    for name in names:
        if any(drawable(name, run) for run in runs):
            figure = loss(runs, first) if name == "loss" else FIGURES[name].draw(runs)
            for kind in kinds:
                paths.append(folder / f"{name}.{kind}")
                save(figure, paths[-1])
    return paths


def lacking(name: str, run: Run) -> list[str]:
    """Return the metrics whose absence removes a run from the figure ``name`` or from a part of it."""
    if name == "loss" and run.loss is not None:
        return []
    return [metric for metrics in FIGURES[name].needs for metric in metrics if not _has(run, metric)]


def drawable(name: str, run: Run) -> bool:
    """Whether the run has what at least one panel of the figure ``name`` needs."""
    return (name == "loss" and run.loss is not None) or any(_has(run, *metrics) for metrics in FIGURES[name].needs)


def _has(run: Run, *metrics: str) -> bool:
    """Whether the run has the metrics of :meth:`Run.has`, or those that ``LAYERS`` or ``DEPTHS`` stands for."""
    if metrics == (LAYERS,):
        return any(run.has(f"D_grad/{name}") for name in run.parameters("D_grad"))
    if metrics == (DEPTHS,):
        return _has(run, LAYERS) and any(len(_at_depths(run, kind)) > 1 for kind in _kinds([run]))
    return run.has(*metrics)


def _with(runs: Sequence[Run], *metrics: str) -> list[tuple[Run, Style]]:
    return [(run, style) for run, style in zip(runs, styles(len(runs)), strict=True) if _has(run, *metrics)]


def _scale(kind: str) -> str:
    return "interval" if kind == "interval" else "one step"


def _seen(c: Curve) -> list[np.ndarray]:
    """Return all values of a curve that are drawn."""
    errors = np.array([]) if c.errors is None else np.concatenate((c.values + c.errors, c.values - c.errors))
    return [c.values, c.nulls, errors]


def _changes(runs: Sequence[Run]) -> list[str]:
    kinds = [kind for kind in CHANGES if any(run.has(f"{kind}.D", f"{kind}.M") for run in runs)]
    _expect(kinds, " or ".join(f"{kind}.D and {kind}.M" for kind in CHANGES))
    return kinds


def _expect(found: Sequence[object], metrics: str) -> None:
    if not found:
        raise ValueError(f"runs: expected one at least that has {metrics}")


def _explain(
    figure: Figure,
    runs: Sequence[Run],
    shown: Sequence[Panel],
    notes: Mapping[str, str] | None = None,
    others: Sequence[Entry] = (),
    gap: int = 6,
) -> None:
    """Add the titles, the texts on what the panels are over, and the legend. ``notes`` has more text about runs, by name."""
    added: dict[str, list[str]] = {run.name: [] for run in runs if any(run.has(panel.metric) for panel in shown)}
    titled = []
    for panel in shown:
        over = {run.name: run.over(panel.metric, runs) for run in runs if run.has(panel.metric)}
        alike = [len(set(parts)) == 1 for parts in zip(*over.values(), strict=True)]
        below = [part for part, same in zip(next(iter(over.values()), ()), alike, strict=True) if part and same]
        if not all(alike):
            below.append(f"{'the rest' if below else 'what this is over'} differs between runs: see the legend")
        titled.append((panel.axes, panel.title, ", ".join(below)))
        for name, parts in over.items():
            added[name] += [part for part, same in zip(parts, alike, strict=True) if part and not same and part not in added[name]]
    titles(titled, gap=gap)
    entries = []
    for run, style in zip(runs, styles(len(runs)), strict=True):
        if run.name in added:
            seeds = [f"mean of {len(run.repeats)} seeds"] if run.repeats else []
            said = "; ".join([*seeds, *([notes[run.name]] if notes and run.name in notes else []), *added[run.name]])
            handle = sample(color=style.color, marker=style.marker, markersize=5)
            entries.append(Entry(handle, f"{run.name}: {said}" if said else run.name))
    drawn = [panel.axes for panel in shown]
    if any(line.get_linestyle() == "--" and np.isfinite(line.get_ydata()).any() for axes in drawn for line in axes.lines):
        entries.append(Entry(sample(color=GREY, linestyle="--", linewidth=1.2), "what random signs would give (null)"))
    if any(axes.containers for axes in drawn):
        entries.append(
            Entry(sample(color=GREY, linestyle="none", marker="|", markersize=9), "± one standard error of the sampling")
        )
    if any(map(has_band, drawn)):
        entries.append(_band())
    legend(figure, [*entries, *others])


def _over_training(run: Run) -> str:
    n = run.loss.n if run.loss is not None else 0
    said = f"training loss before each step, N = {n:,} tokens" if n else "training loss, N not given"
    return f"{said}, a moving average" if run.smoothed else said


def _fit(run: Run, first: float) -> tuple[Deceleration | None, str]:
    """Fit a run's training loss. Return the fit and a text about it."""
    assert run.loss is not None
    try:
        found = fit(run.loss.steps, run.loss.values, smoothed=run.smoothed, first=first, bootstrap=0)
    except CurveError as error:
        return None, f"not fitted: {error}"
    if not found.found:
        return found, found.verdict
    numbers = (("L_d", found.L_d, ".2f"), ("t_d", found.t_d, ",.0f"), ("r_d", found.r_d, ".4f"))
    return found, ", ".join(f"{name} = {x:{form}}{_error(found.errors[name])}" for name, x, form in numbers)


def _fits(run: Run, first: float) -> tuple[Deceleration | None, str]:
    """Fit the mean of several seeds' losses, and each seed's.

    The text has the means of the seeds' fits with their standard errors.
    """
    found = [one for one, _ in (_fit(repeat, first) for repeat in run.repeats) if one is not None and one.found]
    said = f"{len(found)} of {len(run.repeats)} seeds decelerate"
    if found:
        numbers = (("L_d", ".2f"), ("t_d", ",.0f"), ("r_d", ".4f"))
        means = (f"{name} = {mean_and_error([getattr(one, name) for one in found], form)}" for name, form in numbers)
        said = ", ".join([said, *means])
    return _fit(run, first)[0], said


def _error(x: float) -> str:
    return f" ± {x:.1g}" if x < 10 else f" ± {x:,.0f}" if np.isfinite(x) else ""


def _draw_training(axes: Axes, run: Run, style: Style) -> np.ndarray:
    """Draw the losses and their moving average; return all values that are drawn."""
    assert run.loss is not None
    steps, values = run.loss.steps, run.loss.values
    if run.repeats:
        band(axes, run.each(_smoothed), style)
    average = values if run.smoothed else smooth(values)
    kept = np.unique(np.geomspace(1, len(steps), POINTS).astype(int)) - 1
    if not run.smoothed:
        axes.plot(steps[kept], positive(values[kept]), "-", color=style.color, alpha=0.3, linewidth=0.8)
    axes.plot(steps[kept], positive(average[kept]), "-", color=style.color, linewidth=2.2)
    return average[kept] if run.smoothed else np.concatenate((values[kept], average[kept]))


def _smoothed(run: Run) -> Curve:
    assert run.loss is not None
    return replace(run.loss, values=smooth(run.loss.values))


def _draw_fit(axes: Axes, steps: np.ndarray, found: Deceleration, style: Style, first: float) -> None:
    start, end = max(float(steps[0]), first), float(steps[-1])
    if not found.found:
        marks = np.geomspace(start, end, 200)
        straight = found.bic_one <= found.bic_two + STRONG  # if the curve bends without a break, the fitted curve itself is drawn
        axes.plot(marks, found.one(marks) if straight else found.at(marks), ":", color=BLACK, linewidth=1.4)
        return
    segment: dict[str, Any] = {"linestyle": DASHES, "color": BLACK, "linewidth": 1.2}
    axes.plot([start, found.t_d], found.early([start, found.t_d]), **segment)
    axes.plot([found.t_d, end], found.late([found.t_d, end]), **segment)
    axes.plot([found.t_d], [found.L_d], style.marker, color=style.color, markersize=9, markeredgecolor="white", zorder=4)


def _iso_lines(axes: Axes) -> None:
    """Draw lines of equal M (1 − D) at powers of ten, each with its value at the edge of the panel."""
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    if axes.get_xscale() != "log":  # every M is 0
        return
    least, most = low * (1 - top), high * (1 - bottom)
    steps = (1,) if most / least > 1000 else (1, 3) if most / least > 15 else (1, 2, 3, 5, 7)
    m = np.array([low, high])
    for level in (s * 10.0**k for k in range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1) for s in steps):
        if not least < level < most:
            continue
        axes.plot(m, 1 - level / m, "-", color="#bbbbbb", linewidth=0.8, zorder=0.5, scalex=False, scaley=False)
        by_the_top = level / (1 - top) < high
        where = (level / (1 - top), top) if by_the_top else (high, 1 - level / high)
        offset, align = ((0, 2), ("center", "bottom")) if by_the_top else ((3, 0), ("left", "center"))
        style: dict[str, Any] = {"fontsize": 7, "color": GREY, "ha": align[0], "va": align[1]}
        axes.annotate(f"{level:g}", where, xytext=offset, textcoords="offset points", annotation_clip=False, **style)
