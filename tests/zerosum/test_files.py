"""Files that survive: locks, files that are replaced as a whole, and records that are on disk."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zerosum import files
from zerosum.files import Lock, replace_text, replacing
from zerosum.integrations.measuring import RunFile
from zerosum.records import RecordFile, record
from zerosum.training.run import CHECKSUM, Folder, Refused, RunFolder, read_checkpoint

HOLDER = f"process {os.getpid()} on {socket.gethostname()}"

WRITERS: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda path: Folder(path / "run", {"seed": 0}),
    "a run's folder": lambda path: RunFolder(path / "run", {"seed": 0}),
    "a trainer's folder": lambda path: RunFile(path / "run", {"seed": 0}, 0),
    "a file of records": lambda path: RecordFile(path / "run" / "out.jsonl"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_second_writer_is_refused_by_the_name_of_the_first(kind: str, tmp_path: Path) -> None:
    first = WRITERS[kind](tmp_path)
    with pytest.raises((Refused, BlockingIOError)) as refusal:
        WRITERS[kind](tmp_path)
    assert f"{HOLDER} is writing to it" in str(refusal.value)
    assert str(tmp_path / "run") in str(refusal.value)
    first.close()
    WRITERS[kind](tmp_path).close()
    assert not [path for path in (tmp_path / "run").iterdir() if "lock" in path.name]


def test_a_writer_that_is_dropped_or_refused_releases_its_lock(tmp_path: Path) -> None:
    Folder(tmp_path / "run", {"seed": 0})
    gc.collect()
    for _ in range(2):
        with pytest.raises(Refused, match="seed is 0 there and 1 here"):
            Folder(tmp_path / "run", {"seed": 1})
    (tmp_path / "notes").write_text("mine")
    for _ in range(2):
        with pytest.raises(ValueError, match="not a record"):
            RecordFile(tmp_path / "notes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "run"]


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path, project_environment: dict[str, str]) -> None:
    code = "import sys, pathlib, zerosum.files as f; x = f.Lock(pathlib.Path(sys.argv[1])); print('held', flush=True); input()"
    held = tmp_path / "out.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=project_environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {process.pid} on .* is writing to it") as refusal:
            Lock(held)
        assert refusal.value.filename == str(held)
        process.kill()
    assert (tmp_path / "out.jsonl.lock").exists()  # of the process that was killed
    lock = Lock(held)
    assert (tmp_path / "out.jsonl.lock").read_text() == f"{HOLDER}\n"
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.warns(RuntimeWarning, match="this file system has no locks; let no other process write to it"):
        Lock(tmp_path).release()


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "file")
        fsync(descriptor)

    def replaced(old: Path, new: Path) -> None:
        done.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    replace_text(tmp_path / "report.md", "naïve \udc80")
    assert done == ["file", "replace", "folder"]
    assert (tmp_path / "report.md").read_text() == "naïve \\udc80"
    done.clear()
    with RecordFile(tmp_path / "out.jsonl") as file:
        for step in (1, 2):
            file.append(record("step", step, {}))
            assert done == ["file"] * step
    done.clear()
    with_checkpoint = RunFolder(tmp_path / "run", {})
    done.clear()
    with_checkpoint.append(record("step", 1, {}))
    with_checkpoint.checkpoint(1, {})
    assert done == ["file", "file", "replace", "folder"]  # the records that the checkpoint follows come first
    with_checkpoint.append(record("probe", 1, {}))
    assert done[4:] == ["file"]
    with_checkpoint.close()


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_crash_at_any_moment_leaves_the_file_before(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.md"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def write() -> None:
        with replacing(path) as new:
            new.write_text("half")
            if moment == "write":
                full()

    with monkeypatch.context() as patch:
        if moment != "write":
            patch.setattr(os, moment, full)
        with pytest.raises(OSError, match="No space left") as error:
            write()
    assert error.value.filename == str(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def checkpoint(folder: Path, step: int = 3) -> RunFolder:
    run = RunFolder(folder, {"seed": 0})
    for number in range(run.step + 1, step + 1):
        run.append(record("step", number, {}))
    run.checkpoint(step, {"w": torch.arange(40.0), "rate": 0.5}, keep=True)
    run.close()
    return run


def test_a_checkpoint_that_was_changed_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(Refused, match="damaged"):
            read_checkpoint(path, 3)
    weights = whole.index(torch.arange(40.0).numpy().tobytes()) + 5
    for without, said in ((0, "its checksum differs"), (CHECKSUM, "the checksum of .*data/0 differs")):
        changed = bytearray(whole[: len(whole) - without])
        changed[weights] ^= 1
        if without:
            changed[-2:] = bytes(2)
        path.write_bytes(changed)
        with pytest.raises(Refused, match=rf"\.pt: damaged, .*{said}; delete .* start anew"):
            RunFolder(tmp_path / "run", {"seed": 0})


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_checkpoint_that_was_cut_off_is_refused(size: int, tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Refused, match=r"--out: .*checkpoint\.pt: damaged"):
        RunFolder(tmp_path / "run", {"seed": 0})


def test_a_compressed_checkpoint_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    with pytest.raises(Refused, match="its parts are larger than the file"):
        read_checkpoint(path)


def test_a_checkpoint_of_another_step_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    with pytest.raises(Refused, match=r"checkpoint\.pt: expected the checkpoint of step 2, got 3"):
        read_checkpoint(tmp_path / "run" / "checkpoint.pt", 2)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "metrics": {}}\n')
    with pytest.raises(Refused, match=r"metrics\.jsonl ends at step 1, before its checkpoint's step 3: it is damaged; delete"):
        RunFolder(tmp_path / "run", {"seed": 0})


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt.123.new").write_text("half")
    RunFolder(tmp_path / "run", {"seed": 0}).close()
    assert not list((tmp_path / "run").glob("*.new"))
