"""Regions and the overlap of boxes."""

import dataclasses
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from vlparts.parts.regions import Region, box_iou


def test_a_box_holds_floats_in_order() -> None:
    box = Region.box(1, np.int64(2), np.float32(3.5), 4, "cat", score=0.5)
    assert box.kind == "box"
    assert box.points == ((1.0, 2.0), (3.5, 4.0))
    assert all(type(value) is float for point in box.points for value in point)
    assert box.xyxy == (1.0, 2.0, 3.5, 4.0)
    assert (box.label, box.score) == ("cat", 0.5)


def test_a_point_is_its_own_bounds() -> None:
    assert Region.point(3, 4, "tip").xyxy == (3.0, 4.0, 3.0, 4.0)


def test_points_may_come_as_lists_and_are_copied() -> None:
    given = [[1, 2], [3, 4]]
    region = Region("box", given)  # type: ignore[arg-type]
    given[0][0] = 99
    assert region == Region.box(1, 2, 3, 4)
    assert hash(region) == hash(Region.box(1, 2, 3, 4))


def test_a_region_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Region.point(1, 2).label = "x"  # type: ignore[misc]


def test_a_box_of_zero_area_is_allowed() -> None:
    assert Region.box(5, 5, 5, 9).xyxy == (5.0, 5.0, 5.0, 9.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Region.box(5, 0, 3, 1), r"x2 \(3\) is less than x1 \(5\)"),
        (lambda: Region.box(0, 5, 1, 3), r"y2 \(3\) is less than y1 \(5\)"),
        (lambda: Region.point(math.nan, 0), r"points\[0\] x must be finite, got nan"),
        (lambda: Region.box(0, 0, math.inf, 1), r"points\[1\] x must be finite, got inf"),
        (lambda: Region.point(0, 10**400), r"points\[0\] y must be finite"),
        (lambda: Region.point(True, 0), r"must be a real number, got True of type bool"),
        (lambda: Region.point(np.bool_(True), 0), "must be a real number"),
        (lambda: Region.point("1", 0), "must be a real number, got '1' of type str"),  # type: ignore[arg-type]
        (lambda: Region.point(Decimal(1), 0), "of type Decimal"),  # type: ignore[arg-type]
        (lambda: Region.point(1j, 0), "of type complex"),  # type: ignore[arg-type]
        (lambda: Region("box", ((1.0, 2.0),)), r"a box has 2 point\(s\), got 1"),
        (lambda: Region("point", ((1.0, 2.0, 3.0),)), "got 3 values"),  # type: ignore[arg-type]
        (lambda: Region("point", (1.0, 2.0)), r"points\[0\] must be an \(x, y\) pair"),  # type: ignore[arg-type]
        (lambda: Region("point", "ab"), "points must be a sequence"),  # type: ignore[arg-type]
        (lambda: Region("line", ((1.0, 2.0),)), r"kind must be one of \['box', 'point'\], got 'line'"),
        (lambda: Region(["box"], ((1.0, 2.0),)), "kind must be one of"),  # type: ignore[arg-type]
        (lambda: Region.point(1, 2, label=3), "label must be a str or None, got 3"),  # type: ignore[arg-type]
        (lambda: Region.point(1, 2, score=math.nan), "score must be finite"),
    ],
)
def test_bad_regions_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def iou_of_pixels(a: list[int], b: list[int]) -> float:
    """Count unit pixels: slow and obvious, for small integer boxes."""
    cells = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
    union = len(cells[0] | cells[1])
    return len(cells[0] & cells[1]) / union if union else 0.0


def test_iou_counts_pixels() -> None:
    corners = np.sort(np.random.default_rng(0).integers(0, 12, (40, 2, 2)), axis=1).reshape(-1, 4)
    a, b = corners[:25], corners[25:]
    expected = [[iou_of_pixels(first, second) for second in b.tolist()] for first in a.tolist()]
    got = box_iou(a, b)
    assert got.shape == (25, 15)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-15)
    assert 0 < np.count_nonzero(got) < got.size


def test_iou_of_empty_boxes_is_zero() -> None:
    assert box_iou([[1, 1, 1, 5]], [[1, 1, 1, 5], [0, 0, 9, 9]]).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("nothing", [[], np.zeros((0, 4))])
def test_iou_with_no_boxes(nothing: Any) -> None:
    assert box_iou(nothing, [[0, 0, 1, 1]]).shape == (0, 1)
    assert box_iou([[0, 0, 1, 1]], nothing).shape == (1, 0)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        ([0, 0, 1, 1], r"a must be an \(n, 4\) array of numbers, got shape \(4,\)"),
        ([[0, 0, 1]], r"got shape \(1, 3\)"),
        (np.zeros((0, 3)), r"got shape \(0, 3\)"),
        ([[0, 0, 1, 1], [0, 0, 1]], r"a must be an \(n, 4\) array of numbers"),
        ([["0", "0", "1", "1"]], "a must be an .* dtype"),
        (np.zeros((1, 4), dtype=bool), "dtype bool"),
        ([[0, 0, 1, 1], [0, 0, math.nan, 1]], r"a\[1\] must be finite"),
        ([[0, 0, 1, 1], [2, 0, 1, 1]], r"a\[1\] must have x1 <= x2 and y1 <= y2"),
    ],
)
def test_bad_boxes_are_refused(a: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        box_iou(a, [[0, 0, 1, 1]])
