"""COCO annotation files: in and out.

COCO writes a box as x, y, width, height, a polygon as a flat list under "segmentation", and points as "keypoints".
What it has no place for (a quad's kind, an identity, a keypoint's own label) stands under further keys, which other
readers pass over.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..regions import Region
from .annotations import ImageRegions
from .json_lines import parse_object

__all__ = ["read_coco", "write_coco"]

SHAPES = ("box", "polygon", "keypoints")


def _area(region: Region) -> float:
    """Area of a box or polygon in square pixels (of a polygon whose edges do not cross)."""
    x1, y1, x2, y2 = region.xyxy
    if region.kind == "box":
        return (x2 - x1) * (y2 - y1)
    corners = region.points
    edges = zip(corners, corners[1:] + corners[:1], strict=True)
    return abs(math.fsum((x - x1) * (v - y1) - (u - x1) * (y - y1) for (x, y), (u, v) in edges)) / 2


def _annotation(region: Region, number: int, image_id: int, category_id: int) -> dict[str, Any]:
    """One entry of "annotations"."""
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
        entry |= {"xyxy": [x1, y1, x2, y2]}  # no width that is a float may lead to x2
    entry |= {} if region.kind != "quad" else {"kind": "quad"}
    entry |= {} if region.score is None else {"score": region.score}
    return entry | ({} if region.identity is None else {"identity": region.identity})


def write_coco(images: Iterable[ImageRegions], path: str | Path) -> None:
    """Write a COCO file of boxes, quads, polygons and points; `read_coco` gives them back exactly.

    A region without a label is of the category with the empty name. What COCO has no place for stands under keys of
    its own: "kind" of a quad, "identity", and "xyxy" of a box whose corners its width and height do not give exactly.

    Raises:
        ValueError: If a region is a line or track, lies in another image than the first, or has an empty label.
    """
    categories: dict[tuple[str, bool], int] = {}
    listed: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for image_id, image in enumerate(images, start=1):
        name = {"file_name": image.image, "width": image.width, "height": image.height}
        listed["images"].append({"id": image_id, **name})
        for index, region in enumerate(image.regions):
            place = f"{image.image}: regions[{index}]"
            if region.kind in ("line", "track") or region.image:
                raise ValueError(f"{place} must be a box, quad, polygon or point of image 0, got {region!r}")
            if region.label == "":
                raise ValueError(f"{place} must not have an empty label, which stands for none")
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


def read_coco(path: str | Path, shape: str = "auto") -> list[ImageRegions]:
    """Read a COCO file.

    Args:
        path: A JSON file with "images", "annotations" and "categories".
        shape: What to take of each annotation: "box", "polygon" (one region for each of several polygons) or
            "keypoints" (one point for each that is labelled, its label the keypoint's name); "auto" takes keypoints
            where there are some, else polygons where there are some, else the box, also for masks in run lengths.

    Returns:
        All images in the order of the file, with the regions of each in the order of the file. Polygons and points
        that come from one annotation have its id as their identity.

    Raises:
        ValueError: If the file is no such file, two images have one id, or an annotation names an image or category
            that is not there, lacks what `shape` asks for, or is a mask in run lengths where polygons are asked for.
    """
    if shape not in ("auto", *SHAPES):
        raise ValueError(f"shape must be one of 'auto', {', '.join(map(repr, SHAPES))}, got {shape!r}")
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"path must be a COCO JSON file, got {source}, which is no file")
    try:
        document = parse_object(source.read_bytes())
        images = {image["id"]: image for image in document["images"]}
        if len(images) < len(document["images"]):
            raise ValueError("two images have one id")
        categories = {category["id"]: category for category in document.get("categories", [])}
        regions: dict[Any, list[Region]] = {image: [] for image in images}
        for index, entry in enumerate(document.get("annotations", [])):
            try:
                regions[entry["image_id"]] += _regions(entry, categories[entry["category_id"]], shape)
            except KeyError as error:
                raise ValueError(f"annotations[{index}]: {error} is not there") from None
            except (ValueError, TypeError) as error:
                raise ValueError(f"annotations[{index}]: {error}") from None
        return [
            ImageRegions(image["file_name"], image["width"], image["height"], tuple(regions[number]))
            for number, image in images.items()
        ]
    except KeyError as error:
        raise ValueError(f"{source}: {error} is not there") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None


def _pairs(values: Any, step: int, name: str) -> list[tuple[float, ...]]:
    """Cut a flat list into tuples of `step`."""
    if not isinstance(values, list) or len(values) % step:
        raise ValueError(f"{name} must be a list of {step} numbers for each point, got {values!r}")
    return [tuple(values[start : start + step]) for start in range(0, len(values), step)]


def _regions(entry: Mapping[str, Any], category: Mapping[str, Any], shape: str) -> list[Region]:
    """The regions of one annotation."""
    if shape == "auto":
        outline = isinstance(entry.get("segmentation"), list) and entry["segmentation"]
        shape = "keypoints" if any(entry.get("keypoints", ())[2::3]) else "polygon" if outline else "box"
    label, score, identity = category["name"] or None, entry.get("score"), entry.get("identity")
    if shape == "box":
        (x, y, width, height), *_ = _pairs(entry["bbox"], 4, "bbox")
        if width < 0 or height < 0:
            raise ValueError(f"bbox must have a width and height of at least 0, got {entry['bbox']}")
        corners = (x, y, x + width, y + height)
        exact = entry.get("xyxy")
        if isinstance(exact, list) and len(exact) == 4:
            x1, y1, x2, y2 = exact
            corners = (x1, y1, x2, y2) if entry["bbox"] == [x1, y1, x2 - x1, y2 - y1] else corners
        return [Region.box(*corners, label, score, identity=identity)]
    if shape == "polygon":
        polygons = entry["segmentation"]
        if not isinstance(polygons, list):
            raise ValueError("segmentation must be a list of polygons, got run lengths; take shape='box'")
        identity = entry.get("id") if identity is None and len(polygons) > 1 else identity
        kind = entry.get("kind", "polygon")
        flat = [tuple(_pairs(polygon, 2, "segmentation")) for polygon in polygons]
        return [Region(kind, points, label, score, identity=identity) for points in flat]  # type: ignore[arg-type]
    points = _pairs(entry["keypoints"], 3, "keypoints")
    names = category.get("keypoints") or [label] * len(points)
    identity = entry.get("id") if identity is None and len(points) > 1 else identity
    return [
        Region.point(x, y, name or None, score, identity=identity)
        for (x, y, seen), name in zip(points, names, strict=True)
        if seen
    ]
