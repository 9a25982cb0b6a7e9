"""Trains a GPT and measures zero-sum learning around single steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from zerosum.changes import Step
from zerosum.metrics import Metric
from zerosum.probe import Probe
from zerosum.probe.report import Coverage, Report
from zerosum.tokens import token_report
from zerosum.training.data import VOCAB, Corpus, draw
from zerosum.training.model import GPT, GPTConfig, token_losses, under_autocast
from zerosum.training.optimizers import build

HEAD_SIZE = 32
HELD_OUT_SEQUENCES = 64
TOKEN_SEQUENCES = 4  # how many held-out sequences the per-token gradients are measured on
CLIP = 1.0
WARMUP = 20
PROBES_PER_DECADE = 8

CPU = torch.device("cpu")

Batch = tuple[Tensor, Tensor]
Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Settings:
    """What determines a run, together with the text and the number of threads."""

    steps: int = 1000
    seed: int = 0
    width: int = 128
    layers: int = 4
    sequences: int = 32
    positions: int = 128
    learning_rate: float = 3e-3
    autocast: bool = False  # matrix products of the steps in bfloat16; losses and their changes stay in float32
    optimizer: str = "adamw"  # a key of OPTIMIZERS

    @property
    def model(self) -> GPTConfig:
        return GPTConfig(VOCAB, self.width, self.layers, self.width // HEAD_SIZE, self.positions)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.learning_rate * min(1.0, step / WARMUP)


@dataclass(frozen=True)
class ProbedStep:
    """A training step and the measurements around it."""

    trained: Metrics  # the metrics that an ordinary step returns
    measured: Metrics
    coverage: Coverage
    finite: bool  # whether every gradient is free of NaNs and infinities
    step_seconds: float
    around_seconds: float  # time spent on measurements before and after the step


def held_out_batch(corpus: Corpus, settings: Settings) -> Batch:
    """Return the held-out sequences that a run is measured on."""
    return draw(corpus.held_out, HELD_OUT_SEQUENCES, settings.positions, settings.seed, 0)


def by_parameter(report: Report, metric: str) -> Metrics:
    """Return the metric of each parameter, as ``METRIC/PARAMETER``."""
    return {f"{metric}/{name}": report[name].metrics[metric] for name in report}


def probe_steps(steps: int) -> list[int]:
    """Return steps that are equally spaced on a log axis, from the first step to the last."""
    spaced = {round(10 ** (i / PROBES_PER_DECADE)) for i in range(PROBES_PER_DECADE * len(str(steps)))}
    return sorted({step for step in spaced if step < steps} | {steps})


class Trainer:
    """A model, its optimizer and its data. Step k depends only on the settings, the text and the earlier steps."""

    def __init__(self, settings: Settings, corpus: Corpus, device: torch.device = CPU) -> None:
        self.settings = settings
        self.device = device
        self.corpus = corpus
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = GPT(settings.model)  # the same weights on every device
        self.model.to(device)
        self.optimizer = build(settings.optimizer, self.model, settings.learning_rate)
        # The run's steps share these probes, so what the first step proves holds for the others.
        self.probe, self.directed = Probe(self.model, gram=True), Probe(self.model)
        self.held_out = self._there(held_out_batch(corpus, settings))

    def batch(self, step: int) -> Batch:
        return self._there(draw(self.corpus.train, self.settings.sequences, self.settings.positions, self.settings.seed, step))

    def _there(self, batch: Batch) -> Batch:
        x, y = batch
        return x.to(self.device), y.to(self.device)

    def _now(self) -> float:
        """Return the time at which the device has finished its pending work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return perf_counter()

    def state_dict(self) -> dict[str, dict]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def step(self, step: int) -> Metrics:
        """Train one ordinary step. Return the loss before it and the gradient's norm before clipping."""
        losses = self._backward(self.batch(step))
        return self._update(step, losses)

    def probed_step(self, step: int) -> ProbedStep:
        """Train the same step, with measurements in it and around it.

        Gradient metrics are over the batch's sequences. ``train.*`` and ``held_out.*`` are over tokens: their losses before the
        step, and the changes of these losses by the step. C_g, C_uG and C_ug are along the step's own update. ``D_grad/NAME`` and
        ``C_g/NAME`` are for the parameter NAME alone. After the last step, ``tokens.D_grad`` is over the gradients of single
        held-out tokens' losses.
        """
        start = self._now()
        batch = self.batch(step)
        with Step(self.model, {"train": batch, "held_out": self.held_out}, micro_batch=HELD_OUT_SEQUENCES) as change:
            step_start = self._now()
            with self.probe:
                losses = self._backward(batch)
            report = self.probe.report()
            trained = self._update(step, losses)
            step_seconds = self._now() - step_start
        found = report.metrics | by_parameter(report, "D_grad") | change.metrics | self._along_update(batch, change)
        if step == self.settings.steps:
            x, y = self.held_out
            tokens = token_report(self.model, x[:TOKEN_SEQUENCES], y[:TOKEN_SEQUENCES])
            found["tokens.D_grad"] = tokens.metrics["D_grad"]
        around_seconds = self._now() - start - step_seconds
        return ProbedStep(trained, found, report.coverage, report.finite, step_seconds, around_seconds)

    def probe_cost(self, pairs: int = 11) -> tuple[list[float], list[float]]:
        """Time forward and backward passes, plain and probed in turns, on one batch at the current weights.

        Return the seconds of each.
        """
        batch = self.batch(self.settings.steps)
        plain: list[float] = []
        probed: list[float] = []
        for turn in range(pairs + 1):
            start = self._now()
            self._backward(batch)
            middle = self._now()
            with self.probe:
                self._backward(batch)
            if turn:  # the first turn is a warm-up
                plain.append(middle - start)
                probed.append(self._now() - middle)
        return plain, probed

    def _backward(self, batch: Batch) -> Tensor:
        """Compute the gradient of the batch's mean loss into ``.grad``; return the losses (N, T)."""
        self.optimizer.zero_grad()
        losses = (under_autocast(token_losses) if self.settings.autocast else token_losses)(self.model, *batch)
        losses.mean(1).mean().backward()  # the mean over sequences of each sequence's mean token loss
        return losses.detach()

    def _update(self, step: int, losses: Tensor) -> Metrics:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(step)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return {
            "train.loss": Metric(losses.double().mean().item(), losses.numel()),
            "train.grad_norm": Metric(norm.item(), losses.shape[0]),
        }

    def _along_update(self, batch: Batch, change: Step) -> Metrics:
        """Decompose the first-order loss changes along the update just made, at the weights before it.

        This needs a second pass, because the update is known only after the step's gradient.
        """
        self.directed.direction = change.update
        with self._at(list(change.weights.values())), self.directed:
            self._backward(batch)
        report = self.directed.report()
        found = report.metrics
        decomposition = {name: found[name] for name in ("C_g", "C_uG", "C_ug")} | by_parameter(report, "C_g")
        return decomposition | {f"first_order.{name}": found[name] for name in ("C", "D", "M")}

    @contextmanager
    def _at(self, weights: list[Tensor]) -> Iterator[None]:
        """Set the model to other weights inside the context."""
        parameters = list(self.model.parameters())
        present = [p.detach().clone() for p in parameters]
        try:
            _copy(parameters, weights)
            yield
        finally:
            _copy(parameters, present)


@torch.no_grad()
def _copy(parameters: list[torch.nn.Parameter], weights: list[Tensor]) -> None:
    for p, w in zip(parameters, weights, strict=True):
        p.copy_(w)
