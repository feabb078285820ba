"""Index tensors of packed sequences."""

import pytest
import torch
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from vlparts.parts.packed_index import (
    get_cu_seqlens,
    get_max_seqlen,
    get_position_ids,
    merge_order,
    segment_ids,
    validate_grid,
)

GRIDS = {
    "one patch": [[1, 1, 1]],
    "one image": [[1, 3, 5]],
    "mixed": [[1, 2, 7], [1, 1, 1], [1, 13, 1], [1, 4, 4]],
    "video": [[3, 2, 5], [1, 7, 3], [2, 1, 1]],
}


def grid(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


@pytest.mark.parametrize("rows", GRIDS.values(), ids=GRIDS.keys())
def test_cu_seqlens_are_those_of_transformers(rows: list[list[int]]) -> None:
    cu_seqlens = get_cu_seqlens(grid(rows))
    torch.testing.assert_close(cu_seqlens, get_vision_cu_seqlens(grid(rows)))
    assert get_max_seqlen(cu_seqlens) == max(h * w for _, h, w in rows)
    assert isinstance(get_max_seqlen(cu_seqlens), int)


@pytest.mark.parametrize("merge_size", [1, 2, 3])
@pytest.mark.parametrize("rows", GRIDS.values(), ids=GRIDS.keys())
def test_position_ids_are_those_of_transformers(rows: list[list[int]], merge_size: int) -> None:
    blocks = grid([[t, h * merge_size, w * merge_size] for t, h, w in rows])
    expected = get_vision_position_ids(blocks, merge_size)
    torch.testing.assert_close(get_position_ids(blocks, merge_size), expected)
    torch.testing.assert_close(get_position_ids(blocks.int(), merge_size), expected)


def test_position_ids_in_raster_order() -> None:
    expected = [(row, column) for _, h, w in GRIDS["mixed"] for row in range(h) for column in range(w)]
    assert get_position_ids(grid(GRIDS["mixed"])).tolist() == [list(p) for p in expected]


@pytest.mark.parametrize(("height", "width", "merge_size"), [(4, 6, 2), (3, 9, 3), (5, 7, 1), (2, 2, 2)])
def test_merge_order_permutes_raster_positions_into_block_positions(height: int, width: int, merge_size: int) -> None:
    frame = grid([[1, height, width]])
    order = merge_order(height, width, merge_size)
    assert order.dtype == torch.int64
    torch.testing.assert_close(get_position_ids(frame)[order], get_position_ids(frame, merge_size))


def test_an_empty_pack() -> None:
    cu_seqlens = get_cu_seqlens(grid([]))
    assert cu_seqlens.tolist() == [0]
    assert cu_seqlens.dtype == torch.int32
    assert get_max_seqlen(cu_seqlens) == 0
    assert get_position_ids(grid([])).shape == (0, 2)
    assert get_position_ids(grid([]), 2).shape == (0, 2)
    assert segment_ids(cu_seqlens, 0).shape == (0,)
    validate_grid(grid([]), 0)


def test_segment_ids_skip_empty_segments_and_mark_padding() -> None:
    cu_seqlens = torch.tensor([0, 0, 3, 3, 4, 4], dtype=torch.int32)
    ids = segment_ids(cu_seqlens, 6)
    assert ids.tolist() == [1, 1, 1, 3, 5, 5]
    assert ids.dtype == torch.int64


def test_segment_ids_stay_on_the_device_of_the_boundaries() -> None:
    assert segment_ids(torch.zeros(3, dtype=torch.int32, device="meta"), 4).device.type == "meta"


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(2, 2, dtype=torch.int64),
        torch.ones(3, dtype=torch.int64),
        torch.ones(2, 3),
        torch.ones(2, 3) > 0,
    ],
    ids=["two columns", "one dimension", "float", "bool"],
)
def test_a_grid_is_an_integer_table_of_three_columns(bad: torch.Tensor) -> None:
    message = r"`image_grid_thw` must be an integer tensor of shape \(n, 3\), got "
    for call in (get_cu_seqlens, get_position_ids, lambda g: validate_grid(g, 1)):
        with pytest.raises(ValueError, match=message):
            call(bad)


def test_validate_grid_accepts_what_fits() -> None:
    validate_grid(grid([[2, 4, 6], [1, 2, 2]]), 52, 2)
    validate_grid(grid([[2, 4, 6], [1, 2, 2]]).to(torch.int32), 52)


@pytest.mark.parametrize("row", [[0, 2, 2], [1, 0, 2], [1, 2, -2]])
def test_validate_grid_names_an_image_without_patches(row: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"`image_grid_thw\[1\]` must hold positive .*, got \{row}\."):
        validate_grid(grid([[1, 2, 2], row]), 4)


def test_validate_grid_names_an_image_that_does_not_merge() -> None:
    message = r"`image_grid_thw\[1\]` has 2 rows and 3 columns, which spatial_merge_size=2 does not divide\."
    with pytest.raises(ValueError, match=message):
        validate_grid(grid([[1, 2, 2], [1, 2, 3]]), 10, 2)
    with pytest.raises(
        ValueError, match="`image_grid_thw` must have rows and columns that spatial_merge_size=2 divides"
    ):
        get_position_ids(grid([[1, 2, 2], [1, 2, 3]]), 2)
    with pytest.raises(ValueError, match="`merge_size` must divide `height` and `width`, got 2, 2 and 3"):
        merge_order(2, 3, 2)
    with pytest.raises(ValueError, match="`spatial_merge_size` must be an integer of at least 1, got 0"):
        get_position_ids(grid([[1, 2, 2]]), 0)


def test_validate_grid_compares_both_counts() -> None:
    with pytest.raises(ValueError, match="`image_grid_thw` describes 10 patches, but `pixel_values` holds 11"):
        validate_grid(grid([[1, 2, 2], [1, 2, 3]]), 11)
