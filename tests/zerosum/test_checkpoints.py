"""Finding and loading checkpoints, and the update that each would make next."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zerosum.trained import demo_with_checkpoints
from zerosum.checkpoints import Options, TransformersCheckpoint, find, next_token_losses, read, step_of
from zerosum.evaluation import Sample
from zerosum.training.loop import Trainer
from zerosum.training.model import GPT, GPTConfig, token_losses
from zerosum.training.run import Refused, RunFolder
from zerosum.updates import gradient_update, optimizer_update

VOCAB, POSITIONS = 61, 12
CONFIG = GPTConfig(vocab=VOCAB, width=16, layers=1, heads=2, positions=POSITIONS)
BUILD = Options(model="tests.zerosum.test_checkpoints:build")


class Tied(nn.Module):
    """Embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return self.head(self.norm(self.embedding(tokens))), None


def build(**sizes: int) -> GPT:
    return GPT(GPTConfig(**{**vars(CONFIG), **sizes}))


def build_bfloat16() -> GPT:
    return build().bfloat16()


def build_tied() -> Tied:
    return Tied()


def build_last_only() -> nn.Module:
    """Logits of the last position only, as some models return them when they are given no targets."""

    class Last(Tied):
        def forward(self, tokens: Tensor) -> Any:
            return super().forward(tokens)[0][:, -1:]

    return Last()


def own_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return 2 * token_losses(model, x, y)


def one_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return token_losses(model, x, y).mean()


def build_nothing() -> str:
    return "a model"


def build_never() -> nn.Module:
    raise OverflowError("too\nmuch")


def sample(n: int = 4, t: int = POSITIONS, vocab: int = VOCAB, seed: int = 5) -> Sample:
    tokens = torch.randint(0, vocab, (n, t + 1), generator=torch.Generator().manual_seed(seed))
    return Sample("some.bin", tokens[:, :-1], tokens[:, 1:], "")


def seeded(make: Any = build, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return make()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerances: float) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerances)


# Names.


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-1000", 1000),
        ("step_1000", 1000),
        ("step1000-unsharded", 1000),
        ("step1000-tokens4B", 1000),
        ("global_step143000", 143000),
        ("step-000123.pt", 123),
        ("ckpt_20.pth", 20),
        ("epoch=3-step=1000.ckpt", 1000),
        ("checkpoint-3-step-500", 500),
        ("iter_0000100", 100),
        ("llama_14M_step_7.safetensors", 7),
        ("model_05000.pt", 5000),
        ("512", 512),
        ("512.bin", 512),
        ("final", None),
        ("llama-3", None),
        ("pythia-1.4b", None),
        ("step10k", None),
        ("model-00001-of-00002.safetensors", None),
    ],
)
def test_the_step_in_a_name(name: str, step: int | None) -> None:
    assert step_of(name) == step


# State dicts.


def test_a_folder_of_state_dicts_is_sorted_by_step(tmp_path: Path) -> None:
    states = {step: seeded(seed=step).state_dict() for step in (2, 10, 100)}
    for step, state in states.items():
        torch.save(state, tmp_path / f"step_{step}.pt")
    torch.save({}, tmp_path / "optimizer.pt")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "logs").mkdir()
    series = find(tmp_path, BUILD)
    assert [checkpoint.step for checkpoint in series.checkpoints] == [2, 10, 100]
    assert series.run == tmp_path.name
    assert [series.name(checkpoint) for checkpoint in series.checkpoints] == ["step_2.pt", "step_10.pt", "step_100.pt"]
    for checkpoint in series.checkpoints:
        loaded = checkpoint.load()
        assert_same(loaded.weights(), states[checkpoint.step], rtol=0, atol=0)
        assert (loaded.vocab, loaded.positions, loaded.optimizer) == (VOCAB, POSITIONS, None)
        assert not loaded.model.training


def test_folders_of_one_state_dict_each_with_the_optimizer_beside_it(tmp_path: Path) -> None:
    for step in (1, 2):
        model = seeded(seed=step)
        (tmp_path / f"step{step}-unsharded").mkdir()
        torch.save(model.state_dict(), tmp_path / f"step{step}-unsharded" / "model.pt")
        torch.save(torch.optim.AdamW(model.parameters()).state_dict(), tmp_path / f"step{step}-unsharded" / "optim.pt")
    series = find(tmp_path, BUILD)
    assert [series.name(checkpoint) for checkpoint in series.checkpoints] == [
        "step1-unsharded/model.pt",
        "step2-unsharded/model.pt",
    ]
    assert series.checkpoints[0].has_optimizer
    assert series.checkpoints[0].load().optimizer is None
    assert "param_groups" in (series.checkpoints[0].load(optimizer=True).optimizer or {})


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "_orig_mod.module."])
def test_wrappings_of_a_state_dict(key: str | None, prefix: str, tmp_path: Path) -> None:
    model = seeded()
    state = {prefix + name: x for name, x in model.state_dict().items()}
    torch.save(state if key is None else {key: state, "step": 5, "config": {"width": 16}}, tmp_path / "step5.pt")
    assert_same(find(tmp_path / "step5.pt", BUILD).checkpoints[0].load().weights(), model.state_dict(), rtol=0, atol=0)


def test_weights_are_measured_in_float32(tmp_path: Path) -> None:
    for model in (seeded(), seeded(build_bfloat16)):
        torch.save(model.state_dict(), tmp_path / "step5.pt")
        for options in (BUILD, Options(model=f"{__name__}:build_bfloat16")):
            weights = find(tmp_path, options).checkpoints[0].load().weights()
            assert_same(weights, {name: x.float() for name, x in model.state_dict().items()}, rtol=0, atol=0)


def test_safetensors_with_tied_weights(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import save_model

    model = seeded(build_tied)
    save_model(model, str(tmp_path / "step5.safetensors"))
    loaded = find(tmp_path, Options(model=f"{__name__}:build_tied")).checkpoints[0].load()
    assert_same(loaded.weights(), {name: p.detach() for name, p in model.named_parameters()}, rtol=0, atol=0)
    x, y = (batch := sample()).x, batch.y
    expected = nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), reduction="none").view(4, -1)
    torch.testing.assert_close(loaded.losses(loaded.model, x, y), expected)


def test_building_a_model_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.save(seeded().state_dict(), tmp_path / "step5.pt")
    before = torch.get_rng_state()
    find(tmp_path, BUILD).checkpoints[0].load()
    assert torch.equal(before, torch.get_rng_state())


def test_arguments_and_losses_of_ones_own(tmp_path: Path) -> None:
    model = seeded(lambda: build(layers=2))
    torch.save(model.state_dict(), tmp_path / "step5.pt")
    options = Options(model=BUILD.model, model_config={"layers": 2}, losses=f"{__name__}:own_losses")
    loaded = find(tmp_path, options).checkpoints[0].load()
    x, y = (batch := sample()).x, batch.y
    torch.testing.assert_close(loaded.losses(loaded.model, x, y), 2 * token_losses(model, x, y))
    assert loaded.vocab is None


def refusal(path: Path, options: Options = BUILD, step: int | None = None, optimizer: bool = False) -> str:
    try:
        for checkpoint in find(path, options, step).checkpoints:
            checkpoint.load(optimizer)
    except Refused as refused:
        return str(refused)
    raise AssertionError("it was not refused")


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = seeded().state_dict()
    state["surplus"] = state.pop("head.weight")
    torch.save(state, tmp_path / "step5.pt")
    assert refusal(tmp_path).endswith("step5.pt: does not fit the model: missing: head.weight; unexpected: surplus")
    torch.save(seeded(lambda: build(width=32)).state_dict(), tmp_path / "step5.pt")
    assert "does not fit the model" in (said := refusal(tmp_path))
    assert "size mismatch for embedding.weight" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "--model module:function does"),
        ("nowhere", "--model: expected module:function, got 'nowhere'"),
        ("no.such.module:build", "--model: cannot import no.such.module:build: No module named 'no'"),
        (f"{__name__}:none", "has no attribute 'none'"),
        (f"{__name__}:VOCAB", "expected a function"),
        (f"{__name__}:build_nothing", "to return a torch.nn.Module, got str"),
        (f"{__name__}:build_never", f"--model: {__name__}:build_never raises OverflowError: too much ({__file__}, line "),
    ],
)
def test_what_builds_no_model_is_refused(model: str | None, said: str, tmp_path: Path) -> None:
    torch.save(seeded().state_dict(), tmp_path / "step5.pt")
    assert said in refusal(tmp_path, Options(model=model))


def test_what_goes_wrong_in_ones_own_losses_is_refused(tmp_path: Path) -> None:
    torch.save(seeded().state_dict(), tmp_path / "step5.pt")
    batch = sample()
    for name, said in (
        ("one_loss", rf"--losses: expected {__name__}:one_loss to return a loss for each token, \(4, 12\), got \(\)"),
        ("build_nothing", r"--losses: .*:build_nothing raises TypeError: build_nothing\(\) takes 0 positional arguments"),
    ):
        loaded = find(tmp_path, replace(BUILD, losses=f"{__name__}:{name}")).checkpoints[0].load()
        with pytest.raises(Refused, match=said):
            loaded.losses(loaded.model, batch.x, batch.y)
    (tmp_path / "broken_module.py").write_text("x = 1 / 0\n")
    sys.path.append(str(tmp_path))
    try:
        assert "cannot import broken_module:build: ZeroDivisionError" in refusal(tmp_path, Options(model="broken_module:build"))
    finally:
        sys.path.remove(str(tmp_path))


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path: Path) -> None:
    state = seeded().state_dict()
    state["head.weight"] = state["head.weight"].mul(100).to(torch.int8)
    torch.save(state, tmp_path / "step5.pt")
    said = "step5.pt: does not fit the model: expected floating-point weights, got torch.int8 in head.weight"
    assert refusal(tmp_path).endswith(said)


def test_a_model_without_logits_for_each_position_is_refused(tmp_path: Path) -> None:
    torch.save(seeded(build_last_only).state_dict(), tmp_path / "step5.pt")
    said = refusal(tmp_path, Options(model=f"{__name__}:build_last_only"))
    assert f"expected logits of shape (1, 2, vocab), got (1, 1, {VOCAB})" in said
    assert "--losses" in said


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_planted_pickle_does_not_run(zipped: bool, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    content = {"model": seeded().state_dict(), "args": Planted(ran)}
    torch.save(content, tmp_path / "step5.pt", _use_new_zipfile_serialization=zipped)
    said = refusal(tmp_path)
    assert not ran.exists()
    assert ("--unsafe-pickle" in said) or not zipped
    loaded = find(tmp_path / "step5.pt", Options(model=BUILD.model, unsafe_pickle=True)).checkpoints[0].load()
    assert ran.exists()
    assert_same(loaded.weights(), content["model"], rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "cut", "garbage"])
def test_a_damaged_file_is_named(suffix: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"step5{suffix}"
    if suffix == ".pt":
        torch.save(seeded().state_dict(), path)
    else:
        pytest.importorskip("safetensors")
        from safetensors.torch import save_file

        save_file(seeded().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\x93garbage" * 100}[damage])
    said = refusal(tmp_path)
    assert said.startswith(f"{path}: damaged")


@pytest.mark.parametrize("content", [{}, {"model": 3}, [torch.ones(2)], {"a": torch.ones(2), "b": "text"}])
def test_a_file_that_is_no_state_dict_says_what_it_has(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "step5.pt")
    assert "expected tensors by name" in refusal(tmp_path)


def test_folders_that_cannot_be_a_series_are_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "no checkpoint there" in refusal(tmp_path)
    state = seeded().state_dict()
    torch.save(state, tmp_path / "step5.pt")
    torch.save(state, tmp_path / "last.pt")
    assert "last.pt: no step in the name" in refusal(tmp_path)
    (tmp_path / "last.pt").rename(tmp_path / "iter_5.pt")
    assert "two checkpoints of step 5: " in refusal(tmp_path)
    shutil.rmtree(tmp_path)
    (tmp_path / "checkpoint-1").mkdir(parents=True)
    torch.save(state, tmp_path / "checkpoint-1" / "model.pt")
    (tmp_path / "checkpoint-2").mkdir()
    assert "checkpoint-2: no weights there" in refusal(tmp_path)


def test_the_step_of_one_checkpoint_may_be_given(tmp_path: Path) -> None:
    state = seeded().state_dict()
    torch.save(state, tmp_path / "final.pt")
    assert "no step in the name" in refusal(tmp_path / "final.pt")
    assert find(tmp_path / "final.pt", BUILD, step=7).checkpoints[0].step == 7
    assert find(tmp_path / "final.pt", BUILD, step=7).run == "final"
    torch.save(state, tmp_path / "step_5.pt")
    assert "--step: it is for a single checkpoint" in refusal(tmp_path, step=7)


# The demo's runs.


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A run that kept its checkpoints, in its folder."""
    return demo_with_checkpoints(tmp_path_factory.mktemp("demo"), 12)


def test_the_demo_keeps_the_checkpoints_of_measured_steps(demo_run: tuple[Path, Trainer]) -> None:
    run, trainer = demo_run
    names = [f"step-{step:06d}.pt" for step in (1, 2, 3, 4, 6, 7, 10, 12)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    for path in (run, run / "checkpoints"):
        series = find(path)
        assert series.run == "run"
        assert [checkpoint.path.name for checkpoint in series.checkpoints] == names
    assert [checkpoint.step for checkpoint in find(run / "checkpoint.pt").checkpoints] == [12]
    assert [checkpoint.step for checkpoint in find(run / "checkpoints" / names[2]).checkpoints] == [3]
    for step in range(1, 4):
        trainer.step(step)
    loaded = find(run).checkpoints[2].load()
    assert_same(loaded.weights(), {name: p.detach() for name, p in trainer.model.named_parameters()}, rtol=1e-5, atol=1e-7)
    assert (loaded.vocab, loaded.positions) == (256, 16)


def test_a_folder_of_runs_is_not_one_run(demo_run: tuple[Path, Trainer], tmp_path: Path) -> None:
    """Neither a folder of runs nor that of several sizes, which has a configuration too."""
    shutil.copytree(demo_run[0], tmp_path / "runs" / "width-32")
    said = "expected one run, got a folder of runs of `zerosum demo`: width-32"
    assert said in refusal(tmp_path / "runs", Options())
    config = json.loads((demo_run[0] / "config.json").read_text())
    (tmp_path / "runs" / "config.json").write_text(json.dumps({**config, "width": [32, 64]}))
    assert said in refusal(tmp_path / "runs", Options())
    assert find(tmp_path / "runs" / "width-32" / ".." / "width-32").run == "width-32"
    assert find(tmp_path / "runs" / "width-32" / "checkpoints" / "..").run == "width-32"


def test_the_newest_checkpoint_counts_when_it_was_not_kept(demo_run: tuple[Path, Trainer], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo_run[0], run)
    (run / "checkpoints" / "step-000012.pt").unlink()
    series = find(run)
    assert series.name(series.checkpoints[-1]) == "checkpoint.pt"
    assert [checkpoint.step for checkpoint in series.checkpoints] == [1, 2, 3, 4, 6, 7, 10, 12]
    shutil.rmtree(run / "checkpoints")
    assert [checkpoint.step for checkpoint in find(run).checkpoints] == [12]
    assert "--step" in refusal(run, Options(), step=3)
    (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:500])
    assert "checkpoint.pt: damaged" in refusal(run, Options())


def test_a_checkpoint_under_another_steps_name_is_refused(demo_run: tuple[Path, Trainer], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo_run[0], run)
    kept = run / "checkpoints"
    found = find(run).checkpoints[2]  # step 3
    os.replace(kept / "step-000004.pt", kept / "step-000003.pt")
    with pytest.raises(
        Refused, match=r"step-000003\.pt: expected the checkpoint of step 3, got 4: the file was replaced or renamed"
    ):
        found.load()
    said = refusal(run, Options())
    assert "step-000003.pt: expected the checkpoint of step 3, as its name says, got step 4" in said


def test_a_crash_while_a_checkpoint_is_kept_leaves_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run", {})
    folder.checkpoint(1, {"x": 1}, keep=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        folder.checkpoint(2, {"x": 2}, keep=True)
    folder.close()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.pt")] == ["step-000001.pt"]
    assert read(tmp_path / "run" / "checkpoint.pt")["step"] == 1


def test_the_demos_next_step_is_found_from_its_checkpoint(demo_run: tuple[Path, Trainer]) -> None:
    """The rate is still warming up: that of the next step counts, not that in the state."""
    run, trainer = demo_run
    before, after = (checkpoint.load(optimizer=True) for checkpoint in find(run).checkpoints[2:4])  # steps 3 and 4
    weights = {name: x.clone() for name, x in before.weights().items()}
    x, y = trainer.batch(4)
    update = optimizer_update(before, Sample("", x, y, ""), clip=1.0)
    expected = {name: after.weights()[name] - x for name, x in weights.items()}
    size = max(float(x.abs().max()) for x in expected.values())
    assert size > 1e-4
    assert_same(update, expected, rtol=0, atol=1e-3 * size)
    assert_same(before.weights(), weights, rtol=0, atol=0)
    assert all(p.grad is None for p in before.model.parameters())
    assert_same(optimizer_update(before, Sample("", x, y, ""), clip=1.0), update, rtol=0, atol=0)


# Updates.


@pytest.mark.parametrize("custom", ["together", "weights before vectors", "transformers", "named"])
def test_an_optimizers_groups_are_recognized(custom: str, tmp_path: Path) -> None:
    model = seeded(build_tied)
    named = dict(model.named_parameters())
    weights, vectors = ([p for p in named.values() if (p.ndim < 2) == flag] for flag in (False, True))
    groups: dict[str, Any] = {
        "together": [{"params": list(named.values())}],
        "weights before vectors": [{"params": weights, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        "transformers": [{"params": weights, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        "named": [{"params": [(name, named[name]) for name in reversed(named)]}],
    }
    optimizer = torch.optim.AdamW(groups[custom], lr=0.01, betas=(0.8, 0.9))
    batches = [sample(seed=seed) for seed in range(3)]

    def step(batch: Sample) -> None:
        optimizer.zero_grad()
        next_token_losses(model, batch.x, batch.y).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    for batch in batches[:2]:
        step(batch)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "step2.pt")
    before = {name: p.detach().clone() for name, p in named.items()}
    checkpoint = find(tmp_path, Options(model=f"{__name__}:build_tied")).checkpoints[0]
    assert checkpoint.has_optimizer
    update = optimizer_update(checkpoint.load(optimizer=True), batches[2], clip=0.1)
    step(batches[2])
    assert_same(update, {name: p.detach() - before[name] for name, p in named.items()}, rtol=1e-4, atol=1e-8)
    faster = optimizer_update(checkpoint.load(optimizer=True), batches[2], clip=0.1, learning_rate=0.02)
    if custom == "together":
        assert_same(faster, {name: 2 * x for name, x in update.items()}, rtol=1e-4, atol=1e-6)


def with_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> Any:
    model(sample().x)[0].sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path / "step2.pt")
    return find(path, Options(model=f"{__name__}:build_tied")).checkpoints[0].load(optimizer=True)


def test_optimizers_that_cannot_be_repeated_are_refused(tmp_path: Path) -> None:
    model = seeded(build_tied)
    parameters = list(model.parameters())
    cases = [
        (torch.optim.SGD(parameters, lr=0.1, momentum=0.9), "is not of Adam or AdamW"),
        (torch.optim.AdamW(parameters, lr=0.0), "its learning rate is 0"),
        (torch.optim.AdamW(parameters[::-1]), "no known way fits"),
        (torch.optim.AdamW(parameters[:2]), "no known way fits"),
    ]
    for optimizer, said in cases:
        loaded = with_optimizer(optimizer, model, tmp_path)
        weights = {name: x.clone() for name, x in loaded.weights().items()}
        with pytest.raises(Refused, match=said):
            optimizer_update(loaded, sample(), clip=1.0)
        assert_same(loaded.weights(), weights, rtol=0, atol=0)


def test_the_gradients_update_in_micro_batches(tmp_path: Path) -> None:
    model = seeded()
    torch.save(model.state_dict(), tmp_path / "step5.pt")
    loaded = find(tmp_path, BUILD).checkpoints[0].load()
    batch = sample(n=11)  # more than one micro-batch, the last of another size
    token_losses(model, batch.x, batch.y).mean().backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    assert_same(gradient_update(loaded, batch, 1e-2), {name: -g for name, g in gradient.items()}, rtol=1e-4, atol=1e-7)
    clipped = {name: -0.5 * 1e-2 / norm * g for name, g in gradient.items()}
    assert_same(gradient_update(loaded, batch, 1e-2, learning_rate=0.5), clipped, rtol=1e-3, atol=1e-8)
    assert all(p.grad is None for p in loaded.model.parameters())


# transformers.


def save(model: Any, folder: Path, **options: Any) -> None:
    model.save_pretrained(folder, **options)


@pytest.fixture
def hf(recwarn: pytest.WarningsRecorder) -> Any:
    """Builds tiny models of transformers."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    def make(family: str, seed: int = 0, **config: Any) -> Any:
        sizes: dict[str, Any] = {
            "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16},
            "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24},
        }[family]
        kind = {"gpt2": transformers.GPT2Config, "llama": transformers.LlamaConfig}[family]
        more = {} if family == "gpt2" else {"max_position_embeddings": 16}
        torch.manual_seed(seed)
        built = kind(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **sizes, **more, **config)
        return transformers.AutoModelForCausalLM.from_config(built)

    return make


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_folders_of_transformers_whole_and_in_shards(hf: Any, family: str, attention: str, tmp_path: Path) -> None:
    models = {step: hf(family, seed=step).eval() for step in (500, 1000)}
    save(models[500], tmp_path / "checkpoint-500")
    save(models[1000], tmp_path / "checkpoint-1000", max_shard_size="8KB")
    assert len(list((tmp_path / "checkpoint-1000").glob("*.safetensors"))) > 1
    save(models[1000], tmp_path)  # the final model, which Trainer writes beside them
    series = find(tmp_path, Options(attention=attention))
    assert [checkpoint.step for checkpoint in series.checkpoints] == [500, 1000]
    x, y = (batch := sample()).x, batch.y
    for checkpoint in series.checkpoints:
        assert isinstance(checkpoint, TransformersCheckpoint)
        loaded = checkpoint.load()
        assert (loaded.vocab, loaded.positions) == (VOCAB, 16)
        logits = models[checkpoint.step](x).logits.log_softmax(-1)
        expected = -logits.gather(-1, y[..., None])[..., 0]
        torch.testing.assert_close(loaded.losses(loaded.model, x, y), expected, rtol=1e-4, atol=1e-5)
        assert loaded.model.config._attn_implementation == attention


def test_a_transformers_optimizer_continues_as_the_trainer_would(hf: Any, tmp_path: Path) -> None:
    model = hf("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = get_parameter_names(
        model, [nn.LayerNorm], ["bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    )
    groups = [[p for name, p in model.named_parameters() if (name in decayed) == flag] for flag in (True, False)]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=0.01)
    before: dict[str, Tensor] = {}
    for seed in range(3):
        if seed == 2:
            save(model, tmp_path / "checkpoint-2")
            torch.save(optimizer.state_dict(), tmp_path / "checkpoint-2" / "optimizer.pt")
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
        batch = sample(seed=seed)
        optimizer.zero_grad()
        next_token_losses(model, batch.x, batch.y).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    loaded = find(tmp_path, Options()).checkpoints[0].load(optimizer=True)
    expected = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    # Keys' biases have no gradient but rounding, which Adam makes a step of.
    update = optimizer_update(loaded, sample(seed=2), clip=1.0)
    keys = slice(16, 32)
    for changes in (expected, update):
        for name, x in changes.items():
            if name.endswith("c_attn.bias"):
                x[keys] = 0
    assert_same(update, expected, rtol=1e-3, atol=2e-5)


def test_transformers_folders_that_cannot_be_measured(hf: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "checkpoint-5"
    save(hf("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    less = {name: x.clone() for name, x in weights.items() if name != "model.norm.weight"} | {"surplus": torch.ones(2)}
    save_file(less, folder / "model.safetensors", metadata={"format": "pt"})
    said = refusal(folder, Options())
    assert said.endswith("checkpoint-5: does not fit the model: missing: model.norm.weight; unexpected: surplus")
    (folder / "model.safetensors").write_bytes(b"garbage" * 100)
    assert "transformers cannot load it" in refusal(folder, Options())
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "expected weights in *.safetensors, found none" in refusal(folder, Options())
    (folder / "config.json").write_text("{")
    assert "config.json: damaged" in refusal(folder, Options())


def test_code_that_lies_in_a_transformers_folder_does_not_run(hf: Any, tmp_path: Path) -> None:
    import json

    folder = tmp_path / "checkpoint-5"
    save(hf("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "planted", "auto_map": {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "planted.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    assert "transformers cannot load it" in refusal(folder, Options())
    assert not (tmp_path / "ran").exists()


def test_the_step_of_a_transformers_folder_may_be_in_its_trainers_state(hf: Any, tmp_path: Path) -> None:
    save(hf("llama"), tmp_path / "final")
    assert "no step in the name" in refusal(tmp_path / "final", Options())
    (tmp_path / "final" / "trainer_state.json").write_text('{"global_step": 77}')
    series = find(tmp_path / "final")
    assert [checkpoint.step for checkpoint in series.checkpoints] == [77]
    assert (series.run, series.name(series.checkpoints[0])) == ("final", "final")
