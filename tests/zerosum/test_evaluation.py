"""Data to measure on: what is read from each kind of file, what is drawn from it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from zerosum.evaluation import Sample, TokenData
from zerosum.training.run import Refused

IDS = np.random.default_rng(0).integers(0, 300, size=211)


def write(path: Path, ids: np.ndarray = IDS) -> Path:
    """The ids in a file of the kind that its name says."""
    if path.suffix == ".bin":
        ids.astype("<u4" if "uint32" in path.name else "<u2").tofile(path)
    elif path.suffix == ".npy":
        np.save(path, ids.reshape(1, -1) if "rows" in path.name else ids.astype(np.int32))
    else:
        parts = np.split(ids, [40, 40, 100])  # one of them empty
        path.write_text("".join(json.dumps({"input_ids": part.tolist(), "id": "x"}) + "\n" for part in parts) + "\n")
    return path


@pytest.mark.parametrize("name", ["a.bin", "uint32.bin", "a.npy", "rows.npy", "a.jsonl"])
def test_the_same_ids_in_any_file_are_the_same_data(name: str, tmp_path: Path) -> None:
    data = TokenData.read(write(tmp_path / name), dtype="uint32" if "uint32" in name else "uint16")
    assert np.array_equal(data.tokens, IDS)
    x, y, digest = data.draw([5], 9, seed=3, vocab=300)[0]
    assert digest == TokenData.read(write(tmp_path / "reference.bin")).draw([5], 9, seed=3, vocab=300)[0][2]
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (5, 9)
    assert torch.equal(x[:, 1:], y[:, :-1])


@pytest.mark.parametrize("name", ["a.bin", "a.npy", "a.txt"])
def test_big_files_are_mapped_and_not_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    size = 2**34  # far more than the memory; a sparse file, which takes no place on the disk
    if name == "a.npy":
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(size // 2,)).flush()
    else:
        with path.open("wb") as file:
            file.write(b"text" * 1024 if name == "a.txt" else b"")  # text does not begin with zeros
            file.truncate(size)
    x, _, _ = TokenData.read(path).draw([7], 33, seed=0, vocab=1)[0]
    assert x.shape == (7, 33)


def test_the_bytes_of_text_are_its_tokens(tmp_path: Path) -> None:
    path = tmp_path / "text.md"
    path.write_bytes(content := "naïve “text”\r\n".encode() * 5)
    assert TokenData.read(path).tokens.tobytes() == content
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "naïve"}\n{"text": ""}\n{"text": "b"}\n', encoding="utf-8")
    assert TokenData.read(lines).tokens.tolist() == list("naïve\n\nb\n".encode())


def test_windows_do_not_overlap_and_samples_are_disjoint(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(107))
    data = TokenData.read(path)
    whole = data.draw([4, 6], 9, seed=0, vocab=107)
    rows = torch.cat([torch.cat((x, y[:, -1:]), 1) for x, y, _ in whole])
    assert sorted(rows.flatten().tolist()) == list(range(100))  # every window of ten, once
    assert [digest for _, _, digest in data.draw([4], 9, seed=0, vocab=107)] == [whole[0][2]]
    assert len({data.draw([4], 9, seed=seed, vocab=107)[0][2] for seed in range(20)}) == 20


def test_what_is_drawn_is_fixed() -> None:
    """Seeds name evaluation sets in files that were written before: they must not come to mean others."""
    data = TokenData(Path("a.bin"), np.arange(1000))
    x, _, digest = data.draw([3], 4, seed=7, vocab=None)[0]
    assert x[:, 0].tolist() == [940, 625, 685]
    assert digest == "5ae1a3e086b022b6"


def test_windows_are_drawn_evenly() -> None:
    data = TokenData(Path("a.bin"), np.arange(20))
    counts = np.zeros(10)
    for seed in range(2000):
        counts[data.draw([3], 1, seed, None)[0][0].flatten() // 2] += 1
    assert abs(counts / 2000 - 0.3).max() < 0.05  # five standard errors


def test_a_digest_tells_shapes_apart() -> None:
    tokens = np.zeros(64, dtype=np.int64)
    digests = {TokenData(Path("a"), tokens).draw([n], t, 0, None)[0][2] for n, t in ((2, 5), (3, 3), (4, 2), (1, 11))}
    assert len(digests) == 4


def refusal(path: Path, positions: int = 9, vocab: int | None = None, **how: object) -> str:
    with pytest.raises(Refused) as refused:
        TokenData.read(path, **how).draw([5], positions, 0, vocab)  # type: ignore[arg-type]
    return str(refused.value)


def test_ids_outside_of_the_vocabulary_are_refused_with_their_place(tmp_path: Path) -> None:
    ids = np.arange(50)
    ids[33] = 500
    said = refusal(path := write(tmp_path / "a.bin", ids), vocab=50)
    assert said == f"{path}: expected ids from 0 to 49, the model's vocabulary, got 500 at token 33"
    ids[33] = -4
    np.save(tmp_path / "a.npy", ids)
    assert refusal(tmp_path / "a.npy", vocab=50).endswith("got -4 at token 33")
    assert refusal(tmp_path / "a.npy").endswith("expected ids >= 0, got -4 at token 33")


def test_text_is_bytes_for_models_of_bytes_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 20)
    (tmp_path / "a.jsonl").write_text('{"text": "words words words"}\n' * 5)
    for name in ("a.txt", "a.jsonl"):
        TokenData.read(tmp_path / name).draw([5], 9, 0, 512)
        assert "expected token ids, or --tokenizer to make them of text, for a model with a vocabulary of 50257" in refusal(
            tmp_path / name, vocab=50257
        )
        assert refusal(tmp_path / name, vocab=65).endswith("a byte of text is a token here: --tokenizer makes others")
    (tmp_path / "b.jsonl").write_text('{"tokens": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}\n' * 5)
    TokenData.read(tmp_path / "b.jsonl").draw([5], 9, 0, 50257)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "cannot read: No such file"),
        ("a.txt", b"", "expected at least 50 tokens for 5 sequences of 10 tokens that do not overlap, got 0"),
        ("a.npz", b"PK\0\0" * 20, "expected text, got zero bytes; ids are read from .bin, .npy and .jsonl"),
        ("a.bin", b"\1\2\0\0" * 40, "every second uint16 id is 0, as where ids are of 32 bits: --dtype uint32"),
        ("a.bin", b"", "got 0"),
        ("a.bin", b"123", "expected uint16 ids of 2 bytes, got 3 bytes; --dtype"),
        ("a.npy", b"", "not an array of numbers"),
        ("a.npy", b"text", "not an array of numbers"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl, line 2: expected an object, got [1]"),
        ("a.jsonl", b'{"text": "a"}\n{"words": "a"}\n', "a.jsonl, line 2: expected a field 'text', got words"),
        ("a.jsonl", b'{"words": "a"}\n', "a.jsonl, line 1: expected one of input_ids, tokens, text, got words; --field names one"),
        ("a.jsonl", b'{"text": "a", "tokens": [1]}\n', "line 1: expected one of input_ids, tokens, text, got text, tokens"),
        (
            "a.jsonl",
            b'{"tokens": [1]}\n{"tokens": [1, -1]}\n',
            "line 2: expected tokens to be a text or a list of token ids, got [1, -1]",
        ),
        ("a.jsonl", b'{"tokens": [1, true]}\n', "expected tokens to be a text or a list of token ids"),
        ("a.jsonl", b'{"tokens": 5}\n', "expected tokens to be a text or a list of token ids, got 5"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
    ],
)
def test_files_that_are_not_of_their_kind(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in (found := refusal(tmp_path / name))
    assert found.startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    "array", [np.zeros(60), np.zeros((2, 3, 10), int), np.array([None] * 60), np.asfortranarray(np.zeros((6, 10), int))]
)
def test_arrays_that_are_no_tokens(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    assert any(words in refusal(tmp_path / "a.npy") for words in ("expected whole numbers", "not an array", "in C order"))


def test_a_field_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "words": "bc"}\n')
    assert TokenData.read(tmp_path / "a.jsonl", field="words").tokens.tolist() == list(b"bc\n")


def test_a_sample_says_what_it_is() -> None:
    x = torch.zeros(3, 5, dtype=torch.long)
    assert Sample("val.bin", x, x, "abc").describe() == {"name": "val.bin", "sequences": 3, "positions": 5, "digest": "abc"}


# With a tokenizer.


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<end>", "<unk>", "the", "fox", "naïve"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_tokenizer_makes_the_tokens(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the naïve fox\nthe dog", encoding="utf-8")
    assert TokenData.read(tmp_path / "a.txt", tokenizer=tokenizer).tokens.tolist() == [2, 4, 3, 2, 1]
    (tmp_path / "a.jsonl").write_text('{"text": "the fox"}\n{"text": "fox"}\n')
    assert TokenData.read(tmp_path / "a.jsonl", tokenizer=tokenizer).tokens.tolist() == [2, 3, 0, 3, 0]


def test_what_a_tokenizer_cannot_read(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"the \xff fox")
    assert "expected UTF-8 text for --tokenizer, got byte 0xff at 4" in refusal(tmp_path / "a.txt", tokenizer=tokenizer)
    (tmp_path / "b.txt").write_text("the fox")
    assert "--tokenizer: expected a folder" in refusal(tmp_path / "b.txt", tokenizer=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "--tokenizer: transformers cannot load" in refusal(tmp_path / "b.txt", tokenizer=tmp_path / "empty")
