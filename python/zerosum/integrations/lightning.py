"""Provides a callback that computes per-example gradient statistics of steps of Lightning's ``Trainer``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from zerosum.distributed import is_sharded
from zerosum.integrations.measuring import Direction, StepsCallback

# A script uses one of the two packages; the callback must come from the same one.
if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback  # type: ignore[assignment]
    except ModuleNotFoundError:
        from pytorch_lightning import Callback


class ZeroSumCallback(StepsCallback, Callback):
    """Computes the statistics of :class:`zerosum.Probe` for some training steps, before gradients are unscaled and clipped::

        trainer = lightning.Trainer(callbacks=[ZeroSumCallback(every=100)])

    It measures step 1 and each multiple of ``every``, with all micro-batches of the step, and never validation. An example is one
    index of the batch's first dimension. The names of the metrics are those of
    :class:`zerosum.integrations.transformers.ZeroSumCallback`.

    - The trainer's loggers get every measured step, whatever ``log_every_n_steps`` is, under Lightning's own count of steps, which
      starts at 0.
    - ``trainer.callback_metrics`` gets the metrics by ``pl_module.log_dict``.
    - Under DistributedDataParallel, and if ``configure_model`` calls ``fully_shard`` (``ModelParallelStrategy``), the metrics cover
      all ranks' examples.

    Args:
        every, direction, gram, out, options: see :class:`zerosum.integrations.measuring.StepsCallback`. Parameter names are those
            of the LightningModule. Losses are recorded at step 1 and each multiple of the trainer's ``log_every_n_steps``.
        backwards: with manual optimization, the number of ``manual_backward`` calls of a measured step, after which the block ends.
            They may be in several batches, as in manual accumulation.

    Attributes:
        report: the report of the last measured step; None before the first one.

    Raises:
        TypeError, ValueError: an argument is invalid, or ``out`` holds another run; the message names it.
        NotImplementedError: at the start of training, if several processes use another strategy.
    """

    writer = "zerosum.integrations.lightning"

    def __init__(
        self,
        every: int = 100,
        direction: Direction | None = None,
        gram: bool = False,
        out: str | Path | None = None,
        *,
        backwards: int = 1,
        **options: Any,
    ) -> None:
        if not isinstance(backwards, int) or isinstance(backwards, bool) or backwards < 1:
            raise ValueError(f"backwards: expected a positive integer, got {backwards!r}")
        super().__init__(every, direction, gram, out, **options)
        self._backwards = backwards
        self._seen = 0  # backward passes of the open block
        self._step = 0  # the step that is measured or was measured last
        self._last = False  # whether the batch is the last one of its step
        self._losses: list[Tensor] = []
        self._examples = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        joins = isinstance(trainer.strategy.model, DistributedDataParallel)
        if trainer.world_size > 1 and not (joins or is_sharded(pl_module)):
            raise NotImplementedError(
                "ZeroSumCallback: expected one process, or several under DistributedDataParallel (strategy='ddp') or fully_shard "
                f"(ModelParallelStrategy), got {trainer.world_size} under {type(trainer.strategy).__name__}"
            )
        self._losses.clear()
        self._examples = 0
        self._measuring.begin(pl_module, trainer.global_step, writes=trainer.is_global_zero, joins=joins)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        accumulated = trainer.accumulate_grad_batches
        self._last = (batch_idx + 1) % accumulated == 0 or trainer.is_last_batch
        if not self._measuring.is_open and self._measuring.due(trainer.global_step + 1):
            self._step = trainer.global_step + 1
            self._seen = 0
            self._measuring.open()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        manual = not pl_module.automatic_optimization
        if not self._measuring.is_open:
            if manual and trainer.global_step + 1 == self._step:
                self._warn(f"step {self._step} has more than backwards={self._backwards} backward passes; it measures only those")
            return
        self._seen += 1
        if self._seen == self._backwards if manual else self._last:
            self._measuring.finish()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._measuring.is_open:
            self._measuring.abandon()
            seen, expected = self._seen, self._backwards if not pl_module.automatic_optimization else "the whole step's"
            self._warn(f"step {self._step} is not measured: the optimizer stepped after {seen} backward passes, not {expected}")

    def _warn(self, said: str) -> None:
        warnings.warn(f"ZeroSumCallback: {said}", UserWarning, stacklevel=3)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if isinstance(loss := outputs.get("loss") if isinstance(outputs, dict) else outputs, Tensor):
            self._losses.append(loss.detach())
            self._examples += next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 0)
        if self._measuring.is_open or (pl_module.automatic_optimization and not self._last):
            return
        if self._measuring.records and self._losses and (step == 1 or step % trainer.log_every_n_steps == 0):
            # Lightning divides each loss by the number of accumulated batches, even if an epoch's last step has fewer.
            mean = torch.stack(self._losses).mean() * trainer.accumulate_grad_batches
            ranks = 1
            if trainer.world_size > 1:
                mean = trainer.strategy.reduce(mean, reduce_op="mean")
                ranks = trainer.strategy.distributed_sampler_kwargs["num_replicas"]  # ranks with different examples
            self._measuring.loss(step, float(mean), self._examples * ranks)
        self._losses.clear()
        self._examples = 0
        if logs := self._measuring.take(self._step):
            for logger in trainer.loggers:
                logger.log_metrics(logs, step=self._step - 1)
            pl_module.log_dict(logs, logger=False, batch_size=1)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._measuring.close()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._measuring.close()
