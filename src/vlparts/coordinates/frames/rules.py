"""Frame rules: how a family of models resizes or pads an image of any size.

A rule is data: it can be compared, printed and hashed. Calling it with the size of an image returns its frame.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from ..validation import check_size, positive_integer
from .maps import Frame

__all__ = ["FitWithin", "FrameRule", "Original", "PaddedSquare", "Resized", "SmartResize"]

Size = tuple[int, int]


class FrameRule(Protocol):
    """Returns the frame of an image of any size."""

    def __call__(self, image_size: Size) -> Frame:
        """Return the frame of an image of this (width, height)."""


class _Rule:
    """A rule with a cache of frames: often many texts are read for few image sizes."""

    def __call__(self, image_size: Size) -> Frame:
        """Return the frame of an image of this (width, height).

        Raises:
            ValueError: If `image_size` is invalid, or the rule has no frame for it.
        """
        if type(image_size) is tuple and tuple(map(type, image_size)) == (int, int):
            return _cached_frame(self, image_size)
        return self._frame(check_size(image_size))

    def _frame(self, image_size: Size) -> Frame:
        raise NotImplementedError


@lru_cache(maxsize=1024)
def _cached_frame(rule: _Rule, image_size: Size) -> Frame:
    return rule._frame(image_size)


@dataclass(frozen=True)
class Original(_Rule):
    """The original image; also for numbers relative to it, which do not change when it is resized."""

    def _frame(self, image_size: Size) -> Frame:
        return Frame.original(image_size)


@dataclass(frozen=True)
class Resized(_Rule):
    """Resize every image to one size; the aspect ratio may change.

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
    """Pad every image to a square of its longer side, see [`Frame.padded_square`].

    Args:
        offset: Position of the image in the square, "centre" or "corner".
        side: Side in pixels that the square is resized to; None for no resize.
    """

    offset: str = "centre"
    side: int | None = None

    def __post_init__(self) -> None:
        Frame.padded_square((1, 1), self.offset, self.side)

    def _frame(self, image_size: Size) -> Frame:
        return Frame.padded_square(image_size, self.offset, self.side)


@dataclass(frozen=True)
class FitWithin(_Rule):
    """Shrink larger images to fit into `size` with their aspect ratio; smaller images do not change.

    Sides become `int(side * scale)` with `scale = min(width / W, height / H)` in floating point, as in Fuyu's image
    processor.

    Args:
        size: Maximum (width, height) in pixels.
        padded: Whether to pad the image to `size`, with the image in the upper left corner.
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
            raise ValueError(
                f"`image_size` {(width, height)} is too thin: its size within {self.size} would be {fitted}."
            )
        frame = Frame.resized((width, height), fitted)
        return Frame(frame.image_size, self.size, frame.scale) if self.padded else frame


@dataclass(frozen=True)
class SmartResize(_Rule):
    """`smart_resize`: resize to multiples of `factor`, within bounds of the number of pixels.

    The aspect ratio is nearly kept.

    There are two variants, which differ for thin images. The image processors of transformers round sides to the
    nearest multiple (possibly 0) and clamp them to at least `factor` when they shrink an image. qwen-vl-utils 0.0.14
    clamps them when it rounds but not when it shrinks; a side of 0 is then an error.

    Args:
        factor: Sides become multiples of this: pixels of a patch times the side of the merged window.
        min_pixels: Images with fewer pixels are enlarged.
        max_pixels: Images with more pixels are shrunk.
        floor_to_factor: True for transformers' variant, False for that of qwen-vl-utils.
        most_aspect: Maximum ratio of the sides; other images are an error.

    Raises:
        ValueError: If a number is not positive, or `max_pixels` is less than `min_pixels`.
    """

    factor: int = 28
    min_pixels: int = 56 * 56
    max_pixels: int = 14 * 14 * 4 * 1280
    floor_to_factor: bool = True
    most_aspect: int = 200

    def __post_init__(self) -> None:
        for name in ("factor", "min_pixels", "max_pixels", "most_aspect"):
            object.__setattr__(self, name, positive_integer(getattr(self, name), name))
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"`max_pixels` must be at least `min_pixels` ({self.min_pixels}), got {self.max_pixels}.")

    def _frame(self, image_size: Size) -> Frame:
        return Frame.resized(image_size, self.resized_size(image_size))

    def resized_size(self, image_size: Size) -> Size:
        """Return the (width, height) that an image is resized to, in the published floating-point steps."""
        sides = check_size(image_size)
        if max(sides) / min(sides) > self.most_aspect:
            ratio = max(sides) / min(sides)
            raise ValueError(
                f"`image_size` {sides} is too thin: the ratio of its sides is {ratio:g}, at most {self.most_aspect}."
            )
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
            raise ValueError(f"`image_size` {sides} is too thin: it would be resized to {tuple(rounded)}.")
        return rounded[0], rounded[1]
