"""``zerosum measure``: its numbers against a computation of their own, what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.zerosum.test_checkpoints import BUILD, POSITIONS, VOCAB, build, seeded
from zerosum import cli
from zerosum.evaluation import TokenData
from zerosum.training.model import token_losses

pytest.importorskip("tqdm")

STEPS = (1, 3, 10)


@pytest.fixture(autouse=True)
def _restored(threads: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--threads` sets torch's number of threads, which the fixture restores; `--model` adds the present folder to the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three state dicts with their optimizer's, from a real training; and data, in the present folder."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("val.npy", 0), ("train.npy", 1)):
        np.save(name, np.random.default_rng(seed).integers(0, VOCAB, size=400))
    model = seeded(lambda: build(layers=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "run").mkdir()
    for step in range(1, STEPS[-1] + 1):
        tokens = torch.randint(0, VOCAB, (4, POSITIONS + 1), generator=generator)
        optimizer.zero_grad()
        token_losses(model, tokens[:, :-1], tokens[:, 1:]).mean().backward()
        optimizer.step()
        if step in STEPS:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"run/step_{step}.pt")
    return tmp_path / "run"


def measure(*words: object, out: str = "out.jsonl", **options: object) -> int:
    extra = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    model = ["--model", BUILD.model, "--model-config", '{"layers": 2}', "--data", "val.npy", "--threads", "1"]
    return cli.main(["measure", "run", *map(str, model), "--sequences", "3", "--out", out, *map(str, words), *extra])


def lines(path: str = "out.jsonl") -> list[dict[str, Any]]:
    """The records without their timings."""
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert all(entry.pop("seconds") >= 0 for entry in found)
    return found


def weights_at(step: int) -> dict[str, Tensor]:
    return torch.load(f"run/step_{step}.pt", weights_only=True)["model"]


def truth(step: int) -> nn.Module:
    model = build(layers=2).double()
    model.load_state_dict(weights_at(step))
    return model


def held_out(sequences: int = 3) -> tuple[Tensor, Tensor]:
    return TokenData.read(Path("val.npy")).draw([sequences], POSITIONS, 0, VOCAB)[0][:2]


def D(x: Tensor) -> float:
    return 1 - (x.sum().abs() / x.abs().sum()).item()


# Numbers.


def test_every_record_says_what_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(train_data="train.npy", train_sequences=5, evaluation_name="validation") == 0
    first, second, third = lines()
    keys = "kind step run checkpoint evaluation train examples sampled update interval settings covered not_covered metrics"
    for entry, step, interval in zip((first, second, third), STEPS, (None, [1, 3], [3, 10]), strict=True):
        assert set(entry) == set(keys.split())
        assert (entry["kind"], entry["step"], entry["run"], entry["checkpoint"]) == ("checkpoint", step, "run", f"step_{step}.pt")
        assert {key: entry["evaluation"][key] for key in ("name", "sequences", "positions")} == {
            "name": "validation",
            "sequences": 3,
            "positions": POSITIONS,
        }
        assert (entry["train"]["name"], entry["train"]["sequences"]) == ("train.npy", 5)
        assert (entry["examples"], entry["sampled"], entry["update"]) == ("sequence", None, "optimizer")
        assert entry["interval"] == interval
        assert (entry["covered"], entry["not_covered"]) == (1.0, {})
        for name, metric in entry["metrics"].items():
            assert {"value", "n", "null"} <= set(metric)
            tokens = {"loss": 36, "held_out": 36, "interval": 36, "train": 60}.get(name.partition(".")[0])
            assert metric["n"] == (tokens or 3), name
    changes = {f"{where}.{key}" for where in ("train", "held_out", "interval") for key in ("C", "D", "M", "mean")}
    expected = {"loss", "D_grad", "C_g", "C_uG", "C_ug", "noise_scale", "mean_cosine", "first_order.C", "first_order.M", *changes}
    assert expected <= second["metrics"].keys()
    assert not {"C", "D", "M"} & second["metrics"].keys()
    assert not any(name.startswith("interval") for name in first["metrics"])
    said = capsys.readouterr().out
    assert "3 checkpoints of run, steps 1 to 10." in said
    assert "D_grad and C are over 3 sequences; losses and their changes over 36 tokens of validation" in said
    assert "Next: zerosum plot out.jsonl" in said


def test_losses_and_their_changes_since_the_checkpoint_before(run: Path) -> None:
    assert measure(update="none") == 0
    losses = {step: token_losses(truth(step), *held_out()).detach() for step in STEPS}
    for entry, before in zip(lines(), (None, *STEPS), strict=False):
        assert (entry["update"], entry["train"]) == (None, None)
        assert "C_g" not in entry["metrics"]
        now = losses[entry["step"]]
        assert entry["metrics"]["loss"]["value"] == pytest.approx(now.mean().item(), rel=1e-6)
        if before is not None:
            change = now - losses[before]
            assert entry["metrics"]["interval.D"]["value"] == pytest.approx(D(change), abs=1e-5)
            assert entry["metrics"]["interval.M"]["value"] == pytest.approx(change.abs().mean().item(), rel=1e-4)
            assert entry["metrics"]["interval.mean"]["value"] == pytest.approx(change.mean().item(), rel=1e-4)


@pytest.mark.parametrize("update", ["optimizer", "gradient", "next"])
def test_gradients_and_changes_along_an_update(run: Path, update: str) -> None:
    """Against one gradient for each sequence, and a step that is really made, in float64."""
    rate = {"learning_rate": 0.1} if update == "gradient" else {}
    assert measure(update=update, clip=0.5, **rate) == 0
    found = lines()
    assert len(found) == (2 if update == "next" else 3)
    x, y = held_out()
    train = TokenData.read(Path("val.npy")).draw([3, 3], POSITIONS, 0, VOCAB)[1][:2]
    for entry, after in zip(found, (3, 10, None), strict=False):
        model, moved = truth(entry["step"]), truth(entry["step"])
        parameters = list(model.parameters())
        if update == "next":
            moved = truth(after or 0)
        else:
            state = torch.load(f"run/step_{entry['step']}.pt", weights_only=True)["optimizer"]
            optimizer: torch.optim.Optimizer = torch.optim.SGD(moved.parameters(), lr=0.1)
            if update == "optimizer":
                optimizer = torch.optim.AdamW(moved.parameters())
                optimizer.load_state_dict(state)
            token_losses(moved, *train).mean().backward()
            torch.nn.utils.clip_grad_norm_(moved.parameters(), 0.5)
            optimizer.step()
        direction = [b.detach() - a.detach() for a, b in zip(parameters, moved.parameters(), strict=True)]
        losses = token_losses(model, x, y).mean(1)
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        p = torch.stack([torch.cat([(g * u).flatten() for g, u in zip(row, direction, strict=True)]) for row in gradients])
        metrics = {name: metric["value"] for name, metric in entry["metrics"].items()}
        assert metrics["C_g"] == pytest.approx((p.sum(0).abs().sum() / p.abs().sum()).item(), rel=1e-3)
        assert metrics["C_uG"] == pytest.approx((p.sum().abs() / p.sum(0).abs().sum()).item(), rel=1e-3)
        assert metrics["first_order.M"] == pytest.approx(p.sum(1).abs().mean().item(), rel=1e-3)
        assert metrics["first_order.D"] == pytest.approx(D(p.sum(1)), abs=1e-4)
        assert ("held_out.D" in metrics) == (update != "next")
        for name, batch in (("held_out", (x, y)), ("train", train)) if update != "next" else ():
            change = (token_losses(moved, *batch) - token_losses(model, *batch)).detach()
            assert metrics[f"{name}.D"] == pytest.approx(D(change), abs=1e-4)
            assert metrics[f"{name}.M"] == pytest.approx(change.abs().mean().item(), rel=1e-3)


def test_a_gradient_without_a_rate_has_no_length(run: Path) -> None:
    assert measure(update="gradient") == 0
    assert measure(update="gradient", learning_rate=0.3, clip=0.1, out="rate.jsonl") == 0
    for without, with_rate in zip(lines(), lines("rate.jsonl"), strict=True):
        assert "held_out.D" not in without["metrics"]
        assert "first_order.M" not in without["metrics"]
        for name in ("C_g", "C_uG", "C_ug", "first_order.D"):
            assert without["metrics"][name]["value"] == pytest.approx(with_rate["metrics"][name]["value"], rel=1e-4, abs=1e-6)


def test_positions_are_examples_too(run: Path) -> None:
    assert measure(examples="position") == 0
    assert all(entry["metrics"]["D_grad"]["n"] == 36 for entry in lines())


def test_examples_are_tokens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(examples="token", memory="64MiB") == 0
    exact = lines()[0]
    assert (exact["examples"], exact["sampled"], exact["covered"]) == ("token", None, 1.0)
    assert exact["metrics"]["D_grad"]["n"] == exact["metrics"]["first_order.D"]["n"] == 36
    assert "error" not in exact["metrics"]["D_grad"]
    assert measure(examples="token", sample=40, seed=0, out="sampled.jsonl") == 0
    sampled = lines("sampled.jsonl")[0]
    assert (sampled["examples"], sampled["sampled"]) == ("token", 40)
    for name in ("D_grad", "C_g"):
        found, truth = (entry["metrics"][name] for entry in (sampled, exact))
        assert 0 < found["error"] < 0.2
        assert abs(found["value"] - truth["value"]) < 4 * found["error"]
    # What needs no token's own gradient is exact.
    for name in ("C_uG", "first_order.C", "first_order.M", "held_out.D", "held_out.first_order.correlation"):
        assert sampled["metrics"][name]["value"] == pytest.approx(exact["metrics"][name]["value"], rel=1e-4)
    assert "standard error" in capsys.readouterr().out


def test_the_same_command_gives_the_same_lines(run: Path) -> None:
    for out in ("a.jsonl", "b.jsonl"):
        assert measure(out=out) == 0
    assert lines("a.jsonl") == lines("b.jsonl")


def test_steps_are_chosen_and_neighbours_still_count(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(out="whole.jsonl") == 0
    assert measure(steps="3:3") == 0
    assert lines() == lines("whole.jsonl")[1:2]
    assert "One checkpoint of run, step 3." in capsys.readouterr().out
    assert measure(steps=":5") == 0
    assert measure(steps="2:") == 0
    assert sorted(lines(), key=lambda entry: entry["step"]) == lines("whole.jsonl")
    assert measure(steps="4:5") == 2
    assert "there are steps 1, 3, 10" in capsys.readouterr().err


def test_the_update_is_a_gradient_where_there_is_no_optimizer(run: Path) -> None:
    for step in STEPS:
        torch.save(weights_at(step), f"run/step_{step}.pt")
    assert measure() == 0
    assert {entry["update"] for entry in lines()} == {"gradient"}
    assert measure(update="optimizer", out="other.jsonl") == 2
    assert Path("other.jsonl").read_text() == ""


# Going on.


def test_measured_checkpoints_are_skipped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(steps="1:3") == 0
    before = Path("out.jsonl").read_bytes()
    assert measure() == 0
    assert "3 checkpoints of run, steps 1 to 10; 2 measured already." in capsys.readouterr().out
    after = Path("out.jsonl").read_bytes()
    assert after.startswith(before)
    assert measure() == 0
    assert "3 measured already" in (said := capsys.readouterr().out)
    assert "interval.D" in said
    assert Path("out.jsonl").read_bytes() == after


def test_a_line_that_was_cut_off_is_measured_again(run: Path) -> None:
    assert measure() == 0
    whole, text = lines(), Path("out.jsonl").read_bytes()
    Path("out.jsonl").write_bytes(text[:-100])
    assert measure() == 0
    assert lines() == whole
    assert sorted(path.name for path in run.parent.glob("out*")) == ["out.jsonl"]


def test_a_file_that_is_no_measurement_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"one line without an end", b'{"step": 3', (run / "step_1.pt").read_bytes().replace(b"\n", b"")):
        Path("other").write_bytes(content)
        assert measure(out="other") == 2
        assert "other, line 1: not a record" in capsys.readouterr().err
        assert Path("other").read_bytes() == content


def test_a_file_that_another_process_writes_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zerosum.records import RecordFile

    with RecordFile(Path("out.jsonl")):
        assert measure() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"zerosum measure: --out: cannot use out.jsonl: process {os.getpid()} on ")
    assert error.count("\n") == 1
    assert measure() == 0


def test_a_disk_that_fills_up_leaves_whole_lines(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zerosum.records import RecordFile

    class Full:
        """A file that takes 10 bytes of a line, and then no more."""

        def __init__(self, file: Any) -> None:
            self.file, self.full = file, False

        def write(self, content: bytes) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            self.full = True
            return self.file.write(content[:10])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    assert measure(steps="1:1") == 0
    before, append = Path("out.jsonl").read_bytes(), RecordFile.append

    def fails(self: RecordFile, entry: Any) -> None:
        monkeypatch.setattr(self, "_file", Full(self._file))
        append(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "append", fails)
        assert measure() == 1
    assert capsys.readouterr().err == "zerosum measure: out.jsonl: No space left on device\n"
    assert Path("out.jsonl").read_bytes() == before
    assert measure() == 0
    assert [entry["step"] for entry in lines()] == [1, 3, 10]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "settings.seed is 0 there and 1 here"),
        ({"examples": "position"}, "examples is 'sequence' there and 'position' here"),
        ({"update": "gradient"}, "settings.update is 'optimizer' there and 'gradient' here"),
        ({"positions": 5}, "evaluation.positions is 12 there and 5 here"),
        ({"clip": 0.5}, "settings.clip is 1.0 there and 0.5 here"),
        ({"train_data": "train.npy"}, "train.name is 'val.npy' there and 'train.npy' here"),
        ({"learning_rate": 0.1}, "settings.learning_rate is None there and 0.1 here"),
        ({"evaluation_name": "other"}, "evaluation.name is 'val.npy' there and 'other' here"),
        ({"losses": "zerosum.training.model:token_losses"}, "settings.losses is None there and 'zerosum.training.model:token"),
    ],
)
def test_lines_of_other_settings_are_refused(
    options: dict[str, object], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(steps="1:1") == 0
    before = Path("out.jsonl").read_bytes()
    assert measure(**options) == 2
    assert said in (error := capsys.readouterr().err)
    assert error.startswith("zerosum measure: --out: out.jsonl has run 'run' measured in another way, step 1: ")
    assert Path("out.jsonl").read_bytes() == before
    assert measure(**options, name="other") == 0  # another run may be in the same file
    assert [entry["run"] for entry in lines()] == ["run", "other", "other", "other"]


def test_a_checkpoint_that_came_between_is_noticed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure() == 0
    (run / "step_5.pt").write_bytes((run / "step_3.pt").read_bytes())
    assert measure() == 2
    assert "step 10: interval is [3, 10] there and [5, 10] here" in capsys.readouterr().err


def test_lines_of_checkpoints_that_are_gone_stay(run: Path) -> None:
    assert measure() == 0
    whole = lines()
    (run / "step_1.pt").unlink()
    (run / "step_3.pt").unlink()
    text = Path("out.jsonl").read_text().splitlines(keepends=True)
    Path("out.jsonl").write_text("".join(text[:2]))
    assert measure() == 0
    assert [entry["step"] for entry in lines()] == [1, 3, 10]
    assert lines()[:2] == whole[:2]
    assert lines()[2]["interval"] is None


SLOW = """
import signal, time
from pathlib import Path
from zerosum.training.model import token_losses

def losses(model, x, y):
    while Path("hold").exists():
        Path("held").touch()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            Path("asked").touch()  # the first Ctrl-C came: a second one would interrupt
        time.sleep(0.01)
    return token_losses(model, x, y)
"""


def test_ctrl_c_finishes_a_checkpoint_and_the_same_command_goes_on(run: Path, project_environment: dict[str, str]) -> None:
    """In a process of its own, held within its first checkpoint: one Ctrl-C, then two, then none."""
    Path("slow.py").write_text(SLOW)
    model = ["--model", str(BUILD.model), "--model-config", '{"layers": 2}', "--losses", "slow:losses", "--threads", "1"]
    data = ["--data", "val.npy", "--positions", str(POSITIONS), "--sequences", "3", "--out", "out.jsonl"]
    command = [sys.executable, "-m", "zerosum", "measure", "run", *model, *data]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=project_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def interrupt(process: subprocess.Popen[str], seen: str) -> None:
        wait_for(seen)
        process.send_signal(signal.SIGINT)
        wait_for("asked")

    def wait_for(name: str) -> None:
        deadline = time.monotonic() + 120
        while not Path(name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        Path(name).unlink()

    Path("hold").touch()
    with start() as process:
        interrupt(process, "held")
        Path("hold").unlink()
        said, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Stopped after step 1: 2 left. The same command goes on from there." in said
    assert [entry["step"] for entry in lines()] == [1]
    for name in ("held", "asked"):
        Path(name).unlink(missing_ok=True)
    Path("hold").touch()
    with start() as process:
        interrupt(process, "held")
        process.send_signal(signal.SIGINT)
        said, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Interrupted." in error
    assert "Traceback" not in error
    assert [entry["step"] for entry in lines()] == [1]
    Path("hold").unlink()
    for out in ("out.jsonl", "whole.jsonl"):
        assert measure(losses="slow:losses", positions=POSITIONS, out=out) == 0
    assert [entry["step"] for entry in lines()] == [1, 3, 10]
    assert lines() == lines("whole.jsonl")


# Kinds of checkpoints from the command line, and refusals.


def test_a_transformers_folder_and_a_demos_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    transformers.utils.logging.disable_progress_bar()
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 256}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained("hf/checkpoint-7")
    demo = "--steps 3 --width 32 --layers 1 --sequences 2 --positions 16 --threads 1 --keep-checkpoints"
    assert cli.main(["demo", "--text", "text.txt", "--out", "demo", *demo.split()]) == 0
    for path, steps, update in (("hf", [7], "gradient"), ("demo", [1, 2, 3], "optimizer")):
        assert cli.main(["measure", path, "--data", "text.txt", "--threads", "1"]) == 0
        found = lines(f"measured-{path}.jsonl")
        assert [entry["step"] for entry in found] == steps
        assert {(entry["run"], entry["update"], entry["covered"]) for entry in found} == {(path, update, 1.0)}
        assert found[0]["evaluation"]["positions"] == 16
    assert cli.main(["measure", "demo", "--data", "text.txt", "--positions", "17", "--threads", "1"]) == 2
    assert "--positions: expected at most 16, the longest sequence of the model, got 17" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sample": 20}, "--sample: only --examples token samples, not --examples sequence"),
        ({"positions": 13}, "--positions: expected at most 12"),
        ({"sequences": 1000}, "val.npy: expected at least 26000 tokens for 1000 + 1000 sequences of 13 tokens"),
        ({"data": "none.npy"}, "none.npy: cannot read: No such file"),
        ({"train_data": "none.npy"}, "none.npy: cannot read"),
        ({"steps": "100:200"}, "no checkpoint between the steps of --steps"),
        ({"steps": "10:10", "update": "next"}, "no checkpoint with a next one between the steps"),
        ({"step": 5}, "--step: it is for a single checkpoint"),
        ({"out": "."}, "--out: cannot use ."),
        ({"out": "val.npy"}, "--out: val.npy, line 1: not a record; choose another file"),
        ({"losses": "json:no"}, "--losses: cannot import json:no"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    options: dict[str, Any], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(**options) == 2
    error = capsys.readouterr().err
    assert error.startswith("zerosum measure: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_batch_from_the_evaluations_file_is_disjoint_from_it(run: Path) -> None:
    assert measure(steps="1:1") == 0
    assert measure(steps="1:1", train_data=Path("val.npy").absolute(), out="named.jsonl") == 0
    (one,), (two,) = lines(), lines("named.jsonl")
    assert one == two
    assert one["train"]["digest"] != one["evaluation"]["digest"]


def test_a_damaged_checkpoint_stops_after_those_before_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "step_10.pt").write_bytes(b"garbage")
    assert measure() == 2
    assert "step_10.pt: damaged" in capsys.readouterr().err
    assert [entry["step"] for entry in lines()] == [1, 3]


def test_losses_that_are_not_finite_are_null_and_the_rest_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load("run/step_3.pt", weights_only=True)
    content["model"]["head.weight"][0] = float("inf")
    torch.save(content, "run/step_3.pt")
    assert measure(update="none") == 0
    assert [entry["metrics"]["loss"]["value"] is None for entry in lines()] == [False, True, False]
    said = capsys.readouterr().out
    assert "The loss is not finite at step 3: — stands for what has no value." in said
    assert "D_grad is over 3 sequences; losses and their changes over 36 tokens of val.npy.\n" in said
    # There is no change since a checkpoint with such losses, so the null of that is not the last step's.
    content["model"]["head.weight"][0] = 0.0
    torch.save(content, "run/step_3.pt")
    content["model"]["head.weight"][0] = float("inf")
    torch.save(content, "run/step_10.pt")
    assert measure(update="none", out="last.jsonl") == 0
    _, middle, _ = lines("last.jsonl")
    nulls = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("random signs")).split()[2:]
    assert nulls == [f"{middle['metrics'][name]['null']:.4f}" for name in ("D_grad", "interval.D")]


MIXES_EMBEDDINGS = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x).cumsum(1)))

def build(mixes=True):
    return Model() if mixes else nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 64))
"""


@pytest.mark.parametrize("mixes", [True, False])
def test_where_only_embeddings_are_sampled_the_rest_is_exact(mixes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions mix right behind the embedding, or not at all."""
    monkeypatch.chdir(tmp_path)
    Path("mixes_embeddings.py").write_text(MIXES_EMBEDDINGS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    make = importlib.import_module("mixes_embeddings").build
    monkeypatch.delitem(sys.modules, "mixes_embeddings")
    torch.save(seeded(lambda: make(mixes)).state_dict(), "step_1.pt")
    np.save("val.npy", np.random.default_rng(0).integers(0, 64, size=400))
    words = ["measure", "step_1.pt", "--data", "val.npy", "--sequences", "3", "--positions", "9", "--threads", "1"]
    words += ["--model", "mixes_embeddings:build", "--model-config", json.dumps({"mixes": mixes}), "--examples", "token"]
    for out, sample in (("exact.jsonl", []), ("sampled.jsonl", ["--sample", "20"])):
        assert cli.main([*words, "--out", out, *sample]) == 0
    (exact,), (sampled,) = lines("exact.jsonl"), lines("sampled.jsonl")
    d_grad = sampled["metrics"]["D_grad"]
    assert d_grad["value"] == pytest.approx(exact["metrics"]["D_grad"]["value"], abs=1e-6)
    assert d_grad["error"] == 0


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("memory", "much", "expected a size such as 2GB or 500MB, got 'much'"),
        ("memory", "0GB", "expected a size"),
        ("steps", "5", "expected A:B, steps from A to B, got '5'"),
        ("steps", "7:5", "expected A:B"),
        ("model-config", "[1]", "expected a JSON object"),
        ("model-config", "none.json", "expected a JSON object or a .json file of one"),
        ("sample", "7", "expected a whole number >= 8"),
    ],
)
def test_a_bad_value_is_refused_by_its_option(option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        cli.main(["measure", "run", "--data", "x", f"--{option}", value])
    assert refusal.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"zerosum measure: error: argument --{option}: ")
    assert said in error


def test_sizes_of_memory() -> None:
    from zerosum.cli.arguments import memory

    sizes = [memory(text) for text in ("2GB", "500 mb", "1.5GiB", "1000", "3k", "1T")]
    assert sizes == [2 * 10**9, 5 * 10**8, 3 * 2**29, 1000, 3000, 10**12]


def test_help_teaches_the_three_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["measure", "--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    for words in ("zerosum demo --keep-checkpoints", "checkpoint-500", "--model model:build", "--examples token --sample 2000"):
        assert words in said
