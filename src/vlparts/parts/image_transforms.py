"""Images and videos before they are cut into patches: files, colour modes, sizes, and nested lists."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_utils import SizeDict, get_image_size, make_flat_list_of_images
from transformers.video_utils import is_valid_video

# Error of a number of blocks in float64, so that sides that fit a limit exactly are not rounded past it.
ROUNDING = 1e-9

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def open_image(path: str | os.PathLike[str], convert_rgb: bool = True) -> Image.Image:
    """Open an image file, decode all of it, and apply its EXIF orientation.

    Args:
        path: A file in any format that Pillow reads.
        convert_rgb: Convert the image to RGB, see [`to_rgb`].

    Returns:
        The upright image, in memory; the file is closed.

    Raises:
        ValueError: If the file does not exist, is not an image, is truncated or damaged, has more pixels than Pillow
            accepts (twice `PIL.Image.MAX_IMAGE_PIXELS`), or has a mode of unknown range. The message names the path.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return to_rgb(upright) if convert_rgb else upright
    except FileNotFoundError:
        raise ValueError(f"Image {path} does not exist.") from None
    except Exception as error:  # Pillow's decoders raise many types, such as SyntaxError and struct.error
        reason = str(error) or type(error).__name__
        raise ValueError(f"Image {path} cannot be read: {reason}") from None


def read_image(image: Image.Image, convert_rgb: bool = True) -> Image.Image:
    """Decode a Pillow image that may not be loaded from its file yet, and convert it to 8-bit RGB.

    Args:
        image: A Pillow image.
        convert_rgb: Whether to convert it, see [`to_rgb`].

    Raises:
        ValueError: If the file is truncated or corrupt, or the range of the mode is unknown.
    """
    try:
        image.load()
    except Exception as error:  # as in `open_image`
        raise ValueError(f"The image cannot be read: {str(error) or type(error).__name__}.") from None
    return to_rgb(image) if convert_rgb else image


def check_image_size(height: int, width: int, max_aspect_ratio: float = math.inf) -> None:
    """Check that an image has pixels and is not too elongated.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        max_aspect_ratio: Largest ratio of the longer to the shorter side.

    Raises:
        ValueError: If a side is not positive, or the aspect ratio is too large.
    """
    if height < 1 or width < 1:
        raise ValueError(
            f"The image has a size of {width} x {height} pixels (width x height); expected at least 1 x 1."
        )
    ratio = max(height, width) / min(height, width)
    if ratio > max_aspect_ratio:
        raise ValueError(
            f"The image of {width} x {height} pixels has an aspect ratio of {ratio:.1f}; expected at most "
            f"{max_aspect_ratio:g}."
        )


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Transparency (alpha channels, transparent palette entries) is composited onto white. 16-bit grey is scaled by
    255 / 65535, whereas `Image.convert` clips it at 255. CMYK, palette, grey, 1-bit, YCbCr, LAB and HSV are converted
    by Pillow.

    Args:
        image: A Pillow image.

    Returns:
        The image in mode "RGB".

    Raises:
        ValueError: If the image is float or has integers beyond 16 bits, so that its range is unknown.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ValueError("`image` has mode 'F' (float), whose range is unknown; convert it to 8 bits first.")
    if image.mode in _SIXTEEN_BIT_MODES:
        levels = np.asarray(image).astype(np.int64)
        if levels.size and (levels.min() < 0 or levels.max() > 65535):
            raise ValueError(
                f"`image` has mode {image.mode!r} with levels {levels.min()}..{levels.max()}; expected 0..65535."
            )
        image = Image.fromarray(np.rint(levels * (255 / 65535)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


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
    return [make_flat_list_of_images(item) if item else [] for item in images]


def videos_by_sample(videos: Any) -> list[list[Any]] | None:
    """Lists of the videos of each sample if they are nested, otherwise None (one video, or a flat list)."""
    if not isinstance(videos, (list, tuple)):
        return None
    if any(not isinstance(item, (list, tuple)) or is_valid_video(item) for item in videos):
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
        ValueError: If an element is not a video (for example a path: files are not decoded), or frames of a video
            differ in size.
    """
    if is_valid_video(videos):
        if isinstance(videos, (list, tuple)):
            _check_sizes(videos)
        return [videos]
    if isinstance(videos, (list, tuple)):
        return [video for item in videos for video in flat_list_of_videos(item)]
    if getattr(videos, "ndim", 0) == 5:
        return list(videos)
    raise ValueError(
        "`videos` must hold videos as lists of frames or as arrays with four axes, decoded already, got "
        f"{videos if isinstance(videos, str) else type(videos).__name__!r}."
    )


def _check_sizes(frames: Any) -> None:
    sizes = {frame.size[::-1] if hasattr(frame, "getbands") else get_image_size(frame) for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"`videos` must hold frames of one size in each video, got (height, width) {sorted(sizes)}.")
