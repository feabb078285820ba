"""Regions as text and back: `encode` writes and `decode` reads any format."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .formats.openpangu import read_plain_boxes
from .formats.registry import CoordinateFormat, get_format
from .grammars.base import Coded, DecodeError, Found
from .grammars.openpangu import PairGrammar
from .json_values import NO_ATTRIBUTES, as_attributes
from .regions import Region
from .resolving import CoordinateError, by_image, check_sizes, frame_of, position_error, resolve, swapped
from .suspicion import find_suspicions, warn_of_suspicions
from .thinking import without_thinking
from .validation import check_choice

__all__ = ["CoordinateError", "DecodeResult", "ImageSizes", "decode", "encode"]

ImageSizes = tuple[int, int] | Sequence[tuple[int, int]]
# As in `vlparts.parts.thinking`, whose room imports transformers; a test holds both to the same rules.


@dataclass(frozen=True)
class DecodeResult:
    """The result of `decode`, in the order of the text.

    Args:
        regions: The regions, in pixels of the original image.
        spans: Per region, start and end of its coordinates in the text, without its label.
        errors: What cannot be read, and suspicions ([`Suspicion`]); only with `on_error="collect"`.
    """

    regions: tuple[Region, ...]
    spans: tuple[tuple[int, int], ...]
    errors: tuple[DecodeError, ...] = ()


def encode(
    regions: Iterable[Region],
    image_size: ImageSizes,
    format: CoordinateFormat | str | None = None,
    *,
    on_outside: str = "raise",
    on_attributes: str = "raise",
) -> str:
    """Write regions as text.

    Args:
        regions: Regions in pixels of the original image. Never modified.
        image_size: (width, height) of the original image in pixels, or a sequence of them for several images; a
            region's `image` is the index of its own.
        format: A format or its name; None for openPangu's.
        on_outside: What to do with a region that leaves [0, width] x [0, height], or what the format's frame shows of
            it: "raise"; "clamp" moves its points to the nearest edge (a box entirely outside becomes one of zero
            area); "skip" omits the region, so the text has fewer regions than were given.
        on_attributes: What to do with attributes that the format has no place for, which is any in a format that is
            not JSON: "raise", or "omit", which writes no attributes at all, in no format.

    Returns:
        The regions in the order given, with the format's labels, marks and separators.

    Raises:
        CoordinateError: If a region leaves the image under "raise", is not a Region or has a kind that the format
            does not have, if a label or another attribute cannot be read back, or if the format has no frame for an
            image of this size.
        ValueError: If the format, `on_outside` or `on_attributes` is unknown.
    """
    fmt, sizes = get_format(format), check_sizes(image_size)
    check_choice(on_outside, "on_outside", ("raise", "clamp", "skip"))
    check_choice(on_attributes, "on_attributes", ("raise", "omit"))
    given = _check_regions(regions, fmt, len(sizes))
    coded = _coded(given, sizes, fmt, on_outside)
    if on_attributes == "omit":
        coded = [region._replace(attributes=NO_ATTRIBUTES) for region in coded]
    try:
        text = fmt.grammar.write(coded)
    except ValueError as error:
        raise CoordinateError(str(error)) from None
    if not isinstance(fmt.grammar, PairGrammar) or any(region.label is not None for region in coded):
        _check_read_back(text, coded, fmt)
    return text


def decode(
    text: str,
    image_size: ImageSizes,
    format: CoordinateFormat | str | None = None,
    *,
    on_error: str = "raise",
    on_outside: str = "error",
    skip_thinking: bool = False,
) -> DecodeResult:
    """Read the regions in a text, such as the output of a model.

    Text around coordinates is not an error. These are: coordinates that are malformed or unfinished (each grammar
    defines them), a code out of range, a box with x2 < x1 or y2 < y1, and a point outside the image, such as in the
    padding around it. A region with an error is rejected as a whole.

    Args:
        text: Any text.
        image_size: (width, height) of the original image in pixels, or a sequence of them for several images.
        format: A format or its name; None for openPangu's.
        on_error: "raise" stops at the first error, and warns of suspicions (`CoordinateWarning`) if there is none;
            "skip" omits both; "collect" lists both in the result.
        on_outside: What to do with a code out of range or a point outside the image: "error", or "clamp", which
            moves it to the nearest valid one.
        skip_thinking: Whether to read only the answer, without reasoning between `<think>` and `</think>` or
            openPangu's `[unused16]` and `[unused17]`, by the rules of `split_thinking`: blocks do not nest, text
            before a first `</think>` is reasoning, and so is all text after a `<think>` that is never closed. A block
            separates the text around it like a line break. Spans and positions still refer to the whole text.

    Returns:
        Regions in pixels of the original image, in the order of the text, with their spans, and the errors.

    Raises:
        CoordinateError: With `.position`, at the first error under "raise"; also if `text` is not a str, or the
            format has no frame for an image of this size.
        ValueError: If the format, `on_error` or `on_outside` is unknown.
    """
    fmt, sizes = get_format(format), check_sizes(image_size)
    check_choice(on_error, "on_error", ("raise", "skip", "collect"))
    check_choice(on_outside, "on_outside", ("error", "clamp"))
    if not isinstance(text, str):
        raise CoordinateError(f"`text` must be a str, got {type(text).__name__}.")
    text = without_thinking(text) if skip_thinking else text
    with _gc_paused():
        if len(sizes) == 1 and (plain := read_plain_boxes(text, sizes[0], fmt)) is not None:
            return DecodeResult(*plain)
        found, malformed = fmt.grammar.scan(text)
        kept, regions, errors = resolve(text, found, malformed, sizes, fmt, on_outside == "clamp")
    if errors and on_error == "raise":
        raise position_error(errors[0])
    if on_error != "skip":
        suspicions = find_suspicions(text, found, malformed, sizes, fmt)
        errors = sorted([*errors, *suspicions], key=lambda error: error.position) if suspicions else errors
        if on_error == "raise":
            warn_of_suspicions(suspicions, 2)
    spans = tuple([item[:2] for item in kept])
    return DecodeResult(tuple(regions), spans, tuple(errors) if on_error == "collect" else ())


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Disable cyclic garbage collection, whose passes over all objects slow down the creation of many regions."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_regions(regions: object, fmt: CoordinateFormat, images: int) -> list[Region]:
    """Return the regions as a list, after checking their kinds and image indices."""
    if not isinstance(regions, Iterable):
        raise CoordinateError(f"`regions` must be an iterable of Region, got {type(regions).__name__}.")
    given = list(regions)
    kinds = frozenset(fmt.grammar.kinds)
    for index, region in enumerate(given):
        if not isinstance(region, Region):
            raise CoordinateError(f"`regions[{index}]` must be a Region, got {type(region).__name__}.")
        if region.kind not in kinds:
            raise CoordinateError(
                f"`regions[{index}]` is a {region.kind}, which format {fmt.name!r} cannot write; it writes "
                f"{', '.join(fmt.kinds)}."
            )
        if region.image >= images:
            raise CoordinateError(
                f"`regions[{index}]` is in image {region.image} (counted from 0), but `image_size` has {images}."
            )
    return given


def _outside(points: NDArray[np.float64], counts: Sequence[int], size: tuple[int, int]) -> NDArray[np.intp]:
    """Return the indices of the regions, with `counts` points each, that leave an image of this size."""
    wrong = ((points < 0) | (points > size)).any(axis=1)
    owner = np.repeat(np.arange(len(counts)), counts)
    return np.unique(owner[wrong]) if wrong.any() else np.zeros(0, dtype=np.intp)


def _codes(
    chosen: Sequence[int], regions: Sequence[Region], size: tuple[int, int], fmt: CoordinateFormat, on_outside: str
) -> list[Sequence[int] | None]:
    """Return the codes of the regions of one image, None for those that are skipped."""
    counts = [len(regions[index].points) for index in chosen]
    flat = [point for index in chosen for point in regions[index].points]
    points = np.array(flat, dtype=np.float64).reshape(-1, 2)
    skipped: set[int] = set()
    outside = _outside(points, counts, size)
    if len(outside):
        if on_outside == "raise":
            index = chosen[int(outside[0])]
            raise CoordinateError(
                f"`regions[{index}]` {regions[index].points} leaves the image of size {size}; "
                "on_outside='clamp' moves it to the edge, 'skip' omits it."
            )
        skipped = set(outside.tolist()) if on_outside == "skip" else skipped
        points = np.clip(points, 0.0, size)
    frame = frame_of(fmt, size)
    if not frame.is_original:
        points = frame.to_frame(points)
        tolerance = 1e-9 * max(frame.size)  # rounding errors of the map
        near = (points > -tolerance) & (points < np.add(frame.size, tolerance))
        lost = _outside(np.where(near, 0.0, points), counts, frame.size)
        if len(lost) and on_outside == "raise":
            index = chosen[int(lost[0])]
            raise CoordinateError(
                f"`regions[{index}]` {regions[index].points} is outside the frame of format {fmt.name!r}; "
                "on_outside='clamp' moves it to the edge, 'skip' omits it."
            )
        skipped |= set(lost.tolist()) if on_outside == "skip" else set()
        points = np.clip(points, 0.0, frame.size)
    codes: list[Sequence[int] | None] = list(fmt.numbers.to_codes(points, counts, frame.size))
    for position in skipped:
        codes[position] = None
    for position, index in enumerate(chosen):
        values = codes[position]
        if fmt.y_first and values is not None and regions[index].kind in fmt.y_first:
            codes[position] = swapped(values)
    return codes


def _coded(
    regions: Sequence[Region], sizes: Sequence[tuple[int, int]], fmt: CoordinateFormat, on_outside: str
) -> list[Coded]:
    """Return the regions to write, with their codes."""
    codes: list[Sequence[int] | None] = [None] * len(regions)
    for image, chosen in by_image(regions).items():
        for index, values in zip(chosen, _codes(chosen, regions, sizes[image], fmt, on_outside), strict=True):
            codes[index] = values
    return [
        Coded(
            region.kind,
            values,
            region.label,
            region.image,
            region.identity,
            region.times,
            as_attributes(region.attributes),
        )
        for region, values in zip(regions, codes, strict=True)
        if values is not None
    ]


def _check_read_back(text: str, coded: Sequence[Coded], fmt: CoordinateFormat) -> None:
    """Raise CoordinateError unless reading `text` returns every region."""
    found: Sequence[Found | None]
    found, errors = fmt.grammar.scan(text)
    for index, region in enumerate(coded):
        got = found[index] if index < len(found) else None
        if got is None and region.label is None and errors:
            raise CoordinateError(f"A {region.kind} would not be read back: {errors[0].reason}.")
        if got is None or got.label != region.label:
            raise CoordinateError(
                f"Label {region.label!r} of a {region.kind} would be read back as {got and got.label!r}: a label must "
                "not be empty, begin or end with spaces, or contain coordinates, the separator "
                f"{fmt.separator!r} or the format's label marks."
            )
        same_identity = region.identity is None or got.identity == region.identity
        same_times = len(got.times) == len(region.times)
        same_place = (got.kind, got.image, list(got.codes)) == (region.kind, region.image, list(region.codes))
        if not (same_identity and same_times and same_place):
            raise CoordinateError(
                f"A {region.kind} would be read back differently in format {fmt.name!r}: {region} as {got}."
            )
        if got.attributes.texts != region.attributes.texts:
            names = [*region.attributes, *got.attributes]
            name = next(name for name in names if got.attributes.texts.get(name) != region.attributes.texts.get(name))
            raise CoordinateError(f"Attribute {name!r} of a {region.kind} would not be read back.")
    if errors:
        raise CoordinateError(f"The text with its labels would be read back with an error: {errors[0].reason}.")
    if len(found) > len(coded):
        raise CoordinateError(
            f"The text of {len(coded)} regions would be read back as {len(found)} regions in format {fmt.name!r}."
        )
