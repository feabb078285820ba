"""Reading and writing COCO annotation files.

COCO has boxes as x, y, width, height, polygons as flat lists under "segmentation", and points as "keypoints". Data
without a place in COCO, such as the kind of a quad, an identity or attributes, is written under additional keys, which
other readers ignore.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..regions import Region
from ..validation import check_choice
from .annotations import ImageRegions
from .coco_schema import check_document, is_polygon
from .json_lines import json_line, parse_object, without_bom

__all__ = ["CocoImages", "read_coco", "write_coco"]

SHAPES = ("auto", "box", "polygon", "keypoints")
CROWDS = ("skip", "keep", "raise")
POLYGONS = ("raise", "skip")


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
        ValueError: If a region is a line or track, is in another image than the first, has an empty label, or one with
            half of a surrogate pair.
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
    Path(path).write_text(json_line({**listed, "categories": rows}), encoding="utf-8")


class CocoImages(list[ImageRegions]):
    """The images of a COCO file: a list, with the counts of what was omitted.

    Attributes:
        skipped: Number of omitted annotations and polygons, under the keys "crowds" and "polygons".
    """

    def __init__(self, images: Iterable[ImageRegions] = (), skipped: Mapping[str, int] | None = None) -> None:
        super().__init__(images)
        self.skipped: dict[str, int] = {"crowds": 0, "polygons": 0, **(skipped or {})}


def read_coco(path: str | Path, shape: str = "auto", *, crowds: str = "skip", polygons: str = "raise") -> CocoImages:
    """Read a COCO file. All its fields that can be read are checked before anything is read, whatever `shape` is.

    Args:
        path: A JSON file with "images", "annotations" and "categories", in UTF-8, with or without byte order mark.
        shape: What to read of each annotation: "box", "polygon" (one region per polygon) or "keypoints" (one point per
            labelled keypoint, with its name as label). "auto" reads keypoints if there are any, else polygons if there
            are any, else the box, also for run-length encoded masks.
        crowds: What to do with annotations of groups of objects (`"iscrowd": 1`), whose box is not that of one object:
            "skip" omits them, as torchvision's and DETR's training code does; "keep" reads them as regions like any
            other; "raise" is an error.
        polygons: What to do with a polygon that is read and has fewer than 3 points or an odd number of coordinates (a
            quad: other than 4 points): "raise" is an error; "skip" omits it, and not the other polygons of its
            annotation.

    Returns:
        All images with their regions, in the order of the file. Several polygons or points of one annotation have its
        id as identity. The attribute `skipped` has the numbers of omitted "crowds" and "polygons".

    Raises:
        ValueError: If the file is not a COCO file: names the file, the list, the index and the field, what came and
            what was expected. Ids must be integers of at least 0 and unique, and the images and categories of
            annotations must exist. Also if an annotation lacks the data for `shape`, is a crowd with `crowds="raise"`,
            or has a run-length encoded mask with `shape="polygon"`.
    """
    check_choice(shape, "shape", SHAPES)
    check_choice(crowds, "crowds", CROWDS)
    check_choice(polygons, "polygons", POLYGONS)
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"`path` must be a COCO JSON file, got {source}, which does not exist.")
    try:
        document = parse_object(without_bom(source.read_bytes()))
        check_document(document)
        return _read(document, shape, crowds, polygons)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _read(document: Mapping[str, Any], shape: str, crowds: str, polygons: str) -> CocoImages:
    """Read a document that has been checked."""
    categories = {entry["id"]: entry for entry in document.get("categories", [])}
    regions: dict[int, list[Region]] = {entry["id"]: [] for entry in document["images"]}
    skipped = Counter[str]()
    for index, entry in enumerate(document.get("annotations", [])):
        place = f"`annotations[{index}]`"
        if entry.get("iscrowd") and crowds != "keep":
            if crowds == "raise":
                raise ValueError(f"{place} is a crowd (`iscrowd` is 1); crowds='skip' omits it, 'keep' reads it.")
            skipped["crowds"] += 1
            continue
        found, omitted = _regions(entry, categories[entry["category_id"]], shape, polygons, place)
        regions[entry["image_id"]] += found
        skipped["polygons"] += omitted
    images = [
        ImageRegions(
            entry["file_name"],
            entry["width"],
            entry["height"],
            tuple(regions[entry["id"]]),
            _read_attributes(entry),
        )
        for entry in document["images"]
    ]
    return CocoImages(images, skipped)


def _regions(
    entry: Mapping[str, Any], category: Mapping[str, Any], shape: str, polygons: str, place: str
) -> tuple[list[Region], int]:
    """Return the regions of one annotation, and the number of polygons that were omitted."""
    if shape == "auto":
        outline = isinstance(entry.get("segmentation"), list) and entry["segmentation"]
        labelled = any((entry.get("keypoints") or ())[2::3])
        shape = "keypoints" if labelled else "polygon" if outline else "box"
    field = {"box": "bbox", "polygon": "segmentation"}.get(shape, "keypoints")
    if entry.get(field) is None:
        raise ValueError(f"{place}: `{field}` is missing; shape={shape!r} reads it.")
    label, score, identity = category["name"] or None, entry.get("score"), entry.get("identity")
    attributes = _read_attributes(entry)
    if shape == "box":
        return [Region.box(*_corners(entry), label, score, identity=identity, attributes=attributes)], 0
    if shape == "polygon":
        given, kind = entry["segmentation"], entry.get("kind", "polygon")
        if not isinstance(given, list):
            raise ValueError(
                f"{place}: `segmentation` must be a list of polygons, got a run-length encoded mask; use shape='box'."
            )
        identity = entry.get("id") if identity is None and len(given) > 1 else identity
        for number, polygon in enumerate(given):
            if polygons == "raise" and not is_polygon(polygon, kind):
                expected = "4 points" if kind == "quad" else "at least 3 points"
                raise ValueError(
                    f"{place}: `segmentation[{number}]` must be a {kind} with x and y of {expected}, got "
                    f"{len(polygon)} numbers; polygons='skip' omits it."
                )
        kept = [tuple(zip(one[::2], one[1::2], strict=True)) for one in given if is_polygon(one, kind)]
        regions = [Region(kind, points, label, score, identity=identity, attributes=attributes) for points in kept]
        return regions, len(given) - len(kept)
    flat = entry["keypoints"]
    count = len(flat) // 3
    names = category.get("keypoints") or [label] * count
    identity = entry.get("id") if identity is None and count > 1 else identity
    points = [
        Region.point(x, y, name or None, score, identity=identity, attributes=attributes)
        for x, y, seen, name in zip(flat[::3], flat[1::3], flat[2::3], names, strict=bool(count))
        if seen
    ]
    return points, 0


def _corners(entry: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return the corners of the box of an annotation; exactly those that were written, if they fit its box."""
    x, y, width, height = bbox = entry["bbox"]
    if entry.get("xyxy") is not None:
        x1, y1, x2, y2 = entry["xyxy"]
        if bbox == [x1, y1, x2 - x1, y2 - y1]:
            return x1, y1, x2, y2
    return x, y, x + width, y + height
