"""Packing: which images share a sequence, and the index tensors that describe a packed sequence.

Shapes: `n` images, `L` patches in all. `image_grid_thw` is `(n, 3)` with the frames, rows and columns of
    every
image, counted in patches. Attention runs inside one frame, so a segment is a frame of `rows * columns`
patches. The bin packing strategies are the ones that NaViT (arXiv 2307.06304, appendix A.3) and its
successors use.
"""

import operator
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def plan_packing(
    lengths: Iterable[int] | Tensor,
    capacity: int,
    *,
    max_items: int | None = None,
    strategy: str = "first_fit",
    open_bins: int = 16,
    oversize: str = "raise",
) -> list[list[int]]:
    """Distribute items over bins so that the lengths in a bin sum to at most `capacity`.

    Every index occurs in exactly one bin, and equal input gives equal output.

    - `first_fit`: takes items as they come and puts each into the oldest open bin with room. At most
    `open_bins`
      bins stay open: when one more is needed, the fullest one is closed (the oldest of equals), because it is
      the one that loses the least room. A bin that can take nothing more is closed at once. O(n * open_bins).
    - `best_fit_decreasing`: needs all items beforehand; longest first, each into the bin that it fills best.
      O(n log n) comparisons.
    - `next_fit`: one open bin; keeps the order of the items across bins. O(n).

    Args:
        lengths: positive integer length of each item (patches of an image, tokens of a sample).
        capacity: largest sum of lengths in a bin.
        max_items: largest number of items in a bin; `None` for no limit.
        strategy: one of the names above.
        open_bins: how many bins `first_fit` keeps open; the other strategies ignore it.
        oversize: what happens to an item longer than `capacity`: `"raise"`, or `"own_bin"` for a bin of its
            own (which then exceeds `capacity`).

    Returns:
        Item indices per bin: bins in the order of opening, items in the order placed.

    Raises:
        ValueError: a length is not a positive integer, an item exceeds `capacity` while `oversize="raise"`,
            a limit is below one, or `strategy` or `oversize` is unknown.
    """
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy must be one of {sorted(_STRATEGIES)}, got {strategy!r}")
    if oversize not in ("raise", "own_bin"):
        raise ValueError(f"oversize must be 'raise' or 'own_bin', got {oversize!r}")
    capacity = _positive_integer(capacity, "capacity")
    open_bins = _positive_integer(open_bins, "open_bins")
    limit = None if max_items is None else _positive_integer(max_items, "max_items")
    items = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    sizes = [_positive_integer(size, f"lengths[{index}]") for index, size in enumerate(items)]
    if oversize == "raise":
        for index, size in enumerate(sizes):
            if size > capacity:
                raise ValueError(
                    f"lengths[{index}] is {size}, which exceeds capacity={capacity}; shrink the item, "
                    "raise the capacity, or pass oversize='own_bin'"
                )
    return _STRATEGIES[strategy](sizes, capacity, len(sizes) if limit is None else limit, open_bins)


def _positive_integer(value: object, name: str) -> int:
    """`value` as a Python int, if it is an integer of at least one."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return number


def _first_fit(sizes: list[int], capacity: int, max_items: int, open_bins: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: dict[int, int] = {}  # open bins in order of opening
    for index, size in enumerate(sizes):
        chosen = next((b for b, free in room.items() if free >= size), None)
        if chosen is None:
            if len(room) == open_bins and size <= capacity:
                del room[min(room, key=room.__getitem__)]
            chosen = len(bins)
            bins.append([])
            room[chosen] = capacity
        bins[chosen].append(index)
        room[chosen] -= size
        if room[chosen] <= 0 or len(bins[chosen]) == max_items:
            del room[chosen]
    return bins


def _best_fit_decreasing(sizes: list[int], capacity: int, max_items: int, open_bins: int) -> list[list[int]]:
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(rooms, (sizes[index], -1))
        if at < len(rooms):
            free, chosen = rooms.pop(at)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if free > sizes[index] and len(bins[chosen]) < max_items:
            insort(rooms, (free - sizes[index], chosen))
    return bins


def _next_fit(sizes: list[int], capacity: int, max_items: int, open_bins: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free = 0
    for index, size in enumerate(sizes):
        if not bins or size > free or len(bins[-1]) == max_items:
            bins.append([])
            free = capacity
        bins[-1].append(index)
        free -= size
    return bins


_STRATEGIES: dict[str, Callable[[list[int], int, int, int], list[list[int]]]] = {
    "first_fit": _first_fit,
    "best_fit_decreasing": _best_fit_decreasing,
    "next_fit": _next_fit,
}


def validate_grid(image_grid_thw: Tensor, num_patches: int, spatial_merge_size: int = 1) -> None:
    """Check that a grid describes `num_patches` patches. Reads the grid's values, so it waits for the device.

    Args:
        image_grid_thw: `(n, 3)` integers: frames, rows and columns of each image.
        num_patches: number of rows of `pixel_values`.
        spatial_merge_size: side of the square of patches that a projector merges; it must divide rows and
            columns.

    Raises:
        ValueError: wrong shape or dtype, an entry below one, rows or columns that `spatial_merge_size` does
            not divide, or a sum of `frames * rows * columns` other than `num_patches`.
    """
    _check_grid_layout(image_grid_thw)
    merge_size = _positive_integer(spatial_merge_size, "spatial_merge_size")
    total = 0
    for index, (frames, height, width) in enumerate(image_grid_thw.tolist()):
        if min(frames, height, width) < 1:
            raise ValueError(
                f"image_grid_thw[{index}] must hold positive frames, rows and columns, got {[frames, height, width]}"
            )
        if height % merge_size or width % merge_size:
            raise ValueError(
                f"image_grid_thw[{index}] has {height} rows and {width} columns, which "
                f"spatial_merge_size={merge_size} does not divide"
            )
        total += frames * height * width
    if total != num_patches:
        raise ValueError(f"image_grid_thw describes {total} patches, but pixel_values holds {num_patches}")


def _check_grid_layout(image_grid_thw: Tensor) -> None:
    if image_grid_thw.dtype not in _INTEGER_DTYPES or image_grid_thw.ndim != 2 or image_grid_thw.shape[1] != 3:
        raise ValueError(
            "image_grid_thw must be an integer tensor of shape (n, 3), got "
            f"{image_grid_thw.dtype} of shape {tuple(image_grid_thw.shape)}"
        )


def get_cu_seqlens(image_grid_thw: Tensor) -> Tensor:
    """Cumulative segment lengths with a leading zero, one segment per frame.

    Args:
        image_grid_thw: `(n, 3)` integers.

    Returns:
        `(segments + 1,)` int32 on the device of the grid.

    Raises:
        ValueError: wrong shape or dtype.
    """
    _check_grid_layout(image_grid_thw)
    frames, height, width = image_grid_thw.long().unbind(1)
    ends = torch.repeat_interleave(height * width, frames).cumsum(0)
    return torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)


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
    merge_size = _positive_integer(spatial_merge_size, "spatial_merge_size")
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
    offset = offset % (height * width)
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
