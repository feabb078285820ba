"""Formats of zero-padded pairs, openPangu-VL's among them, and a fast decoder of their boxes."""

import dataclasses
import re
from functools import lru_cache

import numpy as np

from ..grammars.openpangu import COMMAS, JOIN, PairGrammar, pair_pattern
from ..quantization import NumberRule
from ..regions import Region
from ..validation import integer
from .published_common import DATE, LABEL_BEFORE, LINE_BREAK, NEAREST
from .registry import DEFAULT, CoordinateFormat, register_format

__all__ = ["PADDED", "padded_format", "read_plain_boxes"]


def padded_format(
    name: str = "custom",
    levels: int = 1000,
    digits: int = 3,
    denominator: int = 999,
    rounding: str = "round",
    label_open: str = "",
    label_close: str = " ",
    separator: str = "\n",
) -> CoordinateFormat:
    """Make a format of zero-padded pairs.

    openPangu-VL publishes that its numbers are relative, 000 to 999, zero-padded; its tokenizer shows the pair
    `(ddd,ddd)`. Not published, and therefore parameters: whether 999 is the far edge (denominator 999, the default) or
    the last of a thousand bins (`denominator=1000, rounding="bins"`), how a label is written, and the text between
    regions.

    Args:
        name: Name of the format.
        levels: Number of codes; they run from 0 to `levels - 1`.
        digits: Digits of a code, zero-padded.
        denominator: The number of the full side of the image.
        rounding: See [`NumberRule`].
        label_open: Text before a label.
        label_close: Text between a label and its coordinates.
        separator: Text between two regions.

    Returns:
        The format, not registered.

    Raises:
        ValueError: If a value is outside its range, or a text would make reading ambiguous.
    """
    grammar = PairGrammar(digits, label_open, label_close, separator)
    levels = integer(levels, "levels")
    if not 2 <= levels <= 10**grammar.digits:
        raise ValueError(f"`levels` must be in 2..{10**grammar.digits} for {grammar.digits} digits, got {levels}.")
    numbers = NumberRule(denominator=integer(denominator, "denominator"), levels=levels, rounding=rounding)
    return CoordinateFormat(name=name, numbers=numbers, grammar=grammar)


PADDED = register_format(
    dataclasses.replace(
        padded_format(DEFAULT),
        source="openPangu-VL design card: relative coordinates 000-999, zero-padded; tokenizer: (ddd,ddd)",
        date=DATE,
        assumed=(
            "denominator: 999 is the far edge",
            NEAREST,
            "frame: relative to the original image",
            LABEL_BEFORE,
            LINE_BREAK,
        ),
    )
)
"""Three digits, zero-padded, 999 at the far edge: the default."""


_GROUPS = 4  # groups of a match: the numbers of a box
_DELIMITER = "\0"  # joins gaps; if the text contains it, the grammar reads the text


@lru_cache(maxsize=32)
def _patterns(grammar: PairGrammar) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return a pattern of regions, malformed ones too, and one of gaps that do not separate regions."""
    gap = rf"(?:(?!{re.escape(grammar.separator)})[\s{COMMAS}])*+"
    return pair_pattern(grammar.digits, grammar.separator), re.compile(rf"(?:\A|{_DELIMITER}){gap}(?:{_DELIMITER}|\Z)")


def read_plain_boxes(
    text: str, image_size: tuple[int, int], format: CoordinateFormat
) -> tuple[tuple[Region, ...], tuple[tuple[int, int], ...]] | None:
    """Return the regions and spans of a text that contains only valid boxes, in half the time of the grammar.

    Args:
        text: Any text.
        image_size: (width, height) of the original image in pixels.
        format: Any format.

    Returns:
        The same regions and spans as the grammar's, or None if the grammar must read the text: for other formats and
        frames, points, marks around labels, malformed coordinates, a code out of range or corners out of order.
    """
    grammar, numbers = format.grammar, format.numbers
    if not isinstance(grammar, PairGrammar) or not isinstance(numbers, NumberRule) or format.y_first:
        return None
    if grammar.label_open or grammar.label_close.strip() or not format.frame(image_size).is_original:
        return None
    split, no_separator = _patterns(grammar)
    pieces = split.split(text)
    gaps, columns = pieces[:: _GROUPS + 1], [pieces[place :: _GROUPS + 1] for place in range(1, _GROUPS + 1)]
    count = len(columns[0])
    if not count or None in columns[0] or None in columns[2]:
        return None
    if count > 1 and no_separator.search(_DELIMITER.join(gaps[1:-1])):
        return None
    powers = 10 ** np.arange(grammar.digits - 1, -1, -1, dtype=np.int64)
    digits = np.frombuffer("".join([number for column in columns for number in column]).encode(), np.uint8) - ord("0")
    codes = (digits.reshape(_GROUPS, count, grammar.digits) @ powers).T
    if codes.max() > numbers.largest(1) or (codes[:, 2:] < codes[:, :2]).any():
        return None
    x1, y1, x2, y2 = numbers.dequantize(codes, np.array([*image_size, *image_size], dtype=np.float64)).T.tolist()
    width = len(JOIN) + 2 * (3 + 2 * grammar.digits)
    lengths = np.fromiter(map(len, gaps), np.int64, count + 1)[:-1]
    starts = np.cumsum(lengths + width) - width
    separator, size = grammar.separator, len(grammar.separator)
    labels = [
        gap[at + size if (at := gap.rfind(separator)) >= 0 else 0 :].strip() or None if gap != separator else None
        for gap in gaps[:-1]
    ]
    corners = zip(zip(x1, y1, strict=True), zip(x2, y2, strict=True), strict=True)
    return tuple(Region._unchecked_boxes(corners, labels)), tuple(
        zip(starts.tolist(), (starts + width).tolist(), strict=True)
    )
