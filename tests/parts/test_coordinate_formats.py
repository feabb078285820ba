"""The rule that turns pixels into codes, against exact fractions."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from vlparts.parts.coordinate_formats import (
    FORMATS,
    PADDED,
    CoordinateFormat,
    dequantize,
    get_format,
    quantize,
)

BINS = CoordinateFormat(denominator=1000, rounding="floor")
CLAMPED = CoordinateFormat(denominator=1000)
FORMATS_UNDER_TEST = [PADDED, BINS, CLAMPED, CoordinateFormat(levels=1024, digits=4, denominator=1023)]


def exact_code(value: int, size: int, fmt: CoordinateFormat) -> int:
    """Apply the documented rule in exact arithmetic."""
    scaled = Fraction(value * fmt.denominator, size)
    return min(math.floor(scaled + Fraction(1, 2) if fmt.rounding == "round" else scaled), fmt.levels - 1)


@pytest.mark.parametrize("fmt", FORMATS_UNDER_TEST, ids=lambda fmt: f"{fmt.denominator}-{fmt.rounding}")
@pytest.mark.parametrize("size", [1, 2, 3, 7, 640, 999, 1000, 1001, 1998, 4096, 65537])
def test_every_pixel_has_the_code_of_the_rule(fmt: CoordinateFormat, size: int) -> None:
    pixels = np.arange(size + 1)
    assert quantize(pixels, size, fmt).tolist() == [exact_code(value, size, fmt) for value in range(size + 1)]


@pytest.mark.parametrize("fmt", FORMATS_UNDER_TEST, ids=lambda fmt: f"{fmt.denominator}-{fmt.rounding}")
def test_pixels_of_codes_are_those_of_the_rule(fmt: CoordinateFormat) -> None:
    middle = Fraction(0) if fmt.rounding == "round" else Fraction(1, 2)
    expected = [float((code + middle) * 1920 / fmt.denominator) for code in range(fmt.levels)]
    np.testing.assert_allclose(dequantize(np.arange(fmt.levels), 1920, fmt), expected, rtol=1e-15)


def test_halves_round_up() -> None:
    assert quantize([0.5, 1.5, 2.5], 999).tolist() == [1, 2, 3]


def test_edges_are_exact() -> None:
    for size in (1, 3, 640, 4097):
        assert quantize([0, size], size).tolist() == [0, 999]
        assert dequantize([0, 999], size).tolist() == [0.0, float(size)]


def test_the_far_edge_of_a_thousand_levels_takes_the_last() -> None:
    assert quantize([640], 640, CLAMPED).tolist() == [999]
    assert quantize([640], 640, BINS).tolist() == [999]


def test_a_size_per_axis_broadcasts() -> None:
    points = np.array([[[10.0, 10.0], [320.0, 240.0]]])
    codes = quantize(points, (320, 240))
    assert codes.shape == (1, 2, 2)
    assert codes.tolist() == [[[exact_code(10, 320, PADDED), exact_code(10, 240, PADDED)], [999, 999]]]


def test_nothing_gives_nothing() -> None:
    assert quantize([], 10).tolist() == []
    assert dequantize([], 10).tolist() == []


@pytest.mark.parametrize(
    ("values", "size", "message"),
    [
        ([5, math.nan], 10, r"values must lie in \[0, size\], got nan"),
        ([math.inf], 10, "got inf"),
        ([-0.001], 10, "got -0.001 for size 10"),
        ([10.001], 10, "got 10.001"),
        ([True], 10, "values must be real numbers, got dtype bool"),
        (["1"], 10, "values must be real numbers"),
        ([1], 0, r"size must hold positive integers \(pixels\), got 0"),
        ([1], 10.0, "size must hold positive integers"),
        ([1], True, "size must hold positive integers"),
        ([[1, 2]], (10, -1), "size must hold positive integers"),
    ],
)
def test_bad_values_are_refused(values: Any, size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(values, size)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([1000], r"codes must lie in \[0, 999\], got 1000..1000"),
        ([-1], r"codes must lie in \[0, 999\]"),
        ([1.0], "codes must be integers, got dtype float64"),
        ([True], "codes must be integers, got dtype bool"),
    ],
)
def test_bad_codes_are_refused(codes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize(codes, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digits": 0}, r"digits must lie in 1..9, got 0"),
        ({"digits": 3.0}, "digits must be an integer, got 3.0"),
        ({"levels": True}, "levels must be an integer, got True"),
        ({"levels": 1001}, r"levels must lie in 2..1000 for 3 digits, got 1001"),
        ({"levels": 1}, "levels must lie in"),
        (
            {"denominator": 998},
            "denominator must be at least 999 for 1000 levels and rounding 'round', got 998",
        ),
        ({"rounding": "floor"}, "denominator must be at least 1000 .* 'floor', got 999"),
        ({"rounding": "ceil"}, "rounding must be 'round' or 'floor', got 'ceil'"),
        ({"separator": ""}, "separator must not be empty"),
        ({"separator": ","}, "which joins a box"),
        ({"separator": " "}, "separator ' ' must not occur in label_close ' '"),
        ({"separator": "("}, r"separator must be a str without parentheses, got '\('"),
        ({"label_open": "\uff08"}, "label_open must be a str without parentheses"),
        ({"label_close": None}, "label_close must be a str"),
        ({"name": 3}, "name must be a str"),
    ],
)
def test_bad_formats_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoordinateFormat(**changes)


def test_formats_are_found_by_name() -> None:
    assert get_format(None) is PADDED
    assert get_format("openpangu") is PADDED
    assert get_format(BINS) is BINS
    assert [fmt.name for fmt in FORMATS.values()] == list(FORMATS)


@pytest.mark.parametrize("bad", ["unknown", 3, ["openpangu"]])
def test_unknown_formats_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"format must be a CoordinateFormat or one of \['openpangu'\]"):
        get_format(bad)
