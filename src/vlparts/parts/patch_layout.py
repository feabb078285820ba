"""Which image, frame and place each row of a packed sequence is: what positions, attention and pooling need.

Shapes: `L` rows of `pixel_values`, `n` images. All of it follows from `image_grid_thw` and `keep_index` by tensor
operations without a loop over images.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .packing import places_in_grid


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
