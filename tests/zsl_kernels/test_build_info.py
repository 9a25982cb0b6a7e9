"""What build_info says about this installation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import cpu_isas


def test_kernels_are_live_where_they_must_be():
    if os.environ.get("ZSL_REQUIRE_NATIVE") != "1":
        pytest.skip("ZSL_REQUIRE_NATIVE is not 1")
    assert zk.build_info()["cpu"] == "live"


def test_cuda_kernels_are_built_where_they_must_be():
    """Without nvcc their tests are skipped, which must not go unnoticed where it is meant to be."""
    if os.environ.get("ZSL_REQUIRE_CUDA_BUILD") != "1":
        pytest.skip("ZSL_REQUIRE_CUDA_BUILD is not 1")
    assert Path(zk.__file__).with_name("_cuda.so").exists()


def test_names_plain_values():
    info = zk.build_info()
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert {"cpu", "cpu_isa", "cpu_isas", "triton", "cuda"} <= set(info)
    assert all(isinstance(value, str | int | list | None) for value in info.values())


@pytest.mark.skipif(not cpu_isas(), reason="the CPU kernels are not live")
def test_the_best_instruction_set_is_used_unless_told_otherwise():
    info = zk.build_info()
    assert "generic" in info["cpu_isas"]
    if "ZSL_CPU_ISA" not in os.environ:
        assert info["cpu_isa"] == info["cpu_isas"][0]


@pytest.mark.skipif(not cpu_isas(), reason="the CPU kernels are not live")
@pytest.mark.parametrize(("isa", "says"), [("generic", "live generic"), ("z80", "ZSL_CPU_ISA: expected one of")])
def test_environment_chooses_the_instruction_set(isa, says, project_environment):
    program = "import zsl_kernels as zk; info = zk.build_info(); print(info['cpu'], info['cpu_isa'])"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**project_environment, "ZSL_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(says)
    if isa != "generic":
        assert isa in run.stdout
