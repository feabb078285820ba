"""Regions as JSON objects with a list of numbers."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.grammars import json_objects
from vlparts.coordinates.grammars.base import Coded
from vlparts.coordinates.grammars.json_objects import JsonGrammar

GRAMMAR = JsonGrammar()
IMAGES = JsonGrammar(image_key="img_idx", opening="[", separator=", ", closing="]")
POLYGONS = JsonGrammar(keys=(("polygon", "polygon_2d"), ("line", "line_2d")))


def read(text: str, grammar: JsonGrammar = GRAMMAR) -> list[tuple[str, list[int], str | None]]:
    found, errors = grammar.scan(text)
    assert errors == []
    return [(item.kind, list(item.codes), item.label) for item in found]


def test_the_text_of_boxes_and_points() -> None:
    text = GRAMMAR.write([Coded("box", [1, 2, 30, 4], 'a "b" é'), Coded("point", [5, 6])])
    assert text == '```json\n[\n\t{"bbox_2d": [1, 2, 30, 4], "label": "a \\"b\\" é"},\n\t{"point_2d": [5, 6]}\n]\n```'
    assert read(text) == [("box", [1, 2, 30, 4], 'a "b" é'), ("point", [5, 6], None)]


def test_no_regions_are_an_empty_list() -> None:
    assert GRAMMAR.write([]) == "```json\n[]\n```"
    assert read(GRAMMAR.write([])) == []


CODED = st.tuples(
    st.just("box"),
    st.lists(st.integers(0, 10**9 - 1), min_size=4, max_size=4),
    st.none() | st.text(st.characters(exclude_categories=("Cs",))),
    st.integers(0, 3),
).map(lambda values: Coded(*values))


@given(st.lists(CODED, max_size=5))
def test_what_is_written_is_read_and_is_json(regions: list[Coded]) -> None:
    text = IMAGES.write(regions)
    assert [item["bbox_2d"] for item in json.loads(text)] == [region.codes for region in regions]
    found, errors = IMAGES.scan(text)
    assert errors == []
    assert [Coded(*item[3:]) for item in found] == regions


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("[", "]"),
        ("```json\n[\n", "\n]\n```"),
        ("Here it is: ", " and that is all."),
        ('{"objects": [', "]}"),
        ("it's {x} ", " {'a': 1} "),
    ],
)
def test_an_object_is_read_wherever_it_stands(before: str, after: str) -> None:
    body = '{ "label" : "cat", "bbox_2d": [ 1,2 ,\n3, 4.0] , "score": 0.5, "more": {"a": [null, true]}}'
    found, errors = GRAMMAR.scan(before + body + after)
    assert errors == []
    assert [(list(item.codes), item.label) for item in found] == [([1, 2, 3, 4], "cat")]
    start = len(before) + body.index("[")
    assert (found[0].start, found[0].end) == (start, len(before) + body.index("]") + 1)


def test_the_marks_of_a_list_belong_to_its_first_and_last() -> None:
    text = 'See ```json\n[{"bbox_2d": [1, 2, 3, 4]}, {"point_2d": [5, 6]}]\n``` there'
    found, _ = GRAMMAR.scan(text)
    assert [text[slice(*item.outer)] for item in found] == [
        '```json\n[{"bbox_2d": [1, 2, 3, 4]}',
        '{"point_2d": [5, 6]}]\n```',
    ]


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6', 28, "unfinished object"),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"la', 28, "unfinished object"),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {', 28, "unfinished object"),
        ('[{"bbox_2d": [1, 2, 3, 4]},', 26, "unfinished list"),
        ('[{"bbox_2d": [1, 2, 3, 4]}', 26, "unfinished list"),
        ('{"bbox_2d": [1, 2, 3]}', 0, "a box has 4 numbers, got 3"),
        ('{"bbox_2d": [1, 2, 3, 4, 5, 6]}', 0, "a box has 4 numbers, got 6"),
        ('{"bbox_2d": []}', 0, "a box has 4 numbers, got 0"),
        ('{"bbox_2d": 7}', 0, "'bbox_2d' must be a list of 4 integers"),
        ('{"bbox_2d": [[1, 2, 3, 4]]}', 0, "a coordinate is not a number"),
        ('{"bbox_2d": ["1", "2", "3", "4"]}', 0, "a coordinate is not a number"),
        ('{"bbox_2d": [true, 2, 3, 4]}', 0, "a coordinate is not a number"),
        ('{"bbox_2d": [1.5, 2, 3, 4]}', 0, "a coordinate is not an integer"),
        ('{"bbox_2d": [1e3, 2, 3, 4]}', 0, "a coordinate is not an integer"),
        ('{"bbox_2d": [-1, 2, 3, 4]}', 0, "a coordinate is negative"),
        ('{"bbox_2d": [1234567890, 2, 3, 4]}', 0, "a coordinate has more than 9 digits"),
        ('{"bbox_2d": [1, 2, 3, ' + "9" * 10_000 + "]}", 0, "a coordinate has more than 9 digits"),
        ('{"bbox_2d": [NaN, 2, 3, 4]}', 0, "malformed object: 'NaN"),
        ('{"bbox_2d": [Infinity, 2, 3, 4]}', 0, "malformed object: 'Infinit"),
        ('{"bbox_2d": [1, 2, 3, \uff14]}', 0, "malformed object"),
        ('{"bbox_2d"\uff1a [1, 2, 3, 4]}', 0, "malformed object"),
        ('\uff5b"bbox_2d": [1, 2, 3, 4]\uff5d', 1, '"bbox_2d" outside of an object'),
        ("a {'bbox_2d': [1, 2, 3, 4]}", 2, "single quotes, as Python prints them"),
        ('{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [1, 2, 3, 4]}', 0, "a key occurs twice"),
        ('{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}', 0, "more than one list"),
        ('{"bbox_2d": [1, 2, 3, 4], "label": 7}', 0, "'label' must be a string"),
        (r'{"bbox_2d": [1, 2, 3, 4], "label": "\ud800"}', 0, "'label' must be a string"),
        ('{"bbox_2d": [1, 2, 3, 4],}', 0, "malformed object: '}' out of place"),
        ('{"bbox_2d": ' + "[" * 100_000, 0, "nested deeper than 32"),
    ],
)
def test_what_is_no_region_is_an_error(text: str, position: int, reason: str) -> None:
    _, errors = GRAMMAR.scan(text)
    assert [error.position for error in errors] == [position]
    assert reason in errors[0].reason


def test_what_is_complete_before_a_cut_is_read() -> None:
    found, errors = GRAMMAR.scan('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6')
    assert [list(item.codes) for item in found] == [[1, 2, 3, 4]]
    assert len(errors) == 1


@pytest.mark.parametrize("text", ["", "no coordinates", '{"a": [1, 2, 3, 4]}', "it's {1, 2}", "{'a': 1}", "[[1, 2]]"])
def test_other_text_is_no_error(text: str) -> None:
    assert GRAMMAR.scan(text) == ([], [])


def test_polygons_and_lines() -> None:
    regions = [Coded("polygon", [1, 2, 3, 4, 5, 6], "a"), Coded("line", [1, 2, 3, 4], None)]
    assert read(POLYGONS.write(regions), POLYGONS) == [(kind, codes, label) for kind, codes, label, *_ in regions]
    _, errors = POLYGONS.scan('{"polygon_2d": [1, 2, 3, 4]}')
    assert "a polygon has an even number of at least 6 numbers, got 4" in errors[0].reason


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Coded("quad", [0] * 8), "A quad cannot be written: the format has box, point"),
        (Coded("box", [0] * 4, image=1), "of one image"),
        (Coded("box", [0] * 4, identity=1), "without identities"),
        (Coded("point", [0] * 2, times=(1.0,)), "without identities and times"),
    ],
)
def test_what_cannot_be_written_raises(region: Coded, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRAMMAR.write([region])


@pytest.mark.parametrize("keys", [(), (("circle", "c"),), (("box", "label"),), (("box", "a"), ("point", "a"))])
def test_keys_that_cannot_be_raise(keys: Any) -> None:
    with pytest.raises(ValueError, match="^`keys` must"):
        JsonGrammar(keys=keys)


PIECES = [
    *('{"bbox_2d"', '{"point_2d"', '{ "bbox_2d" :', '"label"', '"other"', ": [1, 2, 3, 4]", ":[007,8]", ": [1,2,3]"),
    *(
        ": [1.0, 2, 3, 4]",
        ": [-1, 2]",
        ": [1234567890, 1]",
        ', "label": "cat"',
        ': "a\\u0041"',
        ': "\ud800"',
        ": null",
    ),
    *(
        '"',
        "\\",
        "\t",
        "\x01",
        "\u00a0",
        " ",
        "\n",
        ",",
        "[",
        "]",
        "{",
        "}",
        "```json\n",
        "```",
        "'bbox_2d'",
        "cat 12",
    ),
]
SOUND = '{"bbox_2d": [1, 2, 3, 4], "label": "cat"}'


@given(st.lists(st.sampled_from([*PIECES, SOUND, SOUND + ", ", '{"a": ']), max_size=9).map("".join))
def test_objects_that_need_no_reading_are_read_alike(text: str) -> None:
    """By the pattern for plain objects, and by the scanner alone."""
    grammar = JsonGrammar()
    found = grammar.scan(text)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_objects, "_plain_object", lambda *_: None)
        assert found == grammar.scan(text)
