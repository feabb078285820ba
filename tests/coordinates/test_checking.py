"""What would go wrong with regions in a format is found before training."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.checking import PROBLEMS, check_region, check_text
from vlparts.coordinates.codec import decode, encode
from vlparts.coordinates.formats.openpangu import padded_format
from vlparts.coordinates.regions import Region

COARSE = padded_format(levels=11, digits=2, denominator=10)
SIZE = (100, 200)


def names(fields: Any, size: Any = SIZE, **options: Any) -> list[str]:
    return [problem.name for problem in check_region(fields, size, **options)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"box": [0, 0, 100, 200], "label": "cat"}, []),
        ({"point": [50.5, 0]}, []),
        ({"box": [60, 0, 50, 20]}, ["reordered"]),
        ({"box": [0, 30, 50, 20]}, ["reordered"]),
        ({"box": [60, 0, -5, 20]}, ["reordered", "outside"]),
        ({"box": [0, 0, 100.5, 20]}, ["outside"]),
        ({"point": [0, 201]}, ["outside"]),
        ({"box": [0, 0, 5]}, ["broken"]),
        ({"box": ["a", 0, 5, 5]}, ["broken"]),
        ({"box": [True, 0, 5, 5]}, ["broken"]),
        ({"label": "cat"}, ["broken"]),
        (3, ["broken"]),
        ({"point": [1, 2], "image": 1}, ["broken"]),
        ({"polygon": [[1, 2], [3, 4], [5, 2]]}, ["unwritable"]),
        ({"point": [1, 2], "label": "two\nlines"}, ["unwritable"]),
    ],
)
def test_what_is_found(fields: Any, expected: list[str]) -> None:
    assert names(fields) == expected
    assert set(expected) <= set(PROBLEMS)


def test_what_moves_too_far() -> None:
    (problem,) = check_region({"box": [0, 14, 33, 200]}, SIZE, COARSE)
    assert problem.name == "moved"
    assert problem.detail == "box [0.0, 14.0, 33.0, 200.0] moves by 6.00 pixels in '(00,01),(03,10)'"
    assert check_region({"box": [0, 14, 33, 200]}, SIZE, COARSE, most=6.0) == []
    assert check_region({"box": [0, 20, 30, 200]}, SIZE, COARSE) == []


@given(st.floats(0, 100), st.floats(0, 200), st.floats(0, 6))
def test_the_movement_is_that_of_writing_and_reading(x: float, y: float, most: float) -> None:
    (read,) = decode(encode([Region.point(x, y)], SIZE, COARSE), SIZE, COARSE).regions
    moved = max(abs(read.points[0][0] - x), abs(read.points[0][1] - y))
    assert names({"point": [x, y]}, format=COARSE, most=most) == (["moved"] if moved > most else [])


def test_each_region_has_the_size_of_its_image() -> None:
    fields = {"point": [50, 5], "image": 1}
    assert "outside" in names(fields, [(100, 100), (10, 10)])


def test_texts_are_read() -> None:
    assert check_text("a cat (010,020),(030,040)", SIZE) == []
    problems = check_text("(030,020),(010,040) and (1,2)", SIZE)
    assert [problem.name for problem in problems] == ["unreadable"] * 2
    assert problems[0].detail.startswith("position 0: x2 (10) is less than x1 (30)")
    assert problems[1].detail.startswith("position 24: ")


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="^`format` must be"):
        check_region({"point": [1, 2]}, SIZE, "morse")
    with pytest.raises(ValueError, match="^`image_size` must be"):
        check_region({"point": [1, 2]}, (0, 5))
