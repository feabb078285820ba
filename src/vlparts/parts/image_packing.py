"""Base classes of the image processors that cut images into patches and pack them into one sequence."""

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, SizeDict

from .image_arrays import fetch_images, flat_list_of_images, image_to_array


class ImageArrayProcessor(PilBackend):
    """Image processor of images of any type.

    It takes Pillow images, arrays, tensors, paths and URLs, batches and lists of them, and converts each to 8-bit
    levels first, see [`image_to_array`].
    """

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open the images that are given as paths, URLs or base64 text; others are returned unchanged."""
        return fetch_images(image_url_or_urls)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        return flat_list_of_images(self.fetch_images(images))

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Convert one image to `(C, H, W)` uint8, see [`image_to_array`].

        Raises:
            ValueError: If the image cannot be read, is empty, or has levels or axes of unknown meaning.
        """
        return image_to_array(image, bool(do_convert_rgb), input_data_format)

    def _resize_to(self, image: np.ndarray, size: tuple[int, int], resample: Any) -> np.ndarray:
        """Resize `(C, H, W)`, unless it has the size already."""
        if image.shape[-2:] == size:
            return image
        return self.resize(image, SizeDict(height=size[0], width=size[1]), resample)


class PackedImageProcessor(ImageArrayProcessor):
    """Image processor with options `patch_size` and `merge_size`, whose subclasses define `_target_size`."""

    patch_size: int
    merge_size: int
    grid_options: tuple[str, ...] = ("size", "patch_size", "merge_size", "max_aspect_ratio")
    """Options that decide the size of an image."""

    def _target_size(self, height: int, width: int, options: dict[str, Any]) -> tuple[int, int]:
        """Height and width in pixels that an image is resized to; `options` holds `grid_options`."""
        raise NotImplementedError

    def get_grid_thw(self, height: int, width: int, **images_kwargs: Any) -> tuple[int, int, int]:
        """Frames, rows and columns in patches that an image is cut into.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            **images_kwargs: Options that replace the processor's own.
        """
        given = {name: images_kwargs[name] for name in self.grid_options if images_kwargs.get(name) is not None}
        options = {name: getattr(self, name) for name in self.grid_options} | given
        new_height, new_width = self._target_size(height, width, options)
        return 1, new_height // options["patch_size"], new_width // options["patch_size"]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Number of patches that an image is cut into. Called by inference servers."""
        _, rows, columns = self.get_grid_thw(height, width, **(images_kwargs or {}))
        return rows * columns
