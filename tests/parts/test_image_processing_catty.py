"""CATTY's image processor: plans against the published steps in loops, pixels against Pillow's, options."""

import random
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import picture
from vlparts import CattyImageProcessor
from vlparts.parts.image_processing_catty import cut_tiles, plan_tiles

SIDES = st.integers(1, 3000)
PLAIN = {"do_rescale": False, "do_normalize": False}  # pixels stay levels from 0 to 255


def published_windows(height: int, width: int, side: int, most: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Height and width after resizing, and left and top of each window, by the published steps."""
    ratio = Fraction(width, height)
    table: dict[Fraction, list[tuple[int, int]]] = {}
    for count in range(1, most + 1):
        for columns, rows in product(range(1, count + 1), repeat=2):
            if columns * rows == count:
                table.setdefault(Fraction(columns, rows), []).append((columns, rows))
    if ratio < 1:
        table = {one: grids for one, grids in table.items() if one <= ratio}
    if ratio > 1:
        table = {one: grids for one, grids in table.items() if one >= ratio}
    grids = table[min(table, key=lambda one: abs(one - ratio))]
    columns, rows = min(grids, key=lambda grid: abs(grid[0] * grid[1] - Fraction(width * height, side**2)))
    if ratio < 1:
        resized_width = columns * side
        resized_height = int(height / width * resized_width)
    else:
        resized_height = rows * side
        resized_width = int(width / height * resized_height)
    step_x = (resized_width - side) // (columns - 1) if columns > 1 else side
    step_y = (resized_height - side) // (rows - 1) if rows > 1 else side
    tops = range(0, resized_height - side + 1, step_y)
    lefts = range(0, resized_width - side + 1, step_x)
    return (resized_height, resized_width), [(top, left) for top in tops for left in lefts]


def found_windows(height: int, width: int, side: int, most: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """The same from the plan; corners are read from tiles of an image of coordinates."""
    plan = plan_tiles(height, width, side, most)
    corners = np.stack(np.indices(plan.resized))
    tiles = cut_tiles(corners, plan.grid, side)
    assert all(tile.shape == (2, side, side) for tile in tiles)
    return plan.resized, [(int(tile[0, 0, 0]), int(tile[1, 0, 0])) for tile in tiles]


def test_tiles_are_those_of_the_published_steps() -> None:
    sizes = random.Random(0)
    for _ in range(3000):
        height, most = sizes.randint(1, 2000), sizes.choice([6, 8, 12])
        width = sizes.randint(-(-height // most), min(2000, most * height))
        assert found_windows(height, width, 28, most) == published_windows(height, width, 28, most)


@pytest.mark.parametrize(
    ("size", "grid", "resized"),
    [
        ((336, 336), (1, 1), (336, 336)),
        ((700, 700), (2, 2), (672, 672)),
        ((480, 640), (2, 3), (672, 896)),  # 3 tiles over 896 pixels overlap by 56
        ((640, 480), (3, 2), (896, 672)),
        ((100, 800), (1, 8), (336, 2688)),
        ((1000, 1001), (2, 3), (672, 672)),
    ],
)
def test_plans_by_hand(size: tuple[int, int], grid: tuple[int, int], resized: tuple[int, int]) -> None:
    plan = plan_tiles(*size, 336, 8)
    assert (plan.clamped, plan.grid, plan.resized) == (size, grid, resized)


@given(SIDES, SIDES, st.integers(4, 64), st.integers(1, 16))
def test_no_image_is_stretched_or_lost(height: int, width: int, side: int, most: int) -> None:
    assume(max(height, width) <= most * min(height, width))
    plan = plan_tiles(height, width, side, most)
    rows, columns = plan.grid
    assert 1 <= rows * columns <= most
    # The shorter side fills the grid exactly, and the other is what the aspect ratio makes of it, rounded down.
    short = columns * side if width < height else rows * side
    assert min(plan.resized) == short
    exact = Fraction(max(height, width) * short, min(height, width))
    assert -1 <= max(plan.resized) - exact <= 0
    for length, count in zip(plan.resized, plan.grid, strict=True):
        line = np.arange(length)[None, :, None].repeat(side, 2)
        starts = [int(tile[0, 0, 0]) for tile in cut_tiles(line, (count, 1), side)]
        assert starts[0] == 0
        assert all(second <= first + side for first, second in pairwise(starts))  # no gap between two tiles
        assert 0 <= length - (starts[-1] + side) <= max(0, count - 2)


@given(SIDES, SIDES, st.integers(2, 12))
def test_a_turned_image_has_a_turned_plan(height: int, width: int, most: int) -> None:
    one, other = (plan_tiles(*size, 28, most, "clamp") for size in ((height, width), (width, height)))
    assert one.resized == other.resized[::-1]
    assert one.clamped == other.clamped[::-1]
    assert one.grid == other.grid[::-1]


def test_views_are_tiles_row_after_row_and_then_all_of_the_image() -> None:
    image = picture(130, 90)
    output = CattyImageProcessor(tile_size=32, **PLAIN)([image, picture(10, 10)], return_tensors="np")
    assert output["image_tile_grid"].tolist() == [[2, 3], [1, 1]]
    assert output["pixel_values"].shape == (7 + 2, 3, 32, 32)
    assert output["pixel_values"].dtype == np.float32
    resized = image.resize((92, 64), Image.Resampling.BILINEAR)
    expected = [resized.crop((x, y, x + 32, y + 32)) for y in (0, 32) for x in (0, 30, 60)]
    expected.append(resized.resize((32, 32), Image.Resampling.BILINEAR))
    for found, tile in zip(output["pixel_values"], expected, strict=False):
        np.testing.assert_array_equal(found, np.asarray(tile).transpose(2, 0, 1))


def test_an_extreme_image_is_refused_or_shrunk_as_the_published_program_does() -> None:
    image = picture(90, 10)
    processor = CattyImageProcessor(tile_size=16, **PLAIN)
    with pytest.raises(ValueError, match="image of 90 x 10 pixels has an aspect ratio of more than `max_tiles`=8"):
        processor(image)
    output = processor(image, on_extreme_aspect="clamp", return_tensors="np")
    resized = image.resize((80, 10), Image.Resampling.BILINEAR).resize((128, 16), Image.Resampling.BILINEAR)
    found = np.concatenate(list(output["pixel_values"][:8]), axis=2)
    np.testing.assert_array_equal(found, np.asarray(resized).transpose(2, 0, 1))
    assert plan_tiles(90, 10, 16, 8, "clamp").clamped == (80, 10)


def test_statistics_and_options_are_saved(tmp_path: Any) -> None:
    processor = CattyImageProcessor(tile_size=16, max_tiles=4, on_extreme_aspect="clamp", image_std=[0.5, 0.5, 0.25])
    processor.save_pretrained(tmp_path)
    again = CattyImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    white = again(Image.new("RGB", (100, 10), "white"), return_tensors="pt")
    assert white["image_tile_grid"].tolist() == [[1, 4]]
    expected = [(1 - mean) / std for mean, std in zip(processor.image_mean, [0.5, 0.5, 0.25], strict=True)]
    np.testing.assert_allclose(white["pixel_values"][0, :, 0, 0], expected, rtol=1e-6)


def test_servers_count_views_by_the_size() -> None:
    processor = CattyImageProcessor(tile_size=16)
    for size in ((10, 30), (17, 16), (80, 10)):
        output = processor(picture(*size[::-1]), return_tensors="pt")
        assert processor.get_number_of_image_patches(*size) == len(output["pixel_values"])
    assert processor.get_number_of_image_patches(30, 30, {"max_tiles": 1}) == 2
    assert processor.get_tile_grid(10, 90, on_extreme_aspect="clamp") == (1, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_size": 0}, "`tile_size` must be an integer of at least 1, got 0"),
        ({"max_tiles": 0}, "`max_tiles` must be an integer of at least 1, got 0"),
        ({"on_extreme_aspect": "pad"}, "`on_extreme_aspect` must be one of raise, clamp, got 'pad'"),
        ({"do_resize": False}, "`do_resize` must be True, got False"),
        ({"size": {"height": 8, "width": 8}}, "`size` must be unset, got .*: the size of a tile is `tile_size`"),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, "`crop_size` must be unset"),
        ({"do_pad": True}, "`do_pad` must be unset"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CattyImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        CattyImageProcessor()(picture(10, 10), **options)


def test_no_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="`images` is empty"):
        CattyImageProcessor()([])
