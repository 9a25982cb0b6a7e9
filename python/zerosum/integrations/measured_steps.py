"""What the callbacks share: which optimizer steps are measured, one probe for a run, and what becomes of its reports."""

from __future__ import annotations

import inspect
import math
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zerosum.metrics import Metric
from zerosum.probe import Probe, Report
from zerosum.records import RecordFile, encode, record, replace_text


class MeasuredSteps:
    """Measures steps 1, 1 + every, 1 + 2 · every, … of a training run, each with all of its micro-batches.

    A training loop calls :meth:`begin_run`; then, for each step that is :meth:`due`, :meth:`open` before its first forward pass and
    :meth:`close` after its last backward pass; then :meth:`end_run`. :meth:`abandon` ends a step that an exception cut off.

    Args:
        every: how many optimizer steps there are for one that is measured.
        gram: as of :class:`zerosum.Probe`.
        out: a file of records that ``zerosum plot`` reads; None writes none.
        prefix: what the names of logged numbers begin with.
        options: further arguments of :class:`zerosum.Probe`.
    """

    def __init__(self, every: int, gram: bool, out: str | PathLike[str] | None, prefix: str, options: dict[str, Any]) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every: expected a positive integer, got {every!r}")
        if not isinstance(prefix, str):
            raise TypeError(f"prefix: expected a string, got {type(prefix).__name__}")
        if out is not None and not isinstance(out, (str, PathLike)):
            raise TypeError(f"out: expected a path or None, got {type(out).__name__}")
        # Now and not when training begins: by then a large model has been loaded.
        known = inspect.signature(Probe).parameters
        for name in options:
            if name not in known:
                raise TypeError(f"{name}: expected an argument of zerosum.Probe, which are {', '.join(known)}")
        self.every = every
        self.prefix = prefix
        self._out = None if out is None else Path(out)
        self._options = {"gram": gram, **options}
        self._probe: Probe | None = None
        self._file: RecordFile | None = None
        self._loss = 0.0

    @property
    def measuring(self) -> bool:
        """Whether a step is being measured."""
        return self._probe is not None and self._probe.measuring

    def begin_run(self, model: nn.Module, step: int) -> None:
        """``step`` is the number of steps that were made before: more than 0 where a run is resumed."""
        self.end_run()
        if self._probe is None or self._probe.model is not model:
            self._probe = Probe(model, **self._options)
        if self._out is not None:
            self._file = _records_up_to(self._out, step)

    def due(self, step: int) -> bool:
        """Whether the step is measured, by the number of steps that were made before it."""
        return self._probe is not None and step % self.every == 0

    def open(self) -> None:
        assert self._probe is not None  # due() said so
        self._probe.__enter__()
        self._loss = 0.0

    def add_loss(self, loss: Tensor) -> None:
        """Of a micro-batch, as a part of the step's loss."""
        self._loss += float(loss.detach())

    def close(self) -> None:
        """The probe reads what it needs of gradients here, so that clipping may write to them afterwards."""
        assert self._probe is not None
        self._probe.__exit__(None, None, None)

    def abandon(self) -> None:
        """Ends an open step without a report."""
        if self._probe is not None:
            self._probe.close()

    def numbers(self, step: int) -> dict[str, float]:
        """The last closed step's numbers under the names that they are logged by; adds them to the file as those of ``step``."""
        assert self._probe is not None
        report = self._probe.take_report()
        metrics = report.metrics
        if self._file is not None:
            loss = {"train.loss": Metric(self._loss, report.num_examples)}
            self._file.append(record("step", step, loss))
            self._file.append(record("probe", step, metrics, coverage=report.coverage.share))
        return {self.prefix + name: value for name, value in _flat(report, metrics).items()}

    def end_run(self) -> None:
        self.abandon()
        if self._file is not None:
            self._file.close()
            self._file = None


def _flat(report: Report, metrics: dict[str, Metric]) -> dict[str, float]:
    """Each metric's value, with the null of those whose null is not zero by definition; N and the share that is covered."""
    found = {"examples": float(report.num_examples), "coverage": report.coverage.share}
    for name, metric in metrics.items():
        found[name] = metric.value
        if metric.null:
            found[f"{name}_null"] = metric.null
    # Loggers take a number that is missing better than one that is none.
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _records_up_to(path: Path, step: int) -> RecordFile:
    """The file, without the records of steps after ``step``, which a resumed run makes again."""
    file = RecordFile(path)
    kept = [entry for entry in file.records if entry["step"] <= step]
    if len(kept) == len(file.records):
        return file
    file.close()
    if not step:
        raise ValueError(f"out: expected a new file for a new run, and {path} has records already")
    replace_text(path, "".join(map(encode, kept)))
    return RecordFile(path)
