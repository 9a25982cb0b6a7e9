"""Damaged files for every reader: each is read, or refused by the reader's own error, within bounded memory.

``python -m tests.zerosum.fuzz_readers --count 20000 --seed 0`` draws so many files and prints those that were neither, with their
seeds; ``--count 1 --seed N`` draws one of them again. The process has 4 GB of memory beyond what it starts
with, and a file a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import zerosum
from zerosum.checkpoints import read
from zerosum.curves import CurveError, read_curve
from zerosum.evaluation import TokenData
from zerosum.metrics import Metric
from zerosum.records import RecordFile, encode, record
from zerosum.runs import RunError, read_runs
from zerosum.training.run import Refused, read_checkpoint

MEMORY, SECONDS = 4 << 30, 60


class Reader(NamedTuple):
    """A function of a path, the end of the names of its files, its errors, and whole files to damage."""

    read: Callable[[Path], object]
    suffix: str
    errors: tuple[type[Exception], ...]
    files: tuple[bytes, ...]


def records() -> bytes:
    found = []
    for step in range(1, 9):
        found.append(record("step", step, {"train.loss": Metric(5.0 / step, 64), "train.grad_norm": Metric(1.0, 4)}))
        data = {"name": "held-out", "sequences": 2, "positions": 8, "digest": "aa"}
        of = {"run": "14M", "evaluation": data, "train": data, "examples": "token", "sampled": None, "update": "optimizer"}
        found.append(record("checkpoint", step, {"D_grad": Metric(0.5, 9, 0.9)}, interval=[step - 1, step], **of))
    return "".join(map(encode, found)).encode()


def events() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for step in range(1, 6):
                writer.add_scalar("train/loss", 5.0 / step, step, new_style=step % 2 == 0)
        return next(Path(folder).iterdir()).read_bytes()


def saved(write: Callable[[Path], object], suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        write(path)
        return path.read_bytes()


def report() -> zerosum.Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2))
    with (probe := zerosum.Probe(model, gram=True)):
        model(torch.tensor([[1, 2], [3, 3]])).square().sum().backward()
    return probe.report()


def readers() -> dict[str, Reader]:
    """Every reader by its name; TensorBoard's and those of safetensors where these packages are."""
    steps = np.arange(1, 9)
    losses = 5.0 / steps
    table = "step,loss,lr\n" + "".join(f"{s},{x},0.1\n" for s, x in zip(steps, losses, strict=True))
    objects = [{"step": int(s), "loss": float(x)} for s, x in zip(steps, losses, strict=True)]
    pairs = np.stack((steps, losses), 1)
    named = np.array(list(map(tuple, pairs)), dtype=[("step", "i8"), ("loss", "f8")])
    lines = "".join(json.dumps(entry) + "\n" for entry in objects).encode()
    ids = np.arange(64, dtype=np.int32)
    curve, run = (CurveError,), (CurveError, RunError)
    tokens = b'{"input_ids": [1, 2, 3]}\n{"input_ids": [4]}\n', b'{"text": "some words"}\n{"text": ""}\n'
    checkpoint = {"step": 3, "state": {"model": {"w": torch.arange(6.0)}, "lr": 0.1}}
    npy, npz = lambda x: saved(lambda path: np.save(path, x), ".npy"), lambda save: saved(save, ".npz")
    found = {
        "csv": Reader(read_curve, ".csv", curve, (table.encode(), table.replace(",", ";").encode())),
        "tsv": Reader(read_curve, ".tsv", curve, (table.replace(",", "\t").encode(),)),
        "jsonl": Reader(read_curve, ".jsonl", curve, (lines, records())),
        "json": Reader(
            read_curve, ".json", curve, (json.dumps(objects).encode(), json.dumps({"a": {"step": [1, 2], "loss": [3, 2]}}).encode())
        ),
        "npy": Reader(read_curve, ".npy", curve, (npy(pairs), npy(named), npy(losses))),
        "npz": Reader(
            read_curve,
            ".npz",
            curve,
            (
                npz(lambda path: np.savez(path, step=steps, loss=losses)),
                npz(lambda path: np.savez_compressed(path, step=steps, loss=losses, m=pairs)),
            ),
        ),
        "runs": Reader(lambda path: read_runs([path]), ".jsonl", run, (records(),)),
        "records": Reader(_append, ".jsonl", (ValueError,), (records(),)),
        "tokens.jsonl": Reader(_draw, ".jsonl", (Refused,), tokens),
        "tokens.npy": Reader(_draw, ".npy", (Refused,), (npy(ids), npy(ids.reshape(4, 16)))),
        "tokens.bin": Reader(_draw, ".bin", (Refused,), (ids.astype("<u2").tobytes(),)),
        "checkpoint": Reader(read_checkpoint, ".pt", (Refused,), (saved(lambda path: torch.save(checkpoint, path), ".pt"),)),
        "state dict": Reader(read, ".pt", (Refused,), (saved(lambda path: torch.save({"w": torch.ones(3)}, path), ".pt"),)),
    }
    with suppress(ModuleNotFoundError):
        found["events"] = Reader(read_curve, ".tfevents.1", curve, (events(),))
    try:
        from safetensors.torch import save
    except ModuleNotFoundError:
        return found
    found["safetensors"] = Reader(read, ".safetensors", (Refused,), (save({"w": torch.ones(3), "v": torch.ones(2, 2)}),))
    found["report"] = Reader(zerosum.load_report, ".safetensors", (ValueError,), (saved(report().save, ".safetensors"),))
    return found


def _append(path: Path) -> None:
    with RecordFile(path) as file:
        file.append(record("step", 9, {}))


def _draw(path: Path) -> None:
    TokenData.read(path).draw([1], 3, seed=0, vocab=None)


# What parsers stumble over.
ODD = (
    b"\x00",
    b"\x1b[2J",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b'"\\ud800"',
    "\u202e".encode(),
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 400,
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\n",
    b"\r",
    b'"',
    b",",
    b";",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"-1",
    b"(1000000000000,)",
    b"(1000000, 0)",
    b"|O",
    b"<U9",
    *(struct.pack("<Q", 2**k - 1) for k in (31, 32, 40, 62, 63, 64)),
    struct.pack("<I", 2**32 - 1),
)


def damaged(files: tuple[bytes, ...], seed: int) -> bytes:
    """One of the files, changed in one to four places."""
    rng = random.Random(seed)
    content = bytearray(rng.choice(files))
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        short = min(b, a + 8)
        kind = rng.randrange(8)
        if kind == 0:
            del content[a:]
        elif kind == 1:
            del content[a:short]
        elif kind == 2:
            content[a:a] = content[a:b]
        elif kind == 3:
            content[a:a] = rng.choice(ODD)
        elif kind == 4:
            odd = rng.choice(ODD)
            content[a : a + len(odd)] = odd
        elif kind == 5 and content:
            content[a % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 6:
            digits = [i for i, byte in enumerate(content) if 48 <= byte < 58]
            if digits:
                place = rng.choice(digits)
                content[place : place + 1] = rng.choice((b"-", b"99999", b"0", b"9" * 20, b"null", b"0.5", b"NaN", b'"x"', b"[]"))
        else:
            other = rng.choice(files)
            content[a:b] = other[min(a, len(other)) : b]
    return bytes(content)


def wrong(reader: Reader, path: Path, content: bytes) -> str:
    """What a reader does with a file that it should not do; empty where it reads it, or refuses it on a short line."""
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reader.read(path)
    except reader.errors as error:
        said = str(error)
        return f"{len(said)} characters: {said[:300]}" if len(said) > 2000 else "" if said else "refused without a word"
    except BaseException as error:
        return "".join(traceback.format_exception(error)[-3:])
    return ""


def _hangs(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"longer than {SECONDS} seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    known = readers()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGALRM, _hangs)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + options.count):
            name, reader = list(known.items())[seed % len(known)]
            signal.alarm(SECONDS)
            if said := wrong(reader, Path(folder) / f"file{reader.suffix}", damaged(reader.files, seed)):
                failed += 1
                print(f"--seed {seed}, {name}: {said}")
            signal.alarm(0)
    print(f"{options.count} files of {len(known)} kinds, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
