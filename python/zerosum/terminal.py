"""What reaches the terminal: names from files may hold control characters, which could write over what was said."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MOVES = re.compile("(\r|\x1b\\[A)")  # a progress bar's: to the beginning of the line, and up by one


def shown(text: object) -> str:
    """The text on one line, with escapes such as ``\\x1b`` and ``\\n`` in place of what is not printable: control characters, marks
    that change the direction of writing, lone surrogates, and line breaks of any kind."""
    return printable(str(text))


def printable(text: str, kept: str = "") -> str:
    """As :func:`shown`, apart from the characters in ``kept``."""
    if text.isprintable():
        return text
    return "".join(c if c in kept or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Shield:
    """A text stream that escapes what is not printable, apart from line feeds (and a progress bar's moves, where it has such)."""

    def __init__(self, stream: Any, moves: bool) -> None:
        self._stream = stream
        self._moves = moves

    def write(self, text: str) -> int:
        parts = _MOVES.split(text) if self._moves else [text]  # every second one is a move
        said = "".join(part if i % 2 else printable(part, "\n") for i, part in enumerate(parts))
        # An encoding that lacks our own letters, such as Σ, shows escapes of these.
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(said.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def shielded() -> Iterator[None]:
    """While open, nothing that is not printable reaches the terminal by ``print``, whatever it is of."""
    before = sys.stdout, sys.stderr
    # (Either is None where the process was started without it.)
    sys.stdout = before[0] and _Shield(before[0], moves=False)
    sys.stderr = before[1] and _Shield(before[1], moves=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
