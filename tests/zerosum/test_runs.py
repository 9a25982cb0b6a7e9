"""Reading runs: what belongs together and what does not, under which name, and what is wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.zerosum.test_training import run_records
from zerosum.metrics import METRICS
from zerosum.records import Record, encode
from zerosum.runs import Run, RunError, read_runs

STEPS = (64, 128, 256, 512)
DATA = {"name": "C4 validation", "sequences": 8, "positions": 32, "digest": "aaaa1111"}


def checkpoints(run: str = "14M", steps: tuple[int, ...] = STEPS, **changed: Any) -> list[Record]:
    """Made-up records of ``zerosum measure``, every value another one. ``changed`` replaces fields."""
    found: list[Record] = []
    for i, step in enumerate(steps):
        metrics: dict[str, dict[str, Any]] = {name: {"value": 0.3 + 0.01 * i, "n": 256, "null": 0.2} for name in METRICS}
        metrics |= {
            "loss": {"value": 8 - 0.5 * i, "n": 256, "null": None},
            "D_grad": {"value": 0.98 + 0.003 * i, "n": 256, "null": 0.99, "error": 0.0005},
            "C_g": {"value": 0.03 - 0.005 * i, "n": 256, "null": 0.004, "error": 0.001},
            "C_uG": {"value": 0.6, "n": 256, "null": 0.06},
            "C_ug": {"value": 0.1 - 0.01 * i, "n": 256, "null": None, "error": 0.01},
            "cosine_q05": {"value": -0.2 - 0.01 * i, "n": 256, "null": -0.3},
            "cosine_median": {"value": 0.1 - 0.02 * i, "n": 256, "null": 0.0},
            "cosine_q95": {"value": 0.4 - 0.03 * i, "n": 256, "null": 0.35},
            "opposed_examples": {"value": 0.2 + 0.1 * i, "n": 256, "null": 0.5},
        }
        for k, name in enumerate(("embedding", "blocks.0.up", "blocks.1.up", "blocks.0.down", "blocks.1.down")):
            metrics[f"D_grad/{name}.weight"] = {"value": 0.9 + 0.01 * i + 0.005 * k, "n": 256, "null": 0.97}
        for k, name in enumerate(("train", "held_out", *(["interval"] if i else []))):
            metrics[f"{name}.D"] = {"value": 0.3 + 0.1 * i + 0.01 * k, "n": 256, "null": 0.95}
            metrics[f"{name}.M"] = {"value": 0.01 * (i + 1) * 10**k, "n": 256, "null": None}
        found.append(
            {
                "kind": "checkpoint",
                "step": step,
                "run": run,
                "checkpoint": f"step-{step}",
                "evaluation": DATA,
                "train": {**DATA, "name": "C4 train", "digest": "bbbb"},
                "examples": "token",
                "sampled": 100,
                "update": "optimizer",
                "interval": [steps[i - 1], step] if i else None,
                "covered": 1.0,
                "not_covered": {},
                "seconds": 1.0,
                "metrics": metrics,
                **changed,
            }
        )
    return found


def write(path: Path, *groups: list[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(encode(entry) for group in groups for entry in group), encoding="utf-8")
    return path


def one(path: Path) -> Run:
    (run,), notes = read_runs([path])
    assert not notes
    return run


# What a run is.


def test_measured_checkpoints(tmp_path: Path) -> None:
    run = one(write(tmp_path / "m.jsonl", checkpoints()[::-1]))
    assert run.name == "14M"
    assert run.loss is None
    c = run.curve("C_g")
    assert c.steps.tolist() == list(STEPS)
    assert c.values.tolist() == pytest.approx([0.03, 0.025, 0.02, 0.015])
    assert c.nulls.tolist() == [0.004] * 4
    assert c.errors is not None
    assert c.errors.tolist() == [0.001] * 4
    assert c.n == 256
    assert run.over("C_g") == ("N = 256 tokens of C4 validation (8 × 32)", "100 sampled", "along the optimizer's step")
    assert run.over("train.D") == ("N = 256 tokens of C4 train (8 × 32)", "", "by the optimizer's step")
    assert run.over("held_out.D")[0] == "N = 256 tokens of C4 validation (8 × 32)"


def test_the_change_between_checkpoints_stands_at_its_beginning(tmp_path: Path) -> None:
    run = one(write(tmp_path / "m.jsonl", checkpoints()))
    assert run.curve("interval.D").steps.tolist() == [64, 128, 256]
    assert run.over("interval.D")[2] == "Δt = t"
    uneven = one(write(tmp_path / "uneven.jsonl", checkpoints(steps=(10, 20, 30))))
    assert uneven.over("interval.D")[2] == "each to the next checkpoint"


def test_a_demo(tmp_path: Path) -> None:
    run = one(write(tmp_path / "small" / "metrics.jsonl", run_records((0.2, 0.6), (0.1, 0.5))).parent)
    assert run.name == "small"
    assert run.loss is not None
    assert run.loss.steps.tolist() == list(range(1, 1001))
    assert run.over("D_grad") == ("N = 4 sequences of training batches", "exact", "")
    assert run.over("held_out.D")[0] == "N = 64 tokens of held-out text"
    assert run.curve("D_grad").values[[0, -1]] == pytest.approx([0.2, 0.6])


def test_a_loss_curve(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    path.write_text("step,loss\n1,3.5\n2,3.25\n")
    run = one(path)
    assert run.loss is not None
    assert (run.name, run.loss.steps.tolist(), run.loss.values.tolist()) == ("curve", [1, 2], [3.5, 3.25])
    assert not run.has("D_grad")
    with_kinds = tmp_path / "plain.jsonl"
    with_kinds.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n')
    assert one(with_kinds).loss is not None


def test_a_folder_of_folders(tmp_path: Path) -> None:
    for name in ("width-128", "width-64"):
        write(tmp_path / name / "metrics.jsonl", run_records((0.2, 0.6), (0.1, 0.5))[:5])
    assert [run.name for run in read_runs([tmp_path])[0]] == ["width-64", "width-128"]
    write(tmp_path / "sizes" / "width-32" / "metrics.jsonl", run_records((0.2, 0.6), (0.1, 0.5))[:5])
    assert [run.name for run in read_runs([tmp_path])[0]] == ["width-32", "width-64", "width-128"]


def test_a_value_that_is_missing_is_nan_and_no_curve_of_nan_counts(tmp_path: Path) -> None:
    records = checkpoints()
    records[1]["metrics"]["D_grad"]["value"] = None
    for entry in records:
        entry["metrics"]["C_g"]["value"] = None
    run = one(write(tmp_path / "m.jsonl", records))
    assert np.isnan(run.curve("D_grad").values).tolist() == [False, True, False, False]
    assert run.has("D_grad")
    assert not run.has("C_g")
    assert not run.has("D_grad", "nothing")


def test_several_metrics_are_taken_where_all_were_measured(tmp_path: Path) -> None:
    records = checkpoints()
    del records[1]["metrics"]["C_uG"], records[2]["metrics"]["C_ug"]
    run = one(write(tmp_path / "m.jsonl", records))
    above, below = run.curves("C_uG", "C_ug")
    assert above.steps.tolist() == below.steps.tolist() == [64, 512]


# What is one run, and what is two.


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("examples", "sequence", "sequences, sampled"),
        ("sampled", None, "tokens, exact"),
        ("update", "gradient", "along a gradient step"),
        ("evaluation", {**DATA, "name": "The Pile"}, "The Pile (8 × 32)"),
        ("evaluation", {**DATA, "digest": "cccc2222dddd"}, "set cccc2222"),
        ("train", None, ""),
    ],
)
def test_records_that_differ_in_what_they_are_over_are_different_runs(tmp_path: Path, field: str, value: Any, words: str) -> None:
    runs, _ = read_runs([write(tmp_path / "m.jsonl", checkpoints(), checkpoints(**{field: value}))])
    assert len(runs) == 2
    assert len({run.name for run in runs}) == 2
    assert all(run.curve("C_g").steps.tolist() == list(STEPS) for run in runs)
    assert any(words in run.name for run in runs)


def test_a_last_checkpoint_without_an_update_belongs_to_the_others(tmp_path: Path) -> None:
    records = checkpoints(update="next")
    records[-1]["update"] = None
    del records[-1]["metrics"]["C_g"]
    run = one(write(tmp_path / "m.jsonl", records))
    assert len(run.curve("D_grad")) == 4
    assert run.over("C_g")[2] == "along the change to the next checkpoint"


def test_sets_of_the_same_name_are_told_apart_by_their_digests(tmp_path: Path) -> None:
    here = write(tmp_path / "a.jsonl", checkpoints("a"))
    there = write(tmp_path / "b.jsonl", checkpoints("b", evaluation={**DATA, "digest": "eeee3333ffff"}))
    a, b = read_runs([here, there])[0]
    assert a.over("D_grad", (a, b))[0] == "N = 256 tokens of C4 validation (8 × 32) [aaaa1111]"
    assert b.over("D_grad", (a, b))[0] == "N = 256 tokens of C4 validation (8 × 32) [eeee3333]"
    assert a.over("train.D", (a, b)) == b.over("train.D", (a, b))


def test_demos_of_other_seeds_are_told_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = write(tmp_path / f"seed-{seed}" / "metrics.jsonl", run_records((0.2, 0.6), (0.1, 0.5))).parent
        (folder / "config.json").write_text(json.dumps({"text": "abc", "seed": seed, "positions": 16}))
    a, b = read_runs([tmp_path])[0]
    assert a.over("held_out.D", (a, b)) != b.over("held_out.D", (a, b))


# Names.


def test_runs_are_ordered_by_size_and_then_by_name(tmp_path: Path) -> None:
    names = ["OLMo-1B", "285M", "width-128", "14M", "width-64", "1.3B"]
    paths = [write(tmp_path / f"{i}.jsonl", checkpoints(name)) for i, name in enumerate(names)]
    assert [run.name for run in read_runs(paths)[0]] == ["width-64", "width-128", "14M", "285M", "OLMo-1B", "1.3B"]


def test_the_same_name_in_two_files_gets_the_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, checkpoints()) for name in ("a.jsonl", "b.jsonl")]
    assert [run.name for run in read_runs(paths)[0]] == [f"14M ({path})" for path in paths]


def test_labels(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, checkpoints()) for name in ("a.jsonl", "b.jsonl")]
    assert [run.name for run in read_runs(paths, ["with Muon", "plain"])[0]] == ["plain", "with Muon"]
    both = write(tmp_path / "both.jsonl", checkpoints("x"), checkpoints("y"))
    assert [run.name for run in read_runs([both], ["mine"])[0]] == ["mine, x", "mine, y"]
    with pytest.raises(RunError, match=r"labels \(--labels\): expected one for each of the 2 paths, got 1"):
        read_runs(paths, ["one"])


# What is wrong with a file.


def test_a_last_line_that_was_cut_off_is_left_out_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", checkpoints())
    path.write_text(path.read_text()[:-20])
    (run,), notes = read_runs([path])
    assert run.curve("D_grad").steps.tolist() == [64, 128, 256]
    assert notes == [f"{path} line 4: is cut off, left out"]


def test_a_last_line_that_lacks_its_end_only_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", checkpoints())
    path.write_text(path.read_text()[:-1])
    assert len(one(path).points) == 4


def test_a_cut_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", checkpoints())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-20], lines[2]]) + "\n")
    with pytest.raises(RunError, match=r"m\.jsonl line 2: expected JSON: "):
        read_runs([path])


def test_a_name_may_have_any_character(tmp_path: Path) -> None:
    assert one(write(tmp_path / "m.jsonl", checkpoints("a\u2028b\x85c$_d\n"))).name == "a\u2028b\x85c$_d\n"


def set_to(*keys: str, value: Any) -> Callable[[Record], None]:
    def change(entry: Record) -> None:
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_to("kind", value="probes"), 'kind: expected one of step, probe, cost, checkpoint, got "probes"'),
        (set_to("kind", value=None), "kind: expected one of step, probe, cost, checkpoint, got null"),
        (set_to("step", value=-1), "step: expected a whole number >= 0, got -1"),
        (set_to("step", value="7"), 'step: expected a whole number >= 0, got "7"'),
        (set_to("metrics", value=[1]), r"metrics: expected an object, got \[1\]"),
        (set_to("metrics", "C_g", value=0.3), r"metrics: C_g: expected numbers .*, got 0\.3"),
        (set_to("metrics", "C_g", "value", value="x"), r"metrics: C_g: expected numbers"),
        (set_to("metrics", "C_g", "n", value=None), r"metrics: C_g: expected numbers"),
        (set_to("run", value=None), "run: expected a name, got null"),
        (set_to("evaluation", value="C4"), 'evaluation: expected an object with a "name", got "C4"'),
        (set_to("evaluation", value={"name": "C4", "sequences": "8"}), "evaluation: expected an object"),
        (set_to("examples", value="word"), 'examples: expected "sequence", "position" or "token", got "word"'),
        (set_to("sampled", value=0.5), r"sampled: expected null or a whole number, got 0\.5"),
        (set_to("update", value="adam"), 'update: expected null or one of optimizer, gradient, next, got "adam"'),
        (set_to("interval", value=[1]), r"interval: expected null or two steps, got \[1\]"),
    ],
)
def test_a_bad_record_is_named_with_its_line(tmp_path: Path, change: Callable[[Record], None], said: str) -> None:
    records = json.loads(json.dumps(checkpoints()))
    change(records[2])
    with pytest.raises(RunError, match=rf"m\.jsonl line 3: {said}"):
        read_runs([write(tmp_path / "m.jsonl", records)])


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is empty"), ("\n\n", "is empty"), ('{"kind": "st', "has no whole record"), ("[1]\n", "expected a JSON object")],
)
def test_a_file_without_records_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_runs([path])


def test_other_things_than_runs_are_refused(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "none.jsonl", "cannot be read: No such file"),
        (tmp_path, "expected a run's metrics.jsonl in this folder or in its folders"),
        (write(tmp_path / "cost.jsonl", [{"kind": "cost", "step": 3, "metrics": {}}]), "has no training step, probe or checkpoint"),
        (write(tmp_path / "twice.jsonl", checkpoints(), checkpoints()), "step 64 was measured twice"),
    ):
        with pytest.raises(RunError, match=said):
            read_runs([path])
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="expected UTF-8 text"):
        read_runs([binary])
