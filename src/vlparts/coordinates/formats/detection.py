"""Which format a text may be in: the candidates with a confidence each, never one picked silently."""

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..codec import ImageSizes
from ..grammars.base import Coded, DecodeError, Found
from ..resolving import CoordinateError, check_sizes, resolve
from . import published as table  # noqa: F401  (registers the formats)
from .registry import FORMATS, CoordinateFormat

__all__ = ["Guess", "guess_format"]

_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?|[^\w\s]")
_SIDE = 10**9  # pixels of a side where no size is given: every code of formats that count pixels fits
_SAMPLE = 20  # regions that are written again
_UNFAITHFUL = 0.9  # factor where numbers would be written in another way
_SHARP = 8  # how much a better reading outweighs a worse one
_LEAST = 0.01


@dataclass(frozen=True)
class Guess:
    """A format that reads a text.

    Args:
        name: Name of the format.
        confidence: From 0 to 1; those of all guesses sum to 1 at most. Formats that read the text equally have the
            same.
        regions: How many regions it reads.
        errors: How many errors it reports.
    """

    name: str
    confidence: float
    regions: int
    errors: int


def _read(
    text: str, fmt: CoordinateFormat, sizes: Sequence[tuple[int, int]] | None
) -> tuple[Sequence[Found], Sequence[DecodeError]]:
    """What is read in a format, with codes in their range (and places in the image, where its size is known)."""
    found, errors = fmt.grammar.scan(text)
    if sizes is not None:
        kept, _, wrong = resolve(text, found, errors, sizes, fmt)
        return kept, wrong
    good = []
    for item in found:
        try:
            (points,) = fmt.numbers.to_points([item.codes], (_SIDE, _SIDE))
        except ValueError as error:
            errors.append(DecodeError(item.start, str(error)))
            continue
        if item.kind == "box" and (points[1][0] < points[0][0] or points[1][1] < points[0][1]):
            errors.append(DecodeError(item.start, "corners out of order"))
        else:
            good.append(item)
    return good, errors


def _covered(text: str, tokens: Sequence[tuple[int, bool]], found: Sequence[Found]) -> float:
    """The share of numbers, times the share of marks, that stand in what was read, labels not included."""
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


def _faithful(text: str, fmt: CoordinateFormat, found: Sequence[Found]) -> bool:
    """Whether the format would write the numbers as they stand, spaces left aside."""
    sample = found[:_SAMPLE]
    try:
        written = fmt.grammar.write([Coded(*item[3:]) for item in sample])
    except ValueError:
        return False
    dense = "".join(written.split())
    return all("".join(text[item.start : item.end].split()) in dense for item in sample)


def _quality(
    text: str, tokens: Sequence[tuple[int, bool]], fmt: CoordinateFormat, sizes: Sequence[tuple[int, int]] | None
) -> tuple[float, int, int]:
    """How well a format reads a text, from 0 to 1, and how many regions and errors there are."""
    try:
        found, errors = _read(text, fmt, sizes)
    except CoordinateError:  # no frame for an image of this size
        return 0.0, 0, 0
    if not found:
        return 0.0, 0, len(errors)
    quality = _covered(text, tokens, found) * len(found) / (len(found) + len(errors))
    return quality * (1.0 if _faithful(text, fmt, found) else _UNFAITHFUL), len(found), len(errors)


def guess_format(text: str, image_size: ImageSizes | None = None) -> list[Guess]:
    """Say in which of the registered formats a text may be.

    A format counts for more the more of the text's numbers and marks its regions explain, the fewer errors it reports
    (codes out of its range are some), and where it would write the numbers as they stand (padding, decimals). Many
    families share a text form, and only the frame or the meaning of the numbers differs: such formats come as ties.

    Args:
        text: A text with coordinates.
        image_size: (width, height) of the original image in pixels, or a sequence of them; where it is known, places
            outside the image count as errors.

    Returns:
        The formats that read at least one region, best first, those of equal confidence in order of their names; none
        where nothing fits.

    Raises:
        CoordinateError: If `text` is no str or `image_size` no size.
    """
    if not isinstance(text, str):
        raise CoordinateError(f"text must be a str, got {type(text).__name__}")
    sizes = None if image_size is None else check_sizes(image_size)
    tokens = [(match.start(), match[0][0].isdigit()) for match in _TOKEN.finditer(text)]
    if not any(number for _, number in tokens):
        return []
    read = {name: _quality(text, tokens, fmt, sizes) for name, fmt in FORMATS.items()}
    whole = sum(quality**_SHARP for quality, _, _ in read.values())
    guesses = [
        Guess(name, quality * quality**_SHARP / whole, regions, errors)
        for name, (quality, regions, errors) in read.items()
        if quality > 0.0
    ]
    kept = [guess for guess in guesses if guess.confidence >= _LEAST]
    return sorted(kept or guesses, key=lambda guess: (-round(guess.confidence, 9), guess.name))
