"""setup.py: what it asks of the nvcc that it finds."""

import runpy
from pathlib import Path

import pytest
import setuptools

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def architectures(tmp_path, monkeypatch):
    """The flags for an nvcc that knows these."""

    def get(*known):
        nvcc = tmp_path / "nvcc"
        nvcc.write_text("#!/bin/sh\n" + "".join(f"echo compute_{arch}\n" for arch in known))
        nvcc.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("ZSL_BUILD_NATIVE", "0")
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(SETUP))["cuda_architectures"]()

    return get


def test_every_architecture_is_compiled_for_and_the_newest_as_ptx_too(architectures):
    flags = architectures(75, 80, 86, 90, 100, 103, 120)
    assert [flag.rsplit("=", 1)[1] for flag in flags] == ["sm_80", "sm_90", "sm_100", "compute_100"]


def test_an_older_nvcc_compiles_for_those_that_it_knows(architectures):
    flags = architectures(70, 75, 80, 86, 90)
    assert [flag.rsplit("=", 1)[1] for flag in flags] == ["sm_80", "sm_90", "compute_90"]


def test_an_nvcc_that_knows_none_says_how_to_leave_the_kernels_out(architectures):
    with pytest.raises(SystemExit, match=r"none of compute_80.*ZSL_BUILD_CUDA=0"):
        architectures(50, 60)
