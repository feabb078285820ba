"""Kosmos-2's cells, against transformers' own functions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.kosmos2.processing_kosmos2 import (
    clean_text_and_extract_entities_with_bboxes,
    coordinate_to_patch_index,
    patch_index_to_coordinate,
)

from vlparts.coordinates.grammars.base import Coded
from vlparts.coordinates.grammars.kosmos2 import CellNumbers, KosmosGrammar

NUMBERS, GRAMMAR = CellNumbers(32), KosmosGrammar()
SIDE = st.integers(1, 100_000)
UNIT = st.integers(0, 640)


@given(UNIT, UNIT, UNIT, UNIT)
def test_boxes_become_the_cells_that_transformers_gives(x1: int, y1: int, x2: int, y2: int) -> None:
    # 640 = 32 * 20: corners on the edges of cells are exact in floating point.
    x1, x2, y1, y2 = min(x1, x2), max(x1, x2) + 1, min(y1, y2), max(y1, y2) + 1
    box = (x1 / 1024, y1 / 1024, x2 / 1024, y2 / 1024)
    points = np.array([[x1, y1], [x2, y2]], dtype=np.float64)
    assert NUMBERS.to_codes(points, [2], (1024, 1024)) == [list(coordinate_to_patch_index(box, 32))]


def test_every_pair_of_cells_reads_as_in_transformers_and_is_written_again() -> None:
    pairs = [(a, b) for a in range(0, 1024, 7) for b in range(a, 1024) if b % 32 >= a % 32]
    read = NUMBERS.to_points(pairs, (640, 448))
    for (first, second), points in zip(pairs, read, strict=True):
        x1, y1, x2, y2 = patch_index_to_coordinate(first, second, 32)
        np.testing.assert_allclose(points, [(x1 * 640, y1 * 448), (x2 * 640, y2 * 448)], rtol=1e-12, atol=1e-9)
    flat = np.array(read).reshape(-1, 2)
    assert NUMBERS.to_codes(flat, [2] * len(pairs), (640, 448)) == [list(pair) for pair in pairs]


@given(SIDE, SIDE, st.integers(0, 31), st.integers(0, 31), st.integers(0, 31), st.integers(0, 31))
def test_codes_are_kept_for_any_size(width: int, height: int, x1: int, y1: int, x2: int, y2: int) -> None:
    codes = [min(y1, y2) * 32 + min(x1, x2), max(y1, y2) * 32 + max(x1, x2)]
    points = np.array(NUMBERS.to_points([codes], (width, height))[0])
    assert NUMBERS.to_codes(points, [2], (width, height)) == [codes]


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), SIDE, SIDE)
def test_the_error_is_bounded(values: list[float], width: int, height: int) -> None:
    points = np.sort(np.array(values).reshape(2, 2), axis=0) * [width, height]
    back = np.array(NUMBERS.to_points(NUMBERS.to_codes(points, [2], (width, height)), (width, height))[0])
    assert (np.abs(back - points) <= np.array(NUMBERS.error_bound((width, height))) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([5, 1024], "Code 1024 is above the largest code 1023"),
        ([5, 4], "left of or above"),
        ([40, 9], "left of or above"),
    ],
)
def test_cells_that_cannot_be_raise(codes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NUMBERS.to_points([codes], (64, 64))


def test_only_boxes_have_cells() -> None:
    with pytest.raises(
        ValueError, match=r"^`counts` must be 2 for every region, as cells are those of boxes, got \[1\]\.$"
    ):
        NUMBERS.to_codes(np.zeros((1, 2)), [1], (64, 64))
    with pytest.raises(ValueError, match="^`side` must be"):
        CellNumbers(1)


# transformers: the example in clean_text_and_extract_entities_with_bboxes.
EXAMPLE = (
    "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> warming "
    "himself by<phrase> a fire</phrase><object><patch_index_0005><patch_index_0911></object>."
)


def test_the_example_is_read_as_in_transformers() -> None:
    found, errors = GRAMMAR.scan(EXAMPLE)
    assert errors == []
    _, entities = clean_text_and_extract_entities_with_bboxes(EXAMPLE)
    points = NUMBERS.to_points([item.codes for item in found], (1, 1))
    assert [item.label for item in found] == [name for name, _, _ in entities]
    assert [[tuple(np.ravel(pair).tolist())] for pair in points] == [boxes for _, _, boxes in entities]


LABELS = st.none() | st.text("abc é", min_size=1).filter(lambda text: text == text.strip())
CELLS = st.lists(st.integers(0, 1023), min_size=2, max_size=2)
BOXES = st.tuples(CELLS, LABELS).map(lambda values: Coded("box", *values))


@given(st.lists(BOXES, max_size=6))
def test_what_is_written_is_read(regions: list[Coded]) -> None:
    found, errors = GRAMMAR.scan(GRAMMAR.write(regions))
    assert errors == []
    assert [Coded(*item[3:]) for item in found] == regions


def test_several_boxes_share_an_object() -> None:
    text = GRAMMAR.write([Coded("box", [1, 2], "a"), Coded("box", [3, 4], "a")])
    joined = "<patch_index_0001><patch_index_0002></delimiter_of_multi_objects/><patch_index_0003><patch_index_0004>"
    assert text == f"<phrase>a</phrase><object>{joined}</object>"
    assert len(GRAMMAR.scan(text.replace("><", "> <"))[0]) == 2


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("<object><patch_index_0044></object>", 0, "a box has two cells, got 1"),
        ("<object></object>", 0, "a box has two cells, got 0"),
        ("<object><patch_index_0001><patch_index_0002><patch_index_0003></object>", 0, "two cells, got 3"),
        ("a <object><patch_index_0044><patch_index_08", 2, "unfinished object"),
        ("<object><patch_index_0044><patch_index_0863></obj", 0, "unfinished object"),
        ("<object><patch_index_0044><patch_index_0863> b", 0, "expected cells and </object>"),
        ("<object><patch_index_\uff11><patch_index_0863></object>", 0, "expected cells and </object>"),
        ("<patch_index_0044>", 0, "without <object> before it"),
        ("a <obj", 2, "unfinished mark"),
        (f"<object><patch_index_{'9' * 5000}><patch_index_0863></object>", 0, "more than 9 digits"),
    ],
)
def test_what_is_no_box_is_an_error(text: str, position: int, reason: str) -> None:
    found, errors = GRAMMAR.scan(text)
    assert found == []
    assert errors[0].position == position
    assert reason in errors[0].reason


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Coded("point", [1, 2]), "A point cannot be written: the format has box"),
        (Coded("box", [1, 2], "a<b"), "contain '<'"),
    ],
)
def test_what_cannot_be_written_raises(region: Coded, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRAMMAR.write([region])
