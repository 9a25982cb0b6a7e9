"""``zerosum fit``: its table, its file and its refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

from zerosum import cli
from zerosum.deceleration import fit

STEPS = np.arange(1, 3001)


def curve(path: Path, broken: bool = True, seed: int = 0) -> Path:
    x = np.log(STEPS)
    bend = 0.17 * 0.2 * np.log1p(np.exp((x - np.log(500)) / 0.2)) if broken else 0
    losses = np.exp(np.log(9) - 0.2 * x + bend + 0.002 * np.random.default_rng(seed).normal(size=len(x)))
    path.write_text("step,loss\n" + "".join(f"{step},{loss!r}\n" for step, loss in zip(STEPS, losses.tolist(), strict=True)))
    return path


def test_each_curve_has_a_line_and_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, straight = curve(tmp_path / "broken.csv"), curve(tmp_path / "straight.csv", broken=False)
    out = tmp_path / "fits.json"
    assert cli.main(["fit", str(broken), str(straight), "--bootstrap", "20", "--json", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["curve", "L_d", "t_d", "r_d", "L̂_T", "L_T", "RSLE", "n", "verdict"]
    assert said[2].split()[0] == str(broken)
    assert said[2].count("±") == 3
    assert said[2].endswith("deceleration")
    assert said[3].split()[1:5] == ["–"] * 4
    assert said[3].endswith("no break found")
    assert f"{straight}: no break found: two segments are not surely better than one" in said[-1]
    found = json.loads(out.read_text())
    assert found["interval_level"] == 0.95
    assert [found["curves"][str(path)]["found"] for path in (broken, straight)] == [True, False]
    data = np.genfromtxt(broken, delimiter=",", skip_header=1)
    direct = fit(data[:, 0], data[:, 1], bootstrap=20)
    written = found["curves"][str(broken)]
    assert written["L_d"] == direct.L_d
    assert written["errors"] == direct.errors
    assert written["intervals"]["t_d"] == list(direct.intervals["t_d"])
    assert written["d1"] == direct.d1
    assert {path.name for path in tmp_path.iterdir()} == {"broken.csv", "straight.csv", "fits.json"}


def test_options_reach_the_fit(tmp_path: Path) -> None:
    path, out = curve(tmp_path / "c.csv"), tmp_path / "fits.json"
    text = path.read_text().replace("step,loss", "row,nats").replace("\n50,", "\n50,9\n50,")
    path.write_text(text)
    options = ["--step", "row", "--loss", "nats", "--smoothed", "--first", "200", "--final", "9000", "--bootstrap", "0"]
    assert cli.main(["fit", str(path), "--last-of-repeats", *options, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["curves"][str(path)]
    assert (found["n"], found["final"], found["intervals"]) == (2800, 9000, {})


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("step,loss\n1,2\n2,1\n", [], "the curve is too short: expected at least 12 points after step 100, got 0"),
        ("step,loss\n1,2\n2,nan\n", [], " line 3: loss: expected a finite number > 0, got nan"),
        ("step,loss\n1,2\n1,1\n", [], "--last-of-repeats"),
        ("step,loss\n1,2\n", ["--loss", "nll"], "no column 'nll'"),
        (None, [], "cannot be read"),
    ],
)
def test_a_bad_curve_is_refused_in_one_line_and_nothing_is_written(
    content: str | None, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, out = curve(tmp_path / "good.csv"), tmp_path / "bad.csv", tmp_path / "fits.json"
    if content is not None:
        bad.write_text(content)
    assert cli.main(["fit", *([] if options else [str(good)]), str(bad), "--bootstrap", "0", "--json", str(out), *options]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"zerosum fit: {bad}")
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "none" / "fits.json"
    assert cli.main(["fit", str(curve(tmp_path / "c.csv")), "--bootstrap", "0", "--json", str(out)]) == 2
    assert f"--json: cannot write {out}" in capsys.readouterr().err


def test_what_no_fit_wrote_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = curve(tmp_path / "one.csv"), curve(tmp_path / "two.csv", seed=1)
    (tmp_path / "curve.json").write_text('{"step": [1, 2], "loss": [3, 2]}')
    for path in (one, tmp_path / "curve.json"):
        before = path.read_bytes()
        assert cli.main(["fit", "--bootstrap", "0", "--json", str(path), str(two)]) == 2
        assert f"--json: {path} has something else in it than fits; choose another file" in capsys.readouterr().err
        assert path.read_bytes() == before
    for _ in range(2):  # a file of fits is
        assert cli.main(["fit", str(two), "--bootstrap", "0", "--json", str(tmp_path / "fits.json")]) == 0


def test_without_scipy_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["fit", "any.csv"]) == 2
    assert "needs scipy: pip install 'zsl_kernels[demo]'" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for words in ("--last-of-repeats", "examples:", "metrics.jsonl", "no break found", "exit code"):
        assert words in said
