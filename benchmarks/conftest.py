"""Interleaved measurement with pytest-benchmark, and the tables at the end.

``benchmarks/README.md`` says how to run and how to read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.tables import Cell, Table
from zerosum.bench import machine
from zerosum.bench.timing import Times, seconds, wait

RESULTS = Path(__file__).parent / "results"
TABLES = pytest.StashKey[dict[str, Table]]()
MACHINE = pytest.StashKey[dict[str, object]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zerosum benchmarks")
    group.addoption("--quick", action="store_true", help="a few small cases and rounds: whether the benchmarks run, not how fast")
    group.addoption(
        "--device", help='of benchmarks/gpu, which are collected with it only: "cuda", or "cpu" to see whether they run'
    )
    group.addoption(
        "--results", metavar="NAME", help="keep the tables as benchmarks/results/NAME.json and NAME.md (a whole run: latest)"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out with --quick")
    config.option.benchmark_quiet = True  # its own table does not know the baselines
    config.stash[TABLES] = {}
    config.stash[MACHINE] = machine.describe(config.option.device)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "gpu" and not config.option.device else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # a test that skips or fails does not come to use it, and says so itself
        item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"))
    if config.option.quick:
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info.clear()  # it names the host
    machine_info.update(config.stash[MACHINE])


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[[str, str], Table]:
    """``table(title, note)``: the table of that title, made when first asked for."""
    tables = request.config.stash[TABLES]
    return lambda title, note: tables.setdefault(title, Table(title, note))


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest) -> Compare:
    return Compare(benchmark, *((0.1, 3) if request.config.option.quick else (0.7, 9)))


class Compare:
    """Times a subject and its baseline alternately and adds the median of the ratios to a table.

    Machines are shared and clocks change: a ratio of two neighbouring runs stays right where two separate averages do not.
    pytest-benchmark times the subject; its ``setup`` runs and times the baseline just before.
    """

    SLOW, VERY_SLOW = 0.7, 2.0  # seconds for a round from which fewer rounds must do

    def __init__(self, benchmark, budget: float, rounds: int) -> None:
        self._benchmark, self._budget, self._rounds = benchmark, budget, rounds

    def __call__(
        self,
        table: Table,
        row: str,
        column: str,
        subject: Callable[[], object],
        baseline: Callable[[], object],
        *,
        against: str = "dW",
        target: float | None = None,
        flops: float | None = None,
        microseconds: bool = False,
        shares: tuple[float, float] = (1, 1),
    ) -> None:
        """With ``flops``, the rates of both are columns too; with ``microseconds``, both times are, in place of milliseconds. What
        takes too long may run in part, if all parts cost the same: ``shares`` are those of subject and baseline that run."""
        both = self._interleave(subject, baseline)
        if both is None:  # --benchmark-disable: it ran, and that is all
            return
        times, baseline_times = ([x / share for x in taken] for taken, share in zip(both, shares, strict=True))
        found = Times.of(times, baseline_times)
        ratio, ms, baseline_ms = found.ratio, found.ms, found.baseline_ms
        details = {"ratio": ratio, "ms": ms, "baseline": against, "baseline_ms": baseline_ms, "rounds": found.rounds}
        if shares != (1, 1):
            details["shares"] = shares
        self._benchmark.extra_info.update({"table": table.title, "row": row, "column": column, "target": target, **details})
        if microseconds:
            table.add(row, f"{against} µs", Cell(1e3 * baseline_ms.median, "µs"))
            table.add(row, f"{column} µs", Cell(1e3 * ms.median, "µs"))
        else:
            table.add(row, f"{against} ms", Cell(baseline_ms.median, "ms"))
        if flops is not None:
            table.add(row, f"{against} GFLOP/s", Cell(flops / baseline_ms.median / 1e6, "GFLOP/s"))
            table.add(row, f"{column} GFLOP/s", Cell(flops / ms.median / 1e6, "GFLOP/s"))
        table.add(row, column, Cell(ratio.median, "×", target, details))

    def _interleave(self, subject: Callable[[], object], baseline: Callable[[], object]) -> tuple[list[float], list[float]] | None:
        for warm_up in (baseline, subject):
            warm_up()
        once = seconds(baseline) + seconds(subject)
        least = min(self._rounds, 9 if once < self.SLOW else 5 if once < self.VERY_SLOW else 3)
        baseline_times: list[float] = []

        def run() -> None:
            subject()  # and drops the results, as the baseline's are
            wait()

        self._benchmark.pedantic(
            run, setup=lambda: baseline_times.append(seconds(baseline)), rounds=max(least, min(101, int(self._budget / once)))
        )
        return None if self._benchmark.stats is None else (list(self._benchmark.stats.stats.data), baseline_times)


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    tables = [table for table in config.stash[TABLES].values() if table.rows]
    if not tables:
        return
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(machine.line(config.stash[MACHINE]))
    for table in tables:
        terminalreporter.write_line(f"\n{table.as_text()}")
    missed = [f"  {table.title}, {row}, {column}: {cell}" for table in tables for row, column, cell in table.missed()]
    terminalreporter.write_line("\n" + "\n".join(["missed:", *missed] if missed else ["every target was met"]))
    whole = exitstatus == 0 and _all_asked_for(config) and "deselected" not in terminalreporter.stats
    if name := config.option.results or ("latest" if whole else None):
        _keep(name, config.stash[MACHINE], tables)
        terminalreporter.write_line(f"kept in benchmarks/results/{name}.json and .md")


def _all_asked_for(config: pytest.Config) -> bool:
    return [(config.invocation_params.dir / argument).resolve() for argument in config.args] == [Path(__file__).resolve().parent]


def _keep(name: str, about: dict[str, object], tables: list[Table]) -> None:
    RESULTS.mkdir(exist_ok=True)
    data = {"machine": about, "tables": [table.as_json() for table in tables]}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = "\n".join([f"Measured on {machine.line(about)}.\n", *(table.as_markdown() for table in tables)])
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
