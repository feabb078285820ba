"""Regions of an image in one canonical form, and the overlap of boxes.

The canonical form is float pixels of the original image, x then y, with half-open edges: an image of size
(W, H) spans [0, W] x [0, H], and a box that covers all of it is (0, 0, W, H).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["KINDS", "Region", "box_iou"]

KINDS: dict[str, int] = {"point": 1, "box": 2}
"""The kinds of region, each with its number of (x, y) points."""


def _finite(value: object, name: str) -> float:
    """Return `value` as a float, or raise ValueError naming it where it is not a finite real number."""
    if type(value) is float and math.isfinite(value):  # the common case, first because it is the fastest
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int too large for a float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _pair(point: object, index: int) -> tuple[float, float]:
    """Return `point` as two finite floats."""
    if not isinstance(point, tuple) and (isinstance(point, (str, bytes)) or not isinstance(point, Iterable)):
        raise ValueError(f"points[{index}] must be an (x, y) pair, got {point!r}")
    values = tuple(point)
    if len(values) != 2:
        raise ValueError(f"points[{index}] must be an (x, y) pair, got {len(values)} values")
    return _finite(values[0], f"points[{index}] x"), _finite(values[1], f"points[{index}] y")


@dataclass(frozen=True)
class Region:
    """A labelled place in an image, in float pixels of the original image (x right, y down).

    A box of zero width or height is allowed: quantisation turns a thin box into one, and a decoder must be
    able to say what it read. Points may lie outside an image, because a region does not know its image;
    encoding applies the policy that the caller names.

    Args:
        kind: "point" or "box".
        points: One (x, y) pair for a point; the (x1, y1) and (x2, y2) corners for a box, with x1 <= x2, y1 <=
            y2.
        label: What the region shows, or None.
        score: A confidence, finite, or None.

    Raises:
        ValueError: For an unknown kind, a wrong number of points, a coordinate or score that is not a finite
            real number (bool is none), corners out of order, or a label that is not a str.
    """

    kind: str
    points: tuple[tuple[float, float], ...]
    label: str | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"kind must be one of {sorted(KINDS)}, got {self.kind!r}")
        if isinstance(self.points, (str, bytes)) or not isinstance(self.points, Iterable):
            raise ValueError(f"points must be a sequence of (x, y) pairs, got {self.points!r}")
        points = tuple(_pair(point, index) for index, point in enumerate(self.points))
        if len(points) != KINDS[self.kind]:
            raise ValueError(f"a {self.kind} has {KINDS[self.kind]} point(s), got {len(points)}")
        if self.kind == "box":
            for axis, name in enumerate("xy"):
                low, high = points[0][axis], points[1][axis]
                if high < low:
                    raise ValueError(f"{name}2 ({high:g}) is less than {name}1 ({low:g})")
        if self.label is not None and not isinstance(self.label, str):
            raise ValueError(f"label must be a str or None, got {self.label!r}")
        object.__setattr__(self, "points", points)
        if self.score is not None:
            object.__setattr__(self, "score", _finite(self.score, "score"))

    @classmethod
    def box(
        cls, x1: float, y1: float, x2: float, y2: float, label: str | None = None, score: float | None = None
    ) -> "Region":
        """Make a box from its left, top, right and bottom edges, in pixels."""
        return cls("box", ((x1, y1), (x2, y2)), label, score)

    @classmethod
    def point(cls, x: float, y: float, label: str | None = None, score: float | None = None) -> "Region":
        """Make a point, in pixels."""
        return cls("point", ((x, y),), label, score)

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        """The (x1, y1, x2, y2) bounds in pixels; for a point x1 = x2 and y1 = y2."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def check_boxes(boxes: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return `boxes` as a float64 array `(n, 4)` of finite x1, y1, x2, y2 in order.

    Args:
        boxes: `(n, 4)` numbers; an empty list stands for no boxes. Never written to.
        name: The argument's name, for the message.

    Returns:
        float64, `(n, 4)`.

    Raises:
        ValueError: Naming the argument and the first bad row.
    """
    try:
        given = np.asarray(boxes)
    except ValueError as error:
        raise ValueError(f"{name} must be an (n, 4) array of numbers: {error}") from None
    if given.size == 0 and given.ndim in (1, 2) and given.shape[-1] in (0, 4):
        return np.zeros((0, 4))
    if given.dtype.kind not in "iuf" or given.ndim != 2 or given.shape[1] != 4:
        raise ValueError(f"{name} must be an (n, 4) array of numbers, got shape {given.shape}, dtype {given.dtype}")
    array = given.astype(np.float64)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"{name}[{row}] must be finite, got {array[row].tolist()}")
    ordered = (array[:, 2:] >= array[:, :2]).all(axis=1)
    if not ordered.all():
        row = int(np.argmin(ordered))
        raise ValueError(f"{name}[{row}] must have x1 <= x2 and y1 <= y2, got {array[row].tolist()}")
    return array


def box_iou(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return the intersection over union of every box of `a` with every box of `b`.

    Args:
        a: `(n, 4)` boxes x1, y1, x2, y2 in any one unit.
        b: `(m, 4)` boxes in the same unit.

    Returns:
        float64, `(n, m)`, in [0, 1]. A box of zero area has overlap 0 with every box, itself included.

    Raises:
        ValueError: If an argument is not `(n, 4)`, holds NaN or infinity, or has x2 < x1 or y2 < y1.
    """
    first, second = check_boxes(a, "a"), check_boxes(b, "b")
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    overlap = np.prod(np.clip(high - low, 0.0, None), axis=2)
    area_a = np.prod(first[:, 2:] - first[:, :2], axis=1)
    area_b = np.prod(second[:, 2:] - second[:, :2], axis=1)
    union = area_a[:, None] + area_b[None, :] - overlap
    iou: NDArray[np.float64] = np.zeros_like(overlap)
    np.divide(overlap, union, out=iou, where=overlap > 0)
    return iou
