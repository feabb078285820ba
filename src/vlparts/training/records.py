"""Training records: one JSON object per line of a file, validated line by line."""

import codecs
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from ..coordinates.io.json_lines import parse_object
from ..coordinates.regions import Region
from ..documents import DEEPSEEK_OCR_PROMPTS, write_page
from ..documents import Block as AnswerBlock
from ..documents.recognition import prompt_content
from .record_formats import SCORES, convert_record
from .record_images import RecordImage, image_of
from .weighted_inputs import checked_weight


class RecordError(ValueError):
    """An invalid record; the message names the file, the line and the reason."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Number = Annotated[float, Field(strict=True)]  # refuses strings and bools
_Box = tuple[_Number, _Number, _Number, _Number]
_Image = Annotated[RecordImage, PlainValidator(image_of)]


class TextBlock(_Strict):
    """A piece of text."""

    type: Literal["text"] = "text"
    text: str


class ImageBlock(_Strict):
    """Marks the position of the next image in the conversation."""

    type: Literal["image"] = "image"


class RegionBlock(_Strict):
    """A region of an image, in pixels: a box `[x1, y1, x2, y2]` or a point `[x, y]`.

    `image` is the index of that image in the record. `attributes` are names with JSON values, for formats that have a
    place for them.
    """

    label: str | None = None
    box: _Box | None = None
    point: tuple[_Number, _Number] | None = None
    image: int = Field(default=0, ge=0, strict=True)
    attributes: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_region(self) -> "RegionBlock":
        if (self.box is None) == (self.point is None):
            raise ValueError("A region must have either 'box' or 'point', got both or neither.")
        self.region()
        return self

    def region(self) -> Region:
        """The region in pixels."""
        if self.box is not None:
            return Region.box(*self.box, label=self.label, attributes=self.attributes)
        return Region.point(*self.point, label=self.label, attributes=self.attributes)  # type: ignore[misc]


def _block(value: Any) -> Any:
    """Choose the type of a block by its keys, so that errors refer to one type only."""
    if isinstance(value, str):
        return TextBlock(text=value)
    if isinstance(value, dict):
        if "box" in value or "point" in value or "label" in value:
            return RegionBlock(**value)
        if value.get("type") == "image":
            return ImageBlock(**value)
        return TextBlock(**value)
    raise ValueError(f"Expected a text, an image, a box or a point, got {reprlib.repr(value)}.")


Block = Annotated[TextBlock | ImageBlock | RegionBlock, BeforeValidator(_block)]


class Message(_Strict):
    """One turn; its content is a string, a block, or a list of both."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        tuple[Block, ...],
        BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else [value]),
    ]


class Record(_Strict):
    """A conversation about images: `{"image": path, "messages": [...]}`, or `"images": [paths]` for several.

    A path may also be a base64 `data:` URI, or an image in memory: the bytes of a file, or a Pillow image.

    Without `{"type": "image"}` blocks, all images are placed at the start of the first user turn.
    """

    image: _Image | None = None
    images: tuple[_Image, ...] = ()
    messages: tuple[Message, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Record":
        if self.image is not None and self.images:
            raise ValueError("A record must have either 'image' or 'images', got both.")
        if not any(message.role == "assistant" for message in self.messages):
            raise ValueError("A record must have an assistant turn, got none.")
        count = len(self.all_images)
        for message in self.messages:
            for block in message.content:
                if isinstance(block, RegionBlock) and block.image >= count:
                    raise ValueError(f"A region refers to image {block.image}, but the record has {count} images.")
        placed = sum(isinstance(block, ImageBlock) for message in self.messages for block in message.content)
        if placed not in (0, count):
            raise ValueError(f"The record has {placed} image blocks for {count} images; expected 0 or {count}.")
        if count and not placed and not any(message.role == "user" for message in self.messages):
            raise ValueError("The record has no user turn to place its images in; add image blocks.")
        return self

    @property
    def all_images(self) -> tuple[RecordImage, ...]:
        """All images as in the record."""
        return (self.image,) if self.image is not None else self.images


class PageBlock(_Strict):
    """A part of a page: its type, such as "title" or "table", its box or boxes in pixels of the page, and its text."""

    type: str
    box: _Box | None = None
    boxes: tuple[_Box, ...] = ()
    text: str = ""

    @model_validator(mode="after")
    def _has_boxes(self) -> "PageBlock":
        if (self.box is None) == (not self.boxes):
            raise ValueError("A block must have either 'box' or 'boxes', got both or neither.")
        self.regions()
        return self

    def regions(self) -> tuple[Region, ...]:
        """The boxes in pixels."""
        return tuple(Region.box(*box) for box in self.boxes or (self.box,))  # type: ignore[misc]


class PageRecord(_Strict):
    """A page and its Markdown, for document models: `{"page": path, "markdown": "..."}`.

    `page` is an image or a PDF file, `page_number`, from 1, its page, which may be left out if it has only one. An
    image may also be a `data:` URI or in memory.
    `blocks` are the Markdown with boxes. Both may be given if they have the same text, apart from whitespace.

    `prompt` has the placeholder "<image>". The default is DeepSeek-OCR's for Markdown with boxes or without, see
    `vlparts.documents.DEEPSEEK_OCR_PROMPTS`.
    """

    page: _Image
    page_number: int | None = Field(default=None, ge=1, strict=True)
    markdown: str | None = None
    blocks: tuple[PageBlock, ...] | None = Field(default=None, min_length=1)
    prompt: str | None = None

    @field_validator("markdown")
    @classmethod
    def _check_markdown(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("The Markdown is empty.")
        return value

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: str | None) -> str | None:
        if value is not None:
            prompt_content(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "PageRecord":
        if self.page_number is not None and (not isinstance(self.page, str) or self.page.startswith("data:")):
            given = "a data: URI" if isinstance(self.page, str) else "an image in memory"
            raise ValueError(f"'page_number' requires the path of a file as 'page', got {given}.")
        if self.markdown is None and self.blocks is None:
            raise ValueError("A record of a page must have 'markdown' or 'blocks', got neither.")
        if self.markdown is not None and self.blocks is not None:
            ours, theirs = ("".join(text.split()) for text in (self.markdown, "".join(b.text for b in self.blocks)))
            if ours != theirs:
                same = len(os.path.commonprefix([ours, theirs]))
                raise ValueError(
                    "'markdown' and the texts of 'blocks' must be the same apart from whitespace, got "
                    f"{ours[same : same + 30]!r} and {theirs[same : same + 30]!r} after {same} characters; leave one "
                    "of the two out."
                )
        return self

    @property
    def all_images(self) -> tuple[RecordImage]:
        """The page as in the record."""
        return (self.page,)

    @property
    def user_content(self) -> list[dict[str, Any]]:
        """The turn of the user for a chat template: the prompt with the image."""
        default = DEEPSEEK_OCR_PROMPTS["free" if self.blocks is None else "markdown"]
        return prompt_content(default if self.prompt is None else self.prompt)

    def answer(self, page_size: tuple[int, int], on_outside: str = "raise") -> str:
        """Write the answer: the Markdown, or the blocks with marks in DeepSeek-OCR's format.

        The text of a block begins on the line after its mark, and an empty line precedes the next mark, whatever the
        line breaks around it in the record.

        Args:
            page_size: Width and height of the page in pixels.
            on_outside: Policy for a box that leaves the page, as for `vlparts.documents.write_page`.

        Raises:
            ValueError: If a box leaves the page under "raise", no block is left, or a text has marks.
        """
        if self.blocks is None:
            return self.markdown or ""
        texts = [block.text.strip("\n") for block in self.blocks]
        blocks = [
            AnswerBlock(block.type, block.regions(), f"\n{text}\n\n" if text else "\n\n", 0)
            for block, text in zip(self.blocks, texts, strict=True)
        ]
        answer = write_page(blocks, page_size, on_outside=on_outside).removesuffix("\n\n")
        if not answer:
            raise ValueError("No block has a box inside the page; expected at least one.")
        return answer


@dataclass(frozen=True)
class Line:
    """A record with its line number.

    Args:
        number: Line number, from 1.
        record: The record.
        weight: Its loss weight, if it has one.
        scores: The scores that `vlparts data filter` gave it, if any; not used in training.
    """

    number: int
    record: Record | PageRecord
    weight: float | None = None
    scores: dict[str, Any] | None = None


@dataclass
class RecordFile:
    """The valid records of a file, and the errors of those that were skipped."""

    path: Path
    lines: list[Line] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def error(self, number: int, reason: object) -> RecordError:
        """Return the error of a line of this file."""
        return RecordError(f"{self.path}, line {number}: {reason}")

    def empty_error(self) -> RecordError:
        """Return the error of a file without a valid record."""
        first = f" First skipped: {self.skipped[0]}" if self.skipped else ""
        return RecordError(
            f"{self.path}: expected at least one valid record, got none ({len(self.skipped)} skipped).{first}"
        )


def read_records(
    path: str | Path, on_error: str = "raise", argument: str = "data", sample_weight_field: str | None = None
) -> RecordFile:
    """Read a file of records.

    Args:
        path: A JSON Lines file. Empty lines are ignored. Each line is a [`Record`], a [`PageRecord`], or in the shape
            of OpenAI, ShareGPT or LLaVA; see [`convert_record`].
        on_error: "raise" on the first invalid record, or "skip" it and append the reason to `skipped`.
        argument: Name of `path` in error messages.
        sample_weight_field: Name of a further field that records may have: their loss weight, a finite number of at
            least 0.

    Returns:
        The records with their line numbers.

    Raises:
        RecordError: If a record is invalid and `on_error` is "raise", or if no record is valid.
        ValueError: If `on_error` is unknown or the file does not exist.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"`on_error` must be 'raise' or 'skip', got {on_error!r}.")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{argument}` must be a JSON Lines file, got {path}, which is not a file.")
    found = RecordFile(path)
    for number, text in numbered_lines(path):
        try:
            found.lines.append(Line(number, *parse_fields(parse_object(text), sample_weight_field)))
        except (ValueError, RecursionError) as error:
            reason = "The JSON is nested too deeply." if isinstance(error, RecursionError) else error
            if on_error == "raise":
                raise found.error(number, reason) from None
            found.skipped.append(str(found.error(number, reason)))
    if not found.lines:
        raise found.empty_error()
    return found


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and bytes of each non-empty line; decoded later, so that invalid bytes fail per line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def parse_fields(
    fields: dict[str, Any], sample_weight_field: str | None = None
) -> tuple[Record | PageRecord, float | None, dict[str, Any] | None]:
    """Return the record of a JSON object, its loss weight, and its scores.

    Raises:
        ValueError: If it is not a record, or has an invalid weight or scores; names the field.
    """
    weight = None
    if sample_weight_field is not None and sample_weight_field in fields:
        weight = checked_weight(fields.pop(sample_weight_field), sample_weight_field)
    scores = pop_scores(fields)
    return parse_record(fields), weight, scores


def pop_scores(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the scores of `vlparts data filter` from the fields of a record and return them; None without scores.

    Raises:
        ValueError: If they are not an object.
    """
    if SCORES not in fields:
        return None
    scores = fields.pop(SCORES)
    if not isinstance(scores, dict):
        raise ValueError(f"{SCORES}: Expected an object, got {type(scores).__name__}.")
    return scores


def parse_record(fields: dict[str, Any]) -> Record | PageRecord:
    """Return the record of a JSON object in any of the shapes.

    Raises:
        ValueError: If it is not a record; names the field.
    """
    kind = PageRecord if "page" in fields else Record
    try:
        return kind.model_validate(convert_record(fields))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{field + ': ' if field else ''}{first['msg'].removeprefix('Value error, ')}") from None
