"""Trains and measures on a device that is not there (tests/elsewhere.py), and prints what was found there and here."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests import elsewhere
from zerosum import measurement
from zerosum.checkpoints import Options, find
from zerosum.evaluation import Sample, TokenData
from zerosum.measurement import Measurement, Settings
from zerosum.training.data import Corpus
from zerosum.training.loop import Settings as DemoSettings
from zerosum.training.loop import Trainer


def no_forward_mode(*arguments: Any, **options: Any) -> Any:
    """For tensors of a subclass there is none."""
    raise NotImplementedError


def measured(folder: Path, text: Path, update: str, device: torch.device | str) -> dict[str, float | None]:
    checkpoints = find(folder, Options())
    drawn = TokenData.read(text).draw([4, 4], 16, 0, checkpoints.checkpoints[0].load().vocab)
    evaluation, batch = (Sample("text", *each) for each in drawn)
    settings = Settings(update=update, learning_rate=1e-2 if update == "gradient" else None)
    step = None if update in ("next", "none") else batch
    record = Measurement(checkpoints, settings, evaluation, step, device=device).measure(checkpoints.checkpoints[0])
    return {name: metric["value"] for name, metric in record["metrics"].items()}


class Untimed(Trainer):
    """There is nothing to wait for."""

    def _now(self) -> float:
        return 0.0


def trained(text: Path, device: torch.device) -> dict[str, float | None]:
    """The last of two steps, which is measured."""
    trainer = Untimed(DemoSettings(2, 0, 32, 1, 4, 16), Corpus.read([text]), device)
    trainer.step(1)
    step = trainer.probed_step(2)
    return {name: metric.value for name, metric in (step.trained | step.measured).items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    measurement.first_order_changes = no_forward_mode
    folder, text = map(Path, sys.argv[1:])
    updates = ("optimizer", "gradient", "next", "none")
    here = {update: measured(folder, text, update, "cpu") for update in updates}
    with elsewhere.elsewhere() as device:
        for update in updates:
            found = measured(folder, text, update, device)
            pairs = {name: (value, found[name]) for name, value in here[update].items()}
            print(json.dumps({"name": update, "pairs": pairs}), flush=True)
        steps = trained(text, torch.device("cpu")), trained(text, device)
        print(json.dumps({"name": "training", "pairs": {name: (x, steps[1][name]) for name, x in steps[0].items()}}), flush=True)
    sys.stdout.flush()
    os._exit(0)
