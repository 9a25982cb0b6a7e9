"""Measures zero-sum learning at checkpoints: gradients at one, and loss changes by a step from it or since the previous one.

The metrics of a checkpoint are over the evaluation set, except ``train.*``:

====================  ==========================================================================================================
``loss``              the mean loss of its tokens
``D_grad``, …         of per-example gradients, see :func:`zerosum.metrics.gradient_metrics`
``C_g``, C_uG, C_ug   along an update Δ
``D_grad/NAME``       of the parameter NAME alone, like ``C_g/NAME``; absent if tokens are sampled
``first_order.*``     C, D and M of the examples' first-order changes along Δ
``held_out.*``        C, D, M and mean of the tokens' loss changes by one step; ``held_out.first_order.*`` says how far these
                      changes are from the first-order changes
``train.*``           the same, on the batch that the step was computed from
``interval.*``        the same, from the previous checkpoint to this one
====================  ==========================================================================================================

Tokens whose target is -100 are not examples, as in :class:`zerosum.changes.Step` and :func:`zerosum.token_report`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from zerosum.changes import IGNORED, change_metrics, evaluate, first_order_changes, first_order_metrics, prefixed
from zerosum.checkpoints import Checkpoint, Loaded, Series
from zerosum.evaluation import Sample
from zerosum.metrics import Metric
from zerosum.probe import Probe
from zerosum.probe.report import Coverage, Report
from zerosum.records import Record, record
from zerosum.tokens import token_report
from zerosum.training.loop import by_parameter
from zerosum.training.model import under_autocast
from zerosum.training.run import Refused
from zerosum.updates import Update, gradient_update, optimizer_update

EXAMPLES = ("sequence", "position", "token")
_AGREEMENT = ("relative_error", "sign_agreement", "correlation")
UPDATES = ("optimizer", "gradient", "next", "none")

Metrics = dict[str, Metric]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to measure checkpoints.

    Attributes:
        examples: what an example of the gradient metrics is. "sequence": ℓ_i is the mean loss of a sequence's tokens. "position":
            each position's part in one backward pass, a cheap proxy. "token": the loss of one predicted token, as in the paper.
        sample: how many tokens to sample for "token"; None computes all tokens exactly.
        update: what Δ is. "optimizer": the step that the checkpoint's own optimizer makes from a training batch. "gradient": minus
            the gradient of a training batch. "next": the change to the next checkpoint. "none": no update.
        learning_rate: the rate of the step. If None, "optimizer" uses the state's rate, and "gradient" has no rate, so the changes
            by a step are left out.
        clip: the norm that the step's gradient is clipped to.
        seed: determines the tokens that are sampled.
        autocast: whether gradients are computed with products in bfloat16. Losses and their changes never are.
    """

    examples: str = "sequence"
    sample: int | None = None
    update: str = "optimizer"
    learning_rate: float | None = None
    clip: float = 1.0
    seed: int = 0
    autocast: bool = False


class GradientReport(Protocol):
    """The interface that :class:`zerosum.Report` and the report of :mod:`zerosum.tokens` share."""

    @property
    def metrics(self) -> Metrics: ...

    @property
    def coverage(self) -> Coverage: ...

    @property
    def dot(self) -> Tensor | None: ...


class Measurement:
    """Measures checkpoints of a series, one after another, on one evaluation set.

    Args:
        series: all checkpoints of the series, including those that are not measured: an interval begins at the previous checkpoint.
        settings: how to measure.
        evaluation: the sequences to measure on.
        batch: the training batch that steps are computed from; None if ``settings.update`` needs none.
        memory: how many bytes per-token gradients may take.
        device: where to measure.
    """

    def __init__(
        self,
        series: Series,
        settings: Settings,
        evaluation: Sample,
        batch: Sample | None = None,
        memory: int = 2 * 10**9,
        device: torch.device | str = "cpu",
    ) -> None:
        if settings.examples not in EXAMPLES:
            raise ValueError(f"examples: expected one of {', '.join(EXAMPLES)}, got {settings.examples!r}")
        if settings.update not in UPDATES:
            raise ValueError(f"update: expected one of {', '.join(UPDATES)}, got {settings.update!r}")
        if (batch is None) != (settings.update in ("next", "none")):
            raise ValueError(f"batch: expected {'none' if batch else 'one'} for update={settings.update!r}")
        if settings.sample is not None and settings.examples != "token":
            raise ValueError(f"sample: expected None for examples={settings.examples!r}, got {settings.sample}")
        self.series = series
        self.settings = settings
        self._device = torch.device(device)
        self.evaluation = evaluation.to(self._device)
        self.batch = None if batch is None else batch.to(self._device)
        self._memory = memory
        self._before: tuple[Checkpoint, Tensor] | None = None  # the last measured checkpoint, and its token losses

    def identity(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return all parts of a checkpoint's record that were not measured.

        Two records with equal parts come from the same measurement.
        """
        before = self._neighbour(checkpoint, -1)
        options = self.series.checkpoints[0].options
        built = {"model": options.model, "model_config": dict(options.model_config), "losses": options.losses}
        return {
            "run": self.series.run,
            "checkpoint": self.series.name(checkpoint),
            "evaluation": self.evaluation.describe(),
            "train": self.batch.describe() if self.batch else None,
            "examples": self.settings.examples,
            "sampled": self.settings.sample,
            "update": None if self.settings.update == "none" else self.settings.update,
            "interval": None if before is None else [before.step, checkpoint.step],
            "settings": asdict(self.settings) | built,
        }

    def measure(self, checkpoint: Checkpoint, progress: Progress | None = None) -> Record:
        """Measure a checkpoint and return its record, of kind "checkpoint".

        If examples are tokens, ``progress`` is called with (tokens done, tokens).

        Raises:
            Refused: a checkpoint cannot be used; the message names it.
        """
        start = perf_counter()
        loaded = self._load(checkpoint, optimizer=self.settings.update == "optimizer")
        losses = _token_losses(loaded, self.evaluation)
        update = self._update(checkpoint, loaded)
        report = self._gradients(self._for_gradients(loaded), update, progress)
        counted = losses.double()[self.evaluation.y != IGNORED]
        found = {"loss": Metric(counted.mean().item(), counted.numel())} | self._renamed(report.metrics)
        about: dict[str, Any] = {"covered": report.coverage.share, "not_covered": report.coverage.not_covered}
        if isinstance(report, Report):  # a sample has no metrics of single parameters
            found |= by_parameter(report, "D_grad") | (by_parameter(report, "C_g") if update is not None else {})
        if self.batch is not None and update is not None and self._is_step:
            changes, found_changes = self._step_changes(loaded, update, losses)
            found |= found_changes
            try:
                found |= self._first_order(loaded, update, changes, report)
            except NotImplementedError as error:
                about["first_order"] = str(error)
        if (before := self._neighbour(checkpoint, -1)) is not None:
            found |= prefixed("interval", change_metrics(self._losses_at(before), losses, self.evaluation.y))
        self._before = checkpoint, losses
        about["seconds"] = round(perf_counter() - start, 3)
        return record("checkpoint", checkpoint.step, found, **self.identity(checkpoint), **about)

    @property
    def _is_step(self) -> bool:
        """Whether the update has the length of one step."""
        return self.settings.update == "optimizer" or (
            self.settings.update == "gradient" and self.settings.learning_rate is not None
        )

    def _neighbour(self, checkpoint: Checkpoint, by: int) -> Checkpoint | None:
        index = self.series.checkpoints.index(checkpoint) + by
        return self.series.checkpoints[index] if 0 <= index < len(self.series.checkpoints) else None

    def _update(self, checkpoint: Checkpoint, loaded: Loaded) -> Update | None:
        if self.settings.update == "none":
            return None
        if self.settings.update == "next":
            after = self._neighbour(checkpoint, 1)
            if after is None:
                raise Refused(f"{checkpoint.path}: it is the last checkpoint: there is no way to a next one")
            there = self._load(after).weights()
            if there.keys() != loaded.weights().keys():
                raise Refused(f"{after.path}: its parameters are not those of {checkpoint.path}")
            return {name: there[name] - x for name, x in loaded.weights().items()}
        assert self.batch is not None
        make = optimizer_update if self.settings.update == "optimizer" else gradient_update
        try:
            return make(self._for_gradients(loaded), self.batch, self.settings.clip, self.settings.learning_rate)
        except Refused as reason:
            raise Refused(f"{checkpoint.path}: {reason}") from None

    def _gradients(self, loaded: Loaded, update: Update | None, progress: Progress | None) -> GradientReport:
        x, y = self.evaluation.x, self.evaluation.y
        if self.settings.examples == "token":
            try:
                return token_report(
                    loaded.model,
                    x,
                    y,
                    losses=loaded.losses,
                    direction=update,
                    sample=self.settings.sample,
                    memory=self._memory,
                    seed=self.settings.seed,
                    progress=progress,
                )
            except (ValueError, NotImplementedError) as error:  # the memory is too small for one token, or the model is unsupported
                raise Refused(f"--examples token: {error}") from error
        sequences = self.settings.examples == "sequence"
        probe = Probe(loaded.model, self.settings.examples, direction=update, gram=sequences)
        try:
            with probe:
                counted = y != IGNORED
                losses = loaded.losses(loaded.model, x, y).masked_fill(~counted, 0)
                (losses.sum(1) / counted.sum(1).clamp(min=1) if sequences else losses).sum().backward()
        finally:
            loaded.model.zero_grad()
        return probe.report()

    def _renamed(self, metrics: Metrics) -> Metrics:
        """Rename C, D and M of the first-order changes to say so. Without a step's length, M has no unit and is left out."""
        measured = self._is_step or self.settings.update == "next"
        first_order = {"C", "D"} | ({"M"} if measured else set())
        return {
            f"first_order.{name}" if name in first_order else name: metric
            for name, metric in metrics.items()
            if measured or name != "M"
        }

    def _step_changes(self, loaded: Loaded, update: Update, losses: Tensor) -> tuple[Tensor, Metrics]:
        """Return the changes of the evaluation set's losses by the step, and the metrics of these and of the batch's changes."""
        assert self.batch is not None
        after = {name: x + update[name] for name, x in loaded.weights().items()}
        held_out = _token_losses(loaded, self.evaluation, after)
        train = change_metrics(_token_losses(loaded, self.batch), _token_losses(loaded, self.batch, after), self.batch.y)
        found = prefixed("held_out", change_metrics(losses, held_out, self.evaluation.y))
        return held_out - losses, prefixed("train", train) | found

    def _first_order(self, loaded: Loaded, update: Update, changes: Tensor, report: GradientReport) -> Metrics:
        """Return how far the tokens' first-order changes are from their true changes."""
        x, y = self.evaluation.x, self.evaluation.y
        counted = y != IGNORED
        if self.settings.examples == "token" and report.dot is not None and report.dot.numel() == int(counted.sum()):
            first_order = torch.zeros_like(changes)
            first_order[counted] = report.dot.to(changes)
        else:
            first_order = first_order_changes(loaded.model, x, y, update, losses=loaded.losses)
        found = first_order_metrics(changes, first_order, y)
        chosen = {name: metric for name, metric in found.items() if name.rpartition(".")[2] in _AGREEMENT}
        return prefixed("held_out", chosen)

    def _losses_at(self, checkpoint: Checkpoint) -> Tensor:
        if self._before is not None and self._before[0] == checkpoint:
            return self._before[1]
        return _token_losses(self._load(checkpoint), self.evaluation)

    def _for_gradients(self, loaded: Loaded) -> Loaded:
        return replace(loaded, losses=under_autocast(loaded.losses)) if self.settings.autocast else loaded

    def _load(self, checkpoint: Checkpoint, optimizer: bool = False) -> Loaded:
        loaded = checkpoint.load(optimizer)
        loaded.model.to(self._device)
        return loaded


def _token_losses(loaded: Loaded, sample: Sample, at: Update | None = None) -> Tensor:
    """Return the loss of each token, (N, T), optionally at other weights."""
    return evaluate(loaded.model, sample.x, sample.y, losses=loaded.losses, at=at)
