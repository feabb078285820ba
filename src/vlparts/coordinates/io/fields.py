"""Fields of JSON documents of annotation programs; errors name the place, what came and what was expected."""

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..json_values import parse_json
from ..validation import check_size, shown
from .json_lines import without_bom

__all__ = [
    "POLICIES",
    "Sizes",
    "list_field",
    "number_field",
    "object_field",
    "objects_of",
    "pairs_of",
    "read_document",
    "size_of",
    "text_field",
]

Sizes = Mapping[str, tuple[int, int]] | Callable[[str], tuple[int, int]]
POLICIES = ("raise", "skip")
LARGEST = sys.float_info.max


def read_document(path: str | Path, program: str) -> tuple[Path, Any]:
    """Return the path and the JSON value of a file, with or without a UTF-8 byte order mark."""
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"`path` must be a JSON file of {program}, got {source}, which does not exist.")
    try:
        content = without_bom(source.read_bytes())
        return source, parse_json(content.decode() if isinstance(content, bytes) else content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: Not valid UTF-8: {error}.") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def field(entry: Mapping[str, Any], key: str, place: str, kind: type | tuple[type, ...], expected: str) -> Any:
    """Return a field of an object, or raise ValueError if it is missing or of another type."""
    name = f"{place}.{key}" if place else key
    if key not in entry:
        raise ValueError(f"`{name}` is missing; expected {expected}.")
    value = entry[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{name}` must be {expected}, got {shown(value)}.")
    return value


def object_field(entry: Mapping[str, Any], key: str, place: str, *, optional: bool = False) -> dict[str, Any]:
    """Return a field that is an object; {} for a missing one or null if it is optional."""
    if optional and entry.get(key) is None:
        return {}
    value: dict[str, Any] = field(entry, key, place, dict, "an object")
    return value


def list_field(entry: Mapping[str, Any], key: str, place: str, *, optional: bool = False) -> list[Any]:
    """Return a field that is a list; [] for a missing one or null if it is optional."""
    if optional and entry.get(key) is None:
        return []
    value: list[Any] = field(entry, key, place, list, "a list")
    return value


def text_field(entry: Mapping[str, Any], key: str, place: str) -> str:
    """Return a field that is a string."""
    value: str = field(entry, key, place, str, "a string")
    return value


def number_field(entry: Mapping[str, Any], key: str, place: str, least: float = -math.inf) -> float:
    """Return a field that is a number of at least `least`."""
    expected = "a number" if least == -math.inf else f"a number of at least {least:g}"
    value: float = field(entry, key, place, (int, float), expected)
    if value < least or abs(value) > LARGEST:
        raise ValueError(f"`{place}.{key}` must be {expected}, got {shown(value)}.")
    return value


def objects_of(values: list[Any], place: str) -> list[dict[str, Any]]:
    """Return a list after checking that its items are objects."""
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(f"`{place}[{index}]` must be an object, got {shown(value)}.")
    return values


def pairs_of(values: list[Any], place: str) -> list[tuple[float, float]]:
    """Return a list of pairs of numbers."""
    for index, value in enumerate(values):
        is_pair = isinstance(value, (list, tuple)) and len(value) == 2
        if not is_pair or not all(type(number) in (int, float) and abs(number) <= LARGEST for number in value):
            raise ValueError(f"`{place}[{index}]` must be a list of two numbers, got {shown(value)}.")
    return [(x, y) for x, y in values]


def size_of(sizes: Sizes | None, image: str, place: str) -> tuple[int, int]:
    """Return the (width, height) of an image from the argument `sizes` of a reader."""
    if callable(sizes):
        size = sizes(image)
    elif sizes is not None and image in sizes:
        size = sizes[image]
    else:
        raise ValueError(
            f"`{place}` has no width and height of image {image!r}; expected them in `sizes`, a mapping of image to "
            "(width, height) or a function."
        )
    return check_size(size, f"sizes[{image!r}]")
