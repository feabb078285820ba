"""The schema of COCO files: every field that is read is checked once, before anything is read.

A message names the list, the index and the field, what came and what was expected.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ..validation import MAX_SIDE

__all__ = ["check_document", "is_polygon"]

_Entry = Mapping[str, Any]
_KINDS = ("polygon", "quad")


def check_document(document: _Entry) -> None:
    """Check a COCO file.

    Polygons must be lists of numbers; whether they are polygons is for [`is_polygon`] to say.

    Raises:
        ValueError: At the first list, entry or field that is not as COCO defines it; names it.
    """
    if "images" not in document:
        raise ValueError("`images` is missing; expected a list.")
    images = _check_list(document, "images", _check_image)
    categories = _check_list(document, "categories", _check_category)
    _check_list(document, "annotations", _check_annotation)
    for index, entry in enumerate(document.get("annotations", [])):
        place = f"`annotations[{index}]`"
        for field, name, known in (("image_id", "images", images), ("category_id", "categories", categories)):
            if entry[field] not in known:
                raise ValueError(f"{place}: `{field}` must be the id of one of the {name}, got {entry[field]}.")
        names, points = categories[entry["category_id"]].get("keypoints"), entry.get("keypoints") or []
        if names and any(points[2::3]) and len(points) != 3 * len(names):
            raise ValueError(
                f"{place}: `keypoints` must have {len(names)} points, as many as its category, got {len(points) // 3}."
            )


def _check_list(document: _Entry, name: str, check: Callable[[_Entry, str], None]) -> dict[int, _Entry]:
    """Check the entries of a list and return them by their ids."""
    listed = document.get(name, [])
    if not isinstance(listed, list):
        raise ValueError(f"`{name}` must be a list, got {reprlib.repr(listed)}.")
    first: dict[int, int] = {}
    for index, entry in enumerate(listed):
        place = f"`{name}[{index}]`"
        if not isinstance(entry, dict):
            raise ValueError(f"{place} must be an object, got {reprlib.repr(entry)}.")
        if name != "annotations" or "id" in entry:
            _check_id(entry, "id", place)
            other = first.setdefault(entry["id"], index)
            if other != index:
                raise ValueError(f"{place}: `id` must be unique, got {entry['id']}, which `{name}[{other}]` has too.")
        check(entry, place)
    return {number: listed[index] for number, index in first.items()}


def is_polygon(numbers: Sequence[float], kind: str) -> bool:
    """Whether a flat list of coordinates has the number of points of a polygon, or of a quad."""
    return len(numbers) == 8 if kind == "quad" else len(numbers) >= 6 and len(numbers) % 2 == 0


def _refuse(entry: _Entry, field: str, place: str, expected: str) -> NoReturn:
    if field not in entry:
        raise ValueError(f"{place}: `{field}` is missing; expected {expected}.")
    raise ValueError(f"{place}: `{field}` must be {expected}, got {reprlib.repr(entry[field])}.")


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_numbers(values: object) -> bool:
    """Whether a value is a list of numbers that are finite as floats."""
    if not isinstance(values, list):
        return False
    try:
        return all(type(value) in (int, float) and math.isfinite(value) for value in values)
    except OverflowError:
        return False


def _check_id(entry: _Entry, field: str, place: str) -> None:
    if not _is_integer(entry.get(field), 0):
        _refuse(entry, field, place, "an integer of at least 0")


def _check_name(entry: _Entry, field: str, place: str) -> None:
    if not isinstance(entry.get(field), str):
        _refuse(entry, field, place, "a string")


def _check_image(entry: _Entry, place: str) -> None:
    _check_name(entry, "file_name", place)
    for field in ("width", "height"):
        if not _is_integer(entry.get(field), 1):
            _refuse(entry, field, place, "an integer of at least 1")
        if entry[field] > MAX_SIDE:
            _refuse(entry, field, place, f"an integer of at most {MAX_SIDE}")


def _check_category(entry: _Entry, place: str) -> None:
    _check_name(entry, "name", place)
    names = entry.get("keypoints")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        _refuse(entry, "keypoints", place, "a list of strings")


def _check_annotation(entry: _Entry, place: str) -> None:
    for field in ("image_id", "category_id"):
        _check_id(entry, field, place)
    if entry.get("identity") is not None:
        _check_id(entry, "identity", place)
    if entry.get("iscrowd", 0) not in (0, 1, None):
        _refuse(entry, "iscrowd", place, "0 or 1")
    if entry.get("score") is not None and not _are_numbers([entry["score"]]):
        _refuse(entry, "score", place, "a finite number")
    if entry.get("kind", "polygon") not in _KINDS:
        _refuse(entry, "kind", place, " or ".join(map(repr, _KINDS)))
    for field in ("bbox", "xyxy"):
        if entry.get(field) is not None:
            _check_box(entry, field, place)
    _check_segmentation(entry, place)
    points = entry.get("keypoints")
    if points is not None and not (_are_numbers(points) and len(points) % 3 == 0):
        _refuse(entry, "keypoints", place, "a list of x, y and visibility per point, finite numbers")


def _check_box(entry: _Entry, field: str, place: str) -> None:
    values, names = entry[field], "x, y, width, height" if field == "bbox" else "x1, y1, x2, y2"
    if isinstance(values, list) and len(values) == 8 and field == "bbox":
        _refuse(entry, field, place, f"a list of 4 numbers ({names}; 8 numbers of a quad belong into `segmentation`)")
    if not _are_numbers(values) or len(values) != 4:
        _refuse(entry, field, place, f"a list of 4 finite numbers ({names})")
    if field == "bbox" and (values[2] < 0 or values[3] < 0):
        _refuse(entry, field, place, "a box with a width and height of at least 0")
    if field == "bbox" and not _are_numbers([float(values[0]) + values[2], float(values[1]) + values[3]]):
        _refuse(entry, field, place, "a box with finite corners")


def _check_segmentation(entry: _Entry, place: str) -> None:
    """Check that the segmentation is a list of lists of numbers, or an object, as of a run-length encoded mask."""
    value = entry.get("segmentation")
    if value is None or isinstance(value, dict) or (isinstance(value, list) and all(map(_are_numbers, value))):
        return
    _refuse(
        entry, "segmentation", place, "a list of polygons, flat lists of finite numbers, or a run-length encoded mask"
    )
