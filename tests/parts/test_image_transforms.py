"""Image sizes that are multiples of a patch."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as native_smart_resize

from vlparts.parts.image_transforms import fit_to_grid, smart_resize


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 40),
    st.integers(1, 3_000_000),
    st.integers(1, 3_000_000),
)
def test_sizes_are_multiples_within_the_limits(height: int, width: int, factor: int, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high, factor**2)
    new_height, new_width = fit_to_grid(height, width, factor, low, high, max_aspect_ratio=1e9)
    assert new_height % factor == new_width % factor == 0
    assert min(new_height, new_width) >= factor
    assert new_height * new_width <= high
    # Below the smallest area only where whole blocks within the largest one, or a single row of them, cannot reach it.
    if new_height * new_width < low:
        assert (new_height + factor) * (new_width + factor) > min(low, high)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 32))
def test_an_image_that_fits_is_only_rounded(height: int, width: int, factor: int) -> None:
    assume(min(height, width) >= factor)
    new_height, new_width = fit_to_grid(height, width, factor, 1, 10**9, max_aspect_ratio=1e9)
    assert abs(new_height - height) <= factor / 2
    assert abs(new_width - width) <= factor / 2


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 30))
def test_the_sides_may_be_swapped(height: int, width: int, factor: int) -> None:
    sizes = fit_to_grid(height, width, factor, 100, 10**6, 1e9)
    swapped = fit_to_grid(width, height, factor, 100, 10**6, 1e9)
    assert sizes[0] * sizes[1] <= 10**6
    assert swapped == sizes[::-1] or swapped[0] * swapped[1] <= 10**6


def test_sides_that_fit_a_limit_exactly_are_kept() -> None:
    """Though 75 * sqrt(196 / 75**2) is 13.999999999999998."""
    assert fit_to_grid(75, 75, 1, 196, 196) == (14, 14)


def test_large_images_keep_their_aspect_ratio() -> None:
    assert fit_to_grid(4000, 2000, 16, 256, 512 * 1024) == (1024, 512)
    assert fit_to_grid(10, 20, 16, 128 * 256, 1024**2) == (128, 256)


def test_one_pixel_is_enlarged_to_one_patch() -> None:
    assert fit_to_grid(1, 1, 16, 256, 1024**2) == (16, 16)


def test_extreme_aspect_ratios_are_refused_or_stretched() -> None:
    with pytest.raises(ValueError, match=r"5000 x 10 pixels has an aspect ratio of 500.0; expected at most 200"):
        fit_to_grid(10, 5000, 4, 16, 10**6)
    height, width = fit_to_grid(10, 5000, 4, 16, 10**6, on_extreme_aspect="clamp")
    assert width / height == pytest.approx(200, rel=0.1)
    assert height * width == pytest.approx(50000, rel=0.1)
    width, height = fit_to_grid(5000, 10, 4, 16, 10**6, on_extreme_aspect="clamp")
    assert width / height == pytest.approx(200, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 16, 1, 10**6), "5 x 0 pixels"),
        ((5, 5, 16, 1, 255), r"`max_pixels` must be at least 16\*\*2 .*, got 255"),
        ((5, 5, 16, 2000, 1000), "`max_pixels` must .* got 1000 with `min_pixels`=2000"),
    ],
)
def test_impossible_sizes_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_to_grid(*arguments)


@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(1, 40), st.integers(1, 10**6), st.integers(1, 10**7))
def test_smart_resize_equals_the_native_one(height: int, width: int, factor: int, low: int, high: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    low, high = min(low, high), max(low, high, factor**2)
    assert smart_resize(height, width, factor, low, high) == native_smart_resize(height, width, factor, low, high)


@given(st.integers(1, 150), st.integers(1, 150))
def test_smart_resize_rounds_halves_to_even_blocks(rows: int, columns: int) -> None:
    height, width = 28 * rows + 14, 28 * columns + 14
    expected = tuple(28 * (blocks + blocks % 2) for blocks in (rows, columns))
    assert smart_resize(height, width, 28, 1, 10**9) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 28, 1, 10**6), "5 x 0 pixels"),
        ((10, 2001, 28, 1, 10**6), "2001 x 10 pixels has an aspect ratio of 200.1; expected at most 200"),
        ((50, 50, 28, 1, 783), r"`max_pixels` must be at least 28\*\*2 .*, got 783"),
        ((50, 50, 28, 2000, 1000), "`max_pixels` must .* got 1000 with `min_pixels`=2000"),
    ],
)
def test_smart_resize_refuses_impossible_sizes(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smart_resize(*arguments)
