"""Which tests run when: ``make check`` before each commit, ``make test`` for each change, ``make test-slow`` before a release.

A test is in the slow tier by a mark of its own, ``@pytest.mark.slow("why")``, or as one of the many cases of a test function. Of
these ``make test`` runs a sample, always the same one, in which every value of every parameter occurs. ``make test`` and
``make test-slow`` together run every test once. ``make check`` runs a part of ``make test``: samples of the files below.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.inputs import cpu_isas

ROOT = Path(__file__).parent
# The kernels for other instructions than the processor's best are the same code, compiled again. `make test` runs this share of
# each test's cases with them, and more where every value of a parameter needs more.
SHARE_OF_LESSER = 0.08
# Files with families of models, losses and sizes: of each test's cases `make test` runs this share, and more where every value of a
# parameter needs more.
SHARE_OF_FAMILIES = 0.15
FAMILIES = (
    "zerosum/test_adversarial.py",
    "zerosum/test_attribution.py",
    "zerosum/test_attribution_transformers.py",
    "zerosum/test_deceleration.py",
    "zerosum/test_graphs.py",
    "zerosum/test_loss_ends.py",
    "zerosum/test_noise.py",
    "zerosum/test_outputs.py",
    "zerosum/test_packed.py",
    "zerosum/test_packed_transformers.py",
    "zerosum/test_plain_step.py",
    "zerosum/test_proof.py",
    "zerosum/test_tokens_memory.py",
    "zerosum/test_zoo.py",
)
# What `make check` runs: of every op the portable form and the processor's best instructions, and every model of the probe's zoo.
# Of each test's cases it runs this share, and more where every value of a parameter needs more.
SHARE_CHECKED = 0.1
CHECKED = (
    "zsl_kernels/test_autograd.py",
    "zsl_kernels/test_coordinate_sums.py",
    "zsl_kernels/test_dense.py",
    "zsl_kernels/test_dot_norm_weighted.py",
    "zsl_kernels/test_embedding.py",
    "zsl_kernels/test_gram.py",
    "zsl_kernels/test_interference.py",
    "zsl_kernels/test_linear_cross_entropy.py",
    "zsl_kernels/test_ragged.py",
    "zsl_kernels/test_scale_bias.py",
    "zsl_kernels/test_tied.py",
    "zerosum/test_zoo.py",
)
# Files whose tests share a build or a process that takes long to start: one worker runs them, and they come first. Of the other
# tests a worker takes one function's at a time, so that its cases share the truth that they are held to.
TOGETHER = (
    "zsl_kernels/test_simt.py",
    "zsl_kernels/test_triton.py",
    "zsl_kernels/test_triton_compile.py",
    "zsl_kernels/test_cuda_compile.py",
    "zsl_kernels/test_sanitizers.py",
    "zerosum/test_elsewhere.py",
    "zerosum/test_report_data.py",
    "zerosum/test_tokens_sampled.py",
)


def assign(items: list[pytest.Item]) -> None:
    """Marks tests as slow or as checked, and puts those that take long together first."""
    for item in items:
        for mark in item.iter_markers("slow"):
            if not (len(mark.args) == 1 and isinstance(mark.args[0], str)):
                raise pytest.UsageError(f"{item.nodeid}: slow: expected one argument, why it is slow, got {mark.args}")
    lesser = [item for item in items if _of_lesser_instructions(item)]
    leave_for_slow(lesser, SHARE_OF_LESSER, "a further case with lesser instructions")
    for name in FAMILIES:
        leave_for_slow(_of_file(items, name), SHARE_OF_FAMILIES, "a further case of a large family")
    left = set(lesser)
    others = [item for item in items if item not in left and item.get_closest_marker("slow") is None]
    for name in CHECKED:
        for item in _sampled(_of_file(others, name), SHARE_CHECKED):
            item.add_marker(pytest.mark.check)
    places = {ROOT / name: at for at, name in enumerate(TOGETHER)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def scheduler(config: pytest.Config, log: object) -> object:
    """Which tests a worker of pytest-xdist takes at a time under ``--dist loadscope``."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.removeprefix("tests/") in TOGETHER else nodeid.partition("[")[0]

    return Scheduling(config, log)


def leave_for_slow(items: list[pytest.Item], share: float, why: str) -> None:
    """Marks as slow the cases beyond a sample of each test function."""
    kept = _sampled(items, share)
    for item in items:
        if item not in kept:
            item.add_marker(pytest.mark.slow(why))


def sample(cases: Sequence[frozenset[object]], share: float, seed: str) -> list[int]:
    """The places of about a share of the cases, which are sets of values: one at least, and as many as make every value occur."""
    seen: set[object] = set()
    needed: list[int] = []
    others: list[int] = []
    for at in random.Random(seed).sample(range(len(cases)), len(cases)):
        (others if needed and cases[at] <= seen else needed).append(at)
        seen |= cases[at]
    return needed + others[: max(0, round(share * len(cases)) - len(needed))]


def _sampled(items: list[pytest.Item], share: float) -> set[pytest.Item]:
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    return {cases[at] for name, cases in functions.items() for at in sample([_values(item) for item in cases], share, name)}


def _values(item: pytest.Item) -> frozenset[object]:
    """The names and the objects of each parameter, of those together that one mark sets together: all cases share the objects."""
    params = _params(item)
    found, left = [], set(params)
    for mark in item.iter_markers("parametrize"):
        names = tuple(map(str.strip, mark.args[0].split(","))) if isinstance(mark.args[0], str) else tuple(mark.args[0])
        found.append((names, tuple(id(params[name]) for name in names)))
        left -= set(names)
    return frozenset([*found, *((name, id(params[name])) for name in left)])


def _params(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _of_file(items: list[pytest.Item], name: str) -> list[pytest.Item]:
    return [item for item in items if item.path == ROOT / name]


def _of_lesser_instructions(item: pytest.Item) -> bool:
    params = _params(item)
    return str(params.get("impl") or params.get("cpu_isa") or "").removeprefix("cpu-") in cpu_isas()[1:]
