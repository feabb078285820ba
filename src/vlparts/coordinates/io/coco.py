"""Reading and writing COCO annotation files.

COCO has boxes as x, y, width, height, polygons as flat lists under "segmentation", and points as "keypoints". Data
without a place in COCO, such as the kind of a quad, an identity or attributes, is written under additional keys, which
other readers ignore.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..regions import Region
from ..validation import check_choice
from .annotations import ImageRegions
from .json_lines import parse_object, without_bom

__all__ = ["read_coco", "write_coco"]

SHAPES = ("auto", "box", "polygon", "keypoints")
CROWDS = ("skip", "keep", "raise")


def _area(region: Region) -> float:
    """Return the area of a box or polygon in square pixels. The edges of a polygon must not cross."""
    x1, y1, x2, y2 = region.xyxy
    if region.kind == "box":
        return (x2 - x1) * (y2 - y1)
    corners = region.points
    edges = zip(corners, corners[1:] + corners[:1], strict=True)
    return abs(math.fsum((x - x1) * (v - y1) - (u - x1) * (y - y1) for (x, y), (u, v) in edges)) / 2


def _annotation(region: Region, number: int, image_id: int, category_id: int) -> dict[str, Any]:
    """Return one entry of "annotations"."""
    x1, y1, x2, y2 = region.xyxy
    flat = [value for point in region.points for value in point]
    entry: dict[str, Any] = {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": 0.0 if region.kind == "point" else _area(region),
        "iscrowd": 0,
    }
    if region.kind == "point":
        entry |= {"keypoints": [*flat, 2], "num_keypoints": 1}
    elif region.kind != "box":
        entry |= {"segmentation": [flat]}
    elif (x1 + (x2 - x1), y1 + (y2 - y1)) != (x2, y2):
        entry |= {"xyxy": [x1, y1, x2, y2]}  # x1 plus any float width may differ from x2
    entry |= {} if region.kind != "quad" else {"kind": "quad"}
    entry |= {} if region.score is None else {"score": region.score}
    entry |= {} if region.identity is None else {"identity": region.identity}
    return entry | _attributes(region.attributes)


def _attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the additional key of attributes, if there are any."""
    return {"attributes": dict(attributes)} if attributes else {}


def _read_attributes(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes of an entry. A value that is not an object, such as a list, is kept under its key."""
    value = entry.get("attributes")
    return value if isinstance(value, dict) else {} if value is None else {"attributes": value}


def write_coco(images: Iterable[ImageRegions], path: str | Path) -> None:
    """Write a COCO file of boxes, quads, polygons and points; `read_coco` is the exact inverse.

    A region without a label has the category with the empty name. Additional keys: "kind" of a quad, "identity",
    "attributes" of a region or image, as CVAT writes them, and "xyxy" of a box whose width and height do not give its
    corners exactly.

    Raises:
        ValueError: If a region is a line or track, is in another image than the first, or has an empty label.
    """
    categories: dict[tuple[str, bool], int] = {}
    listed: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for image_id, image in enumerate(images, start=1):
        name = {"file_name": image.image, "width": image.width, "height": image.height}
        listed["images"].append({"id": image_id, **name} | _attributes(image.attributes))
        for index, region in enumerate(image.regions):
            place = f"Image {image.image!r}: `regions[{index}]`"
            if region.kind in ("line", "track") or region.image:
                raise ValueError(f"{place} must be a box, quad, polygon or point of image 0, got {region!r}.")
            if region.label == "":
                raise ValueError(f"{place} must not have an empty label, which is that of regions without a label.")
            key = (region.label or "", region.kind == "point")
            category = categories.setdefault(key, len(categories) + 1)
            number = len(listed["annotations"]) + 1
            listed["annotations"].append(_annotation(region, number, image_id, category))
    rows: list[dict[str, Any]] = [
        {"id": number, "name": name} | ({"keypoints": [name], "skeleton": []} if points else {})
        for (name, points), number in categories.items()
    ]
    text = json.dumps({**listed, "categories": rows}, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_coco(path: str | Path, shape: str = "auto", *, crowds: str = "skip") -> list[ImageRegions]:
    """Read a COCO file.

    Args:
        path: A JSON file with "images", "annotations" and "categories".
        shape: What to read of each annotation: "box", "polygon" (one region per polygon) or "keypoints" (one point per
            labelled keypoint, with its name as label). "auto" reads keypoints if there are any, else polygons if there
            are any, else the box, also for run-length encoded masks.
        crowds: What to do with annotations of groups of objects (`"iscrowd": 1`), whose box is not that of one object:
            "skip" omits them, as torchvision's and DETR's training code does; "keep" reads them as regions like any
            other; "raise" is an error.

    Returns:
        All images with their regions, in the order of the file. Several polygons or points of one annotation have its
        id as identity. The key "attributes" of an annotation or image gives the attributes of its regions or its own.

    Raises:
        ValueError: If the file is not a COCO file, two entries of a list have the same id, an id is neither an integer
            nor a string, or an annotation has an unknown image or category, lacks the data for `shape`, is a crowd
            with `crowds="raise"`, or has a run-length encoded mask with `shape="polygon"`.
    """
    check_choice(shape, "shape", SHAPES)
    check_choice(crowds, "crowds", CROWDS)
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"`path` must be a COCO JSON file, got {source}, which does not exist.")
    try:
        document = parse_object(without_bom(source.read_bytes()))
        images = dict(_entries(document["images"], "images"))
        categories = dict(_entries(document.get("categories", []), "categories"))
        regions: dict[Any, list[Region]] = {image: [] for image in images}
        annotations = document.get("annotations", [])
        for index, (_, entry) in enumerate(_entries(annotations, "annotations", required=False)):
            if _is_crowd(entry, index) and crowds != "keep":
                if crowds == "skip":
                    continue
                raise ValueError(
                    f"`annotations[{index}]` is a crowd (`iscrowd` is 1); crowds='skip' omits it, 'keep' reads it."
                )
            try:
                image, category = (_checked_id(entry[name], name) for name in ("image_id", "category_id"))
                regions[image] += _regions(entry, categories[category], shape)
            except KeyError as error:
                raise ValueError(f"`annotations[{index}]`: {error} is missing.") from None
            except (ValueError, TypeError) as error:
                raise ValueError(f"`annotations[{index}]`: {error}") from None
        return [
            ImageRegions(
                image["file_name"], image["width"], image["height"], tuple(regions[number]), _read_attributes(image)
            )
            for number, image in images.items()
        ]
    except KeyError as error:
        raise ValueError(f"{source}: {error} is missing.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None


def _checked_id(value: Any, name: str) -> int | float | str:
    """Return an id, or raise ValueError; True is not the id 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"`{name}` must be an integer or a string, got {value!r}.")
    return value


def _entries(listed: Any, name: str, required: bool = True) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield id and entry of each object of a list; None for one without an id unless it is required."""
    if not isinstance(listed, list):
        raise ValueError(f"`{name}` must be a list, got {listed!r}.")
    first: dict[Any, int] = {}
    for index, entry in enumerate(listed):
        place = f"`{name}[{index}]`"
        if not isinstance(entry, dict):
            raise ValueError(f"{place} must be an object, got {entry!r}.")
        if "id" not in entry:
            if required:
                raise ValueError(f"{place}: 'id' is missing.")
            yield None, entry
            continue
        try:
            number = _checked_id(entry["id"], "id")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if first.setdefault(number, index) != index:
            raise ValueError(f"{place}: the id {number!r} occurs twice; `{name}[{first[number]}]` has it too.")
        yield number, entry


def _is_crowd(entry: Mapping[str, Any], index: int) -> bool:
    """Whether an annotation is that of a group of objects."""
    value = entry.get("iscrowd", 0)
    if value not in (0, 1, None):
        raise ValueError(f"`annotations[{index}]`: `iscrowd` must be 0 or 1, got {value!r}.")
    return bool(value)


def _pairs(values: Any, step: int, name: str) -> list[tuple[float, ...]]:
    """Split a flat list into tuples of `step`."""
    if not isinstance(values, list) or len(values) % step:
        raise ValueError(f"`{name}` must be a list whose length is a multiple of {step}, got {values!r}.")
    return [tuple(values[start : start + step]) for start in range(0, len(values), step)]


def _regions(entry: Mapping[str, Any], category: Mapping[str, Any], shape: str) -> list[Region]:
    """Return the regions of one annotation."""
    if shape == "auto":
        outline = isinstance(entry.get("segmentation"), list) and entry["segmentation"]
        shape = "keypoints" if any(entry.get("keypoints", ())[2::3]) else "polygon" if outline else "box"
    label, score, identity = category["name"] or None, entry.get("score"), entry.get("identity")
    attributes = _read_attributes(entry)
    if shape == "box":
        bbox = entry["bbox"]
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(value, (int, float)) for value in bbox):
            raise ValueError(f"`bbox` must be a list of 4 numbers, got {bbox!r}.")
        x, y, width, height = bbox
        if width < 0 or height < 0:
            raise ValueError(f"`bbox` must have a width and height of at least 0, got {bbox}.")
        corners = (x, y, x + width, y + height)
        exact = entry.get("xyxy")
        if isinstance(exact, list) and len(exact) == 4:
            x1, y1, x2, y2 = exact
            corners = (x1, y1, x2, y2) if bbox == [x1, y1, x2 - x1, y2 - y1] else corners
        return [Region.box(*corners, label, score, identity=identity, attributes=attributes)]
    if shape == "polygon":
        polygons = entry["segmentation"]
        if not isinstance(polygons, list):
            raise ValueError(
                "`segmentation` must be a list of polygons, got a run-length encoded mask; use shape='box'."
            )
        identity = entry.get("id") if identity is None and len(polygons) > 1 else identity
        kind = entry.get("kind", "polygon")
        flat = [tuple(_pairs(polygon, 2, "segmentation")) for polygon in polygons]
        return [
            Region(kind, points, label, score, identity=identity, attributes=attributes)  # type: ignore[arg-type]
            for points in flat
        ]
    points = _pairs(entry["keypoints"], 3, "keypoints")
    names = category.get("keypoints") or [label] * len(points)
    if len(names) != len(points):
        raise ValueError(f"`keypoints` must have {len(names)} points, as many as its category, got {len(points)}.")
    identity = entry.get("id") if identity is None and len(points) > 1 else identity
    return [
        Region.point(x, y, name or None, score, identity=identity, attributes=attributes)
        for (x, y, seen), name in zip(points, names, strict=True)
        if seen
    ]
