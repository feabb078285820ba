"""Reading and writing JSON Lines, one object per line, one at a time."""

import codecs
import json
import math
from collections.abc import Iterable, Iterator
from typing import IO, Any

from ..grammars.base import QUOTE_LENGTH

__all__ = ["json_line", "parse_object", "read_json_lines", "without_bom", "write_json_lines"]

MAX_DIGITS = 4300  # of an integer: Python's own limit


def parse_object(line: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a line.

    Raises:
        ValueError: If the line is not UTF-8, not JSON or not an object, or has a repeated key, a NaN, a number
            that is too large, or half of a surrogate pair.
    """
    try:
        text = line.decode(encoding="utf-8") if isinstance(line, bytes) else line
        fields = json.loads(
            text,
            parse_constant=_reject_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            object_pairs_hook=_unique_keys,
        )
        if "\\ud" in text.lower():
            _check_characters(json.dumps(fields, ensure_ascii=False))
    except UnicodeDecodeError as error:
        raise ValueError(f"Not valid UTF-8: {error}.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"Not valid JSON: {error}.") from None
    except RecursionError:
        raise ValueError("The object is nested too deeply.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"Expected a JSON object, got {type(fields).__name__}.")
    return fields


def _check_characters(text: str) -> None:
    """Raise ValueError if a text contains half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("A string contains half of a surrogate pair, which is not a character.") from None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a valid number.")


def without_bom(content: str | bytes) -> str | bytes:
    """Return the content of a file without a UTF-8 byte order mark at its start."""
    return content.removeprefix(codecs.BOM_UTF8) if isinstance(content, bytes) else content.removeprefix("\ufeff")


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


def json_line(fields: dict[str, Any]) -> str:
    """Return an object as one line of JSON with a newline. Characters are not escaped.

    Raises:
        ValueError: If a number is NaN or infinite, or a string contains half of a surrogate pair.
    """
    line = json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"
    _check_characters(line)
    return line


def read_json_lines(lines: Iterable[str | bytes], name: str = "`lines`") -> Iterator[tuple[int, dict[str, Any]]]:
    """Read objects one at a time. Empty lines are skipped.

    Args:
        lines: An open file, preferably in binary mode, so that invalid bytes are an error of their line.
        name: Name of the file in error messages.

    Yields:
        Line number, from 1, and object.

    Raises:
        ValueError: At a line that is not a JSON object, with its number.
    """
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = without_bom(line)
        if line.strip():
            try:
                fields = parse_object(line)
            except ValueError as error:
                raise ValueError(f"{name}, line {number}: {error}") from None
            yield number, fields


def write_json_lines(rows: Iterable[dict[str, Any]], file: IO[str]) -> int:
    """Write objects one at a time.

    Returns:
        The number of lines written.

    Raises:
        ValueError: See `json_line`.
    """
    count = 0
    for row in rows:
        file.write(json_line(row))
        count += 1
    return count
