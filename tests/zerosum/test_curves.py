"""Curves read from files of every kind, and what is said of those that cannot be."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from zerosum.curves import CurveError, read_curve
from zerosum.metrics import Metric
from zerosum.records import encode, record

STEPS = np.array([1.0, 2, 3, 5, 8, 13])
LOSSES = np.array([5.5, 5.25, 5.0, 4.5, 4.25, 4.125])
ROWS = list(zip(STEPS.astype(int).tolist(), LOSSES.tolist(), strict=True))


def text(suffix: str, content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"curve{suffix}"
        path.write_text(content, encoding="utf-8")
        return path

    return write


def lines(head: str, form: str) -> str:
    return head + "".join(form.format(step, loss) + "\n" for step, loss in ROWS)


def array(name: str, save: Callable[..., None], *content: object, **named: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save(folder / name, *content, **named)
        return folder / name

    return write


def run_records() -> str:
    """A run's own file: every step, and probes that have the same metric."""
    found = []
    for step, loss in ROWS:
        metrics = {"train.loss": Metric(loss, 64), "train.grad_norm": Metric(1.0, 4)}
        found.append(record("step", step, metrics))
        if step > 4:
            found.append(record("probe", step, {"train.loss": Metric(loss + 1, 64), "held_out.loss": Metric(loss + 2, 64)}))
    return "".join(map(encode, found))


def run_folder(folder: Path) -> Path:
    (folder / "metrics.jsonl").write_text(run_records())
    return folder


FILES: dict[str, Callable[[Path], Path]] = {
    "csv": text(".csv", lines("step,loss,lr\n", "{},{},0.1")),
    "csv with a byte order mark and spaces": text(".csv", lines("﻿Step, Train Loss\n", "{}, {}")),
    "csv of TensorBoard": text(".csv", lines("Wall time,Step,Value\n", "1.5,{},{}")),
    "csv with empty cells": text(".csv", lines("global_step,train/loss,val/loss\n", "{0},{1},\n{0},,7")),
    "csv without steps": text(".csv", "loss\n" + "".join(f"{x}\n" for x in LOSSES)),
    "tsv": text(".tsv", lines("iteration\tloss\n", "{}\t{}")),
    "jsonl": text(".jsonl", lines("", '{{"step": {}, "loss": {}, "note": "x"}}')),
    "jsonl cut off": text(".jsonl", lines("", '{{"step": {}, "loss": {}}}') + '{"step": 21, "lo'),
    "jsonl nested": text(".jsonl", lines("", '{{"trainer": {{"iter": {}}}, "m": {{"loss": {}}}}}').replace("iter", "step")),
    "a run's records": text(".jsonl", run_records()),
    "json of arrays": text(".json", json.dumps({"name": "x", "step": STEPS.tolist(), "loss": LOSSES.tolist()})),
    "json of objects": text(".json", json.dumps([{"step": step, "loss": loss} for step, loss in ROWS])),
    "json of pairs": text(".json", json.dumps(ROWS)),
    "json of nested arrays": text(".json", json.dumps({"small": {"step": STEPS.tolist(), "loss": LOSSES.tolist()}})),
    "json of transformers": text(
        ".json",
        json.dumps({"log_history": [{"step": a, "loss": b} for a, b in ROWS] + [{"step": 13, "eval_loss": 9}], "best_metric": 1}),
    ),
    "a run's folder": run_folder,
    "npy": array("curve.npy", np.save, np.stack((STEPS, LOSSES), 1)),
    "npz": array("curve.npz", np.savez, step=STEPS, loss=LOSSES, lr=np.ones((2, 2))),
    "npy with names": array("curve.npy", np.save, np.array(ROWS, dtype=[("step", "i8"), ("loss", "f8")])),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_obvious_columns_are_read(kind: str, tmp_path: Path) -> None:
    steps, losses = read_curve(FILES[kind](tmp_path))
    np.testing.assert_array_equal(losses, LOSSES)
    np.testing.assert_array_equal(steps, np.arange(1, 7) if kind == "csv without steps" else STEPS)
    assert steps.dtype == losses.dtype == np.float64


def test_other_columns_are_named(tmp_path: Path) -> None:
    path = text(".csv", lines("epoch,when,a,b\n", "0,{0},3,{1}"))(tmp_path)
    np.testing.assert_array_equal(read_curve(path, step="when", loss="b"), (STEPS, LOSSES))
    path = FILES["a run's records"](tmp_path)
    steps, losses = read_curve(path, loss="held_out.loss")
    np.testing.assert_array_equal(steps, [5, 8, 13])
    np.testing.assert_array_equal(losses, LOSSES[3:] + 2)
    nested = {size: {"step": STEPS.tolist(), "loss": (LOSSES * k).tolist()} for k, size in ((1, "small"), (2, "large"))}
    path = text(".json", json.dumps(nested))(tmp_path)
    np.testing.assert_array_equal(read_curve(path, loss="large.loss"), (STEPS, 2 * LOSSES))


REFUSED = {
    "no such file": (lambda folder: folder / "none.csv", "none.csv: cannot be read: No such file"),
    "no such file of an unknown kind": (lambda folder: folder / "none", "none: cannot be read: No such file"),
    "an unknown kind": (text(".parquet", ""), "expected one of .csv, .tsv, .jsonl"),
    "empty": (text(".csv", ""), "no column looks like a loss: name it with --loss; columns with numbers: none"),
    "two losses": (text(".csv", "step,a_loss,b_loss\n1,2,3\n"), "which column has the loss is not clear: name it with --loss;"),
    "no loss": (text(".csv", "step,lr\n1,2\n"), "no column looks like a loss: name it with --loss; columns with numbers: step, lr"),
    "no step": (text(".csv", "loss,lr\n1,2\n"), "no column looks like a step: name it with --step; columns with numbers: loss, lr"),
    "no number": (text(".csv", "step,loss\n1,2\n2,high\n"), 'curve.csv line 3: loss: expected a finite number, got "high"'),
    "nan": (text(".csv", "step,loss\n1,2\n2,nan\n"), "curve.csv line 3: loss: expected a finite number > 0, got nan"),
    "negative": (text(".csv", "step,loss\n1,2\n2,-1\n"), "curve.csv line 3: loss: expected a finite number > 0, got -1"),
    "null": (text(".jsonl", '{"step": 1, "loss": null}\n'), "curve.jsonl line 1: loss: expected a finite number, got null"),
    "a loss without a step": (text(".jsonl", '{"step": 1, "loss": 2}\n{"loss": 2}\n'), "curve.jsonl line 2: a loss without a step"),
    "broken json": (text(".jsonl", '{"step": 1, "loss": 2}\n{"step": 1,\n{}\n'), "curve.jsonl line 2: expected JSON"),
    "no object": (text(".jsonl", "[1, 2]\n"), "curve.jsonl line 1: expected a JSON object, got [1, 2]"),
    "too many cells": (text(".csv", "step,loss\n1,2,3\n"), "curve.csv line 2: expected 2 values, got more"),
    "no UTF-8": (array("curve.csv", lambda path: path.write_bytes(b"step,loss\n\xff\xfe,1\n")), "expected UTF-8 text"),
    "a table of three": (array("curve.npy", np.save, np.ones((4, 3))), "shape (n,), or steps and losses, shape (n, 2)"),
    "pickles": (array("curve.npy", np.save, np.array([{}])), "curve.npy: Object arrays cannot be loaded"),
    "no event files": (lambda folder: folder, "no TensorBoard event file"),
    "a restart": (
        text(".csv", "step,loss\n1,4\n2,3\n2,3.5\n3,2\n"),
        "curve.csv line 4: step: expected steps that increase, got 2 after 2; if the run was restarted there, last_of_repeats",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_place(kind: str, tmp_path: Path) -> None:
    write, said = REFUSED[kind]
    if kind == "no event files":
        pytest.importorskip("tensorboard")
    with pytest.raises(CurveError) as refusal:
        read_curve(write(tmp_path))
    assert str(refusal.value).startswith(str(tmp_path))
    assert said in str(refusal.value)


def test_a_named_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for options in ({"loss": "acc"}, {"step": "acc"}):
        with pytest.raises(CurveError, match=r"no column 'acc': name it with --(loss|step); columns with numbers: step, loss, lr"):
            read_curve(FILES["csv"](tmp_path), **options)  # type: ignore[arg-type]


def test_after_a_restart_the_last_writing_can_be_kept(tmp_path: Path) -> None:
    path = text(".csv", "step,loss\n1,9\n2,8\n3,7\n4,6\n2,5\n3,4\n6,3\n")(tmp_path)
    np.testing.assert_array_equal(read_curve(path, last_of_repeats=True), ([1, 2, 3, 6], [9, 5, 4, 3]))


def write_events(folder: Path, rows: list[tuple[int, float]], new_style: bool = False, purge_step: int | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=f".{purge_step}") as writer:
        for step, loss in rows:
            writer.add_scalar("train/loss", loss, step, new_style=new_style)
            writer.add_scalar("lr", 0.1, step, new_style=new_style)


@pytest.mark.parametrize("new_style", [False, True])
def test_events_of_tensorboard_are_read(new_style: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    write_events(tmp_path, ROWS, new_style)
    (path,) = tmp_path.iterdir()
    for place in (path, tmp_path):
        np.testing.assert_array_equal(read_curve(place), (STEPS, LOSSES))
    np.testing.assert_array_equal(read_curve(tmp_path, loss="lr")[1], np.full(6, np.float32(0.1)))
    with pytest.raises(CurveError, match="no column 'val/loss'"):
        read_curve(tmp_path, loss="val/loss")


def test_more_events_than_tensorboard_keeps_by_itself_are_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    write_events(tmp_path, [(i, 1 + 1 / i) for i in range(1, 12001)])
    assert len(read_curve(tmp_path)[0]) == 12000


def test_a_restart_in_events_is_seen(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    write_events(tmp_path, [(1, 4.0), (2, 3.0), (3, 2.5)])
    write_events(tmp_path, [(2, 3.5), (3, 3.25)], purge_step=2)
    with pytest.raises(CurveError, match="event of step 2: step: expected steps that increase, got 2 after 3; if the run"):
        read_curve(tmp_path)
    np.testing.assert_array_equal(read_curve(tmp_path, last_of_repeats=True), ([1, 2, 3], [4, 3.5, 3.25]))


def test_without_tensorboard_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.1").touch()
    for name in [*sys.modules]:
        if name.split(".")[0] == "tensorboard":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"need tensorboard: pip install 'zsl_kernels\[demo\]'"):
        read_curve(tmp_path)
