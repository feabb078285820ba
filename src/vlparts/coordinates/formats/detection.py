"""Detection of the format of a text: candidates with confidences."""

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..codec import ImageSizes
from ..grammars.base import Coded, DecodeError, Found
from ..resolving import CoordinateError, check_sizes, resolve
from .registry import FORMATS, CoordinateFormat

__all__ = ["Guess", "guess_format"]

_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?|[^\w\s]")
_SIDE = 10**9  # side in pixels if no size is given; no code of formats that count pixels is above it
_SAMPLE = 20  # regions that are written again
_REWRITTEN = 0.9  # factor if the format would write the numbers differently
_FURTHER = 0.5  # factor for each key of an object that the format does not name, if another format names more
_EXPONENT = 8  # a quality weighs as much as this power of it
_MIN_CONFIDENCE = 0.01


@dataclass(frozen=True)
class Guess:
    """A format that can read a text.

    Args:
        name: Name of the format.
        confidence: From 0 to 1; the sum over all guesses is at most 1. Formats that read the text equally well have
            the same confidence.
        regions: Number of regions that it reads.
        errors: Number of errors that it reports.
    """

    name: str
    confidence: float
    regions: int
    errors: int


def _read(
    text: str, fmt: CoordinateFormat, sizes: Sequence[tuple[int, int]] | None
) -> tuple[Sequence[Found], Sequence[DecodeError]]:
    """Return regions and errors; codes out of range are errors, and points outside the image if `sizes` is given."""
    found, errors = fmt.grammar.scan(text)
    if sizes is not None:
        kept, _, errors = resolve(text, found, errors, sizes, fmt)
        return kept, errors
    valid = []
    for item in found:
        try:
            (points,) = fmt.numbers.to_points([item.codes], (_SIDE, _SIDE))
        except ValueError as error:
            errors.append(DecodeError(item.start, str(error)))
            continue
        if item.kind == "box" and (points[1][0] < points[0][0] or points[1][1] < points[0][1]):
            errors.append(DecodeError(item.start, "corners out of order"))
        else:
            valid.append(item)
    return valid, errors


def _covered(text: str, tokens: Sequence[tuple[int, bool]], found: Sequence[Found]) -> float:
    """Return the share of the text's numbers inside the regions times the share of its marks, without labels."""
    starts = [start for start, _ in tokens]
    inside = [False] * len(tokens)
    for item in found:
        label = text.find(item.label, item.outer[0], item.outer[1]) if item.label else -1
        bounds = item.outer if label < 0 else (item.outer[0], label, label + len(item.label or ""), item.outer[1])
        for first, last in zip(bounds[::2], bounds[1::2], strict=True):
            for index in range(bisect.bisect_left(starts, first), bisect.bisect_left(starts, last)):
                inside[index] = True
    share = 1.0
    for wanted in (True, False):
        hits = [hit for hit, (_, number) in zip(inside, tokens, strict=True) if number == wanted]
        share *= sum(hits) / len(hits) if hits else 1.0
    return share


def _writes_same(text: str, fmt: CoordinateFormat, found: Sequence[Found]) -> bool:
    """Whether the format would write the same text of the numbers, ignoring spaces."""
    sample = found[:_SAMPLE]
    try:
        written = fmt.grammar.write([Coded(*item[3:]) for item in sample])
    except ValueError:
        return False
    dense = "".join(written.split())
    return all("".join(text[item.start : item.end].split()) in dense for item in sample)


def _quality(
    text: str, tokens: Sequence[tuple[int, bool]], fmt: CoordinateFormat, sizes: Sequence[tuple[int, int]] | None
) -> tuple[float, int, int, int]:
    """Return how well a format reads a text, from 0 to 1, and the numbers of regions, errors and further keys."""
    try:
        found, errors = _read(text, fmt, sizes)
    except CoordinateError:  # the format has no frame for an image of this size
        return 0.0, 0, 0, 0
    if not found:
        return 0.0, 0, len(errors), 0
    quality = _covered(text, tokens, found) * len(found) / (len(found) + len(errors))
    further = max(len(item.attributes) for item in found)
    return quality * (1.0 if _writes_same(text, fmt, found) else _REWRITTEN), len(found), len(errors), further


def guess_format(text: str, image_size: ImageSizes | None = None) -> list[Guess]:
    """Return the registered formats that can read a text, with confidences.

    The confidence of a format is higher the more of the text's numbers and marks its regions contain, the fewer errors
    it reports (including codes out of its range), if it would write the numbers the same way (padding, decimals), and
    the more keys of JSON objects it names. Many families share the same text and differ only in the frame or the
    meaning of the numbers; such formats have equal confidences.

    Args:
        text: A text with coordinates.
        image_size: (width, height) of the original image in pixels, or a sequence of them. If given, points outside
            the image count as errors.

    Returns:
        The formats that read at least one region, best first, those of equal confidence in order of their names; [] if
        there is none.

    Raises:
        CoordinateError: If `text` is not a str or `image_size` is invalid.
    """
    if not isinstance(text, str):
        raise CoordinateError(f"`text` must be a str, got {type(text).__name__}.")
    sizes = None if image_size is None else check_sizes(image_size)
    tokens = [(match.start(), match[0][0].isdigit()) for match in _TOKEN.finditer(text)]
    if not any(number for _, number in tokens):
        return []
    results = {name: _quality(text, tokens, fmt, sizes) for name, fmt in FORMATS.items()}
    best = max(quality for quality, *_ in results.values())
    least = min(further for quality, *_, further in results.values() if quality >= _REWRITTEN * best)
    results = {
        name: (quality * _FURTHER ** max(0, further - least), regions, errors, further)
        for name, (quality, regions, errors, further) in results.items()
    }
    whole = sum(quality**_EXPONENT for quality, *_ in results.values())
    guesses = [
        Guess(name, quality * quality**_EXPONENT / whole, regions, errors)
        for name, (quality, regions, errors, _) in results.items()
        if quality > 0.0
    ]
    kept = [guess for guess in guesses if guess.confidence >= _MIN_CONFIDENCE]
    return sorted(kept or guesses, key=lambda guess: (-round(guess.confidence, 9), guess.name))
