"""Every script in examples/ runs, as it stands, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path, project_environment: dict[str, str]) -> None:
    text = example.read_text()
    assert len(text.splitlines()) < 60
    for module in re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    environment = project_environment | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, example], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
