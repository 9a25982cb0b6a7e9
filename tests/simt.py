"""Builds the CUDA kernels for threads of a CPU (csrc/simt), and as a plugin runs a test process on them.

``ZSL_TEST_EMULATED=cuda pytest -p tests.simt tests/zsl_kernels/test_interference.py`` runs what the kernels are for.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT / "csrc/bindings/cuda_kernels.cu", ROOT / "csrc/bindings/cuda_module.cpp")
COMPILER = os.environ.get("CXX", "c++")


def pybind11() -> Path:
    """pybind11's headers, which the torch wheel has; found without importing torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "include"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@lru_cache
def _module_object(folder: Path) -> Path:
    """pybind11's part, which every build shares: it has nothing that a sanitizer should see."""
    target = folder / "module.o"
    includes = ("-I", str(pybind11()), "-I", sysconfig.get_paths()["include"])
    # -O0: half of the time of -O1.
    _run([COMPILER, "-std=c++17", "-O0", "-fPIC", "-DZSL_MODULE=zsl_simt", *includes, "-c", str(SOURCES[1]), "-o", str(target)])
    return target


def build(folder: Path, *flags: str, root: Path = ROOT) -> Path:
    """The module ``zsl_simt``, of the kernels under ``root``, which may be a changed copy."""
    module, target = _module_object(folder.parent), folder / "zsl_simt.so"
    options = ("-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *flags)
    kernels = str(root / "csrc/bindings/cuda_kernels.cu")
    _run([COMPILER, *options, "-I", str(root / "csrc/simt"), "-x", "c++", kernels, "-x", "none", str(module), "-o", str(target)])
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The plugin ----------------------------------------------------------------------------------------------------------------------


def pytest_configure(config):
    from zsl_kernels import cuda

    built = os.environ.get("ZSL_SIMT")
    cuda.emulate(load(Path(built) if built else build(Path(tempfile.mkdtemp(dir=tempfile.mkdtemp())))))
