"""``zerosum plot``: the files it leaves, what it says of what it could not draw, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from matplotlib.figure import Figure

from tests.zerosum.test_runs import checkpoints, write
from tests.zerosum.test_training import run_records
from zerosum import cli
from zerosum.plots import paper
from zerosum.plots.paper import FIGURES

Captured = pytest.CaptureFixture[str]


def plot(*words: object) -> int:
    return cli.main(["plot", *map(str, words)])


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    return write(tmp_path / "14M.jsonl", checkpoints())


def test_the_help_lists_every_figure(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        plot("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {figure.shows}" in said for name, figure in FIGURES.items())


def test_every_figure_is_written_as_png_and_svg(measured: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "new" / "folder"
    assert plot(measured, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    assert all("<svg" in path.read_text() for path in out.glob("*.svg"))
    said = capsys.readouterr()
    assert "Runs: 14M\n" in said.out
    assert str(out / "plane.svg") in said.out
    assert "no " not in said.out
    assert not said.err


def test_what_was_chosen_is_written(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert plot(measured, "--out", out, "--figures", "plane", "gradients", "--format", "svg") == 0
    assert {path.name for path in out.iterdir()} == {"plane.svg", "gradients.svg"}


def test_the_options_reach_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def loss(runs: list[Any], first: float) -> Figure:
        seen.extend((runs, first))
        return Figure()

    monkeypatch.setattr(paper, "loss", loss)
    curve = tmp_path / "curve.csv"
    curve.write_text("a,b,c\n1,7,3.5\n2,8,3.25\n")
    options = ("--step", "a", "--loss", "c", "--smoothed", "--first", "30", "--labels", "mine", "--figures", "loss")
    assert plot(curve, "--out", tmp_path / "out", *options) == 0
    (run,), first = seen
    assert (run.name, run.smoothed, run.loss.values.tolist(), first) == ("mine", True, [3.5, 3.25], 30)


def test_a_demo_beside_measured_checkpoints(measured: Path, tmp_path: Path, capsys: Captured) -> None:
    folder = write(tmp_path / "demo" / "metrics.jsonl", run_records((0.2, 0.6), (0.1, 0.5))).parent
    assert plot(folder, measured, "--out", tmp_path / "out", "--format", "png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Runs: demo, 14M"
    at = next(i for i, line in enumerate(lines) if line.startswith("plane"))
    assert lines[at + 1].strip() == "demo is in part of it: no interval.D, interval.M"
    assert lines[at + 2].startswith("gradients")


def test_what_a_run_lacks_is_said_and_the_rest_is_drawn(tmp_path: Path, capsys: Captured) -> None:
    curve = tmp_path / "curve.csv"
    curve.write_text("step,loss\n" + "".join(f"{step},{5 * step**-0.3}\n" for step in range(1, 300)))
    assert plot(curve, "--out", tmp_path / "out", "--format", "png") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["loss.png"]
    words = " ".join(capsys.readouterr().out.split())
    assert "gradients left out curve is not in it: no D_grad" in words
    assert "decomposition left out curve is not in it: no C_g, C_uG, C_ug" in words


def test_nothing_to_draw_is_a_failure(tmp_path: Path, capsys: Captured) -> None:
    curve = tmp_path / "curve.csv"
    curve.write_text("step,loss\n1,3.5\n2,3.25\n")
    assert plot(curve, "--out", tmp_path / "out", "--figures", "gradients") == 1
    assert "no run has what any of these figures needs" in capsys.readouterr().err


def test_a_cut_line_is_said(measured: Path, tmp_path: Path, capsys: Captured) -> None:
    measured.write_text(measured.read_text()[:-20])
    assert plot(measured, "--out", tmp_path / "out", "--figures", "gradients", "--format", "png") == 0
    assert capsys.readouterr().err == f"zerosum plot: {measured} line 4: is cut off, left out\n"


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, capsys: Captured) -> None:
    unknown = checkpoints()
    unknown[1]["kind"] = "epoch"
    for path, said in (
        (write(tmp_path / "unknown.jsonl", unknown), 'line 2: kind: expected one of step, probe, cost, checkpoint, got "epoch"'),
        (write(tmp_path / "empty.jsonl"), "empty.jsonl: is empty"),
        (tmp_path / "none.jsonl", "cannot be read"),
        (tmp_path / "none.csv", "cannot be read"),
        (tmp_path / "none.xyz", "cannot be read: No such file"),
    ):
        assert plot(path, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("zerosum plot: ")
        assert said in error
        assert not (tmp_path / "out").exists()


def test_labels_that_do_not_fit_are_refused(measured: Path, tmp_path: Path, capsys: Captured) -> None:
    assert plot(measured, "--out", tmp_path / "out", "--labels", "a", "b") == 2
    assert "labels (--labels): expected one for each of the 1 paths, got 2" in capsys.readouterr().err


def test_a_folder_that_cannot_be_used_is_refused(measured: Path, capsys: Captured) -> None:
    assert plot(measured, "--out", measured) == 2
    assert f"--out: cannot use {measured}" in capsys.readouterr().err


def test_a_disk_that_is_full_is_a_failure(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def full(self: Figure, file: Path, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    assert plot(measured, "--out", tmp_path) == 1
    assert capsys.readouterr().err == f"zerosum plot: {tmp_path / 'loss.png'}: No space left on device\n"


def test_a_missing_package_is_named(measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    found = cli.arguments.importlib.util.find_spec
    monkeypatch.setattr(cli.arguments.importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name))
    assert plot(measured) == 2
    assert "needs scipy: pip install 'zsl_kernels[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--figures", "pie"], ["--format", "pdf"], ["--first", "0"], []])
def test_bad_options_are_refused(words: list[str], measured: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        plot(*([measured, *words] if words else []))
    assert stopped.value.code == 2
