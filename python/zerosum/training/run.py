"""Manages a run's folder: its configuration, records and checkpoint, which are readable at any time and let the run resume.

``config.json`` describes the run. ``metrics.jsonl`` (see :mod:`zerosum.records`) only grows, one line at a time. ``checkpoint.pt``
is replaced as a whole. ``checkpoints`` has the checkpoints that the user asked to keep. Only one process at a time writes to the
folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from zerosum.files import LOCK, TEMPORARY, Lock, open_file, parse, read_bytes, replace_text, replacing
from zerosum.records import Record, RecordFile

KEPT = "checkpoints"  # the folder of kept checkpoints
SIGNED = b"zerosum sha256 "  # the beginning of the comment in a checkpoint's archive
CHECKSUM = len(SIGNED) + 64  # length of the comment in bytes


class Refused(Exception):
    """Tells the user why a run cannot start or continue."""


def fingerprint(config: Mapping[str, Any]) -> str:
    """Return a short name for a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describe for the user how two configurations differ. The text is empty if they are equal."""
    keys = sorted(there.keys() | here.keys())
    differing = [key for key in keys if there.get(key) != here.get(key)]
    return "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in differing)


def read_checkpoint(path: Path, step: int | None = None) -> dict[str, Any]:
    """Read ``{"step": ..., "state": ...}``, as :meth:`RunFolder.checkpoint` wrote it, to the CPU.

    Args:
        path: the file.
        step: the step that the checkpoint should have, if known.

    Raises:
        Refused: the checkpoint is damaged or has another step; the message names the file.
        OSError: the file cannot be read.
    """
    with open_file(path) as file:
        try:
            _check_sums(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle raises whatever its code raises
            said = " ".join(str(error).split()) or type(error).__name__
            raise Refused(f"{path}: damaged, or not a checkpoint of `zerosum demo`: {said[:200]}") from error
    if not isinstance(content, dict) or content.keys() != {"step", "state"} or type(content["step"]) is not int:
        raise Refused(f"{path}: not a checkpoint of `zerosum demo`: expected a step and a state")
    if step is not None and content["step"] != step:
        raise Refused(f"{path}: expected the checkpoint of step {step}, got {content['step']}: the file was replaced or renamed")
    return content


def _check_sums(file: IO[bytes]) -> None:
    """Verify a checkpoint's checksum and the CRC-32 of each of its parts, which ``torch.load`` does not verify.

    Raises:
        ValueError, zipfile.BadZipFile: a checksum differs, or parts are compressed or overlap, which ``torch.save`` never does.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - CHECKSUM, 0))
    comment = file.read()
    file.seek(0)
    signed = comment == _signature(file, size - CHECKSUM)
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if not signed and archive.comment:  # files of older versions have no checksum
            raise ValueError("its checksum differs")
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
            raise ValueError("its parts are larger than the file")
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {bad} differs")
    file.seek(0)


def _signature(file: IO[bytes], size: int) -> bytes:
    """Compute the comment that signs the next ``size`` bytes of the file."""
    digest = hashlib.sha256()
    while size > 0 and (part := file.read(min(size, 1 << 20))):
        digest.update(part)
        size -= len(part)
    return SIGNED + digest.hexdigest().encode()


def _sign(content: io.BytesIO) -> None:
    """Add a checksum to a file of ``torch.save``, as the comment at the end of the zip archive.

    Readers of the archive ignore the comment.
    """
    size = content.seek(-2, io.SEEK_END) + 2
    content.write(struct.pack("<H", CHECKSUM))  # the comment's length, which was 0
    content.seek(0)
    content.write(_signature(content, size))


class Folder:
    """Opens ``path`` for the run or runs that ``config`` describes: a new folder, or the folder of the same configuration.

    Raises:
        Refused: the folder holds another run or something else, cannot be used, or another process writes to it.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(path)
            try:
                self._claim(config)
                self._open()
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise Refused(f"--out: cannot use {path}: {error.strerror or error}") from error

    def write(self, name: str, text: str) -> None:
        """Replace a text file as a whole."""
        replace_text(self.path / name, text)

    def close(self) -> None:
        """Release the folder, so that other processes can write to it."""
        self._lock.release()

    def _open(self) -> None:
        """Read the rest of a folder whose configuration matches."""

    def _claim(self, config: Mapping[str, Any]) -> None:
        """Write the configuration into a new folder, or compare it with the existing one."""
        file = self.path / "config.json"
        if not file.exists():
            if any(entry.suffix != TEMPORARY and entry.name != LOCK for entry in self.path.iterdir()):
                raise Refused(f"--out: {self.path} has files in it that are not of a run; choose another folder")
            self.write(file.name, json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n")
        else:
            try:
                differing = differences(parse(read_bytes(file)), config)
            except (ValueError, AttributeError):
                raise Refused(f"--out: {file} is not the configuration of a run; choose another folder") from None
            if differing:
                raise Refused(f"--out: {self.path} holds another run, which these options cannot resume: {differing}")
        for unfinished in self.path.glob(f"*{TEMPORARY}"):  # left over from a process that was killed
            unfinished.unlink()


class RunFolder(Folder):
    """The folder of one run.

    Attributes:
        step: the last completed step, 0 for a new run. Records of steps after the checkpoint are dropped.
        state: the checkpoint's state, None for a new run.
    """

    def _open(self) -> None:
        checkpoint = self._load()
        self.step: int = checkpoint["step"] if checkpoint else 0
        self.state: dict[str, Any] | None = checkpoint["state"] if checkpoint else None
        try:
            self._file = RecordFile(self.metrics, lock=False)
        except ValueError as error:
            raise Refused(f"--out: {error}: it is damaged; delete {self.path} to start anew") from None
        self._file.keep_up_to(self.step)
        if self.step and (last := max((entry["step"] for entry in self.records), default=0)) < self.step:
            self._file.close()
            raise Refused(
                f"--out: {self.metrics} ends at step {last}, before its checkpoint's step {self.step}: it is damaged; "
                f"delete {self.path} to start anew"
            )

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def records(self) -> list[Record]:
        """All records so far."""
        return self._file.records

    def append(self, entry: Record) -> None:
        """Add a record.

        The record is on disk when this returns, except the records of single steps: these reach the disk by the next checkpoint,
        from which a run resumes.
        """
        self._file.append(entry, sync=entry["kind"] != "step")

    def checkpoint(self, step: int, state: Mapping[str, Any], keep: bool = False) -> None:
        """Replace the checkpoint, and keep a copy if ``keep`` is set. An interruption leaves the previous checkpoint."""
        content = io.BytesIO()  # on a full disk, torch.save raises a RuntimeError instead of an OSError
        torch.save({"step": step, "state": dict(state)}, content)
        _sign(content)
        self._file.sync()
        if keep:
            kept = self.path / KEPT / f"step-{step:06d}.pt"
            kept.parent.mkdir(exist_ok=True)
            _write(kept, content)
        _write(self.path / "checkpoint.pt", content)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _load(self) -> dict[str, Any] | None:
        file = self.path / "checkpoint.pt"
        if not file.exists():
            return None
        try:
            return read_checkpoint(file)
        except Refused as refusal:
            raise Refused(f"--out: {refusal}; delete {self.path} to start anew") from None


def _write(path: Path, content: io.BytesIO) -> None:
    with replacing(path) as new:
        new.write_bytes(content.getbuffer())
