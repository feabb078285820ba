"""Collation of packed images to one sequence of patches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...parts.packed_index import get_patch_layout
from ...parts.utils import IGNORE_INDEX, positive_integer
from .packing import PatchedImage


class PackedImageCollator:
    """Concatenates the images of packs to the inputs of [`NaViTModel`].

    With padding, shapes depend on the number of packs only, so that a model is compiled once: `L = packs * capacity`
    rows and `n = packs * max_items` images. Without padding, L and n are those of the images.

    Args:
        capacity: Patches of a pack, as for the sampler.
        max_items: Maximum number of images in a pack, as for the sampler.
        pad: Pad to `capacity` and `max_items`, which are then required.
        merge_size: Side m of the blocks of patches that a consumer merges.
        return_indices: Add the indices of the images in the dataset.
        return_cu_seqlens_cpu: Add `cu_seqlens_cpu`, which saves a device synchronization on accelerators whose
            attention needs lengths on the host. Compiled models do not use it.

    Raises:
        ValueError: If a limit is not a positive integer, or is required and missing.
    """

    def __init__(
        self,
        capacity: int | None = None,
        max_items: int | None = None,
        pad: bool = True,
        merge_size: int = 1,
        return_indices: bool = False,
        return_cu_seqlens_cpu: bool = False,
    ) -> None:
        for name, limit in (("capacity", capacity), ("max_items", max_items)):
            if limit is not None:
                positive_integer(limit, name)
            elif pad:
                raise ValueError(f"`{name}` is required for padding; pass pad=False for sequences without padding.")
        self.capacity, self.max_items, self.pad = capacity, max_items, pad
        self.merge_size = positive_integer(merge_size, "merge_size")
        self.return_indices, self.return_cu_seqlens_cpu = return_indices, return_cu_seqlens_cpu

    def __call__(self, batch: Sequence[PatchedImage] | Sequence[Sequence[PatchedImage]]) -> dict[str, Any]:
        """Collate one pack or several.

        Args:
            batch: A pack, or a list of packs.

        Returns:
            - `pixel_values` `(L, C*P*P)` float32; zeros in padding rows, which are last.
            - `image_grid_thw` `(n, 3)` int64, the full grid of each image; zeros for padding images, which are last.
            - `keep_index` `(L,)` int64: index of each row in the sequence of all patches before token drop, ascending;
              -1 in padding rows. Without padding it is absent if nothing was dropped.
            - `cu_seqlens` int32, cumulative rows: `(n + 2,)` with padding, where the last segment is the padding rows
              (possibly empty) and those of padding images are empty; `(n + 1,)` without padding.
            - `max_seqlen` int: the longest segment without padding; L with padding, a constant bound, so that a
              compiled model is not recompiled.
            - `position_ids` `(L, 2)` int64, row and column of each patch in its image; zeros in padding rows.
            - `image_mask` `(n,)` bool, False for padding images.
            - `labels` `(n,)` int64, or float32 `(n,)` or `(n, num_labels)`; -100 for padding images. Absent if the
              images have no labels.
            - `indices` `(n,)` int64, -1 for padding images; with `return_indices`.
            - `cu_seqlens_cpu`, `cu_seqlens` as a list of integers; with `return_cu_seqlens_cpu`.

        Raises:
            ValueError: If there are neither images nor padding, only some images have labels, labels differ in type or
                shape, or a pack exceeds `capacity` or `max_items`.
        """
        packs = [batch] if batch and isinstance(batch[0], PatchedImage) else batch
        samples: list[PatchedImage] = [sample for pack in packs for sample in self._check_pack(pack)]  # type: ignore
        images = [sample for sample in samples if sample.rows]
        if not samples or not (images or self.pad):
            raise ValueError("`batch` must contain at least one image without padding, got none.")
        rows, count = sum(len(image.patches) for image in images), len(images)
        padding = padding_images = 0
        if self.pad:
            padding = len(packs) * (self.capacity or 0) - rows
            padding_images = len(packs) * (self.max_items or 0) - count
        keep = _keep_index(images)
        grids = torch.tensor([(1, image.rows, image.columns) for image in images], dtype=torch.int64).view(-1, 3)
        inputs: dict[str, Any] = {
            "pixel_values": pad(torch.cat([sample.patches for sample in samples]), (0, 0, 0, padding)),
            "image_grid_thw": pad(grids, (0, 0, 0, padding_images)),
        }
        if self.pad or rows < int(grids.prod(1).sum()):
            inputs["keep_index"] = pad(keep, (0, padding), value=-1)
        layout = get_patch_layout(grids, rows, self.merge_size, keep)
        cu_seqlens = pad(layout.cu_images[: count + 1], (0, padding_images), value=rows)
        inputs["cu_seqlens"] = pad(cu_seqlens, (0, 1), value=rows + padding) if self.pad else cu_seqlens
        longest = max((len(image.patches) for image in images), default=0)
        inputs["max_seqlen"] = rows + padding if self.pad else longest
        inputs["position_ids"] = pad(layout.position_ids, (0, 0, 0, padding))
        inputs["image_mask"] = torch.arange(count + padding_images) < count
        if any(sample.label is not None for sample in samples):
            inputs["labels"] = _stack_labels(samples, padding_images)
        if self.return_indices:
            indices = torch.tensor([image.index for image in images]).long()
            inputs["indices"] = pad(indices, (0, padding_images), value=-1)
        if self.return_cu_seqlens_cpu:
            inputs["cu_seqlens_cpu"] = inputs["cu_seqlens"].tolist()
        return inputs

    def _check_pack(self, pack: Sequence[PatchedImage]) -> Sequence[PatchedImage]:
        patches, items = sum(len(image.patches) for image in pack), sum(image.rows > 0 for image in pack)
        for name, found, limit in (("capacity", patches, self.capacity), ("max_items", items, self.max_items)):
            if limit is not None and found > limit:
                unit = "patches" if name == "capacity" else "images"
                raise ValueError(
                    f"A pack has {found} {unit}, which exceeds `{name}`={limit} of the collator. Pass the sampler and "
                    f"the collator the same `{name}`."
                )
        return pack


def _keep_index(images: list[PatchedImage]) -> Tensor:
    """Index of each patch in the sequence of all patches before token drop."""
    indices, start = [torch.zeros(0, dtype=torch.int64)], 0
    for image in images:
        length = image.rows * image.columns
        indices.append(start + (torch.arange(length) if image.keep is None else image.keep))
        start += length
    return torch.cat(indices)


def _stack_labels(samples: list[PatchedImage], padding_images: int) -> Tensor:
    """Labels of the images, then the ignore index for padding images."""
    missing = [sample.index for sample in samples if sample.label is None]
    if missing:
        raise ValueError(f"Image {missing[0]} has no label, but other images of its batch have one.")
    labels = [sample.label for sample in samples if sample.label is not None]
    types = {f"{label.dtype} of shape {tuple(label.shape)}" for label in labels}
    if len(types) > 1:
        raise ValueError(f"Labels of a batch must have one type and shape, got {' and '.join(sorted(types))}.")
    kept = [label for sample, label in zip(samples, labels, strict=True) if sample.rows]
    return torch.stack(kept + [torch.full_like(labels[0], IGNORE_INDEX)] * padding_images)
