"""Measures optimizer steps of ``lightning.Trainer``."""

from __future__ import annotations

from os import PathLike
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from zerosum.integrations.measured_steps import MeasuredSteps


class ZeroSumCallback(Callback):
    """Measures ``Σ_i g_i``, ``Σ_i |g_i|``, ``Σ_i g_i²`` of every ``every``-th optimizer step, and logs the metrics that follow::

        lightning.Trainer(callbacks=[ZeroSumCallback(every=100)]).fit(module, data)

    As :class:`zerosum.integrations.transformers.ZeroSumCallback`, with the same arguments. Every logger of the Trainer gets the
    numbers, whatever ``log_every_n_steps`` is, with the number of optimizer steps made so far as their step.

    Raises:
        TypeError, ValueError: an argument is not of these, when the callback is made; or ``out`` has another run's records, when
            training begins.
        NotImplementedError: the Trainer runs on several devices, or the module's optimization is not automatic, when training
            begins.
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
        self._due = self._measured = self._is_last = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            strategy = type(trainer.strategy).__name__
            raise NotImplementedError(f"ZeroSumCallback: expected training in one process on one device, got {strategy}")
        if not pl_module.automatic_optimization:
            raise NotImplementedError("ZeroSumCallback: expected automatic_optimization=True, by which a step's ends are known")
        self._due = self._measured = False
        self._steps.begin_run(_measured_module(pl_module), trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        accumulated = trainer.accumulate_grad_batches
        if batch_idx % accumulated == 0:
            self._due = self._steps.due(trainer.global_step)
        self._is_last = (batch_idx + 1) % accumulated == 0 or trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        if self._due and not self._steps.measuring:
            self._steps.open()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before the optimizer's step: a gradient scaler has written to gradients by then.
        if self._steps.measuring and self._is_last:
            self._steps.close()
            self._measured = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._due:
            return
        if outputs:  # which a skipped batch has not
            self._steps.add_loss(outputs["loss"])
        if not self._is_last:
            return
        self._due = False
        self._steps.abandon()  # where the last micro-batch was skipped
        if self._measured:
            self._measured = False
            numbers = self._steps.numbers(trainer.global_step)
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._steps.end_run()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.end_run()


def _measured_module(module: LightningModule) -> nn.Module:
    """The model in a module that has nothing else with parameters: ``training_step`` may call that alone, and what enters it has an
    example in each row."""
    children = [child for child in module.children() if any(p.requires_grad for p in child.parameters())]
    own = any(p.requires_grad for p in module.parameters(recurse=False))
    return children[0] if len(children) == 1 and not own else module
