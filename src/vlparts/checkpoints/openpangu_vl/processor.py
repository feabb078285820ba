"""The preprocessor_config.json of openPangu-VL to our image processor and back."""

import logging
from pathlib import Path
from typing import Any

from ...parts.chat_templates import OPENPANGU_VISION_TOKENS
from ...parts.configuration_windowfree import WindowFreeViTConfig
from ...parts.image_processing_windowfree import WindowFreeViTImageProcessor
from ...parts.image_transforms import get_area_limits
from .._processor import require_processor

logger = logging.getLogger(__name__)

# Published name: our name.
_FIELDS = {
    "patch_size": "patch_size",
    "merge_size": "merge_size",
    "image_mean": "image_mean",
    "image_std": "image_std",
    "any_res_dynamic_video_pixels": "video_dynamic_pixels",
    "any_res_min_video_total_pixels": "video_min_total_pixels",
    "any_res_max_video_total_pixels": "video_max_total_pixels",
    "any_res_min_frame_pixels": "video_min_frame_pixels",
    "any_res_max_frame_pixels": "video_max_frame_pixels",
}
_AREAS = ("min_pixels", "max_pixels")
_OPTIONAL_FIELDS = ("do_resize", "do_convert_rgb", "resample")
# Class names, "temporal_patch_size", which the published code always sets to 1, and what its model computes instead of
# the processor, as ours does.
_IGNORED = {
    "auto_map",
    "image_processor_type",
    "video_processor_type",
    "processor_class",
    "temporal_patch_size",
    "do_rescale",
    "do_normalize",
    "rescale_factor",
}


def get_image_processor(folder: Path) -> WindowFreeViTImageProcessor:
    """Build the image processor that a folder describes. Fields without counterpart are logged as a warning.

    Raises:
        ValueError: If there is no file, or if a field is missing or invalid.
    """
    fields = require_processor(folder)
    missing = [name for name in (*_AREAS, *_FIELDS) if fields.get(name) is None]
    if missing:
        raise ValueError(f"`folder` must have {', '.join(missing)} for its image processor, got none.")
    known = {*_AREAS, *_FIELDS, *_OPTIONAL_FIELDS, *_IGNORED}
    others = sorted(name for name in fields.keys() - known if fields[name] is not None)
    if others:
        logger.warning("Ignored, since the image processor has no such options: %s.", ", ".join(others))
    return WindowFreeViTImageProcessor(
        **{ours: fields[published] for published, ours in _FIELDS.items()},
        **{name: fields[name] for name in _OPTIONAL_FIELDS if fields.get(name) is not None},
        size={"shortest_edge": fields["min_pixels"], "longest_edge": fields["max_pixels"]},
    )


def published_processor(vision: WindowFreeViTConfig) -> dict[str, Any]:
    """The fields of preprocessor_config.json for an encoder, with the default sizes of images and videos."""
    processor = WindowFreeViTImageProcessor(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        image_mean=vision.image_mean,
        image_std=vision.image_std,
    )
    areas = get_area_limits(processor.size)
    return {
        "image_processor_type": "OpenPanguVLImageProcessorFast",
        "processor_class": "OpenPanguVLProcessor",
        **dict(zip(_AREAS, areas, strict=True)),
        "temporal_patch_size": vision.temporal_patch_size,
        **{published: getattr(processor, ours) for published, ours in _FIELDS.items()},
    }


def check_token_ids(tokenizer: Any, config: dict[str, Any]) -> None:
    """Compare the ids of a tokenizer's vision tokens with those in config.json.

    Raises:
        ValueError: If they differ.
    """
    for name, token in OPENPANGU_VISION_TOKENS.items():
        expected, found = config.get(f"{name}_id"), tokenizer.convert_tokens_to_ids(token)
        if expected is not None and found != expected:
            raise ValueError(
                f"`folder` must have a tokenizer with the ids of its config.json: {name}_id is {expected}, but "
                f"{token} is {found}."
            )
