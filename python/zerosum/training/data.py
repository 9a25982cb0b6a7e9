"""Text as bytes: reading it, holding a part of it out, and drawing batches that depend on a seed and a number only."""

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
# Installed packages are not the standard library, and its tests are mostly tables of odd input.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HELD_OUT_EVERY = 10


def standard_library() -> list[Path]:
    """The Python standard library's own sources on this machine, by name, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if not _SKIPPED.intersection(path.relative_to(root).parts))


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on, disjoint bytes held out, and what identifies them."""

    train: Tensor  # uint8
    held_out: Tensor  # uint8
    files: int
    digest: str

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Corpus:
        """Holds every tenth file out; the last tenth of each where there are fewer than ten.

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
    """Batch ``number`` of ``seed``: inputs and targets (N, T), N windows of the text at random places.

    The same arguments give the same batch, so a resumed run sees what an uninterrupted one would have seen.
    """
    starts = np.random.default_rng((seed, number)).integers(0, len(text) - positions, size=sequences)
    windows = text[torch.from_numpy(starts)[:, None] + torch.arange(positions + 1)].long()
    return windows[:, :-1], windows[:, 1:]
