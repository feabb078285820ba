"""Packs of planned images: loaded, resized to their grids, cut into patches, and the patches that stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import ChannelDimension, SizeDict

from ...parts.image_processing_navit import NaViTImageProcessor
from ...parts.utils import positive_integer
from .plan import ImagePlan
from .token_drop import draw_kept

IGNORE_LABEL = -100
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class PatchedImage:
    """The patches of one image that stay.

    Args:
        patches: `(kept, C*P*P)` float32.
        rows: Rows of the full grid in patches; 0 if this stands for no image at all.
        columns: Columns of the full grid in patches.
        keep: `(kept,)` int64, ascending places of the patches in the full grid's order; None if all stay.
        label: The image's class, int64 without dimensions; or float32 `(num_labels,)` for several classes at once, or
            without dimensions for regression. None if there is none.
        index: The image's index in its dataset.
    """

    patches: Tensor
    rows: int
    columns: int
    keep: Tensor | None = None
    label: Tensor | None = None
    index: int = -1


class ImageCutter:
    """Cuts images into the patches of their plans, by an image processor's own steps.

    Args:
        image_processor: Says how images are converted, resized, rescaled, normalised and cut; its range of sizes is
            not asked, since the plan has the size.
        image_key: Where the image stands in an item: a key for mappings, a position for tuples. None if the item is
            the image itself.
        label_key: Where the label stands in an item; None for no labels.
        num_channels: Channels C of all images.
    """

    def __init__(
        self,
        image_processor: NaViTImageProcessor,
        image_key: str | int | None = None,
        label_key: str | int | None = None,
        num_channels: int = 3,
    ) -> None:
        self.image_processor = image_processor
        self.image_key = image_key
        self.label_key = label_key
        self.num_channels = positive_integer(num_channels, "num_channels")

    def read(self, item: Any, index: int) -> tuple[np.ndarray, Tensor | None]:
        """Find image and label in an item.

        Args:
            item: The item.
            index: Its index, for messages.

        Returns:
            The image `(C, H, W)`, and the label or None.

        Raises:
            ValueError: If there is no such image or label, or the image cannot be used.
        """
        image = item if self.image_key is None else _entry(item, self.image_key, "image_key", index)
        label = None if self.label_key is None else _as_label(_entry(item, self.label_key, "label_key", index), index)
        try:
            array = self.image_processor.process_image(image, do_convert_rgb=self.image_processor.do_convert_rgb)
        except ValueError as error:
            raise ValueError(f"Image {index}: {error}") from None
        if array.shape[0] != self.num_channels:
            raise ValueError(
                f"Image {index} has {array.shape[0]} channels; expected num_channels={self.num_channels}."
            )
        return array, label

    def cut(self, image: np.ndarray, plan: ImagePlan, label: Tensor | None = None) -> PatchedImage:
        """Resize an image to its plan's grid, cut it, and keep the patches that the plan's seed chooses.

        Args:
            image: `(C, H, W)`.
            plan: The plan.
            label: The image's label.
        """
        processor = self.image_processor
        height, width = plan.rows * processor.patch_size, plan.columns * processor.patch_size
        if image.shape[-2:] != (height, width):
            image = processor.resize(image, SizeDict(height=height, width=width), processor.resample)
        inputs = processor(
            image, do_resize=False, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, return_tensors="pt"
        )
        patches, keep = inputs["pixel_values"], None
        if plan.kept < plan.rows * plan.columns:
            keep = kept_patches(plan, processor.merge_size)
            patches = patches[keep]
        return PatchedImage(patches, plan.rows, plan.columns, keep, label, plan.index)

    def blank(self, label: Tensor | None = None) -> PatchedImage:
        """No image at all: what a pack without images consists of, so that its patches have a width.

        Args:
            label: Any image's label, for the type and shape of this one's, which is -100.
        """
        width = self.num_channels * self.image_processor.patch_size**2
        label = None if label is None else torch.full_like(label, IGNORE_LABEL)
        return PatchedImage(torch.zeros(0, width), 0, 0, None, label)


def kept_patches(plan: ImagePlan, merge_size: int = 1) -> Tensor:
    """Choose the patches of an image that stay, by whole blocks of `merge_size` x `merge_size`.

    Args:
        plan: The image's plan.
        merge_size: Side of a block.

    Returns:
        `(plan.kept,)` int64, ascending places in the order of `get_position_ids`.
    """
    block = merge_size**2
    generator = np.random.default_rng(plan.seed)
    blocks = draw_kept(plan.rows * plan.columns // block, plan.kept // block, generator)
    return torch.from_numpy((blocks[:, None] * block + np.arange(block)).ravel())


class PackedImageDataset(Dataset):
    """Images of another dataset, cut into patches as a [`PackedImageSampler`] planned.

    Every image comes as it does from the image processor, but in the size of its plan and without the patches that the
    plan drops. It does not matter which worker loads it.

    Args:
        dataset: A dataset of images, or of items that hold one, with `__getitem__`. Images are of Pillow, or arrays or
            tensors that the image processor takes.
        image_processor: Says how images become patches. Its `patch_size` and `merge_size` must be the sampler's.
        image_key: Where the image stands in an item: a key for mappings, a position for tuples. None if the item is
            the image itself.
        label_key: Where the label stands in an item; None for no labels. A label is an integer, or a vector of floats
            for several classes at once, or a float for regression.
        num_channels: Channels C of all images.
        on_size_mismatch: What happens to an image of another size than the sampler was told: "raise", since height
            and width may have been confused, or "resize" to the planned grid whatever that does to the aspect ratio.

    Raises:
        ValueError: If `on_size_mismatch` is unknown or `num_channels` is not positive.
    """

    def __init__(
        self,
        dataset: Any,
        image_processor: NaViTImageProcessor,
        image_key: str | int | None = None,
        label_key: str | int | None = None,
        num_channels: int = 3,
        on_size_mismatch: str = "raise",
    ) -> None:
        if on_size_mismatch not in ("raise", "resize"):
            raise ValueError(f"`on_size_mismatch` must be 'raise' or 'resize', got {on_size_mismatch!r}.")
        self.dataset = dataset
        self.cutter = ImageCutter(image_processor, image_key, label_key, num_channels)
        self.on_size_mismatch = on_size_mismatch

    def __getitem__(self, pack: Sequence[ImagePlan]) -> list[PatchedImage]:
        """The images of one pack; for a pack without images, one that stands for none.

        Args:
            pack: The plans of the images.

        Raises:
            ValueError: If an image cannot be read or cut, or has another size than planned.
        """
        if pack:
            return [self._load(plan) for plan in pack]
        label = None if self.cutter.label_key is None else self.cutter.read(self.dataset[0], 0)[1]
        return [self.cutter.blank(label)]

    def __getitems__(self, batch: Sequence[Any]) -> list[Any]:
        """What a DataLoader calls: with a pack where the sampler is its `batch_sampler`, otherwise with packs."""
        if all(isinstance(plan, ImagePlan) for plan in batch):
            return self[batch]
        return [self[pack] for pack in batch]

    def _load(self, plan: ImagePlan) -> PatchedImage:
        image, label = self.cutter.read(self.dataset[plan.index], plan.index)
        if self.on_size_mismatch == "raise" and image.shape[-2:] != (plan.height, plan.width):
            raise ValueError(
                f"Image {plan.index} has a height of {image.shape[-2]} and a width of {image.shape[-1]} pixels, but "
                f"the sampler was told {plan.height} and {plan.width}. Sizes are (height, width) of the image as the "
                "dataset returns it; pass on_size_mismatch='resize' if others are meant."
            )
        return self.cutter.cut(image, plan, label)


def _entry(item: Any, key: str | int, name: str, index: int) -> Any:
    try:
        return item[key]
    except (KeyError, IndexError, TypeError):
        found = f"the keys {sorted(map(str, item))}" if isinstance(item, Mapping) else f"type {type(item).__name__}"
        raise ValueError(f"Item {index} has no entry {key!r} (`{name}`); it has {found}.") from None


def _as_label(label: Any, index: int) -> Tensor:
    try:
        tensor = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(0)
    if tensor.ndim == 0 and tensor.dtype in INTEGER_DTYPES:
        return tensor.long()
    if tensor.is_floating_point() and tensor.ndim <= 1 and tensor.numel():
        return tensor.float()
    raise ValueError(f"The label of item {index} must be an integer, or one or several floats, got {label!r}.")
