"""Molmo 2's points and tracks."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.formats.registry import FORMATS
from vlparts.coordinates.grammars.base import Coded
from vlparts.coordinates.grammars.molmo2 import Molmo2Grammar

GRAMMAR = Molmo2Grammar()
PAIRS = st.lists(st.integers(0, 1000), min_size=2, max_size=2)
LABELS = st.none() | st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1)


def test_points_of_several_images() -> None:
    regions = [Coded("point", [523, 44], "t"), Coded("point", [600, 1000], "t"), Coded("point", [10, 20], "t", 1)]
    text = GRAMMAR.write(regions)
    assert text == '<points coords="1 1 523 044 2 600 1000;2 3 010 020">t</points>'
    found, errors = GRAMMAR.scan(text)
    assert errors == []
    assert [item.identity for item in found] == [1, 2, 3]
    assert [Coded(*item[3:])._replace(identity=None) for item in found] == regions
    assert GRAMMAR.scan(text.replace(";", "\t"))[1] == []


def test_tracks_of_several_objects() -> None:
    regions = [
        Coded("track", [10, 20, 100, 100], "t", 0, 1, (0.0, 5.0)),
        Coded("track", [200, 200], "t", 0, 2, (5.0,)),
    ]
    text = GRAMMAR.write(regions)
    assert text == '<tracks coords="0.0 1 010 020;5.0 1 100 100 2 200 200">t</tracks>'
    found, errors = GRAMMAR.scan(text)
    assert errors == []
    assert [Coded(*item[3:]) for item in found] == regions


@given(st.lists(st.tuples(PAIRS, LABELS, st.integers(0, 4), st.integers(0, 99)), max_size=6))
def test_points_are_read_as_written(rows: list[tuple[list[int], str | None, int, int]]) -> None:
    regions = [Coded("point", codes, label, image, identity) for codes, label, image, identity in rows]
    found, errors = GRAMMAR.scan(GRAMMAR.write(regions))
    assert errors == []
    assert [Coded(*item[3:]) for item in found] == regions


@given(st.lists(st.tuples(st.lists(PAIRS, min_size=1, max_size=4), LABELS, st.integers(0, 99)), max_size=5))
def test_tracks_are_read_as_written(rows: list[tuple[list[list[int]], str | None, int]]) -> None:
    regions = [
        Coded("track", sum(pairs, []), label, 0, identity, tuple(index / 2 for index in range(len(pairs))))
        for pairs, label, identity in rows
    ]
    found, errors = GRAMMAR.scan(GRAMMAR.write(regions))
    assert errors == []
    assert [Coded(*item[3:]) for item in found] == regions


def test_a_point_at_a_moment_is_a_track_of_one_point() -> None:
    found, errors = GRAMMAR.scan('<points coords="0.1 1 911 800\t0.2 2 900 400">a</points>')
    assert errors == []
    assert [(item.kind, item.identity, item.times) for item in found] == [("track", 1, (0.1,)), ("track", 2, (0.2,))]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<points coords="1 1 52 044">t</points>', "three digits"),
        ('<points coords="1 1 520">t</points>', "malformed coords"),
        ('<points coords="1 1 520 044;">t</points>', "malformed coords"),
        ('<points coords="1 1 520 044 2">t</points>', "malformed coords"),
        ('<points coords="">t</points>', "malformed coords"),
        ('<points coords="1 1 \uff15\uff12\uff10 044">t</points>', "malformed coords"),
        ('<points coords="0 1 520 044">t</points>', "images are counted from 1"),
        ('<points alt="a">t</points>', "expected coords once"),
        ('<points coords="1 1 520 044', "unfinished tag"),
        ('<points coords="1 1 520 044">t', "unfinished tag"),
        ('<tracks coords="1.0 1 010 020;1.0 1 010 020">t</tracks>', "times must increase"),
        ('<tracks coords="1.0 1 010 020 1 010 020">t</tracks>', "object 1 occurs twice"),
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
        (Coded("box", [0] * 4), "A box cannot be written"),
        (Coded("track", [0] * 2), "tracks with times"),
        (Coded("track", [0] * 4, times=(0.01, 0.02)), "must differ by at least 0.1 s"),
    ],
)
def test_what_cannot_be_written_raises(region: Coded, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRAMMAR.write([region])


NINES = "9" * 5000
BAD_REFERENCES = [
    f"&#{NINES};",
    f"&#{NINES}",
    f"&#x{NINES};",
    f"&#{'0' * 5000}65;",
    "&#x110000;",
    "&#xD800;",
    "&#0;",
    "&#1;",
]


@pytest.mark.parametrize("reference", BAD_REFERENCES)
def test_references_that_are_no_characters_are_errors(reference: str) -> None:
    for name, text in (
        ("molmo2", f'<points coords="1 1 100 200">c{reference}</points>'),
        ("molmo", f'<point x="1.0" y="2.0" alt="a">c{reference}</point>'),
    ):
        found, errors = FORMATS[name].grammar.scan(f"a {text} b")
        assert found == []
        assert [error.position for error in errors] == [2]
        assert f"malformed label: '{reference[:40]}' is not a character" in errors[0].reason
        assert len(errors[0].reason) < 200


def test_references_of_characters_are_read() -> None:
    for name, text in (
        ("molmo2", '<points coords="1 1 100 200">{}</points>'),
        ("molmo", '<point x="1.0" y="2.0" alt="a">{}</point>'),
    ):
        found, errors = FORMATS[name].grammar.scan(text.format("c&#65;&#x0042;&#xFFFD;&#10;&amp;&#;&# 1"))
        assert (errors, found[0].label) == ([], "cAB\ufffd\n&&#;&# 1")


def test_the_image_separator_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="^`image_separator` must be"):
        dataclasses.replace(GRAMMAR, image_separator=",")
