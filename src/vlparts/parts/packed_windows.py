"""Windows: the order of tokens in which those of one window stand together, and the windows' boundaries.

Shapes: n images, C merge blocks of m x m patches of all images (cells), L = C * m^2 patches, w cells along the side of
a window.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .utils import positive_integer


class Windows(NamedTuple):
    """The windows of packed images.

    Attributes:
        order: `(C,)` int64: cell `order[i]` of the packed sequence stands at place i when windows stand together.
        inverse: `(C,)` int64, which brings cells back: that at place `inverse[i]` is cell i of the packed sequence.
        cu_seqlens: `(windows + 1,)` int32 cumulative patch counts of the windows.
    """

    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor


def get_windows(image_grid_thw: Tensor, window_cells: int, spatial_merge_size: int = 1) -> Windows:
    """Divide every frame into windows of w x w cells, in reading order; those at the right and lower edge are smaller.

    It is the order of Qwen2.5-VL (arXiv 2502.13923, section 2.1.1), in closed form: nothing is padded or sorted, and
    no value is read on the host.

    Args:
        image_grid_thw: `(n, 3)` int64 frames, rows and columns in patches.
        window_cells: Side w of a window in cells.
        spatial_merge_size: Side m of a cell in patches; it divides rows and columns.

    Raises:
        ValueError: If a size is not positive.
    """
    window = positive_integer(window_cells, "window_cells")
    merge_size = positive_integer(spatial_merge_size, "spatial_merge_size")
    frames, height, width = image_grid_thw.long().unbind(1)
    frame_height = (height // merge_size).repeat_interleave(frames)
    frame_width = (width // merge_size).repeat_interleave(frames)
    place = _places(frame_height, frame_width, window)
    lengths = _lengths(frame_height, frame_width, window) * merge_size**2
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    order = torch.empty_like(place).scatter_(0, place, torch.arange(place.shape[0], device=place.device))
    return Windows(order, place, cu_seqlens)


def _places(height: Tensor, width: Tensor, window: int) -> Tensor:
    """Where each cell of the frames goes, `(C,)`; `height` and `width` `(frames,)` in cells."""
    cells = height * width
    ends = cells.cumsum(0)
    frame = torch.repeat_interleave(cells)
    start = (ends - cells)[frame]
    offset = torch.arange(frame.shape[0], device=cells.device) - start
    height, width = height[frame], width[frame]
    row, column = offset // width, offset % width
    top, left = row // window * window, column // window * window
    rows, columns = (height - top).clamp(max=window), (width - left).clamp(max=window)
    # Before a window come the rows of windows above it, then its neighbours on the left.
    return start + top * width + left * rows + (row - top) * columns + column - left


def _lengths(height: Tensor, width: Tensor, window: int) -> Tensor:
    """Cells of each window, `(windows,)`."""
    down, across = -(-height // window), -(-width // window)
    ends = (down * across).cumsum(0)
    frame = torch.repeat_interleave(down * across)
    number = torch.arange(frame.shape[0], device=ends.device) - (ends - down * across)[frame]
    top, left = number // across[frame] * window, number % across[frame] * window
    return (height[frame] - top).clamp(max=window) * (width[frame] - left).clamp(max=window)


def permute_cells(rows: Tensor, index: Tensor) -> Tensor:
    """Bring the patches `(L, ...)` into the order `(C,)` of their cells, whose patches stay together."""
    cells = index.shape[0]
    return rows.unflatten(0, (cells, -1)).index_select(0, index).flatten(0, 1)
