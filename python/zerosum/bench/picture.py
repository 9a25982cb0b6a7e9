"""The result as a figure: of each case the ways' times, as ratios to the baseline, and beside them their peak memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from zerosum.bench.result import Result, Row, Section
from zerosum.bench.statistics import SUMS
from zerosum.plots.axes import BLACK, BLUE, GREY, VERMILION, Entry, legend, panels, save, titles

BAR = 0.27  # inches


def write(result: Result, path: Path) -> None:
    """PNG or SVG, as the path's ending says.

    Raises:
        OSError: the file cannot be written; ``filename`` is its path.
    """
    sections = [section for section in result.sections if any(row.times for row in section.rows)]
    bars = [len(section.rows) + 1 for section in sections]
    figure, grid = panels(len(sections), 2, 10.5, BAR * sum(bars) + 0.95 * len(sections))
    specification = grid[0][0].get_subplotspec()
    assert specification is not None
    specification.get_gridspec().set_height_ratios(bars)
    for section, (times, memory) in zip(sections, grid, strict=True):
        _draw_times(times, section)
        _draw_memory(memory, section)
        titles([(times, section.title, section.note), (memory, "", "")])
        times.set_yticks(range(len(section.rows) + 1), [section.baseline.name, *(row.way.name for row in section.rows)])
        memory.set_yticks(range(len(section.rows) + 1), [])
    kinds = {
        BLUE: "zsl_kernels",
        VERMILION: "other ways to Σg, Σ|g|, Σg² and the norms",
        GREY: "other ways to a part of these",
        BLACK: "the baseline",
    }
    legend(figure, [Entry(Patch(color=color), said) for color, said in kinds.items()])
    save(figure, path)


def _color(row: Row) -> str:
    return BLUE if row.way.ours else VERMILION if set(SUMS) <= set(row.way.computes) else GREY


def _draw_times(axes: Axes, section: Section) -> None:
    times = [row.times for row in section.rows]
    ratios = [1.0, *(t.ratio.median if t else 0.0 for t in times)]
    ends = [1.0, *(t.ratio.high if t else 0.0 for t in times)]
    said = ["1.00", *(f"{row.times.ratio.median:.2f}" if row.times else row.problem[:40] for row in section.rows)]
    _draw(axes, section, ratios, ends, said)
    for place, t in enumerate(times, 1):
        if t:
            axes.plot([t.ratio.low, t.ratio.high], [place, place], color=BLACK, linewidth=1)
    axes.axvline(1, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"time, relative to {section.baseline.name}")


def _draw_memory(axes: Axes, section: Section) -> None:
    peaks = [section.memory, *(row.memory for row in section.rows)]
    values = [x or 0.0 for x in peaks]
    _draw(axes, section, values, values, ["" if x is None else f"{x:.0f}" for x in peaks])
    axes.set_xlabel("peak memory (MB)")


def _draw(axes: Axes, section: Section, values: Sequence[float], ends: Sequence[float], said: Sequence[str]) -> None:
    """Bars, and words right of their ends."""
    axes.barh(range(len(values)), values, color=[BLACK, *map(_color, section.rows)], height=0.7)
    for place, (end, words) in enumerate(zip(ends, said, strict=True)):
        style: dict[str, Any] = {"fontsize": 8, "va": "center", "parse_math": False}
        axes.annotate(words, (end, place), xytext=(4, 0), textcoords="offset points", **style)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, max(ends) * 1.15 or 1)
    axes.grid(axis="y", visible=False)
