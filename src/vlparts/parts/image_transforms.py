"""Images and videos before they are cut into patches: sizes, and nested lists."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import SizeDict

from .image_arrays import flat_list_of_images
from .image_files import check_image_size, upright_size

# Error of a number of blocks in float64, so that sides that fit a limit exactly are not rounded past it.
ROUNDING = 1e-9


def get_area_limits(size: SizeDict | Mapping[str, int]) -> tuple[int, int]:
    """Smallest and largest area in pixels from the `size` of an image processor.

    Args:
        size: Both areas, with the keys "shortest_edge" and "longest_edge" as in the Qwen-VL processors.

    Raises:
        ValueError: If a key is missing or its value is zero.
    """
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if not shortest or not longest:
        raise ValueError(f"`size` must have the keys 'shortest_edge' and 'longest_edge' (areas), got {size}.")
    return shortest, longest


def fit_to_grid(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    max_aspect_ratio: float = 200.0,
    on_extreme_aspect: str = "raise",
) -> tuple[int, int]:
    """Compute the size closest to an image's own whose sides are multiples of `factor`, within a range of areas.

    The aspect ratio is kept up to rounding.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        factor: Side of a patch, or of a block of patches, in pixels.
        min_pixels: Smallest area in pixels; smaller images are enlarged.
        max_pixels: Largest area in pixels, never exceeded; at least `factor ** 2`.
        max_aspect_ratio: Largest ratio of the longer to the shorter side.
        on_extreme_aspect: "raise", or "clamp" to stretch the image to `max_aspect_ratio`.

    Returns:
        New height and width in pixels, positive multiples of `factor`.

    Raises:
        ValueError: If a side is not positive, the limits are inconsistent, or the aspect ratio is too large.
    """
    check_image_size(height, width)
    _check_limits(factor, min_pixels, max_pixels)
    ratio = max(height, width) / min(height, width)
    exact_height, exact_width = float(height), float(width)
    if ratio > max_aspect_ratio:
        if on_extreme_aspect != "clamp":
            raise ValueError(
                f"The image of {width} x {height} pixels has an aspect ratio of {ratio:.1f}; expected at most "
                f"{max_aspect_ratio:g}. Pass on_extreme_aspect='clamp' to stretch such images."
            )
        stretch = math.sqrt(ratio / max_aspect_ratio)
        exact_height *= stretch if height < width else 1 / stretch
        exact_width *= stretch if width < height else 1 / stretch

    rows, columns = max(1, round(exact_height / factor)), max(1, round(exact_width / factor))
    blocks = max_pixels // factor**2
    if rows * columns * factor**2 < min_pixels:
        scale = math.sqrt(min_pixels / (exact_height * exact_width)) / factor
        rows, columns = math.ceil(exact_height * scale - ROUNDING), math.ceil(exact_width * scale - ROUNDING)
    if rows * columns > blocks:
        scale = math.sqrt(max_pixels / (exact_height * exact_width)) / factor
        rows, columns = (max(1, math.floor(side * scale + ROUNDING)) for side in (exact_height, exact_width))
        # The area can exceed the limit still if one side was rounded up to one block.
        rows, columns = min(rows, blocks // columns or 1), min(columns, blocks // rows or 1)
    return rows * factor, columns * factor


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, max_aspect_ratio: float = 200.0
) -> tuple[int, int]:
    """Compute the size of an image as `smart_resize` of the Qwen2-VL family of image processors.

    Sides are rounded to multiples of `factor` (halves to even multiples, as by Python's `round`). If the area is then
    outside of the limits, the image is scaled to the limit and its sides are rounded inwards. The result may still be
    outside: if a short side is one block, or if no grid of blocks is between the limits. [`fit_to_grid`] never exceeds
    `max_pixels`.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        factor: Side of a block of patches in pixels.
        min_pixels: Smallest area in pixels.
        max_pixels: Largest area in pixels; at least `factor ** 2`.
        max_aspect_ratio: Largest ratio of the longer to the shorter side.

    Returns:
        New height and width in pixels, positive multiples of `factor`.

    Raises:
        ValueError: If a side is not positive, the limits are inconsistent, or the aspect ratio is too large.
    """
    check_image_size(height, width, max_aspect_ratio)
    _check_limits(factor, min_pixels, max_pixels)
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / beta / factor))
        columns = max(1, math.floor(width / beta / factor))
    elif rows * columns * factor**2 < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * beta / factor), math.ceil(width * beta / factor)
    return rows * factor, columns * factor


def _check_limits(factor: int, min_pixels: int, max_pixels: int) -> None:
    if not factor**2 <= max_pixels or not min_pixels <= max_pixels:
        raise ValueError(
            f"`max_pixels` must be at least {factor}**2 and at least `min_pixels`, got {max_pixels} "
            f"with `min_pixels`={min_pixels}."
        )


def get_frame_area_limits(
    num_frames: int,
    min_frame_pixels: int,
    max_frame_pixels: int,
    min_total_pixels: int,
    max_total_pixels: int,
    dynamic: bool = True,
) -> tuple[int, int]:
    """Area limits of one frame from the pixel budget of a call, as in openPangu-VL's video processor.

    Args:
        num_frames: Number of frames of all videos of the call.
        min_frame_pixels: Smallest area of a frame, regardless of the budget.
        max_frame_pixels: Largest area of a frame, regardless of the budget.
        min_total_pixels: Smallest total area of all frames.
        max_total_pixels: Largest total area of all frames.
        dynamic: Whether the total areas are divided by the number of frames; False for the limits of a frame only.

    Returns:
        Smallest and largest area of one frame in pixels.

    Raises:
        ValueError: If a limit or `num_frames` is not positive, or a smallest area exceeds the largest.
    """
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
    for low, high in ((min_frame_pixels, max_frame_pixels), (min_total_pixels, max_total_pixels)):
        if not 0 < low <= high:
            raise ValueError(
                "Pixel limits must be positive and the smallest at most the largest, got "
                f"{min_frame_pixels}..{max_frame_pixels} for a frame and {min_total_pixels}..{max_total_pixels} "
                "in total."
            )
    if not dynamic:
        return min_frame_pixels, max_frame_pixels
    low, high = (
        max(min(total // num_frames, max_frame_pixels), min_frame_pixels)
        for total in (min_total_pixels, max_total_pixels)
    )
    return low, high


def images_by_sample(images: Any) -> list[list[Any]] | None:
    """Lists of the images of each sample if they are nested, otherwise None (one image, or a flat list)."""
    if not isinstance(images, (list, tuple)) or not any(isinstance(item, (list, tuple)) for item in images):
        return None
    return [flat_list_of_images(item) for item in images]


def videos_by_sample(videos: Any) -> list[list[Any]] | None:
    """Lists of the videos of each sample if they are nested, otherwise None (one video, or a flat list)."""
    if not isinstance(videos, (list, tuple)):
        return None
    if any(not isinstance(item, (list, tuple)) or _is_video(item) for item in videos):
        return None
    return [flat_list_of_videos(item) for item in videos]


def flat_list_of_videos(videos: Any) -> list[Any]:
    """Flatten nested videos to one list.

    Args:
        videos: One video, a list of videos, a list of such lists (one per sample), or an array with five axes. A video
            is a list of frames (images of one size) or an array with four axes.

    Returns:
        The videos, unchanged.

    Raises:
        ValueError: If an element is not a video (for example a path: files are not decoded), or Pillow images of a
            video differ in size.
    """
    if _is_video(videos):
        if isinstance(videos, (list, tuple)):
            sizes = {upright_size(frame)[::-1] for frame in videos if isinstance(frame, Image.Image)}
            check_frame_sizes(sizes)
        return [videos]
    if isinstance(videos, (list, tuple)):
        return [video for item in videos for video in flat_list_of_videos(item)]
    if getattr(videos, "ndim", 0) == 5:
        return list(videos)
    raise ValueError(
        "`videos` must hold videos as lists of frames or as arrays with four axes, decoded already, got "
        f"{videos if isinstance(videos, str) else type(videos).__name__!r}."
    )


def check_frame_sizes(sizes: Collection[tuple[int, ...]]) -> None:
    """Raise ValueError if the distinct (height, width) of the frames of a video are more than one."""
    if len(sizes) > 1:
        raise ValueError(f"`videos` must hold frames of one size in each video, got (height, width) {sorted(sizes)}.")


def _is_video(video: Any) -> bool:
    if isinstance(video, (list, tuple)):
        return bool(video) and all(_is_image(frame) for frame in video)
    return isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim == 4


def _is_image(image: Any) -> bool:
    return isinstance(image, Image.Image) or (isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim in (2, 3))
