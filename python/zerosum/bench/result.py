"""What ``zerosum bench`` found: as a table for the terminal or in Markdown, and as JSON."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

from zerosum import tables
from zerosum.bench import machine
from zerosum.bench.statistics import LABELS, label
from zerosum.bench.timing import Times
from zerosum.bench.ways import Way

MB = 1e6
# The packages' names where they are installed from, by the name that is imported.
DISTRIBUTIONS = {"opacus": "opacus", "torchjd": "torchjd", "backpack": "backpack-for-pytorch"}
INSTALL = "pip install 'zsl_kernels[peers]'"


@dataclass(frozen=True)
class Row:
    """One way on one case: its times and its peak memory in MB, or the problem that it has."""

    way: Way[Any]
    times: Times | None = None
    memory: float | None = None
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        found = {"way": self.way.name.strip(), "ours": self.way.ours, "computes": list(self.way.computes), "peak_mb": self.memory}
        if self.times is None:
            return {**found, "problem": self.problem}
        quartiles = {name: getattr(self.times, name)._asdict() for name in ("ratio", "ms", "baseline_ms")}
        return {**found, **quartiles, "rounds": self.times.rounds}


@dataclass
class Section:
    """A case: its baseline's peak memory in MB, and its rows."""

    title: str
    note: str
    baseline: Way[Any]
    memory: float | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def baseline_ms(self) -> float | None:
        """The median over the rows' medians."""
        found = sorted(row.times.baseline_ms.median for row in self.rows if row.times)
        return found[len(found) // 2] if found else None

    def cells(self) -> list[list[str]]:
        head = ["", "computes", "ms", "ratio", "quartiles", "peak MB"]
        lines = [[self.baseline.name, label(self.baseline.computes), _ms(self.baseline_ms), "1.00", "", _mb(self.memory)]]
        for row in self.rows:
            ratio, quartiles = "—", row.problem and "see below"
            if row.times:
                low, median, high = row.times.ratio
                ratio, quartiles = f"{median:.2f}", f"{low:.2f}–{high:.2f}"
            ms = _ms(row.times.ms.median if row.times else None)
            lines.append([row.way.name, label(row.way.computes), ms, ratio, quartiles, _mb(row.memory)])
        return [head, *lines]

    def problems(self) -> list[str]:
        return [f"{row.way.name}: {row.problem}" for row in self.rows if row.problem]

    def as_json(self) -> dict[str, Any]:
        baseline = {"way": self.baseline.name, "ms": self.baseline_ms, "peak_mb": self.memory}
        return {"title": self.title, "note": self.note, "baseline": baseline, "rows": [row.as_json() for row in self.rows]}


@dataclass
class Errors:
    """Relative errors on a small case, of each way and statistic."""

    title: str
    errors: Mapping[str, Mapping[str, float]]

    def cells(self) -> list[list[str]]:
        names = [name for name in LABELS if any(name in of for of in self.errors.values())]
        lines = [[way, *(f"{of[name]:.0e}" if name in of else "" for name in names)] for way, of in self.errors.items() if of]
        return [["", *(LABELS[name] for name in names)], *lines]

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "errors": {way.strip(): of for way, of in self.errors.items() if of}}


@dataclass
class Result:
    """Everything that was found; ``absent`` has the packages of ways that are not installed."""

    machine: dict[str, Any]
    absent: tuple[str, ...] = ()
    sections: list[Section] = field(default_factory=list)
    accuracy: list[Errors] = field(default_factory=list)
    complete: bool = False

    def text(self) -> str:
        parts = [fill(f"Measured on {machine.line(self.machine)}.", tables.LINE)]
        for section in self.sections:
            parts.append(f"{section.title}\n{section.note}\n\n{tables.text(section.cells(), left=2)}")
            parts += ["\n".join(section.problems())] if section.problems() else []
        parts += [f"Accuracy: {of.title}\n\n{tables.text(of.cells())}" for of in self.accuracy]
        parts.append("\n".join(fill(note, tables.LINE, initial_indent="• ", subsequent_indent="  ") for note in self.notes()))
        return "\n\n".join(parts)

    def markdown(self) -> str:
        parts = ["# `zerosum bench`", f"Measured on {machine.line(self.machine)}."]
        for section in self.sections:
            parts.append(f"## {section.title}\n\n{section.note}\n\n{tables.markdown(section.cells(), left=2)}")
            parts += ["\n".join(f"- {problem}" for problem in section.problems())] if section.problems() else []
        parts += [f"## Accuracy: {of.title}\n\n{tables.markdown(of.cells())}" for of in self.accuracy]
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in self.notes()))
        return "\n\n".join(parts) + "\n"

    def as_json(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "machine": self.machine,
            "packages": self._versions(),
            "sections": [section.as_json() for section in self.sections],
            "accuracy": [of.as_json() for of in self.accuracy],
        }

    def notes(self) -> list[str]:
        """How to read the tables, what each way leaves out, and what was not measured."""
        noted: dict[str, list[str]] = {}
        for way in {row.way.name: row.way for section in self.sections for row in section.rows}.values():
            for note in way.notes:
                noted.setdefault(note, []).append(way.name)
        found = [
            "ratio, quartiles: of the ratios of neighboring runs to the baseline. peak MB: what a pass holds at most, beyond the "
            "model and the batch, or a call beyond its operands.",
            *(f"{'; '.join(names)}: {note}." for note, names in noted.items()),
        ]
        if versions := self._versions():
            found.append(", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
        if self.absent:
            found.append(f"Not installed: {', '.join(DISTRIBUTIONS[name] for name in self.absent)} ({INSTALL}).")
        return found

    def _versions(self) -> dict[str, str]:
        used = {row.way.package for section in self.sections for row in section.rows}
        return {name: importlib.metadata.version(name) for package, name in DISTRIBUTIONS.items() if package in used}


def _ms(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def _mb(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}" if x < 100 else f"{x:.0f}"
