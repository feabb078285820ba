"""The regular expressions of tagged grammars.

Every open repetition is possessive and what is tried at a place is bounded by what is then consumed there, so that
reading is linear in the length of the text.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ..regions import KINDS

if TYPE_CHECKING:
    from .tagged import Shape, TaggedGrammar

__all__ = ["Patterns", "compiled"]

_SPACE = r"\s*+"
_WIDE = {"(": "\uff08", ")": "\uff09", "[": "\uff3b\u3010", "<": "\uff1c", ">": "\uff1e"}
_COMMAS = ",;\uff0c\u3001\u060c\uff1b"
_CLOSERS = r")\]\uff09\uff3d\u3011"
_PIECES = re.compile(r"<[^<>]*>?|\w+|\s+|[^\w\s]")
_NOT_FINITE = r"(?i:nan|inf(?:inity)?)\b"


class Where(NamedTuple):
    """Where a pattern holds what of a region.

    Attributes:
        kind: The kind of the region.
        at: The group of its coordinates.
        numbers: The groups of its numbers; none where their count is open.
        further: The group of further regions; 0 where there cannot be any.
        bare: Whether the coordinates begin with the match, whose first character stands before all groups.
    """

    kind: str
    at: int
    numbers: tuple[int, ...]
    further: int
    bare: bool


@dataclass(frozen=True)
class Patterns:
    """What reads a grammar.

    Args:
        region: Matches a group of regions, or else what was meant as one.
        kinds: By the index of the last group that the match closed, none where it is no region.
        further: Matches one further region of a group.
        further_kinds: As `kinds`, for `further`.
        number: Matches a number.
        openings: The tags that begin a region, as text.
        marks: What shows that a region was meant, each with the text that was expected there.
    """

    region: re.Pattern[str]
    kinds: dict[int, Where]
    further: re.Pattern[str]
    further_kinds: dict[int, Where]
    number: re.Pattern[str]
    openings: tuple[str, ...]
    marks: tuple[tuple[str, str], ...]


def _literal(text: str, loose: bool) -> str:
    """A pattern for a piece of text; with `loose`, spaces may stand around its punctuation."""
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


def _number(grammar: "TaggedGrammar") -> str:
    if grammar.decimals:
        places = f"{{{grammar.decimals}}}" if not grammar.loose else "{1,9}+"
        return r"[0-9]{1,9}+" + (rf"\.[0-9]{places}" if not grammar.loose else rf"(?:\.[0-9]{places})?+")
    return "[0-9]{1,9}+" if grammar.digits is None else f"[0-9]{{{grammar.digits}}}"


def _coordinates(grammar: "TaggedGrammar", shape: "Shape", captured: bool) -> tuple[str, int]:
    """A pattern for the pairs of a shape, and how many groups for numbers it holds."""
    least, most = KINDS[shape.kind]
    number = _number(grammar)
    # A token such as <loc_12> is one piece: no spaces inside.
    loose = grammar.loose and "<" not in shape.pair
    before, middle, after = (_literal(piece, loose) for piece in shape.pair.split("{}"))
    join = _literal(shape.join, grammar.loose)
    plain = before + number + middle + number + after
    if most != least:
        return rf"{plain}(?:{join}{plain}){{{least - 1},}}+", 0
    pair = f"{before}({number}){middle}({number}){after}" if captured else plain
    return join.join([pair] * least), 2 * least if captured else 0


def _trimmed(pattern: str) -> str:
    while pattern.startswith(_SPACE):
        pattern = pattern.removeprefix(_SPACE)
    while pattern.endswith(_SPACE):
        pattern = pattern.removesuffix(_SPACE)
    return pattern


def _nested(pattern: str, first: str, last: str) -> str:
    """Forbid the bracket around a pattern to be doubled; the pattern's first character is consumed already."""
    if first in "[(":
        pattern = rf"(?<!{re.escape(first * 2)})" + pattern
    return pattern + rf"(?!\s*+{re.escape(last)})" if last in ")]" else pattern


def _mark(grammar: "TaggedGrammar", shape: "Shape") -> tuple[str, bool]:
    """The text that shows that a region was meant, and whether it is a tag, which nothing else would hold."""
    opening = grammar.group_open + shape.open + shape.pair.partition("{}")[0]
    tag = re.match(r"[^<]*<[^<>]*>", opening)
    if tag:
        return tag[0], True
    return opening, bool(re.search(r"\w|<", opening))


def _wide(text: str) -> str:
    """A pattern for text in which full-width characters may stand for those of ASCII."""
    return "".join(f"[{re.escape(char)}{_WIDE[char]}]" if char in _WIDE else re.escape(char) for char in text)


def _rest(grammar: "TaggedGrammar", shape: "Shape", is_tag: bool) -> str:
    """What a broken region goes on with."""
    brackets = rf"(\[\uff08\uff3b{_CLOSERS}" if is_tag else ""
    chars = rf"[\s\d.+\-eE{_COMMAS}{brackets}]"
    if grammar.separator and grammar.separator.strip(", ;"):
        chars = f"(?!{re.escape(grammar.separator)}){chars}"
    if not is_tag:
        return rf"(?:{chars})*+[{_CLOSERS}]*+"
    token = shape.pair.partition("{}")[0]
    tokens = rf"|{re.escape(token)}\d{{0,12}}+(?:>|\Z)" if "<" in token else ""
    return rf"(?:{chars}{tokens})*+(?:<[^<>\n]*+\Z)?+"


def _broken(grammar: "TaggedGrammar", shape: "Shape") -> str:
    """What was meant as a region and is none, its first character left out."""
    mark, is_tag = _mark(grammar, shape)
    rest = _rest(grammar, shape, is_tag)
    if is_tag:
        tail = r"\d{0,12}+>?+" if mark == shape.pair.partition("{}")[0] else ""
        return _wide(mark[1:]) + tail + rest
    bracket = _wide(mark[0])
    begun = rf"(?:\s*+{bracket}){{0,3}}+\s*+[-+]?+(?:\d[\d.]*+|{_NOT_FINITE})\s*+"
    return rf"{begun}(?:[{_COMMAS}]{rest}|\Z)|(?:\s*+{bracket}){{0,3}}+\s*+\Z"


def _joined(*parts: str, loose: bool) -> str:
    """Patterns one after the other, with room for spaces between them."""
    text = (_SPACE if loose else "").join(part for part in parts if part)
    return re.sub(r"(?:\\s\*\+){2,}", lambda match: _SPACE, text)


def _one(grammar: "TaggedGrammar", shape: "Shape", before: str, after: str) -> str:
    """A pattern for one region, its coordinates in a group, between other patterns."""
    body = _trimmed(_coordinates(grammar, shape, True)[0])
    return _joined(before, f"({body})", _literal(shape.close, grammar.loose), after, loose=grammar.loose)


def _further(grammar: "TaggedGrammar", captured: bool) -> str:
    """Patterns for one region within a group, as choices."""
    choices = []
    for shape in grammar.shapes:
        opening = _literal(shape.open, grammar.loose)
        if captured:
            choices.append(f"({_one(grammar, shape, opening, '')})")
        else:
            body, closing = _coordinates(grammar, shape, False)[0], _literal(shape.close, grammar.loose)
            choices.append(_joined(opening, body, closing, loose=grammar.loose))
    return "|".join(choices)


def _kinds(grammar: "TaggedGrammar", tail: bool) -> dict[int, Where]:
    """Where the groups of each shape stand in a pattern that captures them in order."""
    kinds, at = {}, 1
    for shape in grammar.shapes:
        _, numbers = _coordinates(grammar, shape, True)
        after = at + 2 + numbers
        bare = not (grammar.group_open + shape.open)
        kinds[at] = Where(shape.kind, at + 1, tuple(range(at + 2, after)), after if tail else 0, bare)
        at = after + tail
    return kinds


@lru_cache(maxsize=128)
def compiled(grammar: "TaggedGrammar") -> Patterns:
    """Compile the patterns of a grammar."""
    loose, tail = grammar.loose, grammar.group_join is not None and bool(grammar.group_open or grammar.group_close)
    space = _SPACE if loose else ""
    join = _literal(grammar.group_join or "", loose) or space
    inner = f"((?:{join}(?:{_further(grammar, False)}))*+)" if tail else ""
    trailing = ""
    if grammar.trailing:
        trailing = "(?:" + "[0-9]{1,9}".join(map(re.escape, grammar.trailing.split("{}"))) + ")*+"
    choices, firsts, marks = [], [], []
    for shape in grammar.shapes:
        opening = (grammar.group_open + shape.open + shape.pair.partition("{}")[0]).lstrip()
        closing = (shape.pair.rpartition("{}")[2] + shape.close + grammar.group_close).rstrip()
        before = _joined(_literal(grammar.group_open, loose), _literal(shape.open, loose), loose=loose)
        after = _joined(inner, _literal(grammar.group_close, loose), loose=loose)
        text = _trimmed(_one(grammar, shape, before, after))
        lead = re.escape(opening[0])  # found by the set in front of all choices
        text = text.removeprefix(lead) if before else text.replace("(" + lead, "(", 1)
        choices.append(f"(?<={lead})({_nested(text, opening[0], closing[-1:] or ' ')}{trailing})")
        firsts += [opening[0], *_WIDE.get(opening[0], "")]
        marks.append(f"(?<=[{re.escape(opening[0])}{_WIDE.get(opening[0], '')}])(?:{_broken(grammar, shape)})")
    first = "[" + "".join(map(re.escape, dict.fromkeys(firsts))) + "]"
    choices += dict.fromkeys(marks)
    shown = [_mark(grammar, shape) for shape in grammar.shapes]
    number = "d" * (grammar.digits or 0) or ("n." + "d" * grammar.decimals if grammar.decimals else "n")
    return Patterns(
        region=re.compile(f"{first}(?:{'|'.join(choices)})"),
        kinds=_kinds(grammar, tail),
        further=re.compile(_further(grammar, True)),
        further_kinds=_kinds(grammar, False),
        number=re.compile(_number(grammar)),
        openings=tuple(mark for mark, is_tag in shown if is_tag),
        marks=tuple(
            (mark, grammar.group_open + shape.text(number, KINDS[shape.kind][0]) + grammar.group_close)
            for shape, (mark, _) in zip(grammar.shapes, shown, strict=True)
        ),
    )
