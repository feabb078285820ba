"""Plans of images, made before they are loaded: the grid of patches and the number of kept patches."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ...parts.image_processing_navit import NaViTImageProcessor
from ...parts.image_transforms import fit_to_grid
from ...parts.utils import positive_integer
from .resolution import seeded_generator
from .token_drop import DropPolicy, kept_count


class ImagePlan(NamedTuple):
    """Grid and kept patches of an image in one epoch; made in the main process, applied where the image is loaded.

    All fields are integers, so `list(plan)` is JSON-serializable and `ImagePlan(*values)` restores it.

    Attributes:
        index: Index in the dataset.
        height: Height of the image in pixels, before resizing.
        width: Width of the image in pixels, before resizing.
        rows: Rows of the full grid in patches.
        columns: Columns of the full grid in patches.
        kept: Number of kept patches, from 1 to `rows * columns`.
        epoch: The epoch.
        seed: Seed of the draw of the kept patches.
    """

    index: int  # type: ignore[assignment]  # shadows tuple.index
    height: int
    width: int
    rows: int
    columns: int
    kept: int
    epoch: int
    seed: int


class ResolutionPolicy(Protocol):
    """Chooses the grid of an image, as [`ResolutionSampler`] does.

    A policy may also have a method `max_length(factor)`, the largest `rows * columns` that it can return, with which
    a capacity that is too small raises before training.
    """

    def grid(self, height: int, width: int, factor: int, generator: np.random.Generator) -> tuple[int, int]:
        """Return rows and columns, in units of `factor` pixels, for an image of `height` x `width` pixels."""
        ...


@dataclass(frozen=True)
class ProcessorResolution:
    """Gives each image the grid that an image processor chooses, so that training uses the sizes of inference.

    Args:
        image_processor: The processor.
    """

    image_processor: NaViTImageProcessor

    def grid(self, height: int, width: int, factor: int, generator: np.random.Generator) -> tuple[int, int]:
        """Return rows and columns, in units of `factor` pixels; nothing is drawn.

        Raises:
            ValueError: If the processor refuses the size, or `factor` differs from that of the processor.
        """
        expected = self.image_processor.patch_size * self.image_processor.merge_size
        if factor != expected:
            raise ValueError(
                f"`factor` must be patch_size * merge_size of the image processor, {expected} pixels, got {factor}."
            )
        _, rows, columns = self.image_processor.get_grid_thw(height, width)
        return rows // self.image_processor.merge_size, columns // self.image_processor.merge_size

    def max_length(self, factor: int) -> int:
        """Return the largest `rows * columns`, that of the largest area of the processor."""
        return int(self.image_processor.size["longest_edge"]) // factor**2


class ImagePlanner:
    """Draws the grid and drop rate of each image, once per epoch.

    Draws depend on the seed, the epoch and the index of the image only.

    Args:
        patch_size: Side P of a patch in pixels.
        capacity: Patches of a pack.
        merge_size: Side m of the blocks of patches that a consumer merges; grids are multiples of it, and blocks are
            kept or dropped as a whole.
        resolution: Chooses the grid; None keeps the size of the image, rounded to whole blocks.
        token_drop: Chooses the drop rate; None drops nothing. Its attribute `lowest_rate`, if it has one, is the lower
            bound of its rates; otherwise 0 is assumed.
        oversize: Policy for an image with more kept patches than `capacity`: "raise", or "shrink" it to the largest
            grid of its aspect ratio that fits at its drop rate.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is out of range, or `resolution` can draw grids that exceed `capacity`.
    """

    def __init__(
        self,
        patch_size: int,
        capacity: int,
        *,
        merge_size: int = 1,
        resolution: ResolutionPolicy | None = None,
        token_drop: DropPolicy | None = None,
        oversize: str = "raise",
        seed: int = 0,
    ) -> None:
        self.patch_size = positive_integer(patch_size, "patch_size")
        self.merge_size = positive_integer(merge_size, "merge_size")
        self.capacity = positive_integer(capacity, "capacity")
        if oversize not in ("raise", "shrink"):
            raise ValueError(f"`oversize` must be 'raise' or 'shrink', got {oversize!r}.")
        if self.capacity < self._block:
            raise ValueError(
                f"`capacity` must be at least merge_size**2={self._block} patches, the smallest image, got {capacity}."
            )
        self.resolution = resolution
        self.token_drop = token_drop
        self.oversize = oversize
        seeded_generator(seed, 0, 0)
        self.seed = seed
        self._check_resolution()

    @property
    def _block(self) -> int:
        """Patches per block."""
        return self.merge_size**2

    @property
    def _factor(self) -> int:
        """Side of a block in pixels."""
        return self.patch_size * self.merge_size

    @property
    def _lowest_rate(self) -> float:
        return getattr(self.token_drop, "lowest_rate", 0.0)

    def plan(self, index: int, height: int, width: int, epoch: int = 0, images_seen: int = 0) -> ImagePlan:
        """Plan one image for one epoch.

        Args:
            index: Index of the image in the dataset.
            height: Height in pixels.
            width: Width in pixels.
            epoch: The epoch.
            images_seen: Images planned before this one, over all epochs and processes.

        Raises:
            ValueError: If the size is not positive, a policy refuses the image, or it exceeds `capacity`.
        """
        generator = seeded_generator(self.seed, epoch, index)
        try:
            rows, columns = self._grid(height, width, generator)
            rate = 0.0
            if self.token_drop is not None:
                rate = self.token_drop.rate(rows * columns * self._block, images_seen, generator)
            kept = kept_count(rows * columns, rate)
            if kept * self._block > self.capacity and self.oversize == "shrink":
                rows, columns = self._shrunk(rows, columns, rate)
                kept = kept_count(rows * columns, rate)
        except ValueError as error:
            raise ValueError(f"Image {index} of {width} x {height} pixels: {error}") from None
        self._check_fit(index, rows, columns, kept)
        m = self.merge_size
        seed = int(generator.integers(2**63))
        return ImagePlan(index, height, width, rows * m, columns * m, kept * self._block, epoch, seed)

    def check_sizes(self, sizes: np.ndarray) -> None:
        """Raise for images that exceed `capacity`, if the grids are determined by the sizes.

        Args:
            sizes: `(n, 2)` integers, height and width of each image in pixels.

        Raises:
            ValueError: If an image has an invalid size, or exceeds `capacity`.
        """
        if self.resolution is not None or self.oversize != "raise":
            return
        for index, (height, width) in enumerate(sizes.tolist()):
            try:
                rows, columns = self._own_grid(height, width)
            except ValueError as error:
                raise ValueError(f"Image {index} of {width} x {height} pixels: {error}") from None
            self._check_fit(index, rows, columns, kept_count(rows * columns, self._lowest_rate))

    def _grid(self, height: int, width: int, generator: np.random.Generator) -> tuple[int, int]:
        """Rows and columns in blocks."""
        if self.resolution is None:
            return self._own_grid(height, width)
        rows, columns = self.resolution.grid(height, width, self._factor, generator)
        return positive_integer(rows, "resolution.grid()[0]"), positive_integer(columns, "resolution.grid()[1]")

    def _own_grid(self, height: int, width: int) -> tuple[int, int]:
        factor = self._factor
        unlimited = (height + factor) * (width + factor)  # above any area after rounding to whole blocks
        new_height, new_width = fit_to_grid(height, width, factor, 1, unlimited)
        return new_height // factor, new_width // factor

    def _shrunk(self, rows: int, columns: int, rate: float) -> tuple[int, int]:
        """Largest grid of about this aspect ratio that fits into a pack at a drop rate."""
        limit = int(self.capacity // self._block / (1 - rate)) + 1
        while kept_count(limit, rate) * self._block > self.capacity:
            limit -= 1
        return fit_to_grid(rows, columns, 1, 1, limit, max_aspect_ratio=math.inf)

    def _check_fit(self, index: int, rows: int, columns: int, kept: int) -> None:
        patches, kept = rows * columns * self._block, kept * self._block
        if kept > self.capacity:
            total = "" if kept == patches else f" of {patches}"
            raise ValueError(
                f"Image {index} keeps {kept} patches{total}, which exceeds `capacity`={self.capacity}. "
                "Raise the capacity, sample lower resolutions, or pass oversize='shrink'."
            )

    def _check_resolution(self) -> None:
        max_length = getattr(self.resolution, "max_length", None)
        if max_length is None or self.oversize != "raise":
            return
        kept = kept_count(max_length(self._factor), self._lowest_rate) * self._block
        if kept > self.capacity:
            raise ValueError(
                f"`resolution` can give images with {kept} kept patches, which exceeds "
                f"`capacity`={self.capacity}. Raise the capacity, sample lower resolutions, or pass oversize='shrink'."
            )


def checked_sizes(sizes: object) -> np.ndarray:
    """Return image sizes as an array.

    Args:
        sizes: Height and width of each image in pixels.

    Returns:
        `(n, 2)` int64.

    Raises:
        ValueError: If `sizes` is empty, or an entry is not a pair of positive integers.
    """
    try:
        array = np.asarray(sizes)
    except ValueError:
        raise ValueError("`sizes` must be pairs of integers, height and width in pixels, got ragged rows.") from None
    if array.size == 0:
        raise ValueError("`sizes` must have the height and width of at least one image, got none.")
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            "`sizes` must be pairs of integers, height and width in pixels, got an array of shape "
            f"{array.shape} and type {array.dtype}."
        )
    wrong = np.flatnonzero((array < 1).any(axis=1))
    if wrong.size:
        height, width = array[wrong[0]].tolist()
        raise ValueError(f"`sizes[{wrong[0]}]` must have a height and a width of at least 1, got ({height}, {width}).")
    return array.astype(np.int64)
