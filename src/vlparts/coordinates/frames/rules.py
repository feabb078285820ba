"""How families of models make their input from an image: rules that give the frame of an image of any size.

A rule is data: it can be compared, printed and hashed. Calling it with the size of an image gives its frame.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from ..checks import check_size
from .maps import Frame, clip_points

__all__ = [
    "FitWithin",
    "Frame",
    "FrameRule",
    "Original",
    "PaddedSquare",
    "Resized",
    "SmartResize",
    "check_size",
    "clip_points",
]

Size = tuple[int, int]


class FrameRule(Protocol):
    """How a family of models makes its input from an image: its size in, the frame out."""

    def __call__(self, image_size: Size) -> Frame:
        """The frame of an image of this (width, height)."""


class _Rule:
    """A rule that remembers the frames of the latest sizes: many texts are read for images of a few sizes."""

    def __call__(self, image_size: Size) -> Frame:
        """The frame of an image of this (width, height).

        Raises:
            ValueError: If `image_size` is no size, or one that the rule has no frame for.
        """
        if type(image_size) is tuple and tuple(map(type, image_size)) == (int, int):
            return _remembered(self, image_size)
        return self._frame(check_size(image_size))

    def _frame(self, image_size: Size) -> Frame:
        raise NotImplementedError


@lru_cache(maxsize=1024)
def _remembered(rule: _Rule, image_size: Size) -> Frame:
    return rule._frame(image_size)


@dataclass(frozen=True)
class Original(_Rule):
    """The original image; also for numbers relative to it, which no resize changes."""

    def _frame(self, image_size: Size) -> Frame:
        return Frame.original(image_size)


@dataclass(frozen=True)
class Resized(_Rule):
    """Every image resized to one size, whatever its aspect.

    Args:
        size: (width, height) in pixels.
    """

    size: Size

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_size(self.size, "size"))

    def _frame(self, image_size: Size) -> Frame:
        return Frame.resized(image_size, self.size)


@dataclass(frozen=True)
class PaddedSquare(_Rule):
    """Every image padded to a square of its longer side (see [`Frame.padded_square`]).

    Args:
        offset: "centre" or "corner": where the image lies in the square.
        side: The square is then resized to this; None leaves it at the longer side.
    """

    offset: str = "centre"
    side: int | None = None

    def __post_init__(self) -> None:
        Frame.padded_square((1, 1), self.offset, self.side)

    def _frame(self, image_size: Size) -> Frame:
        return Frame.padded_square(image_size, self.offset, self.side)


@dataclass(frozen=True)
class FitWithin(_Rule):
    """Images that are larger than `size` are shrunk to fit into it with their aspect kept; others stay as they are.

    Sides become `int(side * scale)` with `scale = min(width / W, height / H)` in floating point, as in Fuyu's image
    processor.

    Args:
        size: (width, height) that images have to fit into, in pixels.
        padded: The frame is always `size`, with the image in its upper left corner.
    """

    size: Size
    padded: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_size(self.size, "size"))

    def _frame(self, image_size: Size) -> Frame:
        width, height = check_size(image_size)
        scale = min(self.size[0] / width, self.size[1] / height)
        fitted = (width, height) if scale >= 1 else (int(width * scale), int(height * scale))
        if min(fitted) < 1:
            raise ValueError(f"image_size {(width, height)} is too thin: within {self.size} it would be {fitted}")
        frame = Frame.resized((width, height), fitted)
        return Frame(frame.image_size, self.size, frame.scale) if self.padded else frame


@dataclass(frozen=True)
class SmartResize(_Rule):
    """`smart_resize`: sides become multiples of `factor` and their product lies within bounds, the aspect nearly kept.

    Two variants are in use, which differ for thin images. The image processors of transformers round sides to the
    nearest multiple (0 too) and hold them at `factor` or more when they shrink. qwen-vl-utils 0.0.14 holds them when
    it rounds but not when it shrinks; where that leaves a side of 0, no image can be made.

    Args:
        factor: Sides become multiples of this: pixels of a patch times the side of the merged window.
        min_pixels: Images with less than this many pixels are enlarged.
        max_pixels: Images with more than this many pixels are shrunk.
        floor_to_factor: True for transformers' variant, False for that of qwen-vl-utils.
        most_aspect: Images with a larger ratio of sides are refused.

    Raises:
        ValueError: If a number is not positive, or the bounds are the wrong way round.
    """

    factor: int = 28
    min_pixels: int = 56 * 56
    max_pixels: int = 14 * 14 * 4 * 1280
    floor_to_factor: bool = True
    most_aspect: int = 200

    def __post_init__(self) -> None:
        for name in ("factor", "min_pixels", "max_pixels", "most_aspect"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels must be at least min_pixels ({self.min_pixels}), got {self.max_pixels}")

    def _frame(self, image_size: Size) -> Frame:
        return Frame.resized(image_size, self.resized_size(image_size))

    def resized_size(self, image_size: Size) -> Size:
        """The (width, height) that an image is resized to, in the floating-point steps of the published code."""
        sides = check_size(image_size)
        if max(sides) / min(sides) > self.most_aspect:
            ratio = max(sides) / min(sides)
            raise ValueError(f"image_size {sides} is too thin: ratio of sides {ratio:g}, at most {self.most_aspect}")
        factor, least = self.factor, self.factor if self.floor_to_factor else 0
        rounded = [round(side / factor) * factor for side in sides]
        if not self.floor_to_factor:
            rounded = [max(factor, side) for side in rounded]
        area = sides[0] * sides[1]
        if rounded[0] * rounded[1] > self.max_pixels:
            beta = math.sqrt(area / self.max_pixels)
            rounded = [max(least, math.floor(side / beta / factor) * factor) for side in sides]
        elif rounded[0] * rounded[1] < self.min_pixels:
            beta = math.sqrt(self.min_pixels / area)
            rounded = [math.ceil(side * beta / factor) * factor for side in sides]
        if min(rounded) < 1:
            raise ValueError(f"image_size {sides} is too thin: it would be resized to {tuple(rounded)}")
        return rounded[0], rounded[1]
