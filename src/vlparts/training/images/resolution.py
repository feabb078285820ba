"""Resolution sampling of NaViT: every image at another size in every epoch, its aspect ratio kept.

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

from ...parts.image_transforms import fit_to_grid, to_rgb
from .token_drop import truncated_normal

# `fit_to_grid` takes whole numbers; parts of a pixel let a thin image keep its aspect ratio.
_FINE = 1024


def seeded_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Generator for what is drawn for one image in one epoch.

    It depends on nothing else, so any number of workers and processes, and a run that is resumed, draw the same.

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
    """Draws the size that an image is resized to.

    u on [-1, 1] is drawn and mapped linearly to a side in [low, high], or to an area in [low^2, high^2]. The paper's
    figure 7 compares both, each with a uniform distribution and with normal ones of mean 0, -0.5 and 0.5. Sides were
    better than areas, and best was the normal distribution with more small images:
    `ResolutionSampler(64, 384, distribution="truncated_normal", mean=-0.5)`. Pre-training used the uniform
    distribution of sides from 64 to 256.

    Args:
        low: Smallest resolution in pixels.
        high: Largest resolution in pixels. Equal to `low`, every image gets this resolution.
        quantity: What u is mapped to, "side" or "area".
        distribution: Distribution of u, "uniform" or "truncated_normal".
        mean: Mean of the normal distribution before it is cut off at -1 and 1, in [-1, 1]; its standard deviation is
            1. Must be 0 for the uniform distribution.

    Raises:
        ValueError: If an argument is outside of what is described.
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
        """Draw a resolution: the side in pixels of the square whose area the image gets."""
        if self.distribution == "uniform":
            u = generator.uniform(-1.0, 1.0)
        else:
            u = truncated_normal(self.mean, 1.0, -1.0, 1.0, generator)
        power = 1 if self.quantity == "side" else 2
        least, most = self.low**power, self.high**power
        drawn = (least + (most - least) * (u + 1) / 2) ** (1 / power)
        return float(min(max(drawn, self.low), self.high))  # guards against rounding only

    def grid(self, height: int, width: int, factor: int, generator: np.random.Generator) -> tuple[int, int]:
        """Draw a resolution R and find the grid nearest to it.

        The image is scaled to an area of R^2 pixels. Its sides are then rounded to multiples of `factor` as those of
        any image are (see `fit_to_grid`): to the nearest, and both down where the nearest would be too many. A side
        shorter than `factor` becomes one, whatever that does to the aspect ratio.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            factor: Side of a patch, or of a block of patches (patch_size * merge_size), in pixels.
            generator: Source of all chance.

        Returns:
            Rows and columns, in units of `factor`. Their product is at most `R^2 // factor^2`, or 1 where that is 0.

        Raises:
            ValueError: If a size is less than one pixel.
        """
        if height < 1 or width < 1:
            raise ValueError(
                f"The image has a size of {width} x {height} pixels (width x height); expected at least 1 x 1."
            )
        _check_factor(factor)
        resolution = self.sample(generator)
        scale = _FINE * resolution / math.sqrt(height * width)
        rows, columns = fit_to_grid(
            max(1, round(height * scale)),
            max(1, round(width * scale)),
            _FINE * factor,
            min_pixels=1,
            max_pixels=max((_FINE * factor) ** 2, int((_FINE * resolution) ** 2)),
            max_aspect_ratio=math.inf,
        )
        return rows // (_FINE * factor), columns // (_FINE * factor)

    def target_size(self, height: int, width: int, factor: int, generator: np.random.Generator) -> tuple[int, int]:
        """Draw the height and width in pixels that an image is resized to; as `grid`, times `factor`."""
        rows, columns = self.grid(height, width, factor, generator)
        return rows * factor, columns * factor

    def max_length(self, factor: int) -> int:
        """Largest `rows * columns` that `grid` can return, whatever the image: the capacity that is always enough."""
        _check_factor(factor)
        return max(1, int(self.high**2) // factor**2)


def _check_factor(factor: int) -> None:
    if factor < 1:
        raise ValueError(f"`factor` must be at least 1 pixel, got {factor}.")


class ResolutionDataset(Dataset):
    """Another dataset with its images resized to sampled resolutions.

    An image comes in the size that the seed, the epoch and its index say, in whichever worker of a DataLoader it is
    loaded. Call `set_epoch` before each epoch, as for samplers; workers that live on (`persistent_workers`) see it as
    well, because the epoch lies in shared memory. Sides are multiples of `patch_size * merge_size`, which
    [`NaViTImageProcessor`] leaves as they are if they lie in its range of areas. Where drop rates are drawn for
    the same images, give this dataset another seed, or rates and resolutions depend on each other.

    Args:
        dataset: A dataset of images, or of items that hold one, with `__len__` and `__getitem__`. Images are of
            Pillow, in any mode that `to_rgb` knows, or arrays `(H, W)` or `(H, W, C)` uint8.
        sampler: Draws the sizes.
        patch_size: Side of a patch in pixels.
        seed: Seed of the draws.
        image_key: Where the image stands in an item: a key for mappings, a position for tuples. None if the item is
            the image itself.
        merge_size: Side of the block of patches that a consumer merges into one token.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: ResolutionSampler,
        patch_size: int,
        seed: int = 0,
        image_key: str | int | None = None,
        merge_size: int = 1,
    ) -> None:
        if patch_size < 1 or merge_size < 1:
            raise ValueError(f"`patch_size` and `merge_size` must be at least 1, got {patch_size} and {merge_size}.")
        self.dataset = dataset
        self.sampler = sampler
        self.seed = seed
        self.image_key = image_key
        self.factor = patch_size * merge_size
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies have an epoch of their own in shared memory; those that torch's DataLoader makes share this one."""
        self.__dict__.update(state)
        self._epoch.share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that images are loaded for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that images are loaded for, here and in workers that run.

        Raises:
            ValueError: If the epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"`epoch` must be at least 0, got {epoch}.")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """The item with its image as RGB in the drawn size: of Pillow, or `(H, W, 3)` uint8 if it came as an array."""
        index = range(len(self))[index]
        item, key = self.dataset[index], self.image_key
        generator = seeded_generator(self.seed, self.epoch, index)
        if key is None:
            return self._resized(item, generator)
        image = self._resized(item[key], generator)
        if isinstance(item, Mapping):
            return {**item, key: image}
        return tuple(image if place == range(len(item))[int(key)] else value for place, value in enumerate(item))

    def _resized(self, image: Any, generator: np.random.Generator) -> Any:
        picture = image if isinstance(image, Image.Image) else _picture_of(image)
        rows, columns = self.sampler.target_size(picture.height, picture.width, self.factor, generator)
        resized = to_rgb(picture).resize((columns, rows), Image.Resampling.BICUBIC)
        return resized if picture is image else np.asarray(resized)


def _picture_of(image: Any) -> Image.Image:
    """An array as a Pillow image."""
    known = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size
    if known and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        return Image.fromarray(image)
    found = f"an array {image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
    raise ValueError(f"The image must be of Pillow, or an array (H, W), (H, W, 3) or (H, W, 4) uint8, got {found}.")
