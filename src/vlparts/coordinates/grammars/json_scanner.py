"""A scanner for JSON objects inside any text, with linear time, bounded nesting and positions of errors."""

import json
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, overload

__all__ = ["JsonList", "JsonNumber", "JsonObject", "JsonString", "objects"]

DEPTH = 32
"""Maximum nesting of containers in the texts of models; deeper ones are malformed."""
_TOKEN = re.compile(
    r'[ \t\n\r]*+(?:([\[\]{},:])|("(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*+)("?+)'
    r"|(-?+[0-9]++(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+)(?![\w.])|(true|false|null)(?!\w)|(\Z))"
)
_WORD = re.compile(r"[ \t\n\r]*+[\w.+\-]++")  # at the end of the text, it may become a number or literal
_PIECE = re.compile(r"\s*+(\w{1,8}+|\S)")
_QUOTED = re.compile(r"\{[ \t\n\r]*+'")


class JsonString(NamedTuple):
    """A string token of the text, with its quotes."""

    start: int
    token: str

    def value(self) -> str | None:
        """The string, or None if an escape is invalid or half of a surrogate pair."""
        try:
            value: str = json.loads(self.token)  # one string, no nesting
            value.encode()
        except ValueError:
            return None
        return value


class JsonNumber(NamedTuple):
    """A number token of the text."""

    start: int
    token: str


class JsonList(NamedTuple):
    """A list and its span."""

    start: int
    end: int
    items: list[object]


class JsonObject(NamedTuple):
    """An object: its span and its members in order, with keys as written in the text, without quotes.

    `fault` is "" for a complete object, or the reason why reading stopped at `end`.
    """

    start: int
    end: int
    members: list[tuple[str, object]]
    fault: str = ""


class _Open:
    """A container that is being read."""

    def __init__(self, start: int, is_object: bool) -> None:
        self.start, self.is_object = start, is_object
        self.members: list[tuple[str, object]] = []
        self.items: list[object] = []
        self.key: str | None = None
        self.state = "first"  # then "colon", "value", "next", and "more" after a comma

    def add(self, value: object) -> None:
        """Add a value."""
        if self.is_object:
            self.members.append((self.key or "", value))
        else:
            self.items.append(value)
        self.state = "next"

    def partial_members(self) -> list[tuple[str, object]]:
        """The members, including an unfinished one."""
        begun = self.state in ("colon", "value") and self.key is not None
        return [*self.members, (self.key or "", None)] if begun else self.members

    def accepts_value(self) -> bool:
        """Whether a value is allowed next."""
        return self.state == "value" if self.is_object else self.state in ("first", "more")

    def punctuate(self, mark: str) -> bool:
        """Read a comma or colon; returns whether it is allowed here."""
        required, after = ("colon", "value") if mark == ":" else ("next", "more")
        allowed = self.state == required
        self.state = after
        return allowed


def _close(stack: list[_Open], end: int) -> JsonObject | None:
    """Close the innermost container and return it if it is an object."""
    top = stack.pop()
    closed = JsonObject(top.start, end, top.members) if top.is_object else None
    if stack:
        stack[-1].add(closed or JsonList(top.start, end, top.items))
    return closed


def _read_token(stack: list[_Open], match: re.Match[str]) -> str:
    """Add a token other than a bracket to the innermost container; returns the fault, or ""."""
    top, (mark, string, closed, number, literal, _) = stack[-1], match.groups()
    start = match.start(match.lastindex or 0)
    if mark:
        return "" if top.punctuate(mark) else f"{mark!r} out of place"
    if string is not None:
        if not closed:
            is_cut = match.string[match.end() : match.end() + 2] in ("", "\\")
            return "unfinished" if is_cut else "line break in a string"
        if top.is_object and top.state in ("first", "more"):
            top.key, top.state = string[1:], "colon"
            return ""
        value: object = JsonString(match.start(2), string + closed)
    else:
        value = JsonNumber(start, number) if number else literal
    if not top.accepts_value():
        return "a value out of place"
    top.add(value)
    return ""


def _read_bracket(stack: list[_Open], mark: str, end: int, found: Callable[[JsonObject], None], depth: int) -> str:
    """Open or close a container with a bracket that ends at `end`; returns the fault, or ""."""
    if mark in "{[":
        if stack and not stack[-1].accepts_value():
            return f"{mark!r} out of place"
        if len(stack) == depth:
            return f"nested deeper than {depth}"
        stack.append(_Open(end - 1, mark == "{"))
        return ""
    top = stack[-1]
    if top.is_object != (mark == "}") or top.state not in ("first", "next"):
        return f"{mark!r} out of place"
    closed = _close(stack, end)
    if closed is not None:
        found(closed)
    return ""


def _fault(text: str, position: int) -> str:
    """Return the fault of text that is not a token: its first word or character."""
    match = _PIECE.match(text, position)
    return repr(match[1]) if match else "spaces"


def _read_object(text: str, start: int, found: Callable[[JsonObject], None], depth: int) -> int:
    """Read the object that opens at `start` and those inside it; returns the position after them."""
    stack: list[_Open] = []
    position = start
    while True:
        match = _TOKEN.match(text, position)
        after = match.end() if match else position
        if match is None:
            word = _WORD.match(text, position)
            fault = "unfinished" if word and word.end() == len(text) else _fault(text, position)
        elif match[6] is not None:
            fault = "unfinished"
        elif match[1] in ("{", "[", "}", "]"):
            fault = _read_bracket(stack, match[1], after, found, depth)
        else:
            fault = _read_token(stack, match)
        if fault:
            for opened in stack:
                if opened.is_object:
                    found(JsonObject(opened.start, after, opened.partial_members(), fault))
            # A brace out of place may begin another object.
            return max(match.start(1) if match and match[1] == "{" else after, start + 1)
        if not stack:
            return after
        position = after


@overload
def objects(text: str, depth: int = DEPTH, plain: None = None) -> Iterator[JsonObject]: ...
@overload
def objects(text: str, depth: int = DEPTH, *, plain: re.Pattern[str]) -> Iterator[JsonObject | re.Match[str]]: ...
def objects(
    text: str, depth: int = DEPTH, plain: re.Pattern[str] | None = None
) -> Iterator[JsonObject | re.Match[str]]:
    """Yield all objects of a text, inner ones before outer ones, malformed ones with their fault.

    An object with single quotes, as Python prints it, is not read: it is yielded without members, with that fault.
    Containers that are nested deeper than `depth` are malformed.

    Args:
        text: The text.
        depth: Maximum nesting of containers.
        plain: Matches sound objects that need no reading: those outside of other objects are yielded as its matches.
    """
    position = text.find("{")
    while position >= 0:
        if plain is not None and (match := plain.match(text, position)):
            yield match
            position = text.find("{", match.end())
            continue
        if _QUOTED.match(text, position):
            yield JsonObject(position, position + 1, [], "single quotes")
            position = text.find("{", position + 1)
            continue
        batch: list[JsonObject] = []
        after = _read_object(text, position, batch.append, depth)
        yield from batch
        position = text.find("{", after)
