"""Regions as JSON objects with one key per number."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.codec import decode
from vlparts.coordinates.conversion import convert
from vlparts.coordinates.formats.published import PUBLISHED
from vlparts.coordinates.grammars.base import Coded
from vlparts.coordinates.grammars.json_fields import NamedJsonGrammar
from vlparts.coordinates.json_values import as_attributes

GRAMMAR = NamedJsonGrammar()
UNIT = st.integers(0, 10**6)


def test_the_text_of_boxes_and_points() -> None:
    text = GRAMMAR.write([Coded("box", [100000, 200000, 300001, 1000000]), Coded("box", [0, 0, 5, 500000])])
    assert json.loads(text) == {
        "objects": [
            {"x_min": 0.1, "y_min": 0.2, "x_max": 0.300001, "y_max": 1.0},
            {"x_min": 0.0, "y_min": 0.0, "x_max": 0.000005, "y_max": 0.5},
        ]
    }
    assert GRAMMAR.write([Coded("point", [250000, 5])]) == '{"points": [{"x": 0.25, "y": 0.000005}]}'
    assert GRAMMAR.write([]) == ""


@given(st.lists(st.lists(UNIT, min_size=2, max_size=2) | st.lists(UNIT, min_size=4, max_size=4), max_size=6))
def test_what_is_written_is_read(rows: list[list[int]]) -> None:
    regions = [Coded("box" if len(row) == 4 else "point", row) for row in rows]
    found, errors = GRAMMAR.scan(GRAMMAR.write(regions))
    assert errors == []
    assert [Coded(*item[3:]) for item in found] == regions


def test_numbers_are_rounded_half_up_and_may_have_an_exponent() -> None:
    found, errors = GRAMMAR.scan('{"x": 1e-05, "y": 0.12345650000000001}')
    assert (errors, list(found[0].codes)) == ([], [10, 123457])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"x_min": 0.1, "y_min": 0.2, "x_max": 0.3}', "'y_max' is not a number"),
        ('{"x": 0.1, "y": "a"}', "'y' is not a number"),
        ('{"x": 0.1, "y": -0.1}', "'y' is negative"),
        ('{"x": 0.1, "y": 1e999999999}', "'y' is too long"),
        ('{"x": 0.1, "y": 1e999}', "'y' is too large"),
        ('{"x": 0.1, "y": ' + "1" * 10_000 + "}", "'y' is too long"),
        ('{"x": 0.1, "y": NaN}', "malformed object: 'NaN'"),
        ('{"x":0.4,"y":0.5,"width":0.2,"height":0.1}', "'width', 'height' with numbers; a point has x, y"),
        ('{"x":0.4,"y":0.5,"w":0.2,"h":0.1}', "'w', 'h' with numbers"),
        ('{"x":0.4,"y":0.5,"x2":0.6,"y2":0.9}', "'x2', 'y2' with numbers"),
        ('{"x":0.4,"y":0.5,"Width":0.2,"x_2":1,"TOP-LEFT":[1]}', "'Width', 'x_2', 'TOP-LEFT' with numbers"),
        ('{"x":0.4,"y":0.5,"note":"a","z":1}', "unknown keys 'z' with numbers"),
        ('{"x":0.4,"y":0.5,"size":[0.2,0.1]}', "'size' with numbers"),
        ('{"x":0.4,"y":0.5,"size":{"box":[[0.2]]}}', "'size' with numbers"),
        (
            '{"x_min":0,"y_min":0,"x_max":1,"y_max":1,"x":0.5}',
            "'x' with numbers; a box has x_min, y_min, x_max, y_max",
        ),
        ('{"x": 0.1, "y": 0.2, "y": 0.3}', "a key occurs twice"),
        ("{'x_min': 0.1}", "single quotes"),
        ('{"x": 0.1, "y"', "unfinished object"),
    ],
)
def test_what_is_no_region_is_an_error(text: str, reason: str) -> None:
    found, errors = GRAMMAR.scan(text)
    assert found == []
    assert [error.position for error in errors] == [0]
    assert reason in errors[0].reason


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Coded("box", [0] * 4, "a"), r"^The format has no labels, got label 'a'\.$"),
        (Coded("quad", [0] * 8), r"^A quad cannot be written: the format has box, point\.$"),
        (Coded("point", [0] * 2, image=1), "regions of one image"),
        (
            Coded("point", [0] * 2, attributes=as_attributes({"Width": 5})),
            "^Attribute 'Width' cannot be written: its numbers would make the object another shape",
        ),
        (
            Coded("point", [0] * 2, attributes=as_attributes({"part": [{"x": 5}]})),
            "^Attribute 'part' cannot be written: its objects with the key 'x' would be read as further regions",
        ),
    ],
)
def test_what_cannot_be_written_raises(region: Coded, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRAMMAR.write([region])


def test_further_keys_that_are_no_shape_are_attributes() -> None:
    text = '{"x": 0.4, "y": 0.5, "note": "at 3", "score": 0.9, "line": 7, "rgb": [1, 2, 3], "width": "wide"}'
    found, errors = GRAMMAR.scan(text)
    assert found[0].attributes == {"note": "at 3", "score": 0.9, "line": 7, "rgb": [1, 2, 3], "width": "wide"}
    assert (errors, [(item.kind, list(item.codes)) for item in found]) == ([], [("point", [400000, 500000])])


FORMATS = {fmt.name: fmt for fmt in PUBLISHED}
SIZES = FORMATS["xywh"].grammar


def test_a_corner_with_width_and_height() -> None:
    text = '[\n  {"x": 1, "y": 2, "width": 30, "height": 0, "label": "a"}\n]'
    assert SIZES.write([Coded("box", [1, 2, 31, 2], "a")]) == text
    spelled = '{"label": "a", "w": 30.0, "x": 1, "y": 2, "h": 0, "score": 0.90}'
    for given_text in (text, spelled):
        ((*_, kind, codes, label, _, _, _, attributes),), errors = SIZES.scan(given_text)
        assert (kind, codes, label, errors) == ("box", [1, 2, 31, 2], "a", [])
        assert attributes == ({"score": 0.9} if given_text is spelled else {})
    assert convert(spelled, "xywh", "qwen3_vl", (1000, 1000)) == (
        '```json\n[\n\t{"bbox_2d": [1, 2, 31, 2], "label": "a", "score": 0.90}\n]\n```'
    )
    fractions = '{"x": 0.1000004, "y": 0.5, "width": 0.2000004, "height": 0.5}'
    assert list(FORMATS["xywh_relative"].grammar.scan(fractions)[0][0].codes) == [100000, 500000, 300001, 10**6]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"x": 1, "y": 2}', "'width' is not a number"),
        ('{"x": 1, "y": 2, "w": 3, "width": 3, "h": 4}', "a key occurs twice"),
        ('{"x": 1, "y": 2, "w": -3, "h": 4}', "'width' is negative"),
        ('{"x": 1.5, "y": 2, "w": 3, "h": 4}', "'x' is not an integer"),
        ('{"x": 1, "y": 2, "w": 3, "h": 4, "rotation": 30}', "unknown keys 'rotation' with numbers"),
        ('{"x": 1, "y": 2, "w": 3, "h": 4, "label": 5}', "'label' must be a string"),
        ("{'x': 1, 'y': 2, 'w': 3, 'h': 4}", "single quotes"),
        ('{"x": 1, "y": 2, "w": 3', "unfinished object"),
    ],
)
def test_what_is_no_corner_with_sizes_is_an_error(text: str, reason: str) -> None:
    found, errors = SIZES.scan(text)
    assert (found, len(errors)) == ([], 1)
    assert reason in errors[0].reason


def test_a_box_beyond_the_image_is_an_error() -> None:
    result = decode('{"x": 90, "y": 2, "width": 20, "height": 4}', (100, 100), "xywh", on_error="collect")
    assert result.regions == ()
    assert "above the largest code 100" in result.errors[0].reason
