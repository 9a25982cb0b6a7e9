"""The cost model against the clock: ``python -m benchmarks.costs [--isa avx2]``.

Runs every way that the plan considers, on a grid of sizes; says how often the plan's choice was the fastest and where it lost
most; and fits the constants of zsl_kernels/planning/cpu_cost.py to the times.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import torch

import zsl_kernels as zk
from benchmarks.cases import Case, inputs
from tests.inputs import Inputs, cpu_isas, running
from zerosum.bench import machine
from zsl_kernels.backends.dispatch import BACKENDS
from zsl_kernels.planning.call import Candidate
from zsl_kernels.planning.choose import Plan

GRID = [Case(N, T, O, K) for O, K in ((256, 256), (768, 768), (3072, 768)) for N in (8, 32) for T in (1, 4, 16, 64, 128, 256)]
CALLS = {"interference": {}, "interference + Gram": {"gram": True}, "gram": {}, "sq_norm": {}, "dot": {}, "weighted_grad": {}}
CONSTANTS = {"ghost": "_GHOST", "rank-one": "_MATMUL (rank-one)", "matmul": "_MATMUL", "chunked": "_MATMUL (chunked)"}
LONGEST = 2e10  # operations; what is longer is not a candidate in earnest here
ROUNDS = 5


@dataclass(frozen=True)
class Measured:
    """One candidate's time. ``plan`` chose the first of its candidates."""

    name: str
    plan: Plan
    candidate: Candidate
    seconds: float

    def terms(self) -> dict[str, float]:
        """What the time is made of, by constant of the plan, which leaves out two terms that are the same for every way."""
        call, way = self.plan.call, self.candidate.way
        outputs = {"interference": 3.0, "weighted_grad": 1.0}.get(call.op, 0.0) * call.O * call.K
        rest = {"writing an output": outputs, "a call": 1.0}
        if way == "direct":
            pairs = call.pairs * call.O * call.K
            return {"product": call.product, f"_FOLD[{call.op}]": call.elements, "_PAIR": pairs, **rest}
        fold = {f"_CHUNKED_FOLD[{call.op}]": call.elements} if way == "chunked" else {}
        return {CONSTANTS[way]: self.candidate.work, **fold, **rest}


def runner(name: str, plan: Plan, candidate: Candidate, x: Inputs) -> Callable[[], object]:
    """The call, done in the candidate's way."""
    op = plan.call.op
    operands: dict[str, tuple[object, ...]] = {
        "interference": (x.a, x.b, None, plan.call.gram),
        "gram": (x.a, x.b, None, None),
        "sq_norm": (x.a, x.b),
        "dot": (x.a, x.b, x.direction),
        "weighted_grad": (x.a, x.b, x.weights, None, None),
    }
    forced = dataclasses.replace(plan, candidates=(candidate,))
    return lambda: getattr(BACKENDS[candidate.impl], op)(forced, *operands[op])


def measure(case: Case, name: str) -> list[Measured]:
    """All candidates of a call, their runs alternating. Where examples have rank one, the chunked form is that way itself."""
    sizes = {"N": case.N, "T": case.T, "K": case.K, "O": case.O}
    plan = zk.plan(name.removesuffix(" + Gram"), **sizes, **CALLS[name])
    ways = {c.way for c in plan.candidates}
    candidates = [
        c for c in plan.candidates if c is plan.chosen or (c.work < LONGEST and not (c.way == "chunked" and "rank-one" in ways))
    ]
    runs = [runner(name, plan, candidate, inputs(case)) for candidate in candidates]
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(ROUNDS + 1):
        for run, taken in zip(runs, times, strict=True):
            start = perf_counter()
            run()
            if round_:  # the first warms up
                taken.append(perf_counter() - start)
    # The fastest: what others do on the machine only ever adds.
    return [Measured(name, plan, c, min(taken)) for c, taken in zip(candidates, times, strict=True)]


def ranking(cases: list[list[Measured]]) -> str:
    """Where the plan's choice was not the fastest, by the time that it lost."""
    lines, right = [], 0
    for ways in cases:
        best, chosen = min(ways, key=lambda m: m.seconds), ways[0]
        loss = chosen.seconds / best.seconds
        right += loss < 1.05
        if loss >= 1.05:
            predicted = best.candidate.time / chosen.candidate.time
            text = f"{chosen.candidate.way} {1e3 * chosen.seconds:.2f} ms, {best.candidate.way} {1e3 * best.seconds:.2f} ms"
            lines.append((loss, f"  {chosen.plan.call!s:<52} {text:<44} {loss:5.2f} x; predicted {1 / predicted:.2f} x"))
    head = f"The plan's choice was within 5% of the fastest in {right} of {len(cases)} calls. Where it was not:"
    return "\n".join([head, *(line for _, line in sorted(lines, reverse=True))])


def fit(found: list[Measured]) -> dict[str, float]:
    """Seconds for each term: non-negative, with the least sum of absolute relative errors (by reweighted least squares)."""
    rows = [m.terms() for m in found]
    names = sorted({name for row in rows for name, work in row.items() if work})
    weights = np.ones(len(found))
    for _ in range(50):
        matrix = np.array([[row.get(name, 0.0) / m.seconds for name in names] for row, m in zip(rows, found, strict=True)])
        scale = np.abs(matrix).max(0)
        solution = np.linalg.lstsq(matrix / scale * weights[:, None], weights, rcond=None)[0]
        if (solution < 0).any():
            del names[int(solution.argmin())]
        else:
            weights = np.abs(matrix / scale @ solution - 1).clip(0.01) ** -0.5
    return dict(zip(names, (solution / scale).tolist(), strict=True))


def constants(found: list[Measured]) -> str:
    """Every way is fitted alone; the direct one, which comes first, is the unit."""
    lines, unit = [], 0.0
    for way in dict.fromkeys(["direct", *(m.candidate.way for m in found)]):
        mine = [m for m in found if m.candidate.way == way]
        seconds = fit(mine)
        ratios = [sum(seconds.get(name, 0.0) * work for name, work in m.terms().items()) / m.seconds for m in mine]
        unit = unit or seconds["product"]
        error = median(max(ratio, 1 / ratio) for ratio in ratios)
        lines.append(f"{way}: {len(mine)} times, fitted to a factor of {error:.2f} at the median")
        for name, value in seconds.items():
            lines.append(f"  {name:<32} {1e6 * value:8.1f} us" if name == "a call" else f"  {name:<32} {value / unit:8.2f}")
    return "\n".join([f"Constants, in units of the direct product ({1e-9 / unit:.0f} GFLOP/s)", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=cpu_isas(), default=zk.build_info()["cpu_isa"], help="kernels to measure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with running(f"cpu-{options.isa}"), torch.no_grad():
        print(machine.line(machine.describe()))
        cases = [measure(case, name) for name in CALLS for case in GRID]
    print(ranking(cases))
    print(constants([m for ways in cases for m in ways]))


if __name__ == "__main__":
    main()
