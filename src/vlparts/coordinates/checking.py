"""Checks of training data: regions and texts with problems in a format."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .codec import CoordinateError, ImageSizes, decode, encode
from .conversion import lost_parts
from .formats.registry import CoordinateFormat, get_format
from .frames.maps import clip_points
from .grammars.base import DecodeError, Suspicion
from .io.annotations import region_from_dict
from .resolving import check_sizes
from .thinking import without_thinking

__all__ = ["PROBLEMS", "Problem", "check_region", "check_text"]

PROBLEMS = {
    "broken": "not a region",
    "reordered": "a box with x1 > x2 or y1 > y2",
    "outside": "leaves its image",
    "unwritable": "cannot be written in the format",
    "moved": "moves too far when it is written and read",
    "unreadable": "text that cannot be read in the format",
    "suspicious": "text that looks like coordinates of the format but is not a region",
    "lost": "text beside coordinates that a conversion cannot keep",
}
"""The names of problems with their descriptions."""


class Problem(NamedTuple):
    """A problem: its name in `PROBLEMS`, and the details."""

    name: str
    detail: str


def check_region(
    fields: Mapping[str, Any],
    image_size: ImageSizes,
    format: CoordinateFormat | str | None = None,
    *,
    most: float = 1.0,
) -> list[Problem]:
    """Return the problems of a region in a format.

    Args:
        fields: The region as plain data (see `region_from_dict`). The corners of its box may be out of order.
        image_size: (width, height) of the original image in pixels, or a sequence of them for several images.
        format: A format or its name; None for openPangu's.
        most: Maximum distance, in pixels, that a coordinate may move when the region is written and read.

    Returns:
        The problems; [] for none. A box out of order is checked further with its corners in order.

    Raises:
        ValueError: If the format is unknown or `image_size` is invalid.
    """
    fmt, sizes = get_format(format), check_sizes(image_size)
    fields, problems = _ordered_corners(fields)
    try:
        region = region_from_dict(fields)
    except (ValueError, TypeError) as error:
        return [*problems, Problem("broken", str(error))]
    if region.image >= len(sizes):
        return [*problems, Problem("broken", f"Image {region.image} (counted from 0) does not exist.")]
    try:
        clip_points(region.points, sizes[region.image])
    except ValueError as error:
        return [*problems, Problem("outside", f"{region.kind}: {error}")]
    try:
        text = encode([region], image_size, fmt)
        (read,) = decode(text, image_size, fmt).regions
    except CoordinateError as error:
        return [*problems, Problem("unwritable", str(error))]
    moved = float(np.abs(np.subtract(read.points, region.points)).max())
    if moved > most:
        values = [value for point in region.points for value in point]
        problems.append(Problem("moved", f"{region.kind} {values} moves by {moved:.2f} pixels in {text!r}"))
    return problems


def check_text(
    text: str,
    image_size: ImageSizes,
    format: CoordinateFormat | str | None = None,
    *,
    skip_thinking: bool = False,
) -> list[Problem]:
    """Return the problems of a text in a format.

    Malformed and unfinished regions are "unreadable". Text that looks like coordinates but is not a region, such as
    numbers whose marks `skip_special_tokens=True` removed, is "suspicious". A text without unreadable regions is
    checked for what `convert` cannot keep even in the same format, such as other items in a JSON list of regions;
    these problems are named "lost".

    Args:
        text: Any text.
        image_size: (width, height) of the original image in pixels, or a sequence of them for several images.
        format: A format or its name; None for openPangu's.
        skip_thinking: Whether to check only the answer, without reasoning; see [`decode`].

    Raises:
        ValueError: If the format is unknown or `image_size` is invalid.
    """
    text = without_thinking(text) if skip_thinking and isinstance(text, str) else text
    errors = decode(text, image_size, format, on_error="collect").errors
    names = ["suspicious" if isinstance(error, Suspicion) else "unreadable" for error in errors]
    problems = [_text_problem(name, error) for name, error in zip(names, errors, strict=True)]
    if "unreadable" not in names:
        fmt = get_format(format)
        problems += [_text_problem("lost", part) for part in lost_parts(text, fmt, fmt)]
    return problems


def _text_problem(name: str, error: DecodeError) -> Problem:
    return Problem(name, f"position {error.position}: {error.reason}")


def _ordered_corners(fields: Any) -> tuple[Any, list[Problem]]:
    """Return the fields with the corners of a box in order, and a problem if they were not."""
    box = fields.get("box") if isinstance(fields, Mapping) else None
    if not isinstance(box, Sequence) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
        return fields, []
    x1, y1, x2, y2 = box
    if x1 <= x2 and y1 <= y2:
        return fields, []
    ordered = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
    return {**fields, "box": ordered}, [Problem("reordered", f"box {list(box)}")]
