"""The callback of transformers' Trainer: what is logged is the truth of the step, and the step is the plain one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zerosum.integrations.tiny import (
    BYTES,
    IGNORED,
    block_mask,
    copy_of,
    documents,
    expected_logs,
    gpt2,
    padded,
    sums_of_tokens,
    truth_of,
)
from tests.zerosum.oracle import assert_truth, direction_for
from zerosum.records import Record
from zerosum.runs import read_runs

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from zerosum.integrations.transformers import ZeroSumCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

# transformers' losses are computed in float32, in the truth as in the step.
FLOAT32_LOSS = 1e-6
EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")


class Recording(transformers.Trainer):
    """Keeps the model before the first step, and that step's batches."""

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        if self.state.global_step == 0:
            if not hasattr(self, "before"):
                self.before, self.batches = copy_of(self.model), []
            self.batches.append({key: x.clone() for key, x in inputs.items()})
        return super().training_step(model, inputs, num_items_in_batch)


def trained(
    tmp_path: Path,
    model: nn.Module,
    *callbacks: Any,
    trainer: type = Recording,
    resume: Any = None,
    options: Any = None,
    **args: Any,
) -> Any:
    """A training of 2 steps of two micro-batches of two sequences, by default."""
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    data = [{"input_ids": document} for document in documents(8)]
    arguments = transformers.TrainingArguments(str(tmp_path / "trainer"), **(settings | args))
    options = {"train_dataset": data, "data_collator": padded} | (options or {})
    made = trainer(model, arguments, callbacks=list(callbacks), **options)
    made.train(resume_from_checkpoint=resume)
    return made


def without_key_bias(model: nn.Module) -> nn.Module:
    """Attention ignores what is added to all keys: that third of this bias has a gradient of rounding noise."""
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("c_attn.bias"))
    return model


def logged(trainer: Any, key: str) -> dict[int, float]:
    """The values of a key in what was logged, by step."""
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def recorded(out: Path) -> list[Record]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("clip", [0.0, 0.01], ids=["unclipped", "clipped"])
def test_what_is_logged_of_a_step_is_the_truth(tmp_path: Path, clip: float) -> None:
    """Two micro-batches, padded differently, whose loss is divided by the number of items of both."""
    model = without_key_bias(gpt2())
    direction = direction_for(model)
    asked = []
    callback = ZeroSumCallback(every=100, gram=True, direction=lambda m: asked.append(m) or direction)
    trainer = trained(tmp_path, model, callback, max_grad_norm=clip)
    assert asked == [model]
    assert [len(batch["labels"]) for batch in trainer.batches] == [2, 2]
    truth = truth_of(trainer.before, trainer.batches)
    assert logged(trainer, "zerosum/D_grad").keys() == {1}
    expected = expected_logs(truth, EMBEDDINGS, direction)
    found = next(entry for entry in trainer.state.log_history if "zerosum/D_grad" in entry)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=FLOAT32_LOSS, abs=FLOAT32_LOSS)
    assert all(type(value) is float for key, value in found.items() if key.startswith("zerosum/"))
    assert logged(trainer, "loss").keys() == {1, 2}  # a log within a step takes nothing from the Trainer's own
    if not clip:  # which writes to the gradient, whose memory grad_sum has
        assert_truth(callback.report, truth, direction, rtol=FLOAT32_LOSS, gram=block_mask([2, 2]))


def test_training_is_the_plain_one(tmp_path: Path) -> None:
    """To rounding: a probed gradient is added up in another order. Dropout draws the same numbers."""
    dropouts = dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    models = [gpt2(**dropouts) for _ in range(2)]
    with_it, without = (
        trained(tmp_path, model, *callbacks, max_steps=3)
        for model, callbacks in zip(models, ([ZeroSumCallback(every=2)], []), strict=True)
    )
    assert logged(with_it, "zerosum/D_grad").keys() == {1, 2}
    assert logged(with_it, "loss") == pytest.approx(logged(without, "loss"), rel=FLOAT32_LOSS)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p - q).norm() <= FLOAT32_LOSS * q.norm(), name
    assert "training_step" not in vars(with_it)


def test_evaluation_is_not_measured(tmp_path: Path) -> None:
    """It comes between two steps, with other batches."""
    callback = ZeroSumCallback(every=1)
    data = [{"input_ids": document} for document in documents(6)]
    evaluated = dict(eval_strategy="steps", eval_steps=1, eval_on_start=True, per_device_eval_batch_size=3)
    trainer = trained(tmp_path, gpt2(), callback, options={"eval_dataset": data}, **evaluated)
    assert logged(trainer, "eval_loss").keys() == {0, 1, 2}
    assert logged(trainer, "zerosum/examples") == {1: 4.0, 2: 4.0}
    assert callback.report.proof.passes == 2


def test_other_callbacks_and_tensorboard_get_flat_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen: dict[int, float] = {}

    class Listener(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "zerosum/D_grad" in logs:
                seen[state.global_step] = logs["zerosum/D_grad"]

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trained(tmp_path, gpt2(), ZeroSumCallback(every=2), Listener(), report_to=["tensorboard"])
    assert seen == logged(trainer, "zerosum/D_grad")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    events = {event.step: event.value for event in board.Scalars("train/zerosum/D_grad")}
    assert events == pytest.approx(seen, rel=1e-6)  # TensorBoard keeps float32
    assert "train/loss" in board.Tags()["scalars"]


def test_a_resumed_run_goes_on_with_its_file(tmp_path: Path) -> None:
    """Four steps, then again from the checkpoint after two: what was recorded after it is replaced."""
    out = tmp_path / "runs" / "small"
    saved = dict(save_strategy="steps", save_steps=2, max_steps=4)
    whole = trained(tmp_path, gpt2(), ZeroSumCallback(every=2, out=out), **saved)
    before = recorded(out)
    checkpoint = str(tmp_path / "trainer" / "checkpoint-2")
    again = trained(tmp_path, gpt2(), ZeroSumCallback(every=2, out=str(out)), resume=checkpoint, **saved)
    after = recorded(out)
    assert sorted((entry["step"], entry["kind"]) for entry in after) == sorted((entry["step"], entry["kind"]) for entry in before)
    assert [entry["step"] for entry in after if entry["kind"] == "probe"] == [1, 2, 4]
    (run,), notes = read_runs([out])
    assert (run.name, notes) == ("small", [])
    assert dict(zip(run.loss.steps, run.loss.values, strict=True)) == logged(whole, "loss")
    curve = run.curve("D_grad")
    assert dict(zip(curve.steps, curve.values, strict=True)) == pytest.approx(logged(again, "zerosum/D_grad"), rel=1e-9)
    assert run.over("D_grad") == ("N = 4 sequences of training batches", "exact", "")
    with pytest.raises(ValueError, match=r"out: .*metrics\.jsonl already has records"):
        trained(tmp_path, gpt2(), ZeroSumCallback(every=2, out=out))
    assert recorded(out) == after
    (out / "config.json").write_text("{}\n")
    with pytest.raises(ValueError, match=r"out: .*config\.json belongs to another run"):
        trained(tmp_path, gpt2(), ZeroSumCallback(every=2, out=out), resume=checkpoint, **saved)


def test_along_a_direction_of_the_users_a_run_says_no_update(tmp_path: Path) -> None:
    model = gpt2()
    trained(tmp_path, model, ZeroSumCallback(direction=direction_for(model), out=tmp_path / "run"), max_steps=1)
    (run,), _ = read_runs([tmp_path / "run"])
    assert run.has("C_g")
    assert run.over("C_g")[2] == ""


@pytest.mark.parametrize("place", ["forward", "between"])
def test_an_exception_closes_the_probe(tmp_path: Path, place: str) -> None:
    """In the second micro-batch of a measured step, or by a callback after the first. The next training is measured again."""

    class Failing(Recording):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            if place == "forward" and self.calls == 2:
                raise ArithmeticError("on purpose")
            return super().compute_loss(*args, **kwargs)

    class Raising(transformers.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if place == "between":
                raise ArithmeticError("on purpose")

    model, callback = gpt2(), ZeroSumCallback(every=1)
    with pytest.raises(ArithmeticError, match="on purpose"):
        trained(tmp_path, model, callback, Raising(), trainer=Failing)
    if place == "between":
        callback.close()
    assert not torch.overrides._get_current_function_mode_stack()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert callback.report is None
    model.zero_grad()
    trainer = trained(tmp_path, model, callback)
    assert logged(trainer, "zerosum/examples") == {1: 4.0, 2: 4.0}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_under_bfloat16_autocast(tmp_path: Path) -> None:
    """The truth is of the same autocast. A gradient of bfloat16 operands differs from it by the rounding of what the backward pass
    keeps in bfloat16: 2⁻⁸ of each, in four roundings in turn at most in two layers."""
    model = gpt2(torch.float32)
    callback = ZeroSumCallback(every=100)
    trainer = trained(tmp_path, model, callback, bf16=True, max_steps=1)

    def losses(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return sums_of_tokens(logits.float(), batch["labels"])

    truth = truth_of(trainer.before, trainer.batches, losses)
    assert callback.report.coverage.share == 1
    squares = {name: g.square().flatten(1).sum(1) for name, g in truth.items()}
    total = torch.stack(list(squares.values())).sum(0)
    assert relative(callback.report.sq_norm.double(), total) <= 2 * 4 * 2**-8


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    model = gpt2()
    callback = ZeroSumCallback(every=100)
    kept = dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant})
    trainer = trained(tmp_path, model, callback, max_steps=1, max_grad_norm=0.0, **kept)
    trainer.before.activation_checkpointing_disable()
    truth = truth_of(trainer.before, trainer.batches)
    assert_truth(callback.report, truth, rtol=FLOAT32_LOSS, gram=False)


VIRTUAL = 3


def adapted(kind: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    low_rank = dict(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    task = dict(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    config = {
        "lora": lambda: peft.LoraConfig(**low_rank),
        "dora": lambda: peft.LoraConfig(**low_rank, use_dora=True),
        "prompt": lambda: peft.PromptTuningConfig(**task),
        "prefix": lambda: peft.PrefixTuningConfig(**task),
    }[kind]()
    return peft.get_peft_model(gpt2(), config).double()


@pytest.mark.parametrize("kind", ["lora", "dora", "prompt", "prefix"])
def test_with_peft(tmp_path: Path, kind: str) -> None:
    """Only adapters are trained, and all of them are covered."""
    callback = ZeroSumCallback(every=100)
    trainer = trained(tmp_path, adapted(kind), callback, max_steps=1, max_grad_norm=0.0)

    def losses(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if kind != "prompt":
            return sums_of_tokens(logits, batch["labels"])
        # The last virtual token predicts the first real one.
        return sums_of_tokens(logits[:, VIRTUAL - 1 :], F.pad(batch["labels"], (1, 0)))

    truth = truth_of(trainer.before, trainer.batches, losses, first=0 if kind == "prompt" else 1)
    assert_truth(callback.report, truth, rtol=FLOAT32_LOSS, gram=False)
    assert callback.report.coverage.share == 1


def test_with_a_loss_function_of_ones_own(tmp_path: Path) -> None:
    """Of all rows it is as the Trainer's own."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits, targets = outputs.logits[:, :-1].reshape(-1, BYTES), labels[:, 1:].reshape(-1)
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / num_items_in_batch

    callback = ZeroSumCallback(every=100)
    options = {"compute_loss_func": loss}
    trainer = trained(tmp_path, gpt2(), callback, max_steps=1, max_grad_norm=0.0, options=options)
    assert_truth(callback.report, truth_of(trainer.before, trainer.batches), rtol=FLOAT32_LOSS, gram=False)


def smoothed(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(N,): sums of 0.9 times a token's own loss and 0.1 times the mean loss over all bytes."""
    log_p = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    own = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return ((0.9 * own - 0.1 * log_p.mean(-1)) * (targets != IGNORED)).sum(1)


def test_with_label_smoothing_the_scale_is_said(tmp_path: Path) -> None:
    """Two losses of each token are added: the probe takes their weights' sum for the token's."""
    callback = ZeroSumCallback(every=100)
    with pytest.warns(UserWarning, match="label_smoothing_factor"):
        trainer = trained(tmp_path, gpt2(), callback, max_steps=1, max_grad_norm=0.0, label_smoothing_factor=0.1)
    truth = truth_of(trainer.before, trainer.batches, smoothed)
    factor = 1 - 0.1 + 0.1 / BYTES
    assert_truth(callback.report, {name: g / factor for name, g in truth.items()}, rtol=FLOAT32_LOSS, gram=False)
    callback = ZeroSumCallback(every=100, loss_reduction=4.0)
    trainer = trained(tmp_path, gpt2(), callback, max_steps=1, max_grad_norm=0.0, label_smoothing_factor=0.1)
    # The loss as it is trained: GPT-2's items are all tokens, also those that nothing predicts.
    predicted, items = (sum(int((b["labels"][:, first:] != IGNORED).sum()) for b in trainer.batches) for first in (1, 0))
    factor = predicted / items
    assert_truth(callback.report, {name: g * factor for name, g in truth.items()}, rtol=FLOAT32_LOSS, gram=False)


def test_a_compiled_model_is_measured(tmp_path: Path) -> None:
    callback = ZeroSumCallback(every=1)
    compiled = dict(torch_compile=True, torch_compile_backend="eager")
    trainer = trained(tmp_path, gpt2(), callback, max_steps=1, max_grad_norm=0.0, **compiled)
    assert_truth(callback.report, truth_of(trainer.before, trainer.batches), rtol=FLOAT32_LOSS, gram=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every: expected a positive integer, got 0"),
        ({"every": True}, ValueError, "every: expected a positive integer, got True"),
        ({"direction": 3}, TypeError, "direction: expected a mapping"),
        ({"out": 3}, TypeError, "out: expected a path, got int"),
        ({"model": None}, TypeError, "model: the callback sets"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ZeroSumCallback(**options)


def test_arguments_of_the_probe_are_checked_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="verify"):
        trained(tmp_path, gpt2(), ZeroSumCallback(verify="sometimes"))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out: expected a new folder"):
        trained(tmp_path / "there", gpt2(), ZeroSumCallback(out=tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["notes.txt"]


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    with pytest.raises(NotImplementedError, match="several under DistributedDataParallel, got 2 under NO"):
        trained(tmp_path, gpt2(), ZeroSumCallback(), accelerator_config={"split_batches": False})


def test_several_devices_of_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(NotImplementedError, match=r"got 2 in one \(torch\.nn\.DataParallel\): start the script with torchrun"):
        trained(tmp_path, gpt2(), ZeroSumCallback())


def test_several_processes_have_one_report_of_all_examples(tmp_path: Path, project_environment: dict[str, str]) -> None:
    """Of two ranks' micro-batches under DistributedDataParallel: what one process logs of all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.zerosum.integrations.ddp_driver", str(tmp_path)]
    processes = [
        subprocess.Popen(command, env=project_environment | meeting | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    said = [process.communicate(timeout=200)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][-2000:] + said[1][-2000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    # The same 8 sequences: of each rank 2 micro-batches of 2.
    model = without_key_bias(gpt2())
    callback = ZeroSumCallback(every=100, out=tmp_path / "alone")
    alone = trained(tmp_path, model, callback, per_device_train_batch_size=4, max_grad_norm=0.01, max_steps=1)
    expected = {key: values[1] for key in ranks[0] if (values := logged(alone, key))}
    assert expected.keys() == ranks[0].keys()
    assert expected["zerosum/examples"] == 8
    for key, value in expected.items():
        assert ranks[0][key] == pytest.approx(value, rel=FLOAT32_LOSS), key
    assert [entry["kind"] for entry in recorded(tmp_path / "run")].count("probe") == 1
    losses = [
        next(entry["metrics"]["train.loss"] for entry in recorded(tmp_path / name) if entry["kind"] == "step")
        for name in ("run", "alone")
    ]
    assert losses[0]["value"] == pytest.approx(losses[1]["value"], abs=1e-4)  # the Trainer rounds what it logs
    assert losses[0]["n"] == losses[1]["n"] == 8


def test_without_a_trainer_it_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"expected a call by transformers\.Trainer"):
        ZeroSumCallback().on_train_begin(None, None, None)
