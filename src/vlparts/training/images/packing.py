"""Loading of planned images: resized to their grids, cut into patches, some of which are dropped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers.image_utils import ChannelDimension, SizeDict

from ...parts.image_processing_navit import NaViTImageProcessor
from ...parts.utils import IGNORE_INDEX, positive_integer
from .plan import ImagePlan
from .token_drop import draw_kept

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class PatchedImage:
    """The kept patches of one image.

    Args:
        patches: `(kept, C*P*P)` float32.
        rows: Rows of the full grid in patches; 0 for a placeholder without an image.
        columns: Columns of the full grid in patches.
        keep: `(kept,)` int64, ascending indices of the patches in the full grid; None if all are kept.
        label: Class, a 0-d int64 tensor; or float32 `(num_labels,)` for multi-label classification, or 0-d float32 for
            regression. None without labels.
        index: Index of the image in its dataset.
    """

    patches: Tensor
    rows: int
    columns: int
    keep: Tensor | None = None
    label: Tensor | None = None
    index: int = -1


class ImageCutter:
    """Cuts images into patches according to their plans, with the steps of an image processor.

    Args:
        image_processor: Converts, resizes, rescales, normalizes and cuts images. Its range of sizes is not used, since
            the plan sets the size.
        image_key: Key (mappings) or index (tuples) of the image in an item; None if the item is the image.
        label_key: Key or index of the label in an item; None for no labels.
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
        """Return the image and label of an item.

        Args:
            item: The item.
            index: Its index, for error messages.

        Returns:
            The image `(C, H, W)`, and the label or None.

        Raises:
            ValueError: If the item has no such image or label, or the image is invalid.
        """
        image = item if self.image_key is None else _entry(item, self.image_key, "image_key", index)
        label = None if self.label_key is None else _as_label(_entry(item, self.label_key, "label_key", index), index)
        processor = self.image_processor
        try:
            array = processor.process_image(
                image, do_convert_rgb=processor.do_convert_rgb, input_data_format=processor.input_data_format
            )
        except ValueError as error:
            raise ValueError(f"Image {index}: {error}") from None
        if array.shape[0] != self.num_channels:
            raise ValueError(
                f"Image {index} has {array.shape[0]} channels; expected `num_channels`={self.num_channels}."
            )
        return array, label

    def cut(self, image: np.ndarray, plan: ImagePlan, label: Tensor | None = None) -> PatchedImage:
        """Resize an image to the grid of its plan, cut it, and keep the patches drawn with the seed of the plan.

        Args:
            image: `(C, H, W)`.
            plan: The plan.
            label: The label of the image.
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
        """Return a placeholder without an image, which gives an empty pack its patch width.

        Args:
            label: Label of any image, for the type and shape of the placeholder's label, which is -100.
        """
        width = self.num_channels * self.image_processor.patch_size**2
        label = None if label is None else torch.full_like(label, IGNORE_INDEX)
        return PatchedImage(torch.zeros(0, width), 0, 0, None, label)


def kept_patches(plan: ImagePlan, merge_size: int = 1) -> Tensor:
    """Draw the kept patches of an image, in whole blocks of `merge_size` x `merge_size`.

    Args:
        plan: The plan of the image.
        merge_size: Side of a block.

    Returns:
        `(plan.kept,)` int64, ascending indices in the order of `get_position_ids`.
    """
    block = merge_size**2
    generator = np.random.default_rng(plan.seed)
    blocks = draw_kept(plan.rows * plan.columns // block, plan.kept // block, generator)
    return torch.from_numpy((blocks[:, None] * block + np.arange(block)).ravel())


class PackedImageDataset(Dataset):
    """Images of another dataset, cut into patches as planned by a [`PackedImageSampler`].

    An image is processed by the image processor, but resized to the grid of its plan and without its dropped patches.
    The result does not depend on the worker.

    Args:
        dataset: A map-style dataset of images, or of items with an image. Images are Pillow images, or arrays or
            tensors that the image processor accepts.
        image_processor: Processes the images. Its `patch_size` and `merge_size` must equal those of the sampler.
        image_key: Key (mappings) or index (tuples) of the image in an item; None if the item is the image.
        label_key: Key or index of the label in an item; None for no labels. A label is an integer, a vector of floats
            for multi-label classification, or a float for regression.
        num_channels: Channels C of all images.
        on_size_mismatch: Policy for an image whose size differs from that in its plan: "raise", since height and width
            may be swapped, or "resize" it to the planned grid, whatever its aspect ratio.

    Raises:
        ValueError: If `dataset` is iterable-style, `on_size_mismatch` is unknown, or `num_channels` is not positive.
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
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"`dataset` must be a map-style dataset, got {type(dataset).__name__}; PackedImageStream packs images "
                "that can only be iterated."
            )
        self.dataset = dataset
        self.cutter = ImageCutter(image_processor, image_key, label_key, num_channels)
        self.on_size_mismatch = on_size_mismatch

    def __getitem__(self, pack: Sequence[ImagePlan]) -> list[PatchedImage]:
        """Return the images of one pack; for an empty pack, one placeholder without an image.

        Args:
            pack: The plans of the images.

        Raises:
            ValueError: If an image is invalid, or its size differs from that in its plan.
        """
        if pack:
            return [self._load(plan) for plan in pack]
        label = None if self.cutter.label_key is None else self.cutter.read(self.dataset[0], 0)[1]
        return [self.cutter.blank(label)]

    def __getitems__(self, batch: Sequence[Any]) -> list[Any]:
        """Load a pack (DataLoader with `batch_sampler=`) or a list of packs (DataLoader with `sampler=`)."""
        if all(isinstance(plan, ImagePlan) for plan in batch):
            return self[batch]
        return [self[pack] for pack in batch]

    def _load(self, plan: ImagePlan) -> PatchedImage:
        image, label = self.cutter.read(self.dataset[plan.index], plan.index)
        if self.on_size_mismatch == "raise" and image.shape[-2:] != (plan.height, plan.width):
            raise ValueError(
                f"Image {plan.index} has a height of {image.shape[-2]} and a width of {image.shape[-1]} pixels; "
                f"`sizes` of the sampler has {plan.height} and {plan.width}. Sizes are (height, width) of the upright "
                "image, after its EXIF orientation. Pass on_size_mismatch='resize' to resize it to the planned grid."
            )
        return self.cutter.cut(image, plan, label)


def _entry(item: Any, key: str | int, name: str, index: int) -> Any:
    try:
        return item[key]
    except (KeyError, IndexError, TypeError):
        found = f"the keys {sorted(map(str, item))}" if isinstance(item, Mapping) else f"type {type(item).__name__}"
        raise ValueError(f"`{name}` {key!r} is not in item {index}, which has {found}.") from None


def _as_label(label: Any, index: int) -> Tensor:
    try:
        tensor = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(0)
    if tensor.ndim == 0 and tensor.dtype in INTEGER_DTYPES:
        return tensor.long()
    if tensor.is_floating_point() and tensor.ndim <= 1 and tensor.numel():
        return tensor.float()
    raise ValueError(f"The label of item {index} must be an integer, a float or a vector of floats, got {label!r}.")
