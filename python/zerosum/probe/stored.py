"""Converts reports to data: saves them to files, pickles them, and merges several into one."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zerosum.files import open_file, parse, replacing
from zerosum.probe.contributions import Sums
from zerosum.probe.report import Coverage, Evidence, ParameterReport, Report
from zerosum.probe.results import Results, add_up
from zsl_kernels import CoordinateSums

FORMAT = 1  # version of the file format; increase it whenever the content changes
_HEADER = "zerosum_report"
_WEIGHT_SHAPED = ("grad_sum", "abs_sum", "sq_sum")
_SCALARS = ("l1", "sq_norm", "dot", "abs_dot")
State = tuple[dict[str, Any], dict[str, Tensor]]


# One report as plain values and tensors ------------------------------------------------------------------------------------------


def state_of(report: Report) -> State:
    """Return the report's values that JSON can hold, and copies of its tensors by ``parameter/field``."""
    report = report.settled()
    refuse_sharded(report, "save")
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for name in report:
        about, mine = report[name].state()
        parameters[name] = about
        tensors |= {f"{name}/{field}": x for field, x in mine.items()}
    proof, coverage = report.proof, report.coverage
    about = {
        "format": FORMAT,
        "num_examples": report.num_examples,
        "proof": [proof.passes, proof.proved, proof.extra, list(proof.trusted)],
        "covered": coverage.covered,
        "not_covered": coverage.not_covered,
        "sizes": coverage.sizes,
        "names": report.names,
        "unreached": sorted(report.unreached),
        "parameters": parameters,
    }
    return about, tensors


def report_of(about: dict[str, Any], tensors: Mapping[str, Tensor]) -> Report:
    """Rebuild the report from the values and tensors of :func:`state_of`."""
    passes, proved, extra, trusted = about["proof"]
    return Report.of(
        {name: parameter_of(name, mine, tensors, f"{name}/") for name, mine in about["parameters"].items()},
        about["names"],
        Coverage(about["covered"], about["not_covered"], about["sizes"]),
        about["num_examples"],
        Evidence(passes, proved, extra, tuple(trusted)),
        frozenset(about["unreached"]),
    )


def parameter_of(name: str, about: dict[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> ParameterReport:
    get: dict[str, Any] = {field: tensors.get(prefix + field) for field in (*_WEIGHT_SHAPED, *_SCALARS, "rows")}
    absent = get["grad_sum"] is None
    if absent:
        get["grad_sum"] = get["abs_sum"].new_empty(0)
    sums = Sums(**{field: get[field] for field in (*_WEIGHT_SHAPED, *_SCALARS)}, gram=None, rows=get["rows"])
    sums.padded = about["padded"]
    grams = None if about["grams"] is None else [tensors[f"{prefix}gram/{k}"] for k in range(about["grams"])]
    shape = torch.Size(about["shape"])
    results = Results.held(sums, grams, shape, CoordinateSums(*about["coordinates"]), absent=absent)
    return ParameterReport(name, about["how"], results, shape)


# Files ---------------------------------------------------------------------------------------------------------------------------


def save(report: Report, path: str | os.PathLike[str]) -> None:
    """See :meth:`Report.save`."""
    _need_safetensors("path")
    from safetensors.torch import save_file

    about, tensors = state_of(report)
    with replacing(Path(path)) as new:
        save_file({name: x.cpu() for name, x in tensors.items()}, new, {_HEADER: json.dumps(about)})


def load_report(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Report:
    """Load a report that :meth:`Report.save` wrote, bit for bit.

    Args:
        path: the file.
        device: the device to load its tensors to.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is broken, is not a report, or was written by a newer version of this library.
        ImportError: safetensors is not installed.
    """
    _need_safetensors("path")
    from safetensors import safe_open

    open_file(Path(path)).close()  # refuses a pipe or a device
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = (file.metadata() or {}).get(_HEADER)
            if header is None:
                raise NotAReport(f"path: expected a report that Report.save wrote, got another safetensors file, {path}")
            about = parse(header)
            if about.get("format") != FORMAT:
                raise NotAReport(
                    f"path: expected a report of format {FORMAT}, got {about.get('format')!r} in {path}; a newer zerosum wrote it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            _check_sizes(about, tensors)
            return report_of(about, tensors)
    except (NotAReport, OSError):
        raise
    except Exception as error:  # a malformed header can raise many kinds of errors, which have no common base class
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"path: {path} is broken, or is no report: {said}") from error


class NotAReport(ValueError):
    """The file is intact, but it does not hold a report."""


def _check_sizes(about: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare the tensors with their description in the header.

    Raises:
        ValueError: the tensors belong to other parameters or have other sizes.
    """
    expected = set()
    for name, mine in about["parameters"].items():
        rows, shape = tensors.get(f"{name}/rows"), torch.Size(mine["shape"])
        lengths = dict.fromkeys(_SCALARS, about["num_examples"])
        lengths |= dict.fromkeys(_WEIGHT_SHAPED, shape.numel() if rows is None else len(rows) * shape[1:].numel())
        there = {field: x for field in (*lengths, "rows") if (x := tensors.get(f"{name}/{field}")) is not None}
        for field, x in there.items():
            if x.numel() != lengths.get(field, len(x)):
                raise ValueError(f"{name}/{field}: expected {lengths[field]} elements, got {x.numel()}")
        expected |= {f"{name}/{field}" for field in there}
        expected |= {f"{name}/gram/{k}" for k in range(min(mine["grams"] or 0, len(tensors)))}
    if other := sorted(tensors.keys() ^ expected):
        raise ValueError(f"expected the tensors of its parameters, got others: {other[0]}")


def _need_safetensors(argument: str) -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError(f"{argument}: files of reports need safetensors: pip install 'zsl_kernels[checkpoints]'")


# Several reports as one ----------------------------------------------------------------------------------------------------------


class ReportSum:
    """Adds up any number of reports, one at a time, in the memory of one report::

        total = zerosum.ReportSum()
        for tokens, targets in batches:
            with probe:
                per_example_loss(model(tokens), targets).sum().backward()
            total.add(probe.report())
            model.zero_grad()
        print(total.report())

    Σ g, Σ |g| and Σ g² are added. The examples' scalars are concatenated, so N is the total number of examples. Grams are left out,
    because they would grow with N.

    Args:
        direction: the direction of the reports, if they have one. The metrics along the direction need it again.
    """

    _keep_grams = False
    _has_grams = False

    def __init__(self, direction: Mapping[str, Tensor] | None = None) -> None:
        self._direction = direction
        self._first: Report | None = None
        self._fields: list[str] = []  # the scalars that the reports have
        self._sums: dict[str, dict[str, Tensor]] = {}  # by parameter name
        self._scalars: dict[str, dict[str, list[Tensor]]] = {}
        self._grams: dict[str, list[Tensor]] = {}
        self._how: dict[str, dict[str, None]] = {}
        self._not_covered: dict[str, str] = {}
        self._unreached: dict[str, str] = {}  # by parameter name, the reason; only parameters that no report has reached
        self._past: list[tuple[int, list[int]]] = []  # for each report: its number of examples, and that of each micro-batch
        self._proofs: list[Evidence] = []
        self.num_examples = 0

    def add(self, report: Report) -> None:
        """Add a report. Its tensors may be overwritten afterwards.

        Raises:
            ValueError: the report belongs to another model, or it has a direction and the others do not.
            RuntimeError: a gradient was overwritten before this call (for example by clipping).
        """
        if not isinstance(report, Report):
            raise TypeError(f"report: expected a zerosum.Report, got {type(report).__name__}")
        report = report.settled()
        refuse_sharded(report, "report")
        fields = [field for field in _SCALARS if getattr(report, field) is not None]
        self._check_like(report, fields)
        if report.dot is not None and self._direction is None:
            raise ValueError("direction: expected the one that the reports have, whose metrics need it again; got none")
        # All gradients are read before anything is added, so that an error leaves the sum unchanged.
        grad_sums = {name: report[name].grad_sum for name in report if name not in self._not_covered}
        self._first = self._first or report.without_results()
        self._fields = self._fields or fields
        now = report.num_examples, [len(block) for block in report.gram_blocks or []] or [report.num_examples]
        for name in report.coverage.sizes:
            if name in self._not_covered:
                continue
            if name in report:
                self._add(name, report[name], grad_sums[name])
            elif name in report.unreached:
                self._unreached.setdefault(name, report.coverage.not_covered[name])
                if name in self._sums:
                    self._add_zeros(name, *now)
            else:
                self._not_covered[name] = f"not covered in every report: {report.coverage.not_covered[name]}"
                for held in (self._sums, self._scalars, self._grams):
                    held.pop(name, None)
        self._past.append(now)
        self._proofs.append(report.proof)
        self.num_examples += report.num_examples

    def _add(self, name: str, p: ParameterReport, grad_sum: Tensor) -> None:
        parts = {"grad_sum": grad_sum, "abs_sum": p.abs_sum, "sq_sum": p.sq_sum}
        if name in self._sums:
            for field, x in parts.items():
                self._sums[name][field].add_(x)
        else:
            self._sums[name] = {field: x.clone(memory_format=torch.contiguous_format) for field, x in parts.items()}
            self._scalars[name], self._grams[name], self._how[name] = {field: [] for field in self._fields}, [], {}
            for past in self._past:
                self._add_zeros(name, *past)
        for field in self._fields:
            self._scalars[name][field].append(getattr(p, field).clone())
        if self._keep_grams:
            self._grams[name] += [block.clone() for block in p.gram_blocks or []]
        self._how[name] |= dict.fromkeys(p.how.split(" + "))

    def _add_zeros(self, name: str, examples: int, blocks: list[int]) -> None:
        """Add the zeros of a report in which no example reaches the parameter."""
        like = self._sums[name]["abs_sum"]
        for field in self._fields:
            self._scalars[name][field].append(like.new_zeros(examples))
        if self._keep_grams:
            self._grams[name] += [like.new_zeros(n, n) for n in blocks]

    def report(self) -> Report:
        """Return the sum so far, in its own memory.

        Raises:
            RuntimeError: no report was added yet.
        """
        if self._first is None:
            raise RuntimeError("no report: nothing was added yet")
        found: dict[str, Results] = {}
        for name in (name for name in self._first.coverage.sizes if name in self._sums):
            sums = self._sums[name]
            scalars: dict[str, Any] = dict.fromkeys(_SCALARS)
            scalars |= {field: torch.cat(parts) for field, parts in self._scalars[name].items()}
            mine = Sums(**{field: x.clone() for field, x in sums.items()}, **scalars, gram=None)
            found[name] = Results.held(mine, (self._grams[name] or None) if self._has_grams else None, mine.abs_sum.shape)
        unreached = {name: why for name, why in self._unreached.items() if name not in found and name not in self._not_covered}
        reasons = {**self._not_covered, **unreached}
        not_covered = {name: reasons[name] for name in self._first.coverage.sizes if name in reasons}
        evidence, n = self._proofs, self.num_examples
        return joined(found, self._first, self._how, not_covered, evidence, n, self._direction, frozenset(unreached))

    def _check_like(self, report: Report, fields: list[str]) -> None:
        if self._first is None:
            return
        known, sizes = self._first.coverage.sizes, report.coverage.sizes
        if known != sizes:
            other = next(name for name in {**known, **sizes} if known.get(name) != sizes.get(name))
            raise ValueError(
                f"report: expected one of the same parameters, got {sizes.get(other, 'no')} coordinates of {other!r}, "
                f"where the others have {known.get(other, 'none')}"
            )
        if self._fields and len(report) and fields != self._fields:
            raise ValueError(f"report: expected one with {', '.join(self._fields)} as the others, got {', '.join(fields)}")


class _Merged(ReportSum):
    _keep_grams = True


def merge(reports: Iterable[Report], direction: Mapping[str, Tensor] | None = None) -> Report:
    """Merge several reports of one model, from micro-batches, files or processes, into one.

    Σ g, Σ |g| and Σ g² are added, and the examples' scalars are concatenated. Grams are kept as blocks, because the inner products
    between examples of different reports are unknown. The metrics, with N and their nulls, are over all examples. Merging is
    associative up to rounding. A parameter that one of the reports does not cover is not covered in the result, with one exception:
    if no example of that report reaches the parameter, its gradients are zero.

    Args:
        reports: at least one report.
        direction: the direction of the reports, if they have one. The metrics along the direction need it again.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or the reports belong to different models; the message says which.
        RuntimeError: a gradient was overwritten before this call (for example by clipping).
    """
    reports = list(reports)
    if not reports:
        raise ValueError("reports: expected one at least, got none")
    total = _Merged(direction)
    for report in reports:
        total.add(report)
    with_grams = {report.gram_blocks is not None for report in reports if len(report)}
    if len(with_grams) > 1:
        raise ValueError("reports: expected all with a Gram, or none")
    total._has_grams = True in with_grams
    return total.report()


def joined(
    found: dict[str, Results],
    like: Report,
    how: Mapping[str, Iterable[str]],
    not_covered: dict[str, str],
    proofs: Iterable[Evidence],
    num_examples: int,
    direction: Mapping[str, Tensor] | None,
    unreached: frozenset[str] = frozenset(),
) -> Report:
    """Build the report from the results of all covered parameters. ``like`` is one of the reports that were joined."""

    def along(name: str) -> Tensor | None:
        if direction is None or found[name].sums.dot is None:
            return None
        names = [known for known, first in like.names.items() if first == name]
        mine = next((direction[known] for known in names if known in direction), None)
        if mine is None:
            raise ValueError(f"direction: expected one for every covered parameter, got none for {name}")
        return mine

    add_up((results, along(name)) for name, results in found.items())
    shapes = {name: results.sums.abs_sum.shape for name, results in found.items()}
    return report_of_results(found, shapes, like, how, not_covered, proofs, num_examples, unreached)


def report_of_results(
    found: dict[str, Results],
    shapes: Mapping[str, torch.Size],
    like: Report,
    how: Mapping[str, Iterable[str]],
    not_covered: dict[str, str],
    proofs: Iterable[Evidence],
    num_examples: int,
    unreached: frozenset[str],
) -> Report:
    """Like :func:`joined`, for results that already have their sums over coordinates."""
    rules = {name: " + ".join(how[name]) for name in found}
    parameters = {name: ParameterReport(name, rules[name], r, shapes[name]) for name, r in found.items()}
    coverage = Coverage(rules, not_covered, like.coverage.sizes)
    proofs = list(proofs)
    proof = Evidence(
        sum(p.passes for p in proofs),
        sum(p.proved for p in proofs),
        sum(p.extra for p in proofs),
        tuple(dict.fromkeys(what for p in proofs for what in p.trusted)),
    )
    return Report.of(parameters, like.names, coverage, num_examples, proof, unreached)


def refuse_sharded(report: Report, what: str) -> None:
    """Raise an error if the sums of a report are shards."""
    if any(report[name].is_sharded for name in report):
        raise NotImplementedError(
            f"{what}: the report's sums are shards, and it is of all ranks' examples already; take what you need of it, such as "
            "report[name].abs_sum.full_tensor()"
        )
