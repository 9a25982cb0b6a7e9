"""Defines what a probe returns: the results of each parameter, the metrics over all parameters, and the coverage."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from zerosum.metrics import Metric, add_coordinates, block_diagonal, gradient_metrics
from zerosum.probe.contributions import WEIGHT_SHAPED, Sums
from zerosum.probe.parameters import UNSEEN, ParameterProbe
from zerosum.probe.proof import Proof
from zerosum.probe.results import Pass, Results, Scale, coordinate_sums
from zsl_kernels import CoordinateSums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

P = TypeVar("P")


class ParameterReport:
    """The results of one covered parameter. Its attributes have the names of the fields of :class:`zsl_kernels.InterferenceSums`.

    The three sums have the parameter's shape. ``grad_sum`` is read from the gradient that autograd stored. Read it, or clone it,
    before anything such as gradient clipping writes to that gradient; afterwards it raises an error.
    """

    def __init__(self, name: str, how: str, results: Results, shape: torch.Size) -> None:
        self.name = name
        self.how = how
        self._results = results
        self.shape = shape

    @property
    def _sums(self) -> Sums:
        return self._results.sums

    def reread(self, is_current: Callable[[], bool] | None, version: int, memo: dict[Any, Any]) -> ParameterReport:
        """See :meth:`Report.reread`."""
        return ParameterReport(self.name, self.how, self._results.reread(is_current, version, memo), self.shape)

    @property
    def is_sharded(self) -> bool:
        """Whether the sums are DTensors, of which each rank holds a part."""
        return self._results.placed is not None

    @property
    def version(self) -> int:
        """The version counter of the memory that holds ``grad_sum``."""
        return self._results.version

    @property
    def common(self) -> Scale:
        """The factor that the loss shows for all results of the block."""
        return self._results.common

    @cached_property
    def _scale(self) -> float:
        """The factor of the parameter's results. Reading it waits for the device if the loss's factors are there."""
        return self._results.scale * self._results.common.value

    @property
    def grad_sum(self) -> Tensor:
        self._results.check_current(self.name)
        self._results.check_version(self.name)
        return self._weight_shaped(self._results.grad_sum, 1)

    @property
    def abs_sum(self) -> Tensor:
        return self._weight_shaped(self._sums.abs_sum, 1)

    @property
    def sq_sum(self) -> Tensor:
        return self._weight_shaped(self._sums.sq_sum, 2)

    @cached_property
    def l1(self) -> Tensor:
        return self._scaled(self._sums.l1, 1)

    @cached_property
    def sq_norm(self) -> Tensor:
        return self._scaled(self._sums.sq_norm, 2)

    @cached_property
    def dot(self) -> Tensor | None:
        return None if self._sums.dot is None else self._scaled(self._sums.dot, 1)

    @cached_property
    def abs_dot(self) -> Tensor | None:
        return None if self._sums.abs_dot is None else self._scaled(self._sums.abs_dot, 1)

    @cached_property
    def gram_blocks(self) -> list[Tensor] | None:
        """The Gram matrix of each micro-batch, in order."""
        grams = self._results.grams
        return None if grams is None else [self._scaled(gram, 2) for gram in grams]

    @property
    def gram(self) -> Tensor | None:
        """The (N, N) Gram matrix; NaN for pairs of examples from different micro-batches."""
        return None if self.gram_blocks is None else block_diagonal(self.gram_blocks)

    @cached_property
    def coordinates(self) -> CoordinateSums:
        self._results.check_current(self.name)
        assert self._results.coordinates is not None  # a finished one has them
        c, s = coordinate_sums(self._results.coordinates), self._scale
        return c._replace(grad_sq=c.grad_sq * s * s, sq=c.sq * s * s, p_sum=c.p_sum * s, p_abs=c.p_abs * s, p_root=c.p_root * s)

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The parameter's own metrics; see :func:`zerosum.metrics.gradient_metrics`."""
        return gradient_metrics(self.coordinates, self.l1, self.sq_norm, self.dot, self.gram_blocks, size=self.shape.numel())

    @property
    def is_embedding(self) -> bool:
        return is_embedding(self.how.split(" + "), self.shape)

    @property
    def finite(self) -> bool:
        return bool(self.sq_norm.isfinite().all())

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the results as JSON data and as cloned tensors by field. For an embedding, the sums hold only touched rows."""
        given: dict[str, Tensor | None] = {"abs_sum": self._sums.abs_sum, "sq_sum": self._sums.sq_sum}
        if not self._results.written_to:
            given["grad_sum"] = self._results.grad_sum
        tensors = {name: self._scaled(x, WEIGHT_SHAPED[name]) for name, x in given.items() if x is not None}
        tensors |= {name: x for name in ("l1", "sq_norm", "dot", "abs_dot") if (x := getattr(self, name)) is not None}
        tensors |= {f"gram/{k}": block for k, block in enumerate(self.gram_blocks or [])}
        if self._sums.rows is not None:
            tensors["rows"] = self._sums.rows
        about = {
            "how": self.how,
            "shape": list(self.shape),
            "coordinates": list(self.coordinates),
            "padded": self._sums.padded,
            "grams": None if self.gram_blocks is None else len(self.gram_blocks),
        }
        return about, {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        from zerosum.probe.stored import parameter_of

        return parameter_of, (self.name, *self.state())

    def _weight_shaped(self, x: Tensor, power: int) -> Tensor:
        """Expand and scale a sum. An embedding keeps only the rows that some example touched; all others are zero."""
        if (placed := self._results.placed) is not None:
            return placed(self._scaled(x, power))
        return self._scaled(self._sums.spread(x, self.shape).view(self.shape), power)

    def _scaled(self, x: Tensor, power: int) -> Tensor:
        self._results.check_current(self.name)
        return x if self._scale == 1 else x * self._scale**power

    def __repr__(self) -> str:
        return f"ParameterReport({self.name!r}, how={self.how!r}, D_grad={self.metrics['D_grad'].value:.4f})"


def _floats(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Flatten metrics to floats: values, nulls and debiased values, each under its own name."""
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        found[name] = metric.value
        for suffix, value in (("null", metric.null), ("debiased", metric.debiased)):
            if value is not None:
                found[f"{name}_{suffix}"] = value
    return found


def is_embedding(how: Iterable[str], shape: torch.Size) -> bool:
    """Whether a parameter is a table of looked-up rows, even if it has other uses, as a tied head does. Stacked experts are looked
    up too, but they have more than two dimensions."""
    return len(shape) == 2 and any(use.lower().startswith(("embedding", "index")) for use in how)


@dataclass(frozen=True)
class Coverage:
    """The trainable parameters that the report covers, with the rule for each, and those it does not cover, with the reason."""

    covered: dict[str, str]  # name → rule
    not_covered: dict[str, str]  # name → reason
    sizes: dict[str, int]  # name → number of coordinates

    @property
    def share(self) -> float:
        """The share of the trainable coordinates that are covered."""
        total = sum(self.sizes.values())
        return sum(self.sizes[name] for name in self.covered) / total if total else math.nan

    def __str__(self) -> str:
        lines = [f"{len(self.covered)} of {len(self.sizes)} trainable parameters covered, {self.share:.1%} of their coordinates"]
        lines += [f"  not covered: {name} ({reason})" for name, reason in self.not_covered.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Evidence:
    """How a block's rows were attributed to examples.

    Of ``passes`` backward passes, ``proved`` were proved by ``extra`` additional backward passes. The others reuse the proof of an
    earlier pass with the same structure. ``trusted`` lists what was assumed without proof.
    """

    passes: int
    proved: int
    extra: int
    trusted: tuple[str, ...]

    @classmethod
    def of(cls, proofs: list[Proof]) -> Evidence:
        new = [proof for proof in proofs if proof.passes]
        trusted = tuple(dict.fromkeys(proof.trusted for proof in proofs if proof.trusted))
        return cls(len(proofs), len(new), sum(proof.passes for proof in new), trusted)

    def __str__(self) -> str:
        if not self.passes:
            return "nothing was measured"
        said = f"attribution proved in {self.proved} of {self.passes} passes by {self.extra} extra backward passes"
        if not self.proved:
            said = "attribution as proved before"
        return "; ".join([said, *(f"not proved: {what}" for what in self.trusted)])


class ByName(Generic[P]):
    """Maps parameter names to a report's parameters. ``report[name]`` accepts any of a parameter's names; iteration goes over the
    covered parameters.

    ``names`` maps every name of a parameter to the name under which the report lists it.
    """

    def __init__(self, parameters: dict[str, P], names: dict[str, str], coverage: Coverage) -> None:
        self._parameters = parameters
        self.names = names
        self.coverage = coverage

    def __getitem__(self, name: str) -> P:
        known = self.names.get(name, name)
        if known in self._parameters:
            return self._parameters[known]
        reason = self.coverage.not_covered.get(known, "not a trainable parameter of the model")
        raise KeyError(f"{name}: {reason}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __contains__(self, name: object) -> bool:
        return self.names.get(str(name), name) in self._parameters


class Report(ByName[ParameterReport]):
    """The results of one probed block: sums over its backward passes, and the examples of all passes in order.

    Attributes:
        num_examples: N.
        coverage: which parameters are covered, and why others are not.
        proof: how the probe proved which rows belong to which examples.
    """

    def __init__(self, tracked: list[ParameterProbe], passes: list[Pass], proofs: list[Proof] | None = None) -> None:
        self.num_examples = sum(p.examples for p in passes)
        self.proof = Evidence.of(proofs or [])
        parameters = {
            t.name: ParameterReport(t.name, " + ".join(t.how), t.results, t.parameter.shape)
            for t in tracked
            if t.results is not None
        }
        coverage = Coverage(
            covered={name: p.how for name, p in parameters.items()},
            not_covered={t.name: t.problem for t in tracked if t.results is None},
            sizes={t.name: t.parameter.numel() for t in tracked},
        )
        super().__init__(parameters, {name: t.name for t in tracked for name in t.names}, coverage)
        self._doubts = {t.name: t.doubts for t in tracked if t.results is not None and t.doubts}
        self.unreached = frozenset(t.name for t in tracked if t.unreached)
        missing = [t.name for t in tracked if t.results is not None and t.direction is None]
        if missing and len(missing) < len(self._parameters):
            raise ValueError(f"direction: expected one for every covered parameter, got none for {', '.join(missing)}")

    def reread(self, is_current: Callable[[], bool] | None = None, versions: Mapping[str, int] | None = None) -> Report:
        """Return a report of the current contents of this report's tensors, for use after a replay of a captured CUDA graph.

        Args:
            is_current: returns whether the tensors still hold these results; if not, reading the new report raises an error. None:
                the results are always taken to be current.
            versions: the result of :meth:`versions` right after the replay, to detect later writes to gradients. None: read them
                now.
        """
        versions = self.versions() if versions is None else versions
        memo: dict[Any, Any] = {}
        parameters = {name: p.reread(is_current, versions[name], memo) for name, p in self._parameters.items()}
        found = Report.of(parameters, self.names, self.coverage, self.num_examples, self.proof)
        found._doubts, found.unreached = self._doubts, self.unreached
        return found.settled()

    @classmethod
    def of(
        cls,
        parameters: dict[str, ParameterReport],
        names: dict[str, str],
        coverage: Coverage,
        num_examples: int,
        proof: Evidence,
        unreached: frozenset[str] = frozenset(),
    ) -> Report:
        """Build a report from known results. ``parameters`` are the covered ones; no loss depends on the ``unreached`` ones."""
        found = cls.__new__(cls)
        ByName.__init__(found, parameters, names, coverage)
        found.num_examples, found.proof, found._doubts, found.unreached = num_examples, proof, {}, unreached
        return found

    def without_results(self) -> Report:
        """Return a report with only the names and the coverage."""
        return Report.of({}, self.names, self.coverage, self.num_examples, self.proof)

    def settled(self) -> Report:
        """Return the report without parameters for which part of the gradient was not observed. Read the device to find them."""
        if not self._doubts:
            return self
        refuted = torch.stack([torch.stack(doubts).any() for doubts in self._doubts.values()]).tolist()
        unseen = {name for name, is_refuted in zip(self._doubts, refuted, strict=True) if is_refuted}
        parameters, coverage = self._parameters, self.coverage
        if unseen:
            parameters = {name: p for name, p in parameters.items() if name not in unseen}
            known = {**coverage.not_covered, **dict.fromkeys(unseen, UNSEEN)}
            coverage = Coverage(
                covered={name: how for name, how in coverage.covered.items() if name not in unseen},
                not_covered={name: known[name] for name in coverage.sizes if name in known},
                sizes=coverage.sizes,
            )
        return Report.of(parameters, self.names, coverage, self.num_examples, self.proof, self.unreached)

    def versions(self) -> dict[str, int]:
        """Return the version counter of each parameter's gradient memory."""
        return {name: p.version for name, p in self._parameters.items()}

    def _total(self, field: str) -> Tensor | None:
        """Return the sum of a scalar field over all covered parameters, in float64."""
        parts = [getattr(p, field) for p in self._parameters.values()]
        if not parts or parts[0] is None:
            return None
        return torch.stack([part.double() for part in parts]).sum(0)

    @cached_property
    def l1(self) -> Tensor | None:
        return self._total("l1")

    @cached_property
    def sq_norm(self) -> Tensor | None:
        return self._total("sq_norm")

    @cached_property
    def dot(self) -> Tensor | None:
        return self._total("dot")

    @cached_property
    def abs_dot(self) -> Tensor | None:
        return self._total("abs_dot")

    @cached_property
    def gram_blocks(self) -> list[Tensor] | None:
        """The Gram matrix of each micro-batch, in order."""
        found = [p.gram_blocks for p in self._parameters.values()]
        if not found or found[0] is None:
            return None
        return [torch.stack([block.double() for block in blocks]).sum(0) for blocks in zip(*found, strict=True)]

    @property
    def gram(self) -> Tensor | None:
        """The (N, N) Gram matrix; NaN for pairs of examples from different micro-batches."""
        return None if self.gram_blocks is None else block_diagonal(self.gram_blocks)

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The metrics over all covered parameters; see :func:`zerosum.metrics.gradient_metrics`. Empty if nothing is covered.

        As in the paper, D_grad leaves out embeddings, and therefore heads that are tied to one. It is NaN if nothing else is
        covered.
        """
        if self.l1 is None or self.sq_norm is None:
            return {}
        sums, size = self._coordinates(list(self))
        non_embedding = self._coordinates([name for name, p in self._parameters.items() if not p.is_embedding])
        return gradient_metrics(sums, self.l1, self.sq_norm, self.dot, self.gram_blocks, size=size, non_embedding=non_embedding)

    def _coordinates(self, names: list[str]) -> tuple[CoordinateSums, int]:
        """Return the sums over coordinates of some parameters, and the number of coordinates."""
        sums = add_coordinates(self._parameters[name].coordinates for name in names)
        return sums, sum(self.coverage.sizes[name] for name in names)

    @cached_property
    def not_finite(self) -> list[str]:
        """The names of parameters whose gradients contain a NaN or an infinity."""
        if not self._parameters:
            return []
        finite = torch.stack([p.sq_norm.isfinite().all() for p in self._parameters.values()]).tolist()
        return [name for name, is_finite in zip(self._parameters, finite, strict=True) if not is_finite]

    @property
    def finite(self) -> bool:
        return not self.not_finite

    @property
    def scope(self) -> str:
        """A sentence that says which parameters D_grad covers."""
        out = {name: "embedding" for name, p in self._parameters.items() if p.is_embedding}
        out |= dict.fromkeys(self.coverage.not_covered, "not covered")
        said = f"D_grad is over {len(self.coverage.sizes) - len(out)} of {len(self.coverage.sizes)} trainable parameters"
        if not out:
            return said
        shown = [f"{name} ({why})" for name, why in [*out.items()][:6]]
        return f"{said}, without {', '.join(shown)}" + (f" and {len(out) - 6} more" if len(out) > 6 else "")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a safetensors file, which :func:`zerosum.load_report` reads.

        The file is written completely or not at all. It leaves out Σ g of any parameter whose ``.grad`` was overwritten, for
        instance by clipping: save the report before that.

        Raises:
            ImportError: safetensors is not installed.
        """
        from zerosum.probe import stored

        stored.save(self, path)

    def all_reduce(self, group: ProcessGroup | None = None, *, direction: Mapping[str, Tensor] | None = None) -> Report:
        """Return one report of all processes' examples, as if the ranks' batches were micro-batches of one process. Every rank of
        the group must call it; each rank gets the same report.

        - Σ g, Σ |g| and Σ g² are added over the ranks. Scalars are concatenated in rank order. Metrics use the total N.
        - A parameter is covered if, on each rank, it is covered or no example reaches it.
        - Under DistributedDataParallel with equal numbers of examples and summed losses, Σ g is ``.grad`` times the number of
          ranks.
        - With ``loss_reduction="auto"``, the factors are normalized so that the average example over all ranks has weight one.
        - The Gram matrix has one block per rank. Inner products between ranks are not computed and are NaN in ``gram``.
        - It sends 12 bytes for each float32 coordinate by ``all_reduce``, and the scalars.

        Args:
            group: the processes; None for all.
            direction: the probe's direction, if it had one. The metrics along the direction need it again.

        Raises:
            RuntimeError: no process group is initialized, or a rank's gradient was already overwritten.
            ValueError: the ranks have reports of different models.
        """
        from zerosum.distributed import reports

        return reports.all_reduce(self, group, direction)

    def to_dict(self, parameters: bool = False) -> dict[str, float]:
        """Return every metric as a float by name, in the form that loggers take.

        The names are ``D_grad``, ``D_grad_null`` (the value under random signs), ``grad_norm_debiased`` and so on. ``num_examples``
        and ``coverage`` (the share of covered coordinates) are included.

        Args:
            parameters: whether to add the metrics of each parameter, as ``name/D_grad``.
        """
        found = {"num_examples": float(self.num_examples), "coverage": self.coverage.share, **_floats(self.metrics)}
        if parameters:
            for name, p in self._parameters.items():
                found |= {f"{name}/{key}": value for key, value in _floats(p.metrics).items()}
        return found

    def table(self) -> list[dict[str, Any]]:
        """Return one row per covered parameter: name, rule, shape, size and metrics. You can pass it to ``pandas.DataFrame``."""
        return [
            {"name": name, "how": p.how, "shape": tuple(p.shape), "size": p.shape.numel(), **_floats(p.metrics)}
            for name, p in self._parameters.items()
        ]

    def by_module(self, depth: int = 1) -> dict[str, Report]:
        """Return a report for each module, keyed by the first ``depth`` parts of its name, in the model's order.

        Parameters of the model itself are under "".
        """
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise ValueError(f"depth: expected a positive integer, got {depth!r}")
        members: dict[str, list[str]] = {}
        for name in self.coverage.sizes:
            members.setdefault(".".join(name.split(".")[:-1][:depth]), []).append(name)
        return {prefix: self._of(set(names)) for prefix, names in members.items()}

    def _of(self, some: set[str]) -> Report:
        c = self.coverage
        covered, not_covered, sizes = ({k: v for k, v in x.items() if k in some} for x in (c.covered, c.not_covered, c.sizes))
        parameters = {name: p for name, p in self._parameters.items() if name in some}
        names = {alias: name for alias, name in self.names.items() if name in some}
        coverage = Coverage(covered, not_covered, sizes)  # type: ignore[arg-type]
        return Report.of(parameters, names, coverage, self.num_examples, self.proof)

    def __reduce__(self) -> tuple[Any, ...]:
        from zerosum.probe.stored import report_of, state_of

        return report_of, state_of(self)

    def __repr__(self) -> str:
        """Return a summary for a terminal; ``print`` shows more."""
        c = self.coverage
        head = f"Report of {self.num_examples} examples, {len(c.covered)} of {len(c.sizes)} parameters covered ({c.share:.1%})"
        shown = [f"  {name:>16} {metric.value:12.5g}" for name, metric in self.metrics.items()][:20]
        return "\n".join([head, *shown])

    def __str__(self) -> str:
        lines = [f"{self.num_examples} examples; {self.coverage}", str(self.proof)]
        if self._parameters:
            lines.append(self.scope)
        if not self.finite:
            lines.append(f"NOT FINITE: {', '.join(self.not_finite)}")
        for name, metric in self.metrics.items():
            null = "" if metric.null is None else f"   (random signs: {metric.null:.4g})"
            lines.append(f"{name:>16} {metric.value:12.5g}{null}")
        return "\n".join(lines)
