"""Published Qwen2-VL, Qwen2.5-VL and Qwen3-VL folders to encoders, mergers and image processors."""

import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...parts.image_processing_windowfree import WindowFreeViTImageProcessor
from ...parts.modeling_windowfree import WindowFreeViTModel
from .._processor import read_statistics, require_processor
from .._safetensors import StoredTensors, list_tensors
from .._weights import check_dtype, check_tensors, load_weights
from .config import get_vision_config, read_config
from .names import BUFFER, MERGERS, TEXT_MODEL, get_merger_names, get_merger_shapes, get_slices, without_nesting

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

_FIELDS = ("patch_size", "merge_size", "image_mean", "image_std")
_OPTIONAL_FIELDS = ("do_resize", "do_convert_rgb", "resample")
_AREAS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
# Class names, "temporal_patch_size", which is the encoder's, and how the pixels are passed on, which changes nothing.
_IGNORED = {
    "image_processor_type",
    "processor_class",
    "auto_map",
    "temporal_patch_size",
    "data_format",
    "default_to_square",
    "input_data_format",
    "return_tensors",
    "device",
    "backend",
    "model_input_names",
    "_processor_class",
}
_FIXED: dict[str, Any] = {"do_rescale": True, "do_normalize": True}


def encoder_from_qwen_vl(folder: PathLike, *, dtype: torch.dtype | None = None) -> WindowFreeViTModel:
    """Build the vision encoder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, without its mergers and text model.

    The output is not merged, `(L, D)`, in the order of `pixel_values`. That is the order of the native image
    processors: the patches of a merge block follow one another. `feature_maps` of Qwen3-VL are the last layer's output
    and those of the DeepStack layers.

    The mergers and the text model are not read. The names of the mergers' tensors, and the number of the text model's,
    are logged as a warning; [`merger_from_qwen_vl`] reads the merger. The encoder is in evaluation mode.

    Args:
        folder: A local folder with config.json and safetensors, under the published names (`visual.*`) or those that
            transformers writes (`model.visual.*`). Rotary buffers of old exports are not read. The statistics of raw
            pixels are those of preprocessor_config.json, if there is one.
        dtype: Floating-point dtype of the weights. None keeps that of the files; the weights then stay mapped from
            the files, which must not be overwritten while the encoder is in use.

    Raises:
        ValueError: If it is no such folder, if it holds another model or quantized weights, if a field does not fit,
            if there are pickled weights only, if the index names a file that does not exist, or if tensors are
            missing, unexpected or of another shape or dtype (lists all of them).
    """
    check_dtype(dtype)
    path = Path(folder)
    config = read_config(path)
    vision = get_vision_config(config["model_type"], config.get("vision_config"), **read_statistics(path))
    with torch.device("meta"):
        model = WindowFreeViTModel(vision)
    stored = list_tensors(path).renamed(without_nesting)
    slices = get_slices(model, config["model_type"])
    model = load_weights(model, slices, stored, dtype=dtype, ignored=(MERGERS, TEXT_MODEL, BUFFER), map_files=True)
    _report(stored)
    return model


def _report(stored: StoredTensors) -> None:
    """Log what is not the encoder's."""
    mergers = sorted(name for name in stored.tensors if re.fullmatch(MERGERS, name))
    texts = sum(bool(re.fullmatch(TEXT_MODEL, name)) for name in stored.tensors)
    if mergers or texts:
        logger.warning(
            "Not read, since the encoder has no such tensors: %s; %d tensors of the text model.",
            ", ".join(mergers) or "no merger",
            texts,
        )


def merger_from_qwen_vl(folder: PathLike, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read the merger of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, as the state dict of a projector.

    The projector is "points_merger" for Qwen2-VL and Qwen3-VL, and "patch_merger" for Qwen2.5-VL:
    `model.model.projector.projection.load_state_dict(...)` of a composed model. The DeepStack mergers of Qwen3-VL have
    no counterpart and are not read.

    Args:
        folder: As for [`encoder_from_qwen_vl`].
        dtype: Floating-point dtype of the tensors; None keeps that of the files.

    Raises:
        ValueError: If it is no such folder, or if a tensor of the merger is missing or of another shape or dtype.
    """
    check_dtype(dtype)
    path = Path(folder)
    config = read_config(path)
    vision = get_vision_config(config["model_type"], config.get("vision_config"))
    stored = list_tensors(path).renamed(without_nesting)
    names = get_merger_names(config["model_type"])
    found = {published: name for name, published in names.items()}
    last = stored.tensors.get(names["fc2.bias"])
    width = last.shape[0] if last is not None and last.shape else 0
    shapes = get_merger_shapes(config["model_type"], vision.hidden_size, vision.spatial_merge_size, width)
    check_tensors(shapes, stored, (r".+",))
    return {
        found[published]: tensor.clone() if dtype is None else tensor.to(dtype, copy=True)
        for published, tensor in stored.read(found)
    }


def image_processor_from_qwen_vl(folder: PathLike) -> WindowFreeViTImageProcessor:
    """Build the image processor of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, for images.

    It makes the patches of the native image processor, in the same order, but as raw uint8 pixels of one frame, an
    eighth of the size: the encoder normalizes them and repeats the frame. Sizes and statistics come from
    preprocessor_config.json. The encoder also takes the native processors' pixels. For videos use the native video
    processor, which puts two frames into each patch; `preprocess_videos` puts in each frame alone. Fields without
    counterpart are logged as a warning.

    Args:
        folder: A local folder with preprocessor_config.json (or processor_config.json).

    Raises:
        ValueError: If there is no such file, if it lacks a field, or if it has an option that ours does not have.
    """
    fields = require_processor(Path(folder))
    size = fields.get("size") or {}
    if not isinstance(size, dict):
        raise ValueError(f"`folder` must have an image processor whose size is an object, got {size!r}.")
    # As in transformers, areas of their own take precedence over those of "size".
    areas = {edge: fields.get(name) or size.get(edge) for name, edge in _AREAS.items()}
    missing = [name for name, edge in _AREAS.items() if areas[edge] is None]
    missing += [name for name in _FIELDS if fields.get(name) is None]
    if missing:
        raise ValueError(f"`folder` must have {', '.join(missing)} for its image processor, got none.")
    for name, value in _FIXED.items():
        if fields.get(name, value) != value:
            raise ValueError(f"`folder` must have an image processor with {name} = {value}, got {fields[name]!r}.")
    factor = fields.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255):
        raise ValueError(f"`folder` must have an image processor with rescale_factor = 1/255, got {factor!r}.")
    known = {*_AREAS, *_FIELDS, *_OPTIONAL_FIELDS, *_IGNORED, *_FIXED, "size", "rescale_factor"}
    others = sorted(name for name in fields.keys() - known if fields[name] is not None)
    if others:
        logger.warning("Ignored, since the image processor has no such options: %s.", ", ".join(others))
    return WindowFreeViTImageProcessor(
        **{name: fields[name] for name in _FIELDS},
        **{name: fields[name] for name in _OPTIONAL_FIELDS if fields.get(name) is not None},
        size=areas,
        enlarge_tiny=False,
    )
