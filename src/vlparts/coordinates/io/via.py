"""Reading annotations of the VGG Image Annotator (VIA), versions 1 and 2."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..regions import Region
from ..validation import check_choice, shown
from .annotations import ImageRegions
from .fields import (
    POLICIES,
    Sizes,
    list_field,
    number_field,
    object_field,
    pairs_of,
    read_document,
    size_of,
    text_field,
)

__all__ = ["read_via"]

METADATA = "_via_img_metadata"
KINDS = {"polygon": "polygon", "polyline": "line"}


def read_via(
    path: str | Path, sizes: Sizes, *, label: str | None = None, on_unsupported: str = "raise"
) -> list[ImageRegions]:
    """Read a JSON file of VIA 1 or 2: a project or exported annotations.

    Args:
        path: The file. Coordinates are pixels of the image.
        sizes: The (width, height) of each image by its file name, which VIA does not store: a mapping or a function,
            such as `lambda name: PIL.Image.open(folder / name).size`.
        label: Name of the region attribute that is the label; None for no labels. A region without it, or with an
            empty text, has no label.
        on_unsupported: What to do with circles, ellipses and other shapes that are no region: "raise", or "skip",
            which omits them.

    Returns:
        The images in the order of the file. The other region attributes are the attributes of regions, and the file
        attributes those of images. The size of a file in bytes and the settings of a project are not read.

    Raises:
        ValueError: If the file is not one of VIA 1 or 2, or a field is missing or invalid; with the path, the place of
            the field, what came and what was expected.
    """
    check_choice(on_unsupported, "on_unsupported", POLICIES)
    source, document = read_document(path, "VIA")
    try:
        place, metadata = _metadata(document)
        return [_image(entry, f"{place}[{key!r}]", sizes, label, on_unsupported) for key, entry in metadata.items()]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _metadata(document: Any) -> tuple[str, dict[str, Any]]:
    """Return the entries of the images, and their place in the document."""
    expected = "a project or annotations of VIA 1 or 2"
    if not isinstance(document, dict):
        raise ValueError(f"Expected {expected}, an object, got {shown(document)}.")
    if METADATA in document:
        return METADATA, object_field(document, METADATA, "")
    if "images" in document and "annotations" in document:
        raise ValueError(f"Expected {expected}, got the keys of COCO, which `read_coco` reads.")
    if "project" in document and "metadata" in document:
        raise ValueError(f"Expected {expected}, got a project of VIA 3.")
    return "", document


def _image(entry: Any, place: str, sizes: Sizes, label: str | None, on_unsupported: str) -> ImageRegions:
    """Return an image and its regions."""
    if not isinstance(entry, dict):
        raise ValueError(f"`{place}` must be an object, got {shown(entry)}.")
    name = text_field(entry, "filename", place)
    listed = entry.get("regions")
    # VIA 1 has an object with the indices as keys.
    entries = list(listed.values()) if isinstance(listed, dict) else list_field(entry, "regions", place)
    regions = []
    for index, item in enumerate(entries):
        region = _region(item, f"{place}.regions[{index}]", label, on_unsupported)
        if region is not None:
            regions.append(region)
    width, height = size_of(sizes, name, place)
    return ImageRegions(
        name, width, height, tuple(regions), object_field(entry, "file_attributes", place, optional=True)
    )


def _region(item: Any, place: str, label: str | None, on_unsupported: str) -> Region | None:
    """Return a region, or None if it is skipped."""
    if not isinstance(item, dict):
        raise ValueError(f"`{place}` must be an object, got {shown(item)}.")
    shape = object_field(item, "shape_attributes", place)
    attributes = dict(object_field(item, "region_attributes", place, optional=True))
    where = f"{place}.shape_attributes"
    name = text_field(shape, "name", where)
    points = _points(shape, name, where)
    if points is None:
        if on_unsupported == "skip":
            return None
        raise ValueError(
            f"`{where}.name` must be rect, polygon, polyline or point, got {name!r}; on_unsupported='skip' omits it."
        )
    text = attributes.pop(label, "") if label is not None else ""
    if not isinstance(text, str):
        raise ValueError(f"`{place}.region_attributes.{label}` must be a string, the label, got {shown(text)}.")
    kind = KINDS.get(name, "box" if name == "rect" else "point")
    try:
        return Region(kind, tuple(points), text or None, attributes=attributes)
    except ValueError as error:
        raise ValueError(f"`{where}`: {error}") from None


def _points(shape: Mapping[str, Any], name: str, place: str) -> list[tuple[float, float]] | None:
    """Return the points of a shape, or None if it is no region."""
    if name == "rect":
        x, y = number_field(shape, "x", place), number_field(shape, "y", place)
        width, height = (number_field(shape, key, place, 0) for key in ("width", "height"))
        return [(x, y), (x + width, y + height)]
    if name == "point":
        return [(number_field(shape, "cx", place), number_field(shape, "cy", place))]
    if name not in KINDS:
        return None
    xs, ys = (list_field(shape, key, place) for key in ("all_points_x", "all_points_y"))
    if len(xs) != len(ys):
        raise ValueError(
            f"`{place}.all_points_x` and `all_points_y` must have the same length, got {len(xs)} and {len(ys)}."
        )
    return pairs_of(list(zip(xs, ys, strict=True)), f"{place}.all_points")
