"""Every Python snippet of the README and the pages runs, page by page, from top to bottom.

Blocks fenced as `py` import packages that are no dependencies. They run where these are installed, in sessions of
their own. Blocks fenced as `py3` need a server and never run.
"""

import ast
import importlib.util
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlparts.coordinates.formats import registry as formats

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?P<indent>[ \t]*)```(?P<fence>python|py)\b[^\n]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """Return the page's Python blocks that can run, each with the line on which its code starts (from 1)."""
    text = page.read_text(encoding="utf-8")
    blocks = [
        (match["fence"], text.count("\n", 0, match.start("code")) + 1, textwrap.dedent(match["code"]))
        for match in BLOCK.finditer(text)
    ]
    return [(line, code) for fence, line, code in blocks if fence == "python" or has_packages(code)]


def has_packages(code: str) -> bool:
    """Whether all packages that a block imports are installed."""
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.split(".")[0]
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name is not None
    }
    assert names, "a block fenced as `py` must import a package that is no dependency"
    return all(importlib.util.find_spec(name) is not None for name in names)


PAGES_WITH_CODE = [page for page in PAGES if page.is_file() and blocks_of(page)]


def test_the_readme_has_a_snippet() -> None:
    assert ROOT / "README.md" in PAGES_WITH_CODE


@pytest.fixture
def own_formats() -> Iterator[None]:
    """Forget the formats that a page registers."""
    before = dict(formats.FORMATS)
    yield
    formats._formats.clear()
    formats._formats.update(before)


@pytest.mark.usefixtures("own_formats")
@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace and one empty folder per page; a traceback names the page and its line."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"snippets_of_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # what a snippet defines can be pickled
    for line, code in blocks_of(page):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), vars(module))
