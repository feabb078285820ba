"""Encoding and decoding, independent of the grammar."""

import dataclasses
import gc
from typing import Any

import numpy as np
import pytest

from vlparts.coordinates.codec import CoordinateError, decode, encode
from vlparts.coordinates.formats.openpangu import PADDED, padded_format
from vlparts.coordinates.formats.registry import FORMATS, CoordinateFormat
from vlparts.coordinates.frames.rules import PaddedSquare, Resized, SmartResize
from vlparts.coordinates.grammars.base import Coded, DecodeError, Found, WritesAttributes
from vlparts.coordinates.grammars.openpangu import PairGrammar
from vlparts.coordinates.quantization import NumberRule
from vlparts.coordinates.regions import Region

SIZE = (999, 999)  # one code per pixel


OUTSIDE = [Region.point(1, 2, "in"), Region.box(-5, 10, 20, 2000, "out"), Region.box(-9, -9, -1, -1)]


def test_a_region_outside_is_an_error() -> None:
    message = r"`regions\[1\]` .* leaves the image of size \(999, 999\); on_outside='clamp'"
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
    ("call", "message"),
    [
        (lambda: encode([Region.point(1, 2)], (0, 5)), r"`image_size` must be \(width, height\), two positive"),
        (lambda: encode([], (5.0, 5)), "`image_size` must be"),
        (lambda: encode([], (True, 5)), "`image_size` must be"),
        (lambda: encode([], 5), "`image_size` must be .* got 5"),
        (lambda: encode([], "ab"), "`image_size` must be"),
        (lambda: decode("", (5, 5, 5)), "`image_size` must be"),
        (lambda: encode(Region.point(1, 2), SIZE), "`regions` must be an iterable of Region, got Region"),
        (lambda: encode([Region.point(1, 2), (1, 2)], SIZE), r"`regions\[1\]` must be a Region, got tuple"),
        (lambda: encode([], SIZE, on_outside="ignore"), "`on_outside` must be one of 'raise', 'clamp', 'skip'"),
        (lambda: encode([], SIZE, "unknown"), "`format` must be"),
        (lambda: decode(b"(001,002)", SIZE), "`text` must be a str, got bytes"),
        (lambda: decode("", SIZE, on_error="warn"), "`on_error` must be one of 'raise', 'skip', 'collect'"),
    ],
)
def test_bad_arguments_raise(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_image_size_may_come_from_numpy() -> None:
    assert encode([Region.point(5, 6)], np.array([999, 999])) == "(005,006)"  # type: ignore[arg-type]


class Listed:
    """A grammar for tests that can express every region: one per line, field by field."""

    kinds = ("point", "box", "polygon", "track")
    separator = "\n"

    def write(self, regions: Any) -> str:
        return "\n".join(map(self.line, regions))

    @staticmethod
    def line(region: Coded) -> str:
        identity = "" if region.identity is None else str(region.identity)
        codes, times = ",".join(map(str, region.codes)), ",".join(map(str, region.times))
        return "|".join([region.kind, codes, region.label or "", str(region.image), identity, times])

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        found, start = [], 0
        for line in text.split("\n") if text else []:
            kind, codes, label, image, identity, times = line.split("|")
            end = start + len(line)
            found.append(
                Found(
                    start,
                    end,
                    (start, end),
                    kind,
                    [int(code) for code in codes.split(",")],
                    label or None,
                    int(image),
                    int(identity) if identity else None,
                    tuple(map(float, times.split(","))) if times else (),
                )
            )
            start = end + 1
        return found, []


LISTED = CoordinateFormat(name="listed", numbers=NumberRule(), grammar=Listed())


def test_several_images_have_their_own_sizes() -> None:
    sizes = [(999, 999), (1998, 999)]
    regions = [Region.point(1998, 0, image=1), Region.box(1, 2, 3, 4, "a"), Region.point(2, 999, image=1)]
    text = encode(regions, sizes, LISTED)
    assert text == "point|999,0||1||\nbox|1,2,3,4|a|0||\npoint|1,999||1||"
    assert decode(text, sizes, LISTED).regions == tuple(regions)
    assert decode(text, np.array(sizes), LISTED).regions == tuple(regions)
    with pytest.raises(
        CoordinateError, match=r"`regions\[0\]` is in image 1 \(counted from 0\), but `image_size` has 1"
    ):
        encode(regions, SIZE, LISTED)
    errors = decode(text, SIZE, LISTED, on_error="collect").errors
    assert [error.position for error in errors] == [0, text.index("\npoint") + 1]
    assert "image 1 (counted from 0) does not exist: `image_size` has 1" in errors[0].reason


def test_identities_and_times_come_back() -> None:
    regions = [
        Region.track([(1, 2), (3, 4)], [0.5, 1.5], "x", identity=7),
        Region.polygon([(1, 2), (3, 4), (5, 6)], identity=0),
    ]
    assert decode(encode(regions, SIZE, LISTED), SIZE, LISTED).regions == tuple(regions)


def test_what_no_region_can_be_is_an_error_with_its_place() -> None:
    text = "point|1,2||0||\npolygon|1,2,3,4||0||\ntrack|1,2,3,4|x|0||2.0,1.0\npoint|3,4||0||"
    result = decode(text, SIZE, LISTED, on_error="collect")
    assert result.regions == (Region.point(1, 2), Region.point(3, 4))
    assert [error.position for error in result.errors] == [text.index("poly"), text.index("track")]
    assert "a polygon has at least 3 point(s), got 2" in result.errors[0].reason
    assert "`times` must not decrease" in result.errors[1].reason


def test_what_would_be_read_as_another_thing_raises() -> None:
    class Forgetful(Listed):
        def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
            found, errors = super().scan(text)
            return [item._replace(image=0, codes=item.codes[:2], kind="point") for item in found], errors

    forgetful = dataclasses.replace(LISTED, grammar=Forgetful())
    assert encode([Region.point(1, 2)], SIZE, forgetful) == "point|1,2||0||"
    for region in (Region.point(1, 2, image=1), Region.box(1, 2, 3, 4)):
        with pytest.raises(CoordinateError, match=f"A {region.kind} would be read back differently"):
            encode([region], [SIZE, SIZE], forgetful)

    class Doubling(Listed):
        def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
            found, errors = super().scan(text)
            return found * 2, errors

    with pytest.raises(CoordinateError, match="The text of 1 regions would be read back as 2 regions"):
        encode([Region.point(1, 2)], SIZE, dataclasses.replace(LISTED, grammar=Doubling()))


def test_y_may_come_first() -> None:
    fmt = dataclasses.replace(LISTED, y_first=("box",))
    regions = (Region.box(1, 2, 3, 4), Region.point(5, 6))
    text = encode(regions, SIZE, fmt)
    assert text == "box|2,1,4,3||0||\npoint|5,6||0||"
    assert decode(text, SIZE, fmt).regions == regions
    with pytest.raises(CoordinateError, match=r"x2 \(1\) is less than x1 \(3\)"):
        decode("box|2,3,4,1||0||", SIZE, fmt)


def test_numbers_may_measure_a_resized_image() -> None:
    pixels = NumberRule(denominator=None, levels=None)
    fmt = dataclasses.replace(LISTED, frame=Resized((200, 50)), numbers=pixels)
    text = encode([Region.box(0, 0, 100, 100)], (100, 100), fmt)
    assert text == "box|0,0,200,50||0||"
    assert decode(text, (100, 100), fmt).regions == (Region.box(0, 0, 100, 100),)
    with pytest.raises(CoordinateError, match="code 51 is above the largest code 50"):
        decode("point|3,51||0||", (100, 100), fmt)
    clamped = decode("point|201,51||0||", (100, 100), fmt, on_outside="clamp")
    assert clamped.regions == (Region.point(100, 100),)


def test_a_place_in_the_padding_is_outside() -> None:
    fmt = dataclasses.replace(LISTED, frame=PaddedSquare(), numbers=NumberRule(denominator=100, levels=101))
    text = encode([Region.box(0, 0, 100, 50)], (100, 50), fmt)
    assert text == "box|0,25,100,75||0||"
    assert decode(text, (100, 50), fmt).regions == (Region.box(0, 0, 100, 50),)
    with pytest.raises(CoordinateError, match=r"a point outside the image of size \(100, 50\)"):
        decode("point|3,10||0||", (100, 50), fmt)
    clamped = decode("point|3,10||0||", (100, 50), fmt, on_outside="clamp")
    assert clamped.regions == (Region.point(3, 0),)


def test_a_size_without_a_frame_is_named() -> None:
    fmt = dataclasses.replace(LISTED, frame=SmartResize())
    message = r"Format 'listed' has no frame for image size \(1, 1000\): .* too thin"
    with pytest.raises(CoordinateError, match=message):
        encode([Region.point(1, 1)], (1, 1000), fmt)
    with pytest.raises(CoordinateError, match=message):
        decode("point|1,1||0||", (1, 1000), fmt)


def test_kinds_that_a_format_lacks_raise() -> None:
    message = r"`regions\[1\]` is a line, which format 'openpangu' cannot write; it writes point, box"
    with pytest.raises(CoordinateError, match=message):
        encode([Region.point(1, 2), Region.line([(1, 2), (3, 4)])], SIZE)


def test_codes_above_the_range_are_clamped_where_wanted() -> None:
    percent = padded_format(levels=101, denominator=100)
    assert decode("(101,000)", SIZE, percent, on_outside="clamp").regions == (Region.point(999, 0),)
    with pytest.raises(ValueError, match="`on_outside` must be one of 'error', 'clamp', got 'skip'"):
        decode("(101,000)", SIZE, percent, on_outside="skip")


@pytest.mark.parametrize("running", [True, False])
def test_garbage_collection_is_restored(running: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if running else gc.disable)()
        assert decode("(001,002)", SIZE).regions == (Region.point(1, 2),)
        with pytest.raises(CoordinateError):
            decode("(001,", SIZE)
        assert gc.isenabled() == running
    finally:
        (gc.enable if before else gc.disable)()


def test_errors_are_in_the_order_of_the_text() -> None:
    text = "(500,100),(400,200)\n(1,2)\n(009,009),(001,001)\n(001,002)"
    result = decode(text, SIZE, on_error="collect")
    assert [error.position for error in result.errors] == [0, 20, 26]
    assert result.regions == (Region.point(1, 2),)


def test_errors_of_a_grammar_are_raised() -> None:
    with pytest.raises(CoordinateError, match="The format writes regions of one image"):
        encode([Region.point(1, 2, identity=3)], SIZE)
    assert isinstance(PADDED.grammar, PairGrammar)


KEPT = Region.box(10, 20, 30, 40, "a", attributes={"text": "x"})


def test_attributes_are_read_from_json_and_written_again() -> None:
    text = '[{"box_2d": [20, 10, 40, 30], "label": "a", "score": 0.50, "parts": [{"k": "\\u00e9"}]}]'
    (region,) = decode(text, (1000, 1000), "gemini").regions
    assert region.attributes == {"score": 0.5, "parts": [{"k": "\u00e9"}]}
    assert decode(encode([region], (1000, 1000), "gemini"), (1000, 1000), "gemini").regions == (region,)
    assert '"score": 0.50, "parts": [{"k": "\\u00e9"}]}' in encode([region], (1000, 1000), "gemini")


@pytest.mark.parametrize(
    "name", sorted(name for name, fmt in FORMATS.items() if not isinstance(fmt.grammar, WritesAttributes))
)
def test_a_format_without_a_place_for_attributes_names_the_key(name: str) -> None:
    kind = "box" if "box" in FORMATS[name].kinds else FORMATS[name].kinds[0]
    points = {"box": KEPT.points, "point": ((10, 20),), "quad": ((1, 2), (5, 2), (5, 9), (1, 9))}[kind]
    region = Region(kind, points, attributes={"text": "x"})
    with pytest.raises(CoordinateError, match="^Attribute 'text' cannot be written: the format has no place for attr"):
        encode([region], (300, 300), name)
    written = encode([region], (300, 300), name, on_attributes="omit")
    assert written == encode([dataclasses.replace(region, attributes={})], (300, 300), name)


def test_attributes_that_a_json_format_cannot_write_raise() -> None:
    for name, attributes in (("label", {"label": "b"}), ("bbox_2d", {"bbox_2d": 1})):
        with pytest.raises(CoordinateError, match=f"^Attribute '{name}' cannot be written: the format uses this name"):
            encode([Region.point(1, 2, attributes=attributes)], (100, 100), "qwen3_vl")
    nested = Region.point(1, 2, attributes={"ok": "bbox_2d", "parts": [{"bbox_2d": [1, 2, 3, 4]}]})
    with pytest.raises(
        CoordinateError, match="^Attribute 'parts' cannot be written: its objects with the key 'bbox_2d'"
    ):
        encode([nested], (100, 100), "qwen3_vl")
    deep: Any = "x"
    for _ in range(40):
        deep = [deep]
    with pytest.raises(
        CoordinateError, match=r"^A point would not be read back: malformed object: nested deeper than 32\.$"
    ):
        encode([Region.point(1, 2, attributes={"deep": deep})], (100, 100), "qwen3_vl")
    with pytest.raises(ValueError, match="^`on_attributes` must be one of 'raise', 'omit', got 'skip'"):
        encode([KEPT], (100, 100), on_attributes="skip")


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ('"t": "\\ud800"', "key 't': A string contains half of a surrogate pair"),
        ('"t": 1e999', "key 't': Number 1e999 is too large"),
        ('"t": {"a": 1, "a": 2}', "key 't': Key 'a' occurs twice in one object"),
        ('"t": 1, "\\u0074": 2', "key 't' occurs twice"),
        ('"l\\u0061bel": "b"', "key 'label' occurs twice"),
        ('"\\ud800": 1', "half of a surrogate pair"),
    ],
)
def test_a_malformed_attribute_is_an_error_that_names_it(member: str, reason: str) -> None:
    result = decode(f'{{"bbox_2d": [1, 2, 3, 4], {member}}}', (100, 100), "qwen3_vl", on_error="collect")
    assert result.regions == ()
    assert reason in result.errors[0].reason


THOUGHT = "<think>maybe cat (001,002),(003,004)</think>cat (005,006),(007,008)"


def test_thinking_is_skipped_and_positions_stay() -> None:
    assert len(decode(THOUGHT, (999, 999)).regions) == 2
    result = decode(THOUGHT, (999, 999), skip_thinking=True)
    assert result.regions == (Region.box(5, 6, 7, 8, "cat"),)
    ((start, end),) = result.spans
    assert THOUGHT[start:end] == "(005,006),(007,008)"
    broken = THOUGHT.replace("(007,008)", "(7,8)")
    errors = decode(broken, (999, 999), on_error="collect", skip_thinking=True).errors
    assert [position for position, _ in errors] == [broken.index("(005")]
    nested = '[{"bbox_2d": [1, 2, 3, 4]}] is wrong</think>\n```json\n[{"bbox_2d": [5, 6, 7, 8]}]\n```'
    (region,) = decode(nested, (1000, 1000), "qwen3_vl", skip_thinking=True).regions
    assert region.xyxy == (5, 6, 7, 8)
    assert decode("<think>(001,002)", (999, 999), skip_thinking=True).regions == ()
    assert decode("[unused16](001,002)[unused17](003,004)", (999, 999), skip_thinking=True).regions == (
        Region.point(3, 4),
    )
