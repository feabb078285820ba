"""Frames: exact inverses and composition; clipping of points."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.frames.maps import Frame, clip_points
from vlparts.coordinates.frames.rules import PaddedSquare

sides = st.integers(1, 100_000)
sizes = st.tuples(sides, sides)
small = st.integers(1, 2000)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    image = draw(sizes)
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return Frame.original(image)
    if kind == 1:
        return Frame.resized(image, draw(sizes))
    if kind == 2:
        return Frame.padded_square(image, draw(st.sampled_from(["centre", "corner"])), draw(st.none() | sides))
    if kind == 3:
        grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
        index = draw(st.integers(0, grid[0] * grid[1] - 1))
        return Frame.tile(image, grid, index, draw(st.tuples(small, small)))
    x1, y1 = draw(st.integers(-100, 1000)), draw(st.integers(-100, 1000))
    return Frame.cropped(image, (x1, y1, x1 + draw(small), y1 + draw(small)))


fractions = st.fractions(-100_000, 100_000, max_denominator=1000)


@given(frames(), fractions, fractions)
def test_frames_invert_exactly(frame: Frame, x: Fraction, y: Fraction) -> None:
    assert frame.to_image_exact(frame.to_frame_exact((x, y))) == (x, y)
    assert frame.to_frame_exact(frame.to_image_exact((x, y))) == (x, y)


@given(frames(), st.data())
def test_arrays_are_near_the_exact_map_and_invert(frame: Frame, data: st.DataObject) -> None:
    width, height = frame.image_size
    point = st.tuples(st.floats(0, width), st.floats(0, height))
    points = data.draw(st.lists(point, min_size=1, max_size=5))
    got = frame.to_frame(points)
    # Relative to the largest number on the way: what a window far from the origin takes away is lost before.
    reach = max(width, height, *frame.size, *(abs(float(v)) for v in frame.offset))
    for (x, y), mapped in zip(points, got.tolist(), strict=True):
        exact = frame.to_frame_exact((Fraction(x), Fraction(y)))
        assert mapped == pytest.approx([float(exact[0]), float(exact[1])], rel=1e-12, abs=1e-12 * reach)
    shrink = max(1.0, *(1 / float(scale) for scale in frame.scale))
    assert frame.to_image(got) == pytest.approx(np.array(points), rel=1e-9, abs=1e-12 * reach * shrink)


@given(sizes, sizes, st.data())
def test_whole_pixels_map_to_the_nearest_float(image: tuple[int, int], size: tuple[int, int], data: Any) -> None:
    frame = Frame.resized(image, size)
    x, y = data.draw(st.integers(0, image[0])), data.draw(st.integers(0, image[1]))
    exact = frame.to_frame_exact((Fraction(x), Fraction(y)))
    assert frame.to_frame([[x, y]]).tolist() == [[float(exact[0]), float(exact[1])]]
    assert frame.to_frame([[image[0], image[1]]]).tolist() == [list(map(float, size))]


@given(frames(), sizes, fractions)
def test_joined_frames_map_as_one_after_the_other(frame: Frame, size: tuple[int, int], x: Fraction) -> None:
    second = Frame.resized(frame.size, size)
    both = frame.then(second)
    assert (both.image_size, both.size) == (frame.image_size, size)
    assert both.to_frame_exact((x, x + 1)) == second.to_frame_exact(frame.to_frame_exact((x, x + 1)))


def test_many_joined_frames_stay_exact_and_finite() -> None:
    frame = Frame.resized((99_991, 99_989), (99_971, 99_961))
    for _ in range(99):
        frame = frame.then(Frame.resized((99_971, 99_961), (99_991, 99_989)))
        frame = frame.then(Frame.resized((99_991, 99_989), (99_971, 99_961)))
    assert frame.scale == (Fraction(99_971, 99_991), Fraction(99_961, 99_989))
    odd = Frame((7, 7), (7, 7), (Fraction(10**400 + 1, 10**400), Fraction(1)), (Fraction(1, 3), Fraction(0)))
    assert odd.to_frame([[3, 3]]).tolist() == [[3 + 1 / 3, 3.0]]


def test_boxes_map_as_their_corners() -> None:
    frame = PaddedSquare(side=336)((640, 480))
    boxes = np.array([[0, 0, 640, 480], [12.5, 7, 300, 301]])
    corners = frame.to_frame(boxes.reshape(-1, 2)).reshape(-1, 4)
    assert (frame.to_frame(boxes) == corners).all()
    assert frame.to_frame(boxes)[0].tolist() == [0.0, 42.0, 336.0, 294.0]
    assert frame.to_image(frame.to_frame(boxes)).tolist() == boxes.tolist()
    assert frame.to_frame([]).shape == (0, 2)
    assert frame.to_frame(np.zeros((0, 4))).shape == (0, 4)


def test_an_original_is_copied() -> None:
    frame, points = Frame.original((5, 5)), np.array([[1.0, 2.0]])
    assert frame.is_original
    assert not Frame.resized((5, 5), (5, 6)).is_original
    assert not Frame.cropped((5, 5), (1, 0, 6, 5)).is_original
    for mapped in (frame.to_frame(points), frame.to_image(points)):
        mapped += 1
    assert points.tolist() == [[1, 2]]


def test_the_padding_of_a_square_is_halved_downwards() -> None:
    frame = Frame.padded_square((5, 10))
    assert (frame.size, frame.offset) == ((10, 10), (2, 0))
    assert Frame.padded_square((10, 5)).offset == (0, 2)
    assert Frame.padded_square((10, 5), "corner").offset == (0, 0)


def test_a_tile_shows_its_part() -> None:
    frame = Frame.tile((300, 100), (3, 2), 4, (448, 448))  # second row, second column
    assert frame.size == (448, 448)
    assert frame.to_frame([[100, 50, 200, 100]]).tolist() == [[0.0, 0.0, 448.0, 448.0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Frame.original((0, 5)),
            r"`image_size` must be \(width, height\), two positive integers, got \(0, 5\)",
        ),
        (lambda: Frame.original((True, 5)), "two positive integers"),
        (lambda: Frame.original((2.0, 5)), "two positive integers"),  # type: ignore[arg-type]
        (lambda: Frame.original("ab"), "two positive integers, got 'ab'"),  # type: ignore[arg-type]
        (lambda: Frame.resized((2, 5), (3,)), "^`size` must be"),  # type: ignore[arg-type]
        (lambda: Frame((2, 5), (2, 5), (1.5, 1)), "`scale` must be two fractions"),  # type: ignore[arg-type]
        (lambda: Frame((2, 5), (2, 5), (Fraction(0), Fraction(1))), "`scale` must be above 0"),
        (lambda: Frame((2, 5), (2, 5), offset=(Fraction(1),)), "`offset` must be two"),  # type: ignore[arg-type]
        (lambda: Frame.padded_square((2, 5), "middle"), "`offset` must be one of .* got 'middle'"),
        (lambda: Frame.padded_square((2, 5), side=0), "^`size` must be"),
        (lambda: Frame.cropped((2, 5), (1, 1, 1, 2)), "x1 < x2 and y1 < y2"),
        (lambda: Frame.cropped((2, 5), (1, 1.5, 1, 2)), "four integers"),  # type: ignore[arg-type]
        (lambda: Frame.tile((2, 5), (2, 2), 4, (8, 8)), r"`index` must be in 0\.\.3, got 4"),
        (lambda: Frame.tile((2, 5), (2, 0), 0, (8, 8)), "`grid` must be"),
        (lambda: Frame.original((2, 5)).then(Frame.original((5, 2))), r"of size \(2, 5\), got \(5, 2\)"),
        (lambda: Frame.original((2, 5)).to_frame([[1, math.inf]]), r"`points\[0\]` must be finite"),
        (lambda: Frame.original((2, 5)).to_image([[1, 2, 3]]), r"got shape \(1, 3\)"),
    ],
)
def test_invalid_arguments_raise(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


POINTS = np.array([[0.0, 0.0], [10.0, 5.0], [-0.5, 3.0], [11.0, 6.0]])


def test_clamping_moves_points_to_the_edge() -> None:
    clamped, kept = clip_points(POINTS, (10, 5), "clamp")
    assert clamped.tolist() == [[0, 0], [10, 5], [0, 3], [10, 5]]
    assert kept.all()
    assert POINTS[2, 0] == -0.5


def test_skipping_leaves_rows_out() -> None:
    left, kept = clip_points(POINTS, (10, 5), "skip")
    assert left.tolist() == [[0, 0], [10, 5]]
    assert kept.tolist() == [True, True, False, False]
    boxes, kept = clip_points([[0, 0, 10, 5], [0, 0, 10, 5.5]], (10, 5), "skip")
    assert (boxes.shape, kept.tolist()) == ((1, 4), [True, False])


def test_points_outside_are_named() -> None:
    with pytest.raises(ValueError, match=r"`points\[2\]` \[-0.5, 3.0\] leaves the image of size \(10, 5\)"):
        clip_points(POINTS, (10, 5), "raise")
    assert clip_points(POINTS[:2], (10, 5))[0].tolist() == POINTS[:2].tolist()
    with pytest.raises(ValueError, match="`policy` must be one of 'raise', 'clamp', 'skip', got 'drop'"):
        clip_points(POINTS, (10, 5), "drop")
