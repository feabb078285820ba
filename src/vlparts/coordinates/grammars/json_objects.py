"""Grammars of regions as JSON: `[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]` and what is like it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..regions import KINDS
from .base import Coded, DecodeError, Found
from .json_scanner import JsonList, JsonNumber, JsonObject, JsonString, objects

__all__ = ["JsonGrammar"]

_BEFORE = re.compile(r'(?:```[a-z]*+\s*+)?+(?:\{\s*+"\w++"\s*+:\s*+)?+\[\s*+\Z')
_AFTER = re.compile(r"\s*+\](?:\s*+\}(?!\s*+[\]},]))?+(?:\s*+```)?+")
_LOOK = 64  # characters before a list that may belong to it
_DIGITS = 9


def _integer(value: object) -> int | str:
    """Return the code that a JSON value is, or what is wrong with it. 12.0 is 12; 12.5 is not rounded."""
    if not isinstance(value, JsonNumber):
        return "is no number"
    token = re.sub(r"\.0++\Z", "", value.token)
    if token.startswith("-"):
        return "is negative"
    if not token.isdecimal():
        return "is no integer"
    return int(token) if len(token) <= _DIGITS else f"has more than {_DIGITS} digits"


def _counts(kind: str) -> str:
    """How many numbers a region of this kind has, in words."""
    least, most = KINDS[kind]
    return f"{2 * least}" if most == least else f"an even number of at least {2 * least}"


def in_order(found: list[Found], errors: list[DecodeError], text: str) -> tuple[list[Found], list[DecodeError]]:
    """Put what was read in the order of the text, and give the marks of lists to their first and last region."""
    found.sort()
    errors.sort()
    for index, item in enumerate(found):
        start, end = item.outer
        before = _BEFORE.search(text[max(0, start - _LOOK) : start])
        after = _AFTER.match(text, end)
        outer = (max(0, start - _LOOK) + before.start() if before else start, after.end() if after else end)
        found[index] = item._replace(outer=outer)
    return found, errors


@dataclass(frozen=True, kw_only=True)
class JsonGrammar:
    """Regions as objects with a list of numbers each, such as `{"bbox_2d": [1, 2, 3, 4], "label": "cat"}`.

    Read are such objects wherever they stand: in a list or alone, inside prose, other objects or code fences, in lists
    that were cut off. What holds one of the keys and is no such object is an error: other than plain nonnegative
    integers in the list (12.0 is one, 12.5 is not), the wrong number of them, a key twice, a label that is no string,
    and all that is no JSON (NaN, comments, trailing commas, line breaks within strings, single quotes as Python
    prints them, more than 32 levels). Nothing is evaluated.

    Args:
        keys: Pairs of a kind of region and the key of its numbers.
        label_key: Key of the label.
        image_key: Key of the index of the image, which is written for images after the first; "" for one image only.
        opening: Text before the first object.
        separator: Text between objects.
        closing: Text after the last object.

    Raises:
        ValueError: For a kind that is none, or a key or kind twice.
    """

    keys: tuple[tuple[str, str], ...] = (("box", "bbox_2d"), ("point", "point_2d"))
    label_key: str = "label"
    image_key: str = ""
    opening: str = "```json\n[\n\t"
    separator: str = ",\n\t"
    closing: str = "\n]\n```"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple((kind, key) for kind, key in self.keys))
        for kind, _ in self.keys:
            if kind not in KINDS:
                raise ValueError(f"keys must pair kinds of {sorted(KINDS)} with keys, got {kind!r}")
        names = [key for _, key in self.keys]
        if not names or len({*names, self.label_key}) != len(names) + 1 or len(set(self.kinds)) != len(names):
            raise ValueError(f"keys must hold each kind and each key once, and not the label's, got {self.keys!r}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return tuple(kind for kind, _ in self.keys)

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]; no regions are an empty list."""
        if not regions:
            return self.opening.rstrip() + self.closing.lstrip()
        return self.opening + self.separator.join(self._written(region) for region in regions) + self.closing

    def _written(self, region: Coded) -> str:
        """One object."""
        kind, codes, label, image, identity, times = region
        key = dict(self.keys).get(kind)
        if key is None:
            raise ValueError(f"a {kind} cannot be written: the format knows {', '.join(self.kinds)}")
        if (image and not self.image_key) or identity is not None or len(times):
            raise ValueError("the format writes regions of one image, without identities and times")
        named = "" if label is None else f', "{self.label_key}": {json.dumps(label, ensure_ascii=False)}'
        which = f', "{self.image_key}": {image}' if image else ""
        return f'{{"{key}": [{", ".join(map(str, codes))}]{named}{which}}}'

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        found: list[Found] = []
        errors: list[DecodeError] = []
        known: set[int] = set()  # where the numbers of regions and errors begin
        names = [key for _, key in self.keys]
        pattern = re.compile("|".join(f'"{re.escape(name)}"' for name in names))
        spans: list[tuple[int, int]] = []
        for item in objects(text):
            meant = any(key in names for key, _ in item.members)
            if item.fault == "single quotes":
                meant = bool(re.compile(rf"\{{\s*+'(?:{'|'.join(map(re.escape, names))})'").match(text, item.start))
            elif item.fault == "unfinished":
                meant = meant or not item.members  # a region may just have begun
            if not meant:
                continue
            spans.append((item.start, item.end))
            region = self._region(item)
            if isinstance(region, str):
                errors.append(DecodeError(item.start, region))
            else:
                known.add(item.start)
                found.append(region)
        errors += _uncovered(text, pattern, spans)
        return in_order(found, errors + cut_list(text, found, errors), text)

    def _region(self, item: JsonObject) -> Found | str:
        """The region that an object is, or why it is none."""
        if item.fault:
            return fault_of(item)
        members = dict(item.members)
        names = {key: kind for kind, key in self.keys if key in members}
        if len(names) > 1 or len(members) != len(item.members):
            return "malformed object: more than one list of coordinates, or a key twice"
        (key, kind), (least, most) = *names.items(), KINDS[next(iter(names.values()))]
        value = members[key]
        if not isinstance(value, JsonList):
            return f"malformed object: {key!r} must be a list of {_counts(kind)} integers"
        codes: list[int] = []
        for entry in value.items:
            code = _integer(entry)
            if isinstance(code, str):
                return f"malformed object: a coordinate {code}"
            codes.append(code)
        points, odd = divmod(len(codes), 2)
        if odd or points < least or (most is not None and points > most):
            return f"malformed object: a {kind} has {_counts(kind)} numbers, got {len(codes)}"
        label = _label(members.get(self.label_key, "null"))
        image = _integer(members.get(self.image_key, JsonNumber(0, "0"))) if self.image_key else 0
        if isinstance(label, JsonString) or isinstance(image, str):
            return f"malformed object: {self.label_key!r} must be a string, an index of an image an integer"
        return Found(value.start, value.end, (item.start, item.end), kind, codes, label, image)


def _label(value: object) -> str | None | JsonString:
    """The label that a JSON value is, None for null, and a JsonString for what is none."""
    if value == "null":
        return None
    label = value.value() if isinstance(value, JsonString) else None
    return JsonString(0, "") if label is None else label


def fault_of(item: JsonObject) -> str:
    """Why an object is broken."""
    if item.fault == "unfinished":
        return "unfinished object: the text ends within it"
    if item.fault == "single quotes":
        return "malformed object: single quotes, as Python prints it; JSON has double quotes"
    return f"malformed object: {item.fault}"


def _uncovered(text: str, pattern: re.Pattern[str], spans: list[tuple[int, int]]) -> list[DecodeError]:
    """Keys of regions that stand in no object."""
    spans.sort()
    errors, place, end = [], 0, 0
    for match in pattern.finditer(text):
        while place < len(spans) and spans[place][0] <= match.start():
            end = max(end, spans[place][1])
            place += 1
        if match.start() >= end:
            errors.append(DecodeError(match.start(), f"malformed object: {match[0]} outside of an object"))
    return errors


def cut_list(text: str, found: list[Found], errors: list[DecodeError]) -> list[DecodeError]:
    """An error where the text ends with a list that goes on."""
    if not found or any(reason.startswith("unfinished") for _, reason in errors):
        return []
    end = max(item.outer[1] for item in found)
    first = min(item.outer[0] for item in found)
    rest = text[end:].strip()
    if rest == "," or (not rest and text[:first].rstrip().endswith("[")):
        return [DecodeError(end, "unfinished list: the text ends before it is closed")]
    return []
