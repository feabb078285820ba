"""Records to token ids, labels and image patches."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from PIL import Image, ImageOps
from torch import Tensor

from ..coordinates.codec import encode
from ..coordinates.formats.registry import get_format
from ..parts.image_transforms import to_rgb
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
        weight: Weight of the record in the loss.
    """

    input_ids: Tensor
    labels: Tensor
    images: dict[str, Tensor]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.input_ids)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image whole, turned upright by its EXIF orientation, as RGB (see `images.to_rgb`).

    Raises:
        ValueError: If there is no such file, or it is no image, or it is cut off, or its values have no known range;
            names the path.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise ValueError(f"image {path} cannot be read: {error}") from None


def join_images(images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join outputs of an image processor, image after image; {} for none."""
    return {name: torch.cat([one[name] for one in images]) for name in images[0]} if images else {}


class SampleEncoder:
    """Encode records with a processor.

    Args:
        processor: The composed model's processor.
        root: Folder that relative image paths start from.
        on_outside: What to do with a region that leaves its image: "raise", "clamp" it to the image, or "skip" it.
        coordinate_format: Name of a coordinate format; None for the default.
        max_length: Longest sample in tokens that is accepted; nothing is ever truncated.

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
    ) -> None:
        encode([], (1, 1), coordinate_format, on_outside=on_outside)  # an unknown choice is no fault of a record
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
        inputs = [self._process(*pair) for pair in zip(record.paths, images, strict=True)]
        counts = [self.processor.count_image_tokens(one, 0) for one in inputs]
        messages = self.render(record, [image.size for image in images])
        ids, labels = self._tokenize(messages, counts)
        if all(label == IGNORE for label in labels):
            raise ValueError("the assistant's turns are empty, so there is nothing to learn")
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"the sample has {len(ids)} tokens ({sum(counts)} of them for images), but at most "
                f"{self.max_length} fit; raise the capacity or use smaller images"
            )
        return Sample(torch.tensor(ids), torch.tensor(labels), join_images(inputs))

    def _process(self, path: str, image: Image.Image) -> dict[str, Tensor]:
        try:
            return dict(self.processor.image_processor(image, return_tensors="pt"))
        except ValueError as error:
            raise ValueError(f"image {self.root / path} cannot be used: {error}") from None

    def render(self, record: Record, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """Turn a record into a chat: regions as text, images placed.

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
        """Text and places of images; neighbouring regions of one image are written together."""
        blocks: list[dict[str, Any]] = []
        after_region = False
        for index, group in groupby(message.content, key=_image_of):
            members = list(group)
            regions = [block.region() for block in members if isinstance(block, RegionBlock)]
            if not regions:
                blocks += [_plain(block) for block in members]
                after_region = False
                continue
            text = encode(regions, sizes[index], self.coordinate_format, on_outside=self.on_outside)
            separator = get_format(self.coordinate_format).separator if after_region and text else ""
            blocks.append({"type": "text", "text": separator + text})
            after_region = bool(text)
        return blocks

    def _tokenize(self, messages: list[dict[str, Any]], counts: list[int]) -> tuple[list[int], list[int]]:
        """Ids and labels, such that what stands before an answer has the same ids when the model is asked."""
        ids: list[int] = []
        learnt: list[bool] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render_template(messages[:index], add_generation_prompt=True)
            answered = self._render_template(messages[: index + 1])
            if not prompt.startswith(done) or not answered.startswith(prompt):
                raise ValueError("the chat template rewrites earlier turns, so the assistant's words cannot be found")
            ids += self._following(ids, done, prompt)
            answer = self._following(ids, prompt, answered)
            learnt += [False] * (len(ids) - len(learnt)) + self._learnt(answer)
            ids += answer
            done = answered
        return self._expand(ids, learnt, counts)

    def _render_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            # As a batch, since what stands before the first turn is no conversation that would be taken alone.
            return self.processor.apply_chat_template(
                [messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )[0]
        except TemplateError as error:
            raise ValueError(f"the chat template cannot write the conversation: {error}") from None

    def _following(self, ids: list[int], start: str, text: str) -> list[int]:
        """The ids of what follows `start` in `text`, where `ids` are those of `start`.

        The whole text is tokenised, since tokenizers may write the first word of a text in another way, and with a
        token that begins it. Only where a token would reach across the end of `start` does the rest stand for itself.
        """
        tokenizer = self.processor.tokenizer
        # As ProcessorMixin.apply_chat_template decides it.
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        whole = tokenizer(text, add_special_tokens=not begun)["input_ids"]
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        return tokenizer(text[len(start) :], add_special_tokens=False)["input_ids"]

    def _learnt(self, answer: list[int]) -> list[bool]:
        """What of an answer the loss is taken over: all up to its end token, without the placeholders of images."""
        end = self.processor.tokenizer.eos_token_id
        length = len(answer) - answer[::-1].index(end) if end in answer else len(answer)
        return [place < length and token != self.processor.image_token_id for place, token in enumerate(answer)]

    def _expand(self, ids: list[int], learnt: list[bool], counts: list[int]) -> tuple[list[int], list[int]]:
        """Repeat each placeholder as often as its image has features, and turn the rest to labels."""
        token = self.processor.image_token_id
        placeholders = ids.count(token)
        if placeholders > len(counts):
            raise ValueError(f"there are more {self.processor.image_token} tokens than images")
        if placeholders < len(counts):
            raise ValueError("the chat template did not place every image before the last assistant turn")
        remaining = iter(counts)
        repeats = [next(remaining) if one == token else 1 for one in ids]
        labels = [one if wanted else IGNORE for one, wanted in zip(ids, learnt, strict=True)]
        return list(_repeated(ids, repeats)), list(_repeated(labels, repeats))


def _image_of(block: TextBlock | ImageBlock | RegionBlock) -> int:
    """The image that a region lies in, and -1 for anything else."""
    return block.image if isinstance(block, RegionBlock) else -1


def _plain(block: TextBlock | ImageBlock | RegionBlock) -> dict[str, Any]:
    return {"type": "text", "text": block.text} if isinstance(block, TextBlock) else {"type": "image"}


def _repeated(values: list[int], repeats: list[int]) -> Iterator[int]:
    for value, count in zip(values, repeats, strict=True):
        yield from [value] * count
