"""Quantization: from coordinates in pixels to integer codes and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .validation import integer

__all__ = ["NumberRule", "Numbers"]

ROUNDINGS = ("round", "floor", "bins")
# In codes: a value below a code by no more than this counts as the code. Pixels that were read from a code are rounded
# to float64, possibly down; without the tolerance, "floor" would decrease the code with each pass.
TOLERANCE = 1e-6
Points = Sequence[Sequence[tuple[float, float]]]


class Numbers(Protocol):
    """Converts between the points of regions in a frame and the codes of a format."""

    def to_codes(self, points: NDArray[np.float64], counts: Sequence[int], size: tuple[int, int]) -> list[list[int]]:
        """Return the codes of regions with `counts` points each, of `points` `(sum(counts), 2)` in a frame."""

    def to_points(self, codes: Sequence[Sequence[int]], size: tuple[int, int]) -> Points:
        """Return the points of regions with these codes.

        Raises:
            ValueError: If a code is out of range; names the code and the range.
        """

    def error_bound(self, size: tuple[int, int]) -> tuple[float, float]:
        """Return the maximum error of x and y, in pixels, when a point inside the frame is written and read."""


@dataclass(frozen=True, kw_only=True)
class NumberRule:
    """Linear quantization, the rule of nearly all formats.

    A value `v` on a side of `s` pixels is scaled to `u = v * D / s`, where D is `denominator`, or `s / step` for
    formats that count pixels of the frame (`denominator=None`). Rounding "round" writes `floor(u + 1/2)` and reads
    `code * s / D`; "floor" writes `floor(u)` and reads `code * s / D`; "bins" writes `floor(u)` and reads the middle
    of that bin, `(code + 1/2) * s / D`. A result above the largest code, which only a value near the far edge has, is
    written as the largest code.

    Args:
        denominator: The number of the full side; None if codes count pixels.
        levels: Codes run from 0 to `levels - 1`; None, with pixels only, for the pixels of the frame.
        rounding: "round" (half up), "floor" or "bins".
        step: Pixels of the frame per code; with `denominator=None` only.
        far_edge: With pixels only: whether the far edge has its own code (s), or the largest code is that of the last
            pixel (s - 1).
        most: Largest code that is accepted when reading; at least `levels - 1`, the default. For models that also
            write 1000 where 999 is the largest code. Such a code reads as the far edge at most.

    Raises:
        ValueError: If a value is outside its range, or two values exclude each other.
    """

    denominator: int | None = 999
    levels: int | None = 1000
    rounding: str = "round"
    step: int = 1
    far_edge: bool = True
    most: int | None = None

    def __post_init__(self) -> None:
        for name in ("denominator", "levels", "step", "most"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, integer(getattr(self, name), name))
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"`rounding` must be 'round', 'floor' or 'bins', got {self.rounding!r}.")
        if self.step < 1:
            raise ValueError(f"`step` must be at least 1, got {self.step}.")
        if self.denominator is None:
            self._check_pixels()
        else:
            self._check_relative(self.denominator)

    def _check_pixels(self) -> None:
        if self.levels is not None or self.most is not None:
            raise ValueError(
                f"`levels` and `most` must be None if `denominator` is None, got {self.levels} and {self.most}."
            )
        if self.rounding == "bins":
            raise ValueError("`rounding` must be 'round' or 'floor' if `denominator` is None, got 'bins'.")

    def _check_relative(self, denominator: int) -> None:
        if self.levels is None or self.levels < 2:
            raise ValueError(f"`levels` must be at least 2 if `denominator` is given, got {self.levels}.")
        if self.step != 1 or not self.far_edge:
            raise ValueError(
                f"`step` and `far_edge` need `denominator=None`, got step={self.step}, far_edge={self.far_edge}."
            )
        # With a smaller denominator, a code could mean a point outside the image.
        least = self.levels if self.rounding == "bins" else self.levels - 1
        if denominator < least:
            raise ValueError(
                f"`denominator` must be at least {least} for {self.levels} levels and rounding "
                f"{self.rounding!r}, got {denominator}."
            )
        if self.most is not None and self.most < self.levels - 1:
            raise ValueError(f"`most` must be at least levels - 1 = {self.levels - 1}, got {self.most}.")

    def last(self, side: int) -> int:
        """Return the largest code that is written for a side of this many pixels."""
        if self.levels is not None:
            return self.levels - 1
        return (side if self.far_edge else side - 1) // self.step

    def largest(self, side: int) -> int:
        """Return the largest code that is accepted when reading, for a side of this many pixels."""
        return self.last(side) if self.most is None else self.most

    def quantize(self, pixels: NDArray[np.float64], sides: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the codes of values in [0, side], of the broadcast shape of both. The values are not checked."""
        last: NDArray[np.float64] | np.float64
        if self.denominator is None:
            scaled = pixels / self.step
            last = (sides if self.far_edge else sides - 1) // self.step
        else:
            scaled = pixels * self.denominator / sides
            last = np.float64(self.last(1))
        codes = np.floor(scaled + (0.5 if self.rounding == "round" else TOLERANCE))
        result: NDArray[np.int64] = np.minimum(codes, last).astype(np.int64)
        return result

    def dequantize(self, codes: NDArray[np.int64], sides: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the pixels of codes, of the broadcast shape of both. The codes are not checked."""
        values = codes.astype(np.float64)
        if self.denominator is None:
            return values * self.step
        if self.rounding == "bins":
            values += 0.5
        values = values * sides / self.denominator
        return values if self.most is None else np.minimum(values, sides)

    def to_codes(self, points: NDArray[np.float64], counts: Sequence[int], size: tuple[int, int]) -> list[list[int]]:
        """See [`Numbers`]: two codes per point."""
        flat = self.quantize(points, np.asarray(size, dtype=np.float64)).ravel().tolist()
        result, start = [], 0
        for count in counts:
            end = start + 2 * count
            result.append(flat[start:end])
            start = end
        return result

    def to_points(self, codes: Sequence[Sequence[int]], size: tuple[int, int]) -> Points:
        """See [`Numbers`]."""
        counts = [len(item) for item in codes]
        flat = np.fromiter(chain.from_iterable(codes), dtype=np.int64, count=sum(counts)).reshape(-1, 2)
        most = (self.largest(size[0]), self.largest(size[1]))
        if len(flat) and (flat > most).any():
            axis = 0 if (flat[:, 0] > most[0]).any() else 1
            raise ValueError(f"Code {int(flat[:, axis].max())} is above the largest code {most[axis]}.")
        xs, ys = self.dequantize(flat, np.asarray(size, dtype=np.float64)).T.tolist()
        points = list(zip(xs, ys, strict=True))
        if not counts or (counts[0] == 4 and counts.count(4) == len(counts)):  # only boxes, the common case
            return list(zip(points[::2], points[1::2], strict=True))
        result, start = [], 0
        for count in counts:
            end = start + count // 2
            result.append(points[start:end])
            start = end
        return result

    def error_bound(self, size: tuple[int, int]) -> tuple[float, float]:
        """See [`Numbers`]."""
        return self._bound(size[0]), self._bound(size[1])

    def _bound(self, side: int) -> float:
        unit = self.step if self.denominator is None else side / self.denominator
        within = unit if self.rounding == "floor" else unit / 2
        at_edge = side - (self.last(side) + (0.5 if self.rounding == "bins" else 0.0)) * unit
        return max(within, at_edge)
