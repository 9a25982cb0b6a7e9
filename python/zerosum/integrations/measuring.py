"""Holds what all trainers' callbacks share: the choice of measured steps, what is logged, and the run's file."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from zerosum.files import LOCK, TEMPORARY, Lock, read_bytes, replace_text
from zerosum.metrics import Metric
from zerosum.probe import Probe, Report
from zerosum.records import RecordFile, record

Direction = Mapping[str, Tensor] | Callable[[nn.Module], Mapping[str, Tensor] | None]
PREFIX = "zerosum/"
# Arguments of the probe that the callbacks set.
OURS = ("model", "every", "direction", "gram", "grad_scaler", "process_group")


class Measuring:
    """Measures step 1 of a training run and each step that is a multiple of ``every``.

    Args:
        writer: the name of the callback's module, for ``config.json``.
        every, direction, gram, out, options: see :class:`StepsCallback`.
    """

    def __init__(
        self,
        writer: str,
        every: int,
        direction: Direction | None,
        gram: bool,
        out: str | Path | None,
        options: Mapping[str, Any],
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every: expected a positive integer, got {every!r}")
        if not (direction is None or callable(direction) or isinstance(direction, Mapping)):
            raise TypeError(
                "direction: expected a mapping from parameter names to tensors, or a function of the model that returns one, "
                f"got {type(direction).__name__}"
            )
        if out is not None and not isinstance(out, (str, Path)):
            raise TypeError(f"out: expected a path, got {type(out).__name__}")
        if taken := [name for name in OURS if name in options]:
            raise TypeError(f"{taken[0]}: the callback sets this argument of zerosum.Probe")
        self.every = every
        self.report: Report | None = None
        self._direction = direction
        self._gram = gram
        self._options = dict(options)
        self.auto = options.get("loss_reduction", "auto") == "auto"
        self._out = None if out is None else Path(out)
        self.records = out is not None  # true in all processes, though only one writes
        self._config = {"writer": writer, "update": None, "examples": options.get("examples", "sequence")}
        self._probe: Probe | None = None
        self._file: RunFile | None = None
        self._new = False  # whether the report has not been taken yet
        self._seconds = 0.0
        self._asked = 0

    def begin(self, model: nn.Module, step: int, writes: bool = True, joins: bool = False) -> None:
        """Prepare for training that continues after ``step`` steps, and open the file in ``out`` if this process ``writes`` it.

        ``joins``: reports cover the examples of all processes, each of which measures the same steps.
        """
        self.close()
        self._new = False
        self._asked = step
        group = dist.group.WORLD if joins else None
        if self._probe is None or self._probe.model is not model or self._probe.process_group is not group:
            self._probe = Probe(model, gram=self._gram, process_group=group, **self._options)
        if self._out is not None and writes:
            self._file = RunFile(self._out, self._config, step)

    def due(self, step: int) -> bool:
        """Whether to measure a step, counted from 1: step 1, and the first step at or past each multiple of ``every``. False for a
        step that was already asked about."""
        before, self._asked = self._asked, max(self._asked, step)
        return step > before and (step == 1 or step // self.every > before // self.every)

    @property
    def is_open(self) -> bool:
        return self._probe is not None and self._probe.measuring

    def open(self) -> None:
        """Open the block of a step, which its micro-batches share."""
        assert self._probe is not None
        direction = self._direction
        self._probe.direction = direction(self._probe.model) if callable(direction) else direction
        self._seconds = perf_counter()
        self._probe.__enter__()

    def finish(self) -> None:
        """Close the block and take its report. Call it before anything changes the gradients."""
        assert self._probe is not None
        self._probe.__exit__(None)
        self.report = self._probe.report()
        self._seconds = perf_counter() - self._seconds
        self._new = True

    def abandon(self) -> None:
        """Close a block that an exception left open, without a report."""
        if self.is_open:
            assert self._probe is not None
            self._probe.close()

    def close(self) -> None:
        """Close an open block and the file."""
        self.abandon()
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self, step: int) -> dict[str, float]:
        """Return what to log of a measured step, once, and write its record to the file. Empty if there is nothing new."""
        if not self._new or self.report is None:
            return {}
        self._new = False
        metrics = self.report.metrics
        coverage = self.report.coverage
        if not metrics:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in list(coverage.not_covered.items())[:3])
            warnings.warn(
                f"zerosum: step {step} has no metrics because no parameter is covered: {reasons}", UserWarning, stacklevel=2
            )
        if self._file is not None:
            about = {"covered": coverage.share, "not_covered": list(coverage.not_covered), "finite": self.report.finite}
            self._file.append(record("probe", step, metrics, seconds=round(self._seconds, 4), **about))
        return flat(metrics) | {
            f"{PREFIX}examples": float(self.report.num_examples),
            f"{PREFIX}covered": coverage.share,
            f"{PREFIX}finite": float(self.report.finite),
        }

    def loss(self, step: int, loss: float, n: int) -> None:
        """Record the training loss that the trainer logged at a step."""
        if self._file is not None:
            self._file.append(record("step", step, {"train.loss": Metric(loss, n)}))


class StepsCallback:
    """The part of a trainer's callback that does not depend on the trainer.

    Attributes:
        report: the report of the last measured step; None before the first one.
    """

    writer: str  # the name of the callback's module, for ``config.json``

    def __init__(
        self,
        every: int = 100,
        direction: Direction | None = None,
        gram: bool = False,
        out: str | Path | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            every: measure step 1 and each step that is a multiple of this.
            direction: a tensor of the parameter's shape for each parameter name of the trainer's model, or a function of the model
                that returns such a mapping, called before each measured step. Adds C_g, C_uG and C_ug.
            gram: whether to compute the inner products of all pairs of examples of a micro-batch.
            out: a folder for ``metrics.jsonl``, which ``zerosum plot`` reads. It gets the metrics of measured steps, and the loss
                of the steps that the trainer logs. A run that is resumed from a checkpoint continues the file.
            options: other arguments of :class:`zerosum.Probe`.

        Raises:
            TypeError, ValueError: an argument is invalid; the message names it.
        """
        self._measuring = Measuring(self.writer, every, direction, gram, out, options)

    @property
    def report(self) -> Report | None:
        return self._measuring.report


def flat(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return ``{"zerosum/D_grad": …, "zerosum/null/D_grad": …}``: the finite values, and those under random signs."""
    named = {f"{PREFIX}{name}": metric.value for name, metric in metrics.items()}
    nulls = {f"{PREFIX}null/{name}": metric.null for name, metric in metrics.items() if metric.null is not None}
    return {name: value for name, value in (named | nulls).items() if math.isfinite(value)}


class RunFile:
    """Writes ``metrics.jsonl`` and ``config.json`` of a trainer's run, for ``zerosum plot``.

    It drops records of steps after ``step``: they come from after the checkpoint at which training resumes.

    Raises:
        ValueError: the folder holds another run, or a run that this training does not continue.
        BlockingIOError: another process writes to the folder; ``strerror`` says which.
        OSError: the folder cannot be used.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(path)
        try:
            self._file = self._open(path, config, step)
        except BaseException:
            self._lock.release()
            raise

    @staticmethod
    def _open(path: Path, config: Mapping[str, Any], step: int) -> RecordFile:
        settings, metrics = path / "config.json", path / "metrics.jsonl"
        text = json.dumps(config, indent=1) + "\n"
        if not settings.exists():
            if any(entry.suffix != TEMPORARY and entry.name != LOCK for entry in path.iterdir()):
                raise ValueError(f"out: expected a new folder or one of this callback's runs, but {path} has other files")
            replace_text(settings, text)
        elif (found := read_bytes(settings).decode("utf-8", "replace")) != text:
            raise ValueError(f"out: {settings} belongs to another run: expected {text.strip()}, got {found.strip()[:200]}")
        file = RecordFile(metrics, lock=False)
        if step == 0 and file.records:
            file.close()
            raise ValueError(f"out: {metrics} already has records, but training begins at step 0: choose another folder")
        file.keep_up_to(step)
        return file

    def append(self, entry: dict[str, Any]) -> None:
        self._file.append(entry)

    def close(self) -> None:
        self._file.close()
        self._lock.release()
