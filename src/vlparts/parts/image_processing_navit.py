"""Image processor of [`NaViTModel`]: images to packed patches, with Pillow and NumPy."""

from typing import Any

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from .image_packing import PackedImageProcessor
from .image_pixels import patchify
from .image_transforms import fit_to_grid, get_area_limits
from .redundant_patches import check_redundancy_options, find_redundant, get_blocks, get_kept_patches


class NaViTImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`NaViTImageProcessor`] in addition to those of every image processor."""

    patch_size: int
    merge_size: int
    max_aspect_ratio: float
    on_extreme_aspect: str
    drop_redundant_patches: bool
    redundancy_tolerance: int
    token_budget: int | None


class NaViTImageProcessor(PackedImageProcessor):
    """Image processor that cuts images of any size into patches and packs them into one sequence.

    An image is resized, keeping its aspect ratio, only so that its sides are multiples of `patch_size * merge_size`
    and its area is between `size["shortest_edge"]` and `size["longest_edge"]` (areas in pixels, as in the Qwen-VL
    processors). Patches are in reading order of blocks of `merge_size` x `merge_size` patches.

    Images are Pillow images, arrays, tensors, paths or URLs, and are converted to 8 bits first, see
    [`image_to_array`]: the same picture gives the same pixels whatever its type.

    Args:
        patch_size: Side P of a patch in pixels.
        merge_size: Side m of the block of patches that a projector merges into one token.
        size: Smallest and largest area in pixels, with the keys "shortest_edge" and "longest_edge".
        max_aspect_ratio: Largest ratio of the longer to the shorter side.
        on_extreme_aspect: "raise" a ValueError beyond `max_aspect_ratio`, or "clamp" to stretch the image to it.
        drop_redundant_patches: Whether blocks of patches that repeat a neighbour (flat paper, borders, screens) are
            left out, before anything is computed from them; see `redundant_patches`. The result then has `keep_index`
            `(L,)` int64, which [`NaViTModel`] takes.
        redundancy_tolerance: Largest difference of a pixel, from 0 to 255, between a dropped block and the kept block
            that replaces it.
        token_budget: Number of blocks of an image that are kept, those which differ most from their neighbours, in
            place of a tolerance.
        **kwargs: `do_resize`, `resample`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`, `image_std`,
            `do_convert_rgb`, as in every image processor.
    """

    do_resize = True
    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 16 * 16, "longest_edge": 1024 * 1024}
    default_to_square = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_convert_rgb = True
    patch_size = 16
    merge_size = 1
    max_aspect_ratio = 200.0
    on_extreme_aspect = "raise"
    drop_redundant_patches = False
    redundancy_tolerance = 0
    token_budget = None
    grid_options = (*PackedImageProcessor.grid_options, "on_extreme_aspect")
    valid_kwargs = NaViTImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        tolerance, budget = kwargs["redundancy_tolerance"], kwargs["token_budget"]
        if kwargs["drop_redundant_patches"]:
            check_redundancy_options(tolerance, budget)
        elif tolerance or budget is not None:
            raise ValueError(
                "`drop_redundant_patches` must be True for `redundancy_tolerance` and `token_budget`, got "
                f"{tolerance} and {budget} without it."
            )
        if not kwargs["do_normalize"] or kwargs["do_rescale"]:
            return
        mean, std = (np.max(kwargs[name]) for name in ("image_mean", "image_std"))
        if mean <= 1 and std < 1:
            raise ValueError(
                f"`do_rescale` is False, so the levels are from 0 to 255, but `image_mean` {kwargs['image_mean']} and "
                f"`image_std` {kwargs['image_std']} are for levels from 0 to 1. Images of any type, "
                "also floats from 0 to 1, are rescaled with do_rescale=True."
            )

    def _target_size(self, height: int, width: int, options: dict[str, Any]) -> tuple[int, int]:
        shortest, longest = get_area_limits(options["size"])
        return fit_to_grid(
            height,
            width,
            options["patch_size"] * options["merge_size"],
            min_pixels=shortest,
            max_pixels=longest,
            max_aspect_ratio=options["max_aspect_ratio"],
            on_extreme_aspect=options["on_extreme_aspect"],
        )

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        patch_size: int,
        merge_size: int,
        max_aspect_ratio: float,
        on_extreme_aspect: str,
        drop_redundant_patches: bool,
        redundancy_tolerance: int,
        token_budget: int | None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        options = {
            "size": size,
            "patch_size": patch_size,
            "merge_size": merge_size,
            "max_aspect_ratio": max_aspect_ratio,
            "on_extreme_aspect": on_extreme_aspect,
        }
        if not images:
            raise ValueError("`images` is empty; expected at least one image.")
        packed, grids, kept, start = [], [], [], 0
        for image in images:
            if do_resize:
                height, width = image.shape[-2:]
                image = self._resize_to(image, self._target_size(height, width, options), resample)
            levels = image
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            patches, grid = patchify(image[None], patch_size, merge_size)
            if drop_redundant_patches:
                keep, _ = find_redundant(
                    get_blocks(levels, patch_size * merge_size), redundancy_tolerance, token_budget
                )
                index = get_kept_patches(keep, merge_size)
                kept.append(index + start)
                start, patches = start + len(patches), patches[index]
            packed.append(patches.astype(np.float32, copy=False))
            grids.append(grid)
        data = {"pixel_values": np.concatenate(packed), "image_grid_thw": np.array(grids, dtype=np.int64)}
        if drop_redundant_patches:
            data["keep_index"] = np.concatenate(kept)
        return BatchFeature(data=data, tensor_type=return_tensors)


__all__ = ["NaViTImageProcessor"]
