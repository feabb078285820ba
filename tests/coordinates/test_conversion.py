"""From format to format within a text."""

from typing import Any

import pytest

from tests.coordinates.grammars.tagged_examples import FORMATS
from vlparts.coordinates.codec import CoordinateError
from vlparts.coordinates.conversion import convert

SIZE = (999, 999)  # one code per pixel


def test_regions_change_and_text_stays() -> None:
    text = (
        "Here:\n<ref>a cat</ref><box>(1,2),(30,400)</box>\n<box>(5,6),(7,8)</box>, and more. "
        "<ref>dog</ref><box>(1,1),(2,2)</box>!"
    )
    assert convert(text, FORMATS["marks"], None, SIZE) == (
        "Here:\na cat (001,002),(030,400)\n(005,006),(007,008), and more. dog (001,001),(002,002)!"
    )


def test_runs_take_the_separator_and_the_groups_of_the_target() -> None:
    text = "a cat (001,002),(030,400)\na cat (001,002),(003,004)\ndog (005,006),(007,008)\n\nBye."
    assert convert(text, "openpangu", FORMATS["list"], SIZE) == (
        "<ref>a cat</ref><det>[[1, 2, 30, 400], [1, 2, 3, 4]]</det>\n<ref>dog</ref><det>[[5, 6, 7, 8]]</det>\n\nBye."
    )
    listed = "<ref>a</ref><det>[[1, 2, 3, 4], [5, 6, 7, 8]]</det>"
    assert convert(listed, FORMATS["list"], FORMATS["bare"], SIZE) == "a [1, 2, 3, 4], a [5, 6, 7, 8]"


@pytest.mark.parametrize(
    "middle", ["marks", "list", "double", "behind", "behind_plain", "bare", "decimals", "growing"]
)
def test_there_and_back(middle: str) -> None:
    text = "Two:\n\na cat (001,002),(030,400)\ndog (005,006),(007,008)"
    there = convert(text, None, FORMATS[middle], SIZE)
    assert there != text
    assert convert(there, FORMATS[middle], None, SIZE) == text


def test_text_without_regions_stays() -> None:
    assert convert("Nothing (2) here.", None, FORMATS["marks"], SIZE) == "Nothing (2) here."
    assert convert("", None, FORMATS["marks"], SIZE) == ""


def test_broken_regions_raise_or_stay() -> None:
    text = "a (001,002),(003,004)\nb (1,2)\nc (005,006),(007,008)"
    with pytest.raises(CoordinateError, match="Position 24: malformed") as caught:
        convert(text, None, FORMATS["marks"], SIZE)
    assert caught.value.position == 24
    assert convert(text, None, FORMATS["marks"], SIZE, on_error="keep") == (
        "<ref>a</ref><box>(1,2),(3,4)</box>\nb (1,2)\n<ref>c</ref><box>(5,6),(7,8)</box>"
    )


def test_what_the_target_cannot_say_is_an_error_with_its_place() -> None:
    with pytest.raises(
        CoordinateError, match="Position 3: .* is a point, which format 'marks' cannot write"
    ) as caught:
        convert("x:\n(001,002)", None, FORMATS["marks"], SIZE)
    assert caught.value.position == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((b"", None, None, SIZE), "`text` must be a str, got bytes"),
        (("", "unknown", None, SIZE), "`format` must be a CoordinateFormat or one of"),
        (("", None, "unknown", SIZE), "`format` must be a CoordinateFormat or one of"),
        (("", None, None, 5), "`image_size` must be"),
    ],
)
def test_bad_arguments_raise(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(*arguments)
    with pytest.raises(ValueError, match="`on_error` must be one of 'raise', 'keep', got 'skip'"):
        convert("", None, None, SIZE, on_error="skip")


def test_identities_are_left_out_where_the_target_has_no_place_for_them() -> None:
    text = '<points coords="1 1 100 200 2 300 400">two</points>'
    assert convert(text, "molmo2", None, (999, 999)) == "two (100,200)\ntwo (300,400)"


def test_regions_within_the_same_marks_are_one_run() -> None:
    text = "<phrase>a</phrase><object><patch_index_0000><patch_index_0033></delimiter_of_multi_objects/>"
    text += "<patch_index_0000><patch_index_0066></object>"
    assert convert(text, "kosmos2", "kosmos2", SIZE) == text
