"""Handles files safely: replaces them as a whole, lets one process at a time write, and reads within bounds."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LONGEST_LINE = 1 << 24  # bytes of one line of a table or of records
LARGEST_JSON = 1 << 26  # bytes of a file that is parsed as a whole, which takes up to 40 times as much memory
TEMPORARY = ".new"  # the suffix of unfinished files
LOCK = "run.lock"  # the lock file of a folder

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # errors of folders on file systems that cannot sync them


# Writing -------------------------------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError in the block, because errors of writing lack it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to. At the end of the block that file replaces ``path``, and is on disk when this returns.

    An error or a crash at any moment leaves the previous file.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a crash might leave the new name without the content
        os.replace(new, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        new.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace a file of UTF-8 text as a whole, see :func:`replacing`.

    A lone surrogate, as in a file name that is not UTF-8, is written as in JSON: ``\\udc80``.
    """
    with replacing(path) as new:
        new.write_bytes(text.encode("utf-8", "backslashreplace"))


def _sync_folder(folder: Path) -> None:
    """Write a folder's names to disk."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


class Lock:
    """An exclusive right, held by one process at a time, to write to a file or folder.

    The operating system keeps the lock (``flock``), so it ends with the process that holds it, even if that process is killed. The
    lock is on a separate file, because the locked file itself may be replaced: ``run.lock`` in a folder, or ``NAME.lock`` beside a
    file. This lock file names the holder, and is removed at the end.

    (The package ``filelock`` locks in the same way, but its lock does not name the holder.)

    Args:
        path: an existing folder, or a file in an existing folder.

    Raises:
        BlockingIOError: another process holds the lock; ``strerror`` says which one, ``filename`` is ``path``.
        OSError: the lock file cannot be created.
    """

    def __init__(self, path: Path) -> None:
        own = path / LOCK if path.is_dir() else path.with_name(f"{path.name}.lock")
        while True:
            descriptor = os.open(own, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                _take(descriptor, path)
                # The previous holder may have removed the file after this process opened it. A lock on that file would be useless.
                if _same(descriptor, own):
                    holder = f"process {os.getpid()} on {socket.gethostname()}\n"
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, holder.encode("utf-8", "replace"))
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        self._release = weakref.finalize(self, _release, descriptor, own, os.getpid())

    def release(self) -> None:
        self._release()


def _take(descriptor: int, path: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no flock")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
        raise BlockingIOError(errno.EWOULDBLOCK, f"{holder} is writing to it", str(path)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{path}: this file system has no locks; let no other process write to it", RuntimeWarning, stacklevel=3)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _release(descriptor: int, own: Path, process: int) -> None:
    if os.getpid() == process:  # a forked process has the descriptor, but not the lock
        own.unlink(missing_ok=True)
    os.close(descriptor)


# Reading -------------------------------------------------------------------------------------------------------------------------


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file for reading, as ``path.open("rb")``; refuse a pipe or a device, which would block or never end.

    Raises:
        OSError: the file cannot be read, or is not a regular file; ``strerror`` says what it is.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # the name contains a NUL
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            kind = "a pipe" if stat.S_ISFIFO(mode) else "a device"
            raise OSError(errno.EINVAL, f"Expected a regular file, got {kind}", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, most: int = LARGEST_JSON) -> bytes:
    """Read a regular file of at most ``most`` bytes.

    Raises:
        OSError: the file cannot be read, or is larger.
    """
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"Expected at most {most >> 20} MiB, got more", str(path))
    return content


def lines(file: IO[bytes], most: int = LONGEST_LINE) -> Iterator[bytes]:
    """Yield the lines of a file with their line feeds; the last line may lack it.

    Raises:
        ValueError: a line is longer than ``most`` bytes; the message has its number.
    """
    number = 0
    while line := file.readline(most + 1):
        number += 1
        if len(line) > most:
            raise ValueError(f"line {number}: expected at most {most >> 20} MiB, got more")
        yield line


def parse(text: str | bytes) -> Any:
    """Parse JSON like ``json.loads``, but raise a one-line ValueError for any invalid input."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
