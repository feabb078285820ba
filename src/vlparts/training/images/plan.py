"""What is decided about an image before it is loaded: its grid of patches, and how many of them stay."""

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
    """An image's place in training: made in the main process, carried out where the image is loaded.

    All fields are integers, so `list(plan)` can be written as JSON and `ImagePlan(*values)` reads it again.

    Attributes:
        index: Index in the dataset.
        height: Height in pixels that the plan was made for.
        width: Width in pixels that the plan was made for.
        rows: Rows of the full grid in patches.
        columns: Columns of the full grid in patches.
        kept: Patches that stay, from 1 to `rows * columns`.
        epoch: The epoch that the image is shown for.
        seed: Seed for the choice of the patches that stay.
    """

    index: int  # type: ignore[assignment]  # tuple has a method of this name, which nobody needs here
    height: int
    width: int
    rows: int
    columns: int
    kept: int
    epoch: int
    seed: int


class ResolutionPolicy(Protocol):
    """Decides the grid of an image, as [`ResolutionSampler`] does.

    A policy may also have a method `max_length(factor)`, the largest `rows * columns` that it can return. With it a
    capacity that is too small is found before training.
    """

    def grid(self, height: int, width: int, factor: int, generator: np.random.Generator) -> tuple[int, int]:
        """Rows and columns, in units of `factor` pixels, for an image of a size in pixels."""
        ...


@dataclass(frozen=True)
class ProcessorResolution:
    """The grid that an image processor gives an image by itself: training sees the sizes of inference.

    Args:
        image_processor: The processor.
    """

    image_processor: NaViTImageProcessor

    def grid(self, height: int, width: int, factor: int, generator: np.random.Generator) -> tuple[int, int]:
        """Rows and columns, in units of `factor` pixels; nothing is drawn.

        Raises:
            ValueError: If the processor refuses the size, or `factor` is not its own.
        """
        own = self.image_processor.patch_size * self.image_processor.merge_size
        if factor != own:
            raise ValueError(
                f"`factor` is {factor} pixels (patch_size * merge_size), but that of the image processor is {own}."
            )
        _, rows, columns = self.image_processor.get_grid_thw(height, width)
        return rows // self.image_processor.merge_size, columns // self.image_processor.merge_size

    def max_length(self, factor: int) -> int:
        """Largest `rows * columns`: that of the processor's largest area."""
        return int(self.image_processor.size["longest_edge"]) // factor**2


class ImagePlanner:
    """Draws each image's grid and drop rate, once for each epoch.

    Draws depend on the seed, the epoch and the image's index alone.

    Args:
        patch_size: Side P of a patch in pixels.
        capacity: Patches of a pack.
        merge_size: Side m of the blocks of patches that a consumer merges; grids are multiples of it, and blocks are
            kept or dropped as a whole.
        resolution: Decides the grid; None keeps the image's own size, rounded to whole blocks.
        token_drop: Decides the share of patches that are dropped; None drops nothing. If it has an attribute
            `lowest_rate`, no rate may be below it; otherwise rates are expected to come close to 0.
        oversize: What happens to an image of which more patches stay than a pack holds: "raise", or "shrink" for the
            largest grid of its aspect ratio that fits at its drop rate.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside of what is described, or if `resolution` draws grids that do not fit.
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
                f"capacity={capacity} holds no image: the smallest has {self._block} patches "
                f"(merge_size={merge_size} squared)."
            )
        self.resolution = resolution
        self.token_drop = token_drop
        self.oversize = oversize
        seeded_generator(seed, 0, 0)
        self.seed = seed
        self._check_resolution()

    @property
    def _block(self) -> int:
        """Patches of a block."""
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
            index: Index of the image.
            height: Height in pixels.
            width: Width in pixels.
            epoch: The epoch.
            images_seen: Images that were planned before, in all epochs and for all processes.

        Raises:
            ValueError: If the size is not positive, a policy refuses the image, or it does not fit into a pack.
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
        """Find images that will not fit before training starts, where the grids follow from the sizes.

        Args:
            sizes: `(n, 2)` integers, height and width of each image in pixels.

        Raises:
            ValueError: If an image cannot be cut into a grid, or does not fit into a pack.
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
        return positive_integer(rows, "rows of `resolution`"), positive_integer(columns, "columns of `resolution`")

    def _own_grid(self, height: int, width: int) -> tuple[int, int]:
        factor = self._factor
        unlimited = (height + factor) * (width + factor)  # more than rounding to whole blocks can give
        new_height, new_width = fit_to_grid(height, width, factor, 1, unlimited)
        return new_height // factor, new_width // factor

    def _shrunk(self, rows: int, columns: int, rate: float) -> tuple[int, int]:
        """The largest grid of nearly this aspect ratio that fits at a drop rate."""
        limit = int(self.capacity // self._block / (1 - rate)) + 1
        while kept_count(limit, rate) * self._block > self.capacity:
            limit -= 1
        return fit_to_grid(rows, columns, 1, 1, limit, max_aspect_ratio=math.inf)

    def _check_fit(self, index: int, rows: int, columns: int, kept: int) -> None:
        patches, kept = rows * columns * self._block, kept * self._block
        if kept > self.capacity:
            dropped = "" if kept == patches else f" of {patches}"
            raise ValueError(
                f"Image {index} has a length of {kept} patches{dropped}, which exceeds capacity={self.capacity}. "
                "Raise the capacity, sample lower resolutions, or pass oversize='shrink'."
            )

    def _check_resolution(self) -> None:
        max_length = getattr(self.resolution, "max_length", None)
        if max_length is None or self.oversize != "raise":
            return
        kept = kept_count(max_length(self._factor), self._lowest_rate) * self._block
        if kept > self.capacity:
            raise ValueError(
                f"`resolution` can give images with a length of {kept} patches, which exceeds "
                f"capacity={self.capacity}. Raise the capacity, sample lower resolutions, or pass oversize='shrink'."
            )


def checked_sizes(sizes: object) -> np.ndarray:
    """Sizes of images as an array.

    Args:
        sizes: Height and width of each image in pixels.

    Returns:
        `(n, 2)` int64.

    Raises:
        ValueError: If there are none, or one is not a pair of positive integers.
    """
    try:
        array = np.asarray(sizes)
    except ValueError:
        raise ValueError("`sizes` must be pairs of integers, height and width in pixels.") from None
    if array.size == 0:
        raise ValueError("`sizes` is empty; expected the height and width of at least one image.")
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            "`sizes` must be pairs of integers, height and width in pixels, got an array of shape "
            f"{array.shape} and type {array.dtype}."
        )
    wrong = np.flatnonzero((array < 1).any(axis=1))
    if wrong.size:
        height, width = array[wrong[0]].tolist()
        raise ValueError(f"`sizes[{wrong[0]}]` is ({height}, {width}); expected a height and a width of at least 1.")
    return array.astype(np.int64)
