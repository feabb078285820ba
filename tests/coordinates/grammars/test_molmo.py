"""Molmo's points."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.grammars.base import Coded
from vlparts.coordinates.grammars.molmo import MolmoGrammar

GRAMMAR = MolmoGrammar()
LABELS = st.none() | st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1)
PAIRS = st.lists(st.integers(0, 1000), min_size=2, max_size=2)
POINTS = st.tuples(PAIRS, LABELS).map(lambda values: Coded("point", *values))


def test_one_point_and_several() -> None:
    assert GRAMMAR.write([Coded("point", [123, 45], "a")]) == '<point x="12.3" y="4.5" alt="a">a</point>'
    several = [Coded("point", [10, 20], "b"), Coded("point", [30, 1000], "b")]
    assert GRAMMAR.write(several) == '<points x1="1.0" y1="2.0" x2="3.0" y2="100.0" alt="b">b</points>'


@given(st.lists(POINTS, max_size=6))
def test_what_is_written_is_read(regions: list[Coded]) -> None:
    found, errors = GRAMMAR.scan(GRAMMAR.write(regions))
    assert errors == []
    assert [Coded(*item[3:]) for item in found] == regions


def test_labels_cannot_close_a_tag() -> None:
    text = GRAMMAR.write([Coded("point", [1, 2], '</point> "&lt;')])
    assert text.count("</point>") == 1
    assert GRAMMAR.scan(text)[0][0].label == '</point> "&lt;'


def test_spans() -> None:
    text = 'Count: <points x1="1.0" y1="2.0" x2="3.0" y2="4.0" alt="b">b</points>.'
    found, _ = GRAMMAR.scan(text)
    assert [text[item.start : item.end] for item in found] == ['x1="1.0" y1="2.0"', 'x2="3.0" y2="4.0"']
    assert [found[0].outer[0], found[1].outer[1]] == [7, len(text) - 1]


def test_more_decimals_are_rounded_half_up() -> None:
    found, errors = GRAMMAR.scan('<point x="1.25" y="0.0499" alt="">a</point>')
    assert (errors, list(found[0].codes)) == ([], [13, 0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<point x="12.3" y="4', "unfinished tag"),
        ('<point x="12.3" y="4.5"', "unfinished tag"),
        ('<point x="12.3" y="4.5">lab', "unfinished tag"),
        ('<point x="12.3" y="4.5">lab</poi', "unfinished tag"),
        ("<po", "unfinished tag"),
        ('<point x="12.3" y="4.5">a</b>', "malformed tag: no </point>"),
        ('<point x="12.3" alt="a">a</point>', "malformed tag: expected x and y"),
        ('<point x1="1" y1="2">a</point>', "malformed tag: expected x and y"),
        ('<points x1="1" y1="2" x3="1" y3="2">a</points>', "malformed tag: expected x and y"),
        ('<point x="1" x="1" y="2">a</point>', "malformed attributes"),
        ('<point x="1" oh y="2">a</point>', "malformed attributes"),
        ('<point x="NaN" y="2">a</point>', "malformed number"),
        ('<point x="-1" y="2">a</point>', "malformed number"),
        ('<point x="\uff11" y="2">a</point>', "malformed number"),
        ('<point x="' + "9" * 5000 + '" y="2">a</point>', "malformed number"),
    ],
)
def test_what_is_no_point_is_an_error(text: str, reason: str) -> None:
    found, errors = GRAMMAR.scan(text)
    assert found == []
    assert [error.position for error in errors] == [0]
    assert reason in errors[0].reason


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Coded("box", [0] * 4), "A box cannot be written: the format has point"),
        (Coded("point", [0] * 2, "a", 1), "of one image"),
        (Coded("point", [0] * 2, ""), "must not be empty"),
    ],
)
def test_what_cannot_be_written_raises(region: Coded, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRAMMAR.write([region])
