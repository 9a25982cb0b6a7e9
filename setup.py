"""Builds the CPU kernels with ninja through torch's extension builder. ZSL_BUILD_NATIVE=0 leaves them out."""

import os
import sys
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent


def native_extensions():
    if os.environ.get("ZSL_BUILD_NATIVE", "1") == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(
            "zsl_kernels: building the native kernels needs the torch they will run with: install torch first and pass "
            "--no-build-isolation, or set ZSL_BUILD_NATIVE=0 for the pure Python package"
        )
    sources = sorted(
        str(path.relative_to(root)) for folder in ("cpu", "bindings") for path in (root / "csrc" / folder).glob("*.cpp")
    )
    headers = sorted(str(path.relative_to(root)) for path in (root / "csrc").rglob("*.h"))
    # -g0: debug information would be most of the wheel. No -march: the kernels enable their instruction sets themselves.
    flags = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden", "-fno-math-errno"]
    # at::parallel_for is inline: without OpenMP here it would silently run on one thread. It binds to the runtime torch loaded.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    extension = CppExtension(
        "zsl_kernels._cpu", sources, depends=headers, extra_compile_args=flags + openmp, extra_link_args=openmp
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}}


setup(**native_extensions())
