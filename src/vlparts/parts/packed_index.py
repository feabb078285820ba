"""Packing: the index tensors that describe a packed sequence (which images share one: see `packing_plans.py`).

Shapes: `n` images, `L` patches in all. `image_grid_thw` is `(n, 3)` with the frames, rows and columns of every image,
counted in patches. Attention runs inside one frame, so a segment is a frame of `rows * columns` patches.

Which image, frame and place each row of a packed sequence is: what positions, attention and pooling need.

Shapes: `L` rows of `pixel_values`, `n` images. All of it follows from `image_grid_thw` and `keep_index` by tensor
operations without a loop over images.

Boundaries of segments as host integers, kept beside the tensor that holds them on a device.

Kernels that want lengths on the host would otherwise wait for the device in every layer.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .packed_bins import plan_packing
from .utils import positive_integer

__all__ = [
    "get_cu_seqlens",
    "get_max_seqlen",
    "get_position_ids",
    "merge_order",
    "places_in_grid",
    "plan_packing",
    "segment_ids",
    "validate_grid",
]


_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def validate_grid(
    image_grid_thw: Tensor, num_patches: int, spatial_merge_size: int = 1, keep_index: Tensor | None = None
) -> None:
    """Check that a grid describes `num_patches` patches. Reads the grid's values, so it waits for the device.

    Args:
        image_grid_thw: `(n, 3)` integers: frames, rows and columns of each image. With `keep_index`, a row of
            zeros is a padding example.
        num_patches: number of rows of `pixel_values`.
        spatial_merge_size: side of the square of patches that a projector merges; it must divide rows and
            columns.
        keep_index: `(num_patches,)` int64, which patches of the grid the rows of `pixel_values` are, or None for
            all of them. It rises, and ends in -1 for each row that is padding.

    Raises:
        ValueError: wrong shape or dtype, an entry below one, rows or columns that `spatial_merge_size` does
            not divide, a sum of `frames * rows * columns` other than `num_patches`, or a `keep_index` that does not
            rise, points outside of the grid, or leaves an image without any patch.
    """
    _check_grid_layout(image_grid_thw)
    merge_size = positive_integer(spatial_merge_size, "spatial_merge_size")
    ends = [0]
    for index, (frames, height, width) in enumerate(image_grid_thw.tolist()):
        is_padding = keep_index is not None and frames == height == width == 0
        if min(frames, height, width) < 1 and not is_padding:
            raise ValueError(
                f"image_grid_thw[{index}] must hold positive frames, rows and columns, got {[frames, height, width]}"
            )
        if height % merge_size or width % merge_size:
            raise ValueError(
                f"image_grid_thw[{index}] has {height} rows and {width} columns, which "
                f"spatial_merge_size={merge_size} does not divide"
            )
        ends.append(ends[-1] + frames * height * width)
    if keep_index is not None:
        _check_keep_index(keep_index, num_patches, ends)
    elif ends[-1] != num_patches:
        raise ValueError(f"image_grid_thw describes {ends[-1]} patches, but pixel_values holds {num_patches}")


def _check_keep_index(keep_index: Tensor, num_patches: int, ends: list[int]) -> None:
    if keep_index.dtype != torch.int64 or keep_index.shape != (num_patches,):
        raise ValueError(
            f"keep_index must be an int64 tensor of shape ({num_patches},), one entry for each row of pixel_values, "
            f"got {keep_index.dtype} of shape {tuple(keep_index.shape)}"
        )
    places = keep_index.tolist()
    while places and places[-1] == -1:
        places.pop()
    outside = [place for place in places if not 0 <= place < ends[-1]]
    if outside:
        raise ValueError(
            f"keep_index must point to the {ends[-1]} patches of image_grid_thw, with -1 for padding at the end "
            f"only, got {outside[0]}"
        )
    if any(left >= right for left, right in pairwise(places)):
        raise ValueError("keep_index must rise: patches stay in their order, and none comes twice")
    for index, (start, end) in enumerate(pairwise(ends)):
        if start < end and bisect_left(places, start) == bisect_left(places, end):
            raise ValueError(f"keep_index keeps no patch of image {index}; at least one must stay")


def _check_grid_layout(image_grid_thw: Tensor) -> None:
    if image_grid_thw.dtype not in _INTEGER_DTYPES or image_grid_thw.ndim != 2 or image_grid_thw.shape[1] != 3:
        raise ValueError(
            "image_grid_thw must be an integer tensor of shape (n, 3), got "
            f"{image_grid_thw.dtype} of shape {tuple(image_grid_thw.shape)}"
        )


def get_cu_seqlens(image_grid_thw: Tensor, merge_temporal: bool = False) -> Tensor:
    """Cumulative segment lengths with a leading zero.

    Args:
        image_grid_thw: `(n, 3)` integers. A row of zeros (a padding example) gives one empty segment.
        merge_temporal: one segment per image or video, in place of one per frame.

    Returns:
        `(segments + 1,)` int32 on the device of the grid.

    Raises:
        ValueError: wrong shape or dtype.
    """
    _check_grid_layout(image_grid_thw)
    frames, height, width = image_grid_thw.long().unbind(1)
    if merge_temporal:
        lengths = frames * height * width
    else:
        lengths = torch.repeat_interleave(height * width, frames.clamp(min=1))
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def get_max_seqlen(cu_seqlens: Tensor) -> int:
    """Length of the longest segment as a host integer; 0 if there is none.

    It waits for the device: compute it once, not in every layer.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths.

    Returns:
        The number of tokens of the longest segment.
    """
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def get_position_ids(image_grid_thw: Tensor, spatial_merge_size: int = 1) -> Tensor:
    """Row and column of every patch in its own image, in the order in which the patches are packed.

    That order is raster order for `spatial_merge_size=1`. Otherwise the patches of one `m x m` block are
    neighbours (the order of `merge_order`, and of transformers' Qwen2-VL family). Every frame counts from
    zero.

    Args:
        image_grid_thw: `(n, 3)` integers.
        spatial_merge_size: side `m` of a merge block.

    Returns:
        `(L, 2)` int64 on the device of the grid.

    Raises:
        ValueError: wrong shape or dtype, or rows or columns that `spatial_merge_size` does not divide.
    """
    _check_grid_layout(image_grid_thw)
    merge_size = positive_integer(spatial_merge_size, "spatial_merge_size")
    grid = image_grid_thw.long()
    if merge_size > 1 and bool((grid[:, 1:] % merge_size).any()):
        raise ValueError(
            f"image_grid_thw must have rows and columns that spatial_merge_size={merge_size} divides, "
            f"got {image_grid_thw[:, 1:].tolist()}"
        )
    patches = grid.prod(1)
    image = torch.repeat_interleave(patches)
    offset = torch.arange(image.shape[0], device=grid.device) - (patches.cumsum(0) - patches)[image]
    _, height, width = grid[image].unbind(1)
    return places_in_grid(offset % (height * width), width, merge_size)


def places_in_grid(offset: Tensor, width: Tensor, merge_size: int) -> Tensor:
    """Row and column of the patch that comes at place `offset` of its frame.

    Args:
        offset: `(L,)` int64 places in the packed order of a frame, see `get_position_ids`.
        width: `(L,)` int64 columns of the frame.
        merge_size: side `m` of a merge block.

    Returns:
        `(L, 2)` int64.
    """
    block, inside = offset // merge_size**2, offset % merge_size**2
    blocks_per_row = width // merge_size
    row = block // blocks_per_row * merge_size + inside // merge_size
    column = block % blocks_per_row * merge_size + inside % merge_size
    return torch.stack((row, column), dim=1)


def merge_order(height: int, width: int, merge_size: int) -> Tensor:
    """Index that brings the patches of one frame from raster order into block-major order.

    `raster[merge_order(h, w, m)]` puts the `m * m` patches of a block next to each other.

    Args:
        height: rows of the frame, in patches.
        width: columns of the frame, in patches.
        merge_size: side `m` of a block.

    Returns:
        `(height * width,)` int64.

    Raises:
        ValueError: `merge_size` does not divide `height` and `width`.
    """
    if merge_size < 1 or height % merge_size or width % merge_size:
        raise ValueError(f"merge_size={merge_size} must divide height={height} and width={width}")
    raster = torch.arange(height * width)
    blocks = raster.view(height // merge_size, merge_size, width // merge_size, merge_size)
    return blocks.transpose(1, 2).flatten()


def segment_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """Number of the segment that each token belongs to.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths with a leading zero.
        total: number of tokens. Tokens beyond the last segment (padding) get the id `segments`.

    Returns:
        `(total,)` int64 on the device of `cu_seqlens`.
    """
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


class PatchLayout(NamedTuple):
    """Index tensors of a packed sequence.

    Attributes:
        image_ids: `(L,)` int64, the image of each row; `n` for padding rows.
        frame_ids: `(L,)` int64, the frame in its image.
        position_ids: `(L, 2)` int64, row and column in the frame.
        grid_sizes: `(L, 2)` int64, rows and columns of the whole image, whatever was dropped of it.
        cu_images: `(n + 1,)` int32 cumulative rows of the images, or `(n + 2,)` with a last segment for padding rows
            where there is a `keep_index`.
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
    """Work out the layout of a packed sequence. Checks nothing: see `validate_grid`.

    Args:
        image_grid_thw: `(n, 3)` int64 frames, rows and columns of each image, before anything was dropped. Rows of
            zeros are padding examples.
        num_patches: rows L of the sequence.
        spatial_merge_size: side of a merge block, which sets the order of the patches.
        keep_index: `(L,)` int64 rising index of each row in the sequence of all patches, -1 for padding rows at the
            end; None if nothing was dropped or padded.
        position_ids: `(L, 2)` int64 if known already.
    """
    images = image_grid_thw.shape[0]
    ends = image_grid_thw.prod(-1).cumsum(0)
    if keep_index is None:
        index = torch.arange(num_patches, device=image_grid_thw.device)
        image_ids = torch.searchsorted(ends, index, right=True)
        cu_images = pad(ends, (1, 0)).to(torch.int32)
    else:
        index = keep_index
        image_ids = torch.where(index < 0, images, torch.searchsorted(ends, index, right=True))
        cu_images = _boundaries(image_ids, images, num_patches)
    # The extra row stands for padding.
    _, height, width = pad(image_grid_thw, (0, 0, 0, 1))[image_ids].unbind(1)
    offset = index - pad(ends, (1, 0))[image_ids]
    offset = torch.where(image_ids < images, offset, 0)
    patches_of_frame = (height * width).clamp(min=1)
    if position_ids is None:
        whole_blocks = width.clamp(min=spatial_merge_size)
        position_ids = places_in_grid(offset % patches_of_frame, whole_blocks, spatial_merge_size)
    return PatchLayout(
        image_ids, offset // patches_of_frame, position_ids, torch.stack((height, width), dim=1), cu_images
    )


def get_kept_cu_seqlens(
    image_grid_thw: Tensor, layout: PatchLayout, num_patches: int, merge_temporal: bool = False
) -> Tensor:
    """Cumulative lengths of the attention segments where patches were dropped or padding rows added.

    Args:
        image_grid_thw: `(n, 3)` int64.
        layout: from [`get_patch_layout`] with a `keep_index`.
        num_patches: rows L of the sequence.
        merge_temporal: one segment per image or video, in place of one per frame.

    Returns:
        `(segments + 2,)` int32; the last segment holds the padding rows, and is empty if there are none.
    """
    if merge_temporal:
        return layout.cu_images
    frames = pad(image_grid_thw[:, 0].clamp(min=1).cumsum(0), (1, 0))
    return _boundaries(frames[layout.image_ids] + layout.frame_ids, int(frames[-1]), num_patches)


def _boundaries(ids: Tensor, count: int, total: int) -> Tensor:
    """Where each of `count` ids starts in a rising sequence of ids, where the last ends, and the end of all."""
    starts = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device))
    return pad(starts, (0, 1), value=total).to(torch.int32)


def check_cu_seqlens_cpu(cu_seqlens_cpu: Sequence[int] | None, cu_seqlens: Tensor, name: str) -> None:
    """Check that host integers can be the values of `cu_seqlens`; does not read the device.

    Args:
        cu_seqlens_cpu: Host integers, or None.
        cu_seqlens: `(segments + 1,)` cumulative lengths.
        name: Name of `cu_seqlens_cpu` in an error message.

    Raises:
        ValueError: If there are not as many numbers as boundaries.
    """
    if cu_seqlens_cpu is not None and len(cu_seqlens_cpu) != cu_seqlens.shape[0]:
        raise ValueError(
            f"`{name}` must hold one integer per boundary of `cu_seqlens` {tuple(cu_seqlens.shape)}, got "
            f"{len(cu_seqlens_cpu)}."
        )


def resolve_seqlens(
    cu_seqlens: Tensor, max_seqlen: int | None, cu_seqlens_cpu: Sequence[int] | None
) -> tuple[int, Sequence[int] | None]:
    """Longest segment and host copy of the boundaries, for all layers of a model.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths.
        max_seqlen: Longest segment or a bound on it, if known.
        cu_seqlens_cpu: `cu_seqlens` as host integers, if known.

    Returns:
        `max_seqlen`, computed if it was None, and the host integers: those given, or copied where `max_seqlen` was
        None, so that this synchronizes with the device at most once. None while compiling, which would take them for
        constants.

    Raises:
        ValueError: If there are not as many host integers as boundaries.
    """
    if torch.compiler.is_compiling():
        return get_max_seqlen(cu_seqlens) if max_seqlen is None else max_seqlen, None
    check_cu_seqlens_cpu(cu_seqlens_cpu, cu_seqlens, "cu_seqlens_cpu")
    if max_seqlen is None:
        cu_seqlens_cpu = cu_seqlens.tolist() if cu_seqlens_cpu is None else cu_seqlens_cpu
        max_seqlen = max((end - start for start, end in pairwise(cu_seqlens_cpu)), default=0)
    return max_seqlen, cu_seqlens_cpu
