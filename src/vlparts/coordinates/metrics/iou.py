"""Intersection over union of boxes, and points inside regions. Computed in float64, vectorized over boxes."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..regions import Region
from ..validation import check_boxes, check_coordinates

__all__ = ["box_area", "box_giou", "box_iou", "contains", "inside_polygon", "paired_box_iou"]

Floats = NDArray[np.float64]


def _rescaled(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """Scale both by one power of two if areas could leave the range of float64. Ratios of areas do not change."""
    largest = max((float(np.abs(boxes).max()) for boxes in (first, second) if boxes.size), default=0.0)
    if largest == 0.0 or 2.0**-400 < largest < 2.0**400:
        return first, second
    power = -int(np.frexp(largest)[1])
    return np.ldexp(first, power), np.ldexp(second, power)


def _areas(boxes: Floats) -> Floats:
    """Return the areas of boxes `(..., 4)`."""
    area: Floats = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return area


def _iou_and_union(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """Return intersection over union, and the area of the union, of boxes `(..., 4)` that broadcast."""
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    sides = np.clip(high - low, 0.0, None)
    intersection = sides[..., 0] * sides[..., 1]
    union = _areas(first) + _areas(second) - intersection
    iou = np.zeros_like(intersection)
    np.divide(intersection, union, out=iou, where=intersection > 0)
    return iou, union


def box_area(boxes: ArrayLike) -> Floats:
    """Return the area of every box.

    Args:
        boxes: `(n, 4)` x1, y1, x2, y2.

    Returns:
        float64, `(n,)`, in the square of the unit of the boxes.

    Raises:
        ValueError: If `boxes` is not `(n, 4)`, contains NaN or infinity, or has x2 < x1 or y2 < y1.
    """
    return _areas(check_boxes(boxes, "boxes"))


def box_iou(a: ArrayLike, b: ArrayLike) -> Floats:
    """Return the intersection over union of every box of `a` with every box of `b`.

    Args:
        a: `(n, 4)` boxes x1, y1, x2, y2 in any one unit.
        b: `(m, 4)` boxes in the same unit.

    Returns:
        float64, `(n, m)`, in [0, 1]. A box of zero area has an IoU of 0 with every box, including itself.

    Raises:
        ValueError: If an argument is not `(n, 4)`, contains NaN or infinity, or has x2 < x1 or y2 < y1.
    """
    first, second = _rescaled(check_boxes(a, "a"), check_boxes(b, "b"))
    return _iou_and_union(first[:, None], second[None])[0]


def paired_box_iou(a: ArrayLike, b: ArrayLike) -> Floats:
    """Return the intersection over union of each box of `a` with the box of `b` in the same row.

    Args:
        a: `(n, 4)` boxes x1, y1, x2, y2 in any one unit.
        b: `(n, 4)` boxes in the same unit.

    Returns:
        float64, `(n,)`: the diagonal of `box_iou(a, b)`.

    Raises:
        ValueError: See `box_iou`; also if the lengths differ.
    """
    first, second = _rescaled(check_boxes(a, "a"), check_boxes(b, "b"))
    if len(first) != len(second):
        raise ValueError(f"`a` and `b` must have the same number of boxes, got {len(first)} and {len(second)}.")
    return _iou_and_union(first, second)[0]


def box_giou(a: ArrayLike, b: ArrayLike) -> Floats:
    """Return the generalised intersection over union of every box of `a` with every box of `b`.

    GIoU is the IoU minus the share of the smallest enclosing box that neither box covers (Rezatofighi et al., 2019,
    arXiv:1902.09630). It decreases with the distance of disjoint boxes.

    Args:
        a: `(n, 4)` boxes x1, y1, x2, y2 in any one unit.
        b: `(m, 4)` boxes in the same unit.

    Returns:
        float64, `(n, m)`, in [-1, 1]; 0 if the enclosing box has zero area.

    Raises:
        ValueError: See `box_iou`.
    """
    first, second = _rescaled(check_boxes(a, "a"), check_boxes(b, "b"))
    first, second = first[:, None], second[None]
    iou, union = _iou_and_union(first, second)
    low = np.minimum(first[..., :2], second[..., :2])
    high = np.maximum(first[..., 2:], second[..., 2:])
    enclosing = (high[..., 0] - low[..., 0]) * (high[..., 1] - low[..., 1])
    uncovered = np.zeros_like(enclosing)
    np.divide(np.maximum(enclosing - union, 0.0), enclosing, out=uncovered, where=enclosing > 0)
    return iou - uncovered


def inside_polygon(points: ArrayLike, polygon: ArrayLike) -> NDArray[np.bool_]:
    """Return which points are inside a polygon or on its edges.

    Args:
        points: `(n, 2)` x, y.
        polygon: `(k, 2)` corners, the last connected to the first. If edges cross, the even-odd rule applies.

    Returns:
        bool, `(n,)`.

    Raises:
        ValueError: If an argument is not `(n, 2)` finite numbers, or the polygon has fewer than three corners.
    """
    given, corners = check_coordinates(points, "points"), check_coordinates(polygon, "polygon")
    if given.shape[1] != 2 or corners.shape[1] != 2 or len(corners) < 3:
        raise ValueError(
            f"`points` must be (n, 2) and `polygon` (k, 2) with k >= 3, got shapes {given.shape} and {corners.shape}."
        )
    x, y = given[:, 0, None], given[:, 1, None]
    (x1, y1), (x2, y2) = corners.T, np.roll(corners, -1, axis=0).T
    cross = (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)  # 0 on the line; the sign is the side
    within = (np.minimum(x1, x2) <= x) & (x <= np.maximum(x1, x2))
    within &= (np.minimum(y1, y2) <= y) & (y <= np.maximum(y1, y2))
    on_edge = ((cross == 0) & within).any(axis=1)
    crossed = ((y1 > y) != (y2 > y)) & ((cross > 0) == (y2 > y1))
    inside: NDArray[np.bool_] = on_edge | (crossed.sum(axis=1) % 2 == 1)
    return inside


def contains(region: Region, x: float, y: float) -> bool:
    """Return whether a point is in a box, quad or polygon or on its edges; False for other kinds.

    Raises:
        ValueError: If the point is not finite.
    """
    point = check_coordinates([[x, y]], "point")
    if region.kind == "box":
        x1, y1, x2, y2 = region.xyxy
        return bool(x1 <= point[0, 0] <= x2 and y1 <= point[0, 1] <= y2)
    return region.kind in ("quad", "polygon") and bool(inside_polygon(point, region.points)[0])
