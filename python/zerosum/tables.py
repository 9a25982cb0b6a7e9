"""Formats tables of words and numbers, with lists of sentences below them, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from zerosum.terminal import shown

LINE = 110

Cells = Sequence[Sequence[str]]  # a header, then rows with the same number of cells
Lists = Sequence[tuple[str, Sequence[str]]]  # a title and its sentences


def text(cells: Cells, lists: Lists = (), left: int = 1) -> str:
    """Format for the terminal. The first ``left`` columns are left-aligned, the others right-aligned."""
    cells = [[shown(cell) for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([*map(str.ljust, line[:left], widths), *map(str.rjust, line[left:], widths[left:])]) for line in cells]
    lines.insert(1, "─" * len(lines[0]))
    for title, items in lists:
        lines += ["", title, *(fill(item, LINE, initial_indent="• ", subsequent_indent="  ") for item in items)]
    return "\n".join(lines)


def markdown(cells: Cells, lists: Lists = (), left: int = 1) -> str:
    head, *body = ([shown(cell).replace("|", r"\|") for cell in line] for line in cells)
    rule = [*["---"] * left, *["--:"] * (len(head) - left)]
    lines = ["| " + " | ".join(line) + " |" for line in [head, rule, *body]]
    for title, items in lists:
        lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    return "\n".join(lines)
