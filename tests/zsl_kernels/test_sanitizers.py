"""The C++ kernels outside torch, under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (tests/native)."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import zsl_kernels as zk

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tests" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
ISAS = zk.build_info()["cpu_isas"] or ["generic"]
# The kernels for AMX run on any processor with loops for its instructions; on one with AMX they are among ISAS, too.
EMULATED = "amx_emulated"
VECTOR_BYTES = 32 if "avx2" in ISAS else 16
# The standard that torch's extension builder takes.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-omit-frame-pointer", f"-DZSL_EMULATE_AMX={VECTOR_BYTES}"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
    "no": ["-O3", "-DZSL_TRAP_AMX"],
}

pytestmark = [
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler on Linux"),
    pytest.mark.slow("builds of all CPU kernels with sanitizers"),
]


def run(command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)


def build(kind, folder):
    """The driver with every kernel, on two processes; skips where the compiler has no such sanitizer or it cannot start."""
    flags = [*FLAGS, *SANITIZERS[kind]]
    (folder / "probe.cpp").write_text("int main() {}")
    probe = run([COMPILER, *flags, folder / "probe.cpp", "-o", folder / "probe"])
    if probe.returncode != 0 or run([folder / "probe"]).returncode != 0:
        pytest.skip(f"no working {kind} sanitizer: {probe.stderr[-300:]}")
    sources = [
        *(ROOT / "csrc" / "cpu").glob("*.cpp"),
        *(NATIVE / name for name in ("driver.cpp", "amx_check.cpp", "kernels_amx_emulated.cpp")),
        *([NATIVE / "amx_trap.cpp"] if kind == "no" else []),
    ]

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        done = run([COMPILER, *flags, "-c", source, "-o", target])
        assert done.returncode == 0, done.stderr[-3000:]
        return target

    with ThreadPoolExecutor(2) as pool:
        # The largest first.
        objects = list(pool.map(compile_one, sorted(sources, key=lambda path: path.stem != "driver")))
    linked = run([COMPILER, *flags, *objects, "-o", folder / "driver", "-pthread"])
    assert linked.returncode == 0, linked.stderr[-3000:]
    return folder / "driver"


@pytest.fixture(scope="module")
def with_address_sanitizer(tmp_path_factory):
    return build("address", tmp_path_factory.mktemp("address"))


@pytest.fixture(scope="module")
def with_thread_sanitizer(tmp_path_factory):
    return build("thread", tmp_path_factory.mktemp("thread"))


def test_every_kernel_stays_in_its_memory_and_is_exact(with_address_sanitizer):
    isas = list(dict.fromkeys([*ISAS, EMULATED]))
    with ThreadPoolExecutor(2) as pool:
        for isa, done in zip(isas, pool.map(lambda isa: run([with_address_sanitizer, "--isa", isa]), isas), strict=True):
            assert done.returncode == 0, done.stderr[-3000:]
            assert f"{isa} ok" in done.stdout


@pytest.mark.parametrize("missing", [1, 64, 4096])
@pytest.mark.parametrize(("isa", "dtype"), [("generic", "f32"), (EMULATED, "bf16")])
def test_a_workspace_too_short_is_noticed(with_address_sanitizer, isa, dtype, missing):
    """The sanitizer sees what the test above relies on."""
    done = run([with_address_sanitizer, "--isa", isa, "--dtype", dtype, "--short", missing])
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize(("isa", "dtype"), [("generic", "f32"), (EMULATED, "bf16")])
def test_workers_do_not_race(with_thread_sanitizer, isa, dtype):
    done = run([with_thread_sanitizer, "--isa", isa, "--dtype", dtype])
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow("compiles every kernel again")
@pytest.mark.skipif("avx2" not in ISAS, reason="the kernels around the tile instructions need AVX2")
def test_the_tile_instructions_as_compiled(tmp_path):
    """Each is answered by the loops when the processor refuses it (amx_trap.cpp)."""
    done = run([build("no", tmp_path), "--isa", EMULATED, "--dtype", "bf16"])
    assert done.returncode == 0, done.stderr[-3000:]
    answered = re.search(r"^(\d+) tile instructions answered$", done.stdout, re.MULTILINE)
    assert answered is not None
    assert "amx" in ISAS or int(answered[1]) > 100_000
