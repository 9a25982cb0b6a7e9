"""What a call of a public name leaves as it was: random numbers, torch's settings and the process's, and no tensor more."""

from __future__ import annotations

import gc
import locale
import os
import pickle
import random
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum
import zsl_kernels as zk
from zerosum import changes, deceleration, weights
from zerosum.checkpoints import Options, find
from zerosum.curves import read_curve
from zerosum.evaluation import TokenData
from zerosum.metrics import Metric
from zerosum.records import RecordFile, curve, record, smooth
from zerosum.runs import read_runs
from zerosum.training.model import GPT, GPTConfig, token_losses
from zerosum.training.run import RunFolder

N, T, K, O, V = 3, 4, 6, 5, 11


class Scene:
    """A model with a step, and operands; made once, so that what a call leaves behind is its own."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = GPT(GPTConfig(vocab=V, width=8, layers=1, heads=2, positions=T))
        self.x, self.y = torch.randint(V, (2, N, T), generator=generator)
        self.a, self.b, self.w, self.c = randn(N, T, K), randn(N, T, O), randn(O, K), randn(N)
        self.ids = torch.randint(V, (N, T), generator=generator)
        self.head = nn.Linear(K, 1)
        self.probe = zerosum.Probe(self.model, gram=True)
        self.update = {name: -1e-3 * torch.ones_like(p) for name, p in self.model.named_parameters()}
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.after = {name: x + self.update[name] for name, x in self.before.items()}
        self.report = self.measure()
        self.folder = folder
        self.report.save(folder / "report.safetensors")
        steps = np.arange(1, 300)
        self.curve = steps, 5.0 * steps**-0.3
        np.savez(folder / "curve.npz", step=steps, loss=self.curve[1])
        np.arange(64, dtype="<u2").tofile(folder / "ids.bin")
        torch.save(self.model.state_dict(), folder / "step_3.pt")

    def losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return token_losses(model, x, y).mean(1)

    def step(self) -> None:
        self.losses(self.model, self.x, self.y).sum().backward()

    def measure(self) -> zerosum.Report:
        self.model.zero_grad()
        with self.probe:
            self.step()
        return self.probe.report()

    def optimizer_step(self) -> changes.Step:
        """Taken back: the model stays the same."""
        self.model.zero_grad()
        self.step()
        with changes.Step(self.model, {"train": (self.x, self.y)}) as step, torch.no_grad():
            for p in self.model.parameters():
                p.sub_(1e-3 * p.grad)  # type: ignore[operator]
        self.model.load_state_dict(self.before)
        return step

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        with zerosum.Factors(self.head) as factors:
            losses = self.head(self.a).square().sum((1, 2))
        return list(factors.of(losses.sum()))

    def total(self) -> zerosum.Report:
        total = zerosum.ReportSum()
        total.add(self.report)
        return total.report()

    def evaluating(self) -> None:
        with changes.eval_mode(self.model):
            torch.rand(3)

    def run(self) -> None:
        folder = RunFolder(self.folder / "run", {})
        folder.append(record("step", folder.step + 1, {"train.loss": Metric(1.0, 4)}))
        folder.checkpoint(folder.step + 1, {"w": torch.ones(3)})
        folder.close()
        read_runs([folder.path])

    def records(self) -> None:
        with RecordFile(self.folder / "out.jsonl") as file:
            file.append(record("step", 1, {"train.loss": Metric(1.0, 4)}))
            curve(file.records, "step", "train.loss")


def build() -> nn.Module:
    """What ``--model`` names. Its weights are drawn, and replaced."""
    return GPT(GPTConfig(vocab=V, width=8, layers=1, heads=2, positions=T))


def with_rule(scene: Scene) -> None:
    zerosum.rule(F.bilinear)(F.bilinear)
    from zerosum.probe.rules import RULES

    del RULES[F.bilinear]


CALLS: dict[str, Callable[[Scene], object]] = {
    "zerosum.Factors": lambda s: s.factors(),
    "zerosum.Probe": lambda s: s.measure(),
    "zerosum.Report": lambda s: (s.report.metrics, pickle.loads(pickle.dumps(s.report)), str(s.report)),
    "zerosum.ParameterReport": lambda s: [(p.metrics, p.gram) for p in map(s.report.__getitem__, s.report)],
    "zerosum.Coverage": lambda s: s.measure().coverage.share,
    "zerosum.ReportSum": lambda s: s.total(),
    "zerosum.SampledReport": lambda s: zerosum.token_report(s.model, s.x, s.y, sample=8, seed=3).metrics,
    "zerosum.token_report": lambda s: zerosum.token_report(s.model, s.x, s.y).metrics,
    "zerosum.Sketch": lambda s: zerosum.Sketch(s.model, s.losses, width=8, seed=0)(s.x, s.y),
    "zerosum.auxiliary": lambda s: zerosum.auxiliary(s.head(s.a).sum()),
    "zerosum.example_ids": lambda s: zerosum.example_ids(s.a[0], torch.arange(T)),
    "zerosum.rule": with_rule,
    "zerosum.gram_between": lambda s: zerosum.gram_between(s.model, s.losses, (s.x, s.y)),
    "zerosum.load_report": lambda s: zerosum.load_report(s.folder / "report.safetensors"),
    "zerosum.merge": lambda s: zerosum.merge([s.report, s.report]).metrics,
    "zerosum.changes.Step": lambda s: s.optimizer_step(),
    "zerosum.changes.evaluate": lambda s: changes.evaluate(s.model, s.x, s.y, at=s.after),
    "zerosum.changes.between": lambda s: changes.between(s.model, s.before, s.after, s.x, s.y),
    "zerosum.changes.first_order_changes": lambda s: changes.first_order_changes(s.model, s.x, s.y, s.update),
    "zerosum.changes.first_order_metrics": lambda s: changes.first_order_metrics(s.c, s.c),
    "zerosum.changes.change_metrics": lambda s: changes.change_metrics(s.c, s.c + 1),
    "zerosum.changes.eval_mode": lambda s: s.evaluating(),
    "zerosum.deceleration.fit": lambda s: deceleration.fit(*s.curve, first=10, bootstrap=3, seed=0),
    "zerosum.weights.clip": lambda s: weights.clip(s.report, 1.0),
    "zerosum.weights.mgda": lambda s: weights.mgda(s.report.gram),  # type: ignore[arg-type]
    "zerosum.weights.upgrad": lambda s: weights.upgrad(s.report.gram),  # type: ignore[arg-type]
    "zerosum.curves.read_curve": lambda s: read_curve(s.folder / "curve.npz"),
    "zerosum.runs": lambda s: s.run(),
    "zerosum.records": lambda s: (s.records(), smooth(s.curve[1])),
    "zerosum.evaluation": lambda s: TokenData.read(s.folder / "ids.bin").draw([2], 3, seed=0, vocab=64),
    "zerosum.checkpoints": lambda s: find(s.folder / "step_3.pt", Options(model=f"{__name__}:build")).checkpoints[0].load(),
    "zk.bias_grad": lambda s: zk.bias_grad(s.b),
    "zk.build_info": lambda s: zk.build_info(),
    "zk.coordinate_sums": lambda s: zk.coordinate_sums(s.w, s.w.abs(), s.w.square()),
    "zk.coordinate_sums_of_many": lambda s: zk.coordinate_sums_of_many([s.w], [s.w.abs()], [s.w.square()]),
    "zk.dense_interference": lambda s: zk.dense_interference(s.b, gram=True),
    "zk.dot": lambda s: zk.dot(s.a, s.b, s.w),
    "zk.embedding_interference": lambda s: zk.embedding_interference(s.ids, s.b, V, gram=True),
    "zk.gram": lambda s: zk.gram(s.a, s.b),
    "zk.interference": lambda s: zk.interference(s.a, s.b, direction=s.w, gram=True),
    "zk.linear_cross_entropy": lambda s: zk.linear_cross_entropy(s.a, s.w, s.ids % O),
    "zk.plan": lambda s: zk.plan("interference", N=N, T=T, K=K, O=O),
    "zk.scale_bias_grad": lambda s: zk.scale_bias_grad(s.b, s.b),
    "zk.scale_grad": lambda s: zk.scale_grad(s.b, s.b),
    "zk.sq_norm": lambda s: zk.sq_norm(s.a, s.b),
    "zk.weighted_grad": lambda s: zk.weighted_grad(s.a, s.b, s.c),
}


def settings() -> dict[str, Any]:
    """What belongs to the caller."""
    kind, keys, *place = np.random.get_state(legacy=True)
    return {
        "torch's random numbers": torch.get_rng_state().numpy().tobytes(),
        "numpy's random numbers": (kind, keys.tobytes(), *place),
        "Python's random numbers": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "numpy's errors": np.geterr(),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "process": (os.getcwd(), sys.getrecursionlimit(), locale.setlocale(locale.LC_ALL), dict(os.environ)),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
    }


def tensors() -> int:
    """The bytes of tensors that are alive."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values())


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    pytest.importorskip("safetensors")
    gc.collect()
    gc.freeze()  # what other tests and imports left need not be gone through for each call
    yield Scene(tmp_path_factory.mktemp("scene"))
    gc.unfreeze()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_changes_nothing_of_the_callers_and_keeps_no_tensor(name: str, scene: Scene) -> None:
    if name in ("zerosum.deceleration.fit", "zerosum.weights.mgda", "zerosum.weights.upgrad"):
        pytest.importorskip("scipy")
    call = CALLS[name]
    call(scene)  # the first one imports, proves and plans
    call(scene)
    before, held = settings(), tensors()
    for _ in range(3):
        call(scene)
        after = settings()
        assert [key for key in before if before[key] != after[key]] == []
    assert tensors() <= held


def test_every_public_name_is_called() -> None:
    public = {f"zerosum.{name}" for name in zerosum.__all__} | {f"zk.{name}" for name in zk.__all__}
    modules = {f"zerosum.{name}" for name in ("changes", "deceleration", "weights")}
    for module in (changes, deceleration, weights):
        for name, x in vars(module).items():
            if isinstance(x, types.FunctionType) and x.__module__ == module.__name__ and not name.startswith("_"):
                public.add(f"{module.__name__}.{name}")
    # Graphs need a GPU (test_graphs.py, test_gpu.py); named tuples hold what is given; the last three are a string and functions of
    # strings and numbers.
    no_calls = {"zerosum.CapturedStep", "zerosum.capture", "zk.CoordinateSums", "zk.EmbeddingSums", "zk.InterferenceSums"}
    no_state = {"zerosum.__version__", "zerosum.changes.prefixed", "zerosum.deceleration.with_error"}
    assert public - modules - no_calls - no_state - CALLS.keys() == set()


def test_a_leak_is_found(scene: Scene) -> None:
    kept: list[Tensor] = []
    held = tensors()
    kept.append(torch.ones(1000))
    assert tensors() >= held + 4000
