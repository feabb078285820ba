"""Zero-padded pairs, `(ddd,ddd)` for a point and `(ddd,ddd),(ddd,ddd)` for a box: the form of openPangu-VL.

Reading texts that hold nothing but sound boxes in padded pairs, all of them at once.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ..formats.registry import DEFAULT, CoordinateFormat, register_format
from ..quantization import NumberRule, integer
from ..regions import Region
from .base import Coded, DecodeError, Found

__all__ = ["JOIN", "PADDED", "PairGrammar", "padded_format", "read_plain_boxes"]


JOIN = ","
"""Text between the pairs of one region."""

COMMAS = ",\uff0c\u3001\u060c"  # ASCII, full-width, ideographic, Arabic
_GAP = re.compile(rf"[\s{COMMAS}]*+")  # what may stand between pairs that were meant as one region
_BEGUN = re.compile(rf"\s*+[{COMMAS}][\s{COMMAS}]*+\Z")  # a text that ends where another pair should follow
_QUOTED = 40  # characters of the text that a message quotes at most


@lru_cache(maxsize=32)
def pair_pattern(digits: int, separator: str) -> re.Pattern[str]:
    """One pair or two joined ones (four groups), or else the beginning of something that was meant as one.

    Every open repetition is possessive, so that reading is linear in the length of the text.
    """
    number = rf"([0-9]{{{digits}}})"
    pair = rf"{number},{number}\)"
    begun = r"\s*+[-+]?+\d[\d.]*+\s*+"
    rest = rf"(?:(?!{re.escape(separator)})[\d\s.+\-{COMMAS}])*+[)\uff09]?+"
    # A pattern that begins with a set of characters is searched for much faster than one that begins with choices.
    return re.compile(rf"[(\uff08](?:(?<=\(){pair}(?:{JOIN}\({pair})?|{begun}(?:[{COMMAS}]{rest}|\Z)|\s*+\Z)")


@dataclass(frozen=True)
class PairGrammar:
    """Regions as pairs of zero-padded numbers in parentheses, a label before them.

    What was meant as coordinates and is not in the format is an error: a parenthesis with a number and a comma, or
    with a number and the end of the text, that is no pair (unpadded, signed, decimal, with spaces, in digits, commas
    or parentheses other than ASCII's); three or more joined pairs; pairs with only spaces, or a comma and spaces,
    between them, which could be a box or two points. A broken region is rejected whole, at the position of its first
    parenthesis. A box that was cut exactly after its first pair cannot be told from a point.

    Args:
        digits: Digits of a code, zero-padded.
        label_open: Text before a label.
        label_close: Text between a label and its coordinates.
        separator: Text between two regions.

    Raises:
        ValueError: For a value outside its range, or a piece of text that would make reading ambiguous.
    """

    digits: int = 3
    label_open: str = ""
    label_close: str = " "
    separator: str = "\n"

    def __post_init__(self) -> None:
        object.__setattr__(self, "digits", integer(self.digits, "digits"))
        if not 1 <= self.digits <= 9:
            raise ValueError(f"digits must lie in 1..9, got {self.digits}")
        for field in ("label_open", "label_close", "separator"):
            piece = getattr(self, field)
            if not isinstance(piece, str) or re.search(r"[()\uff08\uff09]", piece):
                raise ValueError(f"{field} must be a str without parentheses, got {piece!r}")
        if self.separator in ("", JOIN):
            raise ValueError(f"separator must not be empty nor {JOIN!r}, which joins a box; got {self.separator!r}")
        for field in ("label_open", "label_close"):
            if self.separator in getattr(self, field):
                raise ValueError(f"separator {self.separator!r} must not occur in {field} {getattr(self, field)!r}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return ("point", "box")

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]."""
        pair = f"(%0{self.digits}d,%0{self.digits}d)"
        texts = {2: pair, 4: pair + JOIN + pair}
        marks = [mark for mark in (self.label_open.strip(), self.label_close.strip()) if mark]
        pieces = []
        for kind, codes, label, image, identity, times in regions:
            if image or identity is not None or len(times) or kind not in ("point", "box"):
                raise ValueError("the format writes points and boxes of one image, without identities")
            text = texts[len(codes)] % tuple(codes)
            if label is not None:
                if any(mark in label for mark in marks):
                    raise ValueError(f"label {label!r} might be read back as another: it holds one of {marks}")
                text = self.label_open + label + self.label_close + text
            pieces.append(text)
        return self.separator.join(pieces)

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        found: list[Found] = []
        errors: list[DecodeError] = []
        separator, end = self.separator, 0
        run: list[re.Match[str]] = []  # what stands together, with nothing in between that parts regions
        before, base = "", 0  # the text before the run, and where it starts
        for match in pair_pattern(self.digits, separator).finditer(text):
            start, stop = match.span()
            gap = text[end:start]
            if run:
                if gap != separator and separator not in gap and _GAP.fullmatch(gap):
                    run.append(match)
                    end = stop
                    continue
                self._close(text, run, before, base, found, errors)
            run, before, base, end = [match], gap, end, stop
        if run:
            begun = _BEGUN.match(text, end) if len(run) == 1 and not run[0][3] else None  # a box takes no further pair
            if run[0][1] is not None and begun and separator not in begun[0]:
                quoted = repr(text[run[0].start() : end][:_QUOTED])
                reason = f"unfinished coordinates {quoted} at the end of the text: another pair was begun"
                errors.append(DecodeError(run[0].start(), reason))
            else:
                self._close(text, run, before, base, found, errors)
        return found, errors

    def _close(
        self,
        text: str,
        run: Sequence[re.Match[str]],
        before: str,
        base: int,
        found: list[Found],
        errors: list[DecodeError],
    ) -> None:
        """Add what a run is, a region or an error."""
        first = run[0]
        start, end = first.span()
        x1, y1, x2, y2 = first.groups()
        if len(run) > 1 or x1 is None:
            errors.append(DecodeError(start, self._fault(text, run)))
            return
        label, begin = (None, start) if before == self.separator or not before else self._label(before, base, start)
        codes = (int(x1), int(y1)) if x2 is None else (int(x1), int(y1), int(x2), int(y2))
        kind = "point" if x2 is None else "box"
        found.append(tuple.__new__(Found, (start, end, (begin, end), kind, codes, label, 0, None, ())))

    def _label(self, gap: str, base: int, start: int) -> tuple[str | None, int]:
        """Return the label that ends the text between a region and what stands before it, and where it begins."""
        at = gap.rfind(self.separator)
        from_ = 0 if at < 0 else at + len(self.separator)
        text = gap[from_:].rstrip()
        opening, closing = self.label_open.strip(), self.label_close.strip()
        if not text.endswith(closing):
            return None, start
        text = text.removesuffix(closing)
        if opening:
            at = text.rfind(opening)
            if at < 0:
                return None, start
            label = text[at + len(opening) :].strip()
        else:
            label = text.strip()
            at = len(text) - len(text.lstrip())
        return (label, base + from_ + at) if label else (None, start)

    def _fault(self, text: str, run: Sequence[re.Match[str]]) -> str:
        """Return why a run is no region."""
        first, end = run[0], run[-1].end()
        quoted = repr(text[first.start() : min(end, first.start() + _QUOTED)])
        if any(match[1] is None for match in run):
            closed = end < len(text) or text[-1] in ")\uff09"
            wanted = f"'({'d' * self.digits},{'d' * self.digits})' with ASCII digits and no spaces"
            return f"{'malformed' if closed else 'unfinished'} coordinates {quoted}: expected {wanted}"
        for before, after in pairwise(run):
            gap = text[before.end() : after.start()]
            if gap != JOIN:
                return f"{gap!r} between pairs in {quoted}: {JOIN!r} joins a box, {self.separator!r} parts regions"
        return f"more than two pairs in a row in {quoted}: a point has one, a box has two"


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
    `(ddd,ddd)`. Not published, and therefore parameters here: whether 999 stands for the far edge (denominator 999,
    the default) or for the last of a thousand bins (`denominator=1000, rounding="bins"`), how a label is written, and
    what stands between regions.

    Args:
        name: Name of the format.
        levels: Number of codes; they run from 0 to `levels - 1`.
        digits: Digits of a code, zero-padded.
        denominator: The number that stands for the full side of the image.
        rounding: As of [`NumberRule`].
        label_open: Text before a label.
        label_close: Text between a label and its coordinates.
        separator: Text between two regions.

    Returns:
        The format; it is not registered.

    Raises:
        ValueError: For a value outside its range, or a piece of text that would make reading ambiguous.
    """
    grammar = PairGrammar(digits, label_open, label_close, separator)
    levels = integer(levels, "levels")
    if not 2 <= levels <= 10**grammar.digits:
        raise ValueError(f"levels must lie in 2..{10**grammar.digits} for {grammar.digits} digits, got {levels}")
    numbers = NumberRule(denominator=integer(denominator, "denominator"), levels=levels, rounding=rounding)
    return CoordinateFormat(name=name, numbers=numbers, grammar=grammar)


PADDED = register_format(
    dataclasses.replace(
        padded_format(DEFAULT),
        source="openPangu-VL design card: relative coordinates 000-999, zero-padded; tokenizer: (ddd,ddd)",
        date="2026-11-22",
        assumed=(
            "denominator: 999 stands for the far edge",
            "rounding: nearest",
            "frame: relative to the original image",
            "label: before the coordinates and a space",
            "separator: line break",
        ),
    )
)
"""Three digits, zero-padded, 999 at the far edge: the default."""


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
