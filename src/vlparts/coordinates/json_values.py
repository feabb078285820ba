"""JSON values: strict reading, and the attributes of regions, which remember how their values are written."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["NO_ATTRIBUTES", "QUOTE_LENGTH", "Attributes", "as_attributes", "check_characters", "parse_json"]

QUOTE_LENGTH = 40
"""Maximum number of characters that an error message quotes from the text."""
MAX_DIGITS = 4300  # of an integer: Python's own limit


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If the text is not JSON, is nested too deeply, or has a repeated key, a NaN, a number that is too
            large, or half of a surrogate pair.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_reject_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            object_pairs_hook=_unique_keys,
        )
        if "\\ud" in text.lower():
            check_characters(json.dumps(value, ensure_ascii=False))
    except json.JSONDecodeError as error:
        raise ValueError(f"Not valid JSON: {error}.") from None
    except RecursionError:
        raise ValueError("The object is nested too deeply.") from None
    return value


def check_characters(text: str) -> None:
    """Raise ValueError if a text contains half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("A string contains half of a surrogate pair, which is not a character.") from None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a valid number.")


def _bounded_int(token: str) -> int:
    digits = len(token.removeprefix("-"))
    if digits > MAX_DIGITS:
        raise ValueError(f"A number has {digits} digits, more than {MAX_DIGITS}.")
    return int(token)


def _finite_float(token: str) -> float:
    number = float(token)
    if math.isinf(number):
        raise ValueError(f"Number {token[:QUOTE_LENGTH]} is too large.")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"Key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object.")
    return fields


class Attributes(Mapping[str, Any]):
    """An immutable mapping of names to JSON values, in order.

    Names and values are kept as JSON text, character for character as they were read, so that 0.50 is written as 0.50
    again; a lookup returns plain data, a new object each time. Equal to any mapping with the same plain data.
    """

    __slots__ = ("_members",)

    def __init__(self, members: Mapping[str, tuple[str, str]]) -> None:
        """Make attributes of names with the JSON texts of the name and the value, which are not checked."""
        self._members = dict(members)

    def __getitem__(self, name: str) -> Any:
        return json.loads(self._members[name][1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __hash__(self) -> int:
        return hash(frozenset(self._members))

    def __repr__(self) -> str:
        return repr(dict(self))

    @property
    def texts(self) -> dict[str, tuple[str, str]]:
        """The JSON texts of each name and value, a copy."""
        return dict(self._members)


NO_ATTRIBUTES = Attributes({})


def as_attributes(given: object, name: str = "attributes") -> Attributes:
    """Return a mapping of str to JSON values as attributes.

    Raises:
        ValueError: If it is not a mapping, a key is not a str, or a value would change as JSON, such as a tuple, an
            object with keys that are not str, a NaN, or half of a surrogate pair.
    """
    if isinstance(given, Attributes):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"`{name}` must be a mapping of str to JSON values, got {given!r}.")
    members = {}
    for key, value in given.items():
        if not isinstance(key, str):
            raise ValueError(f"The keys of `{name}` must be str, got {key!r}.")
        try:
            texts = tuple(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in (key, value))
            check_characters("".join(texts))
            read = parse_json(texts[1])
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"`{name}[{key!r}]` must be a JSON value, got {value!r}: {error}") from None
        if read != value:
            raise ValueError(
                f"`{name}[{key!r}]` must be a JSON value, got {value!r}, which would be read back as {read!r}."
            )
        members[key] = (texts[0], texts[1])
    return Attributes(members) if members else NO_ATTRIBUTES
