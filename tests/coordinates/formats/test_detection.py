"""Detection of the format of a text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.codec import CoordinateError, encode
from vlparts.coordinates.conversion import convert
from vlparts.coordinates.formats.detection import guess_format
from vlparts.coordinates.formats.registry import FORMATS
from vlparts.coordinates.regions import Region

CLEAR = {
    "<ref>a cat</ref><box>(536,509),(588,602)</box>": "qwen_vl",
    "The 2 cats: [[086,540,400,760]]": "cogvlm",
    "<loc0256><loc0000><loc1023><loc0512> cat": "paligemma",
    "cat<loc_52><loc_332><loc_932><loc_774>": "florence2",
    '[{"box_2d": [393, 67, 574, 206], "label": "a"}]': "gemini",
    '{"objects": [{"x_min": 0.25, "y_min": 0.5, "x_max": 0.75, "y_max": 1.0}]}': "moondream",
    '<point x="12.3" y="4.5" alt="mug">mug</point>': "molmo",
    '<points coords="1 1 990 800">label</points>': "molmo2",
    "<phrase>a</phrase><object><patch_index_0044><patch_index_0863></object>": "kosmos2",
    "cat (086,540),(400,760)": "openpangu",
    "a dog [0.100,0.250,0.500,0.500]": "shikra",
    "<box>10, 20, 30, 40</box>": "fuyu",
    '[{"bbox": [1, 2, 30, 4], "category": "Text", "text": "[1, 2]"}]': "dots_ocr",
    '{"x": 10, "y": 20, "width": 30, "height": 40}': "xywh",
    '[{"label": "a", "x": 10, "y": 20, "w": 30, "h": 40, "score": 0.5}]': "xywh",
    '{"x": 0.4, "y": 0.5, "width": 0.2, "height": 0.1}': "xywh_relative",
    "click(start_box='<bbox>1 2 3 4</bbox>')": "ui_tars_1_5_tags",
}


@pytest.mark.parametrize(("text", "name"), CLEAR.items())
def test_a_clear_text_has_one_likely_format(text: str, name: str) -> None:
    first, *rest = guess_format(text)
    assert first.name == name
    assert first.errors == 0
    assert first.regions >= 1
    assert all(first.confidence > 2 * guess.confidence for guess in rest)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]', ["qwen2_5_vl", "qwen3_vl"]),
        ('[{"bbox_2d": [1, 2, 3, 4], "text_content": "a"}]', ["qwen2_5_vl_ocr", "qwen3_vl_ocr"]),
        ("<|ref|>a<|/ref|><|det|>[[580, 270, 999, 900]]<|/det|>", ["deepseek_ocr", "deepseek_vl2"]),
        ("[729, 0, 810, 25]", ["ferret", "got_ocr2", "internlm_xcomposer"]),
        ("<|box_start|>(1,2)<|box_end|>", ["os_atlas_7b", "qwen2_vl", "ui_tars"]),
    ],
)
def test_formats_that_read_a_text_equally_are_tied(text: str, names: list[str]) -> None:
    guesses = guess_format(text)
    assert [guess.name for guess in guesses[: len(names)]] == names
    assert len({round(guess.confidence, 9) for guess in guesses[: len(names)]}) == 1
    assert guesses[0].confidence <= 1 / len(names)


def test_codes_out_of_range_rule_a_format_out() -> None:
    assert [guess.name for guess in guess_format('{"bbox_2d": [1, 2, 1300, 4], "label": "a"}')] == ["qwen2_5_vl"]
    # With the size of the image, the resized frame of Qwen2.5-VL is known too: 644 x 420.
    assert [guess.name for guess in guess_format('{"bbox_2d": [1, 2, 700, 4], "label": "a"}', (640, 428))] == [
        "qwen3_vl"
    ]


@pytest.mark.parametrize("text", ["", "no coordinates", "12 cats and 3 dogs", "(", "<box>"])
def test_where_nothing_fits_there_is_no_guess(text: str) -> None:
    assert guess_format(text) == []


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_what_a_format_writes_is_guessed_or_tied(name: str) -> None:
    kind = "box" if "box" in FORMATS[name].kinds else FORMATS[name].kinds[0]
    points = {"point": [(53, 61)], "box": [(53, 61), (200, 207)], "quad": [(53, 61), (99, 61), (99, 99), (50, 99)]}[
        kind
    ]
    text = encode([Region(kind, tuple(points))], (300, 301), name)
    guesses = guess_format(text, (300, 301))
    (own,) = [guess for guess in guesses if guess.name == name]
    assert own.confidence >= guesses[0].confidence - 1e-9
    assert own.errors == 0


@given(st.text('<>[]{}()/|_.,;: \n0123456789boxrefpint"=', max_size=60))
def test_confidences_of_any_text_sum_to_one_at_most(text: str) -> None:
    guesses = guess_format(text)
    assert 0 <= sum(guess.confidence for guess in guesses) <= 1 + 1e-9
    assert guesses == sorted(guesses, key=lambda guess: (-round(guess.confidence, 9), guess.name))


def test_bad_arguments_raise() -> None:
    with pytest.raises(CoordinateError, match="`text` must be a str"):
        guess_format(b"(001,002)")  # type: ignore[arg-type]
    with pytest.raises(CoordinateError, match="`image_size` must be"):
        guess_format("(001,002)", (0, 5))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"x":0.4,"y":0.5,"width":0.2,"height":0.1}', ["xywh_relative"]),
        ('[{"x":0.4,"y":0.5,"x2":0.6,"y2":0.9}]', []),
        ('{"x":4,"y":5,"w":2,"h":1}', ["xywh"]),
        ('{"x":4,"y":5,"r":2}', []),
    ],
)
def test_boxes_with_other_keys_are_not_points(text: str, names: list[str]) -> None:
    assert [guess.name for guess in guess_format(text)] == names
    with pytest.raises(CoordinateError, match="unknown keys '(width|x2|w|r)'|is too large"):
        convert(text, "moondream", "openpangu", (100, 100))
