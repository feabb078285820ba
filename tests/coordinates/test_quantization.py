"""The rule that turns pixels into codes, against exact fractions."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from vlparts.coordinates.quantization import NumberRule

RELATIVE = [
    NumberRule(),
    NumberRule(denominator=1000),
    NumberRule(denominator=1000, rounding="bins"),
    NumberRule(denominator=1000, levels=1001),
    NumberRule(denominator=1000, rounding="floor"),
    NumberRule(rounding="floor"),
    NumberRule(denominator=1023, levels=1024),
    NumberRule(denominator=1, levels=2),
    NumberRule(denominator=1000, most=1000),
]
PIXELS = [
    NumberRule(denominator=None, levels=None),
    NumberRule(denominator=None, levels=None, far_edge=False),
    NumberRule(denominator=None, levels=None, step=2),
    NumberRule(denominator=None, levels=None, step=2, rounding="floor", far_edge=False),
]
SIDES = [1, 2, 3, 7, 640, 999, 1000, 1001, 1998, 4096, 65537]
HALF = Fraction(1, 2)


def name(rule: NumberRule) -> str:
    return f"{rule.denominator}-{rule.levels}-{rule.rounding}-{rule.step}-{rule.far_edge}-{rule.most}"


def unit(rule: NumberRule, side: int) -> Fraction:
    """Pixels of one code."""
    return Fraction(rule.step) if rule.denominator is None else Fraction(side, rule.denominator)


def last_code(rule: NumberRule, side: int) -> int:
    if rule.levels is not None:
        return rule.levels - 1
    return (side if rule.far_edge else side - 1) // rule.step


def exact_code(value: int, side: int, rule: NumberRule) -> int:
    """Apply the documented rule in exact arithmetic."""
    scaled = value / unit(rule, side)
    return min(math.floor(scaled + HALF if rule.rounding == "round" else scaled), last_code(rule, side))


def exact_pixel(code: int, side: int, rule: NumberRule) -> Fraction:
    """Read a code in exact arithmetic."""
    return min((code + (HALF if rule.rounding == "bins" else 0)) * unit(rule, side), Fraction(side))


@pytest.mark.parametrize("rule", RELATIVE + PIXELS, ids=name)
@pytest.mark.parametrize("side", SIDES)
def test_every_pixel_has_the_code_of_the_rule(rule: NumberRule, side: int) -> None:
    pixels = np.arange(side + 1, dtype=np.float64)
    codes = rule.quantize(pixels, np.float64(side)).tolist()
    assert codes == [exact_code(value, side, rule) for value in range(side + 1)]


@pytest.mark.parametrize("rule", RELATIVE + PIXELS, ids=name)
@pytest.mark.parametrize("side", SIDES)
def test_pixels_of_codes_are_those_of_the_rule(rule: NumberRule, side: int) -> None:
    codes = np.arange(rule.largest(side) + 1)
    expected = [float(exact_pixel(code, side, rule)) for code in codes.tolist()]
    np.testing.assert_allclose(rule.dequantize(codes, np.float64(side)), expected, rtol=1e-15)
    written = codes[: rule.last(side) + 1]
    np.testing.assert_array_equal(rule.quantize(rule.dequantize(written, np.float64(side)), np.float64(side)), written)


@pytest.mark.parametrize("rule", RELATIVE + PIXELS, ids=name)
@pytest.mark.parametrize("side", SIDES)
def test_the_bound_of_the_error_is_kept_and_nearly_reached(rule: NumberRule, side: int) -> None:
    values = np.linspace(0, side, 20_011)
    moved = np.abs(rule.dequantize(rule.quantize(values, np.float64(side)), np.float64(side)) - values).max()
    bound = rule.error_bound((side, side))
    assert bound[0] == bound[1]
    assert moved <= bound[0] * (1 + 1e-9)
    assert moved >= 0.5 * bound[0]


def test_width_goes_with_x_and_height_with_y() -> None:
    points = np.array([[640.0, 240.0], [0.0, 480.0], [320.0, 0.0]])
    assert NumberRule().to_codes(points, [2, 1], (640, 480)) == [[999, 500, 0, 999], [500, 0]]
    read = NumberRule().to_points([[999, 0], [0, 999, 999, 999]], (640, 480))
    assert [list(row) for row in read] == [[(640.0, 0.0)], [(0.0, 480.0), (640.0, 480.0)]]
    assert NumberRule().error_bound((640, 480)) == (320 / 999, 240 / 999)


def test_nothing_gives_nothing() -> None:
    assert NumberRule().to_codes(np.zeros((0, 2)), [], (1, 1)) == []
    assert list(NumberRule().to_points([], (1, 1))) == []


@pytest.mark.parametrize(
    ("rule", "codes", "message"),
    [
        (NumberRule(), [0, 1000], "Code 1000 is above the largest code 999"),
        (NumberRule(denominator=1000, most=1000), [1001, 3], "Code 1001 is above the largest code 1000"),
        (PIXELS[0], [0, 481], "Code 481 is above the largest code 480"),
        (PIXELS[1], [640, 0], "Code 640 is above the largest code 639"),
    ],
)
def test_codes_out_of_range_raise(rule: NumberRule, codes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule.to_points([[0, 0, 0, 0], codes], (640, 480))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": True}, "`levels` must be an integer, got True"),
        ({"levels": 3.0}, "`levels` must be an integer, got 3.0"),
        ({"levels": 1}, "`levels` must be at least 2"),
        ({"levels": None}, "`levels` must be at least 2 if `denominator` is given, got None"),
        ({"denominator": 998}, "`denominator` must be at least 999 for 1000 levels and rounding 'round', got 998"),
        ({"rounding": "bins"}, "`denominator` must be at least 1000 .* 'bins', got 999"),
        ({"rounding": "ceil"}, "`rounding` must be 'round', 'floor' or 'bins', got 'ceil'"),
        ({"step": 2}, "`step` and `far_edge` need `denominator=None`"),
        ({"far_edge": False}, "`step` and `far_edge` need `denominator=None`"),
        ({"step": 0}, "`step` must be at least 1, got 0"),
        ({"most": 998}, "`most` must be at least levels - 1 = 999, got 998"),
        ({"denominator": None}, "`levels` and `most` must be None"),
        ({"denominator": None, "levels": None, "most": 5}, "`levels` and `most` must be None"),
        ({"denominator": None, "levels": None, "rounding": "bins"}, "`rounding` must be 'round' or 'floor'"),
    ],
)
def test_bad_rules_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NumberRule(**changes)
