"""Grammars of regions as JSON objects with a list of numbers: `[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]`."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..regions import KINDS
from .base import QUOTE_LENGTH, Coded, DecodeError, Found, Grammar, check_writable
from .json_attributes import lost_members, read_attributes, written_attributes
from .json_scanner import JsonList, JsonNumber, JsonObject, JsonString, objects

__all__ = ["MAX_DIGITS", "JsonGrammar", "cut_list", "fault_reason", "label_of", "lost_text", "ordered"]

_SPACE = re.compile(r"\s*+")
_CLOSING = re.compile(r"\s*+\]")
_FENCE_NAME = re.compile(r"[a-z]*+\s*+")
_FENCE_END = re.compile(r"\s*+```")
_BRACE_END = re.compile(r"\s*+\}")
_NEXT = re.compile(r"\s*+,\s*+")
_LOOKBEHIND = 64  # characters before a list that may belong to it
MAX_DIGITS = 9
"""Maximum number of digits of a code."""


@lru_cache(maxsize=64)
def _plain_object(keys: Sequence[str], label_key: str) -> re.Pattern[str]:
    """Match an object with a list of codes and a label without escapes or no label, as most are."""
    space, names = r"[ \t\n\r]*+", "|".join(map(re.escape, keys))
    number = f"{space}[0-9]{{1,{MAX_DIGITS}}}+{space}"
    label = rf'(?:,{space}"{re.escape(label_key)}"{space}:{space}"([^"\\\x00-\x1f\ud800-\udfff]*+)"{space})?+'
    return re.compile(rf'\{{{space}"({names})"{space}:{space}\[({number}(?:,{number})*+)\]{space}{label}\}}')


def _integer(value: object) -> int | str:
    """Return the code of a JSON value, or the reason why it is none. 12.0 is 12; 12.5 is not rounded."""
    if not isinstance(value, JsonNumber):
        return "is not a number"
    token = re.sub(r"\.0++\Z", "", value.token)
    if token.startswith("-"):
        return "is negative"
    if not token.isdecimal():
        return "is not an integer"
    return int(token) if len(token) <= MAX_DIGITS else f"has more than {MAX_DIGITS} digits"


def _counts(kind: str) -> str:
    """Return how many numbers a region of this kind has, in words."""
    least, most = KINDS[kind]
    return f"{2 * least}" if most == least else f"an even number of at least {2 * least}"


def _wrong_count(kind: str, codes: Sequence[int]) -> str:
    """Return the reason why a region of this kind cannot have so many numbers, or ""."""
    least, most = KINDS[kind]
    if len(codes) == 2 * least:  # as nearly all
        return ""
    points, odd = divmod(len(codes), 2)
    if odd or points < least or (most is not None and points > most):
        return f"malformed object: a {kind} has {_counts(kind)} numbers, got {len(codes)}"
    return ""


def ordered(
    found: list[Found], errors: list[DecodeError], text: str, names: Sequence[str] = ()
) -> tuple[list[Found], list[DecodeError]]:
    """Sort regions and errors by position; extend the spans of the first and last region of a list to its marks.

    Marks are added in pairs only: `[` with `]`, `{"name": ` with `}` for a name in `names`, and the two code fences.
    """
    found.sort()
    errors.sort()
    for first, last in _groups(text, [item.outer for item in found]):
        inner = found[first].outer[0], found[last].outer[1]
        start, end = _with_marks(text, *inner, names)
        if first == last:
            found[first] = _with_span(found[first], (start, end))
        elif (start, end) != inner:
            found[first] = _with_span(found[first], (start, found[first].outer[1]))
            found[last] = _with_span(found[last], (found[last].outer[0], end))
    return found, errors


def _with_span(item: Found, span: tuple[int, int]) -> Found:
    """The same as `_replace(outer=span)` in half the time."""
    return Found(item[0], item[1], span, *item[3:])


def _groups(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the first and last index of each group of objects with only a comma in between."""
    groups: list[tuple[int, int]] = []
    for index, (start, _) in enumerate(spans):
        if index and _NEXT.fullmatch(text, spans[index - 1][1], start):
            groups[-1] = groups[-1][0], index
        else:
            groups.append((index, index))
    return groups


def _opening(text: str, mark: str, rest: re.Pattern[str], end: int) -> int | None:
    """Return the start of the last `mark` if nothing but `rest` is between it and `end`, or None."""
    first = text.rfind(mark, max(0, end - _LOOKBEHIND), end)
    return first if first >= 0 and rest.fullmatch(text, first + len(mark), end) else None


def _with_marks(text: str, start: int, end: int, names: Sequence[str]) -> tuple[int, int]:
    """Extend the span of the objects of a list to the marks around them."""
    first, last = _opening(text, "[", _SPACE, start), _CLOSING.match(text, end)
    if first is not None and last is not None:
        start, end = first, last.end()
    elif first is not None or last is not None:
        return start, end  # a list with other items
    if names and (last := _BRACE_END.match(text, end)):
        name = re.compile(rf'\s*+"(?:{"|".join(map(re.escape, names))})"\s*+:\s*+')
        if (first := _opening(text, "{", name, start)) is not None:
            start, end = first, last.end()
    if (last := _FENCE_END.match(text, end)) and (first := _opening(text, "```", _FENCE_NAME, start)) is not None:
        start, end = first, last.end()
    return start, end


def lost_text(text: str, regions: Sequence[JsonObject], own_keys: Sequence[str], target: Grammar) -> list[DecodeError]:
    """Return the text around and within the objects of regions that is lost when `target` writes them.

    Args:
        text: The text.
        regions: The objects of regions, without malformed ones.
        own_keys: The keys that are not attributes.
        target: The grammar that writes the regions.
    """
    errors = lost_members(text, regions, own_keys, target)
    spans = sorted((item.start, item.end) for item in regions)
    for first, last in _groups(text, spans):
        start, end = spans[first][0], spans[last][1]
        opening, closing = _opening(text, "[", _SPACE, start), _CLOSING.match(text, end)
        if opening is not None and closing is None:
            errors.append(_other_items(text, end))
        elif opening is None and closing is not None:
            errors.append(_other_items(text, start))
    return sorted(set(errors))


def _other_items(text: str, position: int) -> DecodeError:
    """Return the error of a list that contains other items than regions, beside `position`."""
    quoted = repr(text[max(0, position - QUOTE_LENGTH // 2) : position + QUOTE_LENGTH // 2])
    return DecodeError(position, f"a list with other items than regions would be lost, near {quoted}")


@dataclass(frozen=True, kw_only=True)
class JsonGrammar:
    """Regions as objects with a list of numbers, such as `{"bbox_2d": [1, 2, 3, 4], "label": "cat"}`.

    Such objects are read anywhere: in a list or alone, inside prose, other objects or code fences, and in lists that
    are cut off. An object with one of the keys is an error if the list contains anything but nonnegative integers
    (12.0 is one, 12.5 is not) or the wrong number of them, if a key occurs twice, if the label is not a string, or if
    the object is not JSON (NaN, comments, trailing commas, line breaks within strings, single quotes as Python prints
    them, more than 32 levels). Nothing is evaluated. Further keys are the attributes of the region; their values are
    not interpreted, and one with a repeated key or half of a surrogate pair is an error. A label of null is no label.

    Args:
        keys: Pairs of a kind of region and the key of its numbers.
        label_key: Key of the label.
        image_key: Key of the image index, which is written for images after the first; "" for one image only.
        opening: Text before the first object.
        separator: Text between objects.
        closing: Text after the last object.

    Raises:
        ValueError: If a kind is unknown, or a key or kind occurs twice.
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
                raise ValueError(f"`keys` must be pairs of a kind, one of {sorted(KINDS)}, and a key, got {kind!r}.")
        names = [key for _, key in self.keys]
        if not names or len({*names, self.label_key}) != len(names) + 1 or len(set(self.kinds)) != len(names):
            raise ValueError(f"`keys` must have each kind and key once, and not `label_key`, got {self.keys!r}.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return tuple(kind for kind, _ in self.keys)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(key for _, key in self.keys)

    @property
    def own_keys(self) -> tuple[str, ...]:
        """The keys that are not attributes."""
        return (*self._names, *filter(None, (self.label_key, self.image_key)))

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]. No regions are an empty list."""
        if not regions:
            return self.opening.rstrip() + self.closing.lstrip()
        return self.opening + self.separator.join(self._object(region) for region in regions) + self.closing

    def _object(self, region: Coded) -> str:
        """Return the text of one object."""
        check_writable(region._replace(image=0) if self.image_key else region, self.kinds, self.own_keys)
        kind, codes, label, image, *_ = region
        key = dict(self.keys)[kind]
        label_text = "" if label is None else f', "{self.label_key}": {json.dumps(label, ensure_ascii=False)}'
        image_text = f', "{self.image_key}": {image}' if image else ""
        further = written_attributes(region, self._names) if region.attributes else ""
        return f'{{"{key}": [{", ".join(map(str, codes))}]{label_text}{image_text}{further}}}'

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        found: list[Found] = []
        errors: list[DecodeError] = []
        names = self._names
        quoted = re.compile(rf"\{{\s*+'(?:{'|'.join(map(re.escape, names))})'")  # as Python prints an object
        pattern = re.compile("|".join(f'"{re.escape(name)}"' for name in names))
        kinds = {key: kind for kind, key in self.keys}
        spans: list[tuple[int, int]] = []
        for item in objects(text, plain=_plain_object(names, self.label_key)):
            if isinstance(item, re.Match):
                span, _, (first, last), _ = item.regs
                key, numbers, label = item.groups()
                kind, codes = kinds[key], [*map(int, numbers.split(","))]
                spans.append(span)
                if reason := _wrong_count(kind, codes):
                    errors.append(DecodeError(span[0], reason))
                else:
                    found.append(Found(first - 1, last + 1, span, kind, codes, label))
                continue
            is_region = any(key in names for key, _ in item.members)
            if item.fault == "single quotes":
                is_region = bool(quoted.match(text, item.start))
            elif item.fault == "unfinished":
                is_region = is_region or not item.members  # the text may end at the beginning of a region
            if not is_region:
                continue
            spans.append((item.start, item.end))
            region = self._region(text, item)
            if isinstance(region, str):
                errors.append(DecodeError(item.start, region))
            else:
                found.append(region)
        errors += _keys_outside(text, pattern, spans)
        return ordered(found, errors + cut_list(text, found, errors), text)

    def lost(self, text: str, target: Grammar) -> list[DecodeError]:
        """See [`ReportsLoss`]."""
        names = self._names
        candidates = (item for item in objects(text) if any(key in names for key, _ in item.members))
        regions = [item for item in candidates if isinstance(self._region(text, item), Found)]
        return lost_text(text, regions, self.own_keys, target)

    def _region(self, text: str, item: JsonObject) -> Found | str:
        """Return the region of an object, or the reason why it is not one."""
        if item.fault:
            return fault_reason(item)
        members = dict(item.members)
        names = {key: kind for kind, key in self.keys if key in members}
        if len(names) > 1 or len(members) != len(item.members):
            return "malformed object: more than one list of coordinates, or a key occurs twice"
        ((key, kind),) = names.items()
        value = members[key]
        if not isinstance(value, JsonList):
            return f"malformed object: {key!r} must be a list of {_counts(kind)} integers"
        codes: list[int] = []
        for entry in value.items:
            code = _integer(entry)
            if isinstance(code, str):
                return f"malformed object: a coordinate {code}"
            codes.append(code)
        if reason := _wrong_count(kind, codes):
            return reason
        label = label_of(members.get(self.label_key, "null"))
        image = _integer(members.get(self.image_key, JsonNumber(0, "0"))) if self.image_key else 0
        if isinstance(label, JsonString) or isinstance(image, str):
            return f"malformed object: {self.label_key!r} must be a string, and an image index an integer"
        attributes = read_attributes(text, item, self.own_keys)
        if isinstance(attributes, str):
            return attributes
        return Found(value.start, value.end, (item.start, item.end), kind, codes, label, image, attributes=attributes)


def label_of(value: object) -> str | None | JsonString:
    """Return the label of a JSON value: None for null, or a JsonString if the value is not a valid string."""
    if value == "null":
        return None
    label = value.value() if isinstance(value, JsonString) else None
    return JsonString(0, "") if label is None else label


def fault_reason(item: JsonObject) -> str:
    """Return the reason why an object is malformed or unfinished."""
    if item.fault == "unfinished":
        return "unfinished object: the text ends within it"
    if item.fault == "single quotes":
        return "malformed object: single quotes, as Python prints them; JSON has double quotes"
    return f"malformed object: {item.fault}"


def _keys_outside(text: str, pattern: re.Pattern[str], spans: list[tuple[int, int]]) -> list[DecodeError]:
    """Return errors for the keys of regions outside of the spans of objects."""
    spans.sort()
    errors, index, end = [], 0, 0
    for match in pattern.finditer(text):
        while index < len(spans) and spans[index][0] <= match.start():
            end = max(end, spans[index][1])
            index += 1
        if match.start() >= end:
            errors.append(DecodeError(match.start(), f"malformed object: {match[0]} outside of an object"))
    return errors


def cut_list(text: str, found: list[Found], errors: list[DecodeError]) -> list[DecodeError]:
    """Return an error if the text ends within a list."""
    if not found or any(reason.startswith("unfinished") for _, reason in errors):
        return []
    end = max(item.outer[1] for item in found)
    first = min(item.outer[0] for item in found)
    rest = text[end:].strip()
    if rest == "," or (not rest and text[:first].rstrip().endswith("[")):
        return [DecodeError(end, "unfinished list: the text ends before it is closed")]
    return []
