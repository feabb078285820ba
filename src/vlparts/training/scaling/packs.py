"""What a pack holds: samples, images, and how many rows each module of a model computes for it.

Shapes: T tokens of a pack, L patches, m side of a merge block.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...parts.configuration_deepencoder import PATCHES_PER_TOKEN, DeepEncoderConfig
from ...parts.packed_windows import get_windows
from ...parts.vlm_features import get_square_grid, get_vision_tower, pixel_layout
from ...parts.vlm_views import count_view_tokens


@dataclass(frozen=True)
class Pack:
    """A full pack of samples of one length, each with the same number of images of one size.

    Args:
        tokens: Tokens T, image tokens included.
        sample_tokens: Tokens of a sample, image tokens included.
        images: Images of the pack.
        grid: Rows and columns of an image in patches.
        image_tokens: Tokens of an image.
    """

    tokens: int
    sample_tokens: float
    images: float
    grid: tuple[int, int]
    image_tokens: int

    @property
    def samples(self) -> float:
        """Number of samples."""
        return self.tokens / self.sample_tokens

    @property
    def patches(self) -> float:
        """Patches L of all images."""
        return self.images * math.prod(self.grid)


def make_pack(
    model: Any, capacity: int, sample_tokens: float, images_per_sample: float, image_size: tuple[int, int]
) -> Pack:
    """Describe a full pack of a composed model.

    Args:
        model: The model.
        capacity: Tokens of a pack; at least those of a sample.
        sample_tokens: Mean tokens of a sample, image tokens included.
        images_per_sample: Mean number of images of a sample.
        image_size: Mean width and height of an image in pixels; encoders of images of one size resize to theirs.

    Raises:
        ValueError: If a sample does not fit into a pack, or its images do not fit into it.
    """
    grid = patch_grid(model, image_size)
    image_tokens = tokens_of_image(model, grid)
    if sample_tokens > capacity:
        raise ValueError(f"`sample_tokens` must be at most `capacity`, {capacity}, got {sample_tokens:g}.")
    if images_per_sample * image_tokens > sample_tokens:
        raise ValueError(
            f"`sample_tokens` must be at least the {images_per_sample * image_tokens:g} image tokens of a sample "
            f"({image_tokens} for each image of {image_size[0]}x{image_size[1]} pixels), got {sample_tokens:g}."
        )
    return Pack(capacity, sample_tokens, images_per_sample * capacity / sample_tokens, grid, image_tokens)


def patch_grid(model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of an image in patches.

    Encoders of images of any size round each side to whole blocks of m patches, at least one. Others have the size of
    their configuration.
    """
    encoder, config = model.model.vision_tower, model.config.vision_config
    if pixel_layout(encoder) == "square":
        size = getattr(config, "image_size", None) or config.general_config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return get_square_grid(encoder, height, width)
    block = PATCHES_PER_TOKEN if isinstance(config, DeepEncoderConfig) else model.config.merge_size
    side = config.patch_size * block
    width, height = image_size
    return max(1, round(height / side)) * block, max(1, round(width / side)) * block


def tokens_of_image(model: Any, grid: tuple[int, int]) -> int:
    """Tokens of an image: one for each block of m x m patches; DeepEncoder ends rows and the image with one more.

    Where the model reduces its tokens, those that are left.
    """
    rows, columns = grid
    reduction = model.config.reduction
    if isinstance(model.config.vision_config, DeepEncoderConfig):
        tokens = [rows // PATCHES_PER_TOKEN, columns // PATCHES_PER_TOKEN]
        return count_view_tokens((0, 0), (0, 0), tokens, reduction)
    merge_size = int(model.config.merge_size)
    if reduction is None:
        return rows * columns // merge_size**2
    return reduction.count_tokens(rows // merge_size, columns // merge_size)


def vision_rows(model: Any, name: str, pack: Pack) -> float:
    """Rows of a pack in a module of the vision tower, by its name in the tower.

    The L patches, and the prefix tokens of every image. DeepEncoder's second half sees a sixteenth of the patches, and
    a merger that belongs to the tower L / m^2 blocks.
    """
    encoder, config = model.model.vision_tower, model.config.vision_config
    if isinstance(config, DeepEncoderConfig):
        if name.startswith("clip."):
            return pack.patches / PATCHES_PER_TOKEN**2 + pack.images
        strides = {"sam.compress1": 2, "sam.compress2": PATCHES_PER_TOKEN}
        return pack.patches / strides.get(name, 1) ** 2
    if "merger" in name:
        return pack.patches / int(model.config.merge_size) ** 2
    prefix = getattr(getattr(encoder, "prefix", None), "count", None) or get_vision_tower(encoder).prefix(config)
    return pack.patches + pack.images * int(prefix)


def vision_pairs(model: Any, name: str, index: int, pack: Pack) -> float:
    """Pairs of queries and keys of a pack in a layer of the vision tower: the sum of squares of its segments.

    A segment is an image, or a window where the layer has windows (of the windows of native encoders nothing is known
    here: they count as images, and their attention is counted too high).

    Args:
        model: The model.
        name: Name of the layer in the tower.
        index: Its index among the layers of its list.
        pack: The pack.
    """
    config, (rows, columns) = model.config.vision_config, pack.grid
    if isinstance(config, DeepEncoderConfig) and name.startswith("sam.") and index not in config.sam_global_layers:
        side = config.sam_window_size  # windows are padded
        return pack.images * -(-rows // side) * -(-columns // side) * float(side) ** 4
    if getattr(config, "window_blocks", None) is not None and config.has_windows(index):
        grid, merge = torch.tensor([[1, rows, columns]]), config.spatial_merge_size
        lengths = get_windows(grid, config.window_blocks, merge).cu_seqlens.diff()
        return pack.images * float(lengths.double().square().sum())
    return pack.images * (vision_rows(model, name, pack) / max(pack.images, 1e-9)) ** 2
