"""The files of src/: parts are flat, import only what remote code may, and know no other part."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.house.import_graph import circles, files, importers, reach

from vlparts.parts.tokenization_coordinates import PaddedCoordinateTokenizer
from vlparts.registration import PARTS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
FOLDER = SOURCE / "vlparts" / "parts"
PART_FILES = sorted(FOLDER.glob("*.py"))
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
SMALL = 80
SMALL_FILES = {
    "vlparts.cli.soup": "one command per file",
    "vlparts.checkpoints.deepseek_ocr.names": "the names of tensors are a file of their own in each family",
    "vlparts._public": "loaded on first use, so that `import vlparts` is lazy",
    "vlparts.demo.ask": "a script for a Python without vlparts",
    "vlparts.demo.deadline": "tested with a clock of its own",
    "vlparts.training.tokenizer": "used alone in the README, without the dependencies of training",
}
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


def registered_modules() -> set[str]:
    """The files of the classes that the Auto classes find, of their models, processors and tokenizers."""
    classes = [PaddedCoordinateTokenizer]
    for part in PARTS:
        classes += [part.config, *part.models.values(), part.image_processor, part.processor]
    return {one.__module__ for one in classes if one is not None}


def test_parts_holds_what_a_saved_class_reaches_and_nothing_else() -> None:
    """transformers copies what the file of a saved class reaches; all else belongs elsewhere."""
    everything = {f"vlparts.parts.{path.stem}" for path in PART_FILES if path.stem != "__init__"}
    assert reach(registered_modules()) - {"vlparts.parts"} == everything


def test_no_configuration_reaches_a_model() -> None:
    for name in files():
        if name.startswith("vlparts.parts.configuration_"):
            models = {other for other in reach([name]) if other.startswith("vlparts.parts.modeling_")}
            assert models == set(), name


def test_files_import_each_other_in_no_circle() -> None:
    assert circles() == []


def test_small_files_have_several_importers() -> None:
    """A file under 80 lines that one other imports belongs into that other, but for those named here."""
    small = {
        name
        for name, path in files().items()
        if path.stem not in ("__init__", "__main__")
        and len(path.read_text(encoding="utf-8").splitlines()) < SMALL
        and len(importers(name)) == 1
    }
    assert small <= SMALL_FILES.keys(), "merge them into their importers, or say why not"
    assert small >= SMALL_FILES.keys(), "these exceptions are not needed"


def test_parts_is_flat() -> None:
    folders = [path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"]
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


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("package", ["vlparts", "vlparts_npu"])
def test_packages_are_typed(package: str) -> None:
    assert (SOURCE / package / "py.typed").is_file()
