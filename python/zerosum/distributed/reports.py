"""Combines the reports of several ranks into one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zerosum.probe.contributions import SCALARS, Sums
from zerosum.probe.report import Evidence, Report
from zerosum.probe.results import Pass, Results, common_scale
from zerosum.probe.stored import joined, refuse_sharded

VECTORS = [field for field in SCALARS if field != "gram"]  # (N,)


class Ranks:
    """The ranks that have different examples. Several groups, outermost first, are the dimensions of a mesh."""

    def __init__(self, groups: Sequence[dist.ProcessGroup | None]) -> None:
        self._groups = groups

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any rank."""
        found = torch.tensor(float(flag), device=device)
        for group in self._groups:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        return bool(found)

    def everyone(self, mine: Any) -> list[Any]:
        """Return every rank's object, in rank order."""
        found = [mine]
        for group in reversed(self._groups):
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = [x for part in parts for x in part]
        return found

    def joined(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Concatenate (F, N_r) of each rank r to (F, Σ N_r), in rank order."""
        found = x.new_zeros(1, x.shape[0], max(counts))
        found[0, :, : x.shape[1]] = x
        for group in reversed(self._groups):
            parts = [torch.empty_like(found) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, found, group=group)
            found = torch.cat(parts)
        return torch.cat([part[:, :count] for part, count in zip(found, counts, strict=True)], 1)


class Joint:
    """What all ranks' reports contain together. Each rank computes the same."""

    def __init__(self, ranks: Ranks, report: Report, error: Exception | None = None) -> None:
        self._ranks, self._report = ranks, report
        self._mine: dict[str, Any] = {"error": str(error)} if error is not None else _about(report)
        self._everyone = everyone = ranks.everyone(self._mine)
        if error is not None:
            raise error  # the other ranks find it in `everyone`, so that no rank waits forever
        for rank, about in enumerate(everyone):
            if "error" in about:
                raise RuntimeError(f"all_reduce: rank {rank} of the group has no report to add: {about['error']}")
        self._fields: list[str] = next((about["fields"] for about in everyone if about["covered"]), [])
        for rank, about in enumerate(everyone):
            if about["sizes"] != self._mine["sizes"] or (about["covered"] and about["fields"] != self._fields):
                raise ValueError(
                    f"report: expected the same parameters and fields on every rank, got different ones on rank {rank}"
                )
        self.covered, self.not_covered = self._coverage()
        self._counts = [about["num_examples"] for about in everyone]
        self.num_examples = sum(self._counts)
        # `common` is the factor for results that all ranks' losses show; `factor` is its quotient by this rank's own factor.
        known = [torch.tensor(x, dtype=torch.float64) for about in everyone if (x := about["factors"]) is not None]
        self.common = common_scale(Pass(0, 0, factors=(count, total)) for count, total in known).value
        self.factor = self.common / next((report[name].common.value for name in report), 1.0)

    def _coverage(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what is known about each covered parameter, and why the others are not covered. If none of a rank's examples
        reach a parameter, that rank contributes zeros."""
        covered, not_covered = {}, {}
        for name in self._mine["sizes"]:
            refused = [
                f"not covered on rank {rank}: {about['not_covered'][name]}"
                for rank, about in enumerate(self._everyone)
                if name in about["not_covered"] and name not in about["unreached"]
            ]
            like = next((about["like"][name] for about in self._everyone if name in about["like"]), None)
            if refused:
                not_covered[name] = "; ".join(refused)
            elif like is None:
                not_covered[name] = self._everyone[0]["not_covered"][name]
            else:
                covered[name] = like
        return covered, not_covered

    def lose(self, missing: Mapping[str, str]) -> None:
        """Mark some parameters as not covered, with the reasons."""
        for name, why in missing.items():
            self.covered.pop(name, None)
            self.not_covered.setdefault(name, why)

    def scalars(self, name: str, total: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[dict[str, Any], list[Tensor] | None]:
        """Return a parameter's scalars by field, concatenated over all ranks, and the Gram matrices of all ranks' passes.

        ``total`` turns scalars over this rank's coordinates into scalars over all coordinates.
        """
        like, n, fields = self.covered[name], self._report.num_examples, self._fields
        blocks: list[int] = self._mine["blocks"]
        if name in self._report:
            p = self._report[name]
            own = torch.stack([getattr(p, field) * self.factor ** SCALARS[field] for field in fields])
            grams = [block * self.factor**2 for block in p.gram_blocks or []]
        else:
            own = torch.zeros(len(fields), n, dtype=like["dtype"], device=like["device"])
            grams = [own.new_zeros(k, k) for k in blocks if like["gram"]]
        found: dict[str, Any] = {
            **dict.fromkeys(VECTORS),
            **dict(zip(fields, self._ranks.joined(total(own), self._counts), strict=True)),
        }
        if not like["gram"]:
            return found, None
        sizes: list[int] = [k for about in self._everyone for k in about["blocks"]]
        flat = torch.cat([own.new_zeros(0), *(block.reshape(-1) for block in grams)])[None]
        (flat,) = self._ranks.joined(total(flat), [sum(k * k for k in about["blocks"]) for about in self._everyone])
        return found, [x.view(k, k) for x, k in zip(flat.split([k * k for k in sizes]), sizes, strict=True)]

    @property
    def how(self) -> dict[str, list[str]]:
        """The rules that cover each parameter on any rank."""
        every = [about["covered"] for about in self._everyone]
        return {name: list(dict.fromkeys(use for x in every if name in x for use in x[name].split(" + "))) for name in self.covered}

    @property
    def proofs(self) -> list[Evidence]:
        return [Evidence(*about["proof"]) for about in self._everyone]

    @property
    def unreached(self) -> frozenset[str]:
        return frozenset.intersection(*(about["unreached"] for about in self._everyone))


def _about(report: Report) -> dict[str, Any]:
    """Return what every rank needs to know about a report."""
    proof, first = report.proof, next(iter(report), None)
    grams = None if first is None else report[first].gram_blocks
    factors = None if first is None else report[first].common.factors
    return {
        "num_examples": report.num_examples,
        "covered": report.coverage.covered,
        "not_covered": report.coverage.not_covered,
        "unreached": report.unreached,
        "sizes": report.coverage.sizes,
        "fields": [field for field in VECTORS if first is not None and getattr(report[first], field) is not None],
        "factors": None if factors is None else tuple(map(float, factors)),
        "like": {
            name: {"shape": p.shape, "dtype": p.l1.dtype, "device": p.l1.device.type, "gram": grams is not None}
            for name in report
            for p in [report[name]]
        },
        "blocks": [report.num_examples] if first is None else [len(block) for block in grams or []],
        "proof": (proof.passes, proof.proved, proof.extra, proof.trusted),
    }


def all_reduce(report: Report, group: dist.ProcessGroup | None, direction: Mapping[str, Tensor] | None) -> Report:
    """See :meth:`zerosum.Report.all_reduce`."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("all_reduce: no process group is initialized; call torch.distributed.init_process_group first")
    refuse_sharded(report, "all_reduce")
    report = report.settled()
    joint = Joint(Ranks([group]), report, _problem(report, direction))
    found: dict[str, Results] = {}
    waiting = []
    for name, like in joint.covered.items():
        sums = _own_sums(report, name, like, joint.factor)
        waiting.append(dist.all_reduce(sums, group=group, async_op=True))
        scalars, grams = joint.scalars(name)
        grad_sum, abs_sum, sq_sum = sums.unbind()
        found[name] = Results.held(Sums(grad_sum, abs_sum, sq_sum, **scalars, gram=None), grams, abs_sum.shape)
    for work in waiting:
        work.wait()
    for results in found.values():
        results.hold(results.sums.grad_sum)  # the all-reduce wrote to it until now
    return joined(found, report, joint.how, joint.not_covered, joint.proofs, joint.num_examples, direction, joint.unreached)


def _problem(report: Report, direction: Mapping[str, Tensor] | None) -> Exception | None:
    """Return why a report cannot be added to others, as an error."""
    try:
        if report.dot is not None and direction is None:
            raise ValueError("direction: expected the probe's direction, which the report's metrics need again; got None")
        for name in report:
            report[name].grad_sum  # noqa: B018 (raises if it was overwritten)
    except (RuntimeError, ValueError) as error:
        return error
    return None


def _own_sums(report: Report, name: str, like: Mapping[str, Any], factor: float) -> Tensor:
    """Return this rank's three sums, (3, *shape)."""
    if name not in report:
        return torch.zeros(3, *like["shape"], dtype=like["dtype"], device=like["device"])
    p = report[name]
    return torch.stack((p.grad_sum * factor, p.abs_sum * factor, p.sq_sum * factor**2))
