"""Tables of words and numbers: a head, then lines of as many cells."""

from __future__ import annotations

from collections.abc import Sequence

Cells = Sequence[Sequence[str]]


def text(cells: Cells) -> str:
    """For the terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    lines.insert(1, "─" * len(lines[0]))
    return "\n".join(lines)


def markdown(cells: Cells) -> str:
    head, *body = cells
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])
