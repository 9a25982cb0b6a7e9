"""Handles Ctrl-C and SIGTERM: the process ends at once and quietly, or at the next safe moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]


class Interrupt:
    """A context in which the first Ctrl-C or SIGTERM only sets ``asked``, so that the current step and its records are completed.

    A second signal ends the process at once. If SIGTERM came, the end of the block raises ``SystemExit`` with code 143.
    """

    def __init__(self) -> None:
        self.asked = False
        self._terminated = False

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._terminated and kind is None:
            raise SystemExit(128 + signal.SIGTERM)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._terminated |= number == signal.SIGTERM
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, terminate)


def terminate(number: int, frame: FrameType | None) -> None:
    """Handle a signal by ending the process with SIGTERM's exit code, after cleanup."""
    raise SystemExit(128 + number)


def leave(number: int, frame: FrameType | None) -> None:
    """Handle a signal by ending the process at once and silently."""
    os._exit(128 + number)


@contextmanager
def handling(number: int, instead_of: object, handler: _Handler) -> Iterator[None]:
    """Set ``handler`` for a signal inside the context, but only if its current handler is ``instead_of``.

    A signal may be ignored from the start, as for a shell's background process. Only the main thread handles signals, so in another
    thread this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) != instead_of:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, instead_of)
