"""Reads and writes the records of a run, one JSON object on each line, and extracts curves from them.

A record has a ``kind``, a ``step`` and ``metrics``. Each metric is ``{"value", "n", "null"}``, optionally with ``error`` and
``debiased``: the fields of :class:`zerosum.metrics.Metric`. JSON has no NaN, so a value that is not finite is null.

=========  =====================================================================================================================
``step``   every training step: ``train.loss`` before it and ``train.grad_norm`` before clipping
``probe``  the measurements around one step: gradient metrics over sequences, ``train.*`` and ``held_out.*`` over tokens;
           ``D_grad/NAME`` and ``C_g/NAME`` are for the parameter NAME alone
``cost``   at the run's end: the seconds of forward and backward passes, plain and probed in turns
=========  =====================================================================================================================

``zerosum measure`` writes records of kind ``checkpoint``, see :mod:`zerosum.measurement`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zerosum.files import Lock, lines, naming, open_file, parse, replace_text
from zerosum.metrics import Metric

Record = dict[str, Any]
BEGINNING = b'{"kind": "'  # how every line starts that ``record`` and ``encode`` make


def record(kind: str, step: int, metrics: Mapping[str, Metric], **others: Any) -> Record:
    return {"kind": kind, "step": step, **others, "metrics": {name: _fields(metric) for name, metric in metrics.items()}}


def _fields(metric: Metric) -> dict[str, Any]:
    optional = ("error", "debiased")
    return {key: value for key, value in metric._asdict().items() if key not in optional or value is not None}


def encode(entry: Record) -> str:
    """Encode a record as one line of JSON."""
    return json.dumps(finite(entry), allow_nan=False, ensure_ascii=False) + "\n"


class RecordFile:
    """A file of records that only grows, by one whole line at a time. A last line that a crash cut off is dropped.

    Args:
        path: the file.
        lock: whether to lock the file against other processes; False if the folder's lock already does.

    Attributes:
        records: the records in the file.

    Raises:
        ValueError: the file holds something else, and is left unchanged; the message says where.
        BlockingIOError: another process writes to the file; ``strerror`` says which.
        OSError: the file cannot be used.
    """

    def __init__(self, path: Path, lock: bool = True) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(path) if lock else None
        try:
            self.records, size = _read(path) if path.exists() else ([], 0)
            self._file = path.open("ab", buffering=0)
            if size < os.fstat(self._file.fileno()).st_size:
                self._file.truncate(size)
        except BaseException:
            self._unlock()
            raise

    def append(self, entry: Record, sync: bool = True) -> None:
        """Add a record by one write, which no signal can interrupt. The record is on disk when this returns.

        With ``sync=False`` the operating system decides when to write to disk: the record survives a crash of the process, but
        maybe not a crash of the machine.

        Raises:
            OSError: for example, the disk is full; the file is as it was before.
        """
        line = encode(entry)
        content = line.encode("utf-8", "backslashreplace")
        size = os.fstat(self._file.fileno()).st_size
        with naming(self.path):
            try:
                while content:  # a disk that fills up accepts a part and refuses the rest
                    content = content[self._file.write(content) :]
                if sync:
                    self.sync()
            except OSError:
                self._file.truncate(size)
                raise
        self.records.append(json.loads(line))

    def sync(self) -> None:
        """Write every record to disk."""
        os.fsync(self._file.fileno())

    def keep_up_to(self, step: int) -> None:
        """Drop the records of later steps."""
        kept = [entry for entry in self.records if entry["step"] <= step]
        if len(kept) < len(self.records):
            replace_text(self.path, "".join(map(encode, kept)))
            self._file.close()
            self._file = self.path.open("ab", buffering=0)
            self.records = kept

    def close(self) -> None:
        self._file.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(path: Path) -> tuple[list[Record], int]:
    """Return the records of a file, and the number of bytes in its whole lines."""
    found: list[Record] = []
    size = 0
    with open_file(path) as file:
        try:
            for number, line in enumerate(lines(file), 1):
                if not line.endswith(b"\n"):
                    if not (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
                        raise ValueError(f"line {number}: not a record, nor the beginning of one")
                    break
                try:
                    entry = parse(line)
                except ValueError:
                    entry = None
                if not isinstance(entry, dict) or not {"kind", "step", "metrics"} <= entry.keys() or type(entry["step"]) is not int:
                    raise ValueError(f"line {number}: not a record")
                found.append(entry)
                size += len(line)
        except ValueError as error:
            raise ValueError(f"{path}, {error}") from None
    return found, size


def finite(x: Any) -> Any:
    """Replace NaNs and infinities by None, which JSON can hold."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


@dataclass(frozen=True)
class Curve:
    """One metric over the steps. Missing values and nulls are NaN."""

    steps: np.ndarray
    values: np.ndarray
    nulls: np.ndarray
    n: int  # how many examples each value is over
    errors: np.ndarray | None = None  # standard errors; NaN if a value has none

    def __len__(self) -> int:
        return len(self.steps)


def curve(records: Iterable[Record], kind: str, name: str) -> Curve:
    """Return the curve of metric ``name`` in the records of one kind, in their order."""
    found = [(entry["step"], entry["metrics"][name]) for entry in records if entry["kind"] == kind and name in entry["metrics"]]
    columns = [[math.nan if m.get(key) is None else m[key] for _, m in found] for key in ("value", "null", "error")]
    values, nulls, errors = (np.array(column, dtype=float) for column in columns)
    return Curve(np.array([step for step, _ in found], dtype=int), values, nulls, found[-1][1]["n"] if found else 0, errors)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of one curve over several seeds, at the steps that all seeds have.

    The errors are standard errors of the mean over the seeds. For a single seed they are NaN.
    """
    steps = reduce(np.intersect1d, [c.steps for c in curves])
    chosen = [np.isin(c.steps, steps) for c in curves]
    values, nulls = (np.stack([getattr(c, key)[at] for c, at in zip(curves, chosen, strict=True)]) for key in ("values", "nulls"))
    k = len(curves)
    errors = values.std(axis=0, ddof=1) / math.sqrt(k) if k > 1 else np.full(len(steps), math.nan)
    return Curve(steps, values.mean(axis=0), nulls.mean(axis=0), curves[0].n, errors)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return a moving average whose window is constant on a log axis: row j is the mean of rows ⌊j/1.2⌋ to j, counted from 1."""
    rows = np.arange(1, len(values) + 1)
    first = np.maximum(np.floor(rows / 1.2).astype(int), 1)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return (sums[rows] - sums[first - 1]) / (rows - first + 1)


class Slope(NamedTuple):
    """The log-log slope between two steps, by least squares.

    ``level`` is the fit's value at ``first``. ``error`` is the slope's standard error due to the noise of single batches.
    """

    slope: float
    first: int
    last: int
    level: float
    error: float

    def at(self, steps: np.ndarray) -> np.ndarray:
        return self.level * (steps / self.first) ** self.slope

    @property
    def surely(self) -> float:
        """The slope plus two standard errors, an upper bound that holds with a probability of 97.5 %."""
        return self.slope + 2 * self.error


def slopes(loss: Curve) -> tuple[Slope, Slope] | None:
    """Return the steepest half decade of a loss, by the slope's upper bound, and the last one; None if the curve is too short.

    The steepest slope itself would come from a few noisy steps: some half decade falls even in a flat loss.
    """
    decade = math.sqrt(10)
    if len(loss) < 10 or not np.isfinite(loss.values).all() or (loss.values <= 0).any():
        return None
    # The median of neighbors' differences, because the trend is small in most of them. 0.6745 is the median of |x| for a standard
    # normal x.
    noise = float(np.median(np.abs(np.diff(np.log(loss.values))))) / (0.6745 * math.sqrt(2))
    noise = max(noise, 1e-12)  # a smaller value is rounding
    last = _slope(loss, loss.steps[-1] / decade, noise)
    starts = [step for step in loss.steps if step * decade <= loss.steps[-1]]
    return min((*(_slope(loss, start, noise) for start in starts), last), key=lambda fit: fit.surely), last


def _slope(loss: Curve, first: float, noise: float) -> Slope:
    """Fit half a decade from ``first``. The fit uses raw losses, because an average over earlier steps would lag behind."""
    chosen = (loss.steps >= first) & (loss.steps <= first * math.sqrt(10) * 1.001)
    steps, logs = loss.steps[chosen], np.log(loss.values[chosen])
    x = np.log(steps / steps[0])
    weights = 1 / steps / (1 / steps).sum()  # equal lengths of the log axis have equal weight
    middle = float(weights @ x)
    share = weights * (x - middle)
    share /= share @ x
    slope = float(share @ logs)
    level = math.exp(float(weights @ logs) - slope * middle)
    return Slope(slope, int(steps[0]), int(steps[-1]), level, noise * float(np.linalg.norm(share)))
