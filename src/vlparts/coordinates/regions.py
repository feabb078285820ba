"""Regions of an image in canonical form.

The canonical form is float pixels of the original image, x then y, with half-open edges: an image of size (W, H) spans
[0, W] x [0, H], and a box that covers it is (0, 0, W, H).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypedDict, Unpack

import numpy as np

from .json_values import NO_ATTRIBUTES, Attributes, as_attributes

__all__ = ["KINDS", "Region"]

Points = tuple[tuple[float, float], ...]
Pairs = Sequence[tuple[float, float]]


class _Options(TypedDict, total=False):
    """Keyword arguments of every constructor of a region."""

    image: int
    identity: int | None
    attributes: Mapping[str, Any]


KINDS: dict[str, tuple[int, int | None]] = {
    "point": (1, 1),
    "box": (2, 2),
    "quad": (4, 4),
    "polygon": (3, None),
    "line": (2, None),
    "track": (1, None),
}
"""The kinds of region with the minimum and maximum number of (x, y) points; None for no maximum."""


def _finite(value: object, name: str) -> float:
    """Return `value` as a float, or raise ValueError if it is not a finite real number."""
    if type(value) is float and math.isfinite(value):  # fast path of the common case
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise ValueError(f"`{name}` must be a real number, got {value!r} of type {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:  # an int too large for a float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, got {number}.")
    return number


def _index(value: object, name: str) -> int:
    """Return `value` as an int, or raise ValueError if it is not an integer of at least 0."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral) or value < 0:
        raise ValueError(f"`{name}` must be an integer of at least 0, got {value!r}.")
    return int(value)


def _pair(point: object, index: int) -> tuple[float, float]:
    """Return `point` as two finite floats."""
    if not isinstance(point, tuple) and (isinstance(point, (str, bytes)) or not isinstance(point, Iterable)):
        raise ValueError(f"`points[{index}]` must be an (x, y) pair, got {point!r}.")
    values = tuple(point)
    if len(values) != 2:
        raise ValueError(f"`points[{index}]` must be an (x, y) pair, got {len(values)} values.")
    return _finite(values[0], f"points[{index}][0]"), _finite(values[1], f"points[{index}][1]")


def _checked_points(kind: str, given: object) -> Points:
    """Return the points of a region of this kind as pairs of floats, after checking them."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ValueError(f"`points` must be a sequence of (x, y) pairs, got {given!r}.")
    points = tuple(_pair(point, index) for index, point in enumerate(given))
    least, most = KINDS[kind]
    if len(points) < least or (most is not None and len(points) > most):
        expected = f"{least}" if most == least else f"at least {least}"
        raise ValueError(f"A {kind} has {expected} point(s), got {len(points)}.")
    if kind == "box":
        for axis, name in enumerate("xy"):
            low, high = points[0][axis], points[1][axis]
            if high < low:
                raise ValueError(f"`{name}2` ({high:g}) is less than `{name}1` ({low:g}).")
    return points


def _checked_times(kind: str, given: object, count: int) -> tuple[float, ...]:
    """Return the times of a region with `count` points, after checking them."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ValueError(f"`times` must be a sequence of seconds, got {given!r}.")
    times = tuple(_finite(value, f"times[{index}]") for index, value in enumerate(given))
    if kind != "track" and times:
        raise ValueError(f"`times` must be empty unless the kind is track, got {len(times)} with a {kind}.")
    if kind == "track" and len(times) != count:
        raise ValueError(f"`times` must have one time per point, got {len(times)} for {count} point(s).")
    for index in range(1, len(times)):
        if times[index] < times[index - 1]:
            raise ValueError(
                f"`times` must not decrease: times[{index}] ({times[index]:g}) follows {times[index - 1]:g}."
            )
    return times


@dataclass(frozen=True)
class Region:
    """A region of an image, with an optional label, in float pixels of the original image (x right, y down).

    A box of zero width or height is allowed, since quantization can turn a thin box into one. Points may be outside
    the image, whose size a region does not have; `encode` has an argument for such regions.

    Args:
        kind: "point"; "box", the (x1, y1) and (x2, y2) corners with x1 <= x2, y1 <= y2; "quad", four corners in any
            order; "polygon", at least three corners, closed; "line", at least two points, open; "track", the
            positions of one object over time.
        points: The (x, y) pairs; `KINDS` has their number.
        label: What the region shows, or None.
        score: A finite confidence, or None.
        image: Index of the region's image, if there are several.
        identity: Number of the object shown, at least 0, or None.
        times: Seconds, for a track only: one per point, not decreasing.
        attributes: What else is known of the region, such as its text or colour: names with JSON values, in order. A
            region that was read from JSON has the further keys of its object, and a value is written again as it was
            read, character for character (0.50 stays 0.50). The mapping cannot be changed; a lookup returns a copy.

    Raises:
        ValueError: If the kind is unknown, the number of points or times is wrong, a coordinate, time or score is not
            a finite real number (bool is not a number), corners or times are out of order, the label is not a str, the
            image or identity is not an integer of at least 0, or an attribute is not a JSON value.
    """

    kind: str
    points: Points
    label: str | None = None
    score: float | None = None
    image: int = 0
    identity: int | None = None
    times: tuple[float, ...] = ()
    attributes: Mapping[str, Any] = NO_ATTRIBUTES

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {sorted(KINDS)}, got {self.kind!r}.")
        points = _checked_points(self.kind, self.points)
        if self.label is not None and not isinstance(self.label, str):
            raise ValueError(f"`label` must be a str or None, got {self.label!r}.")
        object.__setattr__(self, "points", points)
        if self.score is not None:
            object.__setattr__(self, "score", _finite(self.score, "score"))
        object.__setattr__(self, "image", _index(self.image, "image"))
        if self.identity is not None:
            object.__setattr__(self, "identity", _index(self.identity, "identity"))
        object.__setattr__(self, "times", _checked_times(self.kind, self.times, len(points)))
        object.__setattr__(self, "attributes", as_attributes(self.attributes))

    @classmethod
    def _unchecked(
        cls,
        kind: str,
        points: Points,
        label: str | None = None,
        image: int = 0,
        identity: int | None = None,
        times: tuple[float, ...] = (),
        attributes: Attributes = NO_ATTRIBUTES,
    ) -> "Region":
        """Make a region without checking its values, which a decoder has checked."""
        region = object.__new__(cls)
        fields = region.__dict__
        fields["kind"], fields["points"], fields["label"], fields["score"] = kind, points, label, None
        fields["image"], fields["identity"], fields["times"], fields["attributes"] = image, identity, times, attributes
        return region

    @classmethod
    def _unchecked_boxes(cls, places: Iterable[Points], labels: Iterable[str | None]) -> "list[Region]":
        """Make many boxes in one loop, see [`_unchecked`]."""
        new, result = object.__new__, []
        for points, label in zip(places, labels, strict=True):
            region = new(cls)
            fields = region.__dict__
            fields["kind"], fields["points"], fields["label"], fields["score"] = "box", points, label, None
            fields["image"], fields["identity"], fields["times"], fields["attributes"] = 0, None, (), NO_ATTRIBUTES
            result.append(region)
        return result

    @classmethod
    def box(
        cls,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        label: str | None = None,
        score: float | None = None,
        **options: Unpack[_Options],
    ) -> "Region":
        """Make a box from its left, top, right and bottom edges, in pixels."""
        return cls("box", ((x1, y1), (x2, y2)), label, score, **options)

    @classmethod
    def point(
        cls, x: float, y: float, label: str | None = None, score: float | None = None, **options: Unpack[_Options]
    ) -> "Region":
        """Make a point, in pixels."""
        return cls("point", ((x, y),), label, score, **options)

    @classmethod
    def quad(
        cls, points: Pairs, label: str | None = None, score: float | None = None, **options: Unpack[_Options]
    ) -> "Region":
        """Make a quadrangle from its four corners, in pixels, such as a line of slanted text."""
        return cls("quad", tuple(points), label, score, **options)

    @classmethod
    def polygon(
        cls, points: Pairs, label: str | None = None, score: float | None = None, **options: Unpack[_Options]
    ) -> "Region":
        """Make a polygon from its corners, in pixels. The last is connected to the first."""
        return cls("polygon", tuple(points), label, score, **options)

    @classmethod
    def line(
        cls, points: Pairs, label: str | None = None, score: float | None = None, **options: Unpack[_Options]
    ) -> "Region":
        """Make an open polyline from its points, in pixels."""
        return cls("line", tuple(points), label, score, **options)

    @classmethod
    def track(
        cls,
        points: Pairs,
        times: Sequence[float],
        label: str | None = None,
        score: float | None = None,
        **options: Unpack[_Options],
    ) -> "Region":
        """Make a track from points, in pixels, and their times, in seconds."""
        return cls("track", tuple(points), label, score, times=tuple(times), **options)

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        """The bounding box (x1, y1, x2, y2) in pixels; for a point, x1 = x2 and y1 = y2."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)
