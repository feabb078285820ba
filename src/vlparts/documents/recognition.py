"""Recognize the text of pages with a vision-language model."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..checkpoints._folder import CONFIG, read_json
from ..checkpoints.deepseek_ocr import model_from_deepseek_ocr, processor_from_deepseek_ocr
from ..checkpoints.deepseek_ocr.config import ARCHITECTURE, MODEL_TYPE
from .blocks import PageText, parse_page
from .pages import DPI, MAX_IMAGE_PIXELS, Page

__all__ = ["DEEPSEEK_OCR_PROMPTS", "PageResult", "load_ocr_model", "prompt_content", "recognize"]

DEEPSEEK_OCR_PROMPTS = {
    "markdown": "<image>\n<|grounding|>Convert the document to markdown.",
    "ocr": "<image>\n<|grounding|>OCR this image.",
    "free": "<image>\nFree OCR.",
    "figure": "<image>\nParse the figure.",
    "describe": "<image>\nDescribe this image in detail.",
    "locate": "<image>\nLocate <|ref|>{text}<|/ref|> in the image.",
}
"""The prompts of DeepSeek-OCR's README; in "locate", `{text}` is what to find."""


@dataclass(frozen=True)
class PageResult:
    """The result for a page.

    Attributes:
        page: The page, or the image that was given.
        image: The page as an image; None with an error.
        text: Its blocks; None with an error.
        finished: Whether the model ended its answer. An unfinished one reached `max_new_tokens`.
        num_tokens: Number of tokens of the answer.
        error: Why the page could not be opened, or why the processor refuses it; None if it was recognized.
    """

    page: Page | Image.Image
    image: Image.Image | None = None
    text: PageText | None = None
    finished: bool = False
    num_tokens: int = 0
    error: str | None = None


def load_ocr_model(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model that reads documents, and its processor.

    Args:
        folder: A folder with DeepSeek-OCR's published files, or one that `save_pretrained` wrote with the processor.
        device: The device; None for an accelerator if there is one, else the CPU.
        dtype: Dtype of the weights, or its name; "auto" for that of the files.
        trust_remote_code: Whether to run code that is in the folder. Folders of composed models do not need it.

    Returns:
        The model in evaluation mode, and the processor.

    Raises:
        ValueError: If it is no such folder, if its files are damaged, or if the dtype or the device is unknown.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise ValueError(f"`model` must be a folder with a {CONFIG}, got {path}.")
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise ValueError(f"`dtype` must be 'auto' or the name of a floating-point dtype, got {dtype!r}.")
        dtype = named
    device = _check_device(device)
    config = read_json(path / CONFIG)
    published = config.get("model_type") == MODEL_TYPE or ARCHITECTURE in (config.get("architectures") or ())
    try:
        if published:
            model = model_from_deepseek_ocr(path, dtype=None if isinstance(dtype, str) else dtype)
            return model.to(device), processor_from_deepseek_ocr(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`model` {path} cannot be loaded: {error}") from error
    return model.eval().to(device), processor


def _check_device(device: str | torch.device | None) -> torch.device:
    """The device, which is tried before the weights are read."""
    try:
        chosen = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter without CUDA
        raise ValueError(f"`device` must be a device of this machine, got {str(device)!r}: {error}") from None
    return chosen


def get_prompt(prompt: str) -> str:
    """Return the prompt of a name in `DEEPSEEK_OCR_PROMPTS`, or a prompt as it is.

    Raises:
        ValueError: If it has not one placeholder "<image>", or if there is nothing to find for "locate".
    """
    text = DEEPSEEK_OCR_PROMPTS.get(prompt, prompt)
    if text.count("<image>") != 1:
        names = ", ".join(DEEPSEEK_OCR_PROMPTS)
        raise ValueError(f"`prompt` must have one '<image>', or be one of {names}; got {prompt!r}.")
    if text == DEEPSEEK_OCR_PROMPTS["locate"]:
        raise ValueError(f"`prompt` must name what to find in place of '{{text}}', got {text!r}.")
    return text


def recognize(
    model: Any,
    processor: Any,
    pages: Iterable[Page | Image.Image],
    *,
    prompt: str = DEEPSEEK_OCR_PROMPTS["markdown"],
    batch_size: int = 1,
    dpi: float = DPI,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    image_options: dict[str, Any] | None = None,
    **generation_options: Any,
) -> Iterator[PageResult]:
    """Recognize pages, batch by batch; a page is opened when its batch begins.

    Args:
        model: A composed model.
        processor: Its processor, with a chat template; the prompt is the turn of the user.
        pages: Pages, or images.
        prompt: The prompt, with the placeholder of the image as "<image>", or a name in `DEEPSEEK_OCR_PROMPTS`.
        batch_size: Pages per batch.
        dpi: Dots per inch at which pages of PDF files are drawn.
        max_image_pixels: Largest number of pixels of a page that is opened.
        image_options: Options of the image processor, such as `{"mode": "tiny"}`.
        **generation_options: Arguments of `generate`, such as `max_new_tokens`.

    Returns:
        An iterator over one result per page, in their order; a page that cannot be opened, or that the processor
        refuses, is one with an error.

    Raises:
        ValueError: If `batch_size` or `dpi` is not positive, `prompt` is invalid, or the processor refuses `prompt` or
            `image_options`.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if not 0 < dpi < math.inf:
        raise ValueError(f"`dpi` must be positive, got {dpi}.")

    def prepare(images: Sequence[Image.Image]) -> Any:
        return _prepare(processor, images, prompt, image_options or {})

    prepare([Image.new("RGB", (64, 64))])  # what fails with this one is no fault of a page
    return _recognize(model, processor, pages, batch_size, dpi, max_image_pixels, prepare, generation_options)


def _recognize(
    model: Any,
    processor: Any,
    pages: Iterable[Page | Image.Image],
    batch_size: int,
    dpi: float,
    max_image_pixels: int,
    prepare: Callable[[Sequence[Image.Image]], Any],
    generation_options: dict[str, Any],
) -> Iterator[PageResult]:
    remaining = iter(pages)
    while batch := list(islice(remaining, batch_size)):
        opened = [_open(page, dpi, max_image_pixels) for page in batch]
        try:
            inputs = prepare([image for image in opened if isinstance(image, Image.Image)])
        except ValueError:
            opened = [_refused(page, image, prepare) for page, image in zip(batch, opened, strict=True)]
            inputs = prepare([image for image in opened if isinstance(image, Image.Image)])
        answers = iter(() if inputs is None else _answer(model, processor, inputs, generation_options))
        for page, image in zip(batch, opened, strict=True):
            if isinstance(image, str):
                yield PageResult(page, error=image)
                continue
            text, finished, num_tokens = next(answers)
            yield PageResult(page, image, parse_page(text, image.size), finished, num_tokens)


def prompt_content(prompt: str, **image: Any) -> list[dict[str, Any]]:
    """Return a prompt as the content of a turn of the user.

    Args:
        prompt: A name in `DEEPSEEK_OCR_PROMPTS`, or a prompt with one placeholder "<image>".
        **image: Further fields of the block of the image, such as the image itself.

    Raises:
        ValueError: See [`get_prompt`].
    """
    before, after = get_prompt(prompt).split("<image>")
    parts = [{"type": "text", "text": before}, {"type": "image", **image}, {"type": "text", "text": after}]
    return [part for part in parts if part.get("text") != ""]


def _open(page: Page | Image.Image, dpi: float, max_image_pixels: int) -> Image.Image | str:
    """The image of a page, or why it cannot be opened."""
    if isinstance(page, Image.Image):
        return page
    try:
        return page.open(dpi, max_image_pixels)
    except ValueError as error:
        return str(error)


def _refused(
    page: Page | Image.Image, image: Image.Image | str, prepare: Callable[[Sequence[Image.Image]], Any]
) -> Image.Image | str:
    """The image of a page, or why the processor refuses it."""
    if isinstance(image, Image.Image):
        try:
            prepare([image])
        except ValueError as error:
            return f"{page}: {error}"
    return image


def _prepare(processor: Any, images: Sequence[Image.Image], prompt: str, image_options: dict[str, Any]) -> Any:
    """Inputs of the model for images, one conversation each; None without images."""
    if not images:
        return None
    conversations = [[{"role": "user", "content": prompt_content(prompt, image=image)}] for image in images]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "images_kwargs": image_options},
    )


def _answer(
    model: Any, processor: Any, inputs: Any, generation_options: dict[str, Any]
) -> list[tuple[str, bool, int]]:
    """Generate an answer for each image; returns text, whether it is finished, and its number of tokens."""
    with torch.inference_mode():
        generated = model.generate(**inputs.to(model.device), **generation_options)
    answers, end_ids = [], _end_ids(model)
    for row in generated[:, inputs["input_ids"].shape[1] :].tolist():
        ends = [place for place, token in enumerate(row) if token in end_ids]
        tokens = row[: ends[0]] if ends else row
        text = processor.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        answers.append((text, bool(ends), len(tokens)))
    return answers


def _end_ids(model: Any) -> set[int]:
    """Ids of tokens that end an answer."""
    given = model.generation_config.eos_token_id
    return set() if given is None else {given} if isinstance(given, int) else set(given)
