"""Reads the sources' docstrings, which use a few marks of reStructuredText, as Markdown: roles become links, a paragraph that ends
in ``::`` precedes a block of Python, tables of two columns are kept, and the comment behind a field is the field's docstring."""

from __future__ import annotations

import re
from typing import Any

from griffe import Attribute, Docstring, Extension, Module, NameResolutionError, Object

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`(?P<short>~)?(?P<name>[\w.]+)`")
LITERAL = re.compile(r"(?P<before>[^\n]*[^\s:]):(?P<second>:)[ ]*\n\n(?P<block>(?:[ ]{4}[^\n]*\n|[ ]*\n)*(?:[ ]{4}[^\n]*))")
TABLE = re.compile(r"^=+  =+\n(?P<rows>.*?)^=+  =+$", re.DOTALL | re.MULTILINE)
OUTSIDE_CODE = re.compile(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)")  # a bar between cells' code
NAMES = re.compile(r"^ *\w+(?:, \w+)+(?=:)", re.MULTILINE)
COMMENT = re.compile(r"\s#\s*(?P<text>[^\"']*)$")


class Docstrings(Extension):
    def on_package(self, *, pkg: Module, **_: Any) -> None:
        translate(pkg)


def translate(where: Object) -> None:
    """The docstrings of an object and of its members."""
    if where.docstring is not None:
        where.docstring.value = as_markdown(where.docstring.value, where)
    for member in where.members.values():
        if isinstance(member, Object):
            if isinstance(member, Attribute) and where.is_class and member.docstring is None:
                member.docstring = behind(member)
            translate(member)


def behind(field: Attribute) -> Docstring | None:
    """The comment behind a field of a class."""
    comment = COMMENT.search(field.source.rstrip())
    return Docstring(comment["text"], parent=field) if comment else None


def as_markdown(text: str, where: Object) -> str:
    def link(role: re.Match[str]) -> str:
        name = role["name"]
        shown = name.rsplit(".", 1)[-1] if role["short"] else name
        first, _, rest = name.partition(".")
        for scope in (where, where.parent) if where.parent is not None else (where,):
            try:
                path = scope.resolve(first) + (f".{rest}" if rest else "")
                break
            except NameResolutionError:
                path = name  # a full path, or a name of another package
        return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'

    def fenced(block: re.Match[str]) -> str:
        lines = [line[4:] for line in block["block"].split("\n")]
        return f"{block['before']}:\n\n```python\n" + "\n".join(lines) + "\n```"

    def table(found: re.Match[str]) -> str:
        rows: list[list[str]] = []
        for line in found["rows"].splitlines():
            if line.startswith(" ") and rows:  # the cell before goes on
                rows[-1][1] += " " + line.strip()
            else:
                rows.append([cell.strip() for cell in re.split(r"  +", line, maxsplit=1)])
        cells = [" | ".join(OUTSIDE_CODE.sub(r"\\|", cell.replace("``", "`")) for cell in row) for row in rows]
        return "\n".join(["| | |", "|---|---|", *(f"| {row} |" for row in cells)])

    def one_name(names: re.Match[str]) -> str:
        return names[0].replace(", ", ",\u00a0")  # a space would end the name

    return NAMES.sub(one_name, ROLE.sub(link, LITERAL.sub(fenced, TABLE.sub(table, text))))
