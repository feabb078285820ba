"""The training records: one JSON object for each line of a file, checked line by line."""

import codecs
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..coordinates.io.json_lines import parse_object
from ..coordinates.regions import Region
from .weighted_inputs import checked_weight


class RecordError(ValueError):
    """A record that cannot be used; the message names the file, the line and the reason."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Number = Annotated[float, Field(strict=True)]  # neither text nor a bool passes for a number


class TextBlock(_Strict):
    """A piece of text."""

    type: Literal["text"] = "text"
    text: str


class ImageBlock(_Strict):
    """The place of the next image in the conversation."""

    type: Literal["image"] = "image"


class RegionBlock(_Strict):
    """A place in an image, in pixels: a box `[x1, y1, x2, y2]` or a point `[x, y]`.

    `image` is the index of the image in the record that the place lies in.
    """

    label: str | None = None
    box: tuple[_Number, _Number, _Number, _Number] | None = None
    point: tuple[_Number, _Number] | None = None
    image: int = Field(default=0, ge=0, strict=True)

    @model_validator(mode="after")
    def _one_region(self) -> "RegionBlock":
        if (self.box is None) == (self.point is None):
            raise ValueError("needs either a 'box' or a 'point'")
        self.region()
        return self

    def region(self) -> Region:
        """The region in pixels."""
        if self.box is not None:
            return Region.box(*self.box, label=self.label)
        return Region.point(*self.point, label=self.label)  # type: ignore[misc]


def _block(value: Any) -> Any:
    """Choose the block by its keys, so that an error speaks of one kind of block and not of all."""
    if isinstance(value, str):
        return TextBlock(text=value)
    if isinstance(value, dict):
        if "box" in value or "point" in value or "label" in value:
            return RegionBlock(**value)
        if value.get("type") == "image":
            return ImageBlock(**value)
        return TextBlock(**value)
    raise ValueError(f"expected a text, an image, a box or a point, got {reprlib.repr(value)}")


Block = Annotated[TextBlock | ImageBlock | RegionBlock, BeforeValidator(_block)]


class Message(_Strict):
    """One turn: a string, one block, or a list of strings and blocks."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        tuple[Block, ...],
        BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else [value]),
    ]


class Record(_Strict):
    """A conversation about images: `{"image": path, "messages": [...]}`, or `"images": [paths]` for several.

    Images whose place no `{"type": "image"}` block says stand at the start of the first user turn.
    """

    image: str | None = None
    images: tuple[str, ...] = ()
    messages: tuple[Message, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Record":
        if self.image is not None and self.images:
            raise ValueError("give either 'image' or 'images', not both")
        if not any(message.role == "assistant" for message in self.messages):
            raise ValueError("no assistant turn, so there is nothing to learn")
        count = len(self.paths)
        for message in self.messages:
            for block in message.content:
                if isinstance(block, RegionBlock) and block.image >= count:
                    raise ValueError(f"a region lies in image {block.image}, but there are {count} images")
        placed = sum(isinstance(block, ImageBlock) for message in self.messages for block in message.content)
        if placed not in (0, count):
            raise ValueError(f"{placed} image blocks for {count} images")
        if count and not placed and not any(message.role == "user" for message in self.messages):
            raise ValueError("no user turn that the images could stand in; place them with image blocks")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all images, as written in the record."""
        return (self.image,) if self.image is not None else self.images


@dataclass(frozen=True)
class Line:
    """A record and where it stands.

    Args:
        number: Number of the line, from 1.
        record: What it says.
        weight: Its weight in the loss, if it has one.
    """

    number: int
    record: Record
    weight: float | None = None


@dataclass
class RecordFile:
    """The usable records of a file, and what was left out."""

    path: Path
    lines: list[Line] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def error(self, number: int, reason: object) -> RecordError:
        """The error for a line of this file."""
        return RecordError(f"{self.path}, line {number}: {reason}")

    def nothing_left(self) -> RecordError:
        """The error for a file without a usable record."""
        first = f", the first: {self.skipped[0]}" if self.skipped else ""
        return RecordError(
            f"{self.path}: no usable record ({len(self.skipped)} skipped{first}); expected at least one."
        )


def read_records(
    path: str | Path, on_error: str = "raise", argument: str = "data", sample_weight_field: str | None = None
) -> RecordFile:
    """Read a file of records.

    Args:
        path: A JSON Lines file. Empty lines are passed over.
        on_error: "raise" on the first broken record, or "skip" it and keep the reason in `skipped`.
        argument: What the error message calls `path`.
        sample_weight_field: Name of a further field that records may have: their weight in the loss, a finite number
            of at least 0.

    Returns:
        The records with their line numbers.

    Raises:
        RecordError: If a record is broken and `on_error` is "raise", or if no record is left.
        ValueError: If `on_error` is unknown or the file does not exist.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"`on_error` must be 'raise' or 'skip', got {on_error!r}.")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{argument}` must be a JSON Lines file, got {path}, which is no file.")
    found = RecordFile(path)
    for number, text in _numbered(path):
        try:
            found.lines.append(Line(number, *_parse(text, sample_weight_field)))
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            if on_error == "raise":
                raise found.error(number, reason) from None
            found.skipped.append(str(found.error(number, reason)))
    if not found.lines:
        raise found.nothing_left()
    return found


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, undecoded, so that broken bytes are an error of their own line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def _parse(line: bytes, sample_weight_field: str | None) -> tuple[Record, float | None]:
    fields = parse_object(line)
    weight = None
    if sample_weight_field is not None and sample_weight_field in fields:
        weight = checked_weight(fields.pop(sample_weight_field), sample_weight_field)
    try:
        return Record.model_validate(fields), weight
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}") from None
