"""Reads data to measure on: token ids from files, and sequences that a seed selects and a digest identifies.

Files of any size are mapped into memory or read by lines. Only the drawn sequences are held in memory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zerosum.files import lines, open_file, parse, read_bytes
from zerosum.training.run import Refused

DTYPES = ("uint16", "uint32")
# Models of bytes have few other ids. A model with more ids was trained on other tokens.
LARGEST_OF_BYTES = 512
# How many ids to inspect to detect a file's kind.
_LOOKED_AT = 4096
LONGEST_ENTRY = 1 << 26  # bytes of a line of JSON
LARGEST_TEXT = 1 << 28  # bytes of text that a tokenizer gets at once
_FIELDS = ("input_ids", "tokens", "text")
_Tokenizer = tuple[Callable[[str], list[int]], "int | None"]


@dataclass(frozen=True)
class Sample:
    """N sequences: inputs ``x`` and targets ``y``, (N, T) int64, and their name and digest."""

    name: str
    x: Tensor
    y: Tensor
    digest: str

    def to(self, device: torch.device) -> Sample:
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def describe(self) -> dict[str, Any]:
        sequences, positions = self.x.shape
        return {"name": self.name, "sequences": sequences, "positions": positions, "digest": self.digest}


@dataclass(frozen=True)
class TokenData:
    """The tokens of a file in one sequence.

    Attributes:
        path: the file.
        tokens: the ids, (tokens,); mapped into memory if the file stores them in this form.
        of_bytes: whether the tokens are the bytes of text, for models of bytes.
    """

    path: Path
    tokens: np.ndarray
    of_bytes: bool = False

    @classmethod
    def read(cls, path: Path, dtype: str = "uint16", tokenizer: Path | None = None, field: str | None = None) -> TokenData:
        """Open a file. Its suffix determines the format.

        ``.bin`` holds only ids of ``dtype``. ``.npy`` holds integers in one or two dimensions. ``.jsonl`` has an object on each
        line, with a list of ids or a text in ``field`` (by default "input_ids", "tokens" or "text"). Any other file is text.
        Without a tokenizer, the tokens are the bytes of the text, for models of bytes, and each text of JSONL ends with a line
        feed. With ``tokenizer``, a transformers folder, the tokens are the tokenizer's, and each text of JSONL ends with its
        end-of-text token.

        Raises:
            Refused: the file does not have the format of its suffix; the message names the file and the line.
        """
        try:
            open_file(path).close()  # refuses a pipe or a device
            if path.suffix == ".bin":
                return cls(path, _bin(path, dtype))
            if path.suffix == ".npy":
                return cls(path, _npy(path))
            encode = _Encoder(tokenizer)
            if path.suffix == ".jsonl":
                return cls(path, _jsonl(path, encode, field), encode.to_bytes)
            if tokenizer is None:
                return cls(path, _bytes(path), of_bytes=True)
            return cls(path, np.frombuffer(encode(_text(path)), dtype=np.int64))
        except OSError as error:
            raise Refused(f"{path}: cannot read: {error.strerror or error}") from error

    def draw(self, sequences: Sequence[int], positions: int, seed: int, vocab: int | None) -> list[tuple[Tensor, Tensor, str]]:
        """Draw disjoint samples of ``sequences`` sequences each: inputs and targets (N, T), and a digest of both.

        Sequences are windows of T + 1 tokens that do not overlap. Earlier samples do not depend on later ones.

        Raises:
            Refused: the file is too short, has an id outside the vocabulary, or is text for a model whose tokens are not bytes.
        """
        if self.of_bytes and vocab is not None and vocab > LARGEST_OF_BYTES:
            raise Refused(
                f"{self.path}: expected token ids, or --tokenizer to make them of text, for a model with a vocabulary of {vocab}; "
                "got text alone, whose bytes are tokens for models of bytes only"
            )
        length, wanted = positions + 1, sum(sequences)
        windows = len(self.tokens) // length
        if windows < wanted:
            parts = " + ".join(map(str, sequences))
            raise Refused(
                f"{self.path}: expected at least {wanted * length} tokens for {parts} sequences of {length} tokens "
                f"that do not overlap, got {len(self.tokens)}"
            )
        chosen = _choose(windows, wanted, seed)
        rows = np.stack([self.tokens[w * length : (w + 1) * length] for w in chosen]).astype(np.int64)
        wrong = (rows < 0) | (rows >= vocab) if vocab is not None else rows < 0
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            expected = "ids >= 0" if vocab is None else f"ids from 0 to {vocab - 1}, the model's vocabulary"
            place = int(chosen[row]) * length + column
            hint = "; a byte of text is a token here: --tokenizer makes others" if self.of_bytes else ""
            raise Refused(f"{self.path}: expected {expected}, got {rows[row, column]} at token {place}{hint}")
        samples = np.split(rows, np.cumsum(sequences)[:-1])
        return [(torch.from_numpy(s[:, :-1].copy()), torch.from_numpy(s[:, 1:].copy()), _digest(s)) for s in samples]


def _choose(n: int, k: int, seed: int) -> list[int]:
    """Return the first k of 0..n-1 in random order. With the same seed, a longer choice begins with a shorter one."""
    generator = np.random.default_rng(seed)
    moved: dict[int, int] = {}  # the entries of a shuffled list that are not in their place
    chosen = []
    for i in range(k):
        j = int(generator.integers(i, n))
        chosen.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return chosen


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(str(rows.shape).encode() + rows.astype("<i8").tobytes()).hexdigest()[:16]


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise Refused(
            f"{path}: expected {dtype.name} ids of {dtype.itemsize} bytes, got {size} bytes; --dtype says what the ids are"
        )
    return np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype)  # an empty file cannot be mapped


def _bin(path: Path, dtype: str) -> np.ndarray:
    if dtype not in DTYPES:
        raise Refused(f"--dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    tokens = _mapped(path, np.dtype(dtype).newbyteorder("<"))
    first = tokens[:_LOOKED_AT]
    if dtype == "uint16" and len(first) >= 64 and first[::2].any() and not first[1::2].any():
        raise Refused(f"{path}: every second uint16 id is 0, as where ids are of 32 bits: --dtype uint32 says so")
    return tokens


def _bytes(path: Path) -> np.ndarray:
    tokens = _mapped(path, np.dtype(np.uint8))
    if not tokens[:_LOOKED_AT].all():
        raise Refused(f"{path}: expected text, got zero bytes; ids are read from .bin, .npy and .jsonl")
    return tokens


def _npy(path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns about the headers of old or unusual files
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy and its header parser raise errors without a common base class
        raise Refused(f"{path}: not an array of numbers in numpy's format: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        got = f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else "an archive of arrays"
        raise Refused(f"{path}: expected whole numbers in one or two dimensions, got {got}")
    if not tokens.flags.c_contiguous:
        raise Refused(f"{path}: expected an array in C order, got one in Fortran order")
    return tokens.reshape(-1)  # a view of the map


def _text(path: Path) -> str:
    try:
        return read_bytes(path, LARGEST_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(
            f"{path}: expected UTF-8 text for --tokenizer, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None


def _jsonl(path: Path, encode: _Encoder, field: str | None) -> np.ndarray:
    ids = array("q")
    for number, entry in _objects(path):
        where = f"{path}, line {number}"
        if field is None:
            there = [name for name in _FIELDS if name in entry]
            if len(there) != 1:
                raise Refused(f"{where}: expected one of {', '.join(_FIELDS)}, got {_names(entry)}; --field names one")
            field = there[0]
        if field not in entry:
            raise Refused(f"{where}: expected a field {field!r}, got {_names(entry)}")
        value = entry[field]
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise Refused(f"{where}: {field}: expected text, got a lone surrogate, which no UTF-8 has") from None
            ids.frombytes(encode(value, end=True))
        elif isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value):
            ids.extend(value)
        else:
            raise Refused(f"{where}: expected {field} to be a text or a list of token ids, got {json.dumps(value)[:60]}")
    return np.frombuffer(ids, dtype=np.int64)


def _names(entry: dict[str, Any]) -> str:
    return ", ".join(list(entry)[:20])[:200] or "nothing"


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_file(path) as file:
        found = enumerate(lines(file, LONGEST_ENTRY), 1)
        while True:
            try:
                number, line = next(found, (0, b""))
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise Refused(f"{path}: not UTF-8: {error}") from None
            except ValueError as error:
                raise Refused(f"{path}, {error}") from None
            if not line:
                return
            if not text.strip():
                continue
            try:
                entry = parse(text)
            except ValueError as error:
                raise Refused(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(entry, dict):
                raise Refused(f"{path}, line {number}: expected an object, got {text.strip()[:60]}")
            yield number, entry


class _Encoder:
    """Converts text to token ids, as the bytes of an int64 array."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._tokenizer: _Tokenizer | None = None
        self.to_bytes = False  # whether some text was converted to its bytes

    def __call__(self, text: str, end: bool = False) -> bytes:
        if self._folder is None:
            self.to_bytes = True
            return np.frombuffer((text + "\n" * end).encode(), dtype=np.uint8).astype(np.int64).tobytes()
        self._tokenizer = self._tokenizer or _tokenizer(self._folder)  # (files of ids need none)
        encode, last = self._tokenizer
        return np.array([*encode(text), *[last] * (end and last is not None)], dtype=np.int64).tobytes()


def tokenizer_in(folder: Path) -> Path | None:
    """Return the folder if it has a transformers tokenizer, else None."""
    return folder if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")) else None


def _tokenizer(folder: Path) -> _Tokenizer:
    """Return a function from text to ids, and the id that ends a text.

    The definition in ``tokenizer.json`` is used unchanged. transformers would replace it if the folder's ``config.json`` belongs to
    a model with a tokenizer class of its own.
    """
    if not folder.is_dir():
        raise Refused(f"--tokenizer: expected a folder of transformers, got {folder}")
    if (folder / "tokenizer.json").is_file() and importlib.util.find_spec("tokenizers") is not None:
        import tokenizers

        try:
            made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the errors have no common base class
            raise Refused(f"--tokenizer: cannot load {folder / 'tokenizer.json'}: {' '.join(str(error).split())}") from error
        made.no_truncation()
        made.no_padding()
        return lambda text: made.encode(text, add_special_tokens=False).ids, _last_id(folder, made)
    if importlib.util.find_spec("transformers") is None:
        raise Refused("--tokenizer: needs transformers: pip install 'zsl_kernels[checkpoints]'")
    from transformers import AutoTokenizer

    try:
        auto: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the errors have no common base class
        raise Refused(f"--tokenizer: transformers cannot load {folder}: {' '.join(str(error).split())}") from error
    return lambda text: list(auto.encode(text, add_special_tokens=False, verbose=False)), auto.eos_token_id


def _last_id(folder: Path, made: Any) -> int | None:
    """Return the id of the token that ends a text, from the tokenizer's settings or else the model's."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _settings(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (number := made.token_to_id(token)) is not None:
            return int(number)
    number = _settings(folder / "config.json").get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return number if type(number) is int else None


def _settings(path: Path) -> dict[str, Any]:
    """Read a file's JSON object; empty if there is none."""
    try:
        content = parse(read_bytes(path)) if path.is_file() else {}
    except ValueError as error:
        raise Refused(f"{path}: damaged: {error}") from None
    return content if isinstance(content, dict) else {}
