"""The command line as a process: what reaches the terminal, signals, and who writes to a run's folder."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zerosum import cli, tables
from zerosum.terminal import shielded, shown

NAME = "a\x1b[31m\r\n\u202eb\u2028c\x85\udc80\x00d"
SHOWN = "a\\x1b[31m\\r\\n\\u202eb\\u2028c\\x85\\udc80\\x00d"


def test_what_is_not_printable_is_escaped() -> None:
    assert shown(NAME) == SHOWN
    assert shown("Σ|g| ≤ 1 − L̂_T, naïve 本 🙂") == "Σ|g| ≤ 1 − L̂_T, naïve 本 🙂"
    assert SHOWN in tables.text([["run"], [NAME]])
    assert SHOWN in tables.markdown([["run"], [NAME]])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_streams_are_shielded_while_a_command_runs(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(file, encoding, newline="\n") for file in written]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with shielded():
        print(f"─ \x1b[2J{NAME}")
        print("\r 50%\x1b[A \x1b[2J literal \\r", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == tuple(streams)
    for stream in streams:
        stream.flush()
    line = SHOWN.replace("\\n", "\n")  # a line feed of the command's own is one
    assert written[0].getvalue().decode(encoding) == f"{'─' if encoding == 'utf-8' else chr(92) + 'u2500'} \\x1b[2J{line}\n"
    assert written[1].getvalue().decode() == "\r 50%\x1b[A \\x1b[2J literal \\r\n"


def test_without_a_terminal_at_all_a_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["doctor"]) == 0


def test_names_from_files_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    steps = np.arange(1, 400)
    path = tmp_path / "a\x1b[31m\r\n\u202e.csv"
    path.write_text("step,loss\n" + "".join(f"{s},{5 * s**-0.1}\n" for s in steps))
    assert cli.main(["fit", str(path), "--bootstrap", "0", "--json", str(tmp_path / "fit\udc80.json")]) == 0
    said = capsys.readouterr().out
    assert shown(path) in said
    assert said.replace("\n", "").isprintable()
    assert json.loads((tmp_path / "fit\udc80.json").read_text())["curves"].keys() == {str(path)}
    assert cli.main(["plot", str(path), "--figures", "loss", "--format", "svg", "--out", str(tmp_path / "figures\x1b")]) == 0
    said = capsys.readouterr().out
    assert "Runs: a\\x1b[31m\\r\\n\\u202e\n" in said
    assert said.replace("\n", "").isprintable()
    assert b"\x1b" not in (tmp_path / "figures\x1b" / "loss.svg").read_bytes()
    assert cli.main(["plot", str(path), "--labels", "a\nb", "\x1b[2J"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bad_options_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["fit", "--\x1b[31m\nx", "a.csv"], ["\x1b[31m"], ["bench", "--json", "\x1b[31m\n/x"]):
        if arguments[0] == "bench":
            assert cli.main(arguments) == 2
        else:
            with pytest.raises(SystemExit, match="2"):
                cli.main(arguments)
        assert capsys.readouterr().err.replace("\n", "").isprintable()


# Processes. Each costs seconds: it imports torch.


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(60_000):
        if ready():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("it did not begin")


def command(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    # (What runs in the background of a shell ignores Ctrl-C from the start; Python then leaves it so.)
    restored = "import signal, sys, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = restored + "sys.argv = ['zerosum', *sys.argv[1:]]; runpy.run_module('zerosum', run_name='__main__', alter_sys=True)"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], text=True, env=environment, **pipes)


def test_ctrl_c_during_imports_ends_quietly(project_environment: dict[str, str]) -> None:
    process = command(project_environment, "doctor")
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)
    assert (process.returncode, *said) == (130, "", "")


def test_a_run_is_written_by_one_process_and_signals_end_it_well(
    tmp_path: Path, project_environment: dict[str, str], capsys: pytest.CaptureFixture[str], threads: object
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    sizes = {"steps": 100_000, "width": 32, "layers": 1, "sequences": 2, "positions": 8, "threads": 1, "device": "cpu"}
    options = ["demo", "--text", str(text), "--out", str(out), *(word for k, v in sizes.items() for word in (f"--{k}", str(v)))]
    metrics = out / "metrics.jsonl"
    stopped = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = command(project_environment, *options)
        before = metrics.stat().st_size if metrics.exists() else 0
        wait_for(lambda before=before: metrics.exists() and metrics.stat().st_size > before + 300, process)  # type: ignore[misc]
        if number == signal.SIGTERM:
            assert cli.main(options) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"zerosum demo: --out: cannot use {out}: process {process.pid} on ")
            assert error.endswith(" is writing to it\n")
            assert error.count("\n") == 1
        process.send_signal(number)
        said, error = process.communicate(timeout=300)
        assert process.returncode == code
        assert "Traceback" not in error
        assert "The same command goes on from there." in said
        assert not (out / "run.lock").exists()
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        assert steps[-1] > stopped
        assert sorted(set(steps)) == list(range(1, steps[-1] + 1))  # the second went on where the first had stopped
        stopped = steps[-1]
