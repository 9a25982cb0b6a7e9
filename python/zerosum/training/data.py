"""Reads text as bytes, holds a part of it out, and draws batches that depend only on a seed and a number."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zerosum.files import open_file

VOCAB = 256
# Installed packages are not part of the standard library, and its tests are mostly tables of odd input.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HELD_OUT_EVERY = 10


def standard_library() -> list[Path]:
    """Return the paths of the Python standard library's sources on this machine, sorted by name, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if not _SKIPPED.intersection(path.relative_to(root).parts))


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on, disjoint held-out bytes, and an identifier of both."""

    train: Tensor  # uint8
    held_out: Tensor  # uint8
    files: int
    digest: str

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Corpus:
        """Read files, and hold out every tenth file. With fewer than ten files, hold out the last tenth of each.

        Raises:
            OSError: a file cannot be read.
        """
        texts = [_content(path) for path in paths]
        digest = hashlib.sha256()
        for text in texts:
            digest.update(len(text).to_bytes(8, "little") + text)
        if len(texts) >= _HELD_OUT_EVERY:
            held_out = texts[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
            train = [text for index, text in enumerate(texts, 1) if index % _HELD_OUT_EVERY]
        else:
            cuts = [len(text) - len(text) // _HELD_OUT_EVERY for text in texts]
            train = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
            held_out = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
        return cls(_tensor(train), _tensor(held_out), len(texts), digest.hexdigest()[:16])


def _content(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()


def _tensor(texts: list[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(texts), dtype=np.uint8).copy())


def draw(text: Tensor, sequences: int, positions: int, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Draw batch ``number`` of ``seed``: inputs and targets (N, T), from N windows at random places in the text.

    The same arguments give the same batch, so a resumed run sees the same batches as an uninterrupted one.
    """
    starts = np.random.default_rng((seed, number)).integers(0, len(text) - positions, size=sequences)
    windows = text[torch.from_numpy(starts)[:, None] + torch.arange(positions + 1)].long()
    return windows[:, :-1], windows[:, 1:]
