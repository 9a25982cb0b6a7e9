"""Reads files and folders of records into runs to draw, grouped by what was measured and how.

A :class:`Run` has one evaluation set, one granularity and one kind of update. Records that differ in these belong to different
runs, so no curve connects them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from zerosum.curves import read_curve
from zerosum.files import lines, open_file, parse, read_bytes
from zerosum.records import Curve, Record, curve, mean_curve

KINDS = ("step", "probe", "cost", "checkpoint")
EXAMPLES = ("sequence", "position", "token")
LARGEST_RECORDS = 1 << 28  # bytes of a file; its records are held in memory, which takes several times as much
UPDATES = {"optimizer": "the optimizer's step", "gradient": "a gradient step", "next": "the change to the next checkpoint"}
ON_TOKENS = ("train.", "held_out.", "interval.", "loss")  # measured on tokens' losses, whatever the examples of the gradients are
ALONG_UPDATE = ("train.", "held_out.", "C_")


class RunError(ValueError):
    """A file or folder has no run that can be drawn. The message names the file and the line."""


@dataclass(frozen=True)
class Data:
    """A set of sequences that something was measured on."""

    name: str
    sequences: int | None = None
    positions: int | None = None
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.sequences:,} × {self.positions:,})" if self.sequences and self.positions else self.name


@dataclass(frozen=True)
class Setting:
    """What a run's metrics are over.

    Attributes:
        evaluation: the data of ``held_out.*``, ``interval.*`` and ``loss``. train: the data of ``train.*``. gradients: the data of
            the gradient metrics.
        examples: the examples of the gradient metrics: "sequence", "position" or "token".
        sampled: whether the examples are a sample of ``gradients``.
        update: the direction of C_g, C_uG and C_ug, and the step of ``train.*`` and ``held_out.*``: a key of ``UPDATES``.
    """

    evaluation: Data
    train: Data | None
    gradients: Data
    examples: str
    sampled: bool
    update: str | None

    def parts(self) -> tuple[str, ...]:
        """Return, for messages, the parts that distinguish two settings. A part is empty if it has nothing to say."""
        train = f"batches of {self.train}" if self.train else ""
        update = f"along {UPDATES[self.update]}" if self.update else ""
        return str(self.evaluation), train, f"{self.examples}s, {'sampled' if self.sampled else 'exact'}", update


@dataclass(frozen=True)
class Run:
    """A run's training loss, and the measurements at some of its steps.

    Attributes:
        loss: the loss of every training step, if known. smoothed: whether it already is a moving average.
        points: the records of the kind "probe" or "checkpoint", by step.
        setting: the setting of the points; None if there are no points.
        repeats: the runs of several seeds whose mean this run is; empty for a single run. ``loss`` and every curve are then means
            with their standard errors, and ``points`` are those of the first seed.
    """

    name: str
    source: Path
    loss: Curve | None = None
    smoothed: bool = False
    points: tuple[Record, ...] = ()
    setting: Setting | None = None
    repeats: tuple[Run, ...] = ()

    def each(self, of: Callable[[Run], Curve]) -> Curve:
        """Return ``of(run)``, or its mean over the seeds if there are several."""
        return mean_curve([of(run) for run in self.repeats]) if self.repeats else of(self)

    def curve(self, metric: str) -> Curve:
        """Return the metric at the steps where it was measured.

        The change between two checkpoints is placed at the first of the two.
        """
        return self.curves(metric)[0]

    def curves(self, *metrics: str) -> list[Curve]:
        """Return the curves of several metrics, at the steps where all of them were measured."""
        if self.repeats:
            return [mean_curve(column) for column in zip(*(run.curves(*metrics) for run in self.repeats), strict=True)]
        found = [entry for entry in self.points if all(metric in entry["metrics"] for metric in metrics)]
        if any(metric.startswith("interval.") for metric in metrics):
            found = [{**entry, "step": entry["interval"][0]} if entry.get("interval") else entry for entry in found]
        return [curve(found, found[0]["kind"] if found else "", metric) for metric in metrics]

    def parameters(self, metric: str) -> list[str]:
        """Return the parameters that have the metric recorded as ``METRIC/PARAMETER``, in their order."""
        names = (name for entry in self.points for name in entry["metrics"])
        return list(dict.fromkeys(name.removeprefix(f"{metric}/") for name in names if name.startswith(f"{metric}/")))

    def has(self, *metrics: str) -> bool:
        """Whether at some step all of the metrics have finite values."""
        return bool(np.isfinite([c.values for c in self.curves(*metrics)]).all(0).any())

    def over(self, metric: str, runs: Sequence[Run] = ()) -> tuple[str, str, str]:
        """Describe what the metric is over in three texts.

        They are: N examples of which set; whether they are a sample; which update or steps. A text is empty if there is nothing to
        say. ``runs`` are the runs that this one is compared with. Sets that differ but share a name and size are distinguished by
        their digests.
        """
        setting = self.setting
        if setting is None:
            return "", "", ""
        on_tokens = metric.startswith(ON_TOKENS)
        data = setting.evaluation if on_tokens else setting.gradients
        if metric.startswith("train."):
            data = setting.train or Data("training batches")
        others = [other for run in runs if run.setting for other in (run.setting.evaluation, run.setting.train) if other]
        digest = f" [{data.digest[:8]}]" if any(str(o) == str(data) and o.digest != data.digest for o in others) else ""
        found = self._with(metric)
        examples = "token" if on_tokens else setting.examples
        which = f"N = {self._range(entry['metrics'][metric]['n'] for entry in found)} {examples}s of {data}{digest}"
        sample = "" if on_tokens else f"{self._range(entry['sampled'] for entry in found)} sampled" if setting.sampled else "exact"
        if metric.startswith("interval."):
            doubling = all(after == 2 * before for before, after in (entry.get("interval") or (0, 0) for entry in found))
            return which, sample, "Δt = t" if doubling else "each to the next checkpoint"
        if setting.update and metric.startswith(ALONG_UPDATE):
            return which, sample, f"{'along' if metric.startswith('C_') else 'by'} {UPDATES[setting.update]}"
        return which, sample, ""

    def _with(self, metric: str) -> list[Record]:
        return [entry for entry in self.points if metric in entry["metrics"]]

    @staticmethod
    def _range(numbers: Iterator[int]) -> str:
        found = sorted(set(numbers))
        return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def read_runs(
    paths: Sequence[Path],
    labels: Sequence[str] = (),
    *,
    smoothed: bool = False,
    step: str | None = None,
    loss: str | None = None,
) -> tuple[list[Run], list[str]]:
    """Read the runs of files and folders. Return them sorted by size (as in "14M", "1.3B") and name, and remarks about the reading.

    Args:
        paths: each is a run's folder, a folder of such folders, a run's ``metrics.jsonl``, a file that ``zerosum measure`` wrote,
            or a loss curve that :func:`zerosum.curves.read_curve` reads.
        labels: a name for each path, instead of the names in the files.
        smoothed, step, loss: options for the loss curves, as in :func:`zerosum.deceleration.fit` and ``read_curve``.

    Raises:
        RunError, CurveError: a file has no run; the message names the file and the line.
        ModuleNotFoundError: TensorBoard's event files need ``tensorboard``.
    """
    if labels and len(labels) != len(paths):
        raise RunError(f"labels (--labels): expected one for each of the {len(paths)} paths, got {len(labels)}")
    found: list[Run] = []
    notes: list[str] = []
    for i, path in enumerate(paths):
        runs: list[Run] = []
        for file in _files(path):
            if _has_records(file):
                entries, cut = _read_records(file)
                notes += [cut] if cut else []
                runs += _runs_of(file, entries)
            else:
                steps, losses = read_curve(file, step=step, loss=loss)
                runs.append(Run(file.stem, file, Curve(steps, losses, np.full(len(steps), math.nan), 0), smoothed))
        runs = _of_seeds(path, runs)
        if labels:
            names = {run.name for run in runs}
            runs = [replace(run, name=labels[i] if len(names) == 1 else f"{labels[i]}, {run.name}") for run in runs]
        found += runs
    return sorted(_distinct(found), key=lambda run: _order(run.name)), notes


def _files(path: Path) -> list[Path]:
    """Return the files of a path's runs: the path itself, or the records in the folder or its folders."""
    try:
        if not path.is_dir():
            return [path]
        if (own := path / "metrics.jsonl").exists():
            return [own]
        if any(".tfevents." in file.name for file in path.iterdir()):
            return [path]
        # A demo of several sizes has a folder that contains the runs' folders.
        below = sorted([*path.glob("*/metrics.jsonl"), *path.glob("*/*/metrics.jsonl")])
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not below:
        raise RunError(f"{path}: expected a run's metrics.jsonl in this folder or in its folders, or TensorBoard's event files")
    return below


def _has_records(file: Path) -> bool:
    """Whether a file has lines of JSON, and the first is a record, which has a kind."""
    if file.suffix.lower() not in (".jsonl", ".ndjson"):
        return False
    first = next((line for line in _lines(file) if line.strip()), None)
    if first is None:
        raise RunError(f"{file}: is empty")
    try:
        entry = parse(first)
    except ValueError:
        return True  # the reader of records reports what is wrong with it
    return isinstance(entry, dict) and ("kind" in entry or "metrics" in entry)


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines, which only line feeds end: names may contain other characters that Python treats as line ends.

    The last line may lack its line feed.
    """
    try:
        with open_file(file) as content:
            if os.fstat(content.fileno()).st_size > LARGEST_RECORDS:
                raise RunError(f"{file}: expected at most {LARGEST_RECORDS >> 20} MiB, got more: keep fewer of its lines")
            for line in lines(content):
                yield line.decode()
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise RunError(f"{file}: expected UTF-8 text, and its bytes are not") from None
    except RunError:
        raise
    except ValueError as error:
        raise RunError(f"{file} {error}") from None


def _read_records(file: Path) -> tuple[list[Record], str]:
    """Return the checked records, and a note if the last line was cut off, as in a run that is still going or that crashed."""
    found = []
    note = ""
    for number, line in enumerate(_lines(file), 1):
        where = f"{file} line {number}"
        if not line.strip():
            continue
        try:
            entry = parse(line)
        except ValueError as error:
            if line.endswith("\n"):
                raise RunError(f"{where}: expected JSON: {error}") from None
            note = f"{where}: is cut off, left out"
            continue
        check_record(entry, where)
        found.append(entry)
    if not found:
        raise RunError(f"{file}: has no whole record")
    return found, note


def check_record(entry: Any, where: str) -> None:
    """Refuse an entry that is not a record; ``where`` names it in the message.

    Raises:
        RunError: a field is missing or invalid.
    """
    if not isinstance(entry, dict):
        raise RunError(f"{where}: expected a JSON object, got {json.dumps(entry)[:40]}")
    if entry.get("kind") not in KINDS:
        raise RunError(f"{where}: kind: expected one of {', '.join(KINDS)}, got {json.dumps(entry.get('kind'))[:60]}")
    if not _whole(entry.get("step")):
        raise RunError(f"{where}: step: expected a whole number >= 0, got {json.dumps(entry.get('step'))[:60]}")
    metrics = entry.get("metrics")
    if not isinstance(metrics, dict):
        raise RunError(f"{where}: metrics: expected an object, got {json.dumps(metrics)[:40]}")
    for name, metric in metrics.items():
        numbers = [metric.get(key) for key in ("value", "null", "error")] if isinstance(metric, dict) else [""]
        if not all(x is None or _is_number(x) for x in numbers) or not _whole(metric.get("n")):
            expected = 'numbers {"value", "n", "null", "error"}'
            raise RunError(f"{where}: metrics: {name[:100]}: expected {expected}, got {json.dumps(metric)[:60]}")
    if entry["kind"] == "checkpoint":
        _check_checkpoint(entry, where)


def _check_checkpoint(entry: Record, where: str) -> None:
    for key, expected, good in (
        ("run", "a name", isinstance(entry.get("run"), str)),
        ("evaluation", 'an object with a "name"', _is_data(entry.get("evaluation"))),
        ("train", 'null or an object with a "name"', entry.get("train") is None or _is_data(entry.get("train"))),
        ("examples", '"sequence", "position" or "token"', entry.get("examples") in EXAMPLES),
        ("sampled", "null or a whole number", entry.get("sampled") is None or _whole(entry.get("sampled"))),
        ("update", f"null or one of {', '.join(UPDATES)}", entry.get("update") in (None, *UPDATES)),
        ("covered", "null or a number", entry.get("covered") is None or _is_number(entry["covered"])),
        ("not_covered", "null or an object", entry.get("not_covered") is None or isinstance(entry["not_covered"], dict)),
        ("settings", "null or an object", entry.get("settings") is None or isinstance(entry["settings"], dict)),
        ("interval", "null or two steps", entry.get("interval") is None or _is_interval(entry["interval"])),
    ):
        if not good:
            raise RunError(f"{where}: {key}: expected {expected}, got {json.dumps(entry.get(key))[:60]}")


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**63


def _is_number(x: Any) -> bool:
    """Whether the value is a number that a float can represent."""
    return isinstance(x, float) or (isinstance(x, int) and not isinstance(x, bool) and abs(x) < 10**300)


def _is_data(x: Any) -> bool:
    sizes = [x.get(key) for key in ("sequences", "positions")] if isinstance(x, dict) else [""]
    return all(size is None or _whole(size) for size in sizes) and isinstance(x.get("name"), str)


def _is_interval(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(map(_whole, x))


def _runs_of(file: Path, entries: Sequence[Record]) -> list[Run]:
    """Return the runs of one file: the run of a demo, and one run for each run and setting that was measured."""
    runs = []
    loss = curve(entries, "step", "train.loss")
    probes = [entry for entry in entries if entry["kind"] == "probe"]
    if len(loss) or probes:
        name = file.resolve().parent.name if file.name == "metrics.jsonl" else file.stem
        setting = _demo_setting(file) if probes else None
        runs.append(Run(name, file, loss if len(loss) else None, points=_by_step(file, probes), setting=setting))
    groups: dict[tuple[str, Setting], list[Record]] = {}
    for entry in entries:
        if entry["kind"] == "checkpoint":
            groups.setdefault((entry["run"], _setting(entry)), []).append(entry)
    for key, found in _with_their_update(groups).items():
        runs.append(Run(key[0], file, points=_by_step(file, found), setting=key[1]))
    if not runs:
        raise RunError(f"{file}: has no training step, probe or checkpoint")
    return runs


def _of_seeds(path: Path, runs: Sequence[Run]) -> list[Run]:
    """Return the runs below ``path``. If the folder's configuration lists several seeds, combine their runs into one."""
    found: list[Run] = []
    groups: dict[Path, list[Run]] = {}
    for run in runs:
        folder = run.source.parent.parent
        below = run.source.name == "metrics.jsonl" and folder.is_relative_to(path)
        if below and isinstance(_configuration(folder).get("seed"), list):
            groups.setdefault(folder, []).append(run)
        else:
            found.append(run)
    for folder, group in groups.items():
        losses = [run.loss for run in group if run.loss is not None]
        loss = mean_curve(losses) if len(losses) == len(group) else None
        setting = _demo_setting(folder / "metrics.jsonl") if group[0].points else None
        found.append(Run(folder.resolve().name, folder, loss, points=group[0].points, setting=setting, repeats=tuple(group)))
    return found


def _with_their_update(groups: dict[tuple[str, Setting], list[Record]]) -> dict[tuple[str, Setting], list[Record]]:
    """Merge checkpoints without an update into the group of the same kind that has one.

    If the update is the change to the next checkpoint, the last checkpoint has no update.
    """
    joined = {key: found for key, found in groups.items() if key[1].update is not None}
    for (name, setting), found in groups.items():
        if setting.update is None:
            others = [key for key in joined if key[0] == name and replace(key[1], update=None) == setting]
            key = others[0] if len(others) == 1 else (name, setting)
            joined[key] = joined.get(key, []) + found
    return joined


def _by_step(file: Path, entries: Sequence[Record]) -> tuple[Record, ...]:
    found = sorted(entries, key=lambda entry: entry["step"])
    for before, after in pairwise(found):
        if before["step"] == after["step"]:
            raise RunError(f"{file}: step {after['step']} was measured twice in the same way: leave one of the two lines")
    return tuple(found)


def _setting(entry: Record) -> Setting:
    evaluation = _data(entry["evaluation"])
    train = _data(entry["train"]) if entry.get("train") else None
    return Setting(evaluation, train, evaluation, entry["examples"], entry.get("sampled") is not None, entry.get("update"))


def _data(found: dict[str, Any]) -> Data:
    return Data(found["name"], found.get("sequences"), found.get("positions"), str(found.get("digest") or ""))


def _demo_setting(file: Path) -> Setting:
    """Return the setting of a demo's or a trainer's run.

    The demo measures held-out text and the step's own batch; its ``config.json`` identifies both. A trainer's callback
    (:mod:`zerosum.integrations`) measures only the step's batch, along a direction that the user gives.
    """
    config = _configuration(file.parent)
    digest = " ".join(str(config.get(key, "")) for key in ("text", "seed", "positions")).strip()
    train = Data("training batches", digest=digest)
    update, examples = config.get("update", "optimizer"), config.get("examples", "sequence")
    for key, value, known in (("update", update, (None, *UPDATES)), ("examples", examples, EXAMPLES)):
        if value not in known:
            listed = ", ".join(json.dumps(word) for word in known)
            raise RunError(f"{file.parent / 'config.json'}: {key}: expected one of {listed}, got {json.dumps(value)[:60]}")
    return Setting(Data("held-out text", digest=digest), train, train, examples, False, update)


def _configuration(folder: Path) -> dict[str, Any]:
    """Read a folder's ``config.json``; empty if there is none."""
    if not (there := folder / "config.json").is_file():
        return {}
    try:
        config = parse(read_bytes(there))
    except OSError as error:
        raise RunError(f"{there}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise RunError(f"{there}: expected JSON: {error}") from None
    if not isinstance(config, dict):
        raise RunError(f"{there}: expected a JSON object, got {json.dumps(config)[:40]}")
    return config


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Give each run a name of its own. Runs of the same name add what they were measured on, or which path they come from."""
    found = []
    for run in runs:
        same = [other for other in runs if other.name == run.name and other is not run]
        added = []
        if run.setting:
            beside = [other.setting for other in same if other.source == run.source and other.setting]
            pairs = zip(run.setting.parts(), *(setting.parts() for setting in beside), strict=True)
            added = [parts[0] for parts in pairs if parts[0] and len(set(parts)) > 1]
            if beside and not added:
                added = [f"set {run.setting.evaluation.digest[:8]}"]
        if any(other.source != run.source for other in same):
            added.append(str(run.source))
        found.append(replace(run, name=f"{run.name} ({', '.join(added)})") if added else run)
    return found


def _order(name: str) -> tuple[float, list[tuple[int, float, str]]]:
    """Return a sort key: the number of parameters in the name, then the name with its numbers as numbers."""
    size = re.search(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?) ?([KMBT])(?![A-Za-z0-9])", name, re.IGNORECASE)
    parameters = float(size[1]) * 1000 ** ("KMBT".index(size[2].upper()) + 1) if size else 0.0
    pieces = re.split(r"(\d+)", name.lower())  # every other piece is a number
    return parameters, [(1, float(piece), "") if i % 2 else (0, 0.0, piece) for i, piece in enumerate(pieces)]
