"""JSON Lines for the coordinate commands: input, image sizes and output."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress

from ..coordinates.grammars.json_scanner import JsonList, JsonObject, JsonString, objects
from ..coordinates.io.json_lines import json_line, read_lines
from ..coordinates.validation import check_size

__all__ = [
    "STANDARD",
    "SizeFields",
    "changed_line",
    "line_with_error",
    "map_texts",
    "open_output",
    "read_line_texts",
    "read_rows",
    "source_name",
]

STANDARD = "-"
TEXT_KEYS = ("content", "value", "text")


def source_name(source: str) -> str:
    """Return the name of the input in messages."""
    return "standard input" if source == STANDARD else source


def read_rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the lines of a file, or of the standard input for "-", one at a time, with a progress bar on a terminal.

    Yields:
        Line number and object.

    Raises:
        ValueError: If the file does not exist, or a line is not a JSON object.
    """
    return ((number, row) for number, _, row in read_line_texts(source))


def read_line_texts(source: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Read lines like `read_rows`: yields line number, text of the line, and object."""
    if source == STANDARD:
        yield from read_lines(sys.stdin.buffer, source_name(source))
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"The input must be a JSON Lines file, got {source}, which does not exist.")
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    with path.open("rb") as file, progress:
        task = progress.add_task(path.name, total=path.stat().st_size)

        def counted() -> Iterator[bytes]:
            for line in file:
                progress.advance(task, len(line))
                yield line

        yield from read_lines(counted(), source)


@contextmanager
def open_output(target: str) -> Iterator[IO[str]]:
    """Open a file for lines, or the standard output for "-". The file is created only if no exception occurs."""
    if target == STANDARD:
        # In UTF-8, like a file, independent of the locale.
        stream = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="\n")
        try:
            yield stream
        finally:
            stream.detach()
        return
    path, part = Path(target), Path(target + ".part")
    if not path.parent.is_dir():
        raise ValueError(f"The output must be in an existing folder, got {target}.")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class SizeFields:
    """The fields with the size of a line's image.

    Args:
        width: Field with the width, or with a list of widths for several images.
        height: Field with the height, or with a list of heights.
        image: Field with the path of the image, or with several. The size is that of the upright image in the
            file, after its EXIF orientation, if a line has no width or height.
        root: Folder that image paths are relative to.
        max_image_pixels: Largest number of pixels of an image file; None for Pillow's limit.
    """

    width: str
    height: str
    image: str
    root: Path
    max_image_pixels: int | None = None

    def paths(self, row: dict[str, Any]) -> list[Path]:
        """Return the paths of the images of a line."""
        given = row.get(self.image, row.get("images"))
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"The field {self.image!r} must contain the path of an image, got {given!r}.")
        return [self.root / name for name in names]

    def size(self, row: dict[str, Any]) -> tuple[int, int] | list[tuple[int, int]]:
        """Return the (width, height) of the image of a line, or a list of them.

        Raises:
            ValueError: If the line has neither valid sizes nor a readable image.
        """
        width, height = row.get(self.width), row.get(self.height)
        if width is None or height is None:
            if not {self.image, "images"} & row.keys():
                fields = f"{self.width!r} and {self.height!r}, or {self.image!r}"
                raise ValueError(f"A line must have the fields {fields}, got {', '.join(row)}.")
            from ..parts.image_files import image_size  # imports transformers, which other lines do not need

            sizes = [image_size(path, self.max_image_pixels) for path in self.paths(row)]
            return sizes[0] if len(sizes) == 1 else sizes
        name = f"({self.width}, {self.height})"
        if isinstance(width, list) and isinstance(height, list) and len(width) == len(height) and width:
            return [check_size(size, name) for size in zip(width, height, strict=True)]
        return check_size((width, height), name)


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every text of a field: a str, or messages with their text under content, value or text.

    Raises:
        ValueError: If the value is neither.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    if isinstance(value, dict):
        keys = [key for key in TEXT_KEYS if isinstance(value.get(key), (str, list))]
        return {**value, **{key: map_texts(value[key], change) for key in keys}}
    raise ValueError(f"Expected a text or a list of messages, got {value!r}.")


def changed_line(line: str, row: dict[str, Any], field: str, change: Callable[[str], str]) -> str:
    """Return a line with `change` applied to the texts of a field, see `map_texts`; no other character changes.

    Args:
        line: The text of the line.
        row: Its object.
        field: A field of the object.
        change: Function of a text.
    """
    map_texts(row[field], str)  # checks the value
    (value,) = (value for key, value in _outer(line).members if json.loads(f'"{key}"') == field)
    pieces, end = [], 0
    for token in _text_tokens(value):
        old = json.loads(token.token)
        new = change(old)
        if new != old:
            written = json.dumps(new, ensure_ascii=token.token.isascii())
            pieces += [line[end : token.start], written]
            end = token.start + len(token.token)
    return _ended("".join([*pieces, line[end:]]))


def line_with_error(line: str, row: dict[str, Any], name: str, error: str) -> str:
    """Return a line with one more field, the last; no other character changes."""
    if name in row:
        return json_line({**row, name: error})
    end = _outer(line).end - 1
    separator = ", " if row else ""
    return _ended(f"{line[:end]}{separator}{json.dumps(name)}: {json.dumps(error, ensure_ascii=False)}{line[end:]}")


def _outer(line: str) -> JsonObject:
    """Return the object of a line, which is known to be JSON, with the positions of its values."""
    *_, outer = objects(line, depth=len(line))
    return outer


def _ended(line: str) -> str:
    return line if line.endswith("\n") else line + "\n"


def _text_tokens(value: object) -> Iterator[JsonString]:
    """Yield the tokens of the texts that `map_texts` changes, in the order of the line."""
    if isinstance(value, JsonString):
        yield value
    elif isinstance(value, JsonList):
        for item in value.items:
            yield from _text_tokens(item)
    elif isinstance(value, JsonObject):
        for key, member in value.members:
            if json.loads(f'"{key}"') in TEXT_KEYS and isinstance(member, (JsonString, JsonList)):
                yield from _text_tokens(member)
