"""Every script in examples/ runs, as it stands, in a process of its own; so does the notebook, with a smaller run."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
NOTEBOOK = FOLDER / "paper_figures.ipynb"


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


def test_the_index_lists_every_example() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(.+?)\]\(\1\) \| .+ \|$", index, re.MULTILINE)
    assert sorted(listed) == sorted([*(path.name for path in EXAMPLES), NOTEBOOK.name])


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_the_notebook_runs_and_shows_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell, as Jupyter does it: what the last line of a cell is, is shown."""
    for name in ("matplotlib", "scipy", "tqdm"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in cells("code"):
        statements = ast.parse("".join(cell["source"])).body
        last = statements.pop() if isinstance(statements[-1], ast.Expr) else None
        exec(compile(ast.Module(statements, []), NOTEBOOK.name, "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names))
        if "parameters" in cell["metadata"].get("tags", ()):
            assert {"STEPS", "WIDTH", "LAYERS", "POSITIONS", "SEQUENCES"} <= names.keys()
            names |= {"STEPS": 12, "WIDTH": 32, "LAYERS": 1, "POSITIONS": 16, "SEQUENCES": 1}
    assert len(shown) == 6
    for figure in shown:
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_the_notebook_is_kept_without_outputs() -> None:
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells("code"))
