"""The C++ kernels for Arm, cross-compiled, under emulation: the checks of tests/native/driver.cpp."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.slow("compiles every kernel, and emulates a processor"),
    pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++ (Debian's g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(EMULATOR is None, reason="needs qemu-aarch64 (Debian's qemu-user-static)"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert COMPILER is not None
    folder = tmp_path_factory.mktemp("arm")
    kernels = (ROOT / "csrc" / "cpu").glob("*.cpp")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([COMPILER, "-std=c++20", "-O2", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [ROOT / "tests" / "native" / "driver.cpp", *kernels]))
    subprocess.run([COMPILER, "-static", *map(str, objects), "-o", str(folder / "driver"), "-pthread"], check=True)
    return folder / "driver"


@pytest.mark.parametrize("isa", ["neon", "generic"])
def test_every_kernel_is_exact(driver: Path, isa: str) -> None:
    assert EMULATOR is not None
    done = subprocess.run([EMULATOR, str(driver), "--isa", isa], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{isa} ok" in done.stdout
