"""Every token's own gradient, exactly and from a sample, against one backward pass for each token or position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from benchmarks.parametrize import over
from benchmarks.tables import Cell
from benchmarks.token_gradients import (
    HEADS,
    LAYERS,
    STEPS,
    VOCAB,
    WIDTH,
    TokenWorkload,
    one_backward_per_position,
    one_backward_per_token,
    workload,
)


@dataclass(frozen=True)
class Case:
    """N sequences of T tokens, and how many of all tokens are drawn."""

    N: int
    T: int
    draws: int | None = None

    def __str__(self) -> str:
        return f"N={self.N} T={self.T}" + (f" draws={self.draws}" if self.draws else "")


EXACT = [Case(4, 64), Case(4, 128), Case(4, 256)]
SAMPLED = [Case(16, 128, 128), Case(16, 256, 128)]
WITH_PLAIN = {EXACT[1], SAMPLED[0]}  # compared with a plain pass too
RUN = 4  # positions whose backward passes are timed
MODEL = f"GPT of width {WIDTH}, {LAYERS} layers, {HEADS} heads, vocabulary {VOCAB}, after {STEPS} steps on text, fp32"
EXACT_TABLE = (
    "every token's own gradient, exact",
    f"{MODEL}. Time of token_report as a ratio to dense gradients by one backward pass per token, "
    "to those by one per position with the sequences' products of inputs and output gradients, and to a plain step without "
    f"optimizer over the batch. The naive ways run for {RUN} positions, evenly spaced, scaled to all. Target: a third of the "
    "first.",
)
SAMPLED_TABLE = (
    "every token's own gradient, from a sample",
    f"{MODEL}. Time of token_report with that many draws, all N sequences in it, as a ratio to the same. Errors are the report's "
    "standard errors: C_g's relative to C_g, D_grad's in thousandths. Targets for T=256: a twentieth of one backward pass per "
    "token, 5 %, 0.001.",
)


def baseline_of(name: str, work: TokenWorkload) -> tuple[Callable[[], object], float]:
    """What is timed, and which share of the whole it is."""
    if name == "plain":
        return work.plain, 1
    N, T = work.x.shape
    positions = range(T // RUN // 2, T, T // RUN)
    if name == "per token":
        return lambda: one_backward_per_token(work, list(positions)), RUN / (N * T)
    return lambda: one_backward_per_position(work, list(positions)), RUN / T


@over(EXACT, EXACT[:1])
@pytest.mark.parametrize("name", ["per token", "per position", "plain"])
def test_exact(compare, table, case, name):
    if name == "plain" and case not in WITH_PLAIN:
        pytest.skip("one row says it")
    work = workload(case.N, case.T)
    baseline, share = baseline_of(name, work)
    compare(
        table(*EXACT_TABLE),
        str(case),
        f"to {name}",
        work.measure_exactly,
        baseline,
        against=name,
        target=0.33 if name == "per token" else None,
        shares=(1, share),
    )


@over(SAMPLED, SAMPLED[:1])
@pytest.mark.parametrize("name", ["per token", "per position", "plain"])
def test_sampled(compare, table, case, name):
    if name == "plain" and case not in WITH_PLAIN:
        pytest.skip("one row says it")
    work, sampled = workload(case.N, case.T), table(*SAMPLED_TABLE)
    targeted = case is SAMPLED[1]  # a draw of a short sequence costs more than its share
    reports = []
    baseline, share = baseline_of(name, work)
    compare(
        sampled,
        str(case),
        f"to {name}",
        lambda: reports.append(work.measure_sample(case.draws)),
        baseline,
        against=name,
        target=0.05 if targeted and name == "per token" else None,
        shares=(1, share),
    )
    c_g, d_grad = reports[0].metrics["C_g"], reports[0].metrics["D_grad"]
    sampled.add(str(case), "C_g error %", Cell(100 * c_g.error / c_g.value, "%", 5.0 if targeted else None))
    sampled.add(str(case), "D_grad error 10⁻³", Cell(1e3 * d_grad.error, "10⁻³", 1.0 if targeted else None))


def test_the_ways_agree():
    """The naive ways of some tokens, whose gradients' sums the exact report's tokens have too."""
    work = workload(EXACT[0].N, EXACT[0].T).first
    report = work.measure_exactly()
    T = work.x.shape[1]
    for sums in (one_backward_per_token(work, list(range(T))), one_backward_per_position(work, list(range(T)))):
        for name, one in sums.items():
            found = report[name]
            assert (found.abs_sum - one.abs_sum).norm() < 1e-4 * found.abs_sum.norm()
            for field, values in zip(("l1", "sq_norm", "dot", "abs_dot"), zip(*one.scalars, strict=True), strict=True):
                expected = getattr(found, field).double()
                assert (expected - expected.new_tensor(values)).norm() < 1e-3 * expected.norm(), (name, field)
