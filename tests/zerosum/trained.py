"""Trained models for tests: some steps of a given one, and a short run of `zerosum demo`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zerosum import cli
from zerosum.training.data import Corpus
from zerosum.training.loop import Settings, Trainer
from zerosum.training.model import token_losses


def train(model: nn.Module, batch: Callable[[], tuple[Tensor, Tensor]], steps: int, rate: float) -> dict[str, Tensor]:
    """Trains the model by AdamW on drawn batches; returns Δ of one more step, which is taken back."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)

    def step() -> None:
        optimizer.zero_grad()
        token_losses(model, *batch()).mean().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    update = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    model.load_state_dict(before, strict=False)
    optimizer.zero_grad()
    return update


def demo_with_checkpoints(folder: Path, steps: int, *options: str, **settings: Any) -> tuple[Path, Trainer]:
    """Runs `zerosum demo --keep-checkpoints` on a small text; returns the run's folder and a trainer with the same settings.

    ``options`` are further words of the command line, and ``settings`` what they are as settings.
    """
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    threads = torch.get_num_threads()
    sizes = f"--steps {steps} --width 32 --layers 1 --sequences 4 --positions 16 --threads 1".split()
    words = ["demo", "--text", str(text), "--out", str(folder / "run"), "--keep-checkpoints", *sizes, *options]
    assert cli.main(words) == 0
    torch.set_num_threads(threads)
    return folder / "run", Trainer(Settings(steps, width=32, layers=1, sequences=4, positions=16, **settings), Corpus.read([text]))
