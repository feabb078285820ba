"""Names: none of ours is one of transformers', and the public surface changes only on purpose."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import vlparts
from vlparts.registration import PARTS

PARTS_FOLDER = Path(vlparts.__file__).parent / "parts"
PUBLIC_NAMES = (Path(__file__).parent / "public_names.txt").read_text(encoding="utf-8").split()
CLASS_PATTERN = re.compile(r"^class (\w+)", re.MULTILINE)


def class_names(folder: Path) -> set[str]:
    """Return the names of all public classes that the folder's files define at module level."""
    texts = (path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    return {name for text in texts for name in CLASS_PATTERN.findall(text) if not name.startswith("_")}


def test_no_class_name_exists_in_transformers() -> None:
    theirs = class_names(Path(transformers.__file__).parent) | set(dir(transformers))
    assert "PreTrainedModel" in theirs
    exported = {name for name in vlparts.__all__ if inspect.isclass(getattr(vlparts, name))}
    assert (class_names(PARTS_FOLDER) | exported) & theirs == set()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.config.model_type)
def test_model_types_are_our_own(part: object) -> None:
    model_type = part.config.model_type  # type: ignore[attr-defined]
    assert model_type.startswith("vlparts_")
    assert model_type not in CONFIG_MAPPING_NAMES


def test_model_types_are_distinct() -> None:
    model_types = [part.config.model_type for part in PARTS]
    assert len(model_types) == len(set(model_types))


def test_public_names_are_the_pinned_ones() -> None:
    """A changed public surface is written down in public_names.txt and in CHANGELOG.md."""
    assert list(vlparts.__all__) == PUBLIC_NAMES


def test_public_names_exist_and_are_documented() -> None:
    for name in vlparts.__all__:
        value = getattr(vlparts, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name} has no docstring"


def test_public_names_are_listed_once() -> None:
    assert len(PUBLIC_NAMES) == len(set(PUBLIC_NAMES))


@pytest.mark.parametrize("path", sorted(PARTS_FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_public_classes_are_their_files(path: Path) -> None:
    """Every name in a part's `__all__` exists, so that `from vlparts.parts.x import *` works."""
    name = "vlparts.parts" if path.stem == "__init__" else f"vlparts.parts.{path.stem}"
    module = importlib.import_module(name)
    missing = [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]
    assert missing == []
