"""Publishes files from outside of docs/ as pages, and makes links to them work.

Pages link to these files as a reader of the repository needs it (``../benchmarks/results/latest.md``), so that a link works both
there and on the site. A link to a file that is not published is an error of the build.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def script(text: str) -> str:
    return f"```python\n{text.rstrip()}\n```\n"


def notebook(text: str) -> str:
    cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
    return "\n\n".join(script(source) if kind == "code" else source for kind, source in cells)


CODE = {".py": script, ".ipynb": notebook}


def published() -> dict[str, str]:
    """The page of each file, both as paths from the root of the repository."""
    pages = {
        "CHANGELOG.md": "docs/changelog.md",
        "CONTRIBUTING.md": "docs/contributing.md",
        "CODE_OF_CONDUCT.md": "docs/code_of_conduct.md",
        "SECURITY.md": "docs/security.md",
        "LICENSE": "docs/license.md",
        "benchmarks/README.md": "docs/benchmarks/run.md",
        "examples/README.md": "docs/examples/index.md",
    }
    pages |= {
        f"benchmarks/results/{path.name}": f"docs/benchmarks/{path.name}" for path in (ROOT / "benchmarks/results").glob("*.md")
    }
    pages |= {
        f"examples/{path.name}": f"docs/examples/{path.stem}.md" for path in (ROOT / "examples").iterdir() if path.suffix in CODE
    }
    return {source: page for source, page in pages.items() if (ROOT / source).is_file()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each published file. A script or a notebook becomes a page with its code."""
    for source, page in published().items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if read := CODE.get(Path(source).suffix):
            text = f"# {source}\n\n{read(text)}"
        elif source == "LICENSE":
            text = f"# License\n\n```\n{text}```\n"
        elif not text.startswith("# "):
            text = f"# {Path(source).name}\n\n{text}"
        files.append(File.generated(config, posixpath.relpath(page, "docs"), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links from the repository's paths to the site's pages."""
    pages = published()
    here = f"docs/{page.file.src_uri}"
    source = next((source for source, to in pages.items() if to == here), here)  # where the text of this page lies

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        to = pages.get(target, target)
        if not to.startswith("docs/"):
            return link[0]  # strict builds report it
        return f"[{link['text']}]({posixpath.relpath(to, posixpath.dirname(here))}{link['anchor'] or ''})"

    def outside_code(text: str) -> str:
        return LINK.sub(rewritten, text)

    parts, end = [], 0
    for block in BLOCK.finditer(markdown):
        parts += [outside_code(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, outside_code(markdown[end:])])
