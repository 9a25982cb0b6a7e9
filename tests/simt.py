"""Builds the CUDA kernels for threads of a CPU (tests/native/simt), and as a plugin runs a test process on them.

``ZSL_TEST_EMULATED=cuda pytest -p tests.simt tests/zsl_kernels/test_interference.py`` runs what the kernels are for, and
``ZSL_TEST_EMULATED=hopper`` those of compute capability 9.0.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
KERNELS = ("csrc/bindings/cuda_kernels.cu", "csrc/bindings/hopper_kernels.cu", "csrc/bindings/row_kernels.cu")
MODULE = "csrc/bindings/cuda_module.cpp"
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
def _object(folder: Path, root: Path, source: str, flags: tuple[str, ...]) -> Path:
    """Of one source under ``root``, compiled once for all builds in ``folder``."""
    target = Path(tempfile.mkdtemp(dir=folder)) / f"{Path(source).name}.o"
    options = ("-std=c++17", "-fPIC", *flags, "-DZSL_HOPPER=1", "-I", str(ROOT / "tests/native/simt"))
    _run([COMPILER, *options, "-x", "c++", "-c", str(root / source), "-o", str(target)])
    return target


def build(folder: Path, *flags: str, root: Path = ROOT, changed: str | None = None) -> Path:
    """The module ``zsl_simt``. ``root``: of a copy in which the kernels of one source, ``changed``, differ."""
    target = folder / "zsl_simt.so"
    includes = ("-I", str(pybind11()), "-I", sysconfig.get_paths()["include"])
    # pybind11's part has nothing that a sanitizer should see. -O0: half of the time of -O1.
    objects = [_object(folder.parent, ROOT, MODULE, ("-O0", "-DZSL_MODULE=zsl_simt", *includes))]
    options = ("-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *flags)
    with ThreadPoolExecutor() as pool:
        roots = [root if source == changed else ROOT for source in KERNELS]
        objects += pool.map(lambda root, source: _object(folder.parent, root, source, options), roots, KERNELS)
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    _run([COMPILER, "-shared", *sanitizers, *map(str, objects), "-o", str(target)])
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
    from zsl_kernels.backends.cuda import module

    if os.environ.get("ZSL_TEST_EMULATED") == "hopper":
        os.environ.setdefault("ZSL_GPU_ARCH", "90")
    built = os.environ.get("ZSL_SIMT")
    module.emulate(load(Path(built) if built else build(Path(tempfile.mkdtemp(dir=tempfile.mkdtemp())))))
