"""Regions to text and back."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlparts.parts import coordinates
from vlparts.parts.coordinates import (
    PADDED,
    CoordinateError,
    CoordinateFormat,
    Region,
    decode,
    decode_array,
    encode,
    encode_array,
)

SIZE = (999, 999)  # one code per pixel
TAGGED = CoordinateFormat(label_open="<ref>", label_close="</ref>", separator=";")


def read(text: str, **options: Any) -> list[tuple[str, tuple[float, ...], str | None]]:
    """Decode on an image where codes are pixels, into kinds, numbers and labels."""
    regions = decode(text, SIZE, **options).regions
    return [(region.kind, tuple(np.ravel(region.points).tolist()), region.label) for region in regions]


def test_the_text_of_points_and_boxes() -> None:
    regions = [Region.box(1, 20, 300, 999, "red cat"), Region.point(0, 7), Region.point(5, 6, "tip")]
    assert encode(regions, SIZE) == "red cat (001,020),(300,999)\n(000,007)\ntip (005,006)"


def test_width_goes_with_x_and_height_with_y() -> None:
    assert encode([Region.point(640, 240)], (640, 480)) == "(999,500)"
    assert decode("(999,000)", (640, 480)).regions == (Region.point(640, 0),)


def test_other_formats_write_their_own_pieces() -> None:
    regions = [Region.box(1, 2, 3, 4, "a, b"), Region.point(5, 6)]
    text = encode(regions, SIZE, TAGGED)
    assert text == "<ref>a, b</ref>(001,002),(003,004);(005,006)"
    assert decode(text, SIZE, TAGGED).regions == tuple(regions)
    four = CoordinateFormat(levels=1024, digits=4, denominator=1023)
    assert encode([Region.point(1023, 3)], (1023, 1023), four) == "(1023,0003)"


def test_no_regions_are_no_text() -> None:
    assert encode([], SIZE) == ""
    assert decode("", SIZE).regions == ()


def test_regions_may_be_an_iterator() -> None:
    assert encode(iter([Region.point(1, 2)]), SIZE) == "(001,002)"


OUTSIDE = [Region.point(1, 2, "in"), Region.box(-5, 10, 20, 2000, "out"), Region.box(-9, -9, -1, -1)]


def test_a_region_outside_is_an_error() -> None:
    message = r"regions\[1\] .* leaves the image of size \(999, 999\); on_outside='clamp'"
    with pytest.raises(CoordinateError, match=message) as caught:
        encode(OUTSIDE, SIZE)
    assert caught.value.position is None


def test_clamp_moves_to_the_edge() -> None:
    text = encode(OUTSIDE, SIZE, on_outside="clamp")
    assert text == "in (001,002)\nout (000,010),(020,999)\n(000,000),(000,000)"


def test_skip_leaves_out() -> None:
    assert encode(OUTSIDE, SIZE, on_outside="skip") == "in (001,002)"
    assert encode(OUTSIDE[1:], SIZE, on_outside="skip") == ""


@pytest.mark.parametrize(
    "label",
    [
        "a\nb",
        "",
        " cat",
        "cat ",
        "(001,002)",
        "cat (001,002)",
        "cat (12,",
        "(1,2)",
        "cat\u3000",
        "x\uff081\uff0c2",
    ],
)
def test_labels_that_would_not_be_read_back_are_refused(label: str) -> None:
    with pytest.raises(CoordinateError, match="might be read back as"):
        encode([Region.point(9, 9, "fine"), Region.point(1, 2, label)], SIZE)


@pytest.mark.parametrize("label", ["<ref>", "a</ref>", "a;b", "</ref>a<ref>"])
def test_labels_with_pieces_of_the_format_are_refused(label: str) -> None:
    with pytest.raises(CoordinateError, match="might be read back as"):
        encode([Region.point(1, 2, label)], SIZE, TAGGED)


@pytest.mark.parametrize("label", ["cat (2)", "a, b", ",", "(", "12", "\u732b", "the (left, front) one", "x)"])
def test_other_labels_come_back(label: str) -> None:
    regions = (Region.box(1, 2, 3, 4), Region.point(1, 2, label), Region.point(3, 4))
    assert decode(encode(regions, SIZE), SIZE).regions == regions


def test_text_around_coordinates_is_label_or_nothing() -> None:
    text = "There are (2) cats: one at (001,002),(003,004) and one (see figure 3) at (005,006).\nBye."
    assert read(text) == [
        ("box", (1, 2, 3, 4), "There are (2) cats: one at"),
        ("point", (5, 6), "and one (see figure 3) at"),
    ]


def test_labels_start_after_the_last_separator() -> None:
    assert read("Here they are:\ncat (001,002)\n\n(003,004) \r\ndog(005,006)") == [
        ("point", (1, 2), "cat"),
        ("point", (3, 4), None),
        ("point", (5, 6), "dog"),
    ]


def test_a_label_needs_its_marks() -> None:
    assert read("x <ref>cat</ref> (001,002); dog</ref>(003,004);<ref>eel (005,006)", format=TAGGED) == [
        ("point", (1, 2), "cat"),
        ("point", (3, 4), None),
        ("point", (5, 6), None),
    ]


def test_a_separator_may_begin_with_a_comma() -> None:
    listed = CoordinateFormat(separator=", ")
    text = encode([Region.point(1, 2), Region.box(3, 4, 5, 6), Region.point(7, 8, "x")], SIZE, listed)
    assert text == "(001,002), (003,004),(005,006), x (007,008)"
    assert [kind for kind, *_ in read(text, format=listed)] == ["point", "box", "point"]


def test_spans_point_at_the_coordinates() -> None:
    text = "cat (001,002),(003,004)\n(005,006)"
    assert [text[start:end] for start, end in decode(text, SIZE).spans] == [
        "(001,002),(003,004)",
        "(005,006)",
    ]


ERRORS = [
    ("(12", 0, "unfinished"),
    ("(", 0, "unfinished"),
    ("cat (123", 4, "unfinished"),
    ("cat (123,4", 4, "unfinished"),
    ("(123,456", 0, "unfinished"),
    ("(123,456),(1", 0, "unfinished"),
    ("(123,456),(", 0, "unfinished"),
    ("(123,456),", 0, "another pair was begun"),
    ("(12,345)", 0, "malformed"),
    ("(1234,567)", 0, "malformed"),
    ("(123,4567)", 0, "malformed"),
    ("(123, 456)", 0, "malformed"),
    ("( 123,456)", 0, "malformed"),
    ("(-12,345)", 0, "malformed"),
    ("(0.1,0.2)", 0, "malformed"),
    ("(123,456,789)", 0, "malformed"),
    ("(123,456),(12,345)", 0, "malformed"),
    ("\uff08\uff11\uff12\uff13\uff0c\uff14\uff15\uff16\uff09", 0, "malformed"),
    ("(\uff11\uff12\uff13,456)", 0, "malformed"),
    ("(123\uff0c456)", 0, "malformed"),
    ("(123,456\uff09", 0, "malformed"),
    ("(\u0661\u0662\u0663,\u0664\u0665\u0666)", 0, "malformed"),
    ("x (001,002), (003,004)", 2, r"', ' between pairs .* ',' joins a box, '\\n' parts regions"),
    ("(001,002) (003,004)", 0, "' ' between pairs"),
    ("(001,002)(003,004)", 0, "'' between pairs"),
    ("(001,002)\uff0c(003,004)", 0, "between pairs"),
    ("(001,002),(003,004),(005,006)", 0, "more than two pairs in a row"),
    ("(500,100),(400,200)", 0, r"x2 \(400\) is less than x1 \(500\)"),
    ("(100,500),(200,400)", 0, r"y2 \(400\) is less than y1 \(500\)"),
]


@pytest.mark.parametrize(("text", "position", "reason"), ERRORS, ids=[text for text, *_ in ERRORS])
def test_broken_coordinates_are_errors(text: str, position: int, reason: str) -> None:
    with pytest.raises(CoordinateError, match=reason) as caught:
        decode(text, SIZE)
    assert caught.value.position == position
    assert f"position {position}: " in str(caught.value)
    assert decode(text, SIZE, on_error="skip") == coordinates.DecodeResult((), ())
    result = decode(text, SIZE, on_error="collect")
    assert result.regions == ()
    assert [error.position for error in result.errors] == [position]


def test_a_comma_after_a_box_is_text() -> None:
    assert read("(001,002),(003,004),") == [("box", (1, 2, 3, 4), None)]
    assert read("The tip (001,002), seen from above") == [("point", (1, 2), "The tip")]


def test_good_regions_around_an_error_are_kept() -> None:
    text = "cat (001,002)\ndog (12,345)\neel (003,004)\nfox (500,1"
    result = decode(text, SIZE, on_error="collect")
    assert [region.label for region in result.regions] == ["cat", "eel"]
    assert [error.position for error in result.errors] == [text.index("(12"), text.index("(500")]
    assert decode(text, SIZE, on_error="skip").regions == result.regions


def test_codes_above_the_levels_are_errors() -> None:
    percent = CoordinateFormat(levels=101, denominator=100)
    assert decode("(100,000)", SIZE, percent).regions == (Region.point(999, 0),)
    with pytest.raises(CoordinateError, match=r"'\(101,000\)' holds a code above 100"):
        decode("(101,000)", SIZE, percent)


def test_long_messages_are_cut() -> None:
    with pytest.raises(CoordinateError) as caught:
        decode("(001,002)," * 1000, SIZE)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        "( ",
        "(1",
        "(1,",
        "(1.",
        "(001,002),",
        "(001,002) ",
        "(001,002)",
        " ",
        ",",
        "1",
        "(123,",
        "\n",
        "(" + " " * 50,
        "<ref>",
        "\uff08\u0661",
    ],
)
def test_reading_is_linear(piece: str) -> None:
    """A million characters: quadratic work would run into the time limit of the tests."""
    text = piece * (1_000_000 // len(piece))
    for fmt in (PADDED, TAGGED):
        assert decode(text, SIZE, fmt, on_error="skip").regions in ((), (Region.point(1, 2),))


def test_arrays_give_the_texts_of_single_boxes() -> None:
    size = (640, 427)
    corners = np.sort(np.random.default_rng(0).uniform(0, 1, (50, 2, 2)) * size, axis=1)
    boxes = corners.reshape(-1, 4)
    texts = encode_array(boxes, size)
    assert texts == [encode([Region.box(*box)], size) for box in boxes.tolist()]
    read_back = [decode(text, size).regions[0].xyxy for text in texts]
    assert decode_array(texts, size).tolist() == [list(box) for box in read_back]


def test_arrays_may_be_empty() -> None:
    assert encode_array([], SIZE) == []
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
    with pytest.raises(CoordinateError, match=r"texts\[1\] must"):
        decode_array(["(001,002),(003,004)", bad], SIZE)


def test_arrays_refuse_codes_above_the_levels() -> None:
    with pytest.raises(CoordinateError, match=r"texts\[0\] must be one box"):
        decode_array(["(000,000),(101,000)"], SIZE, CoordinateFormat(levels=101, denominator=100))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode([Region.point(1, 2)], (0, 5)), r"image_size must be \(width, height\), two positive"),
        (lambda: encode([], (5.0, 5)), "image_size must be"),
        (lambda: encode([], (True, 5)), "image_size must be"),
        (lambda: encode([], 5), "image_size must be .* got 5"),
        (lambda: encode([], "ab"), "image_size must be"),
        (lambda: decode("", (5, 5, 5)), "image_size must be"),
        (lambda: encode(Region.point(1, 2), SIZE), "regions must be an iterable of Region, got Region"),
        (lambda: encode([Region.point(1, 2), (1, 2)], SIZE), r"regions\[1\] must be a Region, got tuple"),
        (lambda: encode([], SIZE, on_outside="ignore"), "on_outside must be one of 'raise', 'clamp', 'skip'"),
        (lambda: encode([], SIZE, "unknown"), "format must be"),
        (lambda: decode(b"(001,002)", SIZE), "text must be a str, got bytes"),
        (lambda: decode("", SIZE, on_error="warn"), "on_error must be one of 'raise', 'skip', 'collect'"),
        (lambda: encode_array([[5, 0, 3, 1]], SIZE), r"boxes\[0\] must have x1 <= x2"),
        (lambda: encode_array([[0, 0, math.nan, 1]], SIZE), r"boxes\[0\] must be finite"),
        (lambda: encode_array([[0, 0, 1000, 1]], SIZE), r"values must lie in \[0, size\], got 1000.0"),
        (lambda: encode_array([[0, 0, 1]], SIZE), r"boxes must be an \(n, 4\) array"),
        (lambda: decode_array("(001,002),(003,004)", SIZE), "texts must be a sequence of str"),
        (lambda: decode_array([None], SIZE), "texts must be a sequence of str"),
    ],
)
def test_bad_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_image_size_may_come_from_numpy() -> None:
    assert encode([Region.point(5, 6)], np.array([999, 999])) == "(005,006)"  # type: ignore[arg-type]


def test_copies_of_the_module_understand_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint carries copies of these files under another package name."""
    folder = Path(coordinates.__file__).parent
    package = type(sys)("carried")
    package.__path__ = [str(folder)]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "carried", package)
    spec = importlib.util.spec_from_file_location("carried.coordinates", folder / "coordinates.py")
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(copy)
        assert copy.Region is not Region
        assert copy.encode([Region.point(1, 2, "x")], SIZE, TAGGED) == "<ref>x</ref>(001,002)"
        assert encode(copy.decode("(003,004)", SIZE, PADDED).regions, SIZE) == "(003,004)"
    finally:
        for name in [name for name in sys.modules if name.startswith("carried.")]:
            del sys.modules[name]
