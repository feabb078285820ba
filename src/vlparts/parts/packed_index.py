"""Index tensors of packed sequences: segment boundaries, positions, images and frames of patches.

All follow from `image_grid_thw` and `keep_index` by tensor operations, without a loop over images.

Shapes: `n` images, `L` rows of `pixel_values` (patches of all images). `image_grid_thw` is `(n, 3)`: frames, rows and
columns of each image in patches. Attention runs within a frame, so a segment is a frame of `rows * columns` patches.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from .utils import positive_integer

__all__ = [
    "PatchLayout",
    "check_cu_seqlens_cpu",
    "get_cu_seqlens",
    "get_kept_cu_seqlens",
    "get_max_seqlen",
    "get_patch_layout",
    "get_position_ids",
    "merge_order",
    "resolve_seqlens",
    "segment_ids",
    "validate_grid",
]

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def validate_grid(
    image_grid_thw: Tensor, num_patches: int, spatial_merge_size: int = 1, keep_index: Tensor | None = None
) -> None:
    """Check that a grid describes `num_patches` patches. Synchronizes with the device.

    Args:
        image_grid_thw: `(n, 3)` integers: frames, rows and columns of each image. With `keep_index`, a row of zeros is
            a padding example.
        num_patches: Number of rows of `pixel_values`.
        spatial_merge_size: Side of the block of patches that a projector merges; it must divide rows and columns.
        keep_index: `(num_patches,)` int64, index of each row of `pixel_values` in the sequence of all patches, or None
            if none were dropped. Strictly increasing, then -1 for each padding row.

    Raises:
        ValueError: If a shape or dtype is wrong, an entry is below 1, `spatial_merge_size` does not divide rows or
            columns, the products `frames * rows * columns` do not sum to `num_patches`, or `keep_index` does not
            increase, is out of range, or keeps no patch of an image.
    """
    check_grid_layout(image_grid_thw)
    merge_size = positive_integer(spatial_merge_size, "spatial_merge_size")
    if torch.compiler.is_exporting():
        return
    ends = [0]
    for index, (frames, height, width) in enumerate(image_grid_thw.tolist()):
        is_padding = keep_index is not None and frames == height == width == 0
        if min(frames, height, width) < 1 and not is_padding:
            raise ValueError(
                f"`image_grid_thw[{index}]` must hold positive frames, rows and columns, got "
                f"{[frames, height, width]}."
            )
        if height % merge_size or width % merge_size:
            raise ValueError(
                f"`image_grid_thw[{index}]` has {height} rows and {width} columns, which "
                f"spatial_merge_size={merge_size} does not divide."
            )
        ends.append(ends[-1] + frames * height * width)
    if keep_index is not None:
        _check_keep_index(keep_index, num_patches, ends)
    elif ends[-1] != num_patches:
        raise ValueError(f"`image_grid_thw` describes {ends[-1]} patches, but `pixel_values` holds {num_patches}.")


def _check_keep_index(keep_index: Tensor, num_patches: int, ends: list[int]) -> None:
    if keep_index.dtype != torch.int64 or keep_index.shape != (num_patches,):
        raise ValueError(
            f"`keep_index` must be an int64 tensor of shape ({num_patches},), one entry per row of `pixel_values`, "
            f"got {keep_index.dtype} of shape {tuple(keep_index.shape)}."
        )
    kept = keep_index.tolist()
    while kept and kept[-1] == -1:
        kept.pop()
    outside = [index for index in kept if not 0 <= index < ends[-1]]
    if outside:
        raise ValueError(
            f"`keep_index` must hold indices of the {ends[-1]} patches of `image_grid_thw`, then -1 for padding rows, "
            f"got {outside[0]}."
        )
    if any(left >= right for left, right in pairwise(kept)):
        raise ValueError(f"`keep_index` must be strictly increasing, got {kept}.")
    for index, (start, end) in enumerate(pairwise(ends)):
        if start < end and bisect_left(kept, start) == bisect_left(kept, end):
            raise ValueError(f"`keep_index` must keep at least one patch of each image, got none of image {index}.")


def check_grid_layout(grid_thw: Tensor, name: str = "image_grid_thw") -> None:
    """Check the dtype and shape of a grid.

    Args:
        grid_thw: `(n, 3)` integers.
        name: Name of the argument in an error message.

    Raises:
        ValueError: If the shape or dtype is wrong.
    """
    if grid_thw.dtype not in INTEGER_DTYPES or grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
        raise ValueError(
            f"`{name}` must be an integer tensor of shape (n, 3), got {grid_thw.dtype} of shape "
            f"{tuple(grid_thw.shape)}."
        )


def get_cu_seqlens(image_grid_thw: Tensor, merge_temporal: bool = False) -> Tensor:
    """Compute cumulative segment lengths with a leading zero.

    Args:
        image_grid_thw: `(n, 3)` integers. A row of zeros (a padding example) gives one empty segment.
        merge_temporal: One segment per image or video instead of one per frame.

    Returns:
        `(segments + 1,)` int32 on the device of the grid.

    Raises:
        ValueError: If the shape or dtype is wrong.
    """
    check_grid_layout(image_grid_thw)
    frames, height, width = image_grid_thw.long().unbind(1)
    if merge_temporal:
        lengths = frames * height * width
    else:
        lengths = torch.repeat_interleave(height * width, frames.clamp(min=1))
    return pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def get_max_seqlen(cu_seqlens: Tensor) -> int:
    """Length of the longest segment as a host integer; 0 without segments.

    Synchronizes with the device: call it once, not in every layer.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths.
    """
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def get_position_ids(image_grid_thw: Tensor, spatial_merge_size: int = 1, num_patches: int | None = None) -> Tensor:
    """Row and column of each patch in its own frame, in packed order.

    Packed order is raster order for `spatial_merge_size=1`. Otherwise the patches of an `m x m` block are consecutive
    (see [`merge_order`]), as in transformers' Qwen2-VL family.

    Args:
        image_grid_thw: `(n, 3)` integers.
        spatial_merge_size: Side `m` of a merge block.
        num_patches: L if known; exporting a program needs it.

    Returns:
        `(L, 2)` int64 on the device of the grid.

    Raises:
        ValueError: If the shape or dtype is wrong, or `spatial_merge_size` does not divide rows or columns.
    """
    check_grid_layout(image_grid_thw)
    merge_size = positive_integer(spatial_merge_size, "spatial_merge_size")
    grid = image_grid_thw.long()
    if merge_size > 1 and not torch.compiler.is_exporting() and bool((grid[:, 1:] % merge_size).any()):
        raise ValueError(
            f"`image_grid_thw` must have rows and columns that spatial_merge_size={merge_size} divides, "
            f"got {image_grid_thw[:, 1:].tolist()}."
        )
    patches = grid.prod(1)
    image = repeat_indices(patches, num_patches)
    offset = torch.arange(image.shape[0], device=grid.device) - (patches.cumsum(0) - patches)[image]
    _, height, width = grid[image].unbind(1)
    return _rows_and_columns(offset % (height * width), width, merge_size)


def _rows_and_columns(offset: Tensor, width: Tensor, merge_size: int) -> Tensor:
    """Row and column, `(L, 2)`, of the patches at packed offsets `(L,)` within frames of `width` `(L,)` columns."""
    block, inside = offset // merge_size**2, offset % merge_size**2
    blocks_per_row = width // merge_size
    row = block // blocks_per_row * merge_size + inside // merge_size
    column = block % blocks_per_row * merge_size + inside % merge_size
    return torch.stack((row, column), dim=1)


def merge_order(height: int, width: int, merge_size: int) -> Tensor:
    """Permutation of the patches of one frame from raster order to block order.

    In `raster[merge_order(h, w, m)]` the `m * m` patches of a block are consecutive.

    Args:
        height: Rows of the frame in patches.
        width: Columns of the frame in patches.
        merge_size: Side `m` of a block.

    Returns:
        `(height * width,)` int64.

    Raises:
        ValueError: If `merge_size` does not divide `height` and `width`.
    """
    if merge_size < 1 or height % merge_size or width % merge_size:
        raise ValueError(f"`merge_size` must divide `height` and `width`, got {merge_size}, {height} and {width}.")
    raster = torch.arange(height * width)
    return rearrange(
        raster, "(h a w b) -> (h w a b)", h=height // merge_size, w=width // merge_size, a=merge_size, b=merge_size
    )


def segment_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """Index of the segment of each token.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths with a leading zero.
        total: Number of tokens. Tokens after the last segment (padding) get the index `segments`.

    Returns:
        `(total,)` int64 on the device of `cu_seqlens`.
    """
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return _count_up_to(cu_seqlens[1:].contiguous(), tokens)


def _count_up_to(bounds: Tensor, values: Tensor) -> Tensor:
    """Number of `bounds` `(n,)`, which do not decrease, that are at most each of `values` `(L,)`: `(L,)` int64."""
    if torch.compiler.is_exporting():  # ONNX has no searchsorted
        return (bounds[:, None] <= values).sum(0)
    return torch.searchsorted(bounds, values, right=True)


def repeat_indices(counts: Tensor, total: int | None = None) -> Tensor:
    """Repeat each index i `counts[i]` times.

    Args:
        counts: `(n,)` int64.
        total: Sum of the counts if known; exporting a program needs it.

    Returns:
        `(total,)` int64.
    """
    if total is None:
        return torch.repeat_interleave(counts)
    return _count_up_to(counts.cumsum(0), torch.arange(total, device=counts.device))


class PatchLayout(NamedTuple):
    """Index tensors of a packed sequence.

    Attributes:
        image_ids: `(L,)` int64, image of each row; `n` for padding rows.
        frame_ids: `(L,)` int64, frame in its image.
        position_ids: `(L, 2)` int64, row and column in the frame.
        grid_sizes: `(L, 2)` int64, rows and columns of the whole image, dropped patches included.
        cu_images: `(n + 1,)` int32 cumulative rows per image; with a `keep_index` `(n + 2,)`, where the last segment
            holds the padding rows.
    """

    image_ids: Tensor
    frame_ids: Tensor
    position_ids: Tensor
    grid_sizes: Tensor
    cu_images: Tensor


def get_patch_layout(
    image_grid_thw: Tensor,
    num_patches: int,
    spatial_merge_size: int = 1,
    keep_index: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> PatchLayout:
    """Compute the layout of a packed sequence, without checks: see [`validate_grid`].

    Args:
        image_grid_thw: `(n, 3)` int64 frames, rows and columns of each image before patches were dropped. Rows of
            zeros are padding examples.
        num_patches: Rows L of the sequence.
        spatial_merge_size: Side of a merge block, which sets the order of patches.
        keep_index: `(L,)` int64 increasing index of each row in the sequence of all patches, then -1 for padding rows;
            None if nothing was dropped or padded.
        position_ids: `(L, 2)` int64, if already computed.
    """
    images = image_grid_thw.shape[0]
    ends = image_grid_thw.prod(-1).cumsum(0)
    if keep_index is None:
        index = torch.arange(num_patches, device=image_grid_thw.device)
        image_ids = _count_up_to(ends, index)
        cu_images = pad(ends, (1, 0)).to(torch.int32)
    else:
        index = keep_index
        image_ids = torch.where(index < 0, images, _count_up_to(ends, index))
        cu_images = _boundaries(image_ids, images, num_patches)
    # Padding rows have the index n, so the grid gets one more row.
    _, height, width = pad(image_grid_thw, (0, 0, 0, 1))[image_ids].unbind(1)
    offset = index - pad(ends, (1, 0))[image_ids]
    offset = torch.where(image_ids < images, offset, 0)
    patches_per_frame = (height * width).clamp(min=1)
    if position_ids is None:
        width_or_block = width.clamp(min=spatial_merge_size)
        position_ids = _rows_and_columns(offset % patches_per_frame, width_or_block, spatial_merge_size)
    grid_sizes = torch.stack((height, width), dim=1)
    return PatchLayout(image_ids, offset // patches_per_frame, position_ids, grid_sizes, cu_images)


def get_kept_cu_seqlens(
    image_grid_thw: Tensor, layout: PatchLayout, num_patches: int, merge_temporal: bool = False
) -> Tensor:
    """Cumulative lengths of the attention segments where patches were dropped or padding rows added.

    Args:
        image_grid_thw: `(n, 3)` int64.
        layout: From [`get_patch_layout`] with a `keep_index`.
        num_patches: Rows L of the sequence.
        merge_temporal: One segment per image or video instead of one per frame.

    Returns:
        `(segments + 2,)` int32; the last segment holds the padding rows and may be empty.
    """
    if merge_temporal:
        return layout.cu_images
    frames = image_grid_thw[:, 0].clamp(min=1)
    segments = torch.repeat_interleave(frames).shape[0]  # a shape, unlike an integer, can be exported
    starts = pad(frames.cumsum(0), (1, 0))
    return _boundaries(starts[layout.image_ids] + layout.frame_ids, segments, num_patches)


def _boundaries(ids: Tensor, count: int, total: int) -> Tensor:
    """Start of each of `count + 1` ids in a non-decreasing sequence of ids, and `total`: `(count + 2,)` int32."""
    starts = _count_up_to(ids, torch.arange(-1, count, device=ids.device))
    return torch.cat((starts, starts.new_full((1,), total))).to(torch.int32)


def check_cu_seqlens_cpu(cu_seqlens_cpu: Sequence[int] | None, cu_seqlens: Tensor, name: str) -> None:
    """Check the number of host integers, without synchronizing with the device.

    Args:
        cu_seqlens_cpu: Host integers, or None.
        cu_seqlens: `(segments + 1,)` cumulative lengths.
        name: Name of `cu_seqlens_cpu` in an error message.

    Raises:
        ValueError: If there is not one integer per boundary.
    """
    if cu_seqlens_cpu is not None and len(cu_seqlens_cpu) != cu_seqlens.shape[0]:
        raise ValueError(
            f"`{name}` must hold one integer per boundary of `cu_seqlens` {tuple(cu_seqlens.shape)}, got "
            f"{len(cu_seqlens_cpu)}."
        )


def resolve_seqlens(
    cu_seqlens: Tensor, max_seqlen: int | None, cu_seqlens_cpu: Sequence[int] | None, total: int
) -> tuple[int, Sequence[int] | None]:
    """Longest segment and host copy of the boundaries, for all layers of a model.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths.
        max_seqlen: Longest segment or an upper bound, if known.
        cu_seqlens_cpu: `cu_seqlens` as host integers, if known.
        total: Number of tokens.

    Returns:
        `max_seqlen`, computed if it was None (the bound `total` while exporting), and the host integers: those given,
        or copied where `max_seqlen` was None, so that this synchronizes with the device at most once. None while
        compiling, which would treat them as constants.

    Raises:
        ValueError: If there is not one host integer per boundary.
    """
    if torch.compiler.is_exporting() and max_seqlen is None:
        return total, None
    if torch.compiler.is_compiling():
        return get_max_seqlen(cu_seqlens) if max_seqlen is None else max_seqlen, None
    check_cu_seqlens_cpu(cu_seqlens_cpu, cu_seqlens, "cu_seqlens_cpu")
    if max_seqlen is None:
        cu_seqlens_cpu = cu_seqlens.tolist() if cu_seqlens_cpu is None else cu_seqlens_cpu
        max_seqlen = max((end - start for start, end in pairwise(cu_seqlens_cpu)), default=0)
    return max_seqlen, cu_seqlens_cpu
