"""Reads loss curves from files, validates them, and selects the rows for a fit.

:func:`read_curve` accepts CSV, JSON lines (also a run's ``metrics.jsonl`` or its folder), JSON (also ``trainer_state.json`` of
transformers), NumPy's ``.npy`` and ``.npz``, and TensorBoard's event files or their folder (with the ``tensorboard`` package, ``pip
install 'zsl_kernels[demo]'``). Reads are bounded, whatever a file declares: at most ``MOST_VALUES`` values, and the limits of
:mod:`zerosum.files` for lines and for files that are parsed as a whole.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from zerosum.files import lines, open_file, parse, read_bytes

MOST_VALUES = 5_000_000  # values in a file; each takes about 150 bytes
LARGEST_ARCHIVE = 1 << 27  # bytes of an .npz file
LARGEST_EVENT = 1 << 26  # bytes of one TensorBoard event
MOST_EVENTS = 5_000_000  # events in a file
LONGEST_NAME = 1000  # characters of a column's name, including the names of the objects that contain it
DEEPEST = 30  # levels of nested objects

# Column names with the same meaning, the most specific first. Names are compared as lowercase letters and digits.
STEPS = ("step", "steps", "globalstep", "trainstep", "iteration", "iterations", "iter", "update", "t")
LOSSES = ("loss", "trainloss", "trainingloss", "lmloss", "crossentropy", "nll", "value")
# A record's metrics are {"metrics": {"train.loss": {"value": ...}}}. Users name the column by the key in the middle.
BEFORE, AFTER = "metrics.", ".value"


class CurveError(ValueError):
    """A curve cannot be read or used. The message says where and why."""


class Cell(NamedTuple):
    """A value in a file, and its line (or row)."""

    line: int
    value: Any


Columns = dict[str, list[Cell]]
Kinds = dict[int, str]


class Table(NamedTuple):
    """The columns of a file. Some lines may lack a column. ``kinds`` has the kind of each line that is a record of a run."""

    columns: Columns
    kinds: Kinds
    unit: str = "line"


def read_curve(
    path: str | Path, *, step: str | None = None, loss: str | None = None, last_of_repeats: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Read the steps and losses in a file, (n,) float64 each. Steps increase; losses are finite and > 0.

    Args:
        path: the file, or the folder of a run or of TensorBoard's event files.
        step: the column of the steps; if None, the column with a usual name. Names of nested keys are joined by dots. Losses
            without steps get the steps 1, 2, …
        loss: the column (TensorBoard's tag) of the losses; if None, the column with a usual name. Lines without a loss are skipped.
        last_of_repeats: if steps go back, as after a restart, keep what was written last.

    Raises:
        CurveError: the file cannot be read or has no usable curve; the message names the file and the line.
        ModuleNotFoundError: event files need ``tensorboard``.
    """
    path = Path(path)
    try:
        if path.is_dir() and (records := path / "metrics.jsonl").exists():  # a run's folder
            path = records
        table = _read(path)
    except OSError as error:
        raise CurveError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise CurveError(f"{path}: expected UTF-8 text, and its bytes are not") from None
    if sum(map(len, table.columns.values())) > MOST_VALUES:
        raise _too_many(path)
    loss_name = _choose(path, table, "loss", loss, LOSSES)
    losses = _one_kind(table.columns[loss_name], table.kinds)
    steps = _steps(path, table, loss_name, losses, step)

    def where(i: int) -> str:
        return f"{path} {table.unit} {losses[i].line}"

    x, y = (
        np.array([_number(cell.value, name, where(i)) for i, cell in enumerate(cells)])
        for name, cells in (("step", steps), ("loss", losses))
    )
    if last_of_repeats:
        kept = np.flatnonzero(x < np.concatenate((np.minimum.accumulate(x[::-1])[::-1][1:], [math.inf])))
        x, y, losses = x[kept], y[kept], [losses[i] for i in kept]
    try:
        check(x, y, where)
    except CurveError as error:
        if "increase" in str(error):
            raise CurveError(
                f"{error}; if the run was restarted there, last_of_repeats (--last-of-repeats) keeps what came last"
            ) from None
        raise
    return x, y


def check(steps: np.ndarray, losses: np.ndarray, where: Callable[[int], str]) -> None:
    """Refuse an invalid curve. ``where(i)`` names row i in the message."""
    for name, x, good, expected in (
        ("step", steps, np.isfinite(steps), "a finite number"),
        ("loss", losses, np.isfinite(losses) & (losses > 0), "a finite number > 0"),
    ):
        if len(bad := np.flatnonzero(~good)):
            raise CurveError(f"{where(int(bad[0]))}: {name}: expected {expected}, got {x[bad[0]]:g}")
    if len(bad := np.flatnonzero(np.diff(steps) <= 0)):
        i = int(bad[0])
        raise CurveError(f"{where(i + 1)}: step: expected steps that increase, got {steps[i + 1]:g} after {steps[i]:g}")


def thin(steps: np.ndarray) -> np.ndarray:
    """Return the rows to fit: the first row at or after each step of a grid, and the last row.

    The grid has the steps 10–99 by 1, the 100s by 10, the 1000s by 100, and all above by 1000.
    """
    marks = np.concatenate([np.arange(10**k, 10 ** (k + 1), 10 ** (k - 1)) for k in (1, 2, 3)])
    early = np.searchsorted(steps, marks)
    # Thousands are counted row by row, because there may be billions of them if steps are tokens.
    late = 1 + np.flatnonzero((steps[1:] >= 10_000) & (np.diff(steps // 1000) > 0))
    return np.unique(np.concatenate((early[early < len(steps)], late, [len(steps) - 1])))


def _read(path: Path) -> Table:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.is_dir() or ".tfevents." in path.name:
        return _tensorboard(path)
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".npy": _numpy, ".npz": _numpy}
    if path.suffix.lower() not in readers:
        raise CurveError(f"{path}: expected one of {', '.join(readers)}, TensorBoard's event file, or a folder of these")
    return readers[path.suffix.lower()](path)


def _too_many(path: Path) -> CurveError:
    return CurveError(f"{path}: expected at most {MOST_VALUES:,} values, got more: keep the steps and the losses, or fewer rows")


def _text_lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    """Yield lines of UTF-8 text, without a byte order mark."""
    found = lines(file)
    while True:
        try:
            line = next(found, b"")
        except ValueError as error:
            raise CurveError(f"{path} {error}") from None
        if not line:
            return
        yield line.decode("utf-8").removeprefix("\ufeff")


def _csv(path: Path) -> Table:
    with open_file(path) as file:
        text = _text_lines(path, file)
        head = next(text, "")
        tabs = path.suffix.lower() == ".tsv" and "\t" in head
        delimiter = "\t" if tabs else max((",", ";", "\t"), key=head.count)
        rows = csv.reader(chain([head], text), delimiter=delimiter, skipinitialspace=True)
        try:
            names = next(rows, [])
            if twice := [name for name, count in Counter(names).items() if name and count > 1]:
                raise CurveError(f"{path}: expected different names of columns, got {twice[0][:100]!r} twice")
            columns: Columns = {name: [] for name in names}
            values = 0
            for row in rows:
                if len(row) > len(names):
                    raise CurveError(f"{path} line {rows.line_num}: expected {len(names)} values, got more")
                for name, value in zip(names, row, strict=False):
                    if value:  # an empty cell means that this line lacks the column
                        columns[name].append(Cell(rows.line_num, value))
                        values += 1
                if values > MOST_VALUES:
                    raise _too_many(path)
        except csv.Error as error:
            raise CurveError(f"{path} line {rows.line_num}: {error}") from None
    return Table(columns, {})


def _jsonl(path: Path) -> Table:
    def entries() -> Iterator[tuple[int, Any]]:
        with open_file(path) as file:
            for number, line in enumerate(_text_lines(path, file), 1):
                if not line.strip():
                    continue
                try:
                    yield number, parse(line)
                except ValueError as error:
                    if line.endswith("\n"):  # otherwise a crash cut off the last line, which is skipped
                        raise CurveError(f"{path} line {number}: expected JSON: {error}") from None

    return _rows(path, entries(), "line")


def _json(path: Path) -> Table:
    try:
        content = parse(read_bytes(path).decode("utf-8"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise CurveError(f"{path}: expected JSON: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("log_history"), list):  # transformers' trainer_state.json
        content = content["log_history"]
    if isinstance(content, dict):
        arrays = {name: value for name, value in _flat(path, content) if isinstance(value, list)}
        return Table({name: [Cell(i, x) for i, x in enumerate(array)] for name, array in arrays.items()}, {}, "element")
    if isinstance(content, list) and content and not isinstance(content[0], dict):
        return _array(path, content)
    return _rows(path, enumerate(content if isinstance(content, list) else [content]), "element")


def _rows(path: Path, entries: Iterable[tuple[int, Any]], unit: str) -> Table:
    """Build the table of JSON objects, each with its own keys."""
    table = Table({}, {}, unit)
    values = 0
    for number, entry in entries:
        if not isinstance(entry, dict):
            raise CurveError(f"{path} {unit} {number}: expected a JSON object, got {json.dumps(entry)[:40]}")
        for name, value in _flat(path, entry):
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                table.columns.setdefault(name, []).append(Cell(number, value))
                values += 1
        if values > MOST_VALUES:
            raise _too_many(path)
        if isinstance(entry.get("kind"), str):
            table.kinds[number] = entry["kind"]
    return table


def _flat(path: Path, entry: dict[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        if len(name := prefix + key) > LONGEST_NAME or depth > DEEPEST:
            raise CurveError(f"{path}: expected names of at most {LONGEST_NAME} characters and {DEEPEST} levels, got more")
        if isinstance(value, dict):
            yield from _flat(path, value, f"{name}.", depth + 1)
        else:
            yield name, value


def _numpy(path: Path) -> Table:
    with open_file(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns about the headers of old or unusual files
        try:
            if path.suffix.lower() == ".npz":
                return _vectors(_load_archive(path, file))
            array = _load_array(path, file)
        except (CurveError, OSError):
            raise
        except Exception as error:  # numpy, zipfile and zlib raise errors without a common base class
            raise CurveError(f"{path}: {_line(error)}") from None
    if array.dtype.names is None:
        return _array(path, array.tolist())
    return _vectors({name: array[name] for name in array.dtype.names})


def _vectors(arrays: dict[str, np.ndarray]) -> Table:
    return Table(
        {name: [Cell(i, value) for i, value in enumerate(x.tolist())] for name, x in arrays.items() if x.ndim == 1}, {}, "row"
    )


def _load_archive(path: Path, file: IO[bytes]) -> dict[str, np.ndarray]:
    """Load the vectors of an .npz file; other arrays are skipped."""
    if os.fstat(file.fileno()).st_size > LARGEST_ARCHIVE:
        raise CurveError(f"{path}: expected at most {LARGEST_ARCHIVE >> 20} MiB, got more: save the steps and the losses alone")
    found: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            with archive.open(member) as content:
                shape, _ = _head(path, content)
            if len(shape) != 1:
                continue
            with archive.open(member) as content:
                found[member.filename.removesuffix(".npy")] = _load_array(path, content)
            if sum(map(len, found.values())) > MOST_VALUES:
                raise _too_many(path)
    return found


def _load_array(path: Path, file: IO[bytes]) -> np.ndarray:
    """Load an array in numpy's format. The header is checked against the bounds before anything is allocated."""
    shape, dtype = _head(path, file)
    count = math.prod(shape)
    if max(count, *shape, 0) > MOST_VALUES or count * dtype.itemsize > 16 * MOST_VALUES:
        raise _too_many(path)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _head(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype in the header of a file in numpy's format."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise CurveError(f"{path}: expected numpy's format 1.0 or 2.0, got {version[0]}.{version[1]}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if min(shape, default=0) < 0:
        raise CurveError(f"{path}: expected sizes >= 0, got shape {shape}")
    return shape, dtype


def _array(path: Path, rows: Any) -> Table:
    """Build the table of an array of losses, or of pairs of a step and a loss."""
    pairs = [row if isinstance(row, list) else [row] for row in rows] if isinstance(rows, list) else [[], []]
    if {len(pair) for pair in pairs} not in ({1}, {2}):
        raise CurveError(f"{path}: expected losses, shape (n,), or steps and losses, shape (n, 2)")
    names = ("loss",) if len(pairs[0]) == 1 else ("step", "loss")
    return Table({name: [Cell(i, pair[k]) for i, pair in enumerate(pairs)] for k, name in enumerate(names)}, {}, "row")


def _tensorboard(path: Path) -> Table:
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ModuleNotFoundError as error:
        message = f"{path}: TensorBoard's event files need tensorboard: pip install 'zsl_kernels[demo]'"
        raise ModuleNotFoundError(message, name=error.name) from None
    files = [path] if not path.is_dir() else [file for file in path.iterdir() if "tfevents" in file.name]
    if not any(".tfevents." in file.name for file in files):
        raise CurveError(f"{path}: no TensorBoard event file (*.tfevents.*) and no metrics.jsonl of a run in this folder")
    for file in files:
        _check_events(file)
    columns: Columns = {}
    try:
        # 0 keeps every event. Events that a restart wrote again must be reported here, not dropped silently.
        events = EventAccumulator(str(path), size_guidance={SCALARS: 0, TENSORS: 0}, purge_orphaned_data=False).Reload()
        for name in events.Tags()[SCALARS]:
            columns[name] = [Cell(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()[TENSORS]:
            found = events.Tensors(name)
            if any(dim.size != 1 for event in found for dim in event.tensor_proto.tensor_shape.dim):
                continue  # check before making an array: a few bytes may declare a large one
            values = [(event.step, make_ndarray(event.tensor_proto)) for event in found]
            if all(value.size == 1 and value.dtype.kind == "f" for _, value in values):
                columns[name] = [Cell(step, value.item()) for step, value in values]
    except Exception as error:  # protobuf, numpy and TensorBoard raise errors without a common base class
        raise CurveError(f"{path}: TensorBoard cannot read it: {_line(error)}") from None
    return Table(columns, {}, "event of step")


def _check_events(path: Path) -> None:
    """Compare the record lengths of an event file with the file's size, because TensorBoard allocates what they declare.

    Raises:
        CurveError: a length exceeds the bounds, or there are too many records.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        place = number = 0
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])  # its checksum, the content and the content's checksum follow
            number += 1
            if length > LARGEST_EVENT:
                raise CurveError(f"{path}: event {number}: expected at most {LARGEST_EVENT >> 20} MiB, got {length} bytes: damaged")
            if number > MOST_EVENTS:
                raise CurveError(f"{path}: expected at most {MOST_EVENTS:,} events, got more")
            if (place := place + 16 + length) > size:
                return  # the last record is cut off, as in a run that is still going
            file.seek(place)


def _line(error: Exception) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _choose(path: Path, table: Table, what: str, wanted: str | None, known: Sequence[str], beside: str = "") -> str:
    """Return the column ``wanted``, or else the only column with the first matching name in ``known``.

    The names may have the prefix of the column ``beside`` it.
    """
    names = [name for name, cells in table.columns.items() if cells]
    if wanted is not None:
        found = [name for name in names if wanted in (name, _short(name))]
        problem = f"no column {wanted!r}"
    else:
        plain = {name: _plain(_short(name).removeprefix(beside)) for name in names}
        ranked = [[name for name in names if plain[name] == word] for word in known]
        related = [name for name in names if known[0] in _plain(_short(name).rpartition(".")[2])]
        found = next((matching for matching in ranked if matching), related)
        problem = f"which column has the {what} is not clear" if found else f"no column looks like a {what}"
    if len(found) == 1:
        return found[0]
    listed = ", ".join(_short(name) for name in found or names) or "none"
    listed = listed if len(listed) < 1000 else f"{listed[:1000]}…"
    raise CurveError(f"{path}: {problem}: name it with --{what}; columns with numbers: {listed}")


def _short(name: str) -> str:
    return name.removeprefix(BEFORE).removesuffix(AFTER) if name.startswith(BEFORE) else name


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _one_kind(cells: list[Cell], kinds: Kinds) -> list[Cell]:
    """If a run's records have several kinds, keep the cells of the kind that has the metric most often."""
    counts: dict[str, int] = {}
    for cell in cells:
        if cell.line in kinds:
            counts[kinds[cell.line]] = counts.get(kinds[cell.line], 0) + 1
    kind = max(counts, key=lambda name: counts[name]) if counts else None
    return [cell for cell in cells if kinds.get(cell.line) == kind]


def _steps(path: Path, table: Table, loss_name: str, losses: list[Cell], wanted: str | None) -> list[Cell]:
    if table.unit == "event of step":
        return [Cell(cell.line, cell.line) for cell in losses]
    if wanted is None and len(table.columns) == 1:
        return [Cell(cell.line, i) for i, cell in enumerate(losses, 1)]
    name = _choose(path, table, "step", wanted, STEPS, beside=loss_name[: loss_name.rfind(".") + 1])
    steps = {cell.line: cell for cell in table.columns[name]}
    if missing := [cell.line for cell in losses if cell.line not in steps]:
        raise CurveError(f"{path} {table.unit} {missing[0]}: a loss without a step ({_short(name)})")
    return [steps[cell.line] for cell in losses]


def _number(value: Any, name: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        got = json.dumps(value, default=str)[:40]
        raise CurveError(f"{where}: {name}: expected a finite number, got {got}") from None
