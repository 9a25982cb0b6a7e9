"""Every script in examples/ is short, and runs by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(script: Path, tmp_path: Path, project_environment: dict[str, str]) -> None:
    source = script.read_text(encoding="utf-8")
    for package in ("transformers", "trl", "accelerate", "lightning"):
        if f"import {package}" in source or f"from {package}" in source:
            pytest.importorskip(package)
    assert source.count("\n") < 60
    ran = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=project_environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout
