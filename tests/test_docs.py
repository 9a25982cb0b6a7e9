"""Every ``python`` block of the README and of docs/ runs. The blocks of a page share their names, as a reader would type them.

What a reader is taken to have stands in a comment before a block, which a rendered page does not show, and so does why a block
does not run::

    <!-- given
    model = nn.Linear(3, 2)
    -->

    <!-- not run: it needs a CUDA device -->
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?:given\n(?P<given>.*?)|not run: (?P<reason>[^\n]*?) ?)-->\n)?```python\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """What is given and the code of each block that runs, behind as many empty lines as are above them in the page."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["reason"] is None:
            given, code = (
                "\n" * text.count("\n", 0, found.start(part)) + found[part] if found[part] else "" for part in ("given", "code")
            )
            yield given, code


def test_blocks_are_found() -> None:
    """No block escapes the pattern."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(BLOCK.findall(text)) == text.count("```python"), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_s_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page.stem}
    for given, code in blocks(page):
        for source in (given, code):
            exec(compile(source, str(page), "exec"), names)
