"""Images as image processors take them, Pillow images, arrays and tensors alike, to 8-bit channels-first arrays."""

import base64
import binascii
import os
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, load_image

from .image_files import check_image_size, eight_bit_levels, open_image, pillow_levels, read_image, to_rgb

_CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGBA
_AXES = "`input_data_format` must be 'channels_first' or 'channels_last'"


def image_to_array(
    image: Any, convert_rgb: bool = True, input_data_format: str | ChannelDimension | None = None
) -> np.ndarray:
    """Convert one image of any type to 8-bit levels, such that an array and the same Pillow image are equal.

    Pillow images are turned upright, see [`read_image`]. The levels of arrays and tensors are scaled to 8 bits by
    their dtype, see [`eight_bit_levels`]; 1, 2, 3 and 4 channels are grey, grey with alpha, RGB and RGBA.

    Args:
        image: A Pillow image, or an array or tensor `(H, W)`, `(H, W, C)` or `(C, H, W)`.
        convert_rgb: Convert the image to RGB, see [`to_rgb`].
        input_data_format: "channels_first" or "channels_last" for arrays with three axes; None finds the axis with 1
            to 4 entries.

    Returns:
        `(C, H, W)` uint8; `(3, H, W)` with `convert_rgb`.

    Raises:
        ValueError: If the image cannot be read, is empty or of another type, has levels of an unknown range, or has
            not exactly one axis that can be the channels and `input_data_format` is None.
    """
    if isinstance(image, Image.Image):
        check_image_size(image.height, image.width)
        image = read_image(image, convert_rgb)
        levels = np.asarray(image) if convert_rgb else pillow_levels(image)
        return np.moveaxis(levels if levels.ndim == 3 else levels[..., None], -1, 0)
    levels = eight_bit_levels(_channels_last(as_numpy(image), input_data_format))
    check_image_size(*levels.shape[:2])
    channels = levels.shape[-1]
    if convert_rgb and channels != 3:
        if channels not in _CHANNELS:
            raise ValueError(
                f"The image has {channels} channels; expected 1 to 4, which can be converted to RGB. Pass "
                "do_convert_rgb=False to keep them."
            )
        levels = np.asarray(to_rgb(Image.fromarray(levels[..., 0] if channels == 1 else np.ascontiguousarray(levels))))
    return np.moveaxis(levels, -1, 0)


def image_to_pillow(image: Any, input_data_format: str | ChannelDimension | None = None) -> Image.Image:
    """Convert one image of any type to an upright Pillow image in RGB, as [`image_to_array`] does."""
    if isinstance(image, Image.Image):
        return read_image(image)
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(image_to_array(image, True, input_data_format), 0, -1)))


def read_images(images: Any, input_data_format: str | ChannelDimension | None = None) -> Any:
    """Convert nested lists of images of any type to lists of upright Pillow images in RGB, also paths and URLs.

    A batch (an array with four axes) becomes a list.

    Args:
        images: One image, a batch, or nested lists of them.
        input_data_format: As for [`image_to_array`].

    Raises:
        ValueError: As by [`image_to_array`] and [`fetch_images`].
    """
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    if isinstance(images, (list, tuple)):
        return [read_images(image, input_data_format) for image in images]
    return image_to_pillow(fetch_images(images), input_data_format)


def as_numpy(image: Any) -> np.ndarray:
    """Return an array or tensor as an array.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        return (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if isinstance(image, np.ndarray):
        return image
    raise ValueError(f"An image must be a Pillow image, a NumPy array or a tensor, got {type(image).__name__}.")


def _channels_last(image: np.ndarray, input_data_format: str | ChannelDimension | None) -> np.ndarray:
    """View an array as `(H, W, C)`."""
    if input_data_format not in (None, *(one.value for one in ChannelDimension), *ChannelDimension):
        raise ValueError(f"{_AXES}, got {input_data_format!r}.")
    if image.ndim == 2:
        return image[..., None]
    if image.ndim != 3:
        raise ValueError(
            f"An image must have the shape (H, W), (H, W, C) or (C, H, W), got an array of shape {image.shape}."
        )
    if input_data_format is None:
        first, last = image.shape[0] in _CHANNELS, image.shape[2] in _CHANNELS
        if first == last:
            found = "two axes that can be the channels" if first else "no axis with 1 to 4 channels"
            raise ValueError(f"An image of shape {image.shape} has {found}; {_AXES} for it, got None.")
        input_data_format = ChannelDimension.FIRST if first else ChannelDimension.LAST
    return np.moveaxis(image, 0, -1) if ChannelDimension(input_data_format) is ChannelDimension.FIRST else image


def flat_list_of_images(images: Any) -> list[Any]:
    """Flatten one image, a batch (an array with four axes), or lists of them in any depth to one list of images.

    Args:
        images: Pillow images, arrays and tensors; unchanged.

    Raises:
        ValueError: If an element is none of these.
    """
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flat_list_of_images(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if isinstance(images, (Image.Image, np.ndarray, torch.Tensor)):
        return [images]
    raise ValueError(f"`images` must hold Pillow images, NumPy arrays or tensors, got {type(images).__name__}.")


def fetch_images(images: Any) -> Any:
    """Open the images in nested lists that are given as paths, URLs or base64 text.

    URLs (http, https) are downloaded and converted to upright RGB by transformers, which drops transparency.

    Args:
        images: One image, or nested lists of images.

    Returns:
        The same lists, with opened images as Pillow images, see [`open_image`].

    Raises:
        ValueError: If an image cannot be opened.
    """
    if isinstance(images, (list, tuple)):
        return [fetch_images(image) for image in images]
    if isinstance(images, os.PathLike):
        return open_image(images)
    return _fetch_image(images) if isinstance(images, str) else images


def _fetch_image(source: str) -> Image.Image:
    if source.startswith(("http://", "https://")):
        return load_image(source)
    if os.path.exists(source):
        return open_image(source)
    is_url = source.startswith("data:image/")
    try:
        encoded = source.partition(",")[2] if is_url else source
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"Image {source[:80]} does not exist, and is neither a URL nor base64 text.") from None
    return open_image(BytesIO(data))
