"""Zero-padded pairs, through the default format."""

from typing import Any

import numpy as np
import pytest

from tests.coordinates.grammars.regex_steps import count_steps
from vlparts.coordinates.codec import CoordinateError, DecodeResult, decode, encode
from vlparts.coordinates.formats.openpangu import PADDED, padded_format
from vlparts.coordinates.grammars.base import Coded
from vlparts.coordinates.grammars.openpangu import PairGrammar, pair_pattern
from vlparts.coordinates.regions import Region

SIZE = (999, 999)  # one code per pixel
TAGGED = padded_format(label_open="<ref>", label_close="</ref>", separator=";")


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
    four = padded_format(levels=1024, digits=4, denominator=1023)
    assert encode([Region.point(1023, 3)], (1023, 1023), four) == "(1023,0003)"


def test_no_regions_are_no_text() -> None:
    assert encode([], SIZE) == ""
    assert decode("", SIZE).regions == ()


def test_regions_may_be_an_iterator() -> None:
    assert encode(iter([Region.point(1, 2)]), SIZE) == "(001,002)"


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
def test_labels_that_would_not_be_read_back_raise(label: str) -> None:
    with pytest.raises(CoordinateError, match="would be read back as|cannot be read back"):
        encode([Region.point(9, 9, "fine"), Region.point(1, 2, label)], SIZE)


@pytest.mark.parametrize("label", ["<ref>", "a</ref>", "a;b", "</ref>a<ref>"])
def test_labels_with_pieces_of_the_format_raise(label: str) -> None:
    with pytest.raises(CoordinateError, match="would be read back as|cannot be read back"):
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
    listed = padded_format(separator=", ")
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
    ("(123,456),", 0, "the text ends before another pair"),
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
    ("x (001,002), (003,004)", 2, r"', ' between pairs .* ',' joins a box, '\\n' separates regions"),
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
    assert str(caught.value).startswith(f"Position {position}: ")
    assert decode(text, SIZE, on_error="skip") == DecodeResult((), ())
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
    percent = padded_format(levels=101, denominator=100)
    assert decode("(100,000)", SIZE, percent).regions == (Region.point(999, 0),)
    with pytest.raises(CoordinateError, match=r"code 101 is above the largest code 100 in '\(101,000\)'"):
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
def test_steps_of_matching_grow_linearly(piece: str) -> None:
    """Every further repetition of a piece takes the same number of steps."""
    for separator in ("\n", ";", ", "):
        once, twice, thrice = count_steps(pair_pattern(3, separator), "", piece)
        assert thrice - twice == twice - once
    text = piece * (6_000 // len(piece))
    for fmt in (PADDED, TAGGED):
        assert decode(text, SIZE, fmt, on_error="skip").regions in ((), (Region.point(1, 2),))


@pytest.mark.parametrize(
    "coded",
    [
        Coded("line", [1, 2, 3, 4]),
        Coded("point", [1, 2], image=1),
        Coded("point", [1, 2], identity=0),
        Coded("point", [1, 2], times=(1.0,)),
    ],
)
def test_what_pairs_cannot_express_raises(coded: Coded) -> None:
    with pytest.raises(
        ValueError, match="A line cannot be written|regions of one image, without identities and times"
    ):
        PairGrammar().write([coded])


def test_the_span_of_all_that_belongs_to_a_region() -> None:
    text = "Here:\n a cat  (001,002),(003,004)\n(005,006) and <ref>b</ref> (007,008)"
    found, _ = PADDED.grammar.scan(text)
    assert [text[slice(*item.outer)] for item in found] == [
        "a cat  (001,002),(003,004)",
        "(005,006)",
        "and <ref>b</ref> (007,008)",
    ]
    text = "x; and <ref> b</ref> (007,008)"
    (item,), _ = TAGGED.grammar.scan(text)
    assert text[slice(*item.outer)] == "<ref> b</ref> (007,008)"
