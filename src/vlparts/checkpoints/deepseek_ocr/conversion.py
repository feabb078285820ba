"""Published DeepSeek-OCR folders to models and processors, and back."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from ...composition import suppress_tokens
from ...parts.chat_templates import DEEPSEEK_OCR_CHAT_TEMPLATE
from ...parts.image_processing_deepencoder import DeepEncoderImageProcessor
from ...parts.modeling_vlm import VisionLanguageForConditionalGeneration
from ...parts.processing_vlm import VisionLanguageProcessor
from .._folder import new_folder, read_generation_config, write_config, write_json
from .._processor import read_token_ids
from .._safetensors import check_max_shard_size, list_tensors
from .._weights import ROTARY_BUFFERS, check_dtype, load_weights, save_weights
from .config import IMAGE_TOKEN, IMAGE_TOKEN_ID, get_composed_config, published_config, read_config
from .names import BUFFERS, get_slices

PathLike = str | os.PathLike[str]

CELL_TOKENS = {"<td>": 128821, "</td>": 128822}
"""Tokens of the cells of tables, which the ban on repeated n-grams allows, and their published ids."""
GENERATION = {
    "do_sample": False,
    "max_new_tokens": 8192,
    "no_repeat_ngram_size": 30,
    "no_repeat_ngram_window_size": 90,
}
"""Generation options of the published README."""


def model_from_deepseek_ocr(
    folder: PathLike, *, dtype: torch.dtype | None = None
) -> VisionLanguageForConditionalGeneration:
    """Build a complete DeepSeek-OCR: encoder, projector with newline and separator, decoder with head.

    Each tensor is allocated once and filled from the files: memory holds the model and half a gigabyte. Generation
    options are those of generation_config.json, if there is one, and for those that it does not have, those of the
    published README: no sampling, and a ban on repeated n-grams. The model is in evaluation mode.

    Args:
        folder: A local folder with config.json and safetensors under the published names. The id of the image
            placeholder is read from tokenizer.json, if there is one.
        dtype: Floating-point dtype of the weights; None keeps that of the files.

    Raises:
        ValueError: If it is no such folder, if it holds another model or quantized weights, if a field is missing or
            does not fit, if there are pickled weights only, if the index names a file that does not exist, or if
            tensors are missing, unexpected or of another shape or dtype (lists all of them).
    """
    check_dtype(dtype)
    path = Path(folder)
    known = read_token_ids(path, {IMAGE_TOKEN: IMAGE_TOKEN_ID, **CELL_TOKENS}, IMAGE_TOKEN)
    config, generation = get_composed_config(read_config(path), known[IMAGE_TOKEN]), read_generation_config(path)
    with torch.device("meta"):
        model = VisionLanguageForConditionalGeneration(config)
    model = load_weights(model, get_slices(model), list_tensors(path), dtype=dtype, ignored=(*BUFFERS, ROTARY_BUFFERS))
    model.generation_config = generation or model.generation_config
    options = {**GENERATION, "no_repeat_ngram_allowed_ids": [known[token] for token in CELL_TOKENS]}
    for name, value in options.items():
        if getattr(model.generation_config, name, None) is None:
            setattr(model.generation_config, name, value)
    suppress_tokens(model, (known[IMAGE_TOKEN],))
    return model


def processor_from_deepseek_ocr(folder: PathLike, *, mode: str = "gundam") -> VisionLanguageProcessor:
    """Build the processor of a DeepSeek-OCR: tokenizer and image processor.

    The published model has no chat template; that of the processor writes the contents of the turns one after another,
    after the token that begins a text. It equals a plain prompt with `<image>` in it.

    Args:
        folder: A local folder with a tokenizer; other files are not read.
        mode: Mode of the [`DeepEncoderImageProcessor`].

    Raises:
        ValueError: If the tokenizer lacks a token, or the mode is unknown.
        OSError: If there is no tokenizer.
    """
    # With a base configuration, transformers does not read config.json, nor runs the code that it names.
    tokenizer = AutoTokenizer.from_pretrained(Path(folder), config=PreTrainedConfig(), local_files_only=True)
    return VisionLanguageProcessor(
        DeepEncoderImageProcessor(mode=mode),
        tokenizer,
        chat_template=DEEPSEEK_OCR_CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def to_deepseek_ocr(
    model: VisionLanguageForConditionalGeneration, folder: PathLike, *, max_shard_size: int | str = "50GB"
) -> None:
    """Write a folder with the published names: config.json, processor_config.json, safetensors and their index.

    The weights keep their dtypes and are written without a second copy of the model. Code and tokenizer are not
    written; copy them from the published folder. After an error, nothing is left in the folder.

    Args:
        model: A model composed of the parts of DeepSeek-OCR.
        folder: A new or empty folder.
        max_shard_size: Largest size of a file, in bytes or like "5GB"; the published weights are one file.

    Raises:
        ValueError: If `max_shard_size` is no size, if the folder is not empty, if the model is of another class, or
            if it has an option that DeepSeek-OCR does not have.
    """
    if not isinstance(model, VisionLanguageForConditionalGeneration):
        raise ValueError(f"`model` must be a VisionLanguageForConditionalGeneration, got {type(model).__name__}.")
    check_max_shard_size(max_shard_size)
    fields = published_config(model.config)
    with new_folder(folder) as path:
        save_weights(model, get_slices(model), path, max_shard_size)
        model.generation_config.save_pretrained(path)
        write_json(path / "processor_config.json", _published_processor(fields))
        write_config(path, fields, model.dtype)


def _published_processor(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of processor_config.json."""
    return {
        "add_special_token": False,
        "candidate_resolutions": fields["candidate_resolutions"],
        "downsample_ratio": 4,
        "ignore_id": -100,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_token": IMAGE_TOKEN,
        "mask_prompt": False,
        "normalize": True,
        "patch_size": 16,
        "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }
