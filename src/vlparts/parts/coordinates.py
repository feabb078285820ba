"""Relative coordinates as zero-padded text: `(ddd,ddd)` for a point, `(ddd,ddd),(ddd,ddd)` for a box.

Regions go in and come out as float pixels of the original image (see `Region`). The numbers in the text are
relative to the image, so they survive a resize, and every coordinate costs the same number of tokens. The
form is that of openPangu-VL; what it leaves open is a parameter of `CoordinateFormat`. Model output is parsed
by a grammar in linear time and is never evaluated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .coordinate_formats import FORMATS, JOIN, PADDED, CoordinateFormat, dequantize, get_format, quantize
from .coordinate_grammar import DecodeError, pair_texts, read_pairs, scan
from .regions import KINDS, Region, box_iou, check_boxes

__all__ = [
    "FORMATS",
    "PADDED",
    "CoordinateError",
    "CoordinateFormat",
    "DecodeError",
    "DecodeResult",
    "Region",
    "box_iou",
    "decode",
    "decode_array",
    "dequantize",
    "encode",
    "encode_array",
    "quantize",
]

_KIND_OF = {count: kind for kind, count in KINDS.items()}


class CoordinateError(ValueError):
    """A region that cannot be written, or text that cannot be read.

    Args:
        message: What came and what was expected.
        position: Index into the text where reading failed; None where a region could not be written.
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position


@dataclass(frozen=True)
class DecodeResult:
    """What `decode` found, in the order of the text.

    Args:
        regions: The regions, in pixels of the original image.
        spans: For each region, start and end of its coordinates in the text, its label not included.
        errors: What could not be read; filled by `on_error="collect"` only.
    """

    regions: tuple[Region, ...]
    spans: tuple[tuple[int, int], ...]
    errors: tuple[DecodeError, ...] = ()


def _check_image_size(image_size: object) -> tuple[int, int]:
    """Return (width, height), or raise CoordinateError naming what came."""
    if isinstance(image_size, (tuple, list, np.ndarray)) and len(image_size) == 2:
        integers = [isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in image_size]
        if all(integers) and min(image_size) >= 1:
            return int(image_size[0]), int(image_size[1])
    raise CoordinateError(f"image_size must be (width, height), two positive integers, got {image_size!r}")


def _check_choice(value: object, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _policed(
    regions: Sequence[Region], image_size: tuple[int, int], on_outside: str
) -> tuple[list[Region], NDArray[np.float64]]:
    """Return the regions to write and their points `(k, 2)`, inside the image."""
    pairs = [point for region in regions for point in region.points]
    points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    owner = np.repeat(np.arange(len(regions)), [len(region.points) for region in regions])
    size = np.array(image_size, dtype=np.float64)
    outside = np.unique(owner[((points < 0) | (points > size)).any(axis=1)])
    if not len(outside):
        return list(regions), points
    if on_outside == "raise":
        index = int(outside[0])
        raise CoordinateError(
            f"regions[{index}] {regions[index].points} leaves the image of size {image_size}; "
            "on_outside='clamp' moves it to the edge, 'skip' leaves it out"
        )
    if on_outside == "clamp":
        return list(regions), np.clip(points, 0.0, size)
    dropped = set(outside.tolist())
    kept = [region for index, region in enumerate(regions) if index not in dropped]
    return kept, points[~np.isin(owner, outside)]


def _check_labels(text: str, regions: Sequence[Region], fmt: CoordinateFormat) -> None:
    """Raise CoordinateError unless reading `text` gives every label back."""
    found, _ = scan(text, fmt)
    marks = [mark for mark in (fmt.label_open.strip(), fmt.label_close.strip()) if mark]
    for index, region in enumerate(regions):
        got = found[index].label if index < len(found) else None
        if got != region.label or any(mark in (region.label or "") for mark in marks):
            raise CoordinateError(
                f"label {region.label!r} of a {region.kind} might be read back as {got!r}: a label must not "
                "be empty, nor begin or end with spaces, nor hold coordinates, the separator "
                f"{fmt.separator!r} or the format's text around labels"
            )


def encode(
    regions: Iterable[Region],
    image_size: tuple[int, int],
    format: CoordinateFormat | str | None = None,
    *,
    on_outside: str = "raise",
) -> str:
    """Write regions as text.

    Args:
        regions: Regions in pixels of the original image. Never changed.
        image_size: (width, height) of the original image in pixels.
        format: A format or its name; `PADDED` where None.
        on_outside: What to do with a region that leaves [0, width] x [0, height]: "raise"; "clamp" moves its
            points to the nearest edge (a box wholly outside becomes one of zero area); "skip" leaves the
            region out of the text, so that there are fewer regions in the text than were given.

    Returns:
        The regions in the order given, label first, with the format's separator between them; "" for none.

    Raises:
        CoordinateError: If a region leaves the image under "raise", if something is no Region, or if a label
            would not be read back as it is.
        ValueError: For an unknown format or policy.
    """
    fmt, size = get_format(format), _check_image_size(image_size)
    _check_choice(on_outside, "on_outside", ("raise", "clamp", "skip"))
    if not isinstance(regions, Iterable):
        raise CoordinateError(f"regions must be an iterable of Region, got {type(regions).__name__}")
    given = list(regions)
    for index, region in enumerate(given):
        # By attributes, not by class: checkpoints may carry their own copy of this file.
        if getattr(region, "kind", None) not in tuple(KINDS):
            raise CoordinateError(f"regions[{index}] must be a Region, got {type(region).__name__}")
    kept, points = _policed(given, size, on_outside)
    pairs = iter(pair_texts(quantize(points, size, fmt)[:, None], fmt))
    pieces = []
    for region in kept:
        label = "" if region.label is None else fmt.label_open + region.label + fmt.label_close
        pieces.append(label + JOIN.join(next(pairs) for _ in region.points))
    text = fmt.separator.join(pieces)
    if any(region.label is not None for region in kept):
        _check_labels(text, kept, fmt)
    return text


def encode_array(
    boxes: ArrayLike, image_size: tuple[int, int], format: CoordinateFormat | str | None = None
) -> list[str]:
    """Write many boxes without labels, one text each; the fast form of `encode`.

    Args:
        boxes: `(n, 4)` x1, y1, x2, y2 in pixels of the original image. Never written to.
        image_size: (width, height) of the original image in pixels.
        format: A format or its name; `PADDED` where None.

    Returns:
        n texts, each equal to `encode([Region.box(*box)], image_size, format)`.

    Raises:
        ValueError: If `boxes` is not `(n, 4)`, or a box is not finite, not in order, or leaves the image (to
            clamp, use `numpy.clip` first).
    """
    fmt, size = get_format(format), _check_image_size(image_size)
    return pair_texts(quantize(check_boxes(boxes, "boxes").reshape(-1, 2, 2), size, fmt), fmt)


def decode(
    text: str,
    image_size: tuple[int, int],
    format: CoordinateFormat | str | None = None,
    *,
    on_error: str = "raise",
) -> DecodeResult:
    """Read the regions in a text, such as a model's answer.

    Text around coordinates is no error: what stands before them, back to the last separator or the region
    before, is the label. An error is what was meant as coordinates and is not in the format: a parenthesis
    with a number and a comma, or with a number and the end of the text, that is no pair (unpadded, signed,
    decimal, with spaces, in digits, commas or parentheses other than ASCII's); a box with x2 < x1 or y2 < y1;
    three or more joined pairs; pairs with only spaces, or a comma and spaces, between them, which could be a
    box or two points. A broken region is rejected whole, at the position of its first parenthesis. A box that
    was cut exactly after its first pair cannot be told from a point.

    Args:
        text: Any text.
        image_size: (width, height) of the original image in pixels.
        format: A format or its name; `PADDED` where None.
        on_error: "raise" stops at the first error, "skip" leaves errors out, "collect" lists them in the
            result.

    Returns:
        Regions in pixels of the original image, in the order of the text, with their spans, and the errors.

    Raises:
        CoordinateError: With `.position`, at the first error under "raise"; also if `text` is no str.
        ValueError: For an unknown format or policy.
    """
    fmt, size = get_format(format), _check_image_size(image_size)
    _check_choice(on_error, "on_error", ("raise", "skip", "collect"))
    if not isinstance(text, str):
        raise CoordinateError(f"text must be a str, got {type(text).__name__}")
    found, errors = scan(text, fmt)
    if errors and on_error == "raise":
        raise CoordinateError(f"position {errors[0].position}: {errors[0].reason}", errors[0].position)
    codes = np.array([int(code) for item in found for code in item.codes], dtype=np.int64).reshape(-1, 2)
    points = iter(dequantize(codes, size, fmt).tolist())
    regions = []
    for item in found:
        count = len(item.codes) // 2
        regions.append(Region(_KIND_OF[count], tuple(tuple(next(points)) for _ in range(count)), item.label))
    spans = tuple((item.start, item.end) for item in found)
    return DecodeResult(tuple(regions), spans, tuple(errors) if on_error == "collect" else ())


def decode_array(
    texts: Sequence[str], image_size: tuple[int, int], format: CoordinateFormat | str | None = None
) -> NDArray[np.float64]:
    """Read many texts that each hold one box and nothing else; the inverse of `encode_array`.

    Args:
        texts: n texts such as "(012,345),(678,901)".
        image_size: (width, height) of the original image in pixels.
        format: A format or its name; `PADDED` where None.

    Returns:
        float64 `(n, 4)` x1, y1, x2, y2 in pixels of the original image.

    Raises:
        CoordinateError: Naming the first text that is not exactly one box in order.
        ValueError: For an unknown format.
    """
    fmt, size = get_format(format), _check_image_size(image_size)
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise CoordinateError("texts must be a sequence of str, one box each")
    codes = read_pairs(texts, 2, fmt)
    if isinstance(codes, int):
        raise CoordinateError(f"texts[{codes}] must be one box and nothing else, got {texts[codes][:60]!r}")
    ordered = (codes[:, 1] >= codes[:, 0]).all(axis=1)
    if not ordered.all():
        index = int(np.argmin(ordered))
        raise CoordinateError(f"texts[{index}] must have x1 <= x2 and y1 <= y2, got {texts[index]!r}")
    return dequantize(codes, size, fmt).reshape(-1, 4)
