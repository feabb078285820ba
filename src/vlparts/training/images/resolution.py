"""Resolution sampling of NaViT: each image is resized to a random size per epoch, at its aspect ratio.

From arXiv 2307.06304, sections 2.2 and 3.2 and appendix A.1. The resolution R of an image is the side in pixels of the
square of equal area.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...parts.image_arrays import image_to_pillow
from ...parts.image_transforms import check_image_size, fit_to_grid
from ...parts.utils import positive_integer
from .token_drop import truncated_normal

# `fit_to_grid` takes integers; fractions of a pixel preserve the aspect ratio of thin images.
_SUBPIXELS = 1024


def seeded_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random generator of one image in one epoch.

    It depends on nothing else, so draws are the same for any number of workers and processes and after resuming.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        index: Index of the image in its dataset.

    Raises:
        ValueError: If one of them is negative.
    """
    if min(seed, epoch, index) < 0:
        raise ValueError(f"`seed`, `epoch` and `index` must be at least 0, got {seed}, {epoch} and {index}.")
    return np.random.default_rng([seed, epoch, index])


@dataclass(frozen=True)
class ResolutionSampler:
    """Draws the size to which an image is resized.

    u in [-1, 1] is drawn and mapped linearly to a side in [low, high], or to an area in [low^2, high^2]. The paper's
    figure 7 compares both, each with a uniform distribution and with normal distributions of mean 0, -0.5 and 0.5.
    Sides were better than areas, and the normal distribution with more small images was best:
    `ResolutionSampler(64, 384, distribution="truncated_normal", mean=-0.5)`. Pre-training used sides uniform in 64 to
    256.

    Args:
        low: Smallest resolution in pixels.
        high: Largest resolution in pixels; equal to `low` for a constant resolution.
        quantity: The quantity that u is mapped to, "side" or "area".
        distribution: Distribution of u, "uniform" or "truncated_normal".
        mean: Mean, in [-1, 1], of the normal distribution before truncation to [-1, 1]; its standard deviation is 1.
            Must be 0 for the uniform distribution.

    Raises:
        ValueError: If an argument is out of range.
    """

    low: float
    high: float
    quantity: str = "side"
    distribution: str = "uniform"
    mean: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(
                f"`low` and `high` must be pixels with 0 < low <= high < infinity, got {self.low} and {self.high}."
            )
        if self.quantity not in ("side", "area"):
            raise ValueError(f"`quantity` must be 'side' or 'area', got {self.quantity!r}.")
        if self.distribution not in ("uniform", "truncated_normal"):
            raise ValueError(f"`distribution` must be 'uniform' or 'truncated_normal', got {self.distribution!r}.")
        if not -1 <= self.mean <= 1:
            raise ValueError(f"`mean` must lie in [-1, 1], got {self.mean}.")
        if self.distribution == "uniform" and self.mean != 0:
            raise ValueError(f"`mean` must be 0 with distribution='uniform', got {self.mean}.")

    def sample(self, generator: np.random.Generator) -> float:
        """Draw a resolution R in pixels."""
        if self.distribution == "uniform":
            u = generator.uniform(-1.0, 1.0)
        else:
            u = truncated_normal(self.mean, 1.0, -1.0, 1.0, generator)
        power = 1 if self.quantity == "side" else 2
        least, most = self.low**power, self.high**power
        drawn = (least + (most - least) * (u + 1) / 2) ** (1 / power)
        return float(min(max(drawn, self.low), self.high))  # guards against rounding only

    def grid(self, height: int, width: int, factor: int, generator: np.random.Generator) -> tuple[int, int]:
        """Draw a resolution R and return the nearest grid.

        The image is scaled to an area of R^2 pixels, and its sides are rounded to multiples of `factor` by
        `fit_to_grid`: to the nearest, or both down if the nearest would exceed the area. A side shorter than `factor`
        becomes `factor`, whatever the aspect ratio.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            factor: Side of a patch, or of a block of patches (patch_size * merge_size), in pixels.
            generator: The random generator.

        Returns:
            Rows and columns, in units of `factor`. Their product is at most `R^2 // factor^2`, or 1 where that is 0.

        Raises:
            ValueError: If a size is less than one pixel.
        """
        check_image_size(height, width)
        factor = positive_integer(factor, "factor")
        resolution = self.sample(generator)
        scale = _SUBPIXELS * resolution / math.sqrt(height * width)
        rows, columns = fit_to_grid(
            max(1, round(height * scale)),
            max(1, round(width * scale)),
            _SUBPIXELS * factor,
            min_pixels=1,
            max_pixels=max((_SUBPIXELS * factor) ** 2, int((_SUBPIXELS * resolution) ** 2)),
            max_aspect_ratio=math.inf,
        )
        return rows // (_SUBPIXELS * factor), columns // (_SUBPIXELS * factor)

    def target_size(self, height: int, width: int, factor: int, generator: np.random.Generator) -> tuple[int, int]:
        """Draw the height and width in pixels to which an image is resized: `grid` times `factor`."""
        rows, columns = self.grid(height, width, factor, generator)
        return rows * factor, columns * factor

    def max_length(self, factor: int) -> int:
        """Return the largest `rows * columns` that `grid` can return for any image: a sufficient capacity."""
        return max(1, int(self.high**2) // positive_integer(factor, "factor") ** 2)


class ResolutionDataset(Dataset):
    """Wraps a dataset and resizes its images to sampled resolutions.

    The size of an image depends on the seed, the epoch and its index, not on the DataLoader worker. Call `set_epoch`
    before each epoch, as for samplers; the epoch is in shared memory, so persistent workers see it too. Sides are
    multiples of `patch_size * merge_size`, which [`NaViTImageProcessor`] does not resize if the area is in its range.
    Use another seed than for drop rates of the same images; otherwise rates and resolutions are correlated.

    Args:
        dataset: A map-style dataset of images, or of items with an image. Images are Pillow images, arrays or tensors,
            see [`image_to_array`].
        sampler: Draws the sizes.
        patch_size: Side of a patch in pixels.
        seed: Seed of the draws.
        image_key: Key (mappings) or index (tuples) of the image in an item; None if the item is the image.
        merge_size: Side of the block of patches that a consumer merges into one token.
        input_data_format: "channels_first" or "channels_last" for arrays and tensors whose shape does not determine
            it.

    Raises:
        ValueError: If `patch_size` or `merge_size` is not a positive integer.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: ResolutionSampler,
        patch_size: int,
        seed: int = 0,
        image_key: str | int | None = None,
        merge_size: int = 1,
        input_data_format: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.input_data_format = input_data_format
        self.sampler = sampler
        self.seed = seed
        self.image_key = image_key
        self.factor = positive_integer(patch_size, "patch_size") * positive_integer(merge_size, "merge_size")
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy its own epoch in shared memory; copies in DataLoader workers share that of the original."""
        self.__dict__.update(state)
        self._epoch.share_memory_()

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, here and in running workers.

        Raises:
            ValueError: If the epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"`epoch` must be at least 0, got {epoch}.")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return the item with its image resized: RGB, a Pillow image if it was one, else `(H, W, 3)` uint8."""
        index = range(len(self))[index]
        item, key = self.dataset[index], self.image_key
        generator = seeded_generator(self.seed, self.epoch, index)
        if key is None:
            return self._resize(item, generator)
        image = self._resize(item[key], generator)
        if isinstance(item, Mapping):
            return {**item, key: image}
        return tuple(image if i == range(len(item))[int(key)] else value for i, value in enumerate(item))

    def _resize(self, image: Any, generator: np.random.Generator) -> Any:
        picture = image_to_pillow(image, self.input_data_format)
        rows, columns = self.sampler.target_size(picture.height, picture.width, self.factor, generator)
        resized = picture.resize((columns, rows), Image.Resampling.BICUBIC)
        return resized if isinstance(image, Image.Image) else np.asarray(resized)
