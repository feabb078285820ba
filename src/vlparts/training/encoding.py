"""Encoding of training records to token ids, labels and image tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from torch import Tensor

from ..coordinates.codec import encode
from ..coordinates.formats.registry import as_seen
from ..parts.image_files import open_image
from ..parts.processing_vlm import VisionLanguageProcessor
from ..parts.utils import IGNORE_INDEX
from .records import ImageBlock, Message, Record, RegionBlock, TextBlock


@dataclass(frozen=True)
class Sample:
    """An encoded record.

    Args:
        input_ids: `(S,)` int64, with one placeholder token per image feature.
        labels: `(S,)` int64, -100 outside the assistant turns.
        images: Output of the image processor: tensors with one or more rows per image; empty without images.
        weight: Weight of the record in the loss.
    """

    input_ids: Tensor
    labels: Tensor
    images: dict[str, Tensor]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.input_ids)


def join_images(images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate outputs of an image processor along dimension 0; {} without images."""
    return {name: torch.cat([one[name] for one in images]) for name in images[0]} if images else {}


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
        max_image_pixels: Largest number of pixels of an image file, see [`open_image`]; None for Pillow's limit.

    Raises:
        ValueError: If `on_outside` or `coordinate_format` is unknown.
    """

    def __init__(
        self,
        processor: VisionLanguageProcessor,
        root: Path,
        on_outside: str = "raise",
        coordinate_format: str | None = None,
        max_length: int | None = None,
        max_image_pixels: int | None = None,
    ) -> None:
        encode([], (1, 1), coordinate_format, on_outside=on_outside)  # raises for an unknown policy or format
        self.processor = processor
        self.root = root
        self.on_outside = on_outside
        self.format = as_seen(coordinate_format, processor)
        self.max_length = max_length
        self.max_image_pixels = max_image_pixels

    def __call__(self, record: Record) -> Sample:
        """Encode one record.

        Raises:
            ValueError: If an image cannot be read or processed, a region is outside its image under "raise", the
                template rewrites earlier turns, or the sample is longer than `max_length`.
        """
        images = [open_image(self.root / path, max_image_pixels=self.max_image_pixels) for path in record.paths]
        inputs = [self._process(*pair) for pair in zip(record.paths, images, strict=True)]
        counts = [self.processor.count_image_tokens(one, 0) for one in inputs]
        messages = self.render(record, [image.size for image in images])
        ids, labels = self._tokenize(messages, counts)
        if all(label == IGNORE_INDEX for label in labels):
            raise ValueError("The assistant turns are empty; expected at least one token to train on.")
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"The sample has {len(ids)} tokens ({sum(counts)} of them for images); expected at most "
                f"{self.max_length}. Raise `capacity` or use smaller images."
            )
        return Sample(torch.tensor(ids), torch.tensor(labels), join_images(inputs))

    def _process(self, path: str, image: Image.Image) -> dict[str, Tensor]:
        try:
            return dict(self.processor.image_processor(image, return_tensors="pt"))
        except ValueError as error:
            raise ValueError(f"Image {self.root / path} cannot be processed: {error}") from None

    def render(self, record: Record, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """Convert a record to chat messages, with regions written as text and images as blocks.

        Args:
            record: The record.
            sizes: Width and height of each image in pixels.

        Returns:
            Messages for the chat template.
        """
        placed = any(isinstance(block, ImageBlock) for message in record.messages for block in message.content)
        first_user = next((m for m in record.messages if m.role == "user"), None)
        chat = []
        for message in record.messages:
            blocks: list[dict[str, Any]] = []
            if message is first_user and not placed:
                blocks += [{"type": "image"}] * len(sizes)
            blocks += self._blocks(message, sizes)
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
            blocks.append({"type": "text", "text": separator + text})
            after_region = bool(text)
        return blocks

    def _tokenize(self, messages: list[dict[str, Any]], counts: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and labels; the ids before each answer equal those of the generation prompt."""
        ids: list[int] = []
        in_loss: list[bool] = []
        text = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render_template(messages[:index], add_generation_prompt=True)
            answered = self._render_template(messages[: index + 1])
            if not prompt.startswith(text) or not answered.startswith(prompt):
                raise ValueError(
                    "The chat template rewrites earlier turns, so the assistant tokens cannot be located."
                )
            ids += self._continuation_ids(ids, text, prompt)
            answer = self._continuation_ids(ids, prompt, answered)
            in_loss += [False] * (len(ids) - len(in_loss)) + self._loss_mask(answer)
            ids += answer
            text = answered
        return self._expand(ids, in_loss, counts)

    def _render_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            # As a batch: the empty list before a first assistant turn is not accepted as a single conversation.
            return self.processor.apply_chat_template(
                [messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )[0]
        except TemplateError as error:
            raise ValueError(f"The chat template cannot render the conversation: {error}") from None

    def _continuation_ids(self, ids: list[int], start: str, text: str) -> list[int]:
        """Token ids of the part of `text` after its prefix `start`, whose ids are `ids`.

        The whole text is tokenized, since tokenizers may encode the first word of a text differently and add a BOS
        token. The rest is tokenized alone only if a token would span the end of `start`.
        """
        tokenizer = self.processor.tokenizer
        # The same condition as in ProcessorMixin.apply_chat_template.
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        full_ids = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        if full_ids[: len(ids)] == ids:
            return full_ids[len(ids) :]
        return tokenizer(text[len(start) :], add_special_tokens=False)["input_ids"]

    def _loss_mask(self, answer: list[int]) -> list[bool]:
        """True for the tokens of an answer up to and including EOS, except image placeholders."""
        end = self.processor.tokenizer.eos_token_id
        length = len(answer) - answer[::-1].index(end) if end in answer else len(answer)
        return [index < length and token != self.processor.image_token_id for index, token in enumerate(answer)]

    def _expand(self, ids: list[int], in_loss: list[bool], counts: list[int]) -> tuple[list[int], list[int]]:
        """Repeat each image placeholder once per image feature, and derive the labels."""
        token = self.processor.image_token_id
        placeholders = ids.count(token)
        if placeholders > len(counts):
            raise ValueError(
                f"The conversation has {placeholders} {self.processor.image_token} tokens for {len(counts)} images."
            )
        if placeholders < len(counts):
            raise ValueError(
                f"The chat template placed {placeholders} of {len(counts)} images before the last assistant turn; "
                "expected all of them."
            )
        remaining = iter(counts)
        repeats = [next(remaining) if one == token else 1 for one in ids]
        labels = [one if counted else IGNORE_INDEX for one, counted in zip(ids, in_loss, strict=True)]
        return list(_repeat(ids, repeats)), list(_repeat(labels, repeats))


def _image_index(block: TextBlock | ImageBlock | RegionBlock) -> int:
    """Index of the image that a region refers to; -1 for other blocks."""
    return block.image if isinstance(block, RegionBlock) else -1


def _text_or_image(block: TextBlock | ImageBlock | RegionBlock) -> dict[str, Any]:
    return {"type": "text", "text": block.text} if isinstance(block, TextBlock) else {"type": "image"}


def _repeat(values: list[int], repeats: list[int]) -> Iterator[int]:
    for value, count in zip(values, repeats, strict=True):
        yield from [value] * count
