"""Frames: exact maps between pixels of an original image and pixels of the image that a model receives.

A map consists of fractions, so that composing and inverting maps is exact.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..validation import check_choice, check_coordinates, check_size

__all__ = ["Frame", "clip_points"]

Size = tuple[int, int]
Pair = tuple[Fraction, Fraction]

EXACT = 2**53  # integers up to this are exact in float64
OFFSETS = ("centre", "corner")
POLICIES = ("raise", "clamp", "skip")


@dataclass(frozen=True)
class Frame:
    """The image that a model receives, as an affine map of the original image.

    A point x of the original is at `x * scale + offset` in the frame, on each axis.

    Args:
        image_size: (width, height) of the original image in pixels.
        size: (width, height) of the frame in pixels.
        scale: Scales of x and y, above 0.
        offset: Offsets of x and y, in pixels of the frame.

    Raises:
        ValueError: If a size is not two positive integers, a scale is not above 0, or a scale or offset is not a pair
            of fractions (or integers).
    """

    image_size: Size
    size: Size
    scale: Pair = (Fraction(1), Fraction(1))
    offset: Pair = (Fraction(0), Fraction(0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", check_size(self.image_size))
        object.__setattr__(self, "size", check_size(self.size, "size"))
        for name in ("scale", "offset"):
            given = getattr(self, name)
            if len(given) != 2 or any(type(value) not in (int, Fraction) for value in given):
                raise ValueError(f"`{name}` must be two fractions, got {given!r}.")
            object.__setattr__(self, name, (Fraction(given[0]), Fraction(given[1])))
        if min(self.scale) <= 0:
            raise ValueError(f"`scale` must be above 0, got {self.scale}.")

    @classmethod
    def original(cls, size: Size) -> "Frame":
        """Return the frame of the unchanged image."""
        return cls(size, size)

    @classmethod
    def resized(cls, image_size: Size, size: Size) -> "Frame":
        """Return the frame of the image resized to `size`, edges mapped to edges; the aspect ratio may change."""
        (width, height), (new_width, new_height) = check_size(image_size), check_size(size, "size")
        return cls(image_size, size, (Fraction(new_width, width), Fraction(new_height, height)))

    @classmethod
    def cropped(cls, image_size: Size, box: tuple[int, int, int, int]) -> "Frame":
        """Return the frame of the window x1, y1, x2, y2, in whole pixels. It may extend beyond the edges (padding)."""
        if len(box) != 4 or any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) for v in box):
            raise ValueError(f"`box` must be four integers x1, y1, x2, y2, got {box!r}.")
        x1, y1, x2, y2 = (int(value) for value in box)
        if x2 <= x1 or y2 <= y1:
            raise ValueError(f"`box` must have x1 < x2 and y1 < y2, got {box!r}.")
        return cls(image_size, (x2 - x1, y2 - y1), offset=(Fraction(-x1), Fraction(-y1)))

    @classmethod
    def padded_square(cls, image_size: Size, offset: str = "centre", side: int | None = None) -> "Frame":
        """Return the frame of the image padded to a square of its longer side, then resized.

        Args:
            image_size: (width, height) of the original image in pixels.
            offset: "centre": half of the padding, rounded down, is left or above (as in Shikra and LLaVA); "corner":
                all of it is right or below.
            side: Side in pixels that the square is resized to; None for no resize.

        Raises:
            ValueError: If a size, side or offset is invalid.
        """
        width, height = check_size(image_size)
        check_choice(offset, "offset", OFFSETS)
        long = max(width, height)
        left, top = ((long - width) // 2, (long - height) // 2) if offset == "centre" else (0, 0)
        square = cls((width, height), (long, long), offset=(Fraction(left), Fraction(top)))
        return square if side is None else square.then(cls.resized((long, long), (side, side)))

    @classmethod
    def tile(cls, image_size: Size, grid: Size, index: int, tile: Size) -> "Frame":
        """Return the frame of one tile of the image resized to a grid of tiles.

        Args:
            image_size: (width, height) of the original image in pixels.
            grid: Columns and rows.
            index: Index of the tile, row by row.
            tile: (width, height) of a tile in pixels.

        Raises:
            ValueError: If a size or the grid is invalid, or the index is outside the grid.
        """
        (columns, rows), (width, height) = check_size(grid, "grid"), check_size(tile, "tile")
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < columns * rows:
            raise ValueError(f"`index` must be in 0..{columns * rows - 1}, got {index!r}.")
        row, column = divmod(int(index), columns)
        whole = (columns * width, rows * height)
        window = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        return cls.resized(image_size, whole).then(cls.cropped(whole, window))

    def then(self, other: "Frame") -> "Frame":
        """Return the composition: `other` applied to the image of this frame.

        Raises:
            ValueError: If the other's `image_size` is not this frame's `size`.
        """
        if other.image_size != self.size:
            raise ValueError(f"`other` must be a frame of an image of size {self.size}, got {other.image_size}.")
        scale = (self.scale[0] * other.scale[0], self.scale[1] * other.scale[1])
        offset = tuple(self.offset[axis] * other.scale[axis] + other.offset[axis] for axis in (0, 1))
        return Frame(self.image_size, other.size, scale, (offset[0], offset[1]))

    @property
    def is_original(self) -> bool:
        """Whether this is the unchanged image: the same size, scale 1 and offset 0."""
        return self.size == self.image_size and all(scale == 1 for scale in self.scale) and not any(self.offset)

    @cached_property
    def _integers(self) -> NDArray[np.float64]:
        """Rows (p, r, q) for x and y with `x * scale + offset = (x * p + r) / q`; integers if exact in float64.

        For whole pixels, the product and sum are then exact, and only the division rounds.
        """
        rows = []
        for scale, offset in zip(self.scale, self.offset, strict=True):
            q = math.lcm(scale.denominator, offset.denominator)
            whole = (int(scale * q), int(offset * q), q)
            fits = max(map(abs, whole)) <= EXACT
            rows.append(whole if fits else (float(scale), float(offset), 1.0))
        return np.array(rows, dtype=np.float64)

    def to_frame(self, points: ArrayLike) -> NDArray[np.float64]:
        """Map points of the original image into the frame.

        Args:
            points: `(n, 2)` points or `(n, 4)` boxes, in pixels of the original. Never modified.

        Returns:
            float64 of the same shape, in pixels of the frame. Within a few units in the last place of the exact value;
            for whole pixels, the nearest float64.

        Raises:
            ValueError: If `points` is not such an array, or a value is not finite.
        """
        array = check_coordinates(points, "points")
        if self.is_original:
            return array
        p, r, q = np.tile(self._integers, (array.shape[1] // 2, 1)).T
        mapped: NDArray[np.float64] = (array * p + r) / q
        return mapped

    def to_image(self, points: ArrayLike) -> NDArray[np.float64]:
        """Map points of the frame into the original image; the inverse of `to_frame`."""
        array = check_coordinates(points, "points")
        if self.is_original:
            return array
        p, r, q = np.tile(self._integers, (array.shape[1] // 2, 1)).T
        mapped: NDArray[np.float64] = (array * q - r) / p
        return mapped

    def to_frame_exact(self, point: Pair) -> Pair:
        """Map one point of the original into the frame, as fractions, without rounding."""
        x, y = (Fraction(value) * self.scale[axis] + self.offset[axis] for axis, value in enumerate(point))
        return x, y

    def to_image_exact(self, point: Pair) -> Pair:
        """Map one point of the frame into the original, as fractions, without rounding."""
        x, y = ((Fraction(value) - self.offset[axis]) / self.scale[axis] for axis, value in enumerate(point))
        return x, y


def clip_points(points: ArrayLike, size: Size, policy: str = "raise") -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Clip points to an image, or omit those outside.

    Args:
        points: `(n, 2)` points or `(n, 4)` boxes, in pixels. Never modified.
        size: (width, height) of the image; [0, width] x [0, height] is inside, with the edges.
        policy: What to do with a row outside: "raise"; "clamp" moves its coordinates to the nearest edge (a box
            entirely outside becomes one of zero area); "skip" omits the row.

    Returns:
        The remaining rows, float64 `(m, 2)` or `(m, 4)`, and a mask of the given rows, bool `(n,)`.

    Raises:
        ValueError: If the policy is unknown, `points` is not such an array, or, under "raise", a row is outside.
    """
    check_choice(policy, "policy", POLICIES)
    array = check_coordinates(points, "points")
    edges = np.tile(np.array(check_size(size, "size"), dtype=np.float64), array.shape[1] // 2)
    inside = np.all((array >= 0) & (array <= edges), axis=1)
    if policy == "clamp":
        return np.clip(array, 0.0, edges), np.ones(len(array), dtype=np.bool_)
    if policy == "raise" and not inside.all():
        row = int(np.argmin(inside))
        raise ValueError(f"`points[{row}]` {array[row].tolist()} leaves the image of size {tuple(size)}.")
    return array[inside], inside
