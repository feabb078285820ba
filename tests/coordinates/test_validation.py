"""Validation of arguments."""

from typing import Any

import numpy as np
import pytest

from vlparts.coordinates import (
    FORMATS,
    CoordinateError,
    Frame,
    ImageRegions,
    SmartResize,
    StreamDecoder,
    check_region,
    convert,
    decode,
    decode_array,
    encode,
    encode_array,
    guess_format,
    report,
)
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


@pytest.mark.parametrize("side", [2**53 + 1, 10**400, 10**5000], ids=["exact", "float", "printed"])
def test_sides_beyond_exact_floats_are_the_documented_error(side: int) -> None:
    size, names = (side, side), r"`(image_size|\(width, height\)|size)` must"
    assert check_size((2**53, 1)) == (2**53, 1)
    with pytest.raises(
        ValueError, match=r"^`grid` must be .*, two positive integers of at most 9007199254740992, got"
    ):
        check_size(size, "grid")
    for fmt in FORMATS.values():
        with pytest.raises(CoordinateError, match=names):
            encode([], size, fmt)
        with pytest.raises(CoordinateError, match=names):
            decode("(001,002)", size, fmt, on_error="skip")
    for call in (
        lambda: convert("(001,002)", None, "claude", size),
        lambda: guess_format("(001,002)", size),
        lambda: StreamDecoder(size),
        lambda: encode_array([[0, 0, 1, 1]], size),
        lambda: decode_array(["(000,000),(001,001)"], size),
        lambda: check_region({"point": [1, 2]}, size),
        lambda: report(["(001,002)"], [[]], [size]),
        lambda: Frame.padded_square(size),
        lambda: SmartResize()(size),
        lambda: ImageRegions("a", *size),
    ):
        with pytest.raises(ValueError, match=names):
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
