"""Results as tables: in the terminal, as Markdown and as JSON."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Cell:
    """One number of a table: a median, perhaps with a target that it should not exceed."""

    value: float
    unit: str  # "×" a ratio of times, "ms", "ms, finely", "µs", "GFLOP/s", "MB", or "" for a count
    target: float | None = None
    details: dict[str, object] = field(default_factory=dict)  # for the JSON: quartiles, rounds, what was compared

    @property
    def missed(self) -> bool:
        return self.target is not None and round(self.value, 2) > self.target

    def __str__(self) -> str:
        digits = {"×": 2, "ms, finely": 3, "": 0}.get(self.unit, -1)
        digits = digits if digits >= 0 else 1 if self.value < 100 else 0
        text = f"{self.value:.{digits}f}"
        if self.target is None:
            return text
        target = f"{self.target:.{digits}f}"
        return f"{text} > {target} ✗" if self.missed else f"{text} ≤ {target}"


@dataclass
class Table:
    """Rows are cases, columns what was measured on them. Rows and columns stand in the order in which they first came."""

    title: str
    note: str
    rows: dict[str, dict[str, Cell]] = field(default_factory=dict)

    def add(self, row: str, column: str, cell: Cell) -> None:
        """The first cell of a place stays: several columns share a row's baseline."""
        self.rows.setdefault(row, {}).setdefault(column, cell)

    def missed(self) -> list[tuple[str, str, Cell]]:
        """Row, column and cell of what missed its target."""
        return [(row, column, cell) for row, cells in self.rows.items() for column, cell in cells.items() if cell.missed]

    def as_text(self) -> str:
        lines = self._lines()
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        aligned = []
        for row, *texts in lines:
            aligned.append("  ".join([row.ljust(first), *(text.rjust(width) for text, width in zip(texts, others, strict=True))]))
        note = textwrap.wrap(self.note, 110)
        return "\n".join([self.title, *(f"  {line}".rstrip() for line in (*note, "", *aligned))])

    def as_markdown(self) -> str:
        head, *body = self._lines()
        rule = ["---", *["---:"] * (len(head) - 1)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))
        return f"### {self.title}\n\n{self.note}\n\n{table}\n"

    def as_json(self) -> dict[str, object]:
        rows = {}
        for row, cells in self.rows.items():
            rows[row] = {column: {**asdict(cell), "missed": cell.missed} for column, cell in cells.items()}
        return {"title": self.title, "note": self.note, "rows": rows}

    def _lines(self) -> list[list[str]]:
        columns = list(dict.fromkeys(column for cells in self.rows.values() for column in cells))
        body = [[row, *(str(cells.get(column, "")) for column in columns)] for row, cells in self.rows.items()]
        return [["", *columns], *body]
