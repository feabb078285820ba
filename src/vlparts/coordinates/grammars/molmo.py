"""Molmo's grammar, points in markup: `<point x="12.3" y="4.5" alt="a">a</point>`."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .base import QUOTE_LENGTH, Coded, DecodeError, Found, Grammar, check_writable

__all__ = ["MolmoGrammar", "attributes", "label_reason", "label_text", "lost_attributes", "outer_span", "scan_tags"]

# A tag ends at the next '<', so that each character is read a bounded number of times.
_TAG = re.compile(r'<(points|point|tracks)(?=[\s/>"]|\Z)((?:[^<>"]|"[^"<]*+")*+)(>?+)([^<]*+)((?:</\1>)?+)')
_CUT = re.compile(r"<(?:p(?:o(?:i(?:n(?:ts?)?)?)?)?|t(?:r(?:a(?:c(?:ks?)?)?)?)?)?\Z")
_ATTRIBUTE = re.compile(r'\s++([A-Za-z]++)([0-9]*+)\s*+=\s*+"([^"<]*+)"')
_REFERENCE = re.compile(r"&#(?:([0-9]++)|[xX]([0-9a-fA-F]++));?+")
_REFERENCE_DIGITS = 10  # of a character's number at most, with leading zeros
_NUMBER = re.compile(r"\s*+([0-9]{1,6})(?:\.([0-9]{1,9}))?\s*+")


def label_text(label: str | None, kind: str) -> str:
    """Return a label as text between tags, with `&`, `<`, `>` and quotes as entities."""
    if label == "":
        raise ValueError(f"The label of a {kind} must not be empty.")
    return html.escape(label or "", quote=True)


def label_reason(text: str) -> str | None:
    """Return the reason why the text between tags is not a label, or None: a reference that is not a character."""
    for match in _REFERENCE.finditer(text):
        digits = match[1] or match[2]
        if len(digits) <= _REFERENCE_DIGITS:
            number, value = int(digits, 10 if match[1] else 16), html.unescape(match[0])
            if value and (value != "\ufffd" or number == 0xFFFD):
                continue
        return f"malformed label: {match[0][:QUOTE_LENGTH]!r} is not a character"
    return None


def _tag_reason(tag: re.Match[str]) -> str | None:
    """Return the reason why a tag is malformed or unfinished, or None."""
    if not tag[3]:
        return "unfinished tag" if tag.end() == len(tag.string) else "malformed tag"
    if not tag[5]:
        rest = tag.string[tag.end() : tag.end() + len("</points>") + 1]
        cut = f"</{tag[1]}>".startswith(rest)
        return f"{'unfinished' if cut else 'malformed'} tag: no </{tag[1]}>"
    return None


def scan_tags(
    text: str, read_tag: Callable[[re.Match[str], list[Found]], str | None]
) -> tuple[list[Found], list[DecodeError]]:
    """Read all tags of a text.

    `read_tag` adds the regions of a tag to a list and returns None, or the reason why it has none.
    """
    found: list[Found] = []
    errors: list[DecodeError] = []
    end = 0
    for tag in _TAG.finditer(text):
        end = tag.end()
        reason = _tag_reason(tag) or read_tag(tag, found)
        if reason:
            errors.append(DecodeError(tag.start(), f"{reason} in {tag[0][:QUOTE_LENGTH]!r}"))
    tail = _CUT.search(text, max(end, len(text) - 8))
    if tail:
        errors.append(DecodeError(tail.start(), f"unfinished tag in {tail[0]!r}"))
    return found, errors


def attributes(tag: re.Match[str]) -> list[re.Match[str]] | None:
    """Return the attributes of a tag, or None if there is other text between them or one occurs twice."""
    found, position = [], tag.start(2)
    end = tag.end(2)
    while match := _ATTRIBUTE.match(tag.string, position, end):
        found.append(match)
        position = match.end()
    names = {match[1] + match[2] for match in found}
    is_valid = not tag.string[position:end].strip(" /\n\t") and len(names) == len(found)
    return found if is_valid else None


def lost_attributes(text: str, names: Sequence[str]) -> list[DecodeError]:
    """Return the attributes of tags that are neither in `names` nor an `alt` equal to the label."""
    errors = []
    for tag in _TAG.finditer(text):
        for match in attributes(tag) or []:
            is_label = "alt" in names and match[1] == "alt" and not match[2] and match[3] == tag[4]
            if not is_label and (match[1] == "alt" or match[1] not in names):
                reason = f"attribute {match[1] + match[2]!r} would be lost in {tag[0][:QUOTE_LENGTH]!r}"
                errors.append(DecodeError(match.start(1), reason))
    return errors


@dataclass(frozen=True, kw_only=True)
class MolmoGrammar:
    """`<point x="12.3" y="4.5" alt="a">a</point>`, or `<points x1= y1= x2= ...>` for several points with one label.

    Consecutive points with the same label make one tag. Points are written in the order given; Molmo's training data
    has them sorted by x, then y, after rounding. `&`, `<`, `>` and quotes in labels become entities, which are read
    back. Numbers with more decimals than the format has are rounded half up.

    Args:
        decimals: Number of decimals; a code of 123 with 1 decimal is written 12.3.
        separator: Text between tags.
    """

    decimals: int = 1
    separator: str = " "

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return ("point",)

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]."""
        for region in regions:
            check_writable(region, self.kinds)
        texts = []
        for label, run in groupby(regions, key=lambda region: region.label):
            pairs = [region.codes for region in run]
            name = label_text(label, "point")
            several = len(pairs) > 1
            coordinates = " ".join(
                f'x{index if several else ""}="{self._number(x)}" y{index if several else ""}="{self._number(y)}"'
                for index, (x, y) in enumerate(pairs, 1)
            )
            tag = "points" if several else "point"
            texts.append(f'<{tag} {coordinates} alt="{name}">{name}</{tag}>')
        return self.separator.join(texts)

    def _number(self, code: int) -> str:
        """Return a code with its decimals."""
        whole, part = divmod(code, 10**self.decimals)
        return f"{whole}.{part:0{self.decimals}d}"

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        return scan_tags(text, self._read_tag)

    def lost(self, text: str, target: Grammar) -> list[DecodeError]:
        """See [`ReportsLoss`]."""
        return lost_attributes(text, ("x", "y", "alt"))

    def _read_tag(self, tag: re.Match[str], found: list[Found]) -> str | None:
        """Add the points of a tag to `found`; returns the reason if it has none."""
        pairs = attributes(tag)
        if pairs is None:
            return "malformed attributes"
        values = [match for match in pairs if match[1] in ("x", "y")]
        numbers = ["" if tag[1] == "point" else str(index) for index in range(1, len(values) // 2 + 1)]
        expected = [(axis, number) for number in numbers for axis in "xy"]
        if tag[1] == "tracks" or not values or [(match[1], match[2]) for match in values] != expected:
            return "malformed tag: expected x and y (x1, y1, x2, ... in points)"
        codes = [self._code(match[3]) for match in values]
        if None in codes:
            return "malformed number"
        if reason := label_reason(tag[4]):
            return reason
        label = html.unescape(tag[4]) or None
        for index in range(0, len(values), 2):
            span = (values[index].start(1), values[index + 1].end())
            pair = [code for code in codes[index : index + 2] if code is not None]
            outer = outer_span(tag, span, index == 0, index + 2 == len(values))
            found.append(Found(*span, outer, "point", pair, label))
        return None

    def _code(self, text: str) -> int | None:
        """Return the code of a number, or None if it is malformed."""
        match = _NUMBER.fullmatch(text)
        if match is None:
            return None
        digits = (match[2] or "").ljust(self.decimals + 1, "0")
        return int(match[1] + digits[: self.decimals]) + (digits[self.decimals] >= "5")


def outer_span(tag: re.Match[str], span: tuple[int, int], first: bool, last: bool) -> tuple[int, int]:
    """Return the span of a region extended to the marks of its tag if it is the first or last in it."""
    return tag.start() if first else span[0], tag.end() if last else span[1]
