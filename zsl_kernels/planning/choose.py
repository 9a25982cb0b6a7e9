"""``choose``: the plan of one call, which is the fastest candidate among the algorithms of the allowed backends.

The plan is a pure function of integers, so it can be printed and tested. cpu_cost.py and gpu_cost.py predict the candidates' times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from zsl_kernels.planning import cpu_cost, gpu_cost
from zsl_kernels.planning.call import Call, Candidate

OPS = ("interference", "gram", "dot", "sq_norm", "weighted_grad")  # ops that zsl_kernels.plan accepts


@dataclass(frozen=True)
class Plan:
    """The choice for a call: the backend ``impl``, the algorithm ``way`` and the ``tile``. ``print`` it to see all candidates.

    Each printed line shows a candidate's tile (on a GPU also the depth of a step), its predicted time and bottleneck, its
    operations, its memory traffic and its workspace.
    """

    call: Call
    candidates: tuple[Candidate, ...]  # fastest first

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]

    @property
    def impl(self) -> str:
        return self.chosen.impl

    @property
    def way(self) -> str:
        return self.chosen.way

    @property
    def tile(self) -> tuple[int, int]:
        return self.chosen.tile

    def __str__(self) -> str:
        shown: dict[tuple[object, ...], Candidate] = {}
        for c in self.candidates:  # show only the fastest of candidates that differ only in splits
            shown.setdefault((c.impl, c.way, c.kernel, c.tile, c.config), c)
        lines = [f"{self.call}: {self.way} ({self.impl})"]
        for c in shown.values():
            mark = "->" if c is self.chosen else "  "
            tile = "×".join(map(str, c.tile if c.config is None else (*c.tile, c.config.depth)))
            config = "" if c.config is None else f"  {c.config.warps} warps, {c.config.stages} stages"
            config += f", {c.splits} splits" if c.splits > 1 else ""
            lines.append(
                f"  {mark} {c.way:<9}{c.impl:<8}tile {tile:<11}{1e3 * c.time:>9.4f} ms {f'({c.limit})':<14}"
                f"{c.work / 1e9:>8.3f} GFLOP{c.bytes / 1e6:>8.2f} MB{c.workspace / 2**20:>7.2f} MiB{config}"
            )
        return "\n".join(lines)


CPU_WAYS = {"cpu": (cpu_cost.direct, cpu_cost.ghost), "chunked": (cpu_cost.rank_one, cpu_cost.matmul, cpu_cost.chunked)}
GPU_WAYS = {
    "triton": (
        gpu_cost.triton_direct,
        gpu_cost.triton_stored,
        gpu_cost.triton_rank_one,
        gpu_cost.triton_ghost,
        gpu_cost.triton_backward,
    ),
    "cuda": (gpu_cost.cuda_direct, gpu_cost.hopper),
}


@lru_cache(maxsize=4096)
def choose(call: Call, impls: tuple[str, ...]) -> Plan:
    """Return the plan of a call among the algorithms of ``impls``. If several have the same algorithm, use the first one's."""
    found: list[Candidate] = []
    for impl in impls:
        found += [candidate for way in CPU_WAYS.get(impl, ()) if (candidate := way(call)) is not None]
        found += [candidate for way in GPU_WAYS.get(impl, ()) for candidate in way(call)]
    if call.gpu is not None:
        found = [gpu_cost.measured(candidate, call) for candidate in found]
    if not found:
        raise ValueError(f"impl: expected one with a kernel for {call}, got {', '.join(impls)}")
    owner = {candidate.way: candidate.impl for candidate in reversed(found)}
    return Plan(call, tuple(sorted((c for c in found if owner[c.way] == c.impl), key=lambda c: c.time)))
