"""Position embeddings of packed images, as in NaViT (arXiv 2307.06304, section 3.4 and appendix B.1).

Shapes: `L` patches of all images, `D` width, `N` rows of a table (`max_grid_size`).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import initialization as init

from .pos_embed_options import check_position_options
from .pos_embed_tables import resample_axis, resample_grid, sinusoids


class PositionEmbedding(nn.Module):
    """Embedding of the row and column of each patch in its own image.

    It depends only on the row, the column and the size of the image's grid, so that patches may be dropped and images
    packed in any way.

    Args:
        hidden_size: Width D.
        max_grid_size: Rows N of a table; the longest axis with absolute coordinates.
        kind: "learned" is a table of parameters; "sinusoidal" is the fixed table of Vaswani et al., without parameters
            or buffers; "fourier" is [sin(W c), cos(W c)] of the coordinates c with learned W (Tancik et al., arXiv
            2006.10739).
        coordinates: "absolute" counts patches; "fractional" divides the centre of a patch by the size of the axis,
            (y + 1/2) / H; "fractional_aspect" divides both axes by the longer of them. Learned and sinusoidal tables
            are resampled to fractional coordinates.
        combination: "add", "product" and "stack" (D/2 channels each) combine one function per axis. "joint" is one
            function of both coordinates: a learned table `(N, N, D)` (Pix2Struct, arXiv 2210.03347), or Fourier
            features with W `(D/2, 2)`, the paper's form. "flat" is a learned table `(N * N, D)` indexed by the raster
            index of a patch in its own image (ViT, arXiv 2010.11929).
        interpolation: How tables are resampled: "bilinear", "bicubic", or either with "_antialias". Whole grids equal
            `torch.nn.functional.interpolate`. Only a joint learned table with fractional coordinates and antialiasing
            reads the grid sizes on the host.
        overflow: What to do with a grid that exceeds a learned table of absolute positions: "error", or "interpolate"
            to resample the table along the axes that exceed it. No effect for sinusoids, Fourier features and
            fractional coordinates, which have no limit.

    Raises:
        ValueError: If the options exclude each other; see [`check_position_options`].
    """

    # The options decide which of these exist.
    row: nn.Parameter
    column: nn.Parameter
    table: nn.Parameter
    row_frequencies: nn.Parameter
    column_frequencies: nn.Parameter
    frequencies: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        max_grid_size: int,
        *,
        kind: str = "learned",
        coordinates: str = "fractional",
        combination: str = "add",
        interpolation: str = "bilinear",
        overflow: str = "error",
    ) -> None:
        super().__init__()
        check_position_options(
            hidden_size,
            max_grid_size,
            kind=kind,
            coordinates=coordinates,
            combination=combination,
            interpolation=interpolation,
            overflow=overflow,
        )
        self.max_grid_size = max_grid_size
        self.kind, self.coordinates, self.combination = kind, coordinates, combination
        self.interpolation, self.overflow = interpolation, overflow
        self.axis_width = hidden_size // 2 if combination == "stack" else hidden_size
        for name, shape in self._parameter_shapes(hidden_size).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def _parameter_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        rows = self.max_grid_size
        if self.kind == "sinusoidal":
            return {}
        if self.kind == "fourier":
            if self.combination == "joint":
                return {"frequencies": (hidden_size // 2, 2)}
            return dict.fromkeys(("row_frequencies", "column_frequencies"), (self.axis_width // 2,))
        if self.combination == "joint":
            return {"table": (rows, rows, hidden_size)}
        if self.combination == "flat":
            return {"table": (rows * rows, hidden_size)}
        return dict.fromkeys(("row", "column"), (rows, self.axis_width))

    def reset_parameters(self, std: float = 0.02, fourier_std: float = 10.0) -> None:
        """Draw the parameters from normal distributions.

        Args:
            std: Standard deviation of learned tables; with `combination="product"` that of the product.
            fourier_std: Standard deviation of W, in radians along a whole axis; with absolute coordinates along
                `max_grid_size` patches. The paper does not state it. The similarity of two patches decreases with
                their distance, faster for larger values: at 10 it is about a half at an eighth of the axis.
        """
        if self.kind == "fourier":
            std = fourier_std / self.max_grid_size if self.coordinates == "absolute" else fourier_std
        elif self.combination == "product":
            std = std**0.5
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)

    def forward(self, position_ids: Tensor, grid_sizes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Embed patches.

        Args:
            position_ids: `(L, 2)` int64, row and column of each patch in its own image.
            grid_sizes: `(L, 2)` int64, rows and columns of the image of each patch; zeros, for padding, count as 1.
            dtype: Dtype of the result; by default that of the parameters, or float32 without parameters. Sinusoids
                and Fourier features are computed in float32 or better.

        Returns:
            `(L, D)`.

        Raises:
            ValueError: If a grid exceeds a learned table of absolute positions and `overflow` is "error". Not checked
                while compiling.
        """
        parameter = next(self.parameters(), None)
        if dtype is None:
            dtype = torch.float32 if parameter is None else parameter.dtype
        compute_dtype = torch.promote_types(dtype if parameter is None else parameter.dtype, torch.float32)
        sizes = grid_sizes.clamp(min=1)
        if self.coordinates == "fractional_aspect":
            sizes = sizes.amax(1, keepdim=True).expand(-1, 2)
        if self.combination == "flat":
            index = position_ids[:, 0] * sizes[:, 1] + position_ids[:, 1]
            embedded = self._look_up(self.table, index, sizes.prod(1))
        elif self.combination == "joint" and self.kind == "learned":
            embedded = self._look_up_joint(position_ids, sizes)
        elif self.combination == "joint":
            coordinates = self._coordinates(position_ids, sizes, compute_dtype)
            frequencies = self.frequencies.to(compute_dtype)
            # Not a matrix product: autocast would round the coordinates.
            embedded = _waves(coordinates[:, :1] * frequencies[:, 0] + coordinates[:, 1:] * frequencies[:, 1])
        else:
            axes = zip(("row", "column"), position_ids.unbind(1), sizes.unbind(1), strict=True)
            embedded = self._combine(*(self._embed_axis(*axis, compute_dtype) for axis in axes))
        return embedded.to(dtype)

    def _combine(self, row: Tensor, column: Tensor) -> Tensor:
        if self.combination == "stack":
            return torch.cat((row, column), dim=-1)
        return row * column if self.combination == "product" else row + column

    def _embed_axis(self, axis: str, index: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed the positions `(L,)` on the axis "row" or "column"."""
        if self.kind == "learned":
            return self._look_up(getattr(self, axis), index, size)
        if self.kind == "fourier":
            frequencies = getattr(self, f"{axis}_frequencies").to(dtype)
            return _waves(self._coordinates(index, size, dtype).unsqueeze(-1) * frequencies)
        if self.coordinates == "absolute":
            return sinusoids(index, self.axis_width, dtype)
        rows = torch.arange(self.max_grid_size, device=index.device)
        return resample_axis(sinusoids(rows, self.axis_width, dtype), index, size, self.interpolation)

    def _coordinates(self, index: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
        """Coordinates of Fourier features."""
        return index.to(dtype) if self.coordinates == "absolute" else (index.to(dtype) + 0.5) / size

    def _look_up(self, table: Tensor, index: Tensor, size: Tensor) -> Tensor:
        """Embed the positions `(L,)` on axes of `size` by a learned table of one axis."""
        if self.coordinates != "absolute":
            return resample_axis(table, index, size, self.interpolation)
        if self.overflow == "error":
            _check_fits(index, size, table.shape[0])
            return embedding(index, table)
        # An axis of as many patches as the table has rows leaves them unchanged.
        return resample_axis(table, index, size.clamp(min=table.shape[0]), self.interpolation, enlarging=True)

    def _look_up_joint(self, position_ids: Tensor, sizes: Tensor) -> Tensor:
        """Embed the positions `(L, 2)` by the learned table of both axes."""
        if self.coordinates != "absolute":
            return resample_grid(self.table, position_ids, sizes, self.interpolation)
        rows = self.max_grid_size
        if self.overflow == "error":
            _check_fits(position_ids, sizes, rows)
            return embedding(position_ids[:, 0] * rows + position_ids[:, 1], self.table.flatten(0, 1))
        return resample_grid(self.table, position_ids, sizes.clamp(min=rows), self.interpolation, enlarging=True)


def _waves(angles: Tensor) -> Tensor:
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def _check_fits(index: Tensor, sizes: Tensor, rows: int) -> None:
    """Check that positions and grids do not exceed a table; not while compiling."""
    if torch.compiler.is_compiling() or not index.numel():
        return
    needed = int(torch.maximum(index.max() + 1, sizes.max()))
    if needed > rows:
        raise ValueError(
            f"`position_ids` and `grid_sizes` need {needed} positions, but the table of absolute positions has "
            f"{rows}. Use smaller images, a larger `max_grid_size`, fractional coordinates, or "
            "`overflow='interpolate'`."
        )
