"""Published openPangu-VL folders to models and processors, and back."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from ...composition import suppress_tokens
from ...parts.chat_templates import OPENPANGU_CHAT_TEMPLATE, OPENPANGU_VISION_TOKENS
from ...parts.configuration_windowfree import WindowFreeViTConfig
from ...parts.modeling_vlm import VisionLanguageForConditionalGeneration
from ...parts.modeling_windowfree import WindowFreeViTModel
from ...parts.processing_vlm import VisionLanguageProcessor
from .._folder import CONFIG, new_folder, read_generation_config, write_config, write_json
from .._processor import read_statistics
from .._safetensors import check_max_shard_size, list_tensors
from .._weights import ModelT, check_dtype, load_weights, save_weights
from .config import TOKEN_IDS, get_composed_config, get_vision_config, published_config, read_config
from .names import BUFFERS, NOT_ENCODER, get_slices, get_stored_slices, without_nesting
from .processor import check_token_ids, get_image_processor, published_processor

PathLike = str | os.PathLike[str]


def encoder_from_openpangu_vl(folder: PathLike, *, dtype: torch.dtype | None = None) -> WindowFreeViTModel:
    """Build the vision encoder of an openPangu-VL. Its mergers, projection and text model are not read.

    Which layers have windows follows from `window_size` and `fullatt_block_indexes`. The encoder is in evaluation
    mode.

    Args:
        folder: A local folder with config.json and safetensors, under the published names or those that transformers
            writes (`model.visual.*`), queries, keys and values fused or split. Rotary buffers of old exports are not
            read.
        dtype: Floating-point dtype of the weights. None keeps that of the files; the weights then stay mapped from
            the files, which must not be overwritten while the encoder is in use.

    Raises:
        ValueError: If it is no such folder, if it holds another model or quantized weights, if a field is missing or
            does not fit, if there are pickled weights only, if the index names a file that does not exist, or if
            tensors are missing, unexpected or of another shape or dtype (lists all of them).
    """
    path = Path(folder)
    config = get_vision_config(read_config(path), **read_statistics(path))
    with torch.device("meta"):
        model = WindowFreeViTModel(config)
    return _load(model, path, dtype, NOT_ENCODER)


def model_from_openpangu_vl(
    folder: PathLike, *, dtype: torch.dtype | None = None
) -> VisionLanguageForConditionalGeneration:
    """Build a complete openPangu-VL: encoder, mergers and projection, text model with head, token ids.

    Weights are loaded file by file, so that memory holds them once. Generation options come from
    generation_config.json, if there is one; their `suppress_tokens` are extended by the four vision tokens, as in
    [`compose_processor`]. The model is in evaluation mode.

    Args:
        folder: As for [`encoder_from_openpangu_vl`]; the fields of the text model are at the top level of config.json
            or under "text_config".
        dtype: As for [`encoder_from_openpangu_vl`].

    Raises:
        ValueError: As for [`encoder_from_openpangu_vl`].
    """
    path = Path(folder)
    config = get_composed_config(read_config(path), **read_statistics(path))
    generation = read_generation_config(path)
    with torch.device("meta"):
        model = VisionLanguageForConditionalGeneration(config)
    model = _load(model, path, dtype)
    model.generation_config = generation or model.generation_config
    suppress_tokens(model, [getattr(config, name) for name in TOKEN_IDS])
    return model


def _load(model: ModelT, path: Path, dtype: torch.dtype | None, ignored: tuple[str, ...] = ()) -> ModelT:
    check_dtype(dtype)
    stored = list_tensors(path).renamed(without_nesting)
    slices = get_stored_slices(model, stored)
    return load_weights(model, slices, stored, dtype=dtype, ignored=(*ignored, *BUFFERS), map_files=True)


def processor_from_openpangu_vl(folder: PathLike, *, trust_remote_code: bool = False) -> VisionLanguageProcessor:
    """Build the processor of an openPangu-VL: tokenizer, image and video processor, chat template.

    Sizes and statistics come from preprocessor_config.json. `temporal_patch_size` is always 1, as in the published
    code. The chat template is the library's, which renders the published turns.

    Args:
        folder: A local folder with preprocessor_config.json (or processor_config.json) and a tokenizer.
        trust_remote_code: Whether to run the tokenizer's own code in the folder. The published tokenizer needs it.

    Raises:
        ValueError: If there is no file for images, if it lacks a field, if the tokenizer lacks a token or gives it
            another id than config.json, or if it needs code that is not trusted.
        OSError: If there is no tokenizer.
    """
    path = Path(folder)
    images = get_image_processor(path)
    # With a base configuration, transformers does not read config.json, nor runs the code that it names.
    tokenizer = AutoTokenizer.from_pretrained(
        path, config=PreTrainedConfig(), local_files_only=True, trust_remote_code=trust_remote_code
    )
    if (path / CONFIG).is_file():
        check_token_ids(tokenizer, read_config(path))
    return VisionLanguageProcessor(
        images,
        tokenizer,
        chat_template=OPENPANGU_CHAT_TEMPLATE,
        spatial_merge_size=images.merge_size,
        **cast(dict[str, Any], OPENPANGU_VISION_TOKENS),
    )


def to_openpangu_vl(
    model: VisionLanguageForConditionalGeneration | WindowFreeViTModel,
    folder: PathLike,
    *,
    max_shard_size: int | str = "5GB",
    split_qkv: bool = False,
) -> None:
    """Write a folder with the published names: config.json, preprocessor_config.json, safetensors and their index.

    The weights keep their dtypes. Code and tokenizer are not written; copy them from the published folder. After an
    error, nothing is left in the folder.

    Args:
        model: A model composed of the parts of openPangu-VL, or an encoder alone, which is written as `visual.*`
            without mergers.
        folder: A new or empty folder.
        max_shard_size: Largest size of a file, in bytes or like "5GB".
        split_qkv: Write the encoder's queries, keys and values one by one (`attn.q.`, `attn.k.`, `attn.v.`).

    Raises:
        ValueError: If `max_shard_size` is no size, if the folder is not empty, if the model is of another class, or
            if it has an option that openPangu-VL does not have.
    """
    if not isinstance(model, (VisionLanguageForConditionalGeneration, WindowFreeViTModel)):
        raise ValueError(
            "`model` must be a VisionLanguageForConditionalGeneration or a WindowFreeViTModel, got "
            f"{type(model).__name__}."
        )
    check_max_shard_size(max_shard_size)
    fields = published_config(model.config)
    vision = cast(WindowFreeViTConfig, getattr(model.config, "vision_config", model.config))
    with new_folder(folder) as path:
        if isinstance(model, VisionLanguageForConditionalGeneration):
            model.generation_config.save_pretrained(path)
        save_weights(model, get_slices(model, lambda name: split_qkv), path, max_shard_size)
        write_json(path / "preprocessor_config.json", published_processor(vision))
        write_config(path, fields, model.dtype)
