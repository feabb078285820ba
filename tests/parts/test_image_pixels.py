"""Pixels of packed images: cutting into patches, normalization, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlparts.parts.image_pixels import MAX_NORMALIZED_MAGNITUDE, check_normalized, normalize_raw_pixels, patchify


def raw_pixels(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def two_steps(pixel_values: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Rescale, then normalize, channel by channel in float64."""
    channels = pixel_values.double().chunk(len(mean), dim=1)
    return torch.cat([(x / 255 - m) / s for x, m, s in zip(channels, mean, std, strict=True)], dim=1)


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([np.uint8, np.float64]),
)
def test_patches_are_cut_block_by_block(
    frames: int, rows: int, columns: int, merge: int, patch: int, channels: int, dtype: type
) -> None:
    shape = (frames, channels, rows * merge * patch, columns * merge * patch)
    video = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    patches, grid = patchify(video, patch, merge)
    expected = []
    for frame, block_row, block_column in np.ndindex(frames, rows, columns):
        for row in range(block_row * merge, (block_row + 1) * merge):
            for column in range(block_column * merge, (block_column + 1) * merge):
                cut = video[frame, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                expected.append(cut.ravel())
    assert grid == (frames, rows * merge, columns * merge)
    assert patches.dtype == dtype
    np.testing.assert_array_equal(patches, np.stack(expected))


def test_an_image_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="30 x 28 pixels.*multiples of 28"):
        patchify(np.zeros((1, 3, 28, 30), dtype=np.uint8), 14, 2)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)]
)
def test_normalising_equals_the_two_steps(dtype: torch.dtype, tolerance: float, frames: int) -> None:
    pixels = raw_pixels(7, 3 * frames * 196)
    normalized = normalize_raw_pixels(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, dtype)
    assert normalized.dtype == dtype
    expected = two_steps(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    torch.testing.assert_close(normalized.double(), expected, atol=tolerance, rtol=tolerance)


def test_half_precision_is_rounded_once() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)[None].repeat(1, 3)
    single = normalize_raw_pixels(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, torch.float32)
    half = normalize_raw_pixels(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, torch.bfloat16)
    assert torch.equal(half, single.bfloat16())


@given(
    st.lists(st.tuples(st.floats(-1, 2), st.floats(0.05, 3)), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(0, 5),
)
def test_any_statistics_and_channels(statistics: list[tuple[float, float]], values: int, rows: int) -> None:
    mean, std = map(list, zip(*statistics, strict=True))
    pixels = raw_pixels(rows, len(mean) * values)
    normalized = normalize_raw_pixels(pixels, mean, std, torch.float64)
    torch.testing.assert_close(normalized, two_steps(pixels, mean, std), atol=1e-11, rtol=1e-11)


def test_raw_and_normalised_pixels_pass() -> None:
    pixels = torch.tensor([[0, 255] * 3], dtype=torch.uint8)
    check_normalized(pixels)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        check_normalized(normalize_raw_pixels(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, dtype))
    check_normalized(torch.tensor([-MAX_NORMALIZED_MAGNITUDE]))
    check_normalized(torch.zeros(0, 588))
    check_normalized(torch.empty(2, 588, device="meta"))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (raw_pixels(2, 588).float(), "up to 255 in torch.float32.*raw pixels.*uint8"),
        (torch.tensor([-16.5]), "up to 16.5.*at most 16"),
        (torch.tensor([0.0, torch.nan]), "up to nan"),
        (torch.tensor([torch.inf]), "up to inf"),
        (raw_pixels(2, 588).int(), "torch.int32; expected raw pixels as uint8"),
        (torch.zeros(3, dtype=torch.bool), "torch.bool"),
    ],
)
def test_what_is_neither_raw_nor_normalised_is_refused(pixels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_normalized(pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": torch.zeros(2, 12)}, "float32: floating-point pixels are normalized already"),
        ({"pixel_values": torch.zeros(2, 12, dtype=torch.int64)}, "int64; expected raw pixels, uint8"),
        ({"pixel_values": raw_pixels(2, 13)}, r"shape \(2, 13\).*C = 3 channels"),
        ({"pixel_values": raw_pixels(2, 0)}, r"shape \(2, 0\)"),
        ({"pixel_values": raw_pixels(2, 12)[0]}, r"shape \(12,\)"),
        ({"mean": [0.5, 0.5]}, "one value per channel, got 2 and 3 values"),
        ({"mean": [], "std": []}, "got 0 and 0 values"),
        ({"std": [0.5, 0.0, 0.5]}, r"`std` must be positive, got \(0.5, 0.0, 0.5\)"),
        ({"std": [0.5, -1.0, 0.5]}, "`std` must be positive"),
        ({"dtype": torch.int32}, "`dtype` must be floating point, got torch.int32"),
    ],
)
def test_bad_input_is_refused(changes: dict, message: str) -> None:
    arguments = {"pixel_values": raw_pixels(2, 12), "mean": [0.5] * 3, "std": [0.5] * 3, **changes}
    with pytest.raises(ValueError, match=message):
        normalize_raw_pixels(**arguments)
