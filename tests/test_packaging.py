"""What is installed, and the files that say which version this is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import zerosum
import zsl_kernels as zk

ROOT = Path(__file__).parents[1]
SOURCES = {"zsl_kernels": ROOT / "zsl_kernels", "zerosum": ROOT / "python" / "zerosum"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel without compiled kernels, of a copy of the sources: building writes beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    only_sources = shutil.ignore_patterns("__pycache__", "*.so")
    for path in (ROOT / "zsl_kernels", ROOT / "python"):
        shutil.copytree(path, folder / path.name, ignore=only_sources)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    environment = os.environ | {"ZSL_BUILD_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", build, "."], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.split()[-1])


def test_the_wheel_has_every_module_and_says_that_it_is_typed(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {f"{name}/{path.relative_to(folder)}" for name, folder in SOURCES.items() for path in folder.rglob("*.py")}
    assert files == modules | {"zsl_kernels/py.typed", "zerosum/py.typed"}


def test_there_is_one_version(wheel: zipfile.ZipFile) -> None:
    assert zerosum.__version__ == zk.__version__
    assert f"-{zk.__version__}-" in Path(str(wheel.filename)).name
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == zk.__version__  # type: ignore[index]
    releases = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert releases[0] == "Unreleased"
    assert releases[1:2] in ([], [zk.__version__])
