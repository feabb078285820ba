"""`validate_grid` with dropped patches and padding."""

import pytest
import torch

from vlparts.parts.packed_index import validate_grid

GRID = torch.tensor([[1, 2, 2], [1, 1, 3], [0, 0, 0]])


def test_kept_patches_with_padding_are_accepted() -> None:
    validate_grid(GRID, 5, keep_index=torch.tensor([0, 3, 5, -1, -1]))


@pytest.mark.parametrize(
    ("keep_index", "message"),
    [
        ([0, 3, 5, -1], r"`keep_index` must be an int64 tensor of shape \(5,\).*\(4,\)"),
        ([0, 3, 7, -1, -1], "`keep_index` must hold indices of the 7 patches .* got 7"),
        ([0, -1, 5, -1, -1], "`keep_index` must hold indices of the 7 patches .* got -1"),
        ([3, 0, 5, -1, -1], r"`keep_index` must be strictly increasing, got \[3, 0, 5\]"),
        ([0, 0, 5, -1, -1], "`keep_index` must be strictly increasing"),
        ([0, 1, 2, -1, -1], "`keep_index` must keep at least one patch of each image, got none of image 1"),
        ([-1, -1, -1, -1, -1], "`keep_index` must keep at least one patch of each image, got none of image 0"),
    ],
)
def test_bad_indices(keep_index: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_grid(GRID, 5, keep_index=torch.tensor(keep_index))


def test_bad_type() -> None:
    with pytest.raises(ValueError, match=r"`keep_index` must be an int64 tensor.*torch\.int32"):
        validate_grid(GRID, 3, keep_index=torch.tensor([0, 3, 5], dtype=torch.int32))


def test_padding_examples_need_a_keep_index() -> None:
    with pytest.raises(ValueError, match=r"`image_grid_thw\[2\]` must hold positive"):
        validate_grid(GRID, 7)


def test_half_zero_rows_are_no_padding() -> None:
    grid = torch.tensor([[1, 2, 2], [0, 0, 3]])
    with pytest.raises(ValueError, match=r"`image_grid_thw\[1\]` must hold positive"):
        validate_grid(grid, 1, keep_index=torch.tensor([0]))
