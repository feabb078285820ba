"""How coordinates become codes: formats as data, and the one formula that writes and reads them."""

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import SupportsIndex, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["FORMATS", "JOIN", "PADDED", "CoordinateFormat", "dequantize", "get_format", "quantize"]

JOIN = ","
"""Text between the pairs of one region."""


def _integer(value: object, name: str) -> int:
    """Return `value` as an int, or raise ValueError naming it."""
    if not isinstance(value, SupportsIndex) or isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return operator.index(value)


@dataclass(frozen=True)
class CoordinateFormat:
    """How regions are written as text, as data.

    The rule, for a value `v` on a side of `s` pixels: rounding "round" writes `floor(v * denominator / s +
    1/2)` and reads `code * s / denominator`; rounding "floor" writes `floor(v * denominator / s)` and reads
    the middle of that bin, `(code + 1/2) * s / denominator`. A code above `levels - 1`, which only a value
    near the far edge can give and only where the denominator reaches `levels`, is written as `levels - 1`: it
    is part of such a format's rule.

    openPangu-VL publishes that its numbers are relative, 000 to 999, zero-padded; its tokenizer shows the
    pair `(ddd,ddd)`. Not published, and therefore parameters here: whether 999 stands for the far edge
    (denominator 999, the default) or for the last of a thousand bins (`denominator=1000, rounding="floor"`),
    how a label is written, and what stands between regions.

    Args:
        name: Name of the format.
        levels: Number of codes; they run from 0 to `levels - 1`.
        digits: Digits of a code, zero-padded.
        denominator: The number that stands for the full side of the image.
        rounding: "round" (half up) or "floor" (bins, read at their middle).
        label_open: Text before a label.
        label_close: Text between a label and its coordinates.
        separator: Text between two regions.

    Raises:
        ValueError: For a value outside its range, or a piece of text that would make reading ambiguous.
    """

    name: str = "custom"
    levels: int = 1000
    digits: int = 3
    denominator: int = 999
    rounding: str = "round"
    label_open: str = ""
    label_close: str = " "
    separator: str = "\n"

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_pieces()

    def _check_numbers(self) -> None:
        for field in ("levels", "digits", "denominator"):
            object.__setattr__(self, field, _integer(getattr(self, field), field))
        if not 1 <= self.digits <= 9:
            raise ValueError(f"digits must lie in 1..9, got {self.digits}")
        if not 2 <= self.levels <= 10**self.digits:
            raise ValueError(f"levels must lie in 2..{10**self.digits} for {self.digits} digits, got {self.levels}")
        if self.rounding not in ("round", "floor"):
            raise ValueError(f"rounding must be 'round' or 'floor', got {self.rounding!r}")
        # With a smaller denominator a code could stand for a place outside the image.
        least = self.levels - 1 if self.rounding == "round" else self.levels
        if self.denominator < least:
            raise ValueError(
                f"denominator must be at least {least} for {self.levels} levels and rounding "
                f"{self.rounding!r}, got {self.denominator}"
            )

    def _check_pieces(self) -> None:
        for field in ("name", "label_open", "label_close", "separator"):
            piece = getattr(self, field)
            if not isinstance(piece, str) or re.search(r"[()\uff08\uff09]", piece):
                raise ValueError(f"{field} must be a str without parentheses, got {piece!r}")
        if self.separator in ("", JOIN):
            raise ValueError(f"separator must not be empty nor {JOIN!r}, which joins a box; got {self.separator!r}")
        for field in ("label_open", "label_close"):
            if self.separator in getattr(self, field):
                raise ValueError(f"separator {self.separator!r} must not occur in {field} {getattr(self, field)!r}")


PADDED = CoordinateFormat(name="openpangu")
"""Three digits, zero-padded, 999 at the far edge: the default."""

FORMATS: Mapping[str, CoordinateFormat] = MappingProxyType({PADDED.name: PADDED})
"""The formats by name."""


def get_format(format: CoordinateFormat | str | None) -> CoordinateFormat:
    """Return a format from itself, from its name in `FORMATS`, or the default for None.

    Raises:
        ValueError: For an unknown name or another type.
    """
    if format is None:
        return PADDED
    if isinstance(format, str) and format in FORMATS:
        return FORMATS[format]
    # By attribute, not by class: a checkpoint may carry its own copy of this file.
    if hasattr(format, "label_open"):
        return cast(CoordinateFormat, format)
    raise ValueError(f"format must be a CoordinateFormat or one of {sorted(FORMATS)}, got {format!r}")


def _check_size(size: ArrayLike) -> NDArray[np.float64]:
    """Return `size` as float64, after checking that it holds positive integers."""
    sides = np.asarray(size)
    if sides.dtype.kind not in "iu" or (sides < 1).any():
        raise ValueError(f"size must hold positive integers (pixels), got {size!r}")
    return sides.astype(np.float64)


def quantize(values: ArrayLike, size: ArrayLike, format: CoordinateFormat | str | None = None) -> NDArray[np.int64]:
    """Turn pixel coordinates into codes by the format's rule (see `CoordinateFormat`).

    Args:
        values: Real numbers in [0, size], any shape, in pixels. Never written to.
        size: Side of the image in pixels, a positive integer, or an array of them that broadcasts against
            `values`: for `(..., 2)` points pass `(width, height)`.
        format: A format or its name; `PADDED` where None.

    Returns:
        int64 codes in [0, levels - 1], of the broadcast shape. The order of values is kept.

    Raises:
        ValueError: If a value is not a finite real number in [0, size], or a size is not a positive integer.
    """
    fmt, sides = get_format(format), _check_size(size)
    given = np.asarray(values)
    if given.size and given.dtype.kind not in "iuf":
        raise ValueError(f"values must be real numbers, got dtype {given.dtype}")
    pixels = given.astype(np.float64)
    inside = (pixels >= 0) & (pixels <= sides)  # false for NaN
    if not inside.all():
        bad = np.broadcast_to(pixels, inside.shape)[~inside][0]
        raise ValueError(f"values must lie in [0, size], got {bad} for size {size!r}")
    scaled = pixels * fmt.denominator / sides
    codes = np.floor(scaled + 0.5 if fmt.rounding == "round" else scaled)
    return np.minimum(codes, fmt.levels - 1).astype(np.int64)


def dequantize(codes: ArrayLike, size: ArrayLike, format: CoordinateFormat | str | None = None) -> NDArray[np.float64]:
    """Turn codes into pixel coordinates by the format's rule (see `CoordinateFormat`).

    Args:
        codes: Integers in [0, levels - 1], any shape. Never written to.
        size: Side of the image in pixels, as for `quantize`.
        format: A format or its name; `PADDED` where None.

    Returns:
        float64 pixels in [0, size], of the broadcast shape. `quantize` turns them into the same codes again.

    Raises:
        ValueError: If a code is not an integer in [0, levels - 1], or a size is not a positive integer.
    """
    fmt, sides = get_format(format), _check_size(size)
    given = np.asarray(codes)
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers, got dtype {given.dtype}")
    if ((given < 0) | (given >= fmt.levels)).any():
        raise ValueError(f"codes must lie in [0, {fmt.levels - 1}], got {given.min()}..{given.max()}")
    middle = 0.0 if fmt.rounding == "round" else 0.5
    return (given.astype(np.float64) + middle) * sides / fmt.denominator
