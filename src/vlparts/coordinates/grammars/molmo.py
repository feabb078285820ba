"""A grammar of points in markup: Molmo's `<point x="12.3" y="4.5" alt="a">a</point>`."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .base import Coded, DecodeError, Found

__all__ = ["MolmoGrammar"]

# The tags end at the next '<', so that each character is looked at a bounded number of times.
_TAG = re.compile(r'<(points|point|tracks)(?=[\s/>"]|\Z)((?:[^<>"]|"[^"<]*+")*+)(>?+)([^<]*+)((?:</\1>)?+)')
_CUT = re.compile(r"<(?:p(?:o(?:i(?:n(?:ts?)?)?)?)?|t(?:r(?:a(?:c(?:ks?)?)?)?)?)?\Z")
_ATTRIBUTE = re.compile(r'\s++([A-Za-z]++)([0-9]*+)\s*+=\s*+"([^"<]*+)"')
_NUMBER = re.compile(r"\s*+([0-9]{1,6})(?:\.([0-9]{1,9}))?\s*+")


def label_text(label: str | None, what: str) -> str:
    """A label as text between tags: `&`, `<`, `>` and quotes as entities."""
    if label == "":
        raise ValueError(f"the label of a {what} must not be empty")
    return html.escape(label or "", quote=True)


def _wrong(tag: re.Match[str]) -> str | None:
    """Why a tag as a whole cannot be read, or None."""
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
    """Read each tag of a text."""
    found: list[Found] = []
    errors: list[DecodeError] = []
    end = 0
    for tag in _TAG.finditer(text):
        end = tag.end()
        reason = _wrong(tag) or read_tag(tag, found)
        if reason:
            errors.append(DecodeError(tag.start(), f"{reason} in {tag[0][:40]!r}"))
    tail = _CUT.search(text, max(end, len(text) - 8))
    if tail:
        errors.append(DecodeError(tail.start(), f"unfinished tag in {tail[0]!r}"))
    return found, errors


def attributes(tag: re.Match[str]) -> list[re.Match[str]] | None:
    """The attributes of a tag, or None where something else stands between them or one stands twice."""
    found, position = [], tag.start(2)
    end = tag.end(2)
    while match := _ATTRIBUTE.match(tag.string, position, end):
        found.append(match)
        position = match.end()
    whole = not tag.string[position:end].strip(" /\n\t") and len({match[1] + match[2] for match in found}) == len(
        found
    )
    return found if whole else None


@dataclass(frozen=True, kw_only=True)
class MolmoGrammar:
    """`<point x="12.3" y="4.5" alt="a">a</point>`, and `<points x1= y1= x2= ...>` for several of one label.

    Points in a row with the same label make one tag. Molmo was trained on points in the order of their x, then y,
    after rounding; they are written in the order given. `&`, `<`, `>` and quotes in labels become entities, which are
    read back. Numbers with more decimals than the format has are rounded half up.

    Args:
        decimals: Decimals of a number; a code of 123 with 1 decimal is written 12.3.
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
            if region.kind != "point" or region.image or region.identity is not None or len(region.times):
                raise ValueError("the format writes points of one image, without identities and times")
        texts = []
        for label, run in groupby(regions, key=lambda region: region.label):
            pairs = [region.codes for region in run]
            name = label_text(label, "point")
            several = len(pairs) > 1
            places = " ".join(
                f'x{index if several else ""}="{self._number(x)}" y{index if several else ""}="{self._number(y)}"'
                for index, (x, y) in enumerate(pairs, 1)
            )
            tag = "points" if several else "point"
            texts.append(f'<{tag} {places} alt="{name}">{name}</{tag}>')
        return self.separator.join(texts)

    def _number(self, code: int) -> str:
        """A code with its decimals."""
        whole, part = divmod(code, 10**self.decimals)
        return f"{whole}.{part:0{self.decimals}d}"

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        return scan_tags(text, self._read_tag)

    def _read_tag(self, tag: re.Match[str], found: list[Found]) -> str | None:
        """Add the points of a tag; return why it has none."""
        pairs = attributes(tag)
        if pairs is None:
            return "malformed attributes"
        places = [match for match in pairs if match[1] in ("x", "y")]
        numbers = ["" if tag[1] == "point" else str(index) for index in range(1, len(places) // 2 + 1)]
        expected = [(axis, number) for number in numbers for axis in "xy"]
        if tag[1] == "tracks" or not places or [(match[1], match[2]) for match in places] != expected:
            return "malformed tag: expected x and y (x1, y1, x2, ... in points)"
        codes = [self._code(match[3]) for match in places]
        if None in codes:
            return "malformed number"
        label = html.unescape(tag[4]) or None
        for index in range(0, len(places), 2):
            span = (places[index].start(1), places[index + 1].end())
            pair = [code for code in codes[index : index + 2] if code is not None]
            found.append(
                Found(*span, outer_span(tag, span, index == 0, index + 2 == len(places)), "point", pair, label)
            )
        return None

    def _code(self, text: str) -> int | None:
        """The code of a number."""
        match = _NUMBER.fullmatch(text)
        if match is None:
            return None
        digits = (match[2] or "").ljust(self.decimals + 1, "0")
        return int(match[1] + digits[: self.decimals]) + (digits[self.decimals] >= "5")


def outer_span(tag: re.Match[str], span: tuple[int, int], first: bool, last: bool) -> tuple[int, int]:
    """The span of a point with the marks of the tag, for the first and the last in it."""
    return tag.start() if first else span[0], tag.end() if last else span[1]
