"""Provides a callback that computes per-example gradient statistics of steps of ``transformers.Trainer``."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback

import zerosum
from zerosum.integrations.measuring import StepsCallback


class ZeroSumCallback(StepsCallback, TrainerCallback):
    """Computes the statistics of :class:`zerosum.Probe` for some training steps, before gradients are clipped::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[ZeroSumCallback(every=100)])

    It measures step 1 and each multiple of ``every``, with all micro-batches of the step, and never evaluation. An example is one
    sequence of the batch. In packed batches it is one document; a batch is packed if it has no ``attention_mask`` and its
    ``position_ids`` restart at 0. The probe reads each example's loss off the step's loss (``loss_reduction="auto"``), so neither
    accumulation nor ``num_items_in_batch`` changes the results.

    ``Trainer.log`` logs each measured step; under DistributedDataParallel the values cover all ranks' examples:

    - ``zerosum/D_grad`` and the other finite metrics of :func:`zerosum.metrics.gradient_metrics`.
    - ``zerosum/null/…``: their values under random signs.
    - ``zerosum/examples``, ``zerosum/covered`` (the share of trainable coordinates) and ``zerosum/finite`` (0 or 1).

    The arguments are those of :class:`zerosum.integrations.measuring.StepsCallback`.

    Attributes:
        report: the report of the last measured step; None before the first one.

    Raises:
        ValueError: at the start of training, if ``out`` holds another run.
        NotImplementedError: at the start of training, if one process has several devices, or if several processes do not use
            DistributedDataParallel.
    """

    writer = "zerosum.integrations.transformers"
    _trainer: transformers.Trainer | None = None
    _logged = 0

    def close(self) -> None:
        """Close what an exception between two micro-batches left open. (An exception inside a step closes the block itself.)"""
        self._measuring.close()
        if self._trainer is not None:
            self._trainer.__dict__.pop("training_step", None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self._trainer = _calling_trainer()
        _check_supported(self._trainer, auto=self._measuring.auto)
        self._logged = state.global_step
        if "trl" in sys.modules:
            from zerosum.integrations import trl

            trl.cover_fused_head()
        assert isinstance(self._trainer.model, nn.Module)
        writes, joins = self._trainer.is_world_process_zero(), self._trainer.args.world_size > 1
        self._measuring.begin(self._trainer.model, state.global_step, writes, joins)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._measuring.due(state.global_step + 1):
            assert self._trainer is not None
            # No callback runs between the last backward pass and gradient clipping, so `training_step` is wrapped.
            step = functools.partial(self._measured_step, self._trainer, self._trainer.training_step)
            self._trainer.training_step = step  # type: ignore[method-assign]

    def _measured_step(self, trainer: transformers.Trainer, step: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run ``training_step`` of one micro-batch inside the step's block."""
        measuring = self._measuring
        try:
            if not measuring.is_open:
                measuring.open()
            assert isinstance(trainer.model, nn.Module)
            handle = trainer.model.register_forward_pre_hook(_name_documents, with_kwargs=True)
            try:
                loss = step(*args, **kwargs)
            finally:
                handle.remove()
            if trainer.accelerator.sync_gradients:
                del trainer.training_step
                measuring.finish()
            return loss
        except BaseException:
            measuring.abandon()
            trainer.__dict__.pop("training_step", None)
            raise

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (logs := self._measuring.take(state.global_step)):
            return
        should_log = control.should_log
        # Not a subclass's `log`: TRL's would add what it gathered since its last call, which belongs to the Trainer's own log.
        transformers.Trainer.log(self._trainer, logs)  # type: ignore[arg-type]
        control.should_log = should_log  # each log clears it, but the Trainer's own is still to come

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            batch = state.train_batch_size or args.train_batch_size
            examples = batch * args.gradient_accumulation_steps * args.world_size * (state.global_step - self._logged)
            self._measuring.loss(state.global_step, float(logs["loss"]), examples)
            self._logged = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self._trainer = None


def _calling_trainer() -> transformers.Trainer:
    """Return the Trainer that calls the callback, from the call stack, because callbacks do not receive it."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), transformers.Trainer):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("ZeroSumCallback: expected a call by transformers.Trainer.train(), got one from elsewhere")


def _check_supported(trainer: transformers.Trainer, auto: bool) -> None:
    kind, processes = trainer.accelerator.distributed_type.name, trainer.args.world_size
    if trainer.args.n_gpu > 1:
        raise NotImplementedError(
            f"ZeroSumCallback: expected one device per process, got {trainer.args.n_gpu} in one (torch.nn.DataParallel): "
            "start the script with torchrun"
        )
    if processes > 1 and not kind.startswith("MULTI_"):  # as accelerate calls DistributedDataParallel
        raise NotImplementedError(
            f"ZeroSumCallback: expected one process, or several under DistributedDataParallel, got {processes} under {kind}"
        )
    smoothing = trainer.args.label_smoothing_factor
    if smoothing and auto:
        warnings.warn(
            f"ZeroSumCallback: label_smoothing_factor={smoothing:g} adds two losses for each token, so gradients are measured "
            f"1 / (1 - {smoothing:g} + {smoothing:g} / classes) times too large; set loss_reduction to the number of examples in a "
            "step to fix the scale",
            UserWarning,
            stacklevel=2,
        )


@torch.compiler.disable
def _name_documents(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the probe which rows belong to which document of a packed batch."""
    positions, tokens = kwargs.get("position_ids"), kwargs.get("input_ids")
    # As in transformers, positions separate documents only without a mask.
    if positions is None or tokens is None or kwargs.get("attention_mask") is not None or not torch.is_grad_enabled():
        return
    starts = positions == 0
    if not bool(starts[:, 1:].any()):
        return
    # In TRL's batches, padding also has position 0. Like a document of one token, it predicts nothing.
    lone = starts & torch.cat([starts[:, 1:], torch.ones_like(starts[:, :1])], 1)
    zerosum.example_ids(tokens, position_ids=positions.masked_fill(lone, -1))
