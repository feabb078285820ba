"""Resampling of tables along one axis and two, for the patches of packed images, and the table of sinusoids.

Shapes: `L` patches of all images, `N` rows of a table (`R` rows and `C` columns of one with two axes), `D` width.
Place `i` of an axis of `size` patches lies at `(i + 1/2) * N / size - 1/2` in a table of `N` rows: the half-pixel map
of `torch.nn.functional.interpolate(..., align_corners=False)`, whose results whole grids get.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag

# Keys' cubic kernel has one free constant. PyTorch takes the one value without antialiasing and the other, that of
# PIL, with it.
CUBIC = -0.75
CUBIC_ANTIALIAS = -0.5


def sinusoids(places: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sine and cosine in turn, of frequencies from 1 to 1/10000 (Vaswani et al., arXiv 1706.03762, section 3.5).

    Args:
        places: `(L,)` places on an axis.
        width: Even number of channels D.
        dtype: Floating point type of computation and result.

    Returns:
        `(L, D)`: channel 2i is sin(place / 10000^(2i/D)), channel 2i + 1 the cosine.
    """
    exponents = torch.arange(0, width, 2, dtype=dtype, device=places.device) / width
    angles = places.to(dtype).unsqueeze(-1) * 10000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def axis_taps(index: Tensor, size: Tensor, rows: int, interpolation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The 2 (linear) or 4 (cubic) neighbouring rows that a place on an axis is mixed from.

    Antialiased kernels are wider where an axis has fewer patches than the table has rows: see [`axis_weights`].

    Args:
        index: `(L,)` int64, places on an axis.
        size: `(L,)` int64, patches of that axis; with an antialiased interpolation at least `rows`.
        rows: Rows N of the table.
        interpolation: "bilinear", "bicubic", or either with "_antialias".
        dtype: Floating point type of the weights.

    Returns:
        `(L, 2 or 4)` int64 rows, and their weights; each patch's weights sum to 1.
    """
    # The place is numerator / denominator. Integers find its two neighbours without rounding.
    numerator, denominator = (2 * index + 1) * rows - size, 2 * size
    below = torch.div(numerator, denominator, rounding_mode="floor")
    share = (numerator - below * denominator).to(dtype) / denominator
    first, last = (-1, 2) if interpolation.startswith("bicubic") else (0, 1)
    offsets = torch.arange(first, last + 1, device=index.device)
    weights = _kernel(share.unsqueeze(-1) - offsets, interpolation)
    taps = below.unsqueeze(-1) + offsets
    if interpolation.endswith("_antialias"):  # leaves out what lies outside; the others repeat the outermost row
        weights = _normalised(weights * ((taps >= 0) & (taps < rows)))
    return taps.clamp(0, rows - 1), weights


def axis_weights(index: Tensor, size: Tensor, rows: int, interpolation: str, dtype: torch.dtype) -> Tensor:
    """Weight of every row of a table at places on an axis, under an antialiased interpolation.

    Where an axis has fewer patches than the table has rows, a patch is mixed from all rows that it covers.

    Args:
        index: `(L,)` int64, places on an axis.
        size: `(L,)` int64, patches of that axis.
        rows: Rows N of the table.
        interpolation: "bilinear_antialias" or "bicubic_antialias".
        dtype: Floating point type of computation and result.

    Returns:
        `(L, N)`; each patch's weights sum to 1.
    """
    step = rows / size.to(dtype)
    places = (index.to(dtype) + 0.5) * step - 0.5
    distances = torch.arange(rows, device=index.device) - places.unsqueeze(-1)
    return _normalised(_kernel(distances / step.clamp(min=1.0).unsqueeze(-1), interpolation))


def _kernel(distances: Tensor, interpolation: str) -> Tensor:
    """Weight of a row by its signed distance: the hat function, or Keys' cubic."""
    x = distances.abs()
    if interpolation.startswith("bilinear"):
        return (1 - x).clamp(min=0)
    a = CUBIC_ANTIALIAS if interpolation.endswith("_antialias") else CUBIC
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def resample_axis(table: Tensor, index: Tensor, size: Tensor, interpolation: str, enlarging: bool = False) -> Tensor:
    """Look places on axes of any size up in a table of one axis, without a loop over images.

    Args:
        table: `(N, D)`.
        index: `(L,)` int64, places on an axis.
        size: `(L,)` int64, patches of that axis, at least 1.
        interpolation: "bilinear", "bicubic", or either with "_antialias".
        enlarging: Says that every size is at least N.

    Returns:
        `(L, D)` in the table's dtype.
    """
    rows, dtype = table.shape[0], _weight_dtype(table)
    if _widens(interpolation, enlarging):
        return axis_weights(index, size, rows, interpolation, dtype).to(table.dtype) @ table
    return _mix(table, *axis_taps(index, size, rows, interpolation, dtype))


def resample_grid(
    table: Tensor, position_ids: Tensor, sizes: Tensor, interpolation: str, enlarging: bool = False
) -> Tensor:
    """Look patches of grids of any size up in a table of two axes.

    Only an antialiased interpolation that may shrink loops over the distinct grids, and reads them on the host.

    Args:
        table: `(R, C, D)`.
        position_ids: `(L, 2)` int64, row and column of each patch.
        sizes: `(L, 2)` int64, patches of either axis, at least 1.
        interpolation: "bilinear", "bicubic", or either with "_antialias".
        enlarging: Says that all sizes are at least R and C.

    Returns:
        `(L, D)` in the table's dtype.
    """
    if _widens(interpolation, enlarging):
        return _resample_grid_by_grid(table, position_ids, sizes, interpolation)
    (height, width), dtype = table.shape[:2], _weight_dtype(table)
    row_taps, row_weights = axis_taps(position_ids[:, 0], sizes[:, 0], height, interpolation, dtype)
    column_taps, column_weights = axis_taps(position_ids[:, 1], sizes[:, 1], width, interpolation, dtype)
    taps = row_taps.unsqueeze(2) * width + column_taps.unsqueeze(1)
    weights = row_weights.unsqueeze(2) * column_weights.unsqueeze(1)
    return _mix(table.flatten(0, 1), taps.flatten(1), weights.flatten(1))


def _widens(interpolation: str, enlarging: bool) -> bool:
    """Whether the kernel may span more than the nearest rows."""
    return interpolation.endswith("_antialias") and not enlarging


def _weight_dtype(table: Tensor) -> torch.dtype:
    return torch.promote_types(table.dtype, torch.float32)


def _mix(table: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the rows that `(L, k)` taps name: `(L, D)` in the table's dtype."""
    return embedding_bag(taps, table, mode="sum", per_sample_weights=weights.to(table.dtype))


def _resample_grid_by_grid(table: Tensor, position_ids: Tensor, sizes: Tensor, interpolation: str) -> Tensor:
    """As `resample_grid`: one resampled table for each distinct grid, from which all patches are looked up."""
    grids, group = sizes.unique(dim=0, return_inverse=True)
    last = torch.zeros_like(grids).scatter_reduce(0, group.unsqueeze(1).expand(-1, 2), position_ids, "amax")
    extents = last + 1  # smaller than the grid where patches are left out or both axes count as the longer one
    tables = [
        _resample_whole_grid(table, grid, extent, interpolation)
        for grid, extent in zip(grids.unbind(), extents.tolist(), strict=True)
    ]
    patches = extents.prod(1)
    starts = patches.cumsum(0) - patches
    places = starts[group] + position_ids[:, 0] * extents[group, 1] + position_ids[:, 1]
    return embedding(places, torch.cat([*tables, table.flatten(0, 1)[:0]]))


def _resample_whole_grid(table: Tensor, size: Tensor, extent: list[int], interpolation: str) -> Tensor:
    """The first `extent` rows and columns of a table `(R, C, D)` resampled to `size`, flattened in raster order."""
    rows, columns = (
        axis_weights(torch.arange(count, device=size.device), side, length, interpolation, _weight_dtype(table)).to(
            table.dtype
        )
        for count, side, length in zip(extent, size.unbind(), table.shape[:2], strict=True)
    )
    mixed = (rows @ table.flatten(1)).unflatten(1, table.shape[1:])
    return (columns @ mixed).flatten(0, 1)
