"""Image files and Pillow images: opening, EXIF orientation, and 8-bit levels."""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

ImageSource = str | os.PathLike[str] | IO[bytes]

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSED = (5, 6, 7, 8)  # its values that exchange width and height
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")

_limit_lock = threading.Lock()


def open_image(
    source: ImageSource, convert_rgb: bool = True, max_image_pixels: int | None = None, frame: int = 0
) -> Image.Image:
    """Open an image file, decode all of it, and apply its EXIF orientation.

    Args:
        source: Path of a file in any format that Pillow reads, or a binary file.
        convert_rgb: Convert the image to RGB, see [`to_rgb`].
        max_image_pixels: Largest number of pixels, against files that are small on disk and huge in memory; None for
            Pillow's own limit, `2 * PIL.Image.MAX_IMAGE_PIXELS` (178,956,970 pixels unless it is changed).
        frame: Index of the frame, such as a page of a TIFF file.

    Returns:
        The upright image, in memory; the file is closed.

    Raises:
        ValueError: If the file does not exist, is not an image, is truncated or damaged, has more pixels than the
            limit, or has levels of unknown range. The message names the path.
    """
    with opened_image(source, max_image_pixels) as image:
        if frame:
            image.seek(frame)
        return read_image(image, convert_rgb)


def image_size(source: ImageSource, max_image_pixels: int | None = None, frame: int = 0) -> tuple[int, int]:
    """Return (width, height) of an image file after applying its EXIF orientation, without decoding its pixels.

    Args:
        source: Path of a file in any format that Pillow reads, or a binary file.
        max_image_pixels: As for [`open_image`].
        frame: As for [`open_image`].

    Raises:
        ValueError: If the file does not exist, is not an image, or has more pixels than the limit.
    """
    with opened_image(source, max_image_pixels) as image:
        if frame:
            image.seek(frame)
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of a Pillow image after applying its EXIF orientation."""
    # Pillow decodes a PNG image to find EXIF data behind the pixels, where hardly any file has them.
    whole = image.format != "PNG" or _has_late_text(image)
    exif = image.getexif() if whole else Image.Image.getexif(image)
    is_transposed = exif.get(_ORIENTATION) in _TRANSPOSED
    if is_transposed and image.format == "TIFF":
        image.load()  # Pillow turns TIFF images itself: some versions when they open, others when they load
        return image.size
    return (image.height, image.width) if is_transposed else image.size


def _has_late_text(image: Image.Image) -> bool:
    """Whether a PNG file that is not decoded yet may have EXIF data behind its pixels, by the names of its chunks."""
    file: Any = getattr(image, "fp", None)  # of an image file only
    if file is None:
        return False
    position, at, seen_pixels = file.tell(), 8, False
    try:
        while True:
            file.seek(at)
            header = file.read(8)
            kind = header[4:]
            if len(header) < 8 or kind == b"IEND":
                return False
            if seen_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            seen_pixels |= kind == b"IDAT"
            at += 12 + int.from_bytes(header[:4])
    finally:
        file.seek(position)


@contextmanager
def opened_image(source: ImageSource, max_image_pixels: int | None) -> Iterator[Image.Image]:
    """Open an image file without decoding it; whatever fails inside is a ValueError that names the file."""
    if max_image_pixels is not None and (isinstance(max_image_pixels, bool) or max_image_pixels < 1):
        raise ValueError(f"`max_image_pixels` must be an integer of at least 1 or None, got {max_image_pixels!r}.")
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "from memory")
    try:
        with _open(source, max_image_pixels) as image:
            if max_image_pixels is not None and image.width * image.height > max_image_pixels:
                raise Image.DecompressionBombError
            yield image
    except FileNotFoundError:
        raise ValueError(f"Image {name} does not exist.") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) if max_image_pixels is None else max_image_pixels
        raise ValueError(
            f"Image {name} has more than {limit} pixels; pass a larger `max_image_pixels` if the file is trusted."
        ) from None
    except Exception as error:  # Pillow's decoders raise many types, such as SyntaxError and struct.error
        raise ValueError(f"Image {name} cannot be read: {_reason(error)}") from None


def _open(source: Any, max_image_pixels: int | None) -> Image.Image:
    if max_image_pixels is None:
        return Image.open(source)
    # Pillow has one limit per process, which may be the smaller one. The caller checks the size before any decoding.
    with _limit_lock:
        previous, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = previous


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


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


def read_image(image: Image.Image, convert_rgb: bool = True) -> Image.Image:
    """Decode a Pillow image that may not be loaded from its file yet, turn it upright, and convert it to 8-bit RGB.

    An image whose EXIF data has an orientation other than 1 is turned, and the result has no orientation, so turning
    it again changes nothing. Pillow keeps the EXIF data of an image that is converted, resized or rotated: turn an
    image with `ImageOps.exif_transpose`, not with `Image.rotate`, if it is passed on.

    Args:
        image: A Pillow image.
        convert_rgb: Whether to convert it, see [`to_rgb`].

    Raises:
        ValueError: If the file is truncated or corrupt, or the range of the levels is unknown.
    """
    try:
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # as in `open_image`
        raise ValueError(f"The image cannot be read: {_reason(error)}.") from None
    return to_rgb(image) if convert_rgb else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Transparency (alpha channels, transparent palette entries and levels) is composited onto white. 16-bit grey is
    scaled by 255 / 65535, whereas `Image.convert` clips it at 255; so are 32-bit integers, in which Pillow opens some
    16-bit files. Floats are from 0 to 1. CMYK, palette, grey, 1-bit, YCbCr, LAB and HSV are converted by Pillow.

    Args:
        image: A Pillow image.

    Returns:
        The image in mode "RGB".

    Raises:
        ValueError: If floats are not from 0 to 1, or integers not from 0 to 65535.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode in _SIXTEEN_BIT_MODES:
        grey = pillow_levels(image)
        transparent = image.info.get("transparency")
        if transparent is not None:
            grey = np.where(np.asarray(image) == transparent, np.uint8(255), grey)
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def pillow_levels(image: Image.Image) -> np.ndarray:
    """Return the channels of a Pillow image as they are, `(H, W)` or `(H, W, C)`, scaled to 8 bits.

    Raises:
        ValueError: If the range of the levels is unknown, or they are indices into a palette.
    """
    if image.mode in ("P", "PA"):
        raise ValueError(
            f"`image` has mode {image.mode!r}, whose levels are indices into a palette; pass do_convert_rgb=True."
        )
    levels = np.asarray(image)
    if image.mode in _SIXTEEN_BIT_MODES:
        if levels.size and not 0 <= levels.min() <= levels.max() <= 65535:
            raise ValueError(
                f"`image` has mode {image.mode!r} with levels {levels.min()}..{levels.max()}; expected 0..65535."
            )
        levels = levels.astype(np.uint16)
    return eight_bit_levels(levels)


def eight_bit_levels(levels: np.ndarray) -> np.ndarray:
    """Scale the levels of an image to 8 bits: the type says the range.

    Args:
        levels: bool is 0 or 255; uint8 is unchanged; uint16 is scaled by 255 / 65535; floats are from 0 to 1 and
            scaled by 255; other integers are from 0 to 255. Rounded to the nearest level.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: If a level is out of range or not finite, or the dtype is none of these.
    """
    kind = levels.dtype.kind
    if levels.dtype == np.uint8:
        return levels
    if kind == "b":
        return levels.astype(np.uint8) * np.uint8(255)
    if kind == "u" and levels.dtype.itemsize == 2:
        return np.rint(levels * (255 / 65535)).astype(np.uint8)
    if kind not in "iuf":
        raise ValueError(f"The image is an array of {levels.dtype}; expected integers, floats or bool.")
    if not levels.size:
        return levels.astype(np.uint8)
    if kind == "f" and not np.isfinite(levels).all():
        raise ValueError("The image holds values that are not finite (NaN or infinity).")
    scaled = np.rint(levels.astype(np.float64) * 255) if kind == "f" else levels
    if scaled.min() < 0 or scaled.max() > 255:
        expected = (
            "floats from 0 to 1; levels from 0 to 255 are integers"
            if kind == "f"
            else "levels from 0 to 255; 16-bit levels are uint16"
        )
        raise ValueError(
            f"The image holds values of {levels.min():g}..{levels.max():g} in {levels.dtype}; expected {expected}."
        )
    return scaled.astype(np.uint8)
