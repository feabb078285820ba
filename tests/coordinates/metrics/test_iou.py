"""The overlap of boxes, and what lies inside."""

import math
from typing import Any

import numpy as np
import pytest

from vlparts.coordinates.metrics.iou import box_area, box_giou, box_iou, contains, inside_polygon, paired_box_iou
from vlparts.coordinates.regions import Region


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
        ([0, 0, 1, 1], r"`a` must be an \(n, 4\) array of numbers, got shape \(4,\)"),
        ([[0, 0, 1]], r"got shape \(1, 3\)"),
        (np.zeros((0, 3)), r"got shape \(0, 3\)"),
        ([[0, 0, 1, 1], [0, 0, 1]], r"`a` must be an \(n, 4\) array of numbers"),
        ([["0", "0", "1", "1"]], "`a` must be an .* dtype"),
        (np.zeros((1, 4), dtype=bool), "dtype bool"),
        ([[0, 0, 1, 1], [0, 0, math.nan, 1]], r"`a\[1\]` must be finite"),
        ([[0, 0, 1, 1], [2, 0, 1, 1]], r"`a\[1\]` must have x1 <= x2 and y1 <= y2"),
    ],
)
def test_bad_boxes_raise(a: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        box_iou(a, [[0, 0, 1, 1]])


def some_boxes(seed: int, count: int, most: int = 12) -> Any:
    return np.sort(np.random.default_rng(seed).integers(0, most, (count, 2, 2)), axis=1).reshape(-1, 4)


def test_area_is_width_times_height() -> None:
    boxes = some_boxes(1, 20)
    assert box_area(boxes).tolist() == [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes.tolist()]
    with pytest.raises(ValueError, match=r"`boxes\[0\]` must have x1 <= x2"):
        box_area([[2, 0, 1, 1]])


def test_paired_overlap_is_the_diagonal() -> None:
    a, b = some_boxes(2, 30), some_boxes(3, 30)
    assert paired_box_iou(a, b).tolist() == np.diagonal(box_iou(a, b)).tolist()
    with pytest.raises(ValueError, match="the same number of boxes, got 30 and 2"):
        paired_box_iou(a, b[:2])


def test_giou_counts_pixels() -> None:
    a, b = some_boxes(4, 20), some_boxes(5, 20)
    got = box_giou(a, b)
    for row, first in enumerate(a.tolist()):
        for column, second in enumerate(b.tolist()):
            around = [*np.minimum(first[:2], second[:2]), *np.maximum(first[2:], second[2:])]
            whole = (around[2] - around[0]) * (around[3] - around[1])
            cells = {(x, y) for box in (first, second) for x in range(box[0], box[2]) for y in range(box[1], box[3])}
            expected = iou_of_pixels(first, second) - ((whole - len(cells)) / whole if whole else 0.0)
            assert got[row, column] == pytest.approx(expected, abs=1e-14)
    assert got.min() < 0 < got.max()


def test_giou_tells_how_far_apart_boxes_are() -> None:
    near, far = box_giou([[0, 0, 1, 1]], [[2, 0, 3, 1], [20, 0, 21, 1]])[0]
    assert -1 < far < near < 0


@pytest.mark.parametrize("power", [-1000, -560, -300, 300, 560, 1000])
def test_areas_beyond_float64_change_nothing(power: int) -> None:
    boxes = some_boxes(6, 12).astype(np.float64)
    scaled = np.ldexp(boxes, power)
    assert (box_iou(scaled, scaled) == box_iou(boxes, boxes)).all()
    assert (box_giou(scaled, scaled) == box_giou(boxes, boxes)).all()


RING = [(0, 0), (6, 0), (6, 6), (4, 6), (4, 2), (2, 2), (2, 6), (0, 6)]  # a U upside down


def test_inside_a_polygon() -> None:
    y, x = np.mgrid[-1:8, -1:8]
    points = np.stack([x.ravel(), y.ravel()], axis=1)

    def expected(px: int, py: int) -> bool:
        return 0 <= px <= 6 and 0 <= py <= 6 and not (2 < px < 4 and py > 2)

    for corners in (RING, RING[::-1], RING[3:] + RING[:3]):
        got = inside_polygon(points, corners)
        assert got.tolist() == [expected(*point) for point in points.tolist()]


def test_inside_a_slanted_quad() -> None:
    diamond = [(2, 0), (4, 2), (2, 4), (0, 2)]
    y, x = np.mgrid[0:17, 0:17] / 4
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    assert inside_polygon(points, diamond).tolist() == (np.abs(points - 2).sum(axis=1) <= 2).tolist()


def test_the_even_odd_rule_where_edges_cross() -> None:
    star = [(math.sin(4 * math.pi * k / 5), math.cos(4 * math.pi * k / 5)) for k in range(5)]
    assert inside_polygon([[0, 0], [0, 0.9]], star).tolist() == [False, True]


def test_a_region_contains_a_point_on_its_edge() -> None:
    assert contains(Region.box(0, 0, 2, 2), 2, 1)
    assert not contains(Region.box(0, 0, 2, 2), 2.001, 1)
    assert contains(Region.quad([(2, 0), (4, 2), (2, 4), (0, 2)]), 3, 1)
    assert not contains(Region.polygon(RING), 3, 4)
    assert not contains(Region.line([(0, 0), (2, 2)]), 1, 1)
    assert not contains(Region.point(1, 1), 1, 1)


@pytest.mark.parametrize(
    ("points", "polygon", "message"),
    [
        ([[0, 0]], [[0, 0], [1, 1]], r"k >= 3, got shapes \(1, 2\) and \(2, 2\)"),
        ([[0, 0, 1, 1]], RING, r"got shapes \(1, 4\)"),
        ([[0, math.nan]], RING, r"`points\[0\]` must be finite"),
        ([[0, 0], [1]], RING, r"`points` must be an array of numbers, \(n, 2\) points or \(n, 4\) boxes"),
        ([[0, 0]], [["a", "b"]] * 3, "`polygon` must be .* dtype"),
    ],
)
def test_bad_polygons_raise(points: Any, polygon: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inside_polygon(points, polygon)
