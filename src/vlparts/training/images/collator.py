"""Patches of packed images joined to one sequence."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...parts.packed_index import get_patch_layout
from ...parts.utils import positive_integer
from .packing import IGNORE_LABEL, PatchedImage


class PackedImageCollator:
    """Joins the images of packs to one sequence, in the names that [`NaViTModel`] takes.

    With padding, shapes are the same for every batch of equally many packs, so that a compiled model is compiled
    once: `L = packs * capacity` rows, `n = packs * max_items` examples. Without, they are as large as the images need.

    Args:
        capacity: Patches of a pack; that of the sampler.
        max_items: Largest number of images in a pack; that of the sampler.
        pad: Pad to `capacity` and `max_items`, which must then be given.
        merge_size: Side m of the blocks of patches that a consumer merges.
        return_indices: Add the images' indices in the dataset.
        return_bounds: Add `segment_bounds`, with which accelerators whose attention wants lengths on the host do not
            wait for them. Compiled models do not look at it.

    Raises:
        ValueError: If a limit is not positive, or is needed and missing.
    """

    def __init__(
        self,
        capacity: int | None = None,
        max_items: int | None = None,
        pad: bool = True,
        merge_size: int = 1,
        return_indices: bool = False,
        return_bounds: bool = False,
    ) -> None:
        for name, limit in (("capacity", capacity), ("max_items", max_items)):
            if limit is not None:
                positive_integer(limit, name)
            elif pad:
                raise ValueError(f"`{name}` is needed to pad to it; pass pad=False for sequences of their own length.")
        self.capacity, self.max_items, self.pad = capacity, max_items, pad
        self.merge_size = positive_integer(merge_size, "merge_size")
        self.return_indices, self.return_bounds = return_indices, return_bounds

    def __call__(self, batch: Sequence[PatchedImage] | Sequence[Sequence[PatchedImage]]) -> dict[str, Any]:
        """Join one pack or several.

        Args:
            batch: A pack, or packs.

        Returns:
            - `pixel_values` `(L, C*P*P)` float32; zeros in padding rows, which are last.
            - `image_grid_thw` `(n, 3)` int64, the full grid of each image; zeros for padding examples, which are last.
            - `keep_index` `(L,)` int64: the place of each row in the sequence of all patches of all images before any
              was dropped, ascending; -1 in padding rows. Without padding it is absent if nothing was dropped.
            - `cu_seqlens` int32, cumulative rows: `(n + 2,)` with padding, whose last segment holds the padding rows
              and may be empty, as the segments of padding examples are; `(n + 1,)` without.
            - `max_seqlen` int: the longest segment. With padding L, which bounds every segment and never changes, so
              that a compiled model is not compiled again.
            - `position_ids` `(L, 2)` int64, row and column of each patch in its image; zeros in padding rows.
            - `image_mask` `(n,)` bool, True for images and False for padding examples.
            - `labels` `(n,)` int64, or float32 `(n,)` or `(n, num_labels)` as the labels are, if the dataset gives
              them; -100 for padding examples.
            - `indices` `(n,)` int64, -1 for padding examples; if asked for.
            - `segment_bounds`, the numbers of `cu_seqlens` as a list of integers; if asked for.

        Raises:
            ValueError: If there are no images and no padding, if only some images have labels or labels differ in
                kind, or if a pack exceeds `capacity` or `max_items`.
        """
        packs = [batch] if batch and isinstance(batch[0], PatchedImage) else batch
        samples: list[PatchedImage] = [sample for pack in packs for sample in self._checked(pack)]  # type: ignore
        images = [sample for sample in samples if sample.rows]
        if not samples or not (images or self.pad):
            raise ValueError("The batch holds no image, so without padding there is nothing to join.")
        rows, examples = sum(len(image.patches) for image in images), len(images)
        padding = blanks = 0
        if self.pad:
            padding = len(packs) * (self.capacity or 0) - rows
            blanks = len(packs) * (self.max_items or 0) - examples
        keep = _keep_index(images)
        grids = torch.tensor([(1, image.rows, image.columns) for image in images], dtype=torch.int64).view(-1, 3)
        inputs: dict[str, Any] = {
            "pixel_values": pad(torch.cat([sample.patches for sample in samples]), (0, 0, 0, padding)),
            "image_grid_thw": pad(grids, (0, 0, 0, blanks)),
        }
        if self.pad or rows < int(grids.prod(1).sum()):
            inputs["keep_index"] = pad(keep, (0, padding), value=-1)
        layout = get_patch_layout(grids, rows, self.merge_size, keep)
        cu_seqlens = pad(layout.cu_images[: examples + 1], (0, blanks), value=rows)
        inputs["cu_seqlens"] = pad(cu_seqlens, (0, 1), value=rows + padding) if self.pad else cu_seqlens
        longest = max((len(image.patches) for image in images), default=0)
        inputs["max_seqlen"] = rows + padding if self.pad else longest
        inputs["position_ids"] = pad(layout.position_ids, (0, 0, 0, padding))
        inputs["image_mask"] = torch.arange(examples + blanks) < examples
        if any(sample.label is not None for sample in samples):
            inputs["labels"] = _labels(samples, blanks)
        if self.return_indices:
            inputs["indices"] = pad(torch.tensor([image.index for image in images]).long(), (0, blanks), value=-1)
        if self.return_bounds:
            inputs["segment_bounds"] = inputs["cu_seqlens"].tolist()
        return inputs

    def _checked(self, pack: Sequence[PatchedImage]) -> Sequence[PatchedImage]:
        patches, items = sum(len(image.patches) for image in pack), sum(image.rows > 0 for image in pack)
        for name, found, limit in (("capacity", patches, self.capacity), ("max_items", items, self.max_items)):
            if limit is not None and found > limit:
                what = "patches" if name == "capacity" else "images"
                raise ValueError(
                    f"A pack has {found} {what}, which exceeds {name}={limit} of the collator. Give sampler and "
                    f"collator the same {name}."
                )
        return pack


def _keep_index(images: list[PatchedImage]) -> Tensor:
    """Place of each patch in the sequence of all patches before any was dropped."""
    places, start = [torch.zeros(0, dtype=torch.int64)], 0
    for image in images:
        length = image.rows * image.columns
        places.append(start + (torch.arange(length) if image.keep is None else image.keep))
        start += length
    return torch.cat(places)


def _labels(samples: list[PatchedImage], blanks: int) -> Tensor:
    """Labels of the images, then -100 for each padding example."""
    missing = [sample.index for sample in samples if sample.label is None]
    if missing:
        raise ValueError(f"Image {missing[0]} has no label, but others of its batch have.")
    labels = [sample.label for sample in samples if sample.label is not None]
    kinds = {f"{label.dtype} of shape {tuple(label.shape)}" for label in labels}
    if len(kinds) > 1:
        raise ValueError(f"The labels of a batch must be of one type and shape, got {' and '.join(sorted(kinds))}.")
    kept = [label for sample, label in zip(samples, labels, strict=True) if sample.rows]
    return torch.stack(kept + [torch.full_like(labels[0], IGNORE_LABEL)] * blanks)
