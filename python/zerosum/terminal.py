"""Protects the terminal from control characters, for example in file names, which could overwrite earlier output."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MOVES = re.compile("(\r|\x1b\\[A)")  # the moves of a progress bar: to the beginning of the line, and one line up


def shown(text: object) -> str:
    """Return the text on one line, with escapes such as ``\\x1b`` and ``\\n`` in place of characters that are not printable.

    These are control characters, marks that change the direction of writing, lone surrogates, and line breaks of any kind.
    """
    return printable(str(text))


def printable(text: str, kept: str = "") -> str:
    """Escape as :func:`shown` does, except the characters in ``kept``."""
    if text.isprintable():
        return text
    return "".join(c if c in kept or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Shield:
    """A text stream that escapes what is not printable, except line feeds and, if ``moves`` is set, a progress bar's moves."""

    def __init__(self, stream: Any, moves: bool) -> None:
        self._stream = stream
        self._moves = moves

    def write(self, text: str) -> int:
        parts = _MOVES.split(text) if self._moves else [text]  # every second part is a move
        said = "".join(part if i % 2 else printable(part, "\n") for i, part in enumerate(parts))
        # If the encoding lacks letters of our own texts, such as Σ, they are shown as escapes.
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(said.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def shielded() -> Iterator[None]:
    """Escape everything that is not printable in what ``print`` writes to the terminal inside the context."""
    before = sys.stdout, sys.stderr
    # (Either stream is None if the process was started without it.)
    sys.stdout = before[0] and _Shield(before[0], moves=False)
    sys.stderr = before[1] and _Shield(before[1], moves=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
