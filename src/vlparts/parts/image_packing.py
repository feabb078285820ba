"""Base class of the image processors that cut images into patches and pack them into one sequence."""

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict


class PackedImageProcessor(PilBackend):
    """Image processor with options `patch_size` and `merge_size`, whose subclasses define `_target_size`."""

    patch_size: int
    merge_size: int
    grid_options: tuple[str, ...] = ("size", "patch_size", "merge_size", "max_aspect_ratio")
    """Options that decide the size of an image."""

    def _target_size(self, height: int, width: int, options: dict[str, Any]) -> tuple[int, int]:
        """Height and width in pixels that an image is resized to; `options` holds `grid_options`."""
        raise NotImplementedError

    def _resize_to(self, image: np.ndarray, size: tuple[int, int], resample: Any) -> np.ndarray:
        """Resize `(C, H, W)`, unless it has the size already."""
        if image.shape[-2:] == size:
            return image
        return self.resize(image, SizeDict(height=size[0], width=size[1]), resample)

    def get_grid_thw(self, height: int, width: int, **images_kwargs: Any) -> tuple[int, int, int]:
        """Frames, rows and columns in patches that an image is cut into.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            **images_kwargs: Options that replace the processor's own.
        """
        options = {name: images_kwargs.get(name) or getattr(self, name) for name in self.grid_options}
        new_height, new_width = self._target_size(height, width, options)
        return 1, new_height // options["patch_size"], new_width // options["patch_size"]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Number of patches that an image is cut into. Called by inference servers."""
        _, rows, columns = self.get_grid_thw(height, width, **(images_kwargs or {}))
        return rows * columns
