"""Windows of a packed sequence: blocks of patches in an order in which those of a window are consecutive.

Shapes: `L` patches of all images, `m` side of a merge block, `B = L / m^2` merge blocks.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from .packed_index import repeat_indices
from .utils import positive_integer


class Windows(NamedTuple):
    """Windows of packed images.

    Attributes:
        order: `(B,)` int64 index of the merge block at each position of window order.
        inverse: `(B,)` int64 inverse permutation: the position in window order of each merge block.
        cu_seqlens: `(windows + 1,)` int32 cumulative patch counts of the windows.
    """

    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor


def get_windows(
    image_grid_thw: Tensor, window_blocks: int, spatial_merge_size: int = 1, num_patches: int | None = None
) -> Windows:
    """Divide each frame into windows of w x w merge blocks, in reading order; those at the edges may be smaller.

    The order is that of Qwen2.5-VL (arXiv 2502.13923, section 2.1.1), in closed form: without padding, sorting, or
    synchronizing with the device.

    Args:
        image_grid_thw: `(n, 3)` int64 frames, rows and columns in patches.
        window_blocks: Side w of a window in merge blocks.
        spatial_merge_size: Side m of a merge block in patches; it divides rows and columns.
        num_patches: L if known; exporting a program needs it.

    Raises:
        ValueError: If a size is not positive.
    """
    window = positive_integer(window_blocks, "window_blocks")
    merge_size = positive_integer(spatial_merge_size, "spatial_merge_size")
    frames, height, width = image_grid_thw.long().unbind(1)
    frame_height = (height // merge_size).repeat_interleave(frames)
    frame_width = (width // merge_size).repeat_interleave(frames)
    num_blocks = None if num_patches is None else num_patches // merge_size**2
    inverse = _window_order(frame_height, frame_width, window, num_blocks)
    lengths = _window_lengths(frame_height, frame_width, window) * merge_size**2
    cu_seqlens = pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Windows(invert(inverse), inverse, cu_seqlens)


def _window_order(height: Tensor, width: Tensor, window: int, num_blocks: int | None) -> Tensor:
    """Position in window order, `(B,)`, of each block of frames with `height` and `width` `(frames,)` in blocks."""
    blocks = height * width
    frame = repeat_indices(blocks, num_blocks)
    start = (blocks.cumsum(0) - blocks)[frame]
    offset = torch.arange(frame.shape[0], device=blocks.device) - start
    height, width = height[frame], width[frame]
    row, column = offset // width, offset % width
    top, left = row // window * window, column // window * window
    rows, columns = (height - top).clamp(max=window), (width - left).clamp(max=window)
    # Before a window come the windows in the rows above it, then those on its left.
    return start + top * width + left * rows + (row - top) * columns + column - left


def _window_lengths(height: Tensor, width: Tensor, window: int) -> Tensor:
    """Number of blocks of each window, `(windows,)`."""
    down, across = -(-height // window), -(-width // window)
    windows = down * across
    frame = torch.repeat_interleave(windows)
    index = torch.arange(frame.shape[0], device=height.device) - (windows.cumsum(0) - windows)[frame]
    top, left = index // across[frame] * window, index % across[frame] * window
    return (height[frame] - top).clamp(max=window) * (width[frame] - left).clamp(max=window)


def invert(permutation: Tensor) -> Tensor:
    """Inverse of a permutation `(B,)`."""
    positions = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, positions)


def permute_blocks(rows: Tensor, index: Tensor) -> Tensor:
    """Reorder the rows `(L, ...)` of merge blocks by `index` `(B,)`; the rows of a block stay together."""
    blocks = rearrange(rows, "(b p) ... -> b p ...", b=index.shape[0])
    return rearrange(blocks.index_select(0, index), "b p ... -> (b p) ...")


def patches_of_blocks(blocks: Tensor, merge_size: int) -> Tensor:
    """Indices `(L,)` of the patches of merge blocks with the indices `(B,)`."""
    return (blocks.unsqueeze(1) * merge_size**2 + torch.arange(merge_size**2, device=blocks.device)).flatten()
