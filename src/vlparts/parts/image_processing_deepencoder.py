"""Image processor of [`DeepEncoderModel`]: an image to views (tiles, then the whole image), in packed patches."""

import math
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

from .configuration_deepencoder import PATCHES_PER_TOKEN
from .image_packing import ImageArrayProcessor
from .image_pixels import patchify
from .token_reduction_types import TokenReduction
from .utils import positive_integer
from .vlm_views import count_view_tokens

# arXiv 2510.18234, table 1. Without tiles, small views are resized to a square, large ones padded to it.
MODES: dict[str, dict[str, Any]] = {
    "tiny": {"base_size": 512, "do_pad": False, "do_tile": False},
    "small": {"base_size": 640, "do_pad": False, "do_tile": False},
    "base": {"base_size": 1024, "do_pad": True, "do_tile": False},
    "large": {"base_size": 1280, "do_pad": True, "do_tile": False},
    "gundam": {"base_size": 1024, "do_pad": True, "do_tile": True, "tile_size": 640},
    "gundam_m": {"base_size": 1280, "do_pad": True, "do_tile": True, "tile_size": 1024},
}
_SIDES = ("tile_size", "base_size")


class DeepEncoderImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`DeepEncoderImageProcessor`] in addition to those of every image processor."""

    mode: str | None
    base_size: int
    do_tile: bool
    tile_size: int
    min_tiles: int
    max_tiles: int
    untiled_size: int
    padding_color: list[int] | tuple[int, ...]
    patch_size: int


class DeepEncoderImageProcessor(ImageArrayProcessor):
    """Image processor that cuts an image into views as DeepSeek-OCR does (arXiv 2510.18234, section 3.2.2).

    The last view of an image is the whole image, in a square of `base_size` pixels. With `do_tile`, an image with a
    side of more than `untiled_size` pixels is also resized to a grid of tiles, see [`choose_tiles`]; the tiles come
    first, row after row. The views are cut into patches, row after row, which are packed into one sequence.

    The output holds `pixel_values` `(L, 3*P*P)` float32; `image_grid_thw` `(views, 3)` int64, 1, and the rows and
    columns of each view in patches; and `image_tile_grid` `(n, 2)` int64, rows and columns of tiles of each image, 0
    and 0 without tiles.

    Args:
        mode: "tiny", "small", "base", "large", "gundam" or "gundam_m": values for `base_size`, `do_pad`, `do_tile` and
            `tile_size`, which replace the defaults; options that are given replace those of the mode. None for the
            defaults.
        base_size: Side of the view of the whole image in pixels; a multiple of `4 * patch_size`.
        do_pad: Whether the whole image keeps its aspect ratio and is padded to the square, or is resized to it.
        do_tile: Whether large images are also cut into tiles.
        tile_size: Side of a tile in pixels; a multiple of `4 * patch_size`.
        min_tiles: Smallest number of tiles.
        max_tiles: Largest number of tiles. The paper has 9, one of the published programs 6.
        untiled_size: Images of at most this many pixels on both sides are not tiled; 640 for every `tile_size` in the
            published programs.
        padding_color: Color (red, green, blue) of the padding.
        patch_size: Side P of a patch in pixels.
        **kwargs: `resample`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`, `image_std`,
            `do_convert_rgb`, as in every image processor.
    """

    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_convert_rgb = True
    do_pad = True
    mode = "gundam"
    base_size = 1024
    do_tile = True
    tile_size = 640
    min_tiles = 2
    max_tiles = 9
    untiled_size = 640
    padding_color = [127, 127, 127]
    patch_size = 16
    valid_kwargs = DeepEncoderImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw", "image_tile_grid"]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**_with_mode(kwargs))
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from saved options, and options that replace them, of which those of a `mode` are some."""
        return super().from_dict(image_processor_dict, **_with_mode(kwargs))

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Cut images into views; see the class for options and output.

        Args:
            images: A Pillow image, an array or tensor, or a list.
            *args: As in every image processor.
            **kwargs: `return_tensors`, and options that replace the processor's own.

        Raises:
            ValueError: If an image cannot be read, or an option is invalid.
        """
        return super().preprocess(images, *args, **_with_mode(kwargs))

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs | {"do_resize": None, "do_pad": None})  # these would need `size`
        for name in ("base_size", "tile_size", "min_tiles", "max_tiles", "patch_size"):
            positive_integer(kwargs[name], name)
        for name in ("base_size", "tile_size"):
            if kwargs[name] % (PATCHES_PER_TOKEN * kwargs["patch_size"]):
                raise ValueError(
                    f"`{name}` must be a multiple of {PATCHES_PER_TOKEN} * patch_size = "
                    f"{PATCHES_PER_TOKEN * kwargs['patch_size']}, got {kwargs[name]}."
                )
        if kwargs["min_tiles"] > kwargs["max_tiles"]:
            raise ValueError(
                f"`min_tiles` must be at most `max_tiles`, got {kwargs['min_tiles']} and {kwargs['max_tiles']}."
            )
        color = kwargs["padding_color"]
        if len(color) != 3 or any(not isinstance(one, int) or not 0 <= one <= 255 for one in color):
            raise ValueError(f"`padding_color` must be three integers from 0 to 255, got {color}.")
        if kwargs["do_resize"] is False:
            raise ValueError("`do_resize` must be True, got False: views have fixed sizes.")

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, *args: Any, **kwargs: Any) -> np.ndarray:
        """Convert one image to `(3, H, W)` uint8, see [`image_to_array`].

        Raises:
            ValueError: If an image cannot be read, is not RGB, or has levels or axes of unknown meaning.
        """
        array = super().process_image(image, do_convert_rgb, *args, **kwargs)
        if array.shape[0] != 3:
            raise ValueError(f"The image has {array.shape[0]} channels; expected 3. Pass do_convert_rgb=True.")
        return array

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_pad: bool,
        do_tile: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        return_tensors: Any = None,
        **options: Any,
    ) -> BatchFeature:
        if not images:
            raise ValueError("`images` is empty; expected at least one image.")
        packed, grids, tile_grids = [], [], []
        for image in images:
            rows, columns = self.get_tile_grid(*image.shape[-2:], do_tile=do_tile, **options)
            tile_grids.append((rows, columns))
            views = self._cut_tiles(image, rows, columns, options) if rows else []
            for view in [*views, self._fit_whole(image, do_pad, options)]:
                if do_rescale:
                    view = self.rescale(view, rescale_factor)
                if do_normalize:
                    view = self.normalize(view, image_mean, image_std)
                patches, grid = patchify(view[None], options["patch_size"])
                packed.append(patches.astype(np.float32, copy=False))
                grids.append(grid)
        data = {
            "pixel_values": np.concatenate(packed),
            "image_grid_thw": np.array(grids, dtype=np.int64),
            "image_tile_grid": np.array(tile_grids, dtype=np.int64),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _cut_tiles(self, image: np.ndarray, rows: int, columns: int, options: dict[str, Any]) -> list[np.ndarray]:
        """Resize `(3, H, W)` to a grid of tiles, without keeping its aspect ratio, and cut it, row after row."""
        side = options["tile_size"]
        size = SizeDict(height=rows * side, width=columns * side)
        resized = self.resize(image, size, options["resample"])
        return [tile for row in np.split(resized, rows, axis=1) for tile in np.split(row, columns, axis=2)]

    def _fit_whole(self, image: np.ndarray, do_pad: bool, options: dict[str, Any]) -> np.ndarray:
        """Resize `(3, H, W)` to the view of the whole image, with or without padding around it."""
        side = options["base_size"]
        if not do_pad:
            return self.resize(image, SizeDict(height=side, width=side), options["resample"])
        height, width = fit_into_square(image.shape[-2], image.shape[-1], side)
        top, left = round((side - height) / 2), round((side - width) / 2)
        view = np.empty((3, side, side), dtype=image.dtype)
        view[:] = np.array(options["padding_color"], dtype=image.dtype)[:, None, None]
        resized = self.resize(image, SizeDict(height=height, width=width), options["resample"])
        view[:, top : top + height, left : left + width] = resized
        return view

    def _get_options(self, changes: dict[str, Any]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._valid_kwargs_names} | _with_mode(changes)

    def get_tile_grid(self, height: int, width: int, **images_kwargs: Any) -> tuple[int, int]:
        """Rows and columns of tiles that an image is cut into; 0 and 0 for none.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            **images_kwargs: Options that replace the processor's own.
        """
        options = self._get_options(images_kwargs)
        if not options["do_tile"] or max(height, width) <= options["untiled_size"]:
            return 0, 0
        return choose_tiles(height, width, options["tile_size"], options["min_tiles"], options["max_tiles"])

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Number of patches of all views of an image. Called by inference servers."""
        options = self._get_options(images_kwargs or {})
        rows, columns = self.get_tile_grid(height, width, **options)
        pixels = rows * columns * options["tile_size"] ** 2 + options["base_size"] ** 2
        return pixels // options["patch_size"] ** 2

    def get_number_of_image_tokens(
        self,
        height: int,
        width: int,
        images_kwargs: dict[str, Any] | None = None,
        reduction: TokenReduction | None = None,
    ) -> int:
        """Number of tokens of an assembled image, with newlines and separator. Called by inference servers."""
        options = self._get_options(images_kwargs or {})
        tile, whole = ([options[name] // options["patch_size"] // PATCHES_PER_TOKEN] * 2 for name in _SIDES)
        return count_view_tokens(self.get_tile_grid(height, width, **options), tile, whole, reduction)

    def count_tokens(self, image_inputs: Any, index: int, reduction: TokenReduction | None = None) -> int:
        """Number of tokens of one assembled image of an output of this processor, reduced if so."""
        tiles = [[int(side) for side in grid] for grid in image_inputs["image_tile_grid"]]
        first = sum(rows * columns + 1 for rows, columns in tiles[:index])
        last = first + tiles[index][0] * tiles[index][1]
        tile, whole = (
            [int(side) // PATCHES_PER_TOKEN for side in image_inputs["image_grid_thw"][view][1:]]
            for view in (first, last)
        )
        return count_view_tokens(tiles[index], tile, whole, reduction)

    def get_number_of_valid_tokens(self, height: int, width: int, **images_kwargs: Any) -> int:
        """Number of tokens of an image that are not padding (arXiv 2510.18234, equation 1), as the paper counts them.

        Tokens of tiles are all valid, as are those of a whole image that is not padded.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            **images_kwargs: Options that replace the processor's own.
        """
        options = self._get_options(images_kwargs)
        rows, columns = self.get_tile_grid(height, width, **options)
        tile, whole = (
            (options[name] // options["patch_size"] // PATCHES_PER_TOKEN) ** 2 for name in ("tile_size", "base_size")
        )
        if options["do_pad"]:
            whole = -(-whole * min(height, width) // max(height, width))
        return rows * columns * tile + whole


def choose_tiles(height: int, width: int, tile_size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Choose the grid of tiles whose aspect ratio is nearest to that of an image.

    Of several equally near grids, the one with more tiles is taken if the image has more than half of its pixels.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        tile_size: Side of a tile in pixels.
        min_tiles: Smallest number of tiles.
        max_tiles: Largest number of tiles.

    Returns:
        Rows and columns.
    """
    grids = [
        (columns, count // columns)
        for count in range(min_tiles, max_tiles + 1)
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    best, nearest = (0, 0), math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        if distance < nearest or (distance == nearest and width * height > 0.5 * tile_size**2 * columns * rows):
            best, nearest = (rows, columns), distance
    return best


def fit_into_square(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of an image that is scaled to fit into a square, as `PIL.ImageOps.contain` computes them."""
    if width > height:
        return max(1, round(height / width * side)), side
    return side, max(1, round(width / height * side))


def _with_mode(options: dict[str, Any]) -> dict[str, Any]:
    """Add the options of a mode to those that were given, which replace them."""
    mode = options.get("mode")
    if mode is None:
        return options
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, or None, got {mode!r}.")
    return MODES[mode] | options


__all__ = ["DeepEncoderImageProcessor"]
