"""Peak memory of a pass beyond what was held before it.

On a CUDA device the allocator counts. On a CPU each way runs in a process of its own, and the mark is the process's: VmHWM, for
getrusage's ru_maxrss also remembers the process that started this one. Where there is no /proc it must do. The processes are forked
from one that has imported everything and computed nothing, which takes no time; memory that one of them lacks ends no other.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zerosum.bench.timing import wait

if TYPE_CHECKING:
    from zerosum.bench.cases import Case

STATUS = Path("/proc/self/status")
# glibc keeps freed blocks below a threshold, which grows to 32 MB with what is freed, and a peak then has the gaps between them in
# it, which come out differently each time. With a fixed threshold they go back: the peak is what was held, to a megabyte or two.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


class OutOfMemory(Exception):
    """A way needs more memory than there is."""


def peak() -> int:
    """The process's high-water mark, in bytes."""
    if STATUS.exists():
        return _status("VmHWM")
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held() -> int:
    """What the process holds now, in bytes; where there is no /proc, its high-water mark."""
    return _status("VmRSS") if STATUS.exists() else peak()


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


def on_cuda(run: Callable[[], object]) -> int:
    """Bytes that a pass allocates at most beyond what is held."""
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    wait()
    return torch.cuda.max_memory_allocated() - before


class Forks:
    """The process that forks the others. Closing ends it, and what it has started."""

    def __init__(self, threads: int) -> None:
        command = [sys.executable, "-c", "from zerosum.bench.memory import serve; serve()", str(threads)]
        environment = {**os.environ, **RETURNING, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # A session of its own: Ctrl-C is for the process that was started by hand.
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def peak(self, case: Case[Any], way: str) -> int:
        """Bytes of a pass.

        Raises:
            OutOfMemory: the process was ended for what it took.
            RuntimeError: the pass failed; the message says how.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(pickle.dumps((case, way)))
        self._process.stdin.flush()
        found = pickle.load(self._process.stdout)
        if found is None:
            raise OutOfMemory("out of memory")
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def serve() -> None:
    """Answers requests from standard input, a process for each, until there are no more."""
    from zerosum.bench.peers import PEERS  # with all ways and cases, before the forks

    for package in {way.package for way in PEERS}:
        with suppress(Exception):  # each may raise any; the way that needs it will say so
            importlib.import_module(package)
    answers = sys.stdout.buffer
    while True:
        try:
            case, way = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if not (child := os.fork()):
            answers.write(pickle.dumps(_answer(case, way, int(sys.argv[1]))))
            answers.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            answers.write(pickle.dumps(None))
            answers.flush()


def _answer(case: Case[Any], name: str, threads: int) -> int | str:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    way = case.way(name)
    try:
        way.start(case.small().make("cpu"))()()  # threads, libraries and their buffers
        run = way.start(case.make("cpu"))
        before = held()
        for _ in range(2 if way.settling else 1):
            run()
        return peak() - before
    except Exception as error:
        return reason(error)


def reason(error: BaseException) -> str:
    """In one line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
