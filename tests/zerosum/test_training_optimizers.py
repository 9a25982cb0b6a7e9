"""The demo's optimizers: torch's own, on the right parameters, and runs that go on as if they had not been interrupted."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch

from tests.zerosum.test_training import trainer, weights
from tests.zerosum.trained import demo_with_checkpoints
from zerosum import cli
from zerosum.checkpoints import find
from zerosum.evaluation import Sample
from zerosum.training.loop import Trainer
from zerosum.training.model import token_losses
from zerosum.training.optimizers import OPTIMIZERS, Together, build, recipe
from zerosum.updates import optimizer_update

CLIP = 1.0


def hand_made(name: str, model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """What ``build`` is to make, spelled out."""
    every = dict(model.named_parameters())
    hidden = [p for key, p in every.items() if key.startswith("blocks.")]
    others = [every["embedding.weight"], every["head.weight"]]
    adam = {"lr": rate, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}  # Muon's bfloat16 magnifies rounding differences
    if name == "muon":
        muon = torch.optim.Muon(hidden, lr=rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(others, **adam)]
    return {
        "adamw": lambda: [torch.optim.AdamW(every.values(), **adam)],
        "sgd": lambda: [torch.optim.SGD(every.values(), lr=rate, momentum=0.9)],
        "rmsprop": lambda: [torch.optim.RMSprop(every.values(), lr=rate, alpha=0.95)],
        "adafactor": lambda: [torch.optim.Adafactor(every.values(), lr=rate)],
    }[name]()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_torchs_optimizers(name: str) -> None:
    t = trainer(optimizer=name, learning_rate=0.05)
    model = copy.deepcopy(t.model)
    optimizers = hand_made(name, model, 0.05)
    for step in (1, 2, 3):
        t.step(step)
        model.zero_grad()
        token_losses(model, *t.batch(step)).mean(1).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = t.settings.rate(step)
            optimizer.step()
    there = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(t), there, rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights(t), weights(trainer()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(name: str) -> None:
    whole, first, second = (trainer(optimizer=name) for _ in range(3))
    for step in range(1, 7):
        whole.step(step)
    for step in range(1, 4):
        first.step(step)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 7):
        second.step(step)
    assert torch.equal(weights(second), weights(whole))
    fresh = trainer(optimizer=name)
    fresh.model.load_state_dict(first.model.state_dict())
    for step in range(4, 7):
        fresh.step(step)
    assert not torch.equal(weights(fresh), weights(whole))  # the optimizer's state counts


def test_muon_gets_the_blocks_matrices_and_adamw_the_rest() -> None:
    t = trainer(optimizer="muon")
    assert isinstance(t.optimizer, Together)
    muon, adamw = t.optimizer.parts
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    names = {p: name for name, p in t.model.named_parameters()}
    of_muon, of_adamw = ({names[p] for group in part.param_groups for p in group["params"]} for part in (muon, adamw))
    assert of_adamw == {"embedding.weight", "head.weight"}
    assert of_muon == set(names.values()) - of_adamw
    assert len(t.optimizer.param_groups) == 2
    t.step(1)
    assert {group["lr"] for part in (muon, adamw) for group in part.param_groups} == {t.settings.rate(1)}
    assert set(t.optimizer.state) == set(names)
    assert str(recipe("muon")) == (
        "Muon(momentum=0.95, weight_decay=0.1, adjust_lr_fn='match_rms_adamw') for the 2-D weights of the blocks; "
        "AdamW(betas=(0.9, 0.95), weight_decay=0.1) for the other parameters"
    )


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure: expected None"):
        trainer(optimizer="muon").optimizer.step(lambda: 0.0)


def test_an_unknown_name_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="optimizer: expected one of adamw, muon, sgd, rmsprop, adafactor, got 'lion'"):
        build("lion", torch.nn.Linear(2, 2), 0.1)


def test_the_command_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        cli.main(["demo", "--optimizer", "lion"])
    assert refusal.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("zerosum demo: error: argument --optimizer: invalid choice: 'lion' (choose from ")
    assert all(name in error for name in OPTIMIZERS)
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    said = capsys.readouterr().out
    for entry in OPTIMIZERS.values():
        assert all(str(part) in said for part in entry.parts)


# Runs of the command.


@pytest.fixture(scope="module")
def muon_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    return demo_with_checkpoints(tmp_path_factory.mktemp("muon"), 4, "--optimizer", "muon", optimizer="muon")


def test_the_configuration_says_what_trains_what(muon_run: tuple[Path, Trainer]) -> None:
    config = json.loads((muon_run[0] / "config.json").read_text())
    assert config["optimizer"] == "muon"
    assert config["optimizer_rules"] == str(recipe("muon"))
    assert config["learning_rate"] == recipe("muon").rate
    assert f"| optimizer_rules | {recipe('muon')} |" in (muon_run[0] / "report.md").read_text()


def test_measuring_a_muon_run_takes_its_own_next_step(muon_run: tuple[Path, Trainer]) -> None:
    run, t = muon_run
    before, after = (checkpoint.load(optimizer=True) for checkpoint in find(run).checkpoints[1:3])  # steps 2 and 3
    start = {name: x.clone() for name, x in before.weights().items()}
    batch = Sample("", *t.batch(3), "")
    update = optimizer_update(before, batch, clip=1.0)
    for name, x in after.weights().items():
        expected = x - start[name]
        assert float(expected.abs().max()) > 1e-5
        torch.testing.assert_close(update[name], expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
    assert all(torch.equal(x, start[name]) for name, x in before.weights().items())
    again = optimizer_update(before, batch, clip=1.0)
    assert all(torch.equal(again[name], x) for name, x in update.items())
