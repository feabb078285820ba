"""Many boxes at once, and the numbers alone."""

import math
from typing import Any

import numpy as np
import pytest

from vlparts.coordinates.arrays import decode_array, dequantize, encode_array, quantize
from vlparts.coordinates.codec import CoordinateError, decode, encode
from vlparts.coordinates.formats.openpangu import PADDED, padded_format
from vlparts.coordinates.formats.registry import CoordinateFormat
from vlparts.coordinates.frames.rules import Resized
from vlparts.coordinates.grammars.tagged import Shape, TaggedGrammar
from vlparts.coordinates.quantization import NumberRule
from vlparts.coordinates.regions import Region

SIZE = (999, 999)  # one code per pixel
CLAMPED = padded_format(denominator=1000)
BINS = padded_format(denominator=1000, rounding="bins")
TAGGED = CoordinateFormat(
    name="tagged",
    numbers=NumberRule(denominator=None, levels=None),
    grammar=TaggedGrammar(shapes=(Shape("box", "({},{})", open="<box>", close="</box>"),), label_place="none"),
    frame=Resized((500, 300)),
    y_first=("box",),
)


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
    assert codes.tolist() == [[[31, 42], [999, 999]]]


def test_nothing_gives_nothing() -> None:
    assert quantize([], 10).tolist() == []
    assert dequantize([], 10).tolist() == []


@pytest.mark.parametrize(
    ("values", "size", "message"),
    [
        ([5, math.nan], 10, r"`values` must be in \[0, size\], got nan"),
        ([math.inf], 10, "got inf"),
        ([-0.001], 10, "got -0.001 for size 10"),
        ([10.001], 10, "got 10.001"),
        ([True], 10, "`values` must be real numbers, got dtype bool"),
        (["1"], 10, "`values` must be real numbers"),
        ([1], 0, r"`size` must contain positive integers \(pixels\), got 0"),
        ([1], 10.0, "`size` must contain positive integers"),
        ([1], True, "`size` must contain positive integers"),
        ([[1, 2]], (10, -1), "`size` must contain positive integers"),
    ],
)
def test_bad_values_raise(values: Any, size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(values, size)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([1000], r"`codes` must be in \[0, 999\], got 1000..1000"),
        ([-1], r"`codes` must be in \[0, 999\]"),
        ([1.0], "`codes` must be integers, got dtype float64"),
        ([True], "`codes` must be integers, got dtype bool"),
    ],
)
def test_bad_codes_raise(codes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize(codes, 10)


def test_arrays_give_the_texts_of_single_boxes() -> None:
    size = (640, 427)
    corners = np.sort(np.random.default_rng(0).uniform(0, 1, (50, 2, 2)) * size, axis=1)
    boxes = corners.reshape(-1, 4)
    texts = encode_array(boxes, size)
    assert texts.astype(str).tolist() == [encode([Region.box(*box)], size) for box in boxes.tolist()]
    read_back = [list(decode(text, size).regions[0].xyxy) for text in texts.astype(str)]
    assert decode_array(texts, size).tolist() == read_back
    assert decode_array(texts.astype(str).tolist(), size).tolist() == read_back


def test_arrays_may_be_empty() -> None:
    assert encode_array([], SIZE).shape == (0,)
    assert decode_array([], SIZE).shape == (0, 4)


@pytest.mark.parametrize(
    "bad",
    [
        "(001,002)",
        "(001,002),(003,004)\n",
        "(001,002).(003,004)",
        "(001,002),(00\u0663,004)",
        "(001,002),(00x,004)",
        "(009,002),(003,004)",
        "(001,009),(003,004)",
        " 001,002),(003,004)",
    ],
)
def test_arrays_refuse_what_is_not_one_box(bad: str) -> None:
    with pytest.raises(
        CoordinateError, match=r"^`texts\[1\]` must (be exactly one box|have x1 <= x2 and y1 <= y2), got .*\.$"
    ):
        decode_array(["(001,002),(003,004)", bad], SIZE)


def test_arrays_refuse_codes_above_the_levels() -> None:
    with pytest.raises(CoordinateError, match=r"`texts\[0\]` must be exactly one box"):
        decode_array(["(000,000),(101,000)"], SIZE, padded_format(levels=101, denominator=100))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_array([[5, 0, 3, 1]], SIZE), r"`boxes\[0\]` must have x1 <= x2"),
        (lambda: encode_array([[0, 0, math.nan, 1]], SIZE), r"`boxes\[0\]` must be finite"),
        (
            lambda: encode_array([[0, 0, 1000, 1]], SIZE),
            r"`boxes\[0\]` must be within the image of size \(999, 999\), got 1000.0",
        ),
        (lambda: encode_array([[0, 0, 1]], SIZE), r"`boxes` must be an \(n, 4\) array"),
        (lambda: decode_array("(001,002),(003,004)", SIZE), "`texts` must be a sequence of str"),
        (lambda: decode_array([None], SIZE), "`texts` must be a sequence of str"),
    ],
)
def test_bad_arguments_raise(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("fmt", [PADDED, BINS, TAGGED], ids=["padded", "bins", "tagged"])
def test_any_format_with_boxes_has_arrays(fmt: CoordinateFormat) -> None:
    size = (640, 427)
    corners = np.sort(np.random.default_rng(1).uniform(0, 1, (20, 2, 2)) * size, axis=1)
    boxes = corners.reshape(-1, 4)
    texts = encode_array(boxes, size, fmt)
    strings = texts.astype(str).tolist()
    assert strings == [encode([Region.box(*box)], size, fmt) for box in boxes.tolist()]
    read_back = [list(decode(text, size, fmt).regions[0].xyxy) for text in strings]
    assert decode_array(texts, size, fmt).tolist() == read_back
    assert decode_array(strings, size, fmt).tolist() == read_back


@pytest.mark.parametrize(
    "bad", ["", "x", "a <box>(1,2),(3,4)</box>", "<box>(1,2),(3,4)</box> ", "<box>(9,9),(1,9)</box>"]
)
def test_arrays_of_other_formats_refuse_what_is_not_one_box(bad: str) -> None:
    with pytest.raises(CoordinateError, match=r"`texts\[1\]` must be exactly one box"):
        decode_array(["<box>(1,2),(3,4)</box>", bad], SIZE, TAGGED)


def test_arrays_of_other_formats_refuse_what_leaves_the_image() -> None:
    with pytest.raises(ValueError, match=r"`boxes\[0\]` must be within the image of size \(999, 999\), got 1000.0"):
        encode_array([[0, 0, 1000, 1]], SIZE, TAGGED)


def test_pixels_count_to_the_side() -> None:
    assert dequantize([500, 300], (500, 300), TAGGED).tolist() == [500.0, 300.0]
    with pytest.raises(ValueError, match=r"`codes` must be in \[0, 500\], got 301..301"):
        dequantize([[301, 301]], (500, 300), TAGGED)


def test_arrays_are_of_one_image() -> None:
    with pytest.raises(CoordinateError, match="`image_size` must be one"):
        encode_array([], [SIZE, SIZE])  # type: ignore[arg-type]
