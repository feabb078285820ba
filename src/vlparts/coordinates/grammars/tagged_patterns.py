r"""The regular expressions of tagged grammars.

The examples in this file are of two grammars. In the first, a box is `<box>(1,2),(3,4)</box>`:
`Shape("box", "({},{})", ",", "<box>", "</box>")`. In the second, a group is
`<det>[[1, 2, 3, 4], [5, 6, 7, 8]]</det>`:
`Shape("box", "{}, {}", ", ", "[", "]")` with `group_open="<det>["`, `group_join=", "` and `group_close="]</det>"`.

Matching takes time linear in the length of the text: every open repetition is possessive, so it never backtracks, and
what an attempt reads before it fails is bounded by a constant times what the next match consumes.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..regions import KINDS
from .tagged_fields import Shape, TaggedFields

__all__ = ["Patterns", "RegionGroups", "compiled"]

_SPACE = r"\s*+"
_WIDE = {"(": "\uff08", ")": "\uff09", "[": "\uff3b\u3010", "<": "\uff1c", ">": "\uff1e"}  # full-width variants
_COMMAS = ",;\uff0c\u3001\u060c\uff1b"
_CLOSERS = r")\]\uff09\uff3d\u3011"
_PIECES = re.compile(r"<[^<>]*>?|\w+|\s+|[^\w\s]")  # "<box>", "click", " ", "("
_NOT_FINITE = r"(?i:nan|inf(?:inity)?)\b"  # "NaN", "inf"


class RegionGroups(NamedTuple):
    """The groups of a pattern that belong to a region.

    Attributes:
        kind: Kind of the region.
        coordinates: Group of its coordinates.
        numbers: Groups of its numbers; () if their count is open.
        further: Group of the further regions of its group; 0 if there is none.
        starts_match: Whether the coordinates begin with the match, whose first character is before all groups.
    """

    kind: str
    coordinates: int
    numbers: tuple[int, ...]
    further: int
    starts_match: bool


@dataclass(frozen=True)
class Patterns:
    """The compiled patterns of a grammar.

    Args:
        region: Matches a whole group of regions, or text that is meant as a region but malformed or unfinished.
        kinds: The groups of `region`, by the index of the last group that the match closed. A match without groups is
            malformed or unfinished; one with another last group says that there is no region.
        further: Matches one region within a group.
        further_kinds: As `kinds`, for `further`.
        number: Matches a number.
        tags: The tags that begin a region, such as "<box>".
        expected: Per shape, the mark that shows that a region is meant, and an example of the expected text:
            ("<box>", "<box>(n,n),(n,n)</box>").
    """

    region: re.Pattern[str]
    kinds: dict[int, RegionGroups]
    further: re.Pattern[str]
    further_kinds: dict[int, RegionGroups]
    number: re.Pattern[str]
    tags: tuple[str, ...]
    expected: tuple[tuple[str, str], ...]


@lru_cache(maxsize=128)
def compiled(grammar: TaggedFields) -> Patterns:
    """Compile the patterns of a grammar."""
    readings = grammar.readings()
    regions = [_region(fields, shape) for fields in readings for shape in grammar.shapes]
    regions += [_empty(fields) for fields in readings if grammar.empty]
    malformed = dict.fromkeys(_malformed(grammar, shape) for shape in grammar.shapes)  # shapes may share their marks
    return Patterns(
        region=re.compile(f"{_first_character(grammar)}(?:{'|'.join([*regions, *malformed])})"),
        kinds=_groups_by_last(grammar, len(readings), has_further=_has_further(grammar)),
        further=re.compile("|".join(f"({_further_region(grammar, shape)})" for shape in grammar.shapes)),
        further_kinds=_groups_by_last(grammar, 1, has_further=False),
        number=re.compile(_number(grammar)),
        tags=tuple(mark for mark, is_tag in (_mark(grammar, shape) for shape in grammar.shapes) if is_tag),
        expected=tuple(_expected(grammar, shape) for shape in grammar.shapes),
    )


# The parts of a region.


def _number(grammar: TaggedFields) -> str:
    """Matches one number: "12", "012" with `digits=3`, "0.123" with `decimals=3`."""
    if grammar.decimals:
        if grammar.loose:
            return r"[0-9]{1,9}+(?:\.[0-9]{1,9}+)?+"
        return rf"[0-9]{{1,9}}+\.[0-9]{{{grammar.decimals}}}"
    return "[0-9]{1,9}+" if grammar.digits is None else f"[0-9]{{{grammar.digits}}}"


def _literal(text: str, loose: bool) -> str:
    """Matches a fixed piece of text: "</box>"; with `loose`, also with spaces around punctuation: " ( " for "("."""
    if not loose:
        return re.escape(text)
    if text and not text.strip():
        return r"\s++"
    parts = []
    for piece in _PIECES.findall(text):
        if piece[0] == "<" or piece[0].isalnum() or piece[0] == "_":
            parts.append(re.escape(piece))
        else:
            parts.append(_SPACE if piece.isspace() else _SPACE + re.escape(piece) + _SPACE)
    return _joined(*parts, loose=False)


def _joined(*parts: str, loose: bool) -> str:
    """The concatenation of patterns, with optional spaces between them if `loose`."""
    text = (_SPACE if loose else "").join(part for part in parts if part)
    return re.sub(r"(?:\\s\*\+){2,}", lambda match: _SPACE, text)


def _trimmed(pattern: str) -> str:
    """The pattern without the optional spaces at its ends."""
    while pattern.startswith(_SPACE):
        pattern = pattern.removeprefix(_SPACE)
    while pattern.endswith(_SPACE):
        pattern = pattern.removesuffix(_SPACE)
    return pattern


def _coordinates(grammar: TaggedFields, shape: Shape, captured: bool) -> str:
    """Matches the pairs of a shape: "(1,2),(3,4)". With `captured`, each number is a group if their count is fixed."""
    least, most = KINDS[shape.kind]
    number = _number(grammar)
    # A token such as <loc_12> has no spaces inside.
    loose = grammar.loose and "<" not in shape.pair
    before, middle, after = (_literal(piece, loose) for piece in shape.pair.split("{}"))
    join = _literal(shape.join, grammar.loose)
    pair = before + number + middle + number + after
    if most != least:
        return rf"{pair}(?:{join}{pair}){{{least - 1},}}+"
    if captured:
        pair = f"{before}({number}){middle}({number}){after}"
    return join.join([pair] * least)


def _one_region(grammar: TaggedFields, shape: Shape, before: str, after: str) -> str:
    """Matches one region with its coordinates in a group: "<box>(1,2),(3,4)</box>", the group "(1,2),(3,4)".

    `before` and `after` are patterns for the text around the coordinates and their closing mark.
    """
    coordinates = _trimmed(_coordinates(grammar, shape, True))
    return _joined(before, f"({coordinates})", _literal(shape.close, grammar.loose), after, loose=grammar.loose)


# Groups of regions.


def _has_further(grammar: TaggedFields) -> bool:
    """Whether one match of `Patterns.region` can hold several regions: "<det>[[1, 2, 3, 4], [5, 6, 7, 8]]</det>"."""
    return grammar.group_join is not None and bool(grammar.group_open or grammar.group_close)


def _further_region(grammar: TaggedFields, shape: Shape) -> str:
    """Matches a region within a group, its coordinates and numbers in groups: "[5, 6, 7, 8]"."""
    return _one_region(grammar, shape, _literal(shape.open, grammar.loose), "")


def _further_regions(grammar: TaggedFields) -> str:
    """Matches the regions of a group after the first, in one capturing group: ", [5, 6, 7, 8]"."""
    loose = grammar.loose
    join = _literal(grammar.group_join or "", loose) or (_SPACE if loose else "")
    choices = "|".join(
        _joined(
            _literal(shape.open, loose),
            _coordinates(grammar, shape, False),
            _literal(shape.close, loose),
            loose=loose,
        )
        for shape in grammar.shapes
    )
    return f"((?:{join}(?:{choices}))*+)"


def _trailing(grammar: TaggedFields) -> str:
    """Matches the tokens that may follow the coordinates: "<seg001><seg127>"."""
    if not grammar.trailing:
        return ""
    return "(?:" + "[0-9]{1,9}".join(map(re.escape, grammar.trailing.split("{}"))) + ")*+"


def _region(grammar: TaggedFields, shape: Shape) -> str:
    """Matches a group that begins with this shape, except its first character: "box>(1,2),(3,4)</box>".

    The first character is matched by [`_first_character`], which precedes all choices; a lookbehind checks which one
    it was. A pattern that begins with a set of characters is searched much faster than one that begins with choices.
    """
    loose = grammar.loose
    opening = grammar.opening(shape).lstrip()
    closing = (shape.pair.rpartition("{}")[2] + shape.close + grammar.group_close).rstrip()
    before = _joined(_literal(grammar.group_open, loose), _literal(shape.open, loose), loose=loose)
    further = _further_regions(grammar) if _has_further(grammar) else ""
    after = _joined(further, _literal(grammar.group_close, loose), loose=loose)
    text = _trimmed(_one_region(grammar, shape, before, after))
    first = re.escape(opening[0])
    # Without a mark before the coordinates, their own group begins with the first character: "(\(1,2\)...".
    text = text.removeprefix(first) if before else text.replace("(" + first, "(", 1)
    return f"(?<={first})({_not_nested(text, opening[0], closing[-1:])}{_trailing(grammar)})"


def _empty(grammar: TaggedFields) -> str:
    """Matches a group without regions, except its first character, as one group of the pattern: "box>None</box>"."""
    opening = grammar.group_open.lstrip()
    text = _joined(
        *(_literal(piece, grammar.loose) for piece in (opening, grammar.empty, grammar.group_close)),
        loose=grammar.loose,
    )
    first = re.escape(opening[0])
    return f"(?<={first})({_trimmed(text).removeprefix(first)})"


def _first_character(grammar: TaggedFields) -> str:
    """Matches the first character of a region, malformed or not: "<", or "\uff1c", its full-width variant."""
    characters: list[str] = []
    for fields in grammar.readings():
        for shape in grammar.shapes:
            first = fields.opening(shape).lstrip()[0]
            characters += [first, *_WIDE.get(first, "")]
    return "[" + "".join(map(re.escape, dict.fromkeys(characters))) + "]"


def _not_nested(pattern: str, first: str, last: str) -> str:
    """Forbid a second bracket around a region: "[[1, 2, 3, 4]]" is not the region "[1, 2, 3, 4]".

    The first character of the region has been consumed before `pattern`.
    """
    if first in "[(":
        pattern = rf"(?<!{re.escape(first * 2)})" + pattern
    return pattern + rf"(?!\s*+{re.escape(last)})" if last and last in ")]" else pattern


def _groups_by_last(grammar: TaggedFields, readings: int, has_further: bool) -> dict[int, RegionGroups]:
    """The groups of each shape in a pattern of one choice per reading and shape, by the last group of a match.

    Groups are numbered from 1 by their opening parenthesis. A choice has the group of the region (closed last), the
    group of the coordinates, a group per captured number, and the group of further regions if there is one.
    """
    result, index = {}, 1
    for shape in grammar.shapes * readings:
        least, most = KINDS[shape.kind]
        after_numbers = index + 2 + (2 * least if most == least else 0)
        result[index] = RegionGroups(
            kind=shape.kind,
            coordinates=index + 1,
            numbers=tuple(range(index + 2, after_numbers)),
            further=after_numbers if has_further else 0,
            starts_match=not (grammar.group_open + shape.open),
        )
        index = after_numbers + has_further
    return result


# Malformed and unfinished regions.


def _mark(grammar: TaggedFields, shape: Shape) -> tuple[str, bool]:
    """The text that shows that a region is meant, and whether it is a tag: ("<box>", True), or ("[", False).

    Other text contains brackets too, so after a bracket only a number and a comma show that a region is meant.
    """
    opening = grammar.opening(shape)
    tag = re.match(r"[^<]*<[^<>]*>", opening)
    if tag:
        return tag[0], True
    return opening, bool(re.search(r"\w|<", opening))


def _expected(grammar: TaggedFields, shape: Shape) -> tuple[str, str]:
    """The mark of a region and an example of its text: ("<box>", "<box>(n,n),(n,n)</box>")."""
    number = "d" * (grammar.digits or 0) or ("n." + "d" * grammar.decimals if grammar.decimals else "n")
    text = grammar.group_open + shape.text(number, KINDS[shape.kind][0]) + grammar.group_close
    return _mark(grammar, shape)[0], text


def _malformed(grammar: TaggedFields, shape: Shape) -> str:
    """Matches a malformed or unfinished region of this shape, except its first character: "box>(1,2),(3"."""
    mark, is_tag = _mark(grammar, shape)
    first = grammar.opening(shape).lstrip()[0]
    body = _malformed_after_tag(grammar, shape, mark) if is_tag else _malformed_after_bracket(grammar, shape, mark)
    return f"(?<=[{re.escape(first)}{_WIDE.get(first, '')}])(?:{body})"


def _malformed_after_tag(grammar: TaggedFields, shape: Shape, tag: str) -> str:
    """Matches a tag, except its first character, and what follows it: "box>(1,2),(3", "loc_12><loc_"."""
    number = r"\d{0,12}+>?+" if tag == shape.pair.partition("{}")[0] else ""
    return _wide(tag[1:]) + number + _rest(grammar, shape, True) + _cut(grammar)


def _cut(grammar: TaggedFields) -> str:
    """Matches the beginning of a text for no region at the end of the text: "No", "None</bo"."""
    pattern = ""
    for character in reversed(grammar.empty + grammar.group_close if grammar.empty else ""):
        pattern = f"(?:{re.escape(character)}{pattern})?+"
    return rf"(?:{pattern}\Z)?+" if pattern else ""


def _malformed_after_bracket(grammar: TaggedFields, shape: Shape, mark: str) -> str:
    """Matches a number and a comma, or a text that ends before them: "1, 2, 3]", "[nan, 1", "1"; not "2) there".

    Up to three more brackets may come before the number.
    """
    brackets = rf"(?:\s*+{_wide(mark[0])}){{0,3}}+\s*+"
    number = rf"[-+]?+(?:\d[\d.]*+|{_NOT_FINITE})\s*+"
    rest = _rest(grammar, shape, False)
    return rf"{brackets}{number}(?:[{_COMMAS}]{rest}|\Z)|{brackets}\Z"


def _rest(grammar: TaggedFields, shape: Shape, is_tag: bool) -> str:
    """Matches the rest of a malformed region: digits, signs, commas, brackets and tokens, up to the separator.

    After a tag, this includes opening brackets, and a tag that is cut off at the end of the text: "(1,2),(3,4)</bo".
    After a bracket, closing brackets end the region: " 2, 3]".
    """
    brackets = rf"(\[\uff08\uff3b{_CLOSERS}" if is_tag else ""
    chars = rf"[\s\d.+\-eE{_COMMAS}{brackets}]"
    if grammar.separator and grammar.separator.strip(", ;"):
        chars = f"(?!{re.escape(grammar.separator)}){chars}"
    if not is_tag:
        return rf"(?:{chars})*+[{_CLOSERS}]*+"
    token = shape.pair.partition("{}")[0]
    tokens = rf"|{re.escape(token)}\d{{0,12}}+(?:>|\Z)" if "<" in token else ""  # "<loc_12>", "<loc_1" at the end
    return rf"(?:{chars}{tokens})*+(?:<[^<>\n]*+\Z)?+"


def _wide(text: str) -> str:
    """Matches a text in which full-width variants may replace ASCII brackets: "\uff1cbox\uff1e" for "<box>"."""
    return "".join(f"[{re.escape(char)}{_WIDE[char]}]" if char in _WIDE else re.escape(char) for char in text)
