"""Reading and writing JSON Lines, one object per line, one at a time."""

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from ..json_values import check_characters, parse_json

__all__ = ["json_line", "parse_object", "read_json_lines", "read_lines", "without_bom", "write_json_lines"]


def parse_object(line: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a line.

    Raises:
        ValueError: If the line is not UTF-8, not JSON or not an object, or has a repeated key, a NaN, a number
            that is too large, or half of a surrogate pair.
    """
    try:
        text = line.decode(encoding="utf-8") if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        raise ValueError(f"Not valid UTF-8: {error}.") from None
    fields = parse_json(text)
    if not isinstance(fields, dict):
        raise ValueError(f"Expected a JSON object, got {type(fields).__name__}.")
    return fields


def without_bom(content: str | bytes) -> str | bytes:
    """Return the content of a file without a UTF-8 byte order mark at its start."""
    return content.removeprefix(codecs.BOM_UTF8) if isinstance(content, bytes) else content.removeprefix("\ufeff")


def json_line(fields: dict[str, Any]) -> str:
    """Return an object as one line of JSON with a newline. Characters are not escaped.

    Raises:
        ValueError: If a number is NaN or infinite, or a string contains half of a surrogate pair.
    """
    line = json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"
    check_characters(line)
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
    return ((number, fields) for number, _, fields in read_lines(lines, name))


def read_lines(lines: Iterable[str | bytes], name: str = "`lines`") -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Read objects like `read_json_lines`, each with the text of its line: yields line number, text and object."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = without_bom(line)
        if line.strip():
            try:
                fields = parse_object(line)
            except ValueError as error:
                raise ValueError(f"{name}, line {number}: {error}") from None
            yield number, line if isinstance(line, str) else line.decode(), fields


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
