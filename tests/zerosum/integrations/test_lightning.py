"""The callback of Lightning's Trainer, on real trainings, against one backward pass for each example."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.zerosum.integrations.tiny import BYTES, TEXT, block_mask, copy_of
from tests.zerosum.oracle import assert_truth, direction_for, per_example_gradients, trainable
from zerosum.runs import read_runs
from zerosum.training.model import GPT, GPTConfig

lightning = pytest.importorskip("lightning")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from zerosum.integrations.lightning import ZeroSumCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*treespec"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*not supported by the model summary"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
    pytest.mark.filterwarnings("ignore:.*ModelCheckpoint.*"),
    pytest.mark.filterwarnings("ignore:.*resume from.*"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
]

LENGTH, BATCH = 9, 3


class Module(lightning.LightningModule):
    """A GPT in float64, whose mean loss over all tokens is differentiated."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(vocab=BYTES, width=16, layers=2, heads=4, positions=LENGTH)).to(dtype)
        self.batches: list[Tensor] = []

    def tokens(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.model(batch[:, :-1]).mT, batch[:, 1:], reduction="none")

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        if not self.global_step:
            if not self.batches:
                self.before = [copy_of(self.model)]  # in a list it is no submodule
            self.batches.append(batch[0])
        return self.tokens(batch[0]).mean()

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        self.log("validation", self.tokens(batch[0]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def truth(self) -> dict[str, Tensor]:
        """Of the first step: each sequence's mean loss."""
        before = copy_of(self)
        before.model = self.before[0]
        parts = [per_example_gradients(before.tokens(b).mean(1), before, trainable(before)) for b in self.batches]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Manual(Module):
    """Two backward passes for a step, clipped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], number: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, number)
        self.manual_backward(loss / 2)
        if number % 2:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


def data(count: int = 12, batch: int = BATCH) -> DataLoader:
    rows = torch.tensor(list(TEXT[: count * (LENGTH + 1)])).view(count, LENGTH + 1)
    return DataLoader(TensorDataset(rows), batch_size=batch)


def trained(
    tmp_path: Path,
    module: Module,
    *callbacks: Any,
    validate: bool = False,
    resume: Any = None,
    batch: int = BATCH,
    **options: Any,
) -> Any:
    settings: dict[str, Any] = dict(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        default_root_dir=tmp_path,
    )
    trainer = lightning.Trainer(callbacks=list(callbacks), **(settings | options))
    trainer.fit(module, data(batch=batch), data() if validate else None, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("clip", [None, 0.01], ids=["unclipped", "clipped"])
def test_what_is_logged_of_a_step_is_the_truth(tmp_path: Path, clip: float | None) -> None:
    module = Module()
    direction = direction_for(module)
    callback = ZeroSumCallback(gram=True, direction=direction)
    trainer = trained(tmp_path, module, callback, validate=True, logger=CSVLogger(tmp_path), gradient_clip_val=clip, max_steps=1)
    truth = module.truth()
    assert callback.report.num_examples == 2 * BATCH == len(next(iter(truth.values())))
    if clip:  # grad_sum shares the clipped gradient's memory
        norms = torch.stack([g.square().flatten(1).sum(1) for g in truth.values()]).sum(0)
        torch.testing.assert_close(callback.report.sq_norm, norms, rtol=1e-9, atol=0)
    else:
        assert_truth(callback.report, truth, direction, gram=block_mask([BATCH, BATCH]))
    norm = torch.cat([g.mean(0).flatten() for g in truth.values()]).norm().item()
    assert trainer.callback_metrics["zerosum/grad_norm"].item() == pytest.approx(norm, rel=1e-6)
    trainer.logger.save()
    header, *rows = (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("zerosum/grad_norm")
    assert [float(row.split(",")[column]) for row in rows if row.split(",")[column]] == pytest.approx([norm], rel=1e-9)


def test_training_is_the_plain_one(tmp_path: Path) -> None:
    modules = [Module(), Module()]
    trained(tmp_path, modules[0], ZeroSumCallback(every=1), gradient_clip_val=0.5)
    trained(tmp_path, modules[1], gradient_clip_val=0.5)
    for p, q in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_in_bf16_mixed(tmp_path: Path) -> None:
    """Every parameter is covered, and norms are those of the float32 step to the rounding of bfloat16, four times in turn."""
    module = Module(torch.float32)
    callback = ZeroSumCallback()
    trained(tmp_path, module, callback, precision="bf16-mixed", max_steps=1)
    assert callback.report.coverage.share == 1
    norms = torch.stack([g.square().flatten(1).sum(1) for g in module.truth().values()]).sum(0)
    assert (callback.report.sq_norm - norms).norm() <= 2 * 4 * 2**-8 * norms.norm()


def test_manual_optimization(tmp_path: Path) -> None:
    module, callback = Manual(), ZeroSumCallback(backwards=2)
    trained(tmp_path, module, callback, accumulate_grad_batches=1)
    truth = module.truth()
    norms = torch.stack([g.square().flatten(1).sum(1) for g in truth.values()]).sum(0)
    torch.testing.assert_close(callback.report.sq_norm, norms, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("backwards", "message"), [(1, "has more than backwards=1"), (3, "stepped after 2 backward passes, not 3")]
)
def test_manual_optimization_with_other_backward_passes_says_so(tmp_path: Path, backwards: int, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        trained(tmp_path, Manual(), ZeroSumCallback(backwards=backwards), accumulate_grad_batches=1)
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_resumed_run_goes_on_with_its_file(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "small"
    saved = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=1)
    options = dict(enable_checkpointing=True, log_every_n_steps=1, max_epochs=2)

    def records() -> list[tuple[int, str]]:
        entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return sorted((entry["step"], entry["kind"]) for entry in entries)

    trained(tmp_path, Module(), ZeroSumCallback(every=2, out=out), saved, **options)
    before = records()
    assert before == sorted([(k, "step") for k in (1, 2, 3, 4)] + [(k, "probe") for k in (1, 2, 4)])
    (checkpoint,) = (tmp_path / "kept").glob("*step=2.ckpt")
    trained(tmp_path, Module(), ZeroSumCallback(every=2, out=out), resume=checkpoint, **options)
    assert records() == before
    (run,), _ = read_runs([out])
    assert list(run.curve("D_grad").steps) == [1, 2, 4]
    with pytest.raises(ValueError, match="already has records"):
        trained(tmp_path, Module(), ZeroSumCallback(every=2, out=out), **(options | {"enable_checkpointing": False}))


def test_an_exception_closes_the_probe(tmp_path: Path) -> None:
    class Failing(Module):
        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            if number == 1:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, number)

    callback = ZeroSumCallback()
    with pytest.raises(ArithmeticError, match="on purpose"):
        trained(tmp_path, Failing(), callback)
    assert not torch.overrides._get_current_function_mode_stack()
    trained(tmp_path, Module(), callback)
    assert callback.report.num_examples == 2 * BATCH


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="backwards: expected a positive integer, got 0"):
        ZeroSumCallback(backwards=0)
    with pytest.raises(ValueError, match="every: expected a positive integer"):
        ZeroSumCallback(every=0)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning.Trainer, "world_size", 2)
    with pytest.raises(NotImplementedError, match=r"several under DistributedDataParallel .*, got 2 under SingleDevice"):
        trained(tmp_path, Module(), ZeroSumCallback())


@pytest.mark.parametrize("how", ["ddp", "fully_shard"])
def test_several_processes_have_one_report_of_all_examples(how: str, tmp_path: Path, project_environment: dict[str, str]) -> None:
    """Of two ranks' micro-batches: that of one process with all of them."""
    command = [sys.executable, "-m", "tests.zerosum.integrations.lightning_driver", how, str(tmp_path)]
    done = subprocess.run(command, env=project_environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    report, logged = ranks[0]
    # The same 12 sequences: of each rank 2 micro-batches of 3.
    alone = ZeroSumCallback(out=tmp_path / "alone")
    trainer = trained(tmp_path, Module(), alone, batch=2 * BATCH, gradient_clip_val=0.01, max_steps=1)
    assert alone.report.num_examples == 4 * BATCH
    assert report == pytest.approx(alone.report.to_dict(), rel=1e-9)
    assert logged == pytest.approx({key: float(x) for key, x in trainer.callback_metrics.items()}, rel=1e-6)
    files = [list(map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())) for name in ("run", "alone")]
    assert [sorted(entry["kind"] for entry in entries) for entries in files] == [["probe", "step"]] * 2
    losses = [next(entry["metrics"] for entry in entries if entry["kind"] == "step")["train.loss"] for entries in files]
    assert losses[0]["value"] == pytest.approx(losses[1]["value"], rel=1e-9)
    assert losses[0]["n"] == losses[1]["n"] == 4 * BATCH


def test_with_pytorch_lightning(tmp_path: Path) -> None:
    """The other package's Trainer and module take the callback as it is."""
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = GPT(GPTConfig(vocab=BYTES, width=16, layers=1, heads=4, positions=LENGTH)).double()

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            return F.cross_entropy(self.inner(batch[0][:, :-1]).mT, batch[0][:, 1:])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, callback = Other(), ZeroSumCallback()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = other.Trainer(accelerator="cpu", max_steps=1, callbacks=[callback], default_root_dir=tmp_path, **quiet)
    trainer.fit(module, data())
    rows = next(iter(data()))[0]
    losses = F.cross_entropy(module.inner(rows[:, :-1]).mT, rows[:, 1:], reduction="none").mean(1)
    assert_truth(callback.report, per_example_gradients(losses, module, trainable(module)), gram=False)
    assert "zerosum/D_grad" in trainer.callback_metrics
