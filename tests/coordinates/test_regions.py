"""Regions: values and errors."""

import copy
import dataclasses
import math
import pickle
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from vlparts.coordinates.regions import KINDS, Region


def test_a_box_holds_floats_in_order() -> None:
    box = Region.box(1, np.int64(2), np.float32(3.5), 4, "cat", score=0.5)
    assert box.kind == "box"
    assert box.points == ((1.0, 2.0), (3.5, 4.0))
    assert all(type(value) is float for point in box.points for value in point)
    assert box.xyxy == (1.0, 2.0, 3.5, 4.0)
    assert (box.label, box.score, box.image, box.identity, box.times) == ("cat", 0.5, 0, None, ())


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
        (lambda: Region.box(5, 0, 3, 1), r"^`x2` \(3\) is less than `x1` \(5\)\.$"),
        (lambda: Region.box(0, 5, 1, 3), r"`y2` \(3\) is less than `y1` \(5\)"),
        (lambda: Region.point(math.nan, 0), r"`points\[0\]\[0\]` must be finite, got nan"),
        (lambda: Region.box(0, 0, math.inf, 1), r"`points\[1\]\[0\]` must be finite, got inf"),
        (lambda: Region.point(0, 10**400), r"`points\[0\]\[1\]` must be finite"),
        (lambda: Region.point(True, 0), r"must be a real number, got True of type bool"),
        (lambda: Region.point(np.bool_(True), 0), "must be a real number"),
        (lambda: Region.point("1", 0), "must be a real number, got '1' of type str"),  # type: ignore[arg-type]
        (lambda: Region.point(Decimal(1), 0), "of type Decimal"),  # type: ignore[arg-type]
        (lambda: Region.point(1j, 0), "of type complex"),  # type: ignore[arg-type]
        (lambda: Region("box", ((1.0, 2.0),)), r"A box has 2 point\(s\), got 1"),
        (lambda: Region("point", ((1.0, 2.0, 3.0),)), "got 3 values"),  # type: ignore[arg-type]
        (lambda: Region("point", (1.0, 2.0)), r"`points\[0\]` must be an \(x, y\) pair"),  # type: ignore[arg-type]
        (lambda: Region("point", "ab"), "`points` must be a sequence"),  # type: ignore[arg-type]
        (lambda: Region("blob", ((1.0, 2.0),)), r"`kind` must be one of \['box', 'line', .*\], got 'blob'"),
        (lambda: Region(["box"], ((1.0, 2.0),)), "`kind` must be one of"),  # type: ignore[arg-type]
        (lambda: Region.point(1, 2, label=3), "`label` must be a str or None, got 3"),  # type: ignore[arg-type]
        (lambda: Region.point(1, 2, score=math.nan), "`score` must be finite"),
        (lambda: Region.quad([(0, 0)] * 3), r"A quad has 4 point\(s\), got 3"),
        (lambda: Region.quad([(0, 0)] * 5), r"A quad has 4 point\(s\), got 5"),
        (lambda: Region.polygon([(0, 0)] * 2), r"A polygon has at least 3 point\(s\), got 2"),
        (lambda: Region.line([(0, 0)]), r"A line has at least 2 point\(s\), got 1"),
        (lambda: Region.track([], []), r"A track has at least 1 point\(s\), got 0"),
        (lambda: Region.track([(0, 0)], []), r"`times` must have one time per point, got 0 for 1 point\(s\)"),
        (lambda: Region.track([(0, 0)], [math.inf]), r"`times\[0\]` must be finite"),
        (lambda: Region.track([(0, 0), (1, 1)], [2, 1.5]), r"`times` must not decrease: times\[1\] \(1.5\) follows 2"),
        (
            lambda: Region("box", ((0, 0), (1, 1)), times=(1.0, 2.0)),
            "`times` must be empty unless the kind is track, got 2 with a box",
        ),
        (lambda: Region("point", ((0, 0),), times=1.0), "`times` must be a sequence"),  # type: ignore[arg-type]
        (lambda: Region.point(1, 2, image=-1), "`image` must be an integer of at least 0, got -1"),
        (lambda: Region.point(1, 2, image=True), "`image` must be an integer of at least 0, got True"),
        (lambda: Region.point(1, 2, identity=1.5), "`identity` must be an integer"),  # type: ignore[arg-type]
    ],
)
def test_bad_regions_raise(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


CORNERS = [(1, 2), (5, 0), (6, 4), (2, 7)]


@pytest.mark.parametrize("kind", ["quad", "polygon", "line"])
def test_many_points(kind: str) -> None:
    region = getattr(Region, kind)(CORNERS, "sign", 0.25, image=np.int64(2), identity=7)
    assert region == Region(kind, tuple(CORNERS), "sign", 0.25, 2, 7)
    assert region.xyxy == (1.0, 0.0, 6.0, 7.0)
    assert type(region.image) is int


def test_a_track_has_times_that_may_stand_still() -> None:
    track = Region.track(CORNERS[:3], [0, 0.5, 0.5], identity=3)
    assert track.times == (0.0, 0.5, 0.5)
    assert track.points == ((1.0, 2.0), (5.0, 0.0), (6.0, 4.0))
    assert track.identity == 3


def test_every_kind_has_a_constructor() -> None:
    assert all(hasattr(Region, kind) for kind in KINDS)


def test_an_unchecked_region_is_the_same() -> None:
    made = Region._unchecked("track", ((1.0, 2.0),), "x", 1, 2, (3.0,))
    assert made == Region.track([(1, 2)], [3], "x", image=1, identity=2)
    assert hash(made) == hash(Region.track([(1, 2)], [3], "x", image=1, identity=2))
    assert repr(made).startswith("Region(kind='track'")


def test_attributes_are_immutable_json_values() -> None:
    given = {"text": "caf\u00e9", "colour": [255, 0, 0], "mask": {"a": None}, "n": 10**30}
    region = Region.box(1, 2, 3, 4, "a", attributes=given)
    given["text"] = "changed"
    region.attributes["colour"].append(7)
    assert region.attributes == {"text": "caf\u00e9", "colour": [255, 0, 0], "mask": {"a": None}, "n": 10**30}
    assert list(region.attributes) == ["text", "colour", "mask", "n"]
    with pytest.raises(TypeError, match="does not support item assignment"):
        region.attributes["text"] = "b"  # type: ignore[index]
    assert Region.box(1, 2, 3, 4).attributes == {}
    for copied in (
        pickle.loads(pickle.dumps(region)),  # noqa: S301
        copy.deepcopy(region),
        dataclasses.replace(region),
    ):
        assert copied == region
        assert hash(copied) == hash(region)
    assert Region.box(1, 2, 3, 4, "a") != region
    assert Region.point(0, 0, attributes={"a": 1}) == Region.point(0, 0, attributes={"a": 1.0})
    assert hash(Region.point(0, 0, attributes={"a": 1})) == hash(Region.point(0, 0, attributes={"a": 1.0}))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (["a"], r"^`attributes` must be a mapping of str to JSON values, got \['a'\]\.$"),
        ({1: 2}, r"^The keys of `attributes` must be str, got 1\.$"),
        (
            {"a": (1, 2)},
            r"^`attributes\['a'\]` must be a JSON value, got \(1, 2\), which would be read back as \[1, 2\]",
        ),
        ({"a": {1: 2}}, r"^`attributes\['a'\]` must be a JSON value, got \{1: 2\}, which would be read back as"),
        ({"a": math.nan}, r"^`attributes\['a'\]` must be a JSON value, got nan: "),
        ({"a": [object]}, r"^`attributes\['a'\]` must be a JSON value, got "),
        ({"a": "\ud800"}, r"^`attributes\['a'\]` must be a JSON value, got "),
        ({"\ud800": 1}, r"^`attributes\['\\ud800'\]` must be a JSON value, got 1: "),
    ],
)
def test_attributes_that_are_not_json_raise(attributes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Region.point(0, 0, attributes=attributes)
