"""The further members of JSON objects of regions, which are the attributes of the regions."""

import re
from bisect import bisect_left
from collections.abc import Collection, Sequence

from ..json_values import NO_ATTRIBUTES, Attributes, parse_json
from .base import QUOTE_LENGTH, Coded, DecodeError, Grammar, WritesAttributes
from .json_scanner import JsonList, JsonNumber, JsonObject, JsonString, objects

__all__ = ["has_number", "is_shape", "lost_members", "read_attributes", "written_attributes"]

# Names of keys, in lower case without "_" and "-": of numbers, and of lists of numbers.
_NUMBER_KEY = re.compile(
    "[xyzwh]|width|height|[dc][xy]|[xy][0-4]|[xy](?:min|max)|left|top|right|bottom|r[xy]?|radius|diameter|rotation|angle"
    "|theta"
)
_LIST_KEY = re.compile(
    "(?:b|bounding)?box(?:2d)?|bounds|rect|quad|size|position|coordinates|cent(?:er|re)|corners?|(?:key)?points?(?:2d)?"
    "|polygon|(?:poly)?line|(?:top|bottom)(?:left|right)"
)


def is_shape(key: str, value: object) -> bool:
    """Whether a member has, by its name in any common format, numbers that are coordinates, sizes or angles."""
    name = key.lower().replace("_", "").replace("-", "")
    is_named = _NUMBER_KEY.fullmatch(name) or (isinstance(value, (JsonList, JsonObject)) and _LIST_KEY.fullmatch(name))
    return bool(is_named) and has_number(value)


def has_number(value: object) -> bool:
    """Whether a JSON value is a number or contains one."""
    if isinstance(value, JsonList):
        return any(map(has_number, value.items))
    if isinstance(value, JsonObject):
        return any(has_number(member) for _, member in value.members)
    return isinstance(value, JsonNumber)


def read_attributes(text: str, item: JsonObject, own_keys: Collection[str]) -> Attributes | str:
    """Return the members of an object that are not in `own_keys`, or the reason why one is malformed."""
    found: dict[str, tuple[str, str]] = {}
    for key, value in item.members:
        if key in own_keys:
            continue
        try:
            name, value_text = parse_json(f'"{key}"'), _text(text, value)
            parse_json(value_text)
        except ValueError as error:
            return f"malformed object: key {key[:QUOTE_LENGTH]!r}: {str(error).removesuffix('.')}"
        if name in found or name in own_keys:
            return f"malformed object: key {name[:QUOTE_LENGTH]!r} occurs twice"
        found[name] = (f'"{key}"', value_text)
    return Attributes(found) if found else NO_ATTRIBUTES


def _text(text: str, value: object) -> str:
    """Return the text of a JSON value."""
    if isinstance(value, (JsonString, JsonNumber)):
        return value.token
    return text[value.start : value.end] if isinstance(value, (JsonList, JsonObject)) else str(value)


def written_attributes(region: Coded, coordinate_keys: Collection[str], *, shapes: bool = True) -> str:
    """Return the attributes of a region as members after others: `, "text": "abc"`.

    Raises:
        ValueError: If a value contains an object with one of `coordinate_keys`, or, unless `shapes`, a member would
            make the object another shape.
    """
    pieces = []
    for name, (key, value) in region.attributes.texts.items():
        *inner, whole = objects(f"{{{key}: {value}}}")
        further = {own for item in inner for own, _ in item.members if own in coordinate_keys}
        if further:
            raise ValueError(
                f"Attribute {name!r} cannot be written: its objects with the key {min(further)!r} would be read as "
                "further regions."
            )
        if not shapes and any(is_shape(name, member) for _, member in whole.members):
            raise ValueError(f"Attribute {name!r} cannot be written: its numbers would make the object another shape.")
        pieces.append(f", {key}: {value}")
    return "".join(pieces)


def lost_members(
    text: str, regions: Sequence[JsonObject], own_keys: Collection[str], target: Grammar
) -> list[DecodeError]:
    """Return an error for each member of the objects of regions that `target` cannot write unchanged.

    These are: all that are not in `own_keys` if it writes no attributes, names that it uses itself, values that
    contain further regions, and numbers under a name for coordinates, which would not be converted.
    """
    errors = []
    starts = sorted(item.start for item in regions)
    for item in regions:
        position = item.start
        for key, value in item.members:
            match = re.compile(rf'"{re.escape(key)}"\s*+:').search(text, position, item.end)
            position = match.start() if match else item.start
            if key not in own_keys and (reason := _reason(key, value, target, starts)):
                errors.append(DecodeError(position, f"key {key[:QUOTE_LENGTH]!r} would be lost: {reason}"))
            if isinstance(value, (JsonString, JsonNumber)):
                position = value.start + len(value.token)
            else:
                position = value.end if isinstance(value, (JsonList, JsonObject)) else position + len(key) + 2
    return errors


def _reason(key: str, value: object, target: Grammar, starts: Sequence[int]) -> str:
    """Return why a member would be lost, or "". `starts` are the positions of all regions."""
    if not isinstance(target, WritesAttributes):
        return "the format to write has no place for attributes"
    if key in target.own_keys:
        return "the format to write uses this name itself"
    if isinstance(value, (JsonList, JsonObject)):
        index = bisect_left(starts, value.start)
        if index < len(starts) and starts[index] < value.end:
            return "its value contains further regions, which are written one after another"
    return "its numbers would not be converted" if is_shape(key, value) else ""
