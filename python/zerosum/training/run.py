"""A run's folder: its configuration, its records and its checkpoint, readable at every moment and resumable.

``config.json`` says what the run is; ``metrics.jsonl`` (see :mod:`zerosum.records`) only grows, a line at a time;
``checkpoint.pt`` is replaced as a whole; ``checkpoints`` has those that were asked to be kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from zerosum import records
from zerosum.records import Record

KEPT = "checkpoints"  # the folder of those that are not replaced


class Refused(Exception):
    """Why a run cannot start or go on, for the user to read."""


def fingerprint(config: Mapping[str, Any]) -> str:
    """A short name for a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What two configurations do not share, for the user to read; empty where they are the same."""
    keys = sorted(there.keys() | here.keys())
    differing = [key for key in keys if there.get(key) != here.get(key)]
    return "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in differing)


class Folder:
    """Opens ``path`` for what ``config`` describes, one run or several: a new folder, or the same one again.

    Raises:
        Refused: the folder holds another run, or something else, or cannot be used.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        try:
            self._claim(config)
            self._open()
        except OSError as error:
            raise Refused(f"--out: cannot use {path}: {error.strerror or error}") from error

    def write(self, name: str, text: str) -> None:
        """Replaces a text file as a whole."""
        records.replace_text(self.path / name, text)

    def _open(self) -> None:
        """What else there is to read of a folder that is ours."""

    def _claim(self, config: Mapping[str, Any]) -> None:
        """Writes the configuration into a new folder, or compares it with the one that is there."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "config.json"
        if not file.exists():
            if any(entry.suffix != ".new" for entry in self.path.iterdir()):
                raise Refused(f"--out: {self.path} has files in it that are not of a run; choose another folder")
            self.write(file.name, json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n")
            return
        try:
            differing = differences(json.loads(file.read_text(encoding="utf-8")), config)
        except (ValueError, AttributeError):
            raise Refused(f"--out: {file} is not the configuration of a run; choose another folder") from None
        if differing:
            raise Refused(f"--out: {self.path} holds another run, which these options cannot resume: {differing}")


class RunFolder(Folder):
    """One run's folder.

    Attributes:
        step: the last step that is done, 0 for a new run. Records of later steps, which no checkpoint knows, are dropped.
        records: what was measured up to it.
        state: the checkpoint's state, None for a new run.
    """

    def _open(self) -> None:
        checkpoint = self._load()
        self.step: int = checkpoint["step"] if checkpoint else 0
        self.state: dict[str, Any] | None = checkpoint["state"] if checkpoint else None
        self.records: list[Record] = self._keep_up_to(self.step)
        self._file: TextIO = self.metrics.open("a", encoding="utf-8")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def append(self, entry: Record) -> None:
        """Adds a record, on disk when this returns."""
        line = records.encode(entry)
        with records.naming(self.metrics):
            self._file.write(line)
            self._file.flush()
        self.records += records.decode([line])

    def checkpoint(self, step: int, state: Mapping[str, Any], keep: bool = False) -> None:
        """Replaces the checkpoint, and keeps a copy if asked; an interruption leaves the one before."""
        new = self.path / "checkpoint.pt.new"
        content = io.BytesIO()  # torch.save itself makes a RuntimeError of a full disk's OSError
        torch.save({"step": step, "state": dict(state)}, content)
        with records.naming(new):
            new.write_bytes(content.getbuffer())
        if keep:
            kept = self.path / KEPT / f"step-{step:06d}.pt"
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(new, kept.with_suffix(".new"))
            os.replace(kept.with_suffix(".new"), kept)
        os.replace(new, self.path / "checkpoint.pt")

    def close(self) -> None:
        with records.naming(self.metrics):  # it tries again what could not be written
            self._file.close()

    def _load(self) -> dict[str, Any] | None:
        file = self.path / "checkpoint.pt"
        if not file.exists():
            return None
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            raise Refused(f"--out: {file} is damaged; delete {self.path} to start anew") from None

    def _keep_up_to(self, step: int) -> list[Record]:
        if not self.metrics.exists():
            return []
        with self.metrics.open(encoding="utf-8") as file:
            try:
                kept = [entry for entry in records.decode(file) if entry["step"] <= step]
            except (ValueError, KeyError):
                raise Refused(f"--out: {self.metrics} is damaged; delete {self.path} to start anew") from None
        self.write(self.metrics.name, "".join(map(records.encode, kept)))
        return kept
