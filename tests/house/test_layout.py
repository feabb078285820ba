"""The files of src/: parts are flat, import only what remote code may, and know no other part."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlparts import PaddedCoordinateTokenizer
from vlparts.registration import PARTS as PARTS_TABLE

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PARTS = SOURCE / "vlparts" / "parts"
PART_FILES = sorted(PARTS.glob("*.py"))
FILE_KINDS = (
    "configuration",
    "modeling",
    "image_processing",
    "video_processing",
    "processing",
    "tokenization",
    "generation",
)
COMPOSED = {"vlm", "navit_dual_encoder"}  # the parts that may name others
COMPOSING_FILES = {"part_configs", "part_models"}  # their tables of them
ALLOWED_PACKAGES = {
    "torch",
    "transformers",
    "einops",
    "numpy",
    "PIL",
    "huggingface_hub",
    "safetensors",
    *sys.stdlib_module_names,
}
MAX_LINES = 400
# The two patterns by which transformers finds the files to copy into a checkpoint; they read text, not code.
REMOTE_CODE_PATTERNS = (r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+\.(\S+)\s+import")


def part_of(stem: str) -> str | None:
    """Return the part that the file belongs to, or None for a shared file."""
    if stem in COMPOSING_FILES:
        return "vlm"
    for kind in FILE_KINDS:
        if stem.startswith(f"{kind}_"):
            return stem.removeprefix(f"{kind}_").removeprefix("pil_")
    return None


def imports_of(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield every import statement of the file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def siblings_of(path: Path) -> set[str]:
    """Return the names in the file's `from .name import X` lines."""
    return {node.module or "" for node in imports_of(path) if isinstance(node, ast.ImportFrom) and node.level}


def reached_from(stems: set[str]) -> set[str]:
    """Return the given files and all files of parts/ that they import, directly or not."""
    reached: set[str] = set()
    while stems:
        reached |= stems
        stems = {name for stem in stems for name in siblings_of(PARTS / f"{stem}.py")} - reached
    return reached


def packages_of(path: Path) -> set[str]:
    """Return the top-level packages that the file imports by absolute imports."""
    names: set[str] = set()
    for node in imports_of(path):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


each_part_file = pytest.mark.parametrize("path", PART_FILES, ids=lambda path: path.stem)


def test_there_are_parts() -> None:
    assert any(part_of(path.stem) for path in PART_FILES)


def test_parts_is_flat() -> None:
    folders = [path.name for path in PARTS.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert folders == []


@each_part_file
def test_relative_imports_are_one_level(path: Path) -> None:
    stems = {other.stem for other in PART_FILES}
    for node in imports_of(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            line = f"{path.name}:{node.lineno}: {ast.unparse(node)}"
            assert node.level == 1, line
            assert node.module in stems, f"{line}\nexpected `from .name import X` with one of {sorted(stems)}"


@each_part_file
def test_transformers_copies_exactly_the_imported_siblings(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = {name for pattern in REMOTE_CODE_PATTERNS for name in re.findall(pattern, text, re.MULTILINE)}
    assert found == siblings_of(path), "a docstring or string holds what reads like a relative import"


@each_part_file
def test_absolute_imports_are_allowed(path: Path) -> None:
    assert packages_of(path) <= ALLOWED_PACKAGES


@each_part_file
def test_annotations_are_not_postponed(path: Path) -> None:
    if part_of(path.stem) is not None:
        assert "__future__" not in packages_of(path), "this turns strict validation and config_class off"


@each_part_file
def test_no_part_imports_another(path: Path) -> None:
    own = part_of(path.stem)
    if path.stem == "__init__" or own in COMPOSED:
        return
    others = {name for name in siblings_of(path) if part_of(name) not in (None, own)}
    assert others == set(), "a part, or a shared file, imports a part"


@pytest.mark.parametrize("stem", [path.stem for path in PART_FILES if path.stem.startswith("configuration_")])
def test_configurations_reach_no_model(stem: str) -> None:
    assert {name for name in reached_from({stem}) if name.startswith("modeling_")} == set()


def test_every_file_is_reached_from_a_registered_class() -> None:
    """What no saved class reaches belongs outside of parts/."""
    classes = {PaddedCoordinateTokenizer}
    for part in PARTS_TABLE:
        classes |= {part.config, *part.models.values(), part.image_processor, part.processor} - {None}
    reached = reached_from({one.__module__.rpartition(".")[2] for one in classes})
    assert {path.stem for path in PART_FILES} - reached == {"__init__"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("package", ["vlparts", "vlparts_npu"])
def test_packages_are_typed(package: str) -> None:
    assert (SOURCE / package / "py.typed").is_file()
