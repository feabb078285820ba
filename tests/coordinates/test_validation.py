"""Validation of arguments."""

from typing import Any

import numpy as np
import pytest

from vlparts.coordinates import CoordinateError, Region, decode, encode, guess_format
from vlparts.coordinates.validation import check_boxes, check_size, integer, positive_integer


def test_checked_boxes_are_a_copy() -> None:
    given = np.array([[0.0, 1.0, 2.0, 3.0]])
    checked = check_boxes(given, "given")
    checked += 1
    assert given.tolist() == [[0, 1, 2, 3]]


def test_sizes_are_two_positive_integers() -> None:
    for size in ((3, 4), [3, 4], np.array([3, 4])):
        checked = check_size(size)
        assert checked == (3, 4)
        assert all(type(side) is int for side in checked)
    for wrong in ((3,), (3, 0), (3, 4.0), (True, 4), "ab", None):
        with pytest.raises(ValueError, match=r"^`grid` must be \(width, height\), two positive integers, got .*\.$"):
            check_size(wrong, "grid")


@pytest.mark.parametrize("digits", [10, 400, 5000])
def test_sizes_fit_the_numbers_of_formats(digits: int) -> None:
    size = (5, 10**digits)
    with pytest.raises(
        ValueError, match=rf"^`grid` must have sides of at most 1000000000, got one of about 10\*\*{digits}"
    ):
        check_size(size, "grid")
    for call in (
        lambda: decode("(001,002)", size),
        lambda: decode("(001,002)", [size, (5, 5)], "shikra"),
        lambda: encode([Region.point(1, 2)], size, "qwen2_5_vl"),
        lambda: guess_format("(001,002)", size),
    ):
        with pytest.raises(CoordinateError, match="^`image_size` must have sides of at most"):
            call()


@pytest.mark.parametrize("wrong", [True, np.bool_(True), 1.0, "1", None])
def test_other_types_are_not_integers(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^`digits` must be an integer, got .*\.$"):
        integer(wrong, "digits")


def test_integers_may_come_from_numpy() -> None:
    assert type(integer(np.int64(3), "digits")) is int
    assert positive_integer(np.int64(3), "digits") == 3
    with pytest.raises(ValueError, match=r"^`digits` must be an integer of at least 1, got 0\.$"):
        positive_integer(0, "digits")
