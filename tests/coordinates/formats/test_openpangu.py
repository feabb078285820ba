"""Formats of zero-padded pairs, and the fast decoder of boxes, compared with the grammar."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.formats.openpangu import PADDED, padded_format, read_plain_boxes
from vlparts.coordinates.formats.registry import CoordinateFormat
from vlparts.coordinates.resolving import resolve

SIZE = (640, 427)
BINS = padded_format(levels=90, digits=2, denominator=90, rounding="bins", separator=" ; ")
TAGGED = padded_format(label_open="<ref>", label_close="</ref>")
PIECES = [
    "(001,002),(003,004)",
    "(01,02),(03,04)",
    "(95,02),(03,04)",
    "(9,",
    "(001,002)",
    "cat",
    " ",
    ", ",
    "\n",
    " ; ",
]
texts = st.lists(st.sampled_from([*PIECES, "\0"]) | st.text(max_size=3), max_size=12).map("".join)


def by_grammar(text: str, fmt: CoordinateFormat) -> tuple[object, ...]:
    found, errors = fmt.grammar.scan(text)
    kept, regions, errors = resolve(text, found, errors, [SIZE], fmt)
    return tuple(regions), tuple((item.start, item.end) for item in kept), errors


@given(texts, st.sampled_from([PADDED, BINS, TAGGED]))
def test_what_it_reads_is_what_the_grammar_reads(text: str, fmt: CoordinateFormat) -> None:
    quick = read_plain_boxes(text, SIZE, fmt)
    regions, spans, errors = by_grammar(text, fmt)
    assert quick is None or (*quick, []) == (regions, spans, errors)


def test_it_reads_labels_lines_and_prose() -> None:
    lines = ["Look: cat (001,002),(003,004) and dog (005,006),(007,008)", "(001,002),(003,004)"]
    text = "\n".join([*lines, "\u00e9t\u00e9 (009,009),(010,010)."])
    quick = read_plain_boxes(text, SIZE, PADDED)
    assert quick is not None
    assert [region.label for region in quick[0]] == ["Look: cat", "and dog", None, "\u00e9t\u00e9"]
    assert (*quick, []) == by_grammar(text, PADDED)


def test_it_reads_many_at_once() -> None:
    corners = np.sort(np.random.default_rng(0).integers(0, 1000, (500, 2, 2)), axis=1).reshape(-1, 4)
    text = "\n".join("thing ({:03d},{:03d}),({:03d},{:03d})".format(*row) for row in corners)
    quick = read_plain_boxes(text, SIZE, PADDED)
    assert quick is not None
    assert (*quick, []) == by_grammar(text, PADDED)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "(001,002)",
        "(001,002),(003,004) (005,006),(007,008)",
        "(001,002),(003,004), (005,006),(007,008)",
        "(003,002),(001,004)",
        "(001,002),(003,004)\n(1,2)",
    ],
)
def test_it_leaves_other_texts_to_the_grammar(text: str) -> None:
    assert read_plain_boxes(text, SIZE, PADDED) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digits": 0}, r"`digits` must be in 1..9, got 0"),
        ({"digits": 3.0}, "`digits` must be an integer, got 3.0"),
        ({"levels": True}, "`levels` must be an integer, got True"),
        ({"levels": 1001}, r"`levels` must be in 2..1000 for 3 digits, got 1001"),
        ({"levels": 1}, "`levels` must be in"),
        (
            {"denominator": 998},
            "`denominator` must be at least 999 for 1000 levels and rounding 'round', got 998",
        ),
        ({"rounding": "bins"}, "`denominator` must be at least 1000 .* 'bins', got 999"),
        ({"rounding": "ceil"}, "`rounding` must be 'round', 'floor' or 'bins', got 'ceil'"),
        ({"separator": ""}, "`separator` must not be empty"),
        ({"separator": ","}, "which joins a box"),
        ({"separator": " "}, "`separator` ' ' must not occur in `label_close`, got ' '"),
        ({"separator": "("}, r"`separator` must be a str without parentheses, got '\('"),
        ({"label_open": "\uff08"}, "`label_open` must be a str without parentheses"),
        ({"label_close": None}, "`label_close` must be a str"),
        ({"name": 3}, "`name` must be a str"),
    ],
)
def test_bad_formats_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        padded_format(**changes)
