"""JSON Lines, one object for each line, read and written one by one."""

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

__all__ = ["json_line", "parse_object", "read_json_lines", "write_json_lines"]


def parse_object(line: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a line.

    Raises:
        ValueError: If the line is not UTF-8, not JSON, no object, or has a key twice, a NaN or half of a surrogate
            pair.
    """
    try:
        text = line.decode(encoding="utf-8") if isinstance(line, bytes) else line
        fields = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_without_repeated_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    if "\\ud" in text.lower():
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds one half of a surrogate pair, which is no character") from None
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no valid number")


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return fields


def json_line(fields: dict[str, Any]) -> str:
    """Return an object as one line of JSON, characters as they are, with its newline."""
    return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"


def read_json_lines(lines: Iterable[str | bytes], name: str = "line") -> Iterator[tuple[int, dict[str, Any]]]:
    """Read objects one at a time; empty lines are passed over.

    Args:
        lines: An open file, best in binary form, so that broken bytes are an error of their own line.
        name: What error messages call the file.

    Yields:
        The number of the line, from 1, and its object.

    Raises:
        ValueError: At a line that is no JSON object, with its number.
    """
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf") if isinstance(line, bytes) else line.removeprefix("\ufeff")
        if line.strip():
            try:
                fields = parse_object(line)
            except ValueError as error:
                raise ValueError(f"{name}, line {number}: {error}") from None
            yield number, fields


def write_json_lines(rows: Iterable[dict[str, Any]], file: IO[str]) -> int:
    """Write objects one at a time.

    Returns:
        How many lines were written.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    count = 0
    for row in rows:
        file.write(json_line(row))
        count += 1
    return count
