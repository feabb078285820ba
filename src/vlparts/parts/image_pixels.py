"""Pixels as rows of patches: cutting an image up, and the one place where raw values are normalised.

Pixels travel in one of two forms, and the dtype says which: **uint8 is raw** (0..255), and the model normalises it;
**floating point is normalised** already. So nothing is normalised twice, and nothing never. A row of patches holds
one patch, channels first: `(C, P, P)`, or `(C, T, P, P)` with T frames, flattened.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MAX_NORMALIZED_MAGNITUDE = 16.0
"""Largest magnitude that normalised pixels may have. With CLIP's statistics they lie in -1.8..2.2."""


def patchify(image: np.ndarray, patch_size: int, merge_size: int = 1) -> tuple[np.ndarray, int, int]:
    """Cut one image into rows of patches, in reading order of the blocks of `merge_size` x `merge_size` patches.

    Args:
        image: `(C, H, W)`, of any dtype.
        patch_size: Side P of a patch in pixels.
        merge_size: Side m of a block; its m * m patches follow each other, row by row.

    Returns:
        `(H/P * W/P, C*P*P)` patches of the image's dtype, and the rows H/P and columns W/P of the grid.

    Raises:
        ValueError: If a side is not a multiple of `patch_size * merge_size`.
    """
    channels, height, width = image.shape
    factor = patch_size * merge_size
    if height % factor or width % factor:
        raise ValueError(
            f"The image has a size of {width} x {height} pixels (width x height); without `do_resize` both sides "
            f"must be multiples of {factor} (patch_size * merge_size)."
        )
    blocks = image.reshape(channels, height // factor, merge_size, patch_size, width // factor, merge_size, patch_size)
    patches = blocks.transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, channels * patch_size**2)
    return patches, height // patch_size, width // patch_size


def normalize_raw_pixels(
    pixel_values: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rescale and normalise raw pixels: `(x / 255 - mean) / std`, as one multiplication and addition.

    It is computed in float32, or float64 where that is asked for, and then rounded once to `dtype`.

    Args:
        pixel_values: `(L, C*P*P)` or `(L, C*T*P*P)` uint8, channels first in a row.
        mean: Mean of each of the C channels, for values in 0..1.
        std: Standard deviation of each channel, for values in 0..1.
        dtype: Floating-point dtype of the result.

    Returns:
        Normalised pixels of the same shape.

    Raises:
        ValueError: If the pixels are not uint8, the shapes do not fit, a standard deviation is not positive, or
            `dtype` is not floating point.
    """
    if pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` is {pixel_values.dtype}: pixels in floating point are already normalised; expected raw "
            "pixels, uint8 0..255."
        )
    _check_raw_pixels(pixel_values, mean, std)
    if not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be floating point, got {dtype}.")
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    scales = [1 / (255 * deviation) for deviation in std]
    shifts = [-average / deviation for average, deviation in zip(mean, std, strict=True)]
    scale, shift = torch.tensor([scales, shifts], dtype=computed, device=pixel_values.device)[..., None]
    channels = pixel_values.unflatten(1, (len(mean), -1)).to(computed)
    return torch.addcmul(shift, channels, scale).flatten(1).to(dtype)


def check_normalized(pixel_values: Tensor) -> None:
    """Refuse pixels that are neither raw nor normalised, by dtype and by range.

    It reads the values, so on an accelerator it waits for them. Dark raw pixels, and pixels in 0..1, cannot be told
    from normalised ones.

    Args:
        pixel_values: Pixels of any shape. uint8 passes: it is raw, and the model will normalise it.

    Raises:
        ValueError: If a floating-point tensor holds values beyond `MAX_NORMALIZED_MAGNITUDE` or values that are not
            finite, or if the dtype is neither uint8 nor floating point.
    """
    if pixel_values.dtype == torch.uint8:
        return
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` is {pixel_values.dtype}; expected raw pixels as uint8, or normalised pixels in floating "
            "point."
        )
    largest = float(pixel_values.detach().abs().max()) if pixel_values.numel() else 0.0
    if not largest <= MAX_NORMALIZED_MAGNITUDE:  # written so that NaN fails too
        raise ValueError(
            f"`pixel_values` holds values up to {largest:g} in {pixel_values.dtype}; expected normalised pixels, "
            f"which stay below {MAX_NORMALIZED_MAGNITUDE:g}. These look like raw pixels (0..255): pass them as uint8, "
            "which the model normalises, or normalise them first with `normalize_raw_pixels`."
        )


def _check_raw_pixels(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    if pixel_values.dtype != torch.uint8:
        raise ValueError(f"`pixel_values` is {pixel_values.dtype}; expected raw pixels, uint8 0..255.")
    if not mean or len(mean) != len(std):
        raise ValueError(
            f"`mean` and `std` must have one value for each channel, got {len(mean)} and {len(std)} values."
        )
    if pixel_values.ndim != 2 or pixel_values.shape[1] == 0 or pixel_values.shape[1] % len(mean):
        raise ValueError(
            f"`pixel_values` has the shape {tuple(pixel_values.shape)}; expected (L, C * P * P) or (L, C * T * P * P) "
            f"with C = {len(mean)} channels, the number of values in `mean`."
        )
    if not all(deviation > 0 for deviation in std):
        raise ValueError(f"`std` must be positive, got {tuple(std)}.")
