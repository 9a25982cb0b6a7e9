"""Files that survive: replaced as a whole, written by one process at a time, and read within bounds."""

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
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LONGEST_LINE = 1 << 24  # bytes of one line of a table or of records
LARGEST_JSON = 1 << 26  # bytes of a file that is parsed as a whole: parsed, it takes up to 40 times as much
TEMPORARY = ".new"  # what the names of unfinished files end with
LOCK = "run.lock"  # of a folder

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # of a folder, on some file systems


# Writing -------------------------------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block says which file it is of, which one of writing does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to; at the end of the block that file replaces ``path``, on disk when this returns.

    An error or a crash at any moment leaves the file that was there before.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())  # or a crash might leave the new name with none of the content
        os.replace(new, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        new.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replaces a file of UTF-8 text as a whole, see :func:`replacing`. A lone surrogate, as in a file name that is not UTF-8, is
    written as in JSON: ``\\udc80``."""
    with replacing(path) as new:
        new.write_bytes(text.encode("utf-8", "backslashreplace"))


def _sync_folder(folder: Path) -> None:
    """Puts a folder's names on disk."""
    if os.name == "nt":  # folders cannot be opened there
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
    """The right to write to a file or a folder, which one process has at a time.

    The lock is the operating system's (``flock``): it ends with the process that holds it, however that ends. It is on a file of
    its own, ``run.lock`` in a folder or ``NAME.lock`` beside a file, since the file itself may be replaced. That file names the
    holder, and is removed at the end.

    (The package ``filelock`` locks in the same way, but its lock does not name the holder.)

    Args:
        path: a folder that exists, or a file in such a folder.

    Raises:
        BlockingIOError: another process holds it; ``strerror`` says which one, ``filename`` is ``path``.
        OSError: the lock's file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        own = path / LOCK if path.is_dir() else path.with_name(f"{path.name}.lock")
        while True:
            descriptor = os.open(own, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                _take(descriptor, path)
                # The holder before may have removed the file after it was opened here: the lock would be on nothing.
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
    if os.getpid() == process:  # a forked process has the descriptor, not the lock
        own.unlink(missing_ok=True)
    os.close(descriptor)


# Reading -------------------------------------------------------------------------------------------------------------------------


def open_file(path: Path) -> IO[bytes]:
    """``path.open("rb")`` of a regular file: a pipe or a device would block, or never end.

    Raises:
        OSError: it cannot be read, or is something else; ``strerror`` says what.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a NUL in the name
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
    """The content of a regular file of at most so many bytes.

    Raises:
        OSError: it cannot be read, or is larger.
    """
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"Expected at most {most >> 20} MiB, got more", str(path))
    return content


def lines(file: IO[bytes], most: int = LONGEST_LINE) -> Iterator[bytes]:
    """The lines of a file with their line feeds; the last one may lack it.

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
    """``json.loads``, whose every refusal is a ValueError, on one line."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
