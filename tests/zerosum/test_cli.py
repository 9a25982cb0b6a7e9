"""The command line, on runs of a few steps: what they leave behind, how they go on, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zsl_kernels as zk
from zerosum import cli

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from zerosum.checkpoints import find
from zerosum.runs import read_runs
from zerosum.training.comparison import mean_and_error
from zerosum.training.loop import Trainer
from zerosum.training.run import Refused


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


def demo(text: Path | str, out: Path, **options: object) -> int:
    sizes = {"steps": 12, "width": 32, "layers": 1, "sequences": 4, "positions": 16, "threads": 1, **options}
    extra = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return cli.main(["demo", "--text", str(text), "--out", str(out), *extra])


@pytest.fixture(autouse=True)
def _same_threads(threads: object) -> None:
    """`--threads` sets torch's number of threads: the fixture restores it."""


def records(out: Path) -> list[dict[str, Any]]:
    """The records without their timings."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if "seconds" not in key} for entry in found]


def test_a_run_leaves_its_files_and_says_what_it_saw(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert demo(text, out) == 0
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "report.md", "loss.png", "interference.png", "decomposition.png"}
    assert {path.name for path in out.iterdir()} == names
    found = records(out)
    assert [entry["step"] for entry in found if entry["kind"] == "step"] == list(range(1, 13))
    assert [entry["step"] for entry in found if entry["kind"] == "probe"] == [1, 2, 3, 4, 6, 7, 10, 12]
    assert found[-1]["kind"] == "cost"
    fields = {frozenset(metric) for entry in found for metric in entry["metrics"].values()}
    assert fields == {frozenset({"value", "n", "null"}), frozenset({"value", "n", "null", "debiased"})}
    said = capsys.readouterr().out
    for words in (
        "D_grad",
        "random signs",
        "4 sequences",
        "1024 tokens",
        "What was seen",
        "100.0% of the coordinates (not covered: none)",
    ):
        assert words in said
    report = (out / "report.md").read_text()
    assert "![loss](loss.png)" in report
    assert "| learning_rate | 0.003 |" in report


def test_a_complete_run_is_said_to_be_complete(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(text, tmp_path / "run", steps=2) == 0
    before = records(tmp_path / "run")
    capsys.readouterr()
    assert demo(text, tmp_path / "run", steps=2) == 0
    said = capsys.readouterr().out
    assert "complete already" in said
    assert "D_grad" in said
    assert records(tmp_path / "run") == before


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # (What runs in the background of a shell ignores the signal from the start.)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert demo(text, tmp_path / "whole") == 0
    step = Trainer.step

    def interrupting(self: Trainer, number: int) -> Any:
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupting)
        assert demo(text, tmp_path / "run") == 130
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    said = capsys.readouterr().out
    assert "Stopped after step 5 of 12. The same command goes on from there." in said
    assert records(tmp_path / "run")[-1]["step"] == 5
    assert (tmp_path / "run" / "loss.png").exists()
    assert demo(text, tmp_path / "run") == 0
    assert "Resuming after step 5." in capsys.readouterr().out
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_second_interrupt_stops_at_once_and_the_run_goes_on_from_its_checkpoint(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def interrupting(self: Trainer, number: int) -> Any:
        if number == 9:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupting)
        assert demo(text, tmp_path / "run") == 130
    assert "Interrupted." in capsys.readouterr().err
    assert records(tmp_path / "run")[-1]["step"] == 8
    assert demo(text, tmp_path / "run") == 0
    assert "Resuming after step 7." in capsys.readouterr().out
    assert [entry["step"] for entry in records(tmp_path / "run") if entry["kind"] == "step"] == list(range(1, 13))


SIZES = {"sizes": 2, "width": 64}


def test_sizes_end_with_their_table(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    out = tmp_path / "runs"
    assert demo(text, out, steps=230, **SIZES) == 0
    said = capsys.readouterr().out
    table = said[said.index("\nwidth ") :].splitlines()[1:5]
    assert table[0].split() == ["width", "L_d", "t_d", "r_d", "L̂_T", "L_T", "RSLE", "n", "D_grad", "random", "signs", "verdict"]
    for line, width in zip(table[2:], ("32", "64"), strict=True):
        found = records(out / f"width-{width}")
        last = [entry for entry in found if entry["kind"] == "probe"][-1]["metrics"]["tokens.D_grad"]
        assert line.split()[0] == width
        assert f"  {last['value']:.3f}" in line
        assert f"  {last['null']:.3f}" in line
        assert " 13 " in line  # every tenth step from 110 to 230
        assert f"Width {width}: " in said
    report = (out / "report.md").read_text()
    for words in ("| width | L_d | t_d | r_d |", "[width 32](width-32/report.md)", "| width | [32, 64] |", "64 held-out tokens"):
        assert words in report


def test_interrupted_sizes_go_on_with_what_is_left(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    assert demo(text, tmp_path / "whole", **SIZES) == 0
    # Nothing but the width differs: each is the run that it would be alone.
    assert demo(text, tmp_path / "alone", width=32) == 0
    assert records(tmp_path / "alone") == records(tmp_path / "whole" / "width-32")
    step = Trainer.step

    def interrupting(self: Trainer, number: int) -> Any:
        if number == 5 and self.settings.width == 64:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupting)
        assert demo(text, tmp_path / "runs", **SIZES) == 130
    assert "Stopped after step 5 of 12. The same command goes on from there." in capsys.readouterr().out
    assert not (tmp_path / "runs" / "report.md").exists()
    assert demo(text, tmp_path / "runs", **SIZES) == 0
    said = capsys.readouterr().out
    assert "complete already" in said
    assert "Resuming after step 5." in said
    assert "not fitted, the curve is too short: expected at least 12 points after step 100, got 0" in said
    for width in (32, 64):
        assert records(tmp_path / "runs" / f"width-{width}") == records(tmp_path / "whole" / f"width-{width}")


def test_seeds_end_with_their_table_and_go_on_with_what_is_left(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    step = Trainer.step

    def interrupting(self: Trainer, number: int) -> Any:
        if number == 5 and self.settings.seed == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    out = tmp_path / "runs"
    options: dict[str, object] = {"steps": 6, "seed": 7, "seeds": 2, "optimizer": "muon"}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupting)
        assert demo(text, out, **options) == 130
    capsys.readouterr()
    assert demo(text, out, **options) == 0
    said = capsys.readouterr().out
    assert "Run 1 of 2: seed 7." in said
    assert "Resuming after step 5." in said
    # Each is the run that it would be alone.
    assert demo(text, tmp_path / "alone", steps=6, seed=8, optimizer="muon") == 0
    assert records(tmp_path / "alone") == records(out / "seed-8")
    last = [[entry for entry in records(out / f"seed-{seed}") if entry["kind"] == "probe"][-1]["metrics"] for seed in (7, 8)]
    for name in ("tokens.D_grad", "D_grad", "held_out.D", "held_out.M", "held_out.loss"):
        assert mean_and_error([metrics[name]["value"] for metrics in last]) in said
    assert json.loads((out / "config.json").read_text())["seed"] == [7, 8]
    figures = {f"{name}.png" for name in ("loss", "interference", "gradients", "layers")}
    assert {path.name for path in out.iterdir()} == {"config.json", "report.md", "seed-7", "seed-8", *figures}
    report = (out / "report.md").read_text()
    for words in ("several seeds", "[seed 8](seed-8/report.md)", "| seed | [7, 8] |", "![layers](layers.png)"):
        assert words in report
    (run,), _ = read_runs([out])
    assert len(run.repeats) == 2
    with pytest.raises(Refused, match="expected one run, got a folder of runs of `zerosum demo`: seed-7, seed-8"):
        find(out)


def test_an_interrupt_while_the_cost_is_measured_stops_before_the_next_size(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    cost = Trainer.probe_cost

    def interrupting(self: Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return cost(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "probe_cost", interrupting)
        assert demo(text, tmp_path / "runs", **SIZES) == 130
    assert not (tmp_path / "runs" / "width-64").exists()
    assert demo(text, tmp_path / "runs", **SIZES) == 0


def test_a_disk_that_is_full_is_said_and_the_run_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Path.write_bytes

    def full(self: Path, content: Any) -> int:
        if not self.name.startswith("checkpoint.pt"):
            return write(self, content)
        write(self, bytes(content)[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert demo(text, tmp_path / "run") == 1
    assert capsys.readouterr().err == f"zerosum demo: {tmp_path / 'run' / 'checkpoint.pt'}: No space left on device\n"
    assert demo(text, tmp_path / "run") == 0


def test_sizes_that_diverge_are_not_lost(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    assert demo(text, tmp_path / "runs", learning_rate=1e38, **SIZES) == 1
    said = capsys.readouterr().out
    assert said.count("the loss is not finite") == 2
    assert "Width 64: not fitted, " in said


@pytest.mark.parametrize(("sizes", "width", "unit"), [(3, 64, 128), (2, 96, 64)])
def test_a_width_that_cannot_be_halved_is_refused(
    sizes: int, width: int, unit: int, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    assert demo(text, tmp_path / "runs", sizes=sizes, width=width) == 2
    assert f"--sizes {sizes}: expected --width to be a multiple of {unit}, for it is halved, got {width}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_sizes_and_a_single_run_do_not_share_a_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    assert demo(text, tmp_path / "run", steps=2, width=64) == 0
    assert demo(text, tmp_path / "run", steps=2, **SIZES) == 2
    assert "width is 64 there and [32, 64] here" in capsys.readouterr().err


def test_the_seed_fixes_the_run(text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert demo(text, tmp_path / name, steps=3, seed=seed) == 0
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert records(tmp_path / "a") != records(tmp_path / "c")


def test_another_run_in_the_folder_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(text, tmp_path / "run", steps=2) == 0
    assert demo(text, tmp_path / "run", steps=2, seed=5) == 2
    assert "seed is 0 there and 5 here" in capsys.readouterr().err
    text.write_text("another text, long enough to be learnt from. " * 60)
    assert demo(text, tmp_path / "run", steps=2) == 2
    assert "text is" in capsys.readouterr().err


def test_a_run_that_diverges_stops_and_says_so(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(text, tmp_path / "run", learning_rate=1e38) == 1
    said = capsys.readouterr().out
    assert "the loss is not finite" in said
    assert "--learning-rate" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        (b"", "expected more than 16 bytes"),
        (b"short", "expected more than 16 bytes"),
        (b"x" * 150, "to hold out"),
    ],
)
def test_bad_text_is_refused_in_one_line(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert demo(path, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("zerosum demo: --text: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_refused(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (text, text / "below"):
        assert demo(text, out) == 2
        assert capsys.readouterr().err.startswith(f"zerosum demo: --out: cannot use {out}")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("steps", "0", "expected a whole number >= 1, got '0'"),
        ("steps", "many", "got 'many'"),
        ("seed", "-1", "expected a whole number >= 0"),
        ("threads", "100000", "expected a whole number from 1 to"),
        ("width", "40", "expected a multiple of 32, got '40'"),
        ("learning-rate", "-1", "expected a number > 0"),
        ("learning-rate", "nan", "expected a number > 0"),
        ("sequences", "1", "expected a whole number >= 2"),
    ],
)
def test_a_bad_number_is_refused_by_its_option(option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        cli.main(["demo", f"--{option}", value])
    assert refusal.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"zerosum demo: error: argument --{option}: ")
    assert said in error


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert "needs matplotlib and tqdm: pip install 'zsl_kernels[demo]'" in capsys.readouterr().err


def test_ctrl_c_anywhere_else_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(zk, "build_info", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "Interrupted." in capsys.readouterr().err


def test_output_that_nobody_reads_leaves_no_traceback(project_environment: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "zerosum", "doctor"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=project_environment, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_doctor_says_what_is_live(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said
    assert str(zk.build_info()["cpu_isa"] or "not built") in said
    assert "chunked    ok" in said
    assert "All is well" in said


@pytest.mark.parametrize(
    ("reason", "code"),
    [("it was not built: reinstall", 0), ("undefined symbol; if torch was changed, reinstall", 1)],
)
def test_the_doctor_tells_not_built_from_broken(reason: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {**zk.build_info(), "cpu": reason, "cpu_isa": None, "cpu_isas": []}
    monkeypatch.setattr(zk, "build_info", lambda: info)
    assert cli.main(["doctor"]) == code


def test_the_doctor_finds_wrong_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = zk.interference

    def wrong(*args: Any, impl: str, **options: Any) -> zk.InterferenceSums:
        found = right(*args, impl=impl, **options)
        return found if impl == "reference" else found._replace(l1=found.l1 * 1.01)

    monkeypatch.setattr(zk, "interference", wrong)
    assert cli.main(["doctor"]) == 1
    assert "chunked    WRONG, largest relative error 1.0e-02 (l1)" in capsys.readouterr().out


def test_help_and_imports_need_neither_matplotlib_nor_tqdm(project_environment: dict[str, str]) -> None:
    code = "import sys; sys.modules.update(matplotlib=None, tqdm=None); import zerosum, zerosum.cli"
    subprocess.run([sys.executable, "-c", code], check=True, env=project_environment)
    shown = subprocess.run(
        [sys.executable, "-m", "zerosum", "--help"], check=True, env=project_environment, capture_output=True, text=True
    )
    assert "zerosum doctor" in shown.stdout
    assert "zerosum demo" in shown.stdout
