"""Position embeddings of packed images.

Shapes: L patches of all images, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import initialization as init


class FactorizedPositionEmbedding(nn.Module):
    """One learned table for rows and one for columns, added (NaViT, arXiv 2307.06304, section 2.1).

    With "absolute" coordinates, patch (y, x) takes row y of one table and row x of the other. With "fractional"
    coordinates the tables are resampled to each image's own grid of H x W patches: the centre of patch y lies at
    (y + 1/2) / H of the axis, that is at (y + 1/2) * N / H - 1/2 in a table of N rows, and the two nearest rows are
    mixed linearly (clamped at the ends). The paper interpolates too but leaves the index map open; this is the
    half-pixel map that image resampling uses.

    Args:
        max_grid_size: Rows N of each table.
        hidden_size: Width D.
        coordinates: "absolute" or "fractional".
    """

    def __init__(self, max_grid_size: int, hidden_size: int, coordinates: str = "fractional") -> None:
        super().__init__()
        if coordinates not in ("absolute", "fractional"):
            raise ValueError(f"`coordinates` must be 'absolute' or 'fractional', got {coordinates!r}.")
        self.coordinates = coordinates
        self.row = nn.Parameter(torch.empty(max_grid_size, hidden_size))
        self.column = nn.Parameter(torch.empty(max_grid_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw both tables from a normal distribution."""
        for table in (self.row, self.column):
            init.normal_(table, mean=0.0, std=std)

    def forward(self, position_ids: Tensor, grid_sizes: Tensor) -> Tensor:
        """Embed patches.

        Args:
            position_ids: `(L, 2)` int64, row and column of each patch in its own image.
            grid_sizes: `(L, 2)` int64, rows and columns of the image that each patch belongs to.

        Returns:
            `(L, D)` in the tables' dtype.

        Raises:
            ValueError: If coordinates are absolute and a patch lies outside of the tables.
        """
        if self.coordinates == "fractional":
            return self._resample(self.row, position_ids[:, 0], grid_sizes[:, 0]) + self._resample(
                self.column, position_ids[:, 1], grid_sizes[:, 1]
            )
        limit = self.row.shape[0]
        if not torch.compiler.is_compiling() and position_ids.numel() and int(position_ids.max()) >= limit:
            raise ValueError(
                f"`position_ids` reach {int(position_ids.max())}, but the tables of absolute positions have {limit} "
                "rows. Use smaller images, a larger `max_grid_size`, or `position_coordinates='fractional'`."
            )
        return embedding(position_ids[:, 0], self.row) + embedding(position_ids[:, 1], self.column)

    @staticmethod
    def _resample(table: Tensor, index: Tensor, size: Tensor) -> Tensor:
        rows = table.shape[0]
        place = ((index.double() + 0.5) * (rows / size.double()) - 0.5).clamp(0, rows - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=rows - 1)
        share = (place - low).unsqueeze(-1).to(table.dtype)
        return torch.lerp(embedding(low, table), embedding(high, table), share)
