"""Ctrl-C that waits for a good moment."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupt:
    """While open, Ctrl-C only asks: ``asked`` becomes true, so that a step and its records end whole. A second one interrupts."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
