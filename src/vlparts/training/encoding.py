"""Encoding of training records to token ids, labels and image tensors."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from ..coordinates.codec import encode
from ..coordinates.formats.registry import as_seen
from ..documents.pages import DPI, MAX_IMAGE_PIXELS, open_page, page_size
from ..parts.processing_vlm import VisionLanguageProcessor
from ..parts.utils import IGNORE_INDEX
from .chat_tokens import ChatTokenizer, Tokens
from .record_images import RecordImage, open_record_image, record_image_size, shown_image
from .records import ImageBlock, Message, PageRecord, Record, RegionBlock, TextBlock

_MAX_COUNTS = 2**14  # sizes of images whose number of tokens is kept


@dataclass(frozen=True)
class Sample:
    """An encoded record.

    Args:
        input_ids: `(S,)` int64, with one placeholder token per image feature.
        labels: `(S,)` int64, -100 outside the assistant turns.
        images: Output of the image processor: tensors with one or more rows per image; empty without images.
        weight: Weight of the record in the loss.
        image_count: Number of images.
        task: Index of the file of the record among several.
    """

    input_ids: Tensor
    labels: Tensor
    images: dict[str, Tensor]
    weight: float = 1.0
    image_count: int = 0
    task: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


class Measured(NamedTuple):
    """The lengths of an encoded record.

    Attributes:
        length: Length of the sample: its tokens, or for a dual encoder patches and tokens.
        image_tokens: How many of them are of images.
        targets: Number of tokens with loss.
    """

    length: int
    image_tokens: int
    targets: int


def join_images(images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the inputs of images along dimension 0; {} without images.

    Images with `spatial_shapes`, `(n, C, H, W)` of different sizes, are padded with 0 at the bottom and the right.

    Raises:
        ValueError: If outputs differ in their names.
    """
    if not images:
        return {}
    for one in images:
        if one.keys() != images[0].keys():
            raise ValueError(
                f"Outputs of an image processor must have the same names, got {[*images[0]]} and {[*one]}."
            )
    joined = {name: [one[name] for one in images] for name in images[0]}
    if "spatial_shapes" in joined and images[0]["pixel_values"].ndim == 4:
        height, width = (max(one["pixel_values"].shape[side] for one in images) for side in (-2, -1))
        joined["pixel_values"] = [
            pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2])) for one in joined["pixel_values"]
        ]
    if "image_keep_index" in joined:  # indices in the patches of all images
        totals = [int(one["image_grid_thw"].prod(-1).sum()) for one in images]
        starts = accumulate(totals, initial=0)
        joined["image_keep_index"] = [
            kept + start for kept, start in zip(joined["image_keep_index"], starts, strict=False)
        ]
    return {name: torch.cat(values) for name, values in joined.items()}


class SampleEncoder:
    """Encode records with a processor.

    Args:
        processor: The composed model's processor.
        root: Folder that relative image paths are resolved against.
        on_outside: Policy for a region outside its image, or what the image processor shows of it: "raise", "clamp" it
            to the edge, or "skip" it.
        coordinate_format: Name of a coordinate format; None for the default. See [`as_seen`] for image processors
            that crop.
        max_length: Maximum length of a sample in tokens. Longer samples raise; nothing is truncated.
        max_image_pixels: Largest number of pixels of an image file or a page, see [`open_image`]; None for Pillow's
            limit.
        dpi: Dots per inch at which pages of PDF files are drawn.
        template: "chat" for the processor's chat template, or "continuation" for the contents of the turns one after
            another: images as their placeholders, texts of the user and the system with a line break after them, and
            those of the assistant with the tokenizer's `eos_token`.
        prompts: Texts of the user for records without one.
        seed: Seed of the choice of the prompt of a record.

    Raises:
        ValueError: If `on_outside`, `coordinate_format` or `template` is unknown.
    """

    def __init__(
        self,
        processor: VisionLanguageProcessor,
        root: Path,
        on_outside: str = "raise",
        coordinate_format: str | None = None,
        max_length: int | None = None,
        max_image_pixels: int | None = None,
        dpi: float = DPI,
        template: str = "chat",
        prompts: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        encode([], (1, 1), coordinate_format, on_outside=on_outside)  # raises for an unknown policy or format
        self.processor = processor
        self.root = root
        self.on_outside = on_outside
        self.coordinate_format = coordinate_format
        self.format = as_seen(coordinate_format, processor)
        self.max_length = max_length
        self.max_image_pixels = max_image_pixels
        self.dpi = dpi
        self.prompts = prompts
        self.seed = seed
        self.template = template
        self.chat = ChatTokenizer(processor, template)
        self._counts: dict[tuple[int, int], int] = {}

    def __call__(self, record: Record | PageRecord, number: int = 0) -> Sample:
        """Encode one record.

        Args:
            record: The record.
            number: Number of its line, by which a prompt is chosen.

        Raises:
            ValueError: If an image or page cannot be read or processed, a region is outside its image under "raise",
                the template rewrites earlier turns, or the sample is longer than `max_length`.
        """
        images = [self.open(record, one) for one in record.all_images]
        inputs = [self.process(image, one) for image, one in zip(images, record.all_images, strict=True)]
        return self.encode(self.render(record, [image.size for image in images], self._prompt(record, number)), inputs)

    def encode(self, messages: list[dict[str, Any]], inputs: Sequence[dict[str, Tensor]]) -> Sample:
        """Encode chat messages up to the last turn of the assistant.

        Args:
            messages: Messages for the chat template, with lists of blocks as contents; see [`render`].
            inputs: Output of the image processor for each image, in the order of the image blocks.

        Raises:
            ValueError: As for records.
        """
        counts = [self.processor.count_image_tokens(one, 0) for one in inputs]
        (tokens,) = self.chat([messages])
        measured = self._measured(tokens, counts)
        if isinstance(tokens, ValueError):
            raise tokens
        if isinstance(measured, ValueError):
            raise measured
        if self.max_length is not None and measured.length > self.max_length:
            raise self.too_long(measured.length, measured.image_tokens)
        ids, labels = self._expand(tokens, counts)
        return Sample(torch.tensor(ids), torch.tensor(labels), join_images(inputs), image_count=len(inputs))

    def measure(self, records: Sequence[tuple[Record | PageRecord, int]]) -> list[Measured | ValueError]:
        """The lengths of encoded records, from the sizes in the headers of their images; no pixels are read.

        `max_length` is not considered. Errors of pixels are found when a record is encoded.

        Args:
            records: Records with the numbers of their lines.

        Returns:
            For each record its lengths, or the error that it would have.
        """
        chats: list[list[dict[str, Any]]] = []
        found: list[list[int] | ValueError] = []
        for record, number in records:
            try:
                sizes = [self._size(record, one) for one in record.all_images]
                counts = [self._count(one, size) for one, size in zip(record.all_images, sizes, strict=True)]
                chats.append(self.render(record, sizes, self._prompt(record, number)))
                found.append(counts)
            except ValueError as error:
                found.append(error)
        tokens = iter(self.chat(chats))
        return [one if isinstance(one, ValueError) else self._measured(next(tokens), one) for one in found]

    def too_long(self, length: int, image_tokens: int) -> ValueError:
        """The error of a sample that is longer than `max_length`."""
        return ValueError(
            f"The sample has {length} tokens ({image_tokens} of them for images); expected at most "
            f"{self.max_length}. Raise `capacity` or use smaller images."
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What lengths depend on beside the processor and the records, as JSON data."""
        names = ("on_outside", "max_image_pixels", "dpi", "template", "seed")
        prompts = {"prompts": [*self.prompts], "pillow_limit": Image.MAX_IMAGE_PIXELS}
        return {name: getattr(self, name) for name in names} | prompts | {"format": self.coordinate_format}

    def open(self, record: Record | PageRecord, image: RecordImage) -> Image.Image:
        """Open an image of a record, or draw its page.

        Raises:
            ValueError: If it cannot be read.
        """
        if isinstance(record, PageRecord) and isinstance(image, str) and not image.startswith("data:"):
            return open_page(self.root / image, record.page_number, dpi=self.dpi, max_image_pixels=self._page_limit)
        return open_record_image(image, self.root, self.max_image_pixels)

    def _size(self, record: Record | PageRecord, image: RecordImage) -> tuple[int, int]:
        if isinstance(record, PageRecord) and isinstance(image, str) and not image.startswith("data:"):
            return page_size(self.root / image, record.page_number, dpi=self.dpi, max_image_pixels=self._page_limit)
        return record_image_size(image, self.root, self.max_image_pixels)

    @property
    def _page_limit(self) -> int:
        return MAX_IMAGE_PIXELS if self.max_image_pixels is None else self.max_image_pixels

    def process(self, image: Image.Image, given: RecordImage | None = None) -> dict[str, Tensor]:
        """Return the output of the image processor for one image; an error names what was `given` for it."""
        try:
            return self.processor.process_image(image)
        except ValueError as error:
            shown = "of the record" if given is None else shown_image(given, self.root)
            raise ValueError(f"Image {shown} cannot be processed: {error}") from None

    def _count(self, given: RecordImage, size: tuple[int, int]) -> int:
        """Number of tokens of an image of this width and height."""
        if size not in self._counts:
            try:
                counts = self.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])
            except ValueError as error:
                raise ValueError(f"Image {shown_image(given, self.root)} cannot be processed: {error}") from None
            if len(self._counts) == _MAX_COUNTS:
                self._counts.clear()
            (self._counts[size],) = counts["num_image_tokens"]
        return self._counts[size]

    def _measured(self, tokens: Tokens | ValueError, counts: list[int]) -> Measured | ValueError:
        if isinstance(tokens, ValueError):
            return tokens
        placeholders = tokens.ids.count(self.processor.image_token_id)
        if placeholders > len(counts):
            return ValueError(
                f"The conversation has {placeholders} {self.processor.image_token} tokens for {len(counts)} images."
            )
        if placeholders < len(counts):
            return ValueError(
                f"The chat template placed {placeholders} of {len(counts)} images before the last assistant turn; "
                "expected all of them."
            )
        if not any(tokens.in_loss):
            return ValueError("The assistant turns are empty; expected at least one token to train on.")
        length = len(tokens.ids) - placeholders + sum(counts)
        return Measured(length, sum(counts), sum(tokens.in_loss) - tokens.in_loss[0])

    def _prompt(self, record: Record | PageRecord, number: int) -> str | None:
        """One of `prompts`; None without any, and for a record that has a text of the user."""
        if not self.prompts or _has_user_text(record):
            return None
        return random.Random(f"{self.seed}-{number}").choice(self.prompts)

    def render(
        self, record: Record | PageRecord, sizes: list[tuple[int, int]], prompt: str | None = None
    ) -> list[dict[str, Any]]:
        """Convert a record to chat messages, with regions written as text and images as blocks.

        Args:
            record: The record.
            sizes: Width and height of each image in pixels.
            prompt: Text at the end of the first turn of the user, or the prompt of a page after its image.

        Returns:
            Messages for the chat template.
        """
        if isinstance(record, PageRecord):
            asked = record.user_content if prompt is None else [{"type": "image"}, _text(prompt)]
            answer = [_text(record.answer(sizes[0], self.on_outside))]
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        placed = any(isinstance(block, ImageBlock) for message in record.messages for block in message.content)
        first_user = next((m for m in record.messages if m.role == "user"), None)
        chat = []
        for message in record.messages:
            blocks: list[dict[str, Any]] = []
            if message is first_user and not placed:
                blocks += [{"type": "image"}] * len(sizes)
            blocks += self._blocks(message, sizes)
            if message is first_user and prompt is not None:
                blocks.append(_text(prompt))
            chat.append({"role": message.role, "content": blocks})
        return chat

    def _blocks(self, message: Message, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """Text and image blocks of a message; consecutive regions of one image are encoded together."""
        blocks: list[dict[str, Any]] = []
        after_region = False
        for index, group in groupby(message.content, key=_image_index):
            members = list(group)
            regions = [block.region() for block in members if isinstance(block, RegionBlock)]
            if not regions:
                blocks += [_text_or_image(block) for block in members]
                after_region = False
                continue
            text = encode(regions, sizes[index], self.format, on_outside=self.on_outside)
            separator = self.format.separator if after_region and text else ""
            blocks.append(_text(separator + text))
            after_region = bool(text)
        return blocks

    def _expand(self, tokens: Tokens, counts: list[int]) -> tuple[list[int], list[int]]:
        """Repeat each image placeholder once per image feature, and derive the labels."""
        remaining = iter(counts)
        repeats = [next(remaining) if one == self.processor.image_token_id else 1 for one in tokens.ids]
        labels = [one if counted else IGNORE_INDEX for one, counted in zip(tokens.ids, tokens.in_loss, strict=True)]
        return list(_repeat(tokens.ids, repeats)), list(_repeat(labels, repeats))


def _has_user_text(record: Record | PageRecord) -> bool:
    """Whether the user says something, or there is no turn in which they could."""
    if isinstance(record, PageRecord):
        return record.prompt is not None
    users = [message for message in record.messages if message.role == "user"]
    blocks = [block for message in users for block in message.content if not isinstance(block, ImageBlock)]
    return not users or any(isinstance(one, RegionBlock) or bool(one.text.strip()) for one in blocks)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image_index(block: TextBlock | ImageBlock | RegionBlock) -> int:
    """Index of the image that a region refers to; -1 for other blocks."""
    return block.image if isinstance(block, RegionBlock) else -1


def _text_or_image(block: TextBlock | ImageBlock | RegionBlock) -> dict[str, Any]:
    return _text(block.text) if isinstance(block, TextBlock) else {"type": "image"}


def _repeat(values: list[int], repeats: list[int]) -> Iterator[int]:
    for value, count in zip(values, repeats, strict=True):
        yield from [value] * count
