"""The preprocessor_config.json of the Qwen-VL family to our image processor."""

import logging
import math
from pathlib import Path
from typing import Any

from ...parts.image_processing_windowfree import WindowFreeViTImageProcessor
from .._processor import require_processor

logger = logging.getLogger(__name__)

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


def get_image_processor(folder: Path) -> WindowFreeViTImageProcessor:
    """Build the image processor that a folder describes. Fields without counterpart are logged as a warning.

    Raises:
        ValueError: If there is no file, or if a field is missing or invalid.
    """
    fields = require_processor(folder)
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
