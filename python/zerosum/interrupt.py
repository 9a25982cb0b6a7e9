"""Ctrl-C and SIGTERM: ending at once and quietly, or waiting for a good moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]


class Interrupt:
    """While open, Ctrl-C and SIGTERM only ask: ``asked`` becomes true, so that a step and its records end whole. A second one ends
    it at once. At the end of the block, what SIGTERM asked for is done: ``SystemExit`` with code 143."""

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
    """A handler that ends the process as SIGTERM would, after what there is to clean up."""
    raise SystemExit(128 + number)


def leave(number: int, frame: FrameType | None) -> None:
    """A handler that ends the process at once, without a word."""
    os._exit(128 + number)


@contextmanager
def handling(number: int, instead_of: object, handler: _Handler) -> Iterator[None]:
    """While open, ``handler`` is a signal's, unless something else than ``instead_of`` is: a signal may be ignored from the start,
    as in the background of a shell. Signals are the main thread's; in another one nothing is changed."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) != instead_of:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, instead_of)
