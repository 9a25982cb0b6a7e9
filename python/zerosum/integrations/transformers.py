"""Measures optimizer steps of ``transformers.Trainer``, and of trainers that are made of it, such as TRL's ``SFTTrainer``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zerosum.integrations import trl
from zerosum.integrations.measured_steps import MeasuredSteps


class ZeroSumCallback(TrainerCallback):
    """Measures ``Σ_i g_i``, ``Σ_i |g_i|``, ``Σ_i g_i²`` of every ``every``-th optimizer step, and logs the metrics that follow::

        Trainer(model, args, train_dataset=data, callbacks=[ZeroSumCallback(every=100)]).train()

    ``g_i`` is the gradient of example i's loss: of a row of the batch, over all micro-batches of the step. Steps 1, 1 + every,
    1 + 2 · every, … are measured; the others run as without the callback. Weights after training are those without it, but for the
    rounding of the gradient's sums. Evaluation is not measured.

    ``Trainer.log`` gets the metrics of :func:`zerosum.metrics.gradient_metrics` as floats, named ``zerosum/D_grad`` and so on, at
    the step that was measured: they reach ``state.log_history``, TensorBoard, W&B and every other callback. ``…_null`` is what
    random signs would give, ``zerosum/examples`` is N, ``zerosum/coverage`` the share of trainable coordinates that was measured.

    Args:
        every: how many optimizer steps there are for one that is measured.
        gram: whether to compute the inner products of all pairs of examples in a micro-batch, and metrics of their cosines.
        out: a file of records, one line of JSON for each, that ``zerosum plot`` reads. None writes none.
        prefix: what the names of logged numbers begin with.
        probe_options: further arguments of :class:`zerosum.Probe`, such as ``num_examples``.

    Raises:
        TypeError, ValueError: an argument is not of these, when the callback is made; or ``out`` has another run's records, when
            training begins.
        NotImplementedError: the Trainer runs in several processes or on several devices, when training begins.
    """

    def __init__(
        self,
        every: int = 100,
        gram: bool = False,
        out: str | PathLike[str] | None = None,
        prefix: str = "zerosum/",
        **probe_options: Any,
    ) -> None:
        self._steps = MeasuredSteps(every, gram, out, prefix, probe_options)
        self._trainer: Trainer | None = None
        self._due = self._measured = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._calling_trainer()
        distribution = trainer.accelerator.distributed_type.value
        if distribution != "NO" or args.n_gpu > 1:
            how = f"accelerate's {distribution}" if distribution != "NO" else f"{args.n_gpu} GPUs in DataParallel"
            raise NotImplementedError(f"ZeroSumCallback: expected training in one process on one device, got {how}")
        if "trl" in sys.modules:
            trl.register()
        self._due = self._measured = False
        self._steps.begin_run(kwargs["model"], state.global_step)
        if self._trainer is not trainer:
            self._trainer = trainer
            self._guard(trainer)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._due = self._steps.due(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        if not self._measured or self._trainer is None:
            return None
        self._measured = False
        should_log = control.should_log
        # The class's own method: SFTTrainer.log would add its averages to this entry, and leave none for the loss's.
        Trainer.log(self._trainer, self._steps.numbers(state.global_step))
        control.should_log = should_log  # which logging takes for done
        return control

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps.abandon()  # a callback stopped the epoch between two micro-batches

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps.end_run()

    def _calling_trainer(self) -> Trainer:
        """The Trainer whose event this is. Callbacks are not told, and no event says that a step has failed."""
        frame = inspect.currentframe()
        while frame is not None:
            found = frame.f_locals.get("self")
            if isinstance(found, Trainer) and self in found.callback_handler.callbacks:
                return found
            frame = frame.f_back
        raise RuntimeError("ZeroSumCallback: expected a transformers.Trainer to begin training, and none has called it")

    def _guard(self, trainer: Trainer) -> None:
        """Puts the probe around ``trainer.training_step``, which is the forward and backward pass of a micro-batch. No event lies
        between the last of them and clipping, and none says that one has failed."""
        training_step: Callable[..., Tensor] = trainer.training_step

        def measured_training_step(*args: Any, **kwargs: Any) -> Tensor:
            if not self._due:
                return training_step(*args, **kwargs)
            try:
                if not self._steps.measuring:
                    self._steps.open()
                loss = training_step(*args, **kwargs)
                self._steps.add_loss(loss)
                if trainer.accelerator.sync_gradients:  # the step's last micro-batch
                    self._due = False
                    self._steps.close()
                    self._measured = True
                return loss
            except BaseException:
                self._due = False
                self._steps.abandon()
                raise

        trainer.training_step = measured_training_step  # type: ignore[method-assign]
