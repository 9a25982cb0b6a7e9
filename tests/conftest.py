"""What all tests share: how hypothesis runs, and the fixture that goes through the implementations."""

import os
from pathlib import Path

# Before torch starts its threads: those that wait sleep. Spinning they take the processor from each other when something else runs,
# and many short calls then take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What deterministic algorithms, under which the ops' tests run, ask of a device's library.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Inductor compiles few graphs here, in this process: a pool of its own would import torch in each of its processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from hypothesis import Phase, settings

import zsl_kernels as zk
from tests import tiers
from tests.emulation import select
from tests.inputs import EMULATED, gpu_implementations, implementations, running

if EMULATED == "triton":
    from tests.interpreter import repair

    repair()

# Derandomized: a red test is red again on the next run, and print_blob says how to repeat one example. Emulated kernels are
# slow.
few = {"max_examples": 6, "phases": (Phase.explicit, Phase.generate)} if EMULATED else {"max_examples": 60}
settings.register_profile("suite", **few, deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    # A test that is named runs, of whichever tier it is.
    if config.option.markexpr == "not slow" and any("::" in arg for arg in config.args):
        config.option.markexpr = ""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by the marks that are added here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if EMULATED:
        kept = select(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    else:
        tiers.assign(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    return tiers.scheduler(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # `make check` reads no file of which it runs nothing.
    if config.option.markexpr == "check" and collection_path.suffix == ".py":
        return str(collection_path.relative_to(tiers.ROOT)) not in tiers.CHECKED
    return None


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
