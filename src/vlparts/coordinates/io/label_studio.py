"""Reading JSON exports of Label Studio."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..regions import Region
from ..validation import check_choice, check_size, shown
from .annotations import ImageRegions
from .fields import (
    POLICIES,
    Sizes,
    list_field,
    number_field,
    object_field,
    objects_of,
    pairs_of,
    read_document,
    size_of,
    text_field,
)

__all__ = ["read_label_studio"]

PARTS = ("annotations", "predictions")
CHOICES = ("only", "first", "last")
SHAPES = ("rectangle", "polygon", "keypoint")
OTHER_SHAPES = ("ellipse", "brush", "bitmask", "vector", "magicwand", "videorectangle", "relation")
GEOMETRY = ("x", "y", "width", "height", "rotation", "points", "closed")
Result = tuple[str, dict[str, Any]]  # place and entry


def read_label_studio(
    path: str | Path,
    *,
    image_field: str = "image",
    part: str = "annotations",
    choose: str = "only",
    sizes: Sizes | None = None,
    on_unsupported: str = "raise",
) -> list[ImageRegions]:
    """Read a JSON export of Label Studio: rectangles, polygons and keypoints in percent of the image.

    Args:
        path: The file, exported as JSON (not JSON-MIN).
        image_field: Field of a task's data with the image.
        part: "annotations" or "predictions" of the tasks.
        choose: Which of several annotations or predictions of a task is read: "only" raises an error if there are
            several, "first" or "last". Cancelled annotations do not count.
        sizes: (width, height) by image, a mapping or a function, for tasks whose results have no size, such as those
            without regions.
        on_unsupported: What to do with ellipses, brush strokes, relations and other results that are no region:
            "raise", or "skip", which omits them.

    Returns:
        One image per task, in the order of the file, with coordinates in pixels. A rotated rectangle is a quad, and a
        polygon that is not closed is a line. Of several labels the first is the label, and all are the attribute
        "labels". Other results for a region, such as its text, are attributes under their `from_name`, as is "meta".
        Results for the whole image and the other fields of a task's data are attributes of the image. Ids, the state
        of the editor and the drawn width of keypoints are not read.

    Raises:
        ValueError: If the file is not such an export, or a field is missing or invalid; with the path, the place of
            the field, what came and what was expected. Also for images that were rotated in Label Studio, and for
            results of several images in one task.
    """
    check_choice(part, "part", PARTS)
    check_choice(choose, "choose", CHOICES)
    check_choice(on_unsupported, "on_unsupported", POLICIES)
    source, document = read_document(path, "Label Studio")
    try:
        if not isinstance(document, list):
            raise ValueError(f"Expected a list of tasks, as in a JSON export, got {shown(document)}.")
        return [
            _image(task, f"[{index}]", image_field, _results(task, f"[{index}]", part, choose), sizes, on_unsupported)
            for index, task in enumerate(objects_of(document, ""))
        ]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _results(task: Mapping[str, Any], place: str, part: str, choose: str) -> list[Result]:
    """Return the results of the annotation or prediction that is read, with their places."""
    entries = objects_of(list_field(task, part, place, optional=True), f"{place}.{part}")
    valid = [(index, entry) for index, entry in enumerate(entries) if not entry.get("was_cancelled")]
    if len(valid) > 1 and choose == "only":
        raise ValueError(
            f"`{place}.{part}` must have one entry that is not cancelled, got {len(valid)}; choose='first' or 'last' "
            "reads one of them."
        )
    if not valid:
        return []
    index, entry = valid[-1 if choose == "last" else 0]
    name = f"{place}.{part}[{index}]"
    results = objects_of(list_field(entry, "result", name), f"{name}.result")
    return [(f"{name}.result[{number}]", result) for number, result in enumerate(results)]


def _image(
    task: Mapping[str, Any],
    place: str,
    image_field: str,
    results: list[Result],
    sizes: Sizes | None,
    on_unsupported: str,
) -> ImageRegions:
    """Return the image of a task and its regions."""
    data = object_field(task, "data", place)
    name = text_field(data, image_field, f"{place}.data")
    width, height = size = _size(results, name, place, sizes)
    groups, skipped = _groups(results, on_unsupported)
    regions = []
    attributes = {key: value for key, value in data.items() if key != image_field}
    for key, group in groups.items():
        if key in skipped:
            continue
        shape = next((item for item in group if _is_shape(item[1])), None)
        if shape is not None:
            regions.append(_region(shape, group, size))
        else:
            _add_values(attributes, group)
    return ImageRegions(name, width, height, tuple(regions), attributes)


def _groups(results: list[Result], on_unsupported: str) -> tuple[dict[object, list[Result]], set[object]]:
    """Return the results by id, and the ids of regions that are skipped with all their results."""
    groups: dict[object, list[Result]] = {}
    skipped: set[object] = set()
    for index, (where, result) in enumerate(results):
        kind, number = text_field(result, "type", where), result.get("id", (index,))
        if not isinstance(number, (str, int, tuple)):
            raise ValueError(f"`{where}.id` must be a string or an integer, got {shown(number)}.")
        if kind.removesuffix("labels") in OTHER_SHAPES:
            if on_unsupported == "raise":
                raise ValueError(
                    f"`{where}.type` must be a rectangle, polygon or keypoint, or belong to one, got {kind!r}; "
                    "on_unsupported='skip' omits it."
                )
            skipped.add(number)
        groups.setdefault(number, []).append((where, result))
    return groups, skipped


def _size(results: list[Result], image: str, place: str, sizes: Sizes | None) -> tuple[int, int]:
    """Return the size of the image, which all results must agree on."""
    found: tuple[int, int] | None = None
    for where, result in results:
        for key in ("image_rotation", "item_index"):
            if result.get(key):
                raise ValueError(f"`{where}.{key}` must be 0, since regions refer to one image, got {result[key]!r}.")
        if "original_width" in result or "original_height" in result:
            size = (result.get("original_width"), result.get("original_height"))
            checked = check_size(size, f"({where}.original_width, original_height)")
            if found not in (None, checked):
                raise ValueError(f"`{where}` must have the size {found} of the results before, got {checked}.")
            found = checked
    return size_of(sizes, image, place) if found is None else found


def _is_shape(result: Mapping[str, Any]) -> bool:
    """Whether a result gives the shape of a region; results of type "labels" can be without another one."""
    kind, value = result["type"], result.get("value")
    has_geometry = isinstance(value, dict) and ("points" in value or {"x", "y", "width", "height"} <= value.keys())
    return kind.removesuffix("labels") in SHAPES or (kind == "labels" and has_geometry)


def _region(shape: Result, group: list[Result], size: tuple[int, int]) -> Region:
    """Return the region of the results with one id."""
    where, result = shape
    labels: list[str] = []
    attributes: dict[str, Any] = {}
    others = []
    object_field(result, "value", where)
    for item in group:
        place, entry = item
        value, kind = object_field(entry, "value", place), entry["type"]
        if kind.endswith("labels"):
            given = list_field(value, kind, f"{place}.value", optional=True)
            if not all(isinstance(label, str) for label in given):
                raise ValueError(f"`{place}.value.{kind}` must be a list of strings, got {shown(given)}.")
            labels += given
        elif kind not in SHAPES:
            others.append(item)
        if _is_shape(entry) and any(value.get(key) != result["value"].get(key) for key in GEOMETRY):
            raise ValueError(f"`{place}` must have the shape of {where}, whose id it has: {result.get('id')!r}.")
        if entry.get("meta"):
            attributes["meta"] = entry["meta"]
    if len(set(labels)) > 1:
        attributes["labels"] = list(dict.fromkeys(labels))
    _add_values(attributes, others)
    kind, points = _points(result, f"{where}.value", size)
    try:
        return Region(kind, tuple(points), labels[0] if labels else None, result.get("score"), attributes=attributes)
    except ValueError as error:
        raise ValueError(f"`{where}`: {error}") from None


def _add_values(attributes: dict[str, Any], group: list[Result]) -> None:
    """Add results without a shape, such as a text, under their name."""
    for where, result in group:
        name, value = text_field(result, "from_name", where), object_field(result, "value", where)
        kept = {key: given for key, given in value.items() if key not in GEOMETRY}
        if name in attributes:
            raise ValueError(f"`{where}.from_name` must be the name of one result, got {name!r} for several.")
        attributes[name] = next(iter(kept.values())) if len(kept) == 1 else kept


def _points(result: Mapping[str, Any], place: str, size: tuple[int, int]) -> tuple[str, list[tuple[float, float]]]:
    """Return the kind of a region and its points in pixels."""
    value = result["value"]
    width, height = size
    if "points" in value:
        pairs = pairs_of(list_field(value, "points", place), f"{place}.points")
        kind = "line" if value.get("closed") is False else "polygon"
        return kind, [(x / 100 * width, y / 100 * height) for x, y in pairs]
    x, y = number_field(value, "x", place) / 100 * width, number_field(value, "y", place) / 100 * height
    if result["type"].startswith("keypoint"):
        return "point", [(x, y)]
    across = number_field(value, "width", place, 0) / 100 * width
    down = number_field(value, "height", place, 0) / 100 * height
    angle = number_field(value, "rotation", place) if value.get("rotation") is not None else 0
    if angle % 360 == 0:
        return "box", [(x, y), (x + across, y + down)]
    # Clockwise about the upper left corner, in pixels.
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    right, below = (across * cos, across * sin), (-down * sin, down * cos)
    corners = [(0.0, 0.0), right, (right[0] + below[0], right[1] + below[1]), below]
    return "quad", [(x + dx, y + dy) for dx, dy in corners]
