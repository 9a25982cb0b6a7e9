"""Loss curves: what a curve must be, which of its rows a fit takes, and reading one from a file.

:func:`read_curve` takes CSV, JSON lines (also a run's own ``metrics.jsonl``, or its folder), JSON (also ``trainer_state.json`` of
transformers), NumPy's ``.npy`` and ``.npz``, and TensorBoard's event files or the folder that has them (with the ``tensorboard``
package, ``pip install 'zsl_kernels[demo]'``).
"""

from __future__ import annotations

import csv
import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Names of columns that mean the same wherever they are met, the most telling first; compared as lower-case letters and digits.
STEPS = ("step", "steps", "globalstep", "trainstep", "iteration", "iterations", "iter", "update", "t")
LOSSES = ("loss", "trainloss", "trainingloss", "lmloss", "crossentropy", "nll", "value")
# A record's metrics are {"metrics": {"train.loss": {"value": ...}}}: the name in the middle is what one calls the column.
BEFORE, AFTER = "metrics.", ".value"


class CurveError(ValueError):
    """A curve cannot be read or used; the message says where and why."""


class Cell(NamedTuple):
    """A value in a file, and the line (or row) that it is on."""

    line: int
    value: Any


Columns = dict[str, list[Cell]]
Kinds = dict[int, str]


class Table(NamedTuple):
    """A file's columns. Lines may lack some; ``kinds`` has those of the lines that are records of a run."""

    columns: Columns
    kinds: Kinds
    unit: str = "line"


def read_curve(
    path: str | Path, *, step: str | None = None, loss: str | None = None, last_of_repeats: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The steps and losses in a file, (n,) float64 each: steps increase, losses are finite and > 0.

    Args:
        path: the file, or the folder of a run or of TensorBoard's event files.
        step: the column of the steps; the obvious one if None. Names of nested keys are joined by dots. Losses that come without
            steps are those of steps 1, 2, …
        loss: the column (TensorBoard's tag) of the losses; the obvious one if None. Lines without a value in it are left out.
        last_of_repeats: where steps go back, as after a restart, keep what was written last.

    Raises:
        CurveError: the file cannot be read or has no curve that can be used; the message names the file and the line.
        ModuleNotFoundError: event files need ``tensorboard``.
    """
    path = Path(path)
    if (records := path / "metrics.jsonl").is_file():  # a run's folder
        path = records
    try:
        table = _read(path, loss)
    except OSError as error:
        raise CurveError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise CurveError(f"{path}: expected UTF-8 text, and its bytes are not") from None
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
    """Refuses what is no curve: ``where(i)`` names row i in the message."""
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
    """The rows to fit: the first at or after each of the steps 10–99 by 1, 100s by 10, 1000s by 100, on by 1000; and the last."""
    marks = np.concatenate([np.arange(10**k, 10 ** (k + 1), 10 ** (k - 1)) for k in (1, 2, 3)])
    early = np.searchsorted(steps, marks)
    # Thousands are counted by rows, for there may be billions of them, where steps are tokens.
    late = 1 + np.flatnonzero((steps[1:] >= 10_000) & (np.diff(steps // 1000) > 0))
    return np.unique(np.concatenate((early[early < len(steps)], late, [len(steps) - 1])))


def _read(path: Path, tag: str | None) -> Table:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.is_dir() or ".tfevents." in path.name:
        return _tensorboard(path, tag)
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".npy": _numpy, ".npz": _numpy}
    if path.suffix.lower() not in readers:
        raise CurveError(f"{path}: expected one of {', '.join(readers)}, TensorBoard's event file, or a folder of these")
    return readers[path.suffix.lower()](path)


def _csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", skipinitialspace=True)
        columns: Columns = {name: [] for name in reader.fieldnames or ()}
        try:
            for row in reader:
                for name, text in row.items():
                    if name is None:
                        raise CurveError(f"{path} line {reader.line_num}: expected {len(columns)} values, got more")
                    if text:  # an empty cell is a column that this line does not have
                        columns[name].append(Cell(reader.line_num, text))
        except csv.Error as error:
            raise CurveError(f"{path} line {reader.line_num}: {error}") from None
    return Table(columns, {})


def _jsonl(path: Path) -> Table:
    def entries() -> Iterator[tuple[int, Any]]:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                # A last line that a crash cut off is no line.
                if line.strip() and (line.endswith("\n") or _whole(line)):
                    yield number, _parse(line, f"{path} line {number}")

    return _rows(path, entries(), "line")


def _whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CurveError(f"{where}: expected JSON: {error}") from None


def _json(path: Path) -> Table:
    content = _parse(path.read_text(encoding="utf-8"), str(path))
    if isinstance(content, dict) and isinstance(content.get("log_history"), list):  # transformers' trainer_state.json
        content = content["log_history"]
    if isinstance(content, dict):
        arrays = {name: value for name, value in _flat(content) if isinstance(value, list)}
        return Table({name: [Cell(i, x) for i, x in enumerate(array)] for name, array in arrays.items()}, {}, "element")
    if isinstance(content, list) and content and not isinstance(content[0], dict):
        return _array(path, content)
    return _rows(path, enumerate(content if isinstance(content, list) else [content]), "element")


def _rows(path: Path, entries: Iterable[tuple[int, Any]], unit: str) -> Table:
    """Of objects, each with its own keys."""
    table = Table({}, {}, unit)
    for number, entry in entries:
        if not isinstance(entry, dict):
            raise CurveError(f"{path} {unit} {number}: expected a JSON object, got {json.dumps(entry)[:40]}")
        for name, value in _flat(entry):
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                table.columns.setdefault(name, []).append(Cell(number, value))
        if isinstance(entry.get("kind"), str):
            table.kinds[number] = entry["kind"]
    return table


def _flat(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _numpy(path: Path) -> Table:
    try:
        content = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CurveError(f"{path}: {error}") from None
    if isinstance(content, np.ndarray) and content.dtype.names is None:
        return _array(path, content.tolist())
    names = content.dtype.names if isinstance(content, np.ndarray) else content.files
    arrays = {name: content[name] for name in names}
    return Table({name: [Cell(i, x) for i, x in enumerate(x.tolist())] for name, x in arrays.items() if x.ndim == 1}, {}, "row")


def _array(path: Path, rows: list[Any]) -> Table:
    """Of losses alone, or of pairs of a step and a loss."""
    pairs = [row if isinstance(row, list) else [row] for row in rows]
    if {len(pair) for pair in pairs} not in ({1}, {2}):
        raise CurveError(f"{path}: expected losses, shape (n,), or steps and losses, shape (n, 2)")
    names = ("loss",) if len(pairs[0]) == 1 else ("step", "loss")
    return Table({name: [Cell(i, pair[k]) for i, pair in enumerate(pairs)] for k, name in enumerate(names)}, {}, "row")


def _tensorboard(path: Path, tag: str | None) -> Table:
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ModuleNotFoundError as error:
        message = f"{path}: TensorBoard's event files need tensorboard: pip install 'zsl_kernels[demo]'"
        raise ModuleNotFoundError(message, name=error.name) from None
    if not path.is_file() and not any(".tfevents." in file.name for file in path.iterdir()):
        raise CurveError(f"{path}: no TensorBoard event file (*.tfevents.*) and no metrics.jsonl of a run in this folder")
    # 0 keeps every event. What a restart wrote again must be seen here, not dropped in silence.
    events = EventAccumulator(str(path), size_guidance={SCALARS: 0, TENSORS: 0}, purge_orphaned_data=False).Reload()
    columns: Columns = {}
    for name in events.Tags()[SCALARS]:
        columns[name] = [Cell(event.step, event.value) for event in events.Scalars(name)]
    for name in events.Tags()[TENSORS]:
        values = [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(name)]
        if all(value.size == 1 and value.dtype.kind == "f" for _, value in values):
            columns[name] = [Cell(step, value.item()) for step, value in values]
    return Table(columns, {}, "event of step")


def _choose(path: Path, table: Table, what: str, wanted: str | None, known: Sequence[str], beside: str = "") -> str:
    """The column named, or else the obvious one: by the names ``known``, with or without the prefix of the column ``beside`` it."""
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
    raise CurveError(f"{path}: {problem}: name it with --{what}; columns with numbers: {listed}")


def _short(name: str) -> str:
    return name.removeprefix(BEFORE).removesuffix(AFTER) if name.startswith(BEFORE) else name


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _one_kind(cells: list[Cell], kinds: Kinds) -> list[Cell]:
    """Of a run's records of several kinds, those of the kind that has the metric most often."""
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
    except (TypeError, ValueError):
        raise CurveError(f"{where}: {name}: expected a finite number, got {json.dumps(value)[:40]}") from None
