"""Measures every way on every case."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from zerosum.bench import accuracy, machine
from zerosum.bench.cases import Case
from zerosum.bench.memory import Forks, OutOfMemory, on_cuda, reason
from zerosum.bench.result import MB, Errors, Result, Row, Section
from zerosum.bench.timing import compare
from zerosum.bench.ways import Pass, Way


def available(case: Case[Any]) -> list[Way[Any]]:
    """The ways whose package is installed; the baseline comes first."""
    return [way for way in case.ways if not way.package or importlib.util.find_spec(way.package) is not None]


def small_cases(cases: Sequence[Case[Any]]) -> list[Case[Any]]:
    """A small case of each kind and precision, on which errors are measured."""
    return list(dict.fromkeys(case.small() for case in cases))


def measurements(cases: Sequence[Case[Any]]) -> int:
    """How often :func:`measure` reports progress."""
    return sum(len(available(case)) for case in cases) + len(small_cases(cases))


def measure(
    cases: Sequence[Case[Any]],
    device: torch.device,
    seconds: float,
    progress: Callable[[str], None] = lambda what: None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Times, peak memory and errors of the ways of each case.

    Args:
        cases: what to measure.
        device: where.
        seconds: of timing, in all, each comparison the same share; where a few rounds take longer, they do.
        progress: called with what comes next.
        stop: asked between passes; once it says yes, what was measured so far is returned.
    """
    absent = sorted({way.package for case in cases for way in case.ways if way not in available(case)})
    result = Result(machine.describe(None if device.type == "cpu" else str(device)), tuple(absent))
    share = seconds / sum(len(available(case)) - 1 for case in cases)
    forked = Forks(torch.get_num_threads()) if device.type == "cpu" and hasattr(os, "fork") else nullcontext()
    with warnings.catch_warnings(), forked as forks:
        warnings.simplefilter("ignore")  # of peers
        for case in cases:
            baseline, *ways = available(case)
            progress(f"{case.title}: {baseline.name}")
            work = case.make(device)
            plain = baseline.settled(work)
            memory = forks.peak(case, baseline.name) / MB if forks else _cuda_peak(plain)
            section = Section(case.title, case.note, baseline, memory)
            result.sections.append(section)
            for way in ways:
                if stop():
                    return result
                progress(f"{case.title}: {way.name.strip()}")
                row = _row(case, way, work, plain, share, forks, stop)
                if row is None:
                    return result
                section.rows.append(row)
            del work, plain
        for case in small_cases(cases):
            if stop():
                return result
            progress(f"accuracy: {case.title}")
            result.accuracy.append(Errors(case.title, accuracy.errors(case, available(case), device)))
    result.complete = True
    return result


def _row(
    case: Case[Any], way: Way[Any], work: Any, plain: Pass, share: float, forks: Forks | None, stop: Callable[[], bool]
) -> Row | None:
    """None if it was stopped."""
    try:
        # On a CPU first, in a process of its own: one that lacks memory does not end this one.
        memory = forks.peak(case, way.name) / MB if forks else None
        run = way.settled(work)
        times = compare(run, plain, share, stop)
        return None if times is None else Row(way, times, memory if forks else _cuda_peak(run))
    except (torch.cuda.OutOfMemoryError, OutOfMemory):
        torch.cuda.empty_cache()
        return Row(way, problem="out of memory")
    except Exception as error:  # of a peer, which may raise any
        return Row(way, problem=reason(error))


def _cuda_peak(run: Pass) -> float | None:
    """In MB; None where there is no CUDA device in use."""
    return on_cuda(run) / MB if torch.cuda.is_initialized() else None
