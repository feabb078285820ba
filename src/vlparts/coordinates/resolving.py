"""From the codes that a grammar found to regions in pixels and errors."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .formats.registry import CoordinateFormat
from .frames.maps import Frame
from .grammars.base import QUOTE_LENGTH, DecodeError, Found
from .quantization import NumberRule
from .regions import Region
from .validation import check_size, is_size

__all__ = ["CoordinateError", "by_image", "check_sizes", "frame_of", "position_error", "resolve", "swapped"]

_Points = Sequence[tuple[float, float]]


class CoordinateError(ValueError):
    """A region that cannot be written, or text that cannot be read.

    Args:
        message: What came and what was expected.
        position: Index into the text where reading failed; None if a region could not be written.
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position


def position_error(error: DecodeError) -> CoordinateError:
    """Return the exception of an error in a text."""
    return CoordinateError(f"Position {error.position}: {error.reason}.", error.position)


def check_sizes(image_size: object) -> list[tuple[int, int]]:
    """Return the (width, height) of each image, or raise CoordinateError."""
    try:
        if is_size(image_size):
            return [check_size(image_size)]
        if isinstance(image_size, (tuple, list, np.ndarray)) and len(image_size) and all(map(is_size, image_size)):
            return [check_size(size) for size in image_size]
    except ValueError as error:  # too large
        raise CoordinateError(str(error)) from None
    raise CoordinateError(
        f"`image_size` must be (width, height), two positive integers, or a sequence of these, got {image_size!r}."
    )


def frame_of(fmt: CoordinateFormat, size: tuple[int, int]) -> Frame:
    """Return the format's frame for an image; raises CoordinateError if it has none."""
    try:
        return fmt.frame(size)
    except ValueError as error:
        raise CoordinateError(f"Format {fmt.name!r} has no frame for image size {size}: {error}") from None


def swapped(codes: Sequence[int]) -> Sequence[int]:
    """Return the codes with the two of each pair exchanged."""
    return [code for pair in zip(codes[1::2], codes[::2], strict=True) for code in pair]


def by_image(items: Sequence[Region | Found]) -> dict[int, Sequence[int]]:
    """Return the indices of the items by image."""
    images = [item.image for item in items]
    if not any(images):
        return {0: range(len(items))} if items else {}
    result: dict[int, list[int]] = {}
    for index, image in enumerate(images):
        result.setdefault(image, []).append(index)
    return dict(result)


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
        text: The text that was read, for error messages.
        found: The regions that the grammar found.
        errors: The errors that the grammar found.
        sizes: (width, height) per image.
        fmt: The format.
        clamp: Whether to move codes out of range and points outside the image to the nearest valid ones.

    Returns:
        The items of `found` that are regions, the regions, and all errors in order of position.
    """
    results: list[Region | DecodeError | None] = [None] * len(found)
    for image, chosen in by_image(found).items():
        if image < len(sizes):
            single_image = len(chosen) == len(found)
            items = found if single_image else [found[index] for index in chosen]
            values, has_errors = _regions_of_image(text, items, sizes[image], fmt, clamp)
            if single_image and not has_errors:
                return found, cast(list[Region], values), list(errors)
            for index, value in zip(chosen, values, strict=True):
                results[index] = value
    kept, regions, all_errors = [], [], list(errors)
    for item, result in zip(found, results, strict=True):
        if isinstance(result, Region):
            kept.append(item)
            regions.append(result)
        else:
            reason = f"image {item.image} (counted from 0) does not exist: `image_size` has {len(sizes)}"
            all_errors.append(result or DecodeError(item.start, reason))
    all_errors.sort(key=lambda error: error.position)
    return kept, regions, all_errors


def _regions_of_image(
    text: str, items: Sequence[Found], size: tuple[int, int], fmt: CoordinateFormat, clamp: bool
) -> tuple[list[Region | DecodeError], bool]:
    """Return the region or error of each item of one image, and whether there is any error."""
    frame = frame_of(fmt, size)
    codes = _ordered_codes(items, frame, fmt, clamp)
    points = _frame_points(codes, frame, fmt)
    reasons: dict[int, str] = {}
    for index, row in enumerate(points):
        if isinstance(row, str):
            reasons[index] = f"{row} in {_quoted(text, items[index])}"
        elif items[index][3] == "box" and (row[1][0] < row[0][0] or row[1][1] < row[0][1]):
            reasons[index] = f"{_corner_order(row, codes[index])} in {_quoted(text, items[index])}"
    image_points: list[Any] = list(points)
    if not frame.is_original:
        bound = fmt.numbers.error_bound(frame.size)
        image_points = _image_points([None if isinstance(row, str) else row for row in points], frame, bound, clamp)
    make = Region._unchecked
    result: list[Region | DecodeError] = []
    for index, (item, row) in enumerate(zip(items, image_points, strict=True)):
        start, _, _, kind, _, label, image, identity, times, attributes = item
        if index not in reasons and row is not None:
            if kind == "box" or kind == "point":
                result.append(make(kind, tuple(row), label, image, identity, (), attributes))
                continue
            try:  # kinds with further rules, such as the number of points
                result.append(Region(kind, tuple(row), label, None, image, identity, tuple(times), attributes))
                continue
            except ValueError as error:
                reasons[index] = f"{_phrase(error)} in {_quoted(text, item)}"
        outside = f"a point outside the image of size {frame.image_size} in {_quoted(text, item)}"
        result.append(DecodeError(start, reasons.setdefault(index, outside)))
    return result, bool(reasons)


def _quoted(text: str, item: Found) -> str:
    return repr(text[item.start : min(item.end, item.start + QUOTE_LENGTH)])


def _phrase(error: ValueError) -> str:
    """Return an error message as part of a sentence: without its capital letter and final period."""
    message = str(error).removesuffix(".")
    return message[:1].lower() + message[1:]


def _ordered_codes(items: Sequence[Found], frame: Frame, fmt: CoordinateFormat, clamp: bool) -> list[Sequence[int]]:
    """Return the codes of regions in the order x, y; with `clamp`, within their range."""
    codes: list[Sequence[int]] = [item.codes for item in items]
    if fmt.y_first:
        codes = [swapped(row) if item.kind in fmt.y_first else row for item, row in zip(items, codes, strict=True)]
    if clamp and isinstance(fmt.numbers, NumberRule):
        largest = [fmt.numbers.largest(side) for side in frame.size]
        codes = [[min(code, largest[index % 2]) for index, code in enumerate(row)] for row in codes]
    return codes


def _frame_points(codes: Sequence[Sequence[int]], frame: Frame, fmt: CoordinateFormat) -> list[_Points | str]:
    """Return the points of each region in the frame, or the reason why its codes are invalid."""
    try:
        return list(fmt.numbers.to_points(codes, frame.size))
    except ValueError:
        pass
    result: list[_Points | str] = []
    for row in codes:
        try:
            result.append(fmt.numbers.to_points([row], frame.size)[0])
        except ValueError as error:
            result.append(_phrase(error))
    return result


def _image_points(
    points: Sequence[_Points | None], frame: Frame, bound: tuple[float, float], clamp: bool
) -> list[_Points | None]:
    """Map points from the frame to the original image. Regions with points outside it are clamped or become None.

    A point outside by no more than `bound`, the error of rounding in the frame, is on the edge.
    """
    flat = [point for row in points if row is not None for point in row]
    mapped = frame.to_image(np.array(flat, dtype=np.float64).reshape(-1, 2))
    size = np.array(frame.image_size, dtype=np.float64)
    tolerance = 1e-9 * size + [float(most / scale) for most, scale in zip(bound, frame.scale, strict=True)]
    outside: NDArray[np.bool_] = (mapped < -tolerance) | (mapped > size + tolerance)
    wrong = [x or y for x, y in outside.tolist()]
    pairs = list(map(tuple, np.clip(mapped, 0.0, size).tolist()))
    result: list[_Points | None] = []
    start = 0
    for row in points:
        end = start + len(row or ())
        result.append(None if row is None or (not clamp and any(wrong[start:end])) else pairs[start:end])
        start = end
    return result


def _corner_order(points: _Points, codes: Sequence[int]) -> str:
    """Return which corner coordinates of a box are out of order."""
    axis = 0 if points[1][0] < points[0][0] else 1
    low, high = (codes[axis], codes[2 + axis]) if len(codes) == 4 else (points[0][axis], points[1][axis])
    return f"{'xy'[axis]}2 ({high:g}) is less than {'xy'[axis]}1 ({low:g})"
