"""From codes that a grammar found to regions in pixels, with what is wrong with them."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .formats.registry import CoordinateFormat
from .frames.rules import Frame
from .grammars.base import DecodeError, Found
from .quantization import NumberRule
from .regions import Region

__all__ = ["CoordinateError", "by_image", "check_sizes", "frame_of", "resolve", "swapped"]

_QUOTED = 40  # characters of the text that a message quotes at most
_Points = Sequence[tuple[float, float]]


class CoordinateError(ValueError):
    """A region that cannot be written, or text that cannot be read.

    Args:
        message: What came and what was expected.
        position: Index into the text where reading failed; None where a region could not be written.
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position


def _is_size(value: object) -> bool:
    if not isinstance(value, (tuple, list, np.ndarray)) or len(value) != 2:
        return False
    return all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) and side >= 1 for side in value)


def _as_pair(size: Any) -> tuple[int, int]:
    return int(size[0]), int(size[1])


def check_sizes(image_size: object) -> list[tuple[int, int]]:
    """Return the (width, height) of each image, or raise CoordinateError naming what came."""
    if _is_size(image_size):
        return [_as_pair(image_size)]
    if isinstance(image_size, (tuple, list, np.ndarray)) and len(image_size) and all(map(_is_size, image_size)):
        return [_as_pair(size) for size in image_size]
    raise CoordinateError(
        f"image_size must be (width, height), two positive integers, or a sequence of such pairs, got {image_size!r}"
    )


def frame_of(fmt: CoordinateFormat, size: tuple[int, int]) -> Frame:
    """Return the format's frame of an image; raises CoordinateError where it has none."""
    try:
        return fmt.frame(size)
    except ValueError as error:
        raise CoordinateError(f"format {fmt.name!r} has no frame for image_size {size}: {error}") from None


def swapped(codes: Sequence[int]) -> Sequence[int]:
    """Return the codes with the two of each pair changed over."""
    return [code for pair in zip(codes[1::2], codes[::2], strict=True) for code in pair]


def by_image(items: Sequence[Region | Found]) -> dict[int, Sequence[int]]:
    """Return the indices of the items of each image."""
    images = [item.image for item in items]
    if not any(images):
        return {0: range(len(items))} if items else {}
    result: dict[int, list[int]] = {}
    for index, image in enumerate(images):
        result.setdefault(image, []).append(index)
    return dict(result)


def _quoted(text: str, item: Found) -> str:
    return repr(text[item.start : min(item.end, item.start + _QUOTED)])


def _codes(items: Sequence[Found], frame: Frame, fmt: CoordinateFormat, clamp: bool) -> list[Sequence[int]]:
    """Return the codes of regions in the order x, y, within their range under "clamp"."""
    codes: list[Sequence[int]] = [item.codes for item in items]
    if fmt.y_first:
        codes = [swapped(row) if item.kind in fmt.y_first else row for item, row in zip(items, codes, strict=True)]
    if clamp and isinstance(fmt.numbers, NumberRule):
        most = [fmt.numbers.largest(side) for side in frame.size]
        codes = [[min(code, most[place % 2]) for place, code in enumerate(row)] for row in codes]
    return codes


def _points(codes: Sequence[Sequence[int]], frame: Frame, fmt: CoordinateFormat) -> list[_Points | str]:
    """Return the points in the frame of each region, or what is wrong with its codes."""
    try:
        return list(fmt.numbers.to_points(codes, frame.size))
    except ValueError:
        pass
    result: list[_Points | str] = []
    for row in codes:
        try:
            result.append(fmt.numbers.to_points([row], frame.size)[0])
        except ValueError as error:
            result.append(str(error))
    return result


def _to_image(
    points: Sequence[_Points | None], frame: Frame, bound: tuple[float, float], clamp: bool
) -> list[_Points | None]:
    """Map points from the frame to the original image; those outside it are moved or become None.

    A place no further outside than `bound`, by which rounding moves a place in the frame, is one on the edge.
    """
    flat = [point for row in points if row is not None for point in row]
    mapped = frame.to_image(np.array(flat, dtype=np.float64).reshape(-1, 2))
    size = np.array(frame.image_size, dtype=np.float64)
    room = 1e-9 * size + [float(most / scale) for most, scale in zip(bound, frame.scale, strict=True)]
    outside: NDArray[np.bool_] = (mapped < -room) | (mapped > size + room)
    wrong = [x or y for x, y in outside.tolist()]
    pairs = list(map(tuple, np.clip(mapped, 0.0, size).tolist()))
    result: list[_Points | None] = []
    start = 0
    for row in points:
        end = start + len(row or ())
        result.append(None if row is None or (not clamp and any(wrong[start:end])) else pairs[start:end])
        start = end
    return result


def _disorder(points: _Points, codes: Sequence[int]) -> str:
    """Return which axis of a box runs backwards."""
    axis = 0 if points[1][0] < points[0][0] else 1
    low, high = (codes[axis], codes[2 + axis]) if len(codes) == 4 else (points[0][axis], points[1][axis])
    return f"{'xy'[axis]}2 ({high:g}) is less than {'xy'[axis]}1 ({low:g})"


def _of_image(
    text: str, items: Sequence[Found], size: tuple[int, int], fmt: CoordinateFormat, clamp: bool
) -> tuple[list[Region | DecodeError], bool]:
    """Return the regions of one image, each or what is wrong with it, and whether nothing is."""
    frame = frame_of(fmt, size)
    codes = _codes(items, frame, fmt, clamp)
    points = _points(codes, frame, fmt)
    reasons: dict[int, str] = {}
    for index, row in enumerate(points):
        if isinstance(row, str):
            reasons[index] = f"{_quoted(text, items[index])} holds {row}"
        elif items[index][3] == "box" and (row[1][0] < row[0][0] or row[1][1] < row[0][1]):
            reasons[index] = f"{_disorder(row, codes[index])} in {_quoted(text, items[index])}"
    places: list[Any] = list(points)
    if not frame.is_original:
        bound = fmt.numbers.error_bound(frame.size)
        places = _to_image([None if isinstance(row, str) else row for row in points], frame, bound, clamp)
    make = Region._unchecked
    result: list[Region | DecodeError] = []
    for index, (item, place) in enumerate(zip(items, places, strict=True)):
        start, _, _, kind, _, label, image, identity, times = item
        try:
            if index in reasons or place is None:
                outside = f"{_quoted(text, item)} holds a place outside the image of size {frame.image_size}"
                raise ValueError(reasons.setdefault(index, outside))
            if kind == "box" or kind == "point":
                result.append(make(kind, tuple(place), label, image, identity))
            else:  # with more to check
                result.append(Region(kind, tuple(place), label, None, image, identity, tuple(times)))
        except ValueError as error:
            reason = reasons.setdefault(index, f"{error} in {_quoted(text, item)}")
            result.append(DecodeError(start, reason))
    return result, not reasons


def resolve(
    text: str,
    found: Sequence[Found],
    errors: Sequence[DecodeError],
    sizes: Sequence[tuple[int, int]],
    fmt: CoordinateFormat,
    clamp: bool = False,
) -> tuple[Sequence[Found], Sequence[Region], list[DecodeError]]:
    """Turn codes into regions.

    Args:
        text: The text that was read, for messages.
        found: What the grammar found.
        errors: What the grammar could not read.
        sizes: The (width, height) of each image.
        fmt: The format.
        clamp: Whether codes out of range and places outside the image are moved inside.

    Returns:
        Those of `found` that are regions, the regions, and all errors in order of position.
    """
    made: list[Region | DecodeError | None] = [None] * len(found)
    for image, chosen in by_image(found).items():
        if image < len(sizes):
            whole = len(chosen) == len(found)
            items = found if whole else [found[index] for index in chosen]
            values, good = _of_image(text, items, sizes[image], fmt, clamp)
            if whole and good:
                return found, cast(list[Region], values), list(errors)
            for place, one in zip(chosen, values, strict=True):
                made[place] = one
    kept, regions, wrong = [], [], list(errors)
    for item, value in zip(found, made, strict=True):
        if isinstance(value, Region):
            kept.append(item)
            regions.append(value)
        else:
            reason = f"image {item.image} (counted from 0): image_size gives {len(sizes)}"
            wrong.append(value or DecodeError(item.start, reason))
    wrong.sort(key=lambda error: error.position)
    return kept, regions, wrong
