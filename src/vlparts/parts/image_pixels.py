"""Pixels of packed images: cutting frames into patches, and normalization of raw pixels.

The dtype of `pixel_values` says whether they are raw: uint8 is raw (0 to 255) and normalized by the model, floating
point is normalized. A row of `pixel_values` is one patch, channels first: `(C, P, P)`, or `(C, T, P, P)` with T
frames, flattened.
"""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

MAX_NORMALIZED_MAGNITUDE = 16.0
"""Largest magnitude of normalized pixels. With CLIP's statistics they are between -1.8 and 2.2."""

_NORMALIZED = "normalized pixels in floating point"


def patchify(frames: np.ndarray, patch_size: int, merge_size: int = 1) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut an image or video into patches, frame by frame, in reading order of blocks of m x m patches.

    Args:
        frames: `(T, C, H, W)`, of any dtype; an image is one frame.
        patch_size: Side P of a patch in pixels.
        merge_size: Side m of a block; its m * m patches are consecutive, row by row.

    Returns:
        `(T * H/P * W/P, C*P*P)` patches of the same dtype, and the frames T, rows H/P and columns W/P of the grid.

    Raises:
        ValueError: If a side is not a multiple of `patch_size * merge_size`.
    """
    height, width = frames.shape[-2:]
    factor = patch_size * merge_size
    if height % factor or width % factor:
        raise ValueError(
            f"The image has a size of {width} x {height} pixels (width x height); without `do_resize` both sides "
            f"must be multiples of {factor} (`patch_size` * `merge_size`)."
        )
    patches = rearrange(
        frames,
        "t c (h block_h patch_h) (w block_w patch_w) -> (t h w block_h block_w) (c patch_h patch_w)",
        block_h=merge_size,
        block_w=merge_size,
        patch_h=patch_size,
        patch_w=patch_size,
    )
    return patches, (len(frames), height // patch_size, width // patch_size)


def normalize_raw_pixels(
    pixel_values: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rescale and normalize raw pixels: `(x / 255 - mean) / std`, as one multiplication and addition.

    Computed in float32 (float64 if `dtype` is) and rounded once to `dtype`.

    Args:
        pixel_values: `(L, C*P*P)` or `(L, C*T*P*P)` uint8, channels first.
        mean: Mean of each of the C channels, for values in [0, 1].
        std: Standard deviation of each channel, for values in [0, 1].
        dtype: Floating-point dtype of the result.

    Returns:
        Normalized pixels of the same shape.

    Raises:
        ValueError: If the pixels are not uint8, shapes do not match, a standard deviation is not positive, or `dtype`
            is not floating point.
    """
    if pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` is {pixel_values.dtype}: floating-point pixels are normalized already; expected raw "
            "pixels, uint8 from 0 to 255."
        )
    _check_raw_pixels(pixel_values, mean, std)
    if not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be floating point, got {dtype}.")
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    scales = [1 / (255 * deviation) for deviation in std]
    shifts = [-average / deviation for average, deviation in zip(mean, std, strict=True)]
    scale, shift = torch.tensor([scales, shifts], dtype=computed, device=pixel_values.device)[..., None]
    channels = rearrange(pixel_values, "l (c p) -> l c p", c=len(mean)).to(computed)
    return rearrange(torch.addcmul(shift, channels, scale), "l c p -> l (c p)").to(dtype)


def check_normalized(pixel_values: Tensor, *, raw: bool = True) -> None:
    """Check by dtype and range that pixels are raw or normalized. Synchronizes with the device.

    The range is not checked while exporting, nor on the meta device.

    Dark raw pixels and pixels in [0, 1] cannot be distinguished from normalized ones.

    Args:
        pixel_values: Pixels of any shape.
        raw: Whether uint8 pixels are accepted, which are raw; for models that normalize them.

    Raises:
        ValueError: If a floating-point tensor holds values beyond `MAX_NORMALIZED_MAGNITUDE` or not finite, or the
            dtype is neither accepted uint8 nor floating point.
    """
    if raw and pixel_values.dtype == torch.uint8:
        return
    expected = "raw pixels as uint8, or normalized pixels in floating point" if raw else _NORMALIZED
    if not pixel_values.is_floating_point():
        raise ValueError(f"`pixel_values` is {pixel_values.dtype}; expected {expected}.")
    if torch.compiler.is_exporting() or pixel_values.is_meta:
        return
    largest = float(pixel_values.detach().abs().max()) if pixel_values.numel() else 0.0
    if not largest <= MAX_NORMALIZED_MAGNITUDE:  # true for NaN too
        remedy = "pass them as uint8, which the model normalizes, or use" if raw else "normalize them by"
        raise ValueError(
            f"`pixel_values` holds values up to {largest:g} in {pixel_values.dtype}; expected normalized pixels of at "
            f"most {MAX_NORMALIZED_MAGNITUDE:g}. If these are raw pixels (0 to 255), {remedy} `normalize_raw_pixels`."
        )


def _check_raw_pixels(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    if pixel_values.dtype != torch.uint8:
        raise ValueError(f"`pixel_values` is {pixel_values.dtype}; expected raw pixels, uint8 from 0 to 255.")
    if not mean or len(mean) != len(std):
        raise ValueError(f"`mean` and `std` must have one value per channel, got {len(mean)} and {len(std)} values.")
    if pixel_values.ndim != 2 or pixel_values.shape[1] == 0 or pixel_values.shape[1] % len(mean):
        raise ValueError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected (L, C * P * P) or (L, C * T * P * P) "
            f"with C = {len(mean)} channels, the number of values in `mean`."
        )
    if not all(deviation > 0 for deviation in std):
        raise ValueError(f"`std` must be positive, got {tuple(std)}.")
