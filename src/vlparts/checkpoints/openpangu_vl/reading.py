"""Read published openPangu-VL folders, and write them."""

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

from ...parts.chat_templates import OPENPANGU_CHAT_TEMPLATE, OPENPANGU_VISION_TOKENS
from ...parts.configuration_windowfree import WindowFreeViTConfig
from ...parts.modeling_vlm import VisionLanguageForConditionalGeneration
from ...parts.modeling_windowfree import WindowFreeViTModel
from ...parts.processing_vlm import VisionLanguageProcessor
from .._filling import new_folder
from .config import get_composed_config, get_vision_config, read_config
from .export import published_config
from .keys import BESIDE_THE_ENCODER
from .processor import check_token_ids, get_image_processor, published_processor, read_statistics
from .weights import fill_from, write_weights

PathLike = str | os.PathLike[str]


def encoder_from_openpangu_vl(folder: PathLike, *, dtype: torch.dtype | None = None) -> WindowFreeViTModel:
    """Build the vision encoder of an openPangu-VL. Its mergers, projection and text model are not read.

    The encoder is a hybrid as the files say, by `window_size` and `fullatt_block_indexes`. It is in evaluation mode.

    Args:
        folder: A local folder with config.json and safetensors, under the published names or with those that
            transformers writes (`model.visual.*`), queries, keys and values fused or split.
        dtype: Floating-point type of the weights; None keeps that of the files, whose memory is then mapped: do not
            overwrite them while the encoder lives.

    Raises:
        ValueError: If it is no such folder, if it holds another model or quantised weights, if a field is missing or
            does not fit, if there are pickled weights only, if the index names a file that does not exist, or if
            tensors are missing, unexpected or of another shape or type (names all of them).
    """
    path = Path(folder)
    config = get_vision_config(read_config(path), **read_statistics(path))
    with torch.device("meta"):
        model = WindowFreeViTModel(config)
    return fill_from(model, path, dtype, BESIDE_THE_ENCODER)


def model_from_openpangu_vl(
    folder: PathLike, *, dtype: torch.dtype | None = None
) -> VisionLanguageForConditionalGeneration:
    """Build the whole of an openPangu-VL: encoder, mergers and projection, text model with head, token ids.

    Weights are put in place file by file, so that memory holds them once. Options of generation come from
    generation_config.json, if there is one. The model is in evaluation mode.

    Args:
        folder: As for [`encoder_from_openpangu_vl`]; the fields of the text model stand at the top of config.json or
            under "text_config".
        dtype: As for [`encoder_from_openpangu_vl`].

    Raises:
        ValueError: As for [`encoder_from_openpangu_vl`].
    """
    path = Path(folder)
    config = get_composed_config(read_config(path), **read_statistics(path))
    with torch.device("meta"):
        model = VisionLanguageForConditionalGeneration(config)
    model = fill_from(model, path, dtype, ())
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def processor_from_openpangu_vl(folder: PathLike, *, trust_remote_code: bool = False) -> VisionLanguageProcessor:
    """Build the processor of an openPangu-VL: tokenizer, image and video processor, chat template.

    Sizes and statistics come from preprocessor_config.json. `temporal_patch_size` is 1 whatever the file says, as in
    the published code. The chat template is ours, which makes the published turns.

    Args:
        folder: A local folder with preprocessor_config.json (or processor_config.json) and a tokenizer.
        trust_remote_code: Whether the tokenizer's own code in the folder may run. The published one is.

    Raises:
        ValueError: If there is no file for images, if it lacks a field, if the tokenizer lacks a token or gives it
            another id than config.json, or if it needs code that is not trusted.
        OSError: If there is no tokenizer.
    """
    path = Path(folder)
    images = get_image_processor(path)
    # With a configuration of no kind, transformers reads none, nor runs the code that config.json names for it.
    tokenizer = AutoTokenizer.from_pretrained(
        path, config=PreTrainedConfig(), local_files_only=True, trust_remote_code=trust_remote_code
    )
    if (path / "config.json").is_file():
        check_token_ids(tokenizer, read_config(path))
    return VisionLanguageProcessor(
        images,
        tokenizer,
        chat_template=OPENPANGU_CHAT_TEMPLATE,
        spatial_merge_size=images.merge_size,
        **cast(dict[str, Any], OPENPANGU_VISION_TOKENS),
    )


@torch.no_grad()
def to_openpangu_vl(
    model: VisionLanguageForConditionalGeneration | WindowFreeViTModel,
    folder: PathLike,
    *,
    max_shard_size: int | str = "5GB",
    split_qkv: bool = False,
) -> None:
    """Write a folder with the published names: config.json, preprocessor_config.json, safetensors and their index.

    The weights keep their types. Code and tokenizer are not written; copy them from the published folder.

    Args:
        model: A model of the parts of openPangu-VL, or an encoder alone, which becomes `visual.*` without mergers.
        folder: A new or empty folder.
        max_shard_size: Largest size of a file, in bytes or like "5GB".
        split_qkv: Write the encoder's queries, keys and values one by one (`attn.q.`, `attn.k.`, `attn.v.`).

    Raises:
        ValueError: If the folder is not empty, or if the model is another or has an option that openPangu-VL has not.
    """
    if not isinstance(model, (VisionLanguageForConditionalGeneration, WindowFreeViTModel)):
        raise ValueError(
            "`model` must be a VisionLanguageForConditionalGeneration or a WindowFreeViTModel, got "
            f"{type(model).__name__}."
        )
    path = new_folder(folder)
    fields = published_config(model.config)
    vision = cast(WindowFreeViTConfig, getattr(model.config, "vision_config", model.config))
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(model, VisionLanguageForConditionalGeneration):
        model.generation_config.save_pretrained(path)
    write_weights(model, path, max_shard_size, split_qkv)
    _write_json(path / "preprocessor_config.json", published_processor(vision))
    _write_json(path / "config.json", {**fields, "torch_dtype": str(model.dtype).removeprefix("torch.")})


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
