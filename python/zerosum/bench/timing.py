"""Interleaved timing: machines are shared and clocks change, so that a ratio of two neighboring runs stays right where two separate
averages do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import NamedTuple

import torch

LEAST = 3  # rounds
MOST = 101
SHORT = 2e-3  # seconds that a sample takes at least: shorter calls are repeated


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        ordered = sorted(values)

        def at(share: float) -> float:
            position = share * (len(ordered) - 1)
            below = int(position)
            above = min(below + 1, len(ordered) - 1)
            return ordered[below] + (position - below) * (ordered[above] - ordered[below])

        return cls(at(0.25), at(0.5), at(0.75))


@dataclass(frozen=True)
class Times:
    """Of a subject and its baseline, in milliseconds, and the ratios of neighboring runs."""

    ratio: Quartiles
    ms: Quartiles
    baseline_ms: Quartiles
    rounds: int

    @classmethod
    def of(cls, subject: list[float], baseline: list[float]) -> Times:
        """From seconds."""
        ratio = Quartiles.of([x / y for x, y in zip(subject, baseline, strict=True)])
        ms, baseline_ms = (Quartiles.of([1e3 * x for x in seconds]) for seconds in (subject, baseline))
        return cls(ratio, ms, baseline_ms, len(subject))


def wait() -> None:
    """Until a CUDA device has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Of one call, its work on a device included; the results are dropped."""
    start = perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (perf_counter() - start) / repeats


def compare(
    subject: Callable[[], object], baseline: Callable[[], object], budget: float, stop: Callable[[], bool] = lambda: False
) -> Times | None:
    """Times both in turns for ``budget`` seconds, and :data:`LEAST` rounds at least; None if ``stop()`` comes first."""
    begin = perf_counter()
    repeats = [_repeats(function) for function in (baseline, subject)]
    found: list[list[float]] = [[], []]
    while len(found[0]) < LEAST or (perf_counter() - begin < budget and len(found[0]) < MOST):
        if stop():
            return None
        for times, function, often in zip(found, (baseline, subject), repeats, strict=True):
            times.append(seconds(function, often))
    return Times.of(found[1], found[0])


def _repeats(function: Callable[[], object]) -> int:
    """Calls in a sample, so that it takes :data:`SHORT` seconds at least. The first call compiles, plans and allocates."""
    return 1 if seconds(function) > 10 * SHORT else max(1, ceil(SHORT / seconds(function)))
