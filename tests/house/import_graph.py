"""Which files of src/ import which, read from their text: also inside functions and under TYPE_CHECKING."""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def module_name(path: Path) -> str:
    """Dotted name of a file, that of the package for an `__init__.py`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def files() -> dict[str, Path]:
    """Every file of src/ by its dotted name."""
    return {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


@cache
def import_graph() -> dict[str, set[str]]:
    """For each file the files of src/ that it imports."""
    return {name: _imports(name, path) for name, path in files().items()}


def _imports(name: str, path: Path) -> set[str]:
    found: set[str] = set()
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            found |= (submodules & files().keys()) or {module}
    return (found & files().keys()) - {name}


def reach(roots: Iterable[str]) -> set[str]:
    """All files that the roots import, directly or not, with the roots."""
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(import_graph()[name])
    return seen


def circles() -> list[list[str]]:
    """Files that import each other in a circle, each circle sorted by name."""
    reached = {name: reach(imported) for name, imported in import_graph().items()}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in reached
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def importers(name: str) -> set[str]:
    """The files that import a file."""
    return {other for other, imported in import_graph().items() if name in imported}
