"""Files that are broken, or made to take all memory: every reader refuses them by its own error, within bounds."""

from __future__ import annotations

import io
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import zerosum
from tests.zerosum.fuzz_readers import Reader, damaged, readers, saved, wrong
from zerosum import cli
from zerosum.curves import CurveError, read_curve
from zerosum.evaluation import TokenData
from zerosum.records import encode
from zerosum.runs import RunError, read_runs
from zerosum.training.run import Refused

READERS = readers()
MOST = 256 << 20  # bytes that a reader may take for one of these files


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    for content in reader.files:
        path = tmp_path / f"whole{reader.suffix}"
        path.write_bytes(content)
        reader.read(path)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """A few of those that ``make fuzz`` draws."""
    reader = READERS[name]
    for seed in range(60):
        content = damaged(reader.files, seed)
        assert not (said := wrong(reader, tmp_path / f"file{reader.suffix}", content)), f"seed {seed}: {said}"


def test_the_fuzz_finds_a_reader_that_lets_errors_through(tmp_path: Path) -> None:
    careless = Reader(lambda path: json.loads(path.read_text()), ".json", (CurveError,), READERS["json"].files)
    assert any(wrong(careless, tmp_path / "file.json", damaged(careless.files, seed)) for seed in range(20))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "nothing", "NUL"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = tmp_path / f"it{reader.suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "NUL":
        path = tmp_path / f"a\0b{reader.suffix}"
    if name == "records" and kind == "nothing":  # it is there to be written
        reader.read(path)
        return
    with pytest.raises((*reader.errors, OSError)) as refusal:
        reader.read(path)
    assert str(refusal.value)


def bomb(dtype: str, count: int) -> Callable[[Path], Path]:
    """An .npz file of zeros, a thousandth of the size of what is in it."""

    def write(folder: Path) -> Path:
        path = folder / "bomb.npz"
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"shape": (count,), "fortran_order": False, "descr": dtype})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("loss.npy", "w", force_zip64=True) as member:
            member.write(head.getvalue())
            size = count * np.dtype(dtype).itemsize
            for _ in range(size >> 20):
                member.write(bytes(1 << 20))
            member.write(bytes(size & ((1 << 20) - 1)))
        return path

    return write


def header(shape: object, dtype: object = "<f8", suffix: str = ".npy") -> Callable[[Path], Path]:
    """A file in numpy's format that declares what it does not have."""

    def write(folder: Path) -> Path:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"shape": shape, "fortran_order": False, "descr": dtype})
        content = head.getvalue() + bytes(64)
        path = folder / f"lying{suffix}"
        if suffix == ".npz":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("loss.npy", content)
        else:
            path.write_bytes(content)
        return path

    return write


def sparse(name: str, start: bytes = b"", size: int = 1 << 33) -> Callable[[Path], Path]:
    """One line of 8 GB, which takes no place on the disk."""

    def write(folder: Path) -> Path:
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)
        return folder / name

    return write


def text(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return write


def event(length: int, content: bytes = b"", start: bytes = b"") -> Callable[[Path], Path]:
    """An event file that ends with a record of a declared length, whose checksum is right."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    def write(folder: Path) -> Path:
        head = struct.pack("<Q", length)
        record = head + struct.pack("<I", masked_crc32c(head)) + content + struct.pack("<I", masked_crc32c(content))
        return text("events.out.tfevents.1", start + record)(folder)

    return write


def large_tensor(folder: Path) -> Path:
    """An event whose few bytes declare a tensor of 10^12 numbers."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

    tensor = TensorProto(dtype=1, float_val=[1.0])
    tensor.tensor_shape.dim.add(size=10**12)
    found = Event(step=1)
    found.summary.value.add(tag="loss", tensor=tensor)
    content = found.SerializeToString()
    return event(len(content), content)(folder)


TOO_MANY = "expected at most 5,000,000 values"
NESTED = "[" * 100_000
OBJECTS = '{"a":' * 100_000
NUMBER = "9" * 400
FINITE = "expected a finite number"
LOSS = '{"step": 1, "loss": 3}\n'

CURVES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "npz of 80 MB in 80 KB": (bomb("<f8", 10**7), TOO_MANY),
    "npy of 8 TB": (header((10**12,)), TOO_MANY),
    "npy of rows of nothing": (header((10**12, 0)), TOO_MANY),
    "npy of nothing of rows": (header((0, 10**12)), TOO_MANY),
    "npy of large numbers": (header((1,), "<U500000000"), TOO_MANY),
    "npy of objects": (header((1,), "|O"), "Object arrays cannot be loaded"),
    "npy that is cut off": (header((1000,)), "Failed to read all data for array"),
    "npz of 8 TB": (header((10**12,), suffix=".npz"), TOO_MANY),
    "npz that is cut off": (header((1000,), suffix=".npz"), "EOF: reading array data"),
    "npz that is none": (text("a.npz", b"PK"), "File is not a zip file"),
    "npz of 8 GB": (sparse("a.npz"), "expected at most 128 MiB"),
    "csv of one line": (sparse("a.csv", b"step,loss\n"), "line 2: expected at most 16 MiB"),
    "tsv of one line": (sparse("a.tsv"), "line 1: expected at most 16 MiB"),
    "csv of a long value": (text("a.csv", f"step,loss\n1,{'9' * 200_000}\n"), "field larger than field limit"),
    "csv with NUL": (text("a.csv", "step,loss\n1,\x002\n"), r'line 2: loss: expected a finite number, got "\u00002"'),
    "csv of columns that are one": (
        text("a.csv", "step,loss,loss\n1,2,3\n"),
        "expected different names of columns, got 'loss' twice",
    ),
    "csv with semicolons": (text("a.csv", "step;loss\n1;2,5\n"), 'line 2: loss: expected a finite number, got "2,5"'),
    "jsonl of one line": (sparse("a.jsonl"), "line 1: expected at most 16 MiB"),
    "jsonl of arrays": (text("a.jsonl", f"{NESTED}\n"), "line 1: expected JSON: nested too deeply"),
    "jsonl of objects": (text("a.jsonl", f"{OBJECTS}\n"), "line 1: expected JSON: nested too deeply"),
    "jsonl of long names": (text("a.jsonl", json.dumps({"a" * 2000: 1}) + "\n"), "expected names of at most 1000 characters"),
    "jsonl of deep names": (
        text("a.jsonl", '{"a":' * 40 + "1" + "}" * 40 + "\n"),
        "1000 characters and 30 levels",
    ),
    "jsonl of a long number": (
        text("a.jsonl", f'{LOSS}{{"step": 2, "loss": {NUMBER}}}\n'),
        f"line 2: loss: {FINITE}",
    ),
    "jsonl of a long step": (text("a.jsonl", f'{LOSS}{{"step": {NUMBER}, "loss": 2}}\n'), f"line 2: step: {FINITE}"),
    "jsonl of a step that is NaN": (
        text("a.jsonl", f'{LOSS}{{"step": NaN, "loss": 2}}\n'),
        f"line 2: step: {FINITE}",
    ),
    "json of 8 GB": (sparse("a.json"), "cannot be read: Expected at most 64 MiB, got more"),
    "json of arrays": (text("a.json", NESTED), "expected JSON: nested too deeply"),
    "json of a long number": (text("a.json", f"[[1, {NUMBER}]]"), "row 0: loss: expected a finite number"),
    "json of a lone surrogate": (text("a.json", '{"\\ud800": [1]}'), "no column looks like a loss"),
    "events of 2^63 bytes": (event(2**63), "event 1: expected at most 64 MiB, got 9223372036854775808 bytes"),
    "events of a large tensor": (large_tensor, "no column looks like a loss"),
}


@pytest.mark.parametrize("case", CURVES)
def test_curves_are_refused_within_bounds(case: str, tmp_path: Path) -> None:
    write, said = CURVES[case]
    if case.startswith("events"):
        pytest.importorskip("tensorboard")
    refused(read_curve, write(tmp_path), (CurveError,), said)


def refused(read: Callable[[Path], object], path: Path, errors: tuple[type[Exception], ...], said: str) -> None:
    """One line that names the file, and no more memory than ``MOST``."""
    tracemalloc.start()
    try:
        with pytest.raises(errors) as refusal:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert peak < MOST


def test_columns_with_semicolons_are_read(tmp_path: Path) -> None:
    for name, content in (("a.csv", "step;when;loss\n1;1,5;3\n2;1,6;2.5\n"), ("b.tsv", "step;loss\n1;3\n2;2.5\n")):
        steps, losses = read_curve(text(name, content)(tmp_path))
        assert (steps.tolist(), losses.tolist()) == ([1, 2], [3, 2.5])


def test_an_archive_is_read_without_its_other_arrays(tmp_path: Path) -> None:
    """Weights beside the losses may be as large as they are."""
    path = tmp_path / "all.npz"
    path.write_bytes(saved(lambda to: np.savez(to, loss=[3.0, 2.0]), ".npz"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w.npy", header((10**6, 10**6))(tmp_path).read_bytes())
    assert read_curve(path)[1].tolist() == [3, 2]


NUMBERS = "line 1: metrics: train.loss: expected numbers"
NO_RUN = '{"kind": "checkpoint", "step": 1, "metrics": {}, "update": []}\n'
RECORD = {"kind": "step", "step": 1, "metrics": {"train.loss": {"value": 2.0, "n": 4, "null": None}}}


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (sparse("a.jsonl", b"\n"), "expected at most 256 MiB"),
        (sparse("a.jsonl", size=1 << 27), "line 1: expected at most 16 MiB"),
        (text("a.jsonl", encode(RECORD) + NESTED + "\n"), "line 2: expected JSON: nested too deeply"),
        (text("a.jsonl", encode({**RECORD, "step": 10**400})), "line 1: step: expected a whole number >= 0"),
        (text("a.jsonl", encode(RECORD).replace("2.0", NUMBER)), NUMBERS),
        (text("a.jsonl", encode(RECORD).replace('"n": 4', '"n": NaN')), NUMBERS),
        (
            text("a.jsonl", '{"kind": "checkpoint", "step": 1, "metrics": {}, "update": []}\n'),
            "line 1: run: expected a name, got null",
        ),
    ],
)
def test_runs_are_refused_within_bounds(write: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    refused(lambda path: read_runs([path]), write(tmp_path), (CurveError, RunError), said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[1]", "expected a JSON object"),
        (NESTED, "nested too deeply"),
        ('{"update": []}', "update: expected one of null, "),
        ("", "JSON"),
    ],
)
def test_a_runs_configuration_is_checked(config: str, said: str, tmp_path: Path) -> None:
    text("metrics.jsonl", encode({**RECORD, "kind": "probe"}))(tmp_path)
    path = text("config.json", config)(tmp_path)
    refused(lambda path: read_runs([path.parent]), path, (RunError,), said)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (header((10**12,), "<i4"), "not an array of numbers"),
        (header((-5,), "<i4"), "not an array of numbers"),
        (header((10**12, 0), "<i4"), "expected at least 4 tokens"),
        (bomb("<i4", 10**6), "expected text, got zero bytes"),
        (sparse("a.jsonl"), "line 1: expected at most 64 MiB"),
        (text("a.jsonl", NESTED), "line 1: not JSON: nested too deeply"),
        (text("a.jsonl", f'{{"input_ids": [{NUMBER}]}}'), "line 1: expected input_ids to be a text or a list of token ids"),
        (text("a.jsonl", '{"text": "\\ud800"}'), "line 1: text: expected text, got a lone surrogate"),
        (text("a.bin", b"\1\2\3"), "expected uint16 ids of 2 bytes, got 3 bytes"),
    ],
)
def test_tokens_are_refused_within_bounds(write: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    refused(lambda path: TokenData.read(path).draw([1], 3, seed=0, vocab=None), write(tmp_path), (Refused,), said)


@pytest.mark.parametrize(
    "head",
    [
        b"{" * 10,
        b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"v":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"__metadata__":{"zerosum_report":"' + NESTED.encode() + b'"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"zerosum_report":"[1]"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
@pytest.mark.parametrize("length", [None, 2**40, 2**63])
def test_reports_are_refused_within_bounds(head: bytes, length: int | None, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + bytes(4))
    refused(zerosum.load_report, path, (ValueError,), "is broken, or is no report")


def test_a_report_of_other_sizes_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "report.safetensors"
    path.write_bytes(READERS["report"].files[0])
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name in ("1.weight/l1", "1.weight/abs_sum", "other"):
        save_file(tensors | {name: torch.ones(1)}, path, about)
        with pytest.raises(ValueError, match=f"is broken, or is no report: .*{name}"):
            zerosum.load_report(path)


@pytest.mark.parametrize("command", ["fit", "plot"])
def test_a_command_refuses_in_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    os.mkfifo(tmp_path / "pipe.csv")
    for path, said in (
        (header((10**12,))(tmp_path), TOO_MANY),
        (text("a.json", NESTED)(tmp_path), "nested too deeply"),
        (tmp_path / "pipe.csv", "cannot be read: Expected a regular file, got a pipe"),
        (text("a\x1b[31m\n.csv", "step,\x1b[2Jloss\n1,x\n")(tmp_path), "a\\x1b[31m\\n.csv line 2: "),
    ):
        options = [str(path)] if command == "fit" else ["--out", str(tmp_path / "figures"), str(path)]
        assert cli.main([command, *options]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.startswith(f"zerosum {command}: ")
        assert error.count("\n") == 1
        assert error[:-1].isprintable()
