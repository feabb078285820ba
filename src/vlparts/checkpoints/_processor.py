"""Published image processors: the fields of preprocessor_config.json."""

from pathlib import Path
from typing import Any

from ._folder import read_json

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def read_processor(folder: Path) -> dict[str, Any] | None:
    """Read the fields of a folder's image processor; None if there is no file with them.

    Raises:
        ValueError: If the file is malformed.
    """
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            fields = read_json(folder / name)
            inner = fields.get("image_processor", fields)
            if not isinstance(inner, dict):
                raise ValueError(f"`folder` must have a {name} whose image_processor is an object, got {inner!r}.")
            return inner
    return None


def require_processor(folder: Path) -> dict[str, Any]:
    """Read the fields of a folder's image processor.

    Raises:
        ValueError: If there is no file with them, or if it is malformed.
    """
    fields = read_processor(folder)
    if fields is None:
        raise ValueError(f"`folder` must have one of {', '.join(PROCESSOR_FILES)}, got {str(folder)!r}.")
    return fields


def read_statistics(folder: Path) -> dict[str, Any]:
    """Read the image mean and standard deviation of a folder, without those that its files do not have."""
    fields = read_processor(folder) or {}
    return {name: fields[name] for name in ("image_mean", "image_std") if fields.get(name) is not None}
