"""The callbacks: what is logged for a step against one backward pass for each of its examples, at the weights before the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zerosum.oracle import per_example_gradients, snapshot, trainable
from zerosum.probe.capture import open_captures

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from zerosum.integrations.transformers import ZeroSumCallback  # noqa: E402 (it imports transformers)

VOCAB, TOKENS, ROWS, ACCUMULATED, EVERY = 48, 10, 3, 2, 2
IGNORED = -100
# Of the libraries, about names of their own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    config.bos_token_id = config.eos_token_id = None
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, eos_token_id=None
    )
    config.bos_token_id = config.eos_token_id = None
    return transformers.LlamaForCausalLM(config)


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = gpt2()
    config = peft.LoraConfig(r=2, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, as is then the gradient of the other factor
                parameter.normal_(std=0.1)
    return model


def dataset(seed: int = 1, rows: int = 24) -> list[dict[str, Tensor]]:
    """Rows of bytes; each has another number of tokens that count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k in range(rows):
        ids = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
        labels = ids.clone()
        labels[: k % 5] = IGNORED
        found.append({"input_ids": ids, "labels": labels})
    return found


def float64_loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | None = None, **_: Any) -> Tensor:
    """As the models' own, which is of float32 logits."""
    total = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="sum")
    return total / ((labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def in_float64(model: nn.Module) -> nn.Module:
    """All of it, the loss too. Attention's biases are frozen: the gradient of a key's is rounding noise, whose D is anything."""
    model.double()
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    core.loss_function = float64_loss
    for name, parameter in model.named_parameters():
        if name.endswith("c_attn.bias"):
            parameter.requires_grad_(False)
    return model


class Recording(transformers.TrainerCallback):
    """What the other callbacks of a Trainer get to see."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in kwargs["model"].named_parameters()})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logged.append((state.global_step, dict(logs)))


@dataclass
class Training:
    """A run of a Trainer: made by ``Training(model, tmp_path, callback, …)``, with its micro-batches in their order."""

    model: nn.Module
    folder: Path
    callback: Any = None
    steps: int = 3
    classes: tuple[Any, Any] = (transformers.Trainer, transformers.TrainingArguments)
    data: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)
    trainer_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.seen = Recording()
        settings = {
            "output_dir": str(self.folder),
            "use_cpu": True,
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": ACCUMULATED,
            "max_steps": self.steps,
            "logging_steps": EVERY,
            "max_grad_norm": 0.05,  # every step is clipped
            "optim": "sgd",
            "learning_rate": 0.5,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
        } | self.arguments
        trainer, config = self.classes
        self.trainer = trainer(
            self.model,
            config(**settings),
            train_dataset=dataset() if self.data is None else self.data,
            # The recording callback is before the measuring one, as TensorBoard's and W&B's are.
            callbacks=[self.seen, *([] if self.callback is None else [self.callback])],
            **self.trainer_arguments,
        )
        self._collate, self.trainer.data_collator = self.trainer.data_collator, self.collate

    def collate(self, rows: list[Any]) -> dict[str, Tensor]:
        batch = self._collate(rows)
        self.batches.append({name: x.clone() for name, x in batch.items()})
        return batch

    def run(self) -> Training:
        self.trainer.train()
        return self

    @property
    def measured(self) -> dict[int, dict[str, float]]:
        """What was logged, by step, under the names of the metrics."""
        found: dict[int, dict[str, float]] = {}
        for step, logs in self.seen.logged:
            if numbers := {name.removeprefix("zerosum/"): x for name, x in logs.items() if name.startswith("zerosum/")}:
                assert step not in found, "logged twice"
                found[step] = numbers
        return found

    def truth(self, step: int) -> list[dict[str, Tensor]]:
        """For each micro-batch of a step, each example's gradient: of its tokens' losses over the mean number of tokens."""
        batches = self.batches[(step - 1) * ACCUMULATED : step * ACCUMULATED]
        count = sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in batches) / sum(len(b["labels"]) for b in batches)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(self.seen.weights[step - 1][name])
        found = []
        for batch in batches:
            inputs = {name: x for name, x in batch.items() if name != "labels"}
            with self.trainer.accelerator.autocast():
                logits = self.model(**inputs).logits[:, :-1]
                tokens = F.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none")
            found.append(per_example_gradients(tokens.sum(1) / count, self.model, trainable(self.model)))
        return found


def expected(truth: list[dict[str, Tensor]], is_embedding: Callable[[str], bool]) -> dict[str, float]:
    """The metrics, from every example's whole gradient."""
    g = {name: torch.cat([one[name].double().flatten(1) for one in truth]) for name in truth[0]}
    whole = torch.cat(list(g.values()), 1)
    layers = torch.cat([x for name, x in g.items() if not is_embedding(name)], 1)
    sizes = layers.abs().sum(0)
    touched = sizes > 0
    n = len(whole)
    gram = whole @ whole.T
    mean_sq, pair_dot = gram.diagonal().mean(), (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
    cosines = gram / torch.outer(gram.diagonal().sqrt(), gram.diagonal().sqrt())
    block = torch.block_diag(*(torch.ones(len(x), len(x)) for x in (next(iter(one.values())) for one in truth)))
    return {
        "examples": n,
        "coverage": 1.0,
        "D_grad": 1 - (layers.sum(0).abs()[touched] / sizes[touched]).mean().item(),
        "touched": touched.sum().item(),
        "grad_norm": (whole.sum(0).norm() / n).item(),
        "example_norm": mean_sq.sqrt().item(),
        "example_l1": whole.abs().sum(1).mean().item(),
        "noise_scale": ((mean_sq - pair_dot) / pair_dot).item(),
        "mean_dot_ratio": (pair_dot / mean_sq).item(),
        "mean_cosine": cosines[block.bool().triu(1)].mean().item(),
    }


def is_embedding(name: str) -> bool:
    return name.endswith(("wte.weight", "wpe.weight", "embed_tokens.weight"))


@pytest.mark.parametrize("arguments", [{}, {"activation_checkpointing": True}], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("build", [gpt2, lora])
def test_numbers_are_those_of_one_backward_pass_for_each_example(
    build: Callable[[], nn.Module], arguments: dict[str, Any], tmp_path: Path
) -> None:
    training = Training(in_float64(build()), tmp_path, ZeroSumCallback(EVERY, gram=True), arguments=arguments).run()
    assert list(training.measured) == [1, 3]
    for step, found in training.measured.items():
        for name, value in expected(training.truth(step), is_embedding).items():
            assert found[name] == pytest.approx(value, rel=1e-9), (step, name)


def test_numbers_in_bfloat16(tmp_path: Path) -> None:
    """A plain backward pass rounds each weight's gradient to bfloat16, by u = 2⁻⁹ of it at most, where the probe adds the same
    factors in float32. By that u the truth may be off: ‖g‖ and ‖g‖₁ by u of themselves, ‖Σ g‖ by u Σ ‖g‖, and |Σ g| / Σ |g| of a
    coordinate by 2u. What float32 adds is less than a hundredth of that."""
    u = 1.01 * 2**-9
    training = Training(llama(), tmp_path, ZeroSumCallback(EVERY), arguments={"bf16": True}).run()
    for step, found in training.measured.items():
        truth = expected(training.truth(step), is_embedding)
        assert found["examples"] == truth["examples"]
        assert found["coverage"] == 1
        assert found["example_norm"] == pytest.approx(truth["example_norm"], rel=u)
        assert found["example_l1"] == pytest.approx(truth["example_l1"], rel=u)
        assert found["grad_norm"] == pytest.approx(truth["grad_norm"], abs=u * truth["example_norm"])
        assert found["D_grad"] == pytest.approx(truth["D_grad"], abs=2 * u)


def test_training_is_as_without_it(tmp_path: Path) -> None:
    each = {"logging_steps": 1}
    with_it = Training(in_float64(gpt2()), tmp_path, ZeroSumCallback(EVERY), arguments=each).run()
    without = Training(in_float64(gpt2()), tmp_path, arguments=each).run()
    theirs = dict(without.model.named_parameters())
    for name, p in with_it.model.named_parameters():
        moved = (theirs[name] - without.seen.weights[0][name]).norm()
        assert (p - theirs[name]).norm() <= 1e-9 * moved, name
    # Its own entries come besides those that there would be, at the same steps and with the same names.
    others = [(step, sorted(logs)) for step, logs in with_it.seen.logged if "zerosum/D_grad" not in logs]
    assert others == [(step, sorted(logs)) for step, logs in without.seen.logged]
    history = [entry["step"] for entry in with_it.trainer.state.log_history if "zerosum/D_grad" in entry]
    assert history == [1, 3]


class Watching(transformers.TrainerCallback):
    """When a probe is open."""

    def __init__(self) -> None:
        self.between: list[bool] = []  # of micro-batches
        self.otherwise: set[bool] = set()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.between.append(bool(open_captures()))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.otherwise.add(bool(open_captures()))

    on_pre_optimizer_step = on_prediction_step = on_evaluate = on_step_end


def test_only_measured_steps_are_under_the_probe(tmp_path: Path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    watching = Watching()
    training = Training(
        gpt2(), tmp_path, ZeroSumCallback(EVERY), arguments=arguments, trainer_arguments={"eval_dataset": dataset(2, 4)}
    )
    training.trainer.add_callback(watching)
    training.run()
    assert watching.between == [True, False, True]
    assert watching.otherwise == {False}
    assert list(training.measured) == [1, 3]
    assert {found["examples"] for found in training.measured.values()} == {ROWS * ACCUMULATED}


def test_a_last_step_of_fewer_micro_batches(tmp_path: Path) -> None:
    training = Training(gpt2(), tmp_path, ZeroSumCallback(1), steps=2)
    training.trainer.train_dataset = dataset(rows=ROWS * ACCUMULATED + 2)
    training.run()
    assert {step: found["examples"] for step, found in training.measured.items()} == {1: ROWS * ACCUMULATED, 2: 2}


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("fails on the way back")


@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_a_step_that_fails_leaves_no_probe_open(where: str, tmp_path: Path) -> None:
    model = gpt2()
    training = Training(model, tmp_path, ZeroSumCallback(1))
    calls = 0

    def fail(module: nn.Module, inputs: Any, output: Any = None) -> Any:
        nonlocal calls
        calls += module.training
        if calls == 2:  # in the first step's second micro-batch
            assert open_captures()
            if where != "backward":
                raise RuntimeError("fails on the way forward")
            output.loss = Failing.apply(output.loss)
        return output

    before = snapshot(model)["modes"]
    handle = model.register_forward_pre_hook(fail) if where == "forward" else model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="fails on the way"):
        training.run()
    assert calls == 2
    assert not open_captures()
    assert snapshot(model)["modes"] == before
    handle.remove()
    training.run()
    assert list(training.measured) == [1, 2, 3]


def test_an_epoch_that_ends_between_micro_batches_leaves_no_probe_open(tmp_path: Path) -> None:
    class Stopping(transformers.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    training = Training(gpt2(), tmp_path, ZeroSumCallback(1))
    training.trainer.add_callback(Stopping())
    training.run()
    assert not open_captures()
    assert not training.measured


def test_the_file_is_one_that_plot_reads(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from zerosum.plots import paper
    from zerosum.runs import read_runs

    path = tmp_path / "records" / "tiny.jsonl"
    training = Training(gpt2(), tmp_path, ZeroSumCallback(EVERY, out=path)).run()
    (run,), notes = read_runs([path])
    assert not notes
    assert run.name == "tiny"
    assert paper.drawable("gradients", run)
    assert run.loss is not None
    assert run.curve("D_grad").values.tolist() == [found["D_grad"] for found in training.measured.values()]
    losses = [entry["loss"] for entry in training.trainer.state.log_history if "loss" in entry]
    assert run.loss.values[0] == pytest.approx(losses[0], rel=0.1)  # a mean over two steps
    with pytest.raises(ValueError, match="out: expected a new file"):
        Training(gpt2(), tmp_path, ZeroSumCallback(EVERY, out=path)).run()
    assert not open_captures()


def test_a_resumed_run_goes_on_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = Training(gpt2(), tmp_path, ZeroSumCallback(1, out=path), steps=4, arguments=saving).run()
    whole = path.read_text()
    again = Training(gpt2(), tmp_path, ZeroSumCallback(1, out=path), steps=4)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert path.read_text().splitlines()[:4] == whole.splitlines()[:4]
    assert again.measured[3]["D_grad"] == pytest.approx(first.measured[3]["D_grad"], rel=1e-4)  # float32 weights from a file


def sft(model: nn.Module, folder: Path, callback: Any, **arguments: Any) -> Training:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"<{k}>": k for k in range(VOCAB - 2)} | {"<end>": VOCAB - 2, "<pad>": VOCAB - 1}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"][k % 4 :].tolist()} for k, row in enumerate(dataset())])
    return Training(
        model,
        folder,
        callback,
        classes=(trl.SFTTrainer, trl.SFTConfig),
        data=data,
        arguments={"bf16": False, **arguments},
        trainer_arguments={"processing_class": tokenizer},
    ).run()


def test_sft_with_lora(tmp_path: Path) -> None:
    """TRL's loss is of float32 logits: 1e-6 is asked for, as of every model that computes so."""
    training = sft(in_float64(lora()), tmp_path, ZeroSumCallback(EVERY))
    assert list(training.measured) == [1, 3]
    for step, found in training.measured.items():
        truth = expected(training.truth(step), is_embedding)
        for name in ("examples", "coverage", "example_norm", "example_l1", "grad_norm"):
            assert found[name] == pytest.approx(truth[name], rel=1e-6), (step, name)
    # SFTTrainer's averages go with its own entries.
    theirs = [step for step, logs in training.seen.logged if "mean_token_accuracy" in logs and "zerosum/D_grad" not in logs]
    assert theirs == [2, 3]


def test_sft_of_the_whole_model(tmp_path: Path) -> None:
    """Its head is inside of an operation of TRL's: strictly, a rule has to cover it. The Trainer's own norm is of the same
    gradient, to a float32 sum's rounding."""
    training = sft(llama(), tmp_path, ZeroSumCallback(EVERY, strict=True), logging_steps=1)
    size = sum(p.numel() for p in training.model.parameters())
    norms = {step: logs["grad_norm"] for step, logs in training.seen.logged if "grad_norm" in logs}
    for step, found in training.measured.items():
        assert found["coverage"] == 1
        assert found["grad_norm"] == pytest.approx(norms[step], rel=size**0.5 * torch.finfo(torch.float32).eps)


def test_the_rule_for_the_fused_head_is_the_function() -> None:
    """In float64 but for the logits, which both round to float32: results to a float32 sum over the vocabulary, as their
    gradients."""
    kernels = pytest.importorskip("trl.kernels.chunked_logprob")
    from zerosum.integrations.trl import fused_head

    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 5), (VOCAB, 5), (VOCAB,))
    )
    arguments = hidden, weight, bias, torch.randint(0, VOCAB, (7,)), 0.7, 16, 3.0, 1.3
    wanted, found = kernels.ChunkedLogProbFunction.apply(*arguments), fused_head(*arguments)
    budget = {"rtol": VOCAB * torch.finfo(torch.float32).eps, "atol": VOCAB * torch.finfo(torch.float32).eps}
    for theirs, ours in zip(wanted, found, strict=True):
        torch.testing.assert_close(ours, theirs, **budget, check_dtype=False)
    w, v = torch.randn(2, 7)
    grads = [torch.autograd.grad((w * x[0]).sum() + (v * x[1]).sum(), arguments[:3]) for x in (wanted, found)]
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **budget)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every: expected a positive integer, got 0"),
        ({"every": 1.5}, "every: expected a positive integer, got 1.5"),
        ({"out": 3}, "out: expected a path or None, got int"),
        ({"prefix": None}, "prefix: expected a string, got NoneType"),
        ({"grma": True}, "grma: expected an argument of zerosum.Probe, which are "),
    ],
)
def test_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ZeroSumCallback(**arguments)


def test_several_devices_are_refused(tmp_path: Path) -> None:
    training = Training(gpt2(), tmp_path, ZeroSumCallback())
    training.trainer.args._n_gpu = 2
    with pytest.raises(NotImplementedError, match="one process on one device, got 2 GPUs in DataParallel"):
        training.run()


# Lightning -----------------------------------------------------------------------------------------------------------------------


def lightning_run(
    folder: Path, callback: Any, model: nn.Module, *, fail: bool = False, **settings: Any
) -> tuple[list[tuple[int, dict[str, float]]], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Trains the model; returns what a logger got, the micro-batches, and the weights before each of them."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers.logger import DummyLogger

    logged: list[tuple[int, dict[str, float]]] = []
    batches: list[dict[str, Tensor]] = []
    weights: list[dict[str, Tensor]] = []

    class Logger(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            logged.append((step, metrics))

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            batches.append(batch)
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
            loss = model(**batch).loss
            if fail and len(batches) == 2:
                assert open_captures()
                loss = Failing.apply(loss)
            return loss

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            assert not open_captures()
            model(**batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=0.5)

    loaders = [torch.utils.data.DataLoader(dataset(seed), batch_size=ROWS) for seed in (1, 2)]  # type: ignore[var-annotated, arg-type]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=0.05,
        callbacks=[] if callback is None else [callback],
        logger=Logger(),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=2,
        **settings,
    )
    trainer.fit(Module(), *loaders)
    return logged, batches, weights


def test_lightning_logs_what_one_backward_pass_for_each_example_gives(tmp_path: Path) -> None:
    from zerosum.integrations.lightning import ZeroSumCallback as LightningCallback

    model = in_float64(gpt2())
    path = tmp_path / "run.jsonl"
    logged, batches, weights = lightning_run(tmp_path, LightningCallback(EVERY, gram=True, out=path), model)
    measured = {step: numbers for step, numbers in logged if "zerosum/D_grad" in numbers}
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert list(measured) == [1, 3]
    for step, found in measured.items():
        truth = []
        first = (step - 1) * ACCUMULATED
        for batch, at in zip(batches[first : first + ACCUMULATED], weights[first : first + ACCUMULATED], strict=True):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(at[name])
            # Lightning divides a micro-batch's mean over tokens by the number of micro-batches.
            count = int((batch["labels"][:, 1:] != IGNORED).sum()) / ROWS
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
            losses = F.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none").sum(1) / count
            truth.append(per_example_gradients(losses, model, trainable(model)))
        for name, value in expected(truth, is_embedding).items():
            assert found[f"zerosum/{name}"] == pytest.approx(value, rel=1e-9), (step, name)
    plain = in_float64(gpt2())
    lightning_run(tmp_path, None, plain)
    for name, p in plain.named_parameters():
        assert (p - after[name]).norm() <= 1e-9 * (p - weights[0][name]).norm(), name
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 1, 3, 3]


def test_lightning_step_that_fails_leaves_no_probe_open(tmp_path: Path) -> None:
    from zerosum.integrations.lightning import ZeroSumCallback as LightningCallback

    model = gpt2()
    before = snapshot(model)["modes"]
    callback = LightningCallback(1)
    with pytest.raises(RuntimeError, match="fails on the way back"):
        lightning_run(tmp_path, callback, model, fail=True)
    assert not open_captures()
    assert snapshot(model)["modes"] == before
    logged, *_ = lightning_run(tmp_path, callback, model)
    assert [step for step, numbers in logged if "zerosum/D_grad" in numbers] == [1, 2, 3]
