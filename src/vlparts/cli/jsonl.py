"""Lines of JSON for the coordinate commands: where they come from, how large their images are, where they go."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress

from ..coordinates.frames.rules import check_size
from ..coordinates.io.json_lines import read_json_lines

__all__ = ["STANDARD", "SizeFields", "image_size", "map_texts", "read_rows", "source_name", "upright", "written"]

STANDARD = "-"
TEXT_KEYS = ("content", "value", "text")
ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # its values for images whose sides change places


def source_name(source: str) -> str:
    """What messages call a source of lines."""
    return "standard input" if source == STANDARD else source


def read_rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read lines of a file, or of the standard input for "-", one at a time, with progress on a terminal.

    Yields:
        The number of a line and its object.

    Raises:
        ValueError: If there is no such file, or a line is no JSON object.
    """
    if source == STANDARD:
        yield from read_json_lines(sys.stdin.buffer, source_name(source))
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"the input must be a JSON Lines file, got {source}, which is no file")
    console = Console(stderr=True)
    shown = Progress(console=console, transient=True, disable=not console.is_terminal)
    with path.open("rb") as file, shown as progress:
        task = progress.add_task(path.name, total=path.stat().st_size)

        def counted() -> Iterator[bytes]:
            for line in file:
                progress.advance(task, len(line))
                yield line

        yield from read_json_lines(counted(), source)


@contextmanager
def written(target: str) -> Iterator[IO[str]]:
    """Open a file for lines, or the standard output for "-"; a file appears only when all went well."""
    if target == STANDARD:
        # In UTF-8 whatever the terminal's language, as a file would be.
        stream = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="\n")
        try:
            yield stream
        finally:
            stream.detach()
        return
    path, part = Path(target), Path(target + ".part")
    if not path.parent.is_dir():
        raise ValueError(f"the output must lie in a folder that is there, got {target}")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class SizeFields:
    """Where the size of a line's image stands.

    Args:
        width: Field with the width; a list of widths where a line has several images.
        height: Field with the height, or heights.
        image: Field with the path of the image, or several; opened for its size where the fields are not there.
        root: Folder that paths of images are relative to.
    """

    width: str
    height: str
    image: str
    root: Path

    def paths(self, row: dict[str, Any]) -> list[Path]:
        """Paths of the images of a line."""
        given = row.get(self.image, row.get("images"))
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"the field {self.image!r} must hold the path of an image, got {given!r}")
        return [self.root / name for name in names]

    def size(self, row: dict[str, Any]) -> tuple[int, int] | list[tuple[int, int]]:
        """The (width, height) of the image of a line, or a list of them.

        Raises:
            ValueError: If neither the fields nor a readable image are there.
        """
        width, height = row.get(self.width), row.get(self.height)
        if width is None or height is None:
            if not {self.image, "images"} & row.keys():
                fields = f"{self.width!r} and {self.height!r}, or {self.image!r}"
                raise ValueError(f"the size of the image is needed: the fields {fields}; there are {', '.join(row)}")
            sizes = [image_size(path) for path in self.paths(row)]
            return sizes[0] if len(sizes) == 1 else sizes
        name = f"({self.width}, {self.height})"
        if isinstance(width, list) and isinstance(height, list) and len(width) == len(height) and width:
            return [check_size(size, name) for size in zip(width, height, strict=True)]
        return check_size((width, height), name)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file as it is shown: turned by its EXIF orientation.

    Raises:
        ValueError: If it is no image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION) in TURNED
            return (image.height, image.width) if turned else image.size
    except OSError as error:
        raise ValueError(f"cannot read the size of image {path}: {error}") from None


def upright(path: Path) -> Image.Image:
    """Open an image as it is shown: turned by its EXIF orientation, in RGB.

    Raises:
        ValueError: If it is no image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error}") from None


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Change every text of a field: a str, or a list of messages with their text under content, value or text.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    if isinstance(value, dict):
        keys = [key for key in TEXT_KEYS if isinstance(value.get(key), (str, list))]
        return {**value, **{key: map_texts(value[key], change) for key in keys}}
    raise ValueError(f"expected a text or a list of messages, got {value!r}")
