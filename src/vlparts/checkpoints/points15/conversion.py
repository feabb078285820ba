"""Published POINTS1.5 folders to models, and back."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...composition import suppress_tokens
from ...parts.chat_templates import POINTS_VISION_TOKENS
from ...parts.modeling_vlm import VisionLanguageForConditionalGeneration
from .._folder import new_folder, read_generation_config, write_config, write_json
from .._processor import read_statistics, read_token_ids
from .._safetensors import FLOATING, StoredTensors, check_max_shard_size, list_tensors, write_tensors
from .._weights import check_dtype, check_tensors, load_weights, own_tensors
from ..qwen_vl.names import get_merger_shapes
from .config import (
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    LAYOUTS,
    VISION_TYPE,
    PathLike,
    get_composed_config,
    get_layout,
    published_config,
    read_config,
)
from .names import BUFFERS, EMBEDDINGS, HEADS, MERGER, get_names, split_tensors
from .processor import published_processor

logger = logging.getLogger(__name__)

END_OF_TURN = "<|im_end|>"
TOKENS = {IMAGE_TOKEN: IMAGE_TOKEN_ID, "<|vision_start|>": 151652, "<|vision_end|>": 151653, END_OF_TURN: 151645}
"""Special tokens and their ids in the tokenizer of Qwen2.5."""


def model_from_points15(
    folder: PathLike, *, dtype: torch.dtype | None = None
) -> VisionLanguageForConditionalGeneration:
    """Build a complete POINTS1.5 or POINTS-Reader: encoder, projector, text model with head.

    The text model is transformers' Qwen2, or Llama if its attention has no biases. The layout of the folder, "qwen2"
    or "custom_llama", follows from the `model_type` of "llm_config". Each tensor is allocated once and filled file by
    file: memory holds the model and the tensor being read. Generation options are those of generation_config.json, if
    there is one; generation also ends with `<|im_end|>` and never gives a token of images. The model is in evaluation
    mode.

    The merger that the encoder's class has (`vision_encoder.merger.*`) computes nothing in POINTS1.5 and is not part
    of the model. Its names are logged as a warning; [`to_points15`] can copy it.

    Args:
        folder: A local folder with config.json and safetensors. The ids of special tokens are read from
            tokenizer.json, if there is one; otherwise they are those of Qwen2.5. The statistics of raw pixels are
            those of preprocessor_config.json, if there is one.
        dtype: Floating-point dtype of the weights; None keeps that of the files.

    Raises:
        ValueError: If it is no such folder, if it holds another model or quantized weights, if a field is missing or
            does not fit, if there are pickled weights only, if the index names a file that does not exist, if tensors
            are missing, unexpected or of another shape or dtype (lists all of them), or if a head that is tied to the
            embeddings differs from them.
    """
    check_dtype(dtype)
    path = Path(folder)
    published = read_config(path)
    layout, known = get_layout(published), read_token_ids(path, TOKENS, IMAGE_TOKEN)
    config = get_composed_config(published, known[IMAGE_TOKEN], **read_statistics(path))
    generation = read_generation_config(path)
    with torch.device("meta"):
        model = VisionLanguageForConditionalGeneration(config)
    names, stored = get_names(model, layout), list_tensors(path)
    ignored: tuple[str, ...] = (*BUFFERS, MERGER)
    if config.tie_word_embeddings:
        ignored = (*ignored, re.escape(HEADS[layout]))
    shapes = {name: tuple(tensor.shape) for name, tensor in names.meta(own_tensors(model)).items()}
    check_tensors(shapes, stored, ignored)
    if config.tie_word_embeddings:
        _check_tied(stored, layout)
    model = load_weights(model, names.split_slices(), split_tensors(stored, names.fused), dtype=dtype, ignored=ignored)
    _report_merger(stored)
    model.generation_config = generation or model.generation_config
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    model.generation_config.eos_token_id = list(dict.fromkeys([known[END_OF_TURN], *ends]))
    suppress_tokens(model, [known[token] for token in POINTS_VISION_TOKENS.values()])
    return model


def _check_tied(stored: StoredTensors, layout: str) -> None:
    """Check that a stored head which is tied to the embeddings equals them."""
    head, embeddings = HEADS[layout], EMBEDDINGS[layout]
    if head not in stored.tensors:
        return
    tensors = dict(stored.read([head, embeddings]))
    if not torch.equal(tensors[head], tensors[embeddings]):
        raise ValueError(
            f"`folder` must have a {head} that equals {embeddings}, since tie_word_embeddings is true in its "
            "config.json, got another one."
        )
    logger.warning("Not kept, since it equals %s, to which it is tied: %s.", embeddings, head)


def _report_merger(stored: StoredTensors) -> None:
    merger = sorted(name for name in stored.tensors if re.fullmatch(MERGER, name))
    if merger:
        logger.warning("Not read, since the model does not use them: %s.", ", ".join(merger))


def to_points15(
    model: VisionLanguageForConditionalGeneration,
    folder: PathLike,
    layout: str,
    *,
    merger_from: PathLike | None = None,
    write_tied_head: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folder with the published names: config.json, preprocessor_config.json, safetensors and their index.

    The weights keep their dtypes; memory holds one written tensor besides the model. Code and tokenizer are not
    written; copy them from the published folder. preprocessor_config.json has the statistics of the encoder and the
    image sizes of the published code. After an error, nothing is left in the folder.

    Args:
        model: A model composed of the parts of POINTS1.5.
        folder: A new or empty folder.
        layout: "qwen2", the names of POINTS-Reader, or "custom_llama", those of the chat model with 7B parameters.
        merger_from: A published folder whose `vision_encoder.merger.*` is copied; None to write none. The published
            class has such tensors, but does not use them.
        write_tied_head: Write the head of a model whose head is tied to the embeddings, as a copy of them.
        max_shard_size: Largest size of a file, in bytes or like "5GB".

    Raises:
        ValueError: If `layout` or `max_shard_size` is unknown, if the folder is not empty, if the model is of another
            class or has an option that POINTS1.5 or the layout does not have, or if `merger_from` has no merger of the
            encoder's width.
    """
    if not isinstance(model, VisionLanguageForConditionalGeneration):
        raise ValueError(f"`model` must be a VisionLanguageForConditionalGeneration, got {type(model).__name__}.")
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    check_max_shard_size(max_shard_size)
    vision: Any = model.config.vision_config
    text: Any = model.config.text_config
    width = text.hidden_size
    merger = None if merger_from is None else list_tensors(Path(merger_from))
    merger_meta = {} if merger is None else _get_merger(model, merger)
    if merger is not None:
        width = list(merger_meta.values())[-1].shape[0]
    fields = published_config(model.config, layout, width)
    own, names = own_tensors(model), get_names(model, layout)
    if write_tied_head and model.config.tie_word_embeddings:
        names.slices[HEADS[layout]] = names.slices[EMBEDDINGS[layout]]

    def get_tensor(name: str) -> Tensor:
        if merger is not None and name in merger_meta:
            return next(merger.read([name]))[1]
        return names.of(name, own)

    with new_folder(folder) as path:
        write_tensors(path, names.meta(own) | merger_meta, get_tensor, max_shard_size)
        model.generation_config.save_pretrained(path)
        write_json(path / "preprocessor_config.json", published_processor(vision))
        write_config(path, fields, model.dtype)


def _get_merger(model: VisionLanguageForConditionalGeneration, stored: StoredTensors) -> dict[str, Tensor]:
    """The tensors of the encoder's merger on the meta device, by published name, the last layer's bias last."""
    vision: Any = model.config.vision_config
    last = stored.tensors.get("vision_encoder.merger.mlp.2.bias")
    width = last.shape[0] if last is not None and last.shape else 0
    shapes = get_merger_shapes(
        VISION_TYPE, vision.hidden_size, vision.spatial_merge_size, width, prefix="vision_encoder."
    )
    try:
        check_tensors(shapes, stored, (r".+",))
    except ValueError as error:
        raise ValueError(f"`merger_from` must have the merger of the model's encoder. {error}") from error
    return {
        name: torch.empty(shape, dtype=FLOATING[stored.tensors[name].dtype], device="meta")
        for name, shape in shapes.items()
    }
