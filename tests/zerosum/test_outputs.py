"""Models whose output holds the logits, as transformers' do: token_report, changes and `zerosum measure` find them there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum
from tests.zerosum.oracle import assert_truth, per_example_gradients, trainable
from tests.zerosum.test_attribution_transformers import VANISHING, perturbed
from tests.zerosum.transformers_models import IGNORED, decoder, gpt2
from zerosum import cli
from zerosum.changes import IGNORED as IGNORED_TARGET
from zerosum.checkpoints import Loaded, Series, next_token_losses
from zerosum.evaluation import Sample, TokenData
from zerosum.measurement import Measurement, Settings
from zerosum.training.model import GPT, GPTConfig, logits_of, token_losses

assert IGNORED == IGNORED_TARGET
MODELS = {"gpt2": gpt2("sdpa"), "gpt2, eager": gpt2("eager"), "llama": decoder("Llama", "sdpa")}


class Wrapped(nn.Module):
    """A GPT that returns its logits in some form."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.form = GPT(GPTConfig(vocab=11, width=8, layers=1, heads=2, positions=8)).double(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.model(x))


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda logits: logits,
    "attribute": lambda logits: SimpleNamespace(logits=logits, loss=None),
    "dictionary": lambda logits: {"hidden": logits.exp(), "logits": logits},
    "tuple": lambda logits: (logits, "cache"),
    "list": lambda logits: [logits],
}


def batch(n: int = 2, t: int = 6, vocab: int = 11) -> tuple[Tensor, Tensor]:
    """Tokens and targets, of which the last one and some others are ignored."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(vocab, (2, n, t), generator=generator)
    y[:, -1], y[0, 1] = IGNORED, IGNORED
    return x, y


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found_in_any_form(form: str) -> None:
    x, y = batch()
    plain, model = Wrapped(FORMS["tensor"]), Wrapped(FORMS[form])
    report = zerosum.token_report(model, x, y)
    expected = zerosum.token_report(plain, x, y)
    assert report.num_examples == int((y != IGNORED).sum())
    for name in expected:
        assert torch.equal(report[name].abs_sum, expected[name].abs_sum)
    update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    found = (zerosum.changes.first_order_changes(m, x, y, update) for m in (model, plain))
    assert torch.equal(*found)
    assert torch.equal(zerosum.changes.evaluate(model, x, y), token_losses(plain, x, y).detach())


@pytest.mark.parametrize(("output", "got"), [
    (lambda x: {"scores": x}, "got dict of scores"),
    (lambda x: SimpleNamespace(last_hidden_state=x), "got SimpleNamespace"),
    (lambda x: (), "got tuple"),
    (lambda x: {"logits": x[:, -1]}, r"got dict of logits with \(2, 11\)"),
    (lambda x: x[:, -1], r"got \(2, 11\)"),
    (lambda x: None, "got NoneType"),
])  # fmt: skip
def test_another_output_is_refused_and_losses_are_named(output: Callable[[Tensor], Any], got: str) -> None:
    x, _ = batch(vocab=11)
    logits = torch.zeros(2, 6, 11)
    with pytest.raises(ValueError, match=rf"^model: expected logits of shape \(2, 6, vocab\), {got}; .*losses=f says"):
        token_losses(lambda x: output(logits), x, x)
    with pytest.raises(ValueError, match=r"losses=f says how losses are computed"):
        zerosum.token_report(Wrapped(output), x, x)
    with pytest.raises(ValueError, match=r"expected logits of shape"):
        logits_of(output(logits), x)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_tokens_gradient_of_a_transformers_model(name: str, cached: bool) -> None:
    """As it is: it returns a ModelOutput, and keeps a cache by default."""
    model = perturbed(MODELS[name])
    model.config.use_cache = cached
    x, y = batch(2, 5, 40)
    losses = F.cross_entropy(model(x).logits.mT, y, reduction="none").flatten()[y.flatten() != IGNORED]
    truth = per_example_gradients(losses, model, trainable(model))
    report = zerosum.token_report(model, x, y)
    assert isinstance(report, zerosum.Report)
    # Llama's norms compute in float32.
    assert_truth(report, truth, rtol=1e-9 if name != "llama" else 2e-5, gram=False, vanishing=VANISHING)
    sampled = zerosum.token_report(model, x, y, sample=64)
    for parameter in sampled:
        torch.testing.assert_close(sampled[parameter].grad_sum, truth[parameter].sum(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt2, eager", "llama"])
def test_a_step_of_a_transformers_model(name: str) -> None:
    model = perturbed(MODELS[name])
    x, y = batch(2, 5, 40)

    def losses() -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(model(x).logits.mT, y, reduction="none")[y != IGNORED]

    optimizer, before = torch.optim.SGD(model.parameters(), lr=1e-3), losses()
    with zerosum.changes.Step(model, {"train": (x, y)}) as step:
        model(x, labels=x).loss.backward()
        optimizer.step()
    change = losses() - before
    assert step.metrics["train.loss"].n == int((y != IGNORED).sum()) == step.metrics["train.D"].n
    assert step.metrics["train.loss"].value == pytest.approx(before.mean().item(), rel=1e-9)
    assert step.metrics["train.D"].value == pytest.approx(1 - (change.sum().abs() / change.abs().sum()).item(), abs=1e-9)
    first = zerosum.changes.first_order_changes(model, x, y, step.update, at=step.weights)
    assert (first[y != IGNORED] - change).norm() <= 0.05 * change.norm()


# Targets that are ignored: measure goes by the same tokens as token_report and Step.


class _Checkpoint:
    step, path = 1, Path("step_1")
    options = SimpleNamespace(model=None, model_config={}, losses=None)

    def load(self, optimizer: bool = False) -> Loaded:
        return Loaded(Wrapped(FORMS["attribute"]).eval(), next_token_losses, 11, 8, None)


@pytest.mark.parametrize("examples", ["sequence", "token"])
def test_measure_counts_the_tokens_that_have_a_target(examples: str) -> None:
    """Against the same data in which the ignored tokens' targets are other ones: nothing may depend on them."""
    x, y = batch()
    checkpoint: Any = _Checkpoint()
    found = []
    for replaced in (IGNORED, 3):

        def losses(model: nn.Module, x: Tensor, y: Tensor, replaced: int = replaced) -> Tensor:
            # Of a token without a target the loss is what another target would have: a function need not know of them.
            return next_token_losses(model, x, y if replaced == IGNORED else y.masked_fill(y == IGNORED, replaced))

        sample = Sample("data", x, y, "digest")
        settings = Settings(examples=examples, update="gradient", learning_rate=0.1, clip=1e9)
        measurement = Measurement(Series("run", Path(), [checkpoint]), settings, sample, sample)
        loaded = checkpoint.load()
        checkpoint.load = lambda optimizer=False, losses=losses, loaded=loaded: Loaded(loaded.model, losses, 11, 8, None)
        found.append(measurement.measure(checkpoint)["metrics"])
    counted = int((y != IGNORED).sum())
    for name in ("loss", "held_out.D", "train.D", "held_out.first_order.relative_error", "held_out.first_order.correlation"):
        assert found[0][name]["n"] == counted, name
    assert found[0]["D_grad"]["n"] == (counted if examples == "token" else 2)
    for name, metric in found[0].items():
        assert metric["value"] == pytest.approx(found[1][name]["value"], rel=1e-4, abs=1e-7, nan_ok=True), name
    # And against a gradient for each example, and a step that is made.
    model = checkpoint.load().model
    losses, counts = token_losses(model, x, y), (y != IGNORED).sum(1)
    parts = losses.sum(1) / counts if examples == "sequence" else losses[y != IGNORED]
    gradients = per_example_gradients(parts, model, trainable(model))
    norm = sum(g.square().sum() / len(g) for g in gradients.values()).sqrt().item()
    assert found[0]["example_norm"]["value"] == pytest.approx(norm, rel=1e-5)
    before = losses[y != IGNORED].mean()
    before.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=0.1)
        after = token_losses(model, x, y)[y != IGNORED].mean()
    assert found[0]["loss"]["value"] == pytest.approx(before.item(), rel=1e-6)
    assert found[0]["train.mean"]["value"] == pytest.approx((after - before).item(), rel=1e-4)


# Text for a checkpoint that has its tokenizer.


def save_tokenizer(folder: Path, whole: bool) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {word: i for i, word in enumerate(["<end>", "<unk>", "the", "fox", "dog", "and"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if whole:
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    else:
        made.enable_truncation(3)  # as a tokenizer may be saved that was last used so
        made.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("whole", [True, False])
def test_text_is_tokenized_by_the_checkpoints_own_tokenizer(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: object
) -> None:
    """All of it, and each document of JSONL with its end; the model's config.json names another kind of tokenizer."""
    pytest.importorskip("tqdm")
    monkeypatch.chdir(tmp_path)
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 6}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained("hf/checkpoint-7")
    save_tokenizer(Path("hf/checkpoint-7"), whole)
    documents = ["the fox and the dog", "the dog", "a fox"]
    Path("val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents * 20))
    ids = [2, 3, 5, 2, 4, 0, 2, 4, 0, 1, 3, 0]
    folder = Path("hf/checkpoint-7")
    assert TokenData.read(Path("val.jsonl"), tokenizer=folder).tokens.tolist() == ids * 20
    words = ["--positions", "8", "--sequences", "2", "--threads", "1", "--update", "none"]
    assert cli.main(["measure", "hf", "--data", "val.jsonl", *words, "--out", "own.jsonl"]) == 0
    assert cli.main(["measure", "hf", "--data", "val.jsonl", *words, "--tokenizer", str(folder), "--out", "said.jsonl"]) == 0
    own, said = (json.loads(Path(name).read_text()) for name in ("own.jsonl", "said.jsonl"))
    assert own["evaluation"]["digest"] == said["evaluation"]["digest"]
    assert own["metrics"] == said["metrics"]


def test_a_tokenizer_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "a.txt").write_text("the fox")
    with pytest.raises(Exception, match=r"--tokenizer: cannot load .*tokenizer.json"):
        TokenData.read(tmp_path / "a.txt", tokenizer=tmp_path)
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2]}\n')
    assert TokenData.read(tmp_path / "a.jsonl", tokenizer=tmp_path).tokens.tolist() == [1, 2]  # ids need none
