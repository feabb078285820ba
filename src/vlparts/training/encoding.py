"""Records to token ids, labels and image patches."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..parts.coordinates import encode
from ..parts.processing_vlm import VisionLanguageProcessor
from .records import ImageBlock, Message, Record, RegionBlock, TextBlock

IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """An encoded record.

    Args:
        input_ids: `(S,)` int64, image placeholders repeated for each feature.
        labels: `(S,)` int64, -100 outside of the assistant's turns.
        images: Output of the image processor, tensors with one or more rows for each image; empty without images.
    """

    input_ids: Tensor
    labels: Tensor
    images: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.input_ids)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image whole, turned upright by its EXIF orientation.

    Raises:
        ValueError: If there is no such file, or it is no image, or it is cut off; names the path.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from None


class SampleEncoder:
    """Encode records with a processor.

    Args:
        processor: The composed model's processor.
        root: Folder that relative image paths start from.
        on_outside: What to do with a region that leaves its image: "raise", "clamp" it to the image, or "skip" it.
        coordinate_format: Name of a coordinate format; None for the default.
        max_length: Longest sample in tokens that is accepted; nothing is ever truncated.
    """

    def __init__(
        self,
        processor: VisionLanguageProcessor,
        root: Path,
        on_outside: str = "raise",
        coordinate_format: str | None = None,
        max_length: int | None = None,
    ) -> None:
        self.processor = processor
        self.root = root
        self.on_outside = on_outside
        self.coordinate_format = coordinate_format
        self.max_length = max_length

    def __call__(self, record: Record) -> Sample:
        """Encode one record.

        Raises:
            ValueError: If an image cannot be used, a region leaves its image under "raise", the template rewrites
                earlier turns, or the sample is longer than `max_length`.
        """
        images = [load_image(self.root / path) for path in record.paths]
        inputs: dict[str, Any] = {}
        if images:
            inputs = dict(self.processor.image_processor(images, return_tensors="pt"))
        counts = [self.processor.count_image_tokens(inputs, index) for index in range(len(images))]
        messages = self.render(record, [image.size for image in images])
        ids, labels = self._tokenize(messages, counts)
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"the sample has {len(ids)} tokens ({sum(counts)} of them for images), but at most "
                f"{self.max_length} fit; raise the capacity or use smaller images"
            )
        return Sample(torch.tensor(ids), torch.tensor(labels), inputs)

    def render(self, record: Record, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """Turn a record into a chat: regions as text, images placed.

        Args:
            record: The record.
            sizes: Width and height of each image in pixels.

        Returns:
            Messages for the chat template.
        """
        placed = any(isinstance(block, ImageBlock) for message in record.messages for block in message.content)
        first_user = next((m for m in record.messages if m.role == "user"), record.messages[0])
        chat = []
        for message in record.messages:
            blocks: list[dict[str, Any]] = []
            if message is first_user and not placed:
                blocks += [{"type": "image"}] * len(sizes)
            blocks += self._blocks(message, sizes)
            chat.append({"role": message.role, "content": blocks})
        return chat

    def _blocks(self, message: Message, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = []
        pending: list[RegionBlock] = []
        for block in (*message.content, None):
            if isinstance(block, RegionBlock) and (not pending or pending[0].image == block.image):
                pending.append(block)
                continue
            if pending:
                text = encode(
                    [one.region() for one in pending],
                    sizes[pending[0].image],
                    self.coordinate_format,
                    on_outside=self.on_outside,
                )
                blocks.append({"type": "text", "text": text})
                pending = []
            if isinstance(block, RegionBlock):
                pending = [block]
            elif isinstance(block, TextBlock):
                blocks.append({"type": "text", "text": block.text})
            elif isinstance(block, ImageBlock):
                blocks.append({"type": "image"})
        return blocks

    def _tokenize(self, messages: list[dict[str, Any]], counts: list[int]) -> tuple[list[int], list[int]]:
        """Tokenise turn by turn, so that a prompt has the same ids here and when the model is asked."""
        ids: list[int] = []
        labels: list[int] = []
        remaining = iter(counts)
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render_template(messages[:index], add_generation_prompt=True)
            answered = self._render_template(messages[: index + 1])
            if not prompt.startswith(done) or not answered.startswith(prompt):
                raise ValueError("the chat template rewrites earlier turns, so the assistant's words cannot be found")
            question = self._ids(prompt[len(done) :], remaining)
            answer = self._ids(answered[len(prompt) :], remaining)
            ids += question + answer
            labels += [IGNORE] * len(question) + answer
            done = answered
        if next(remaining, None) is not None:
            raise ValueError("the chat template did not place every image before the last assistant turn")
        return ids, labels

    def _render_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _ids(self, text: str, remaining: Any) -> list[int]:
        ids: list[int] = []
        for token in self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]:
            if token == self.processor.image_token_id:
                count = next(remaining, None)
                if count is None:
                    raise ValueError(f"there are more {self.processor.image_token} tokens than images")
                ids += [token] * count
            else:
                ids.append(token)
        return ids
