"""Reading texts that hold nothing but sound boxes in padded pairs, all of them at once."""

import re
from functools import lru_cache

import numpy as np

from .formats import CoordinateFormat
from .numbers import NumberRule
from .padded import COMMAS, JOIN, PairGrammar, pair_pattern
from .regions import Region

__all__ = ["read_plain_boxes"]

_GROUPS = 4  # of a match: the numbers of a box
_MARK = "\0"  # what gaps are joined with; one that is in the text only makes the quick way be left


@lru_cache(maxsize=32)
def _patterns(grammar: PairGrammar) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What splits a text at its regions, broken ones too; and what finds a gap that would not part two regions."""
    gap = rf"(?:(?!{re.escape(grammar.separator)})[\s{COMMAS}])*+"
    return pair_pattern(grammar.digits, grammar.separator), re.compile(rf"(?:\A|{_MARK}){gap}(?:{_MARK}|\Z)")


def read_plain_boxes(
    text: str, image_size: tuple[int, int], format: CoordinateFormat
) -> tuple[tuple[Region, ...], tuple[tuple[int, int], ...]] | None:
    """Regions and spans of a text, as the format's grammar reads it, in half of its time.

    Args:
        text: Any text.
        image_size: (width, height) of the original image in pixels.
        format: Any format.

    Returns:
        None wherever the grammar has to look closer: other formats and frames, points, marks around labels, anything
        broken, a code out of range or a box that runs backwards.
    """
    grammar, numbers = format.grammar, format.numbers
    if not isinstance(grammar, PairGrammar) or not isinstance(numbers, NumberRule) or format.y_first:
        return None
    if grammar.label_open or grammar.label_close.strip() or not format.frame(image_size).is_original:
        return None
    split, unparted = _patterns(grammar)
    pieces = split.split(text)
    gaps, columns = pieces[:: _GROUPS + 1], [pieces[place :: _GROUPS + 1] for place in range(1, _GROUPS + 1)]
    count = len(columns[0])
    if not count or None in columns[0] or None in columns[2]:
        return None
    if count > 1 and unparted.search(_MARK.join(gaps[1:-1])):
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
    places = zip(zip(x1, y1, strict=True), zip(x2, y2, strict=True), strict=True)
    return tuple(Region._unchecked_boxes(places, labels)), tuple(
        zip(starts.tolist(), (starts + width).tolist(), strict=True)
    )
