"""What all tests share: how hypothesis runs, and the fixture that goes through the implementations."""

import os
import zlib

# Before torch starts its threads: those that wait sleep. Spinning they take the processor from each other when something else runs,
# and many short calls then take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What deterministic algorithms, under which the ops' tests run, ask of a device's library.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from hypothesis import Phase, settings

import zsl_kernels as zk
from tests.emulation import select
from tests.inputs import EMULATED, cpu_isas, gpu_implementations, implementations, running

if EMULATED == "triton":
    from tests.interpreter import repair

    repair()

# Derandomized: a red test is red again on the next run, and print_blob says how to repeat one example. Emulated kernels are
# slow.
few = {"max_examples": 6, "phases": (Phase.explicit, Phase.generate)} if EMULATED else {"max_examples": 60}
settings.register_profile("suite", **few, deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if EMULATED:
        kept = select(items)
    elif os.environ.get("ZSL_TEST_ALL") == "1" or any("::" in arg for arg in config.args):
        return
    else:
        kept = [item for item in items if not _of_lesser_instructions(item) or zlib.crc32(item.nodeid.encode()) % 4 == 0]
    if len(kept) < len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept


def _of_lesser_instructions(item: pytest.Item) -> bool:
    """Whether a test is of the CPU's kernels with other instructions than this processor's best: the same code, compiled again. By
    default a fourth of these runs, always the same ones; `make test-all` runs them all, as does a test's own name."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    isa = str(params.get("impl") or params.get("cpu_isa") or "").removeprefix("cpu-")
    return isa in cpu_isas()[1:]


def pytest_report_header() -> str:
    info = zk.build_info()
    return f"zsl_kernels: cpu {info['cpu']} ({', '.join(info['cpu_isas'])}), {info['threads']} threads, torch {info['torch']}"


def require(implementation: str) -> None:
    if implementation == "cpu" and (reason := zk.build_info()["cpu"]) != "live":
        pytest.skip(f"the CPU kernels are not live: {reason}")


@pytest.fixture(params=[*implementations(), *(pytest.param(name, marks=pytest.mark.gpu) for name in gpu_implementations())])
def impl(request):
    """Every implementation but the reference, the CPU kernels with each instruction set; the value is what ``impl=`` takes. Those
    of a GPU run on the device, whatever the operands of a test are on."""
    require(request.param)
    with running(request.param) as name:
        yield name


@pytest.fixture(params=[name for name in implementations() if name.startswith("cpu")])
def cpu_isa(request):
    """The CPU kernels alone, with each instruction set."""
    require(request.param)
    with running(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads; restores it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def project_environment():
    """Environment of a subprocess that imports what this process imported."""
    root = os.path.dirname(os.path.dirname(zk.__file__))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
