"""Encoding of training records to token ids, labels and image tensors."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from ..coordinates.codec import encode
from ..coordinates.formats.registry import as_seen
from ..documents import open_page
from ..documents.pages import DPI, MAX_IMAGE_PIXELS
from ..parts.chat_placeholders import end_of_turn_id
from ..parts.image_files import open_image
from ..parts.processing_vlm import VisionLanguageProcessor
from ..parts.utils import IGNORE_INDEX
from .record_formats import DataImage
from .records import ImageBlock, Message, PageRecord, Record, RegionBlock, TextBlock

# transformers looks for the same.
_MARK = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
# The contents of the turns, with a line break after the text of a turn that is not the assistant's.
_CONTINUATION = (
    "{%- for message in messages -%}"
    "{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'image' -%}{{ IMAGE }}"
    "{%- elif message['role'] == 'assistant' -%}{%- generation -%}{{ block['text'] }}{%- endgeneration -%}"
    "{%- else -%}{{ block['text'] }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ eos_token }}{%- endgeneration -%}"
    "{%- elif message['content'] | selectattr('text') | list -%}{{ '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
)


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
    """Concatenate outputs of an image processor along dimension 0; {} without images.

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
    return {name: torch.cat([one[name] for one in images]) for name in images[0]}


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
        if template not in ("chat", "continuation"):
            raise ValueError(f"`template` must be 'chat' or 'continuation', got {template!r}.")
        encode([], (1, 1), coordinate_format, on_outside=on_outside)  # raises for an unknown policy or format
        self.processor = processor
        self.root = root
        self.on_outside = on_outside
        self.format = as_seen(coordinate_format, processor)
        self.max_length = max_length
        self.max_image_pixels = max_image_pixels
        self.dpi = dpi
        self.prompts = prompts
        self.seed = seed
        self.template = _continuation_template(processor) if template == "continuation" else None
        self._ends = {processor.tokenizer.eos_token_id, end_of_turn_id(processor.tokenizer, processor.chat_template)}

    def __call__(self, record: Record | PageRecord, number: int = 0) -> Sample:
        """Encode one record.

        Args:
            record: The record.
            number: Number of its line, by which a prompt is chosen.

        Raises:
            ValueError: If an image or page cannot be read or processed, a region is outside its image under "raise",
                the template rewrites earlier turns, or the sample is longer than `max_length`.
        """
        if isinstance(record, PageRecord):
            images = [self._open_page(record)]
        else:
            images = [self._open(path) for path in record.paths]
        inputs = [self.process(image, path) for image, path in zip(images, record.paths, strict=True)]
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
        ids, labels = self._tokenize(messages, counts)
        if all(label == IGNORE_INDEX for label in labels):
            raise ValueError("The assistant turns are empty; expected at least one token to train on.")
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"The sample has {len(ids)} tokens ({sum(counts)} of them for images); expected at most "
                f"{self.max_length}. Raise `capacity` or use smaller images."
            )
        return Sample(torch.tensor(ids), torch.tensor(labels), join_images(inputs))

    def _open(self, path: str) -> Image.Image:
        source: Any = DataImage(path) if path.startswith("data:") else self.root / path
        return open_image(source, max_image_pixels=self.max_image_pixels)

    def _open_page(self, record: PageRecord) -> Image.Image:
        if record.page.startswith("data:"):
            return self._open(record.page)
        limit = MAX_IMAGE_PIXELS if self.max_image_pixels is None else self.max_image_pixels
        return open_page(self.root / record.page, record.page_number, dpi=self.dpi, max_image_pixels=limit)

    def process(self, image: Image.Image, path: str = "") -> dict[str, Tensor]:
        """Return the output of the image processor for one image; an error names the path if there is one."""
        try:
            return dict(self.processor.image_processor(image, return_tensors="pt"))
        except ValueError as error:
            shown = DataImage(path) if path.startswith("data:") else self.root / path if path else "of the record"
            raise ValueError(f"Image {shown} cannot be processed: {error}") from None

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

    def _tokenize(self, messages: list[dict[str, Any]], counts: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and labels; the ids before each answer equal those of the generation prompt."""
        ids: list[int] = []
        in_loss: list[bool] = []
        text = ""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        marked = self._marked_spans(messages[: answers[-1] + 1]) if answers else None
        for index in answers:
            prompt = self._render_template(messages[:index], add_generation_prompt=True)
            answered = self._render_template(messages[: index + 1])
            if not prompt.startswith(text) or not answered.startswith(prompt):
                raise ValueError(
                    "The chat template rewrites earlier turns, so the assistant tokens cannot be located."
                )
            for start, end in ((text, prompt), (prompt, answered)):
                part, offsets = self._continuation(ids, start, end)
                if marked is not None:
                    in_loss += self._marked_mask(part, offsets, marked)
                else:
                    in_loss += [False] * len(part) if end is prompt else self._answer_mask(part)
                ids += part
            text = answered
        return self._expand(ids, in_loss, counts)

    def _marked_spans(self, messages: list[dict[str, Any]]) -> list[tuple[int, int]] | None:
        """Start and end of the characters that the template marks by `{% generation %}`; None if it has no marks."""
        template = self.template or self.processor.chat_template
        template = template["default"] if isinstance(template, dict) else template
        if not self.processor.tokenizer.is_fast or not _MARK.search(template):
            return None
        _, (spans,) = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.processor.tokenizer.special_tokens_map,
        )
        return spans

    def _render_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            # As a batch: the empty list before a first assistant turn is not accepted as a single conversation.
            return self.processor.apply_chat_template(
                [messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )[0]
        except TemplateError as error:
            raise ValueError(f"The chat template cannot render the conversation: {error}") from None

    def _continuation(self, ids: list[int], start: str, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of the part of `text` after its prefix `start`, whose ids are `ids`; and their characters.

        The whole text is tokenized, since tokenizers may encode the first word of a text differently and add a BOS
        token. The rest is tokenized alone only if a token would span the end of `start`. The characters, as start and
        end in `text`, are empty for tokenizers without offsets.
        """
        tokenizer = self.processor.tokenizer
        # The same condition as in ProcessorMixin.apply_chat_template.
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        options = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
        whole = tokenizer(text, add_special_tokens=not has_bos, **options)
        if whole["input_ids"][: len(ids)] == ids:
            return whole["input_ids"][len(ids) :], whole.get("offset_mapping", [])[len(ids) :]
        rest = tokenizer(text[len(start) :], add_special_tokens=False, **options)
        shift = len(start)
        return rest["input_ids"], [(first + shift, last + shift) for first, last in rest.get("offset_mapping", [])]

    def _marked_mask(self, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
        """True for the tokens that overlap a marked span, except image placeholders."""
        inside = [any(first < end and last > start for start, end in spans) for first, last in offsets]
        return [one and token != self.processor.image_token_id for one, token in zip(inside, ids, strict=True)]

    def _answer_mask(self, answer: list[int]) -> list[bool]:
        """True for the tokens of an answer up to and including the end of its turn, except image placeholders."""
        length = next((at for at in range(len(answer), 0, -1) if answer[at - 1] in self._ends), len(answer))
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


def _continuation_template(processor: VisionLanguageProcessor) -> str:
    names = ("vision_start_token", "image_token", "vision_end_token")
    image = "".join(getattr(processor, name) or "" for name in names)
    return _CONTINUATION.replace("IMAGE", json.dumps(image))  # quoted as in Jinja


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
