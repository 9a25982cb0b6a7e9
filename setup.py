"""Builds the CPU kernels with ninja through torch's extension builder, and the CUDA kernels where nvcc is.

ZSL_BUILD_NATIVE=0 leaves both out, ZSL_BUILD_CUDA=0 the CUDA kernels.

ZSL_EMULATE_AMX=32 adds the instruction set "amx_emulated", for tests on a processor without AMX: the kernels for AMX with loops in
place of the tile instructions, and with AVX2's vectors of 32 bytes. With 16 any processor runs them.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

root = Path(__file__).parent

CUDA = "zsl_kernels._cuda"
CUDA_SOURCES = ["csrc/bindings/cuda_kernels.cu", "csrc/bindings/row_kernels.cu", "csrc/bindings/cuda_module.cpp"]
# The kernels of compute capability 9.0 alone: its own instructions are those of the architecture "90a".
HOPPER_SOURCE = "csrc/bindings/hopper_kernels.cu"
NVCC = shutil.which("nvcc")
# -t 2: two architectures at a time. The runtime is linked statically: the module imports on a machine without a GPU.
CUDA_FLAGS = ["-O3", "-std=c++17", "-DZSL_MODULE=_cuda", "-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden"]
LEAVE_OUT = "ZSL_BUILD_CUDA=0 leaves the CUDA kernels out"


def cuda_architectures():
    """Those of 8.0, 9.0 and 10.0 that nvcc knows, for an older one would refuse the rest and with it the whole installation."""
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = [arch for arch in (80, 90, 100) if f"compute_{arch}" in listed]
    if not known:
        sys.exit(f"zsl_kernels: {NVCC} compiles for none of compute_80, compute_90 and compute_100; {LEAVE_OUT}")
    newest = f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"  # PTX, for what comes later
    return [*(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known), newest]


def has_hopper():
    """Whether nvcc knows compute_90a: that of CUDA 12 or newer."""
    found = re.search(r"release (\d+)\.", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)
    return found is not None and int(found[1]) >= 12


def cuda_headers():
    return sorted(str(path.relative_to(root)) for suffix in ("h", "cuh") for path in (root / "csrc").rglob(f"*.{suffix}"))


def cuda_includes():
    """pybind11 comes with torch."""
    import torch

    torch_headers = Path(torch.__file__).parent / "include"
    folders = ("csrc/cuda/device", "csrc/bindings/nvidia", torch_headers, sysconfig.get_paths()["include"])
    return [f"-I{folder}" for folder in folders]


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
        str(path.relative_to(root))
        for folder in ("cpu", "bindings")
        for path in (root / "csrc" / folder).glob("*.cpp")
        if not path.name.startswith("cuda_")
    )
    headers = sorted(str(path.relative_to(root)) for path in (root / "csrc").rglob("*.h"))
    emulated = os.environ.get("ZSL_EMULATE_AMX")
    if emulated not in (None, "16", "32"):
        sys.exit(f"zsl_kernels: ZSL_EMULATE_AMX: expected 16 or 32, the bytes of a vector, got {emulated!r}")
    if emulated:
        sources.append("tests/native/kernels_amx_emulated.cpp")
        headers.append("tests/native/amx_instructions.h")
    # -g0: debug information would be most of the wheel. No -march: the kernels enable their instruction sets themselves.
    flags = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden", "-fno-math-errno"]
    flags += [f"-DZSL_EMULATE_AMX={emulated}"] if emulated else []
    # at::parallel_for is inline: without OpenMP here it would silently run on one thread. It binds to the runtime torch loaded.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    extension = CppExtension(
        "zsl_kernels._cpu", sources, depends=headers, extra_compile_args=flags + openmp, extra_link_args=openmp
    )
    extensions = [extension]
    if NVCC and os.environ.get("ZSL_BUILD_CUDA", "1") != "0":
        extensions.append(Extension(CUDA, CUDA_SOURCES, depends=[*CUDA_SOURCES, HOPPER_SOURCE, *cuda_headers()]))

    class BuildWithCuda(BuildExtension):
        """torch's builder refuses CUDA where torch has none; our module does not need torch's."""

        def build_extensions(self):
            found = [extension for extension in self.extensions if extension.name == CUDA]
            self.extensions = [extension for extension in self.extensions if extension.name != CUDA]
            super().build_extensions()
            for extension in found:
                self.build_cuda(extension)
            self.extensions += found

        def build_cuda(self, extension):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(self.build_temp)
            folder.mkdir(parents=True, exist_ok=True)
            hopper = [HOPPER_SOURCE] if has_hopper() else []
            compile_one = [NVCC, "-c", *CUDA_FLAGS, f"-DZSL_HOPPER={len(hopper)}", *cuda_includes()]
            commands, objects = [], []
            for source in [*extension.sources, *hopper]:
                objects.append(str(folder / f"{Path(source).name}.o"))
                architectures = (
                    ["-gencode=arch=compute_90a,code=sm_90a"] if source in hopper else ["-t", "2", *cuda_architectures()]
                )
                commands.append([*compile_one, *(architectures if source.endswith(".cu") else []), source, "-o", objects[-1]])
            try:
                with ThreadPoolExecutor() as pool:
                    list(pool.map(self.spawn, commands))
                self.spawn([NVCC, "-shared", "-cudart", "static", *objects, "-o", str(target)])
            except Exception as error:
                sys.exit(f"zsl_kernels: {error}; {LEAVE_OUT}")

    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildWithCuda.with_options(no_python_abi_suffix=True)}}


setup(**native_extensions())
