"""Tables of positions: sinusoids, and resampling along one or two axes for the patches of packed images.

Position `i` of an axis of `size` patches is at `(i + 1/2) * N / size - 1/2` in a table of `N` rows, or with aligned
corners at `i * (N - 1) / (size - 1)`, as in `torch.nn.functional.interpolate`; whole grids equal its results.

Shapes: `L` patches of all images, `N` rows of a table (`R` rows and `C` columns of one with two axes), `D` width.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag, interpolate

# The free constant of Keys' cubic kernel. PyTorch uses one value without antialiasing and another, PIL's, with it.
CUBIC = -0.75
CUBIC_ANTIALIAS = -0.5


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Interleaved sines and cosines of frequencies from 1 to 1/10000 (Vaswani et al., arXiv 1706.03762, section 3.5).

    Args:
        positions: `(L,)` positions on an axis.
        width: Even number of channels D.
        dtype: Floating-point dtype of computation and result.

    Returns:
        `(L, D)`: channel 2i is sin(position / 10000^(2i/D)), channel 2i + 1 the cosine.
    """
    exponents = torch.arange(0, width, 2, dtype=dtype, device=positions.device) / width
    angles = positions.to(dtype).unsqueeze(-1) * 10000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def axis_taps(
    index: Tensor, size: Tensor, rows: int, interpolation: str, dtype: torch.dtype, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """The 2 (linear) or 4 (cubic) neighbouring rows that a position is interpolated from, and their weights.

    Antialiased kernels are wider where an axis has fewer patches than the table has rows: see [`axis_weights`].

    Args:
        index: `(L,)` int64, positions on an axis.
        size: `(L,)` int64, patches of that axis; with an antialiased interpolation at least `rows`.
        rows: Rows N of the table.
        interpolation: "bilinear", "bicubic", or either with "_antialias".
        dtype: Floating-point dtype of the weights.
        align_corners: Whether the first and the last patch of an axis are the first and the last row of the table.

    Returns:
        `(L, 2 or 4)` int64 rows, and their weights; the weights of a patch sum to 1.
    """
    # The position in the table is numerator / denominator; integer division finds its neighbours without rounding.
    if align_corners:
        numerator, denominator = index * (rows - 1), (size - 1).clamp(min=1)
    else:
        numerator, denominator = (2 * index + 1) * rows - size, 2 * size
    below = torch.div(numerator, denominator, rounding_mode="floor")
    share = (numerator - below * denominator).to(dtype) / denominator
    first, last = (-1, 2) if interpolation.startswith("bicubic") else (0, 1)
    offsets = torch.arange(first, last + 1, device=index.device)
    weights = _kernel(share.unsqueeze(-1) - offsets, interpolation)
    taps = below.unsqueeze(-1) + offsets
    if interpolation.endswith("_antialias"):  # omits rows outside of the table; the others repeat the outermost row
        weights = _normalize(weights * ((taps >= 0) & (taps < rows)))
    return taps.clamp(0, rows - 1), weights


def axis_weights(index: Tensor, size: Tensor, rows: int, interpolation: str, dtype: torch.dtype) -> Tensor:
    """Weight of every row of a table for positions on an axis, with an antialiased interpolation.

    Where an axis has fewer patches than the table has rows, a patch is interpolated from all rows that it covers.

    Args:
        index: `(L,)` int64, positions on an axis.
        size: `(L,)` int64, patches of that axis.
        rows: Rows N of the table.
        interpolation: "bilinear_antialias" or "bicubic_antialias".
        dtype: Floating-point dtype of computation and result.

    Returns:
        `(L, N)`; the weights of a patch sum to 1.
    """
    step = rows / size.to(dtype)
    centres = (index.to(dtype) + 0.5) * step - 0.5
    distances = torch.arange(rows, device=index.device) - centres.unsqueeze(-1)
    return _normalize(_kernel(distances / step.clamp(min=1.0).unsqueeze(-1), interpolation))


def _kernel(distances: Tensor, interpolation: str) -> Tensor:
    """Weight of a row by its signed distance: the hat function, or Keys' cubic."""
    x = distances.abs()
    if interpolation.startswith("bilinear"):
        return (1 - x).clamp(min=0)
    a = CUBIC_ANTIALIAS if interpolation.endswith("_antialias") else CUBIC
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _normalize(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def resample_axis(table: Tensor, index: Tensor, size: Tensor, interpolation: str, enlarging: bool = False) -> Tensor:
    """Resample a table of one axis to positions on axes of any size, without a loop over images.

    Args:
        table: `(N, D)`.
        index: `(L,)` int64, positions on an axis.
        size: `(L,)` int64, patches of that axis, at least 1.
        interpolation: "bilinear", "bicubic", or either with "_antialias".
        enlarging: The caller's promise that every size is at least N.

    Returns:
        `(L, D)` in the table's dtype.
    """
    rows, dtype = table.shape[0], _weight_dtype(table)
    if _widens(interpolation, enlarging):
        return axis_weights(index, size, rows, interpolation, dtype).to(table.dtype) @ table
    return _mix(table, *axis_taps(index, size, rows, interpolation, dtype))


def resample_grid(
    table: Tensor,
    position_ids: Tensor,
    sizes: Tensor,
    interpolation: str,
    enlarging: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """Resample a table of two axes to the patches of grids of any size.

    Only an antialiased interpolation that may shrink the table loops over the distinct grids and reads them on the
    host; exported programs compute it by a product with the whole table instead.

    Args:
        table: `(R, C, D)`.
        position_ids: `(L, 2)` int64, row and column of each patch.
        sizes: `(L, 2)` int64, patches of both axes, at least 1.
        interpolation: "bilinear", "bicubic", or either with "_antialias".
        enlarging: The caller's promise that all sizes are at least R and C.
        align_corners: Whether the corners of an image are those of the table; not with "_antialias".

    Returns:
        `(L, D)` in the table's dtype.

    Raises:
        ValueError: If `align_corners` is combined with an antialiased interpolation.
    """
    if align_corners and interpolation.endswith("_antialias"):
        raise ValueError(f"`align_corners` must be False with `interpolation`={interpolation!r}, got True.")
    if _widens(interpolation, enlarging):
        by_grid = _resample_with_all_rows if torch.compiler.is_exporting() else _resample_grid_by_grid
        return by_grid(table, position_ids, sizes, interpolation)
    (height, width), dtype = table.shape[:2], _weight_dtype(table)
    row_taps, row_weights = axis_taps(position_ids[:, 0], sizes[:, 0], height, interpolation, dtype, align_corners)
    column_taps, column_weights = axis_taps(
        position_ids[:, 1], sizes[:, 1], width, interpolation, dtype, align_corners
    )
    taps = row_taps.unsqueeze(2) * width + column_taps.unsqueeze(1)
    weights = row_weights.unsqueeze(2) * column_weights.unsqueeze(1)
    return _mix(table.flatten(0, 1), taps.flatten(1), weights.flatten(1))


def _widens(interpolation: str, enlarging: bool) -> bool:
    """Whether the kernel may cover more than the nearest rows."""
    return interpolation.endswith("_antialias") and not enlarging


def _weight_dtype(table: Tensor) -> torch.dtype:
    return torch.promote_types(table.dtype, torch.float32)


def _mix(table: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums, `(L, D)` in the table's dtype, of the rows `taps` `(L, k)`."""
    return embedding_bag(taps, table, mode="sum", per_sample_weights=weights.to(table.dtype))


def _resample_grid_by_grid(table: Tensor, position_ids: Tensor, sizes: Tensor, interpolation: str) -> Tensor:
    """`resample_grid` by one resampled table per distinct grid."""
    grids, group = sizes.unique(dim=0, return_inverse=True)
    last = torch.zeros_like(grids).scatter_reduce(0, group.unsqueeze(1).expand(-1, 2), position_ids, "amax")
    extents = last + 1  # smaller than the grid where patches are dropped or both axes have the longer one's size
    tables = [
        _resample_whole_grid(table, grid, extent, interpolation)
        for grid, extent in zip(grids.unbind(), extents.tolist(), strict=True)
    ]
    patches = extents.prod(1)
    starts = patches.cumsum(0) - patches
    index = starts[group] + position_ids[:, 0] * extents[group, 1] + position_ids[:, 1]
    return embedding(index, torch.cat([*tables, table.flatten(0, 1)[:0]]))


def _resample_with_all_rows(table: Tensor, position_ids: Tensor, sizes: Tensor, interpolation: str) -> Tensor:
    """`resample_grid` with weights `(L, R * C)` of the whole table: more work, without shapes that depend on data."""
    dtype = _weight_dtype(table)
    rows, columns = (
        axis_weights(position_ids[:, axis], sizes[:, axis], table.shape[axis], interpolation, dtype).to(table.dtype)
        for axis in (0, 1)
    )
    return (rows.unsqueeze(2) * columns.unsqueeze(1)).flatten(1) @ table.flatten(0, 1)


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


def resample_whole_grid(table: Tensor, height: int, width: int) -> Tensor:
    """Resample a table `(R, C, D)` to `(height, width, D)`, bicubic and antialiased, in float32."""
    if table.shape[:2] == (height, width):
        return table
    if (
        width == 1 and height > 1
    ):  # PyTorch's antialiased interpolation is wrong on CPU for one column, not for one row
        return resample_whole_grid(table.transpose(0, 1), width, height).transpose(0, 1)
    grid = table.float().permute(2, 0, 1)[None]
    grid = interpolate(grid, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return grid[0].permute(1, 2, 0).to(table.dtype)


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Rows of a table `(2 * N - 1, D)` for all pairs of positions, `(size, size, D)`, resampled if N is not `size`."""
    if len(table) != 2 * size - 1:
        longer = table.to(_weight_dtype(table)).T[None]
        table = interpolate(longer, size=2 * size - 1, mode="linear")[0].T.to(table.dtype)
    positions = torch.arange(size, device=table.device)
    return table[positions[:, None] - positions + size - 1]
