"""Image processor that cuts an image into overlapping tiles of one size, as POINTS1.0 does (arXiv 2409.04828)."""

from typing import Any, NamedTuple

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .image_packing import ImageArrayProcessor
from .utils import positive_integer

_EXTREME_ASPECTS = ("raise", "clamp")


class CattyImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`CattyImageProcessor`] in addition to those of every image processor."""

    tile_size: int
    max_tiles: int
    on_extreme_aspect: str


class CattyPlan(NamedTuple):
    """Sizes and tiles of an image.

    Attributes:
        clamped: Height and width in pixels after the aspect ratio is limited; those of the image if it is not extreme.
        grid: Rows and columns of tiles.
        resized: Height and width in pixels of the image that the tiles are cut from.
    """

    clamped: tuple[int, int]
    grid: tuple[int, int]
    resized: tuple[int, int]


class CattyImageProcessor(ImageArrayProcessor):
    """Image processor of POINTS1.0: consistent aspect ratio dynamic high resolution, CATTY (arXiv 2409.04828).

    An image is resized with its aspect ratio kept, so that a grid of tiles covers it, see [`plan_tiles`]. The tiles
    overlap where the image is narrower than the grid. The views of an image are its tiles, row after row, and then all
    of the resized image in one tile, which is the only view with another aspect ratio. Steps are whole pixels: of n
    tiles in a row or column, up to n - 2 pixels at the right or lower edge are in that last view only.

    The output holds `pixel_values` `(views, 3, tile_size, tile_size)` float32, for vision encoders of images of one
    size, and `image_tile_grid` `(n, 2)` int64, rows and columns of tiles of each image, by which a composed model puts
    the views of an image together.

    Args:
        tile_size: Side of a tile in pixels, the image size of the vision encoder.
        max_tiles: Largest number of tiles of an image. The published programs have 8 for answers and 12 in a helper;
            that of the training is not published.
        on_extreme_aspect: "raise" a ValueError if one side is more than `max_tiles` times the other, or "clamp" to
            shrink that side to this ratio, as the published answers do.
        **kwargs: `resample`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`, `image_std`,
            `do_convert_rgb`, as in every image processor.
    """

    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    tile_size = 336
    max_tiles = 8
    on_extreme_aspect = "raise"
    valid_kwargs = CattyImageProcessorKwargs
    model_input_names = ["pixel_values", "image_tile_grid"]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs | {"do_resize": None})  # that would need `size`
        for name in ("tile_size", "max_tiles"):
            positive_integer(kwargs[name], name)
        if kwargs["on_extreme_aspect"] not in _EXTREME_ASPECTS:
            raise ValueError(
                f"`on_extreme_aspect` must be one of {', '.join(_EXTREME_ASPECTS)}, got "
                f"{kwargs['on_extreme_aspect']!r}."
            )
        if kwargs["do_resize"] is False:
            raise ValueError("`do_resize` must be True, got False: tiles have a fixed size.")
        given = [name for name in ("size", "crop_size", "do_center_crop", "do_pad") if kwargs[name]]
        if given:
            raise ValueError(f"`{given[0]}` must be unset, got {kwargs[given[0]]}: the size of a tile is `tile_size`.")

    def _preprocess(
        self,
        images: list[np.ndarray],
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        tile_size: int,
        max_tiles: int,
        on_extreme_aspect: str,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if not images:
            raise ValueError("`images` is empty; expected at least one image.")
        pixels, grids = [], []
        for image in images:
            height, width = image.shape[-2:]
            plan = plan_tiles(height, width, tile_size, max_tiles, on_extreme_aspect)
            for size in (plan.clamped, plan.resized):
                image = self._resize_to(image, size, resample)
            views = cut_tiles(image, plan.grid, tile_size)
            views.append(self._resize_to(image, (tile_size, tile_size), resample))
            for view in views:
                if do_rescale:
                    view = self.rescale(view, rescale_factor)
                if do_normalize:
                    view = self.normalize(view, image_mean, image_std)
                pixels.append(view.astype(np.float32, copy=False))
            grids.append(plan.grid)
        data = {"pixel_values": np.stack(pixels), "image_tile_grid": np.array(grids, dtype=np.int64)}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def get_tile_grid(self, height: int, width: int, **images_kwargs: Any) -> tuple[int, int]:
        """Rows and columns of tiles that an image is cut into.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            **images_kwargs: Options that replace the processor's own.
        """
        names = ("tile_size", "max_tiles", "on_extreme_aspect")
        options = {name: images_kwargs.get(name, getattr(self, name)) for name in names}
        return plan_tiles(height, width, **options).grid

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Number of views of an image, each a row of `pixel_values`. Called by inference servers."""
        rows, columns = self.get_tile_grid(height, width, **(images_kwargs or {}))
        return rows * columns + 1


def plan_tiles(height: int, width: int, tile_size: int, max_tiles: int, on_extreme_aspect: str = "raise") -> CattyPlan:
    """Choose the grid of tiles of an image and the size that it is resized to.

    Of all grids of at most `max_tiles` tiles, it is the one that is at least as elongated as the image and has the
    nearest aspect ratio; of grids of one ratio, the one with the area nearest to that of the image. The shorter side
    of the image becomes that of the grid; the longer one, rounded down, is at most that of the grid.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        tile_size: Side of a tile in pixels.
        max_tiles: Largest number of tiles.
        on_extreme_aspect: "raise" or "clamp", see [`CattyImageProcessor`].

    Raises:
        ValueError: If the aspect ratio is extreme and is not to be clamped.
    """
    if max(height, width) > max_tiles * min(height, width):
        if on_extreme_aspect == "raise":
            raise ValueError(
                f"The image of {width} x {height} pixels has an aspect ratio of more than `max_tiles`={max_tiles}; "
                "expected a smaller one, or on_extreme_aspect='clamp' to shrink its longer side."
            )
        height, width = min(height, max_tiles * width), min(width, max_tiles * height)
    ratio = width / height
    grids = [
        (count // columns, columns)
        for count in range(1, max_tiles + 1)
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    if width < height:
        grids = [(rows, columns) for rows, columns in grids if columns / rows <= ratio]
    elif width > height:
        grids = [(rows, columns) for rows, columns in grids if columns / rows >= ratio]
    area = (width / tile_size) * (height / tile_size)
    rows, columns = min(grids, key=lambda grid: (abs(grid[1] / grid[0] - ratio), abs(grid[0] * grid[1] - area)))
    resized_height, resized_width = rows * tile_size, columns * tile_size
    if width < height:
        resized_height = int(height / width * resized_width)
    else:
        resized_width = int(ratio * resized_height)
    return CattyPlan((height, width), (rows, columns), (resized_height, resized_width))


def cut_tiles(image: np.ndarray, grid: tuple[int, int], tile_size: int) -> list[np.ndarray]:
    """Cut `(C, H, W)` into tiles `(C, tile_size, tile_size)`, row after row, at equal steps of whole pixels."""
    tops, lefts = (
        [index * ((side - tile_size) // max(1, count - 1)) for index in range(count)]
        for side, count in zip(image.shape[-2:], grid, strict=True)
    )
    return [image[:, top : top + tile_size, left : left + tile_size] for top in tops for left in lefts]


__all__ = ["CattyImageProcessor"]
