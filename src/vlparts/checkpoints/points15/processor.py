"""The processor of POINTS1.5, from its folder."""

import math
from pathlib import Path
from typing import Any, cast

from PIL import Image
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from ...parts.chat_templates import POINTS_CHAT_TEMPLATE, POINTS_VISION_TOKENS
from ...parts.configuration_windowfree import WindowFreeViTConfig
from ...parts.image_arrays import fetch_images, read_images
from ...parts.image_processing_windowfree import WindowFreeViTImageProcessor
from ...parts.processing_vlm import VisionLanguageProcessor
from ...parts.utils import positive_integer
from .._processor import read_processor
from ..qwen_vl import image_processor_from_qwen_vl
from .config import PathLike

MIN_PIXELS, MAX_PIXELS = 56 * 56, 14 * 14 * 4 * 1280
"""Smallest and largest area of an image in the published code."""


def processor_from_points15(
    folder: PathLike, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> VisionLanguageProcessor:
    """Build the processor of a POINTS1.5: tokenizer, image processor, chat template.

    The template renders the published prompt: turns of the user and the assistant without a system turn, each image
    with its start and end tokens on a line of its own. Images are resized as by `smart_resize` of Qwen2-VL.

    Args:
        folder: A local folder with a tokenizer. Sizes and statistics of images come from preprocessor_config.json, if
            there is one; otherwise they are those of the published code.
        min_pixels: Smallest area of an image, instead of that of the folder. Published evaluations use larger ones,
            up to 1280 * 28 * 28, which enlarges small images.
        max_pixels: Largest area of an image, instead of that of the folder.

    Raises:
        ValueError: If the tokenizer lacks a token, or if the file for images lacks a field or has an option that ours
            does not have.
        OSError: If there is no tokenizer.
    """
    path = Path(folder)
    if read_processor(path) is None:
        images = WindowFreeViTImageProcessor(
            size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}, enlarge_tiny=False
        )
    else:
        images = image_processor_from_qwen_vl(path)
    areas = {"shortest_edge": ("min_pixels", min_pixels), "longest_edge": ("max_pixels", max_pixels)}
    changed = {edge: positive_integer(area, name) for edge, (name, area) in areas.items() if area is not None}
    images.size = {edge: images.size[edge] for edge in areas} | changed
    # With a base configuration, transformers does not read config.json, nor runs the code that it names.
    tokenizer = AutoTokenizer.from_pretrained(path, config=PreTrainedConfig(), local_files_only=True)
    return VisionLanguageProcessor(
        images,
        tokenizer,
        chat_template=POINTS_CHAT_TEMPLATE,
        spatial_merge_size=images.merge_size,
        **cast(dict[str, Any], POINTS_VISION_TOKENS),
    )


def shrink_image(image: Any, max_pixels: int) -> Image.Image:
    """Shrink an image to an area, as POINTS-Reader does with the `max_pixels` of an image in a conversation.

    The image processor then resizes the result to whole patches.

    Args:
        image: A Pillow image, an array, a tensor, a path or a URL.
        max_pixels: Largest area in pixels.

    Returns:
        The upright image in RGB. A larger one is shrunk with its aspect ratio, sides rounded down.

    Raises:
        ValueError: If the image cannot be read, or if a side would have no pixel.
    """
    limit = positive_integer(max_pixels, "max_pixels")
    upright: Image.Image = read_images(fetch_images([image]))[0]
    width, height = upright.size
    if width * height <= limit:
        return upright
    scale = math.sqrt(height * width / limit)
    size = math.floor(width / scale), math.floor(height / scale)
    if min(size) < 1:
        raise ValueError(f"`max_pixels` must leave a pixel of each side of {width} x {height}, got {max_pixels}.")
    return upright.resize(size)


def published_processor(vision: WindowFreeViTConfig) -> dict[str, Any]:
    """The fields of preprocessor_config.json, with the areas of the published code.

    Args:
        vision: The encoder's configuration.
    """
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": vision.image_mean,
        "image_std": vision.image_std,
        "max_pixels": MAX_PIXELS,
        "merge_size": vision.spatial_merge_size,
        "min_pixels": MIN_PIXELS,
        "patch_size": vision.patch_size,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "temporal_patch_size": vision.temporal_patch_size,
    }
