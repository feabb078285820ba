"""Text that looks like coordinates of a format but is not a region of it, such as numbers whose marks are missing.

A tokenizer that decodes with `skip_special_tokens=True` removes the marks of many formats, and models write other keys
and brackets than they should. A grammar reads what remains as prose. What is reported here is derived from the text
that the format writes, so it works for any grammar.
"""

import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .formats.registry import CoordinateFormat
from .grammars.base import QUOTE_LENGTH, Coded, DecodeError, Found, Grammar, Suspicion
from .grammars.openpangu import PairGrammar
from .grammars.tagged import TaggedGrammar
from .grammars.tagged_reading import empty_groups
from .regions import KINDS
from .resolving import CoordinateError, resolve

__all__ = ["CoordinateWarning", "can_be_suspicious", "find_suspicions", "warn_of_suspicions"]

_CODES = (123, 234, 345, 456, 567, 678, 789, 891)  # written to see what is around numbers
_WITH_SIDES = (123, 234, 123 + 345, 234 + 456)  # a box whose width and height are written instead
_COVERED = 1000  # characters after an error in which nothing further is reported
_NEAR = 8  # places with no more characters between them, none of them a letter or digit, are one place
_REGION = "\0"  # in place of a region
_NUMBER = r"([0-9]{1,9}+(?:\.[0-9]{1,9}+)?+)"
_SPACE = r"\s{0,3}+"
_QUOTE = r"(?:\\?[\"'`]|[\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb\uff02]|&(?:quot|\#34|\#39);)?+"
_DIGIT = re.compile("[0-9]")  # in every layout, and outside of regions in few texts
_TAG = re.compile(r"</?[^<>\s\"=]+>")
_KEY = re.compile(r"([A-Za-z_]\w*)[\"']?\s*([:=])[\s\"'\d.]*([\[(]*)\Z")  # of a JSON member or an attribute


class CoordinateWarning(UserWarning):
    """Text that looks like coordinates of a format but is not a region of it."""


@dataclass(frozen=True)
class _Layout:
    """How a format writes one kind of region.

    Args:
        pieces: The text before, between and after the numbers.
        pattern: Matches such numbers without the marks around them; each number is a group.
        least_digits: How many digits the numbers must have together: other text has lists of small numbers too. Chosen
            so that fewer than one in a hundred paragraphs with numbers is reported.
    """

    pieces: tuple[str, ...]
    pattern: re.Pattern[str]
    least_digits: int


_Place = tuple[int, int, Sequence[str], _Layout | None]  # start, end, numbers and their layout; none for a mark


@dataclass(frozen=True)
class _Signs:
    """What looks like coordinates of a grammar: its layouts, and a pattern of marks that only regions have."""

    layouts: tuple[_Layout, ...]
    marks: re.Pattern[str] | None


def can_be_suspicious(fmt: CoordinateFormat) -> bool:
    """Whether text can look like coordinates of a format and be neither a region nor an error.

    It cannot in formats of zero-padded pairs: a number in their only mark, a parenthesis, is a region or an error.
    """
    return not isinstance(fmt.grammar, PairGrammar)


def find_suspicions(
    text: str,
    found: Sequence[Found],
    errors: Sequence[DecodeError],
    sizes: Sequence[tuple[int, int]],
    fmt: CoordinateFormat,
) -> list[Suspicion]:
    """Return the places of a text that look like coordinates of a format but are neither a region nor an error.

    These are numbers in the format's layout, without its marks or with other keys and brackets, that would be a region
    of an image between its marks; and marks that only regions have. Takes time linear in the length of the text.

    Args:
        text: The text.
        found: What the grammar found in it.
        errors: The errors of the grammar.
        sizes: (width, height) per image.
        fmt: The format.
    """
    if not can_be_suspicious(fmt):
        return []
    try:
        signs = _signs(fmt.grammar)  # type: ignore[arg-type]
    except TypeError:  # a grammar without a hash
        signs = _signs.__wrapped__(fmt.grammar)
    spans = [item.outer for item in found]
    if isinstance(fmt.grammar, TaggedGrammar):
        spans += empty_groups(fmt.grammar, text)
    rest, starts, offsets = _between_regions(text, spans)
    places: list[_Place] = []
    if signs.marks:
        places += (match.span() + ((), None) for match in signs.marks.finditer(rest))
    for layout in signs.layouts if _DIGIT.search(rest) else ():
        places += (match.span() + (match.groups(), layout) for match in layout.pattern.finditer(rest))
    places.sort(key=lambda place: (place[0], -place[1]))
    positions = sorted(position for position, _ in errors)
    result: list[Suspicion] = []
    last = -_NEAR - 1
    for start, end, numbers, matched in places:
        gap = bisect_right(starts, start) - 1
        start, end = start + offsets[gap], end + offsets[gap]
        error = bisect_left(positions, end) - 1  # the last one that is not after this place
        if error >= 0 and positions[error] >= max(starts[gap] + offsets[gap], start - _COVERED):
            continue
        if matched is not None and not _would_be_region(numbers, matched, sizes, fmt):
            continue
        if start - last > _NEAR or any(map(str.isalnum, text[last:start])):
            quoted = repr(text[start : min(end, start + QUOTE_LENGTH)])
            reason = f"{quoted} looks like coordinates of format {fmt.name!r} but is not a region of it"
            result.append(Suspicion(start, reason))
        last = max(last, end)
    return result


def _between_regions(text: str, spans: Sequence[tuple[int, int]]) -> tuple[str, list[int], list[int]]:
    """Return the text between regions, joined by `_REGION`, and per piece its start there and the offset in `text`."""
    pieces, starts, offsets = [], [], []
    end = length = 0
    for first, last in [*sorted(spans), (len(text), len(text))]:
        if first > end or last == len(text):
            pieces.append(text[end:first])
            starts.append(length)
            offsets.append(end - length)
            length += max(first - end, 0) + len(_REGION)
        end = max(end, last)
    return _REGION.join(pieces), starts, offsets


def warn_of_suspicions(suspicions: Sequence[DecodeError], stacklevel: int) -> None:
    """Issue a `CoordinateWarning` if there are any; `stacklevel` is that of the caller's caller."""
    if suspicions:
        position, reason = suspicions[0]
        further = f" ({len(suspicions) - 1} further)" if len(suspicions) > 1 else ""
        advice = "its marks may have been removed by skip_special_tokens=True"
        warnings.warn(f"Position {position}: {reason}{further}; {advice}.", CoordinateWarning, stacklevel + 1)


def _would_be_region(
    numbers: Sequence[str], layout: _Layout, sizes: Sequence[tuple[int, int]], fmt: CoordinateFormat
) -> bool:
    """Whether numbers have enough digits, and are a region between the marks of the format."""
    if sum(map(len, numbers)) < layout.least_digits:
        return False
    text = "".join(piece + number for piece, number in zip(layout.pieces, (*numbers, ""), strict=True))
    found, errors = fmt.grammar.scan(text)
    if len(found) != 1 or errors:
        return False
    try:
        return any(resolve(text, found, [], [size], fmt)[1] for size in sizes)
    except CoordinateError:  # no frame for an image of this size
        return False


# The layouts and marks of a grammar.


@lru_cache(maxsize=128)
def _signs(grammar: Grammar) -> _Signs:
    """Return what looks like coordinates of a grammar."""
    layouts: list[_Layout] = []
    marks: dict[str, None] = {}
    for kind in grammar.kinds:
        pieces = _written(grammar, kind)
        if pieces is None:
            continue
        tags = _TAG.findall(pieces[0]) + _TAG.findall(pieces[-1])
        marks |= dict.fromkeys(re.escape(tag) for tag in tags if not re.search("[0-9]", tag))
        key = _KEY.search(_TAG.sub("", pieces[0]))
        if key and key[3]:  # "bbox_2d: [12"
            begun = rf"{_SPACE}[:=]{_SPACE}[\[({{]{_SPACE}{_QUOTE}[-+]?+[0-9]"
            name = re.escape(key[1])  # first in the pattern, which is then searched for as a plain text
            marks[rf"{name}(?<!\w{name}){_QUOTE}{begun}"] = None
        layouts.append(_layout(pieces, key))
    return _Signs(tuple(layouts), re.compile("|".join(marks)) if marks else None)


def _written(grammar: Grammar, kind: str) -> tuple[str, ...] | None:
    """Return the text that a grammar writes around the numbers of a region; None if it does not write them."""
    count = 2 * KINDS[kind][0]
    for codes in (_CODES[:count], _WITH_SIDES) if kind == "box" else (_CODES[:count],):
        try:
            text = grammar.write([Coded(kind, codes, times=(0.5,) if kind == "track" else ())])
        except ValueError:  # such as a kind that needs a label
            return None
        pieces = _split(text, count)
        if pieces is not None:
            return pieces
    return None


def _split(text: str, count: int) -> tuple[str, ...] | None:
    """Return the text before, between and after the numbers of `_CODES`, or None if it does not contain them."""
    pieces, position = [], 0
    for code in _CODES[:count]:
        match = re.compile(r"[0.]*" + r"\.?".join(str(code)) + r"(?![0-9])").search(text, position)
        if match is None:
            return None
        pieces.append(text[position : match.start()])
        position = match.end()
    return (*pieces, text[position:])


def _layout(pieces: tuple[str, ...], key: re.Match[str] | None) -> _Layout:
    """Return the layout of a kind of region.

    The numbers of a point, and those with a key each, must have their name. Others need one bracket on either side;
    without brackets, no other number may be beside them, and a point must be alone in its line or between quotes.
    """
    opening = re.search(r"[\[(<]?\Z", _TAG.sub("", pieces[0]).strip())
    closing = re.match(r"[\])>]?", _TAG.sub("", pieces[-1]).strip())
    is_point = len(pieces) == 3
    before = after = ""
    count = len(pieces) - 1
    least_digits = 2 * count + 1 if is_point else 2 * count - 1
    if key and (is_point or not key[3]):
        before = rf"(?<![A-Za-z]){_loose_name(key[1])}{_QUOTE}{_SPACE}{key[2]}{_SPACE}{_QUOTE}"
        before += r"(?:[0-9.]{1,9}+ ){0,2}+" if re.search(r"\d \Z", pieces[0]) else ""  # coords="1 1 123 234"
        least_digits = 0
    if opening and closing and opening[0]:
        before, after = before + re.escape(opening[0]) + _SPACE, _SPACE + re.escape(closing[0])
    elif not before and is_point:
        before, after = r"(?<![^\n\"'A-Za-z>\0])", r"(?=[\n\"'A-Za-z<\0]|\Z)"
        least_digits = 2 * count
    elif not before:
        before, after = r"(?<![0-9][.,:/ +-])(?<![0-9.,:/+-])", r"(?![.,:/+-]?[0-9]|[, ] ?[0-9])"
        least_digits = 2 * count + 1
    inner = "".join(_between(piece) + _NUMBER for piece in pieces[1:-1])
    return _Layout(pieces, re.compile(before + _NUMBER + inner + after), least_digits)


def _loose_name(name: str) -> str:
    """Matches a name of coordinates and its variants: "x_min" and "xmin"; "point", "point_2d" and "points"."""
    letters = re.findall(r"[A-Za-z]+", re.sub(r"_?\d.*", "", name)) or [re.escape(name)]
    return "_?+".join(f"(?i:{part})" for part in letters) + r"\w{0,4}+"


def _between(piece: str) -> str:
    """Matches the text between two numbers, with optional spaces around punctuation, and any or no quotes."""
    parts = []
    for part in re.findall(r"[A-Za-z_]\w*|\s+|[\"']|[^\w\s]", piece):
        if part.isspace():
            parts.append(_SPACE if re.match(r"\W*[^\w\s\"']", piece) else r"[ \t]{1,3}+")
        elif part in "\"'":
            parts.append(_QUOTE)
        elif part[0].isalpha() or part[0] == "_":
            parts.append(_loose_name(part))
        else:
            parts.append(_SPACE + re.escape(part) + _SPACE)
    pattern = "".join(parts)
    while _SPACE * 2 in pattern:
        pattern = pattern.replace(_SPACE * 2, _SPACE)
    return pattern
