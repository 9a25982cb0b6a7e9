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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zsl_kernels as zk
from zerosum.plots import paper
from zsl_kernels.backends.dispatch import BACKENDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_s_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page.stem}
    for given, code in blocks(page):
        for source in (given, code):
            exec(compile(source, str(page), "exec"), names)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"a": (3, 4, 5), "b": (3, 4, 6), "u": (6, 5), "weight": (6, 5), "weights": (3,)}
    made = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    return made | {"ids": torch.randint(6, (3, 4)), "sums": torch.rand(6, 5)}


CALLS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "interference": lambda x: zk.interference(x["a"], x["b"], direction=x["u"], gram=True),
    "gram": lambda x: zk.gram(x["a"], x["b"]),
    "sq_norm": lambda x: zk.sq_norm(x["a"], x["b"]),
    "dot": lambda x: zk.dot(x["a"], x["b"], x["u"]),
    "weighted_grad": lambda x: zk.weighted_grad(x["a"], x["b"], x["weights"]),
    "embedding_interference": lambda x: zk.embedding_interference(x["ids"], x["b"], 6, max_rows=6),
    "dense_interference": lambda x: zk.dense_interference(x["b"], gram=True),
    "scale_grad": lambda x: zk.scale_grad(x["a"], x["a"]),
    "bias_grad": lambda x: zk.bias_grad(x["b"]),
    "scale_bias_grad": lambda x: zk.scale_bias_grad(x["a"], x["a"]),
    "linear_cross_entropy": lambda x: zk.linear_cross_entropy(x["a"], x["weight"], x["ids"]),
    "coordinate_sums": lambda x: zk.coordinate_sums(x["sums"], x["sums"], x["sums"], direction=x["u"]),
    "coordinate_sums_of_many": lambda x: zk.coordinate_sums_of_many([x["sums"]], [x["sums"]], [x["sums"]], [x["u"]]),
}
OPS_OF = {"scale_grad": "scale_bias_grad", "bias_grad": "scale_bias_grad", "coordinate_sums_of_many": "coordinate_sums"}


def support(page: str) -> dict[str, dict[str, str]]:
    """The table below the mark of a page: the cells of each op by their column, without footnotes."""
    lines = (ROOT / page).read_text(encoding="utf-8").split("<!-- support -->\n")[1].split("\n\n")[0].splitlines()
    header, _, *rows = ([re.sub("[¹²³⁴]", "", cell).strip() for cell in line.strip("|").split("|")] for line in lines)
    return {op: dict(zip(header, row, strict=True)) for row in rows for op in re.findall("`(.*?)`", row[0])}


@pytest.mark.parametrize("op", CALLS)
def test_the_support_tables_are_true(op: str) -> None:
    """Autograd and torch.compile by doing it; kernels by what the backends say that they have."""
    results = CALLS[op](tensors())
    differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in (results if isinstance(results, tuple) else (results,)))
    torch._dynamo.reset()
    try:
        torch.compile(CALLS[op], fullgraph=True, backend="eager")(tensors())
        one_graph = True
    except torch._dynamo.exc.Unsupported:
        one_graph = False
    kernels = [name for name in ("cpu", "triton", "cuda") if BACKENDS[name].has(OPS_OF.get(op, op), torch.float32)]
    said = support("docs/support.md")[op]
    assert said["autograd"] == ("yes" if differentiable else "no")
    assert said["one compiled graph"] == ("yes" if one_graph else "no")
    assert said["native kernels"].split(", ") == kernels
    short = support("README.md").get(op)
    if short is None:
        assert op == "coordinate_sums_of_many", "the README names every other op"
        return
    assert (short["autograd"], short["one compiled graph"]) == (said["autograd"], said["one compiled graph"])
    assert short["x86-64 CPU"] == ("C++" if "cpu" in kernels else "PyTorch")
    assert {name for name in ("triton", "cuda") if name in short["CUDA device"].lower()} == set(kernels) - {"cpu"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_figure_is_explained() -> None:
    text = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    assert [name for name in paper.FIGURES if f"\n| `{name}` |" not in text] == []
