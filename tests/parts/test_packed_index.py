"""Packing plans, and the index tensors of a packed sequence."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from vlparts.parts.packed_index import (
    get_cu_seqlens,
    get_max_seqlen,
    get_position_ids,
    merge_order,
    plan_packing,
    segment_ids,
    validate_grid,
)

STRATEGIES = ["first_fit", "best_fit_decreasing", "next_fit"]
GRIDS = {
    "one patch": [[1, 1, 1]],
    "one image": [[1, 3, 5]],
    "mixed": [[1, 2, 7], [1, 1, 1], [1, 13, 1], [1, 4, 4]],
    "video": [[3, 2, 5], [1, 7, 3], [2, 1, 1]],
}


def grid(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def paper_lengths(count: int, capacity: int, seed: int) -> list[int]:
    """Patches of images with a side drawn from U(64, 256), log-normal aspects and patches of 16 pixels."""
    draw = random.Random(seed)
    lengths = []
    for _ in range(count):
        side, stretch = draw.uniform(64, 256), math.exp(draw.gauss(0, 0.35) / 2)
        rows, columns = max(1, round(side * stretch / 16)), max(1, round(side / stretch / 16))
        lengths.append(min(capacity, rows * columns))
    return lengths


def padding(lengths: list[int], capacity: int, **options: Any) -> float:
    return 1 - sum(lengths) / (capacity * len(plan_packing(lengths, capacity, **options)))


# --- plan_packing


def test_first_fit_returns_to_an_older_bin() -> None:
    assert plan_packing([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def test_next_fit_keeps_the_order() -> None:
    assert plan_packing([6, 5, 4, 5], 10, strategy="next_fit") == [[0], [1, 2], [3]]


def test_best_fit_decreasing_takes_the_fullest_bin_that_fits() -> None:
    assert plan_packing([2, 6, 5, 4, 3], 10, strategy="best_fit_decreasing") == [[1, 3], [2, 4, 0]]


def test_first_fit_closes_the_fullest_bin() -> None:
    # Item 2 opens a third bin, and of the two others the fuller one closes, be it the younger or the older.
    assert plan_packing([6, 7, 8, 4], 10, open_bins=2) == [[0, 3], [1], [2]]
    assert plan_packing([7, 6, 8, 3], 10, open_bins=2) == [[0], [1, 3], [2]]
    assert plan_packing([7, 6, 8, 3], 10, open_bins=3) == [[0, 3], [1], [2]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_max_items_bounds_the_items_of_a_bin(strategy: str) -> None:
    assert plan_packing([1, 1, 1, 1, 1], 10, max_items=2, strategy=strategy) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_oversize_item_gets_its_own_bin_on_request(strategy: str) -> None:
    bins = plan_packing([3, 11, 3, 20, 4], 10, strategy=strategy, oversize="own_bin")
    assert [1] in bins
    assert [3] in bins
    assert sorted(i for items in bins for i in items) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lengths", [[], np.array([], dtype=np.int64), torch.tensor([], dtype=torch.int64)])
def test_no_items_need_no_bins(strategy: str, lengths: Any) -> None:
    assert plan_packing(lengths, 10, strategy=strategy) == []


@pytest.mark.parametrize("make", [list, tuple, iter, np.array, torch.tensor])
def test_lengths_come_in_any_container(make: Any) -> None:
    assert plan_packing(make([6, 5, 4, 5]), 10) == [[0, 2], [1, 3]]


def test_first_fit_wastes_little_on_the_lengths_of_the_paper() -> None:
    lengths = paper_lengths(5000, capacity=512, seed=0)
    assert padding(lengths, 512) < 0.02
    assert padding(lengths, 512, strategy="best_fit_decreasing") < padding(lengths, 512)
    assert padding(lengths, 512) < padding(lengths, 512, strategy="next_fit") / 5


@pytest.mark.parametrize("length", [0, -3, True, 2.0, 2.5, float("nan"), None, "4"])
def test_a_length_must_be_a_positive_integer(length: Any) -> None:
    with pytest.raises(ValueError, match=r"lengths\[1\] must be an integer of at least 1, got "):
        plan_packing([5, length], 10)


@pytest.mark.parametrize("lengths", [torch.tensor([1.0]), torch.tensor([True]), np.array([1.5]), np.array([True])])
def test_a_container_must_hold_integers(lengths: Any) -> None:
    with pytest.raises(ValueError, match=r"lengths\[0\] must be an integer of at least 1"):
        plan_packing(lengths, 10)


def test_an_oversize_item_is_named() -> None:
    with pytest.raises(ValueError, match=r"lengths\[2\] is 11, which exceeds capacity=10"):
        plan_packing([3, 10, 11], 10)


@pytest.mark.parametrize("option", ["capacity", "max_items", "open_bins"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, float("nan")])
def test_limits_must_be_positive_integers(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} must be an integer of at least 1, got "):
        plan_packing([1], **{"capacity": 10, option: value})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="strategy must be one of .*'first_fit'.*, got 'greedy'"):
        plan_packing([1], 10, strategy="greedy")
    with pytest.raises(ValueError, match="oversize must be 'raise' or 'own_bin', got 'drop'"):
        plan_packing([1], 10, oversize="drop")


# --- index tensors


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
    message = r"image_grid_thw must be an integer tensor of shape \(n, 3\), got "
    for call in (get_cu_seqlens, get_position_ids, lambda g: validate_grid(g, 1)):
        with pytest.raises(ValueError, match=message):
            call(bad)


def test_validate_grid_accepts_what_fits() -> None:
    validate_grid(grid([[2, 4, 6], [1, 2, 2]]), 52, 2)
    validate_grid(grid([[2, 4, 6], [1, 2, 2]]).to(torch.int32), 52)


@pytest.mark.parametrize("row", [[0, 2, 2], [1, 0, 2], [1, 2, -2]])
def test_validate_grid_names_an_image_without_patches(row: list[int]) -> None:
    with pytest.raises(ValueError, match=r"image_grid_thw\[1\] must hold positive .*got \["):
        validate_grid(grid([[1, 2, 2], row]), 4)


def test_validate_grid_names_an_image_that_does_not_merge() -> None:
    message = r"image_grid_thw\[1\] has 2 rows and 3 columns, which spatial_merge_size=2 does not divide"
    with pytest.raises(ValueError, match=message):
        validate_grid(grid([[1, 2, 2], [1, 2, 3]]), 10, 2)
    with pytest.raises(ValueError, match="spatial_merge_size=2 divides"):
        get_position_ids(grid([[1, 2, 2], [1, 2, 3]]), 2)
    with pytest.raises(ValueError, match="merge_size=2 must divide height=2 and width=3"):
        merge_order(2, 3, 2)
    with pytest.raises(ValueError, match="spatial_merge_size must be an integer of at least 1, got 0"):
        get_position_ids(grid([[1, 2, 2]]), 0)


def test_validate_grid_compares_both_counts() -> None:
    with pytest.raises(ValueError, match="image_grid_thw describes 10 patches, but pixel_values holds 11"):
        validate_grid(grid([[1, 2, 2], [1, 2, 3]]), 11)
