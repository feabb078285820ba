"""A grammar of zero-padded pairs, openPangu-VL's text: `(ddd,ddd)` for a point, `(ddd,ddd),(ddd,ddd)` for a box."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from ..json_values import NO_ATTRIBUTES
from ..validation import integer
from .base import QUOTE_LENGTH, Coded, DecodeError, Found, check_writable

__all__ = ["COMMAS", "JOIN", "PairGrammar", "pair_pattern"]

JOIN = ","
"""Text between the two pairs of a box."""

COMMAS = ",\uff0c\u3001\u060c"  # ASCII, full-width, ideographic, Arabic
_GAP = re.compile(rf"[\s{COMMAS}]*+")  # text between pairs that may be meant as one region
_BEGUN = re.compile(rf"\s*+[{COMMAS}][\s{COMMAS}]*+\Z")  # the end of a text where another pair should follow


@lru_cache(maxsize=32)
def pair_pattern(digits: int, separator: str) -> re.Pattern[str]:
    """Return a pattern of one pair or two joined pairs (four groups), or of a malformed or unfinished pair.

    Every open repetition is possessive, so that reading takes time linear in the length of the text.
    """
    number = rf"([0-9]{{{digits}}})"
    pair = rf"{number},{number}\)"
    begun = r"\s*+[-+]?+\d[\d.]*+\s*+"  # a malformed first number: "12", "-0.5"
    rest = rf"(?:(?!{re.escape(separator)})[\d\s.+\-{COMMAS}])*+[)\uff09]?+"
    # A pattern that begins with a set of characters is searched much faster than one that begins with choices.
    return re.compile(rf"[(\uff08](?:(?<=\(){pair}(?:{JOIN}\({pair})?|{begun}(?:[{COMMAS}]{rest}|\Z)|\s*+\Z)")


@dataclass(frozen=True)
class PairGrammar:
    """Regions as pairs of zero-padded numbers in parentheses, with the label before them.

    Malformed coordinates are errors: a parenthesis with a number and a comma, or with a number at the end of the text,
    that is not a pair (unpadded, signed, decimal, with spaces, or with digits, commas or parentheses other than
    ASCII); three or more joined pairs; pairs with only spaces, or a comma and spaces, between them, which could be a
    box or two points. A malformed region is rejected as a whole, at the position of its first parenthesis. A box that
    is cut off exactly after its first pair reads as a point.

    Args:
        digits: Digits of a code, zero-padded.
        label_open: Text before a label.
        label_close: Text between a label and its coordinates.
        separator: Text between two regions.

    Raises:
        ValueError: If a value is outside its range, or a text would make reading ambiguous.
    """

    digits: int = 3
    label_open: str = ""
    label_close: str = " "
    separator: str = "\n"

    def __post_init__(self) -> None:
        object.__setattr__(self, "digits", integer(self.digits, "digits"))
        if not 1 <= self.digits <= 9:
            raise ValueError(f"`digits` must be in 1..9, got {self.digits}.")
        for field in ("label_open", "label_close", "separator"):
            piece = getattr(self, field)
            if not isinstance(piece, str) or re.search(r"[()\uff08\uff09]", piece):
                raise ValueError(f"`{field}` must be a str without parentheses, got {piece!r}.")
        if self.separator in ("", JOIN):
            raise ValueError(f"`separator` must not be empty or {JOIN!r}, which joins a box, got {self.separator!r}.")
        for field in ("label_open", "label_close"):
            if self.separator in getattr(self, field):
                raise ValueError(
                    f"`separator` {self.separator!r} must not occur in `{field}`, got {getattr(self, field)!r}."
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return ("point", "box")

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]."""
        pair = f"(%0{self.digits}d,%0{self.digits}d)"
        texts = {2: pair, 4: pair + JOIN + pair}
        marks = [mark for mark in (self.label_open.strip(), self.label_close.strip()) if mark]
        pieces, kinds = [], self.kinds
        for region in regions:
            check_writable(region, kinds)
            label, text = region.label, texts[len(region.codes)] % tuple(region.codes)
            if label is not None:
                if any(mark in label for mark in marks):
                    raise ValueError(
                        f"Label {label!r} cannot be read back: it contains one of the label marks {marks}."
                    )
                text = self.label_open + label + self.label_close + text
            pieces.append(text)
        return self.separator.join(pieces)

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        found: list[Found] = []
        errors: list[DecodeError] = []
        separator, end = self.separator, 0
        run: list[re.Match[str]] = []  # consecutive matches without a separator in between
        before, base = "", 0  # the text before the run, and where it starts
        for match in pair_pattern(self.digits, separator).finditer(text):
            start, stop = match.span()
            gap = text[end:start]
            if run:
                if gap != separator and separator not in gap and _GAP.fullmatch(gap):
                    run.append(match)
                    end = stop
                    continue
                self._add_run(text, run, before, base, found, errors)
            run, before, base, end = [match], gap, end, stop
        if run:
            begun = _BEGUN.match(text, end) if len(run) == 1 and not run[0][3] else None  # a box has no further pair
            if run[0][1] is not None and begun and separator not in begun[0]:
                quoted = repr(text[run[0].start() : end][:QUOTE_LENGTH])
                reason = f"unfinished coordinates {quoted}: the text ends before another pair"
                errors.append(DecodeError(run[0].start(), reason))
            else:
                self._add_run(text, run, before, base, found, errors)
        return found, errors

    def _add_run(
        self,
        text: str,
        run: Sequence[re.Match[str]],
        before: str,
        base: int,
        found: list[Found],
        errors: list[DecodeError],
    ) -> None:
        """Add the region or the error of a run."""
        first = run[0]
        start, end = first.span()
        x1, y1, x2, y2 = first.groups()
        if len(run) > 1 or x1 is None:
            errors.append(DecodeError(start, self._reason(text, run)))
            return
        label, begin = (None, start) if before == self.separator or not before else self._label(before, base, start)
        codes = (int(x1), int(y1)) if x2 is None else (int(x1), int(y1), int(x2), int(y2))
        kind = "point" if x2 is None else "box"
        found.append(tuple.__new__(Found, (start, end, (begin, end), kind, codes, label, 0, None, (), NO_ATTRIBUTES)))

    def _label(self, gap: str, base: int, start: int) -> tuple[str | None, int]:
        """Return the label at the end of `gap`, the text from `base` to a region, and where it starts."""
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

    def _reason(self, text: str, run: Sequence[re.Match[str]]) -> str:
        """Return the reason why a run is not a region."""
        first, end = run[0], run[-1].end()
        quoted = repr(text[first.start() : min(end, first.start() + QUOTE_LENGTH)])
        if any(match[1] is None for match in run):
            closed = end < len(text) or text[-1] in ")\uff09"
            expected = f"'({'d' * self.digits},{'d' * self.digits})' with ASCII digits and no spaces"
            return f"{'malformed' if closed else 'unfinished'} coordinates {quoted}: expected {expected}"
        for before, after in pairwise(run):
            gap = text[before.end() : after.start()]
            if gap != JOIN:
                return f"{gap!r} between pairs in {quoted}: {JOIN!r} joins a box, {self.separator!r} separates regions"
        return f"more than two pairs in a row in {quoted}: a point has one, a box has two"
