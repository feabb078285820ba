"""Assembly of the views of images into one sequence of tokens, as in DeepSeek-OCR (arXiv 2510.18234, section 3.2).

The views of an image are its tiles, row after row, and then the whole image. The tokens of all tiles are put together
as one grid. A newline ends each row of tokens; a separator ends the image. The tiles come before the whole image.

Shapes: n images, T tokens of all views, L tokens of all assembled images, D width of the vision encoder, E width of
the text model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .token_reduction_types import TokenReduction

Grid = Sequence[int]


def grid_on_host(grid: Tensor) -> list[list[int]]:
    """Return grids `(n, 2)` or `(n, 3)` as host integers, by which views are stacked. Synchronizes with the device."""
    return grid.tolist()


def sum_views(lengths: Tensor, tile_grid: Tensor) -> Tensor:
    """Return the lengths `(images,)` of images from those of their views, tiles and whole image.

    Args:
        lengths: `(views,)` int64, view after view and image after image.
        tile_grid: `(images, 2)` int64, rows and columns of tiles of each image.

    Raises:
        ValueError: If the tiles and images are not as many as the views.
    """
    views = tile_grid.prod(-1) + 1
    if int(views.sum()) != len(lengths):
        raise ValueError(f"`image_tile_grid` describes {int(views.sum())} views, but there are {len(lengths)}.")
    image = torch.arange(len(views), device=lengths.device).repeat_interleave(views.to(lengths.device))
    return torch.zeros(len(views), dtype=lengths.dtype, device=lengths.device).index_add(0, image, lengths)


def count_view_tokens(
    tile_grid: Grid, tile_tokens: Grid, whole_tokens: Grid, reduction: TokenReduction | None = None
) -> int:
    """Number of tokens of an assembled image.

    Args:
        tile_grid: Rows and columns of tiles; 0 and 0 for none.
        tile_tokens: Rows and columns of tokens of a tile.
        whole_tokens: Rows and columns of tokens of the whole image.
        reduction: How the tokens are reduced, all but the newlines and the separator.
    """
    rows, columns = tile_grid[0] * tile_tokens[0], tile_grid[1] * tile_tokens[1]
    tokens, marks = rows * columns + whole_tokens[0] * whole_tokens[1], rows + whole_tokens[0] + 1
    return marks + (tokens if reduction is None else reduction.count_tokens(tokens))


def get_view_index(tile_grids: Sequence[Grid], token_grids: Sequence[Grid]) -> tuple[Tensor, list[int]]:
    """Index the tokens of assembled images.

    Args:
        tile_grids: Rows and columns of tiles of each image.
        token_grids: Rows and columns of tokens of each view, view after view and image after image.

    Returns:
        `(L,)` int64: indices of tokens from 0 to T - 1, T for a newline, T + 1 for a separator; and the number of
        tokens of each image.

    Raises:
        ValueError: If the tiles and images are not as many as the views, or tiles of an image differ in size.
    """
    views = sum(rows * columns + 1 for rows, columns in tile_grids)
    if views != len(token_grids):
        raise ValueError(f"`tile_grid` describes {views} views, but there are {len(token_grids)}.")
    total = sum(rows * columns for rows, columns in token_grids)
    parts, lengths, view, start = [], [], 0, 0
    for image, (tile_rows, tile_columns) in enumerate(tile_grids):
        tiles = tile_rows * tile_columns
        sizes = {tuple(grid) for grid in token_grids[view : view + tiles]}
        if len(sizes) > 1:
            raise ValueError(f"The tiles of image {image} must have one size, got token grids {sorted(sizes)}.")
        length = 1
        for grid, (down, across) in zip(
            (*sizes, token_grids[view + tiles]), (*[tile_grids[image]] * len(sizes), (1, 1)), strict=True
        ):
            rows, columns = grid
            tokens = torch.arange(down * across * rows * columns) + start
            start += len(tokens)
            tokens = tokens.view(down, across, rows, columns).transpose(1, 2).reshape(down * rows, across * columns)
            tokens = nn.functional.pad(tokens, (0, 1), value=total)
            parts.append(tokens.flatten())
            length += tokens.numel()
        parts.append(torch.tensor([total + 1]))
        lengths.append(length)
        view += tiles + 1
    return torch.cat(parts), lengths


class ViewAssembler(nn.Module):
    """One linear layer, then the assembly of views with a learned newline and separator.

    Args:
        vision_width: D.
        text_width: E.
    """

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(vision_width, text_width)
        self.image_newline = nn.Parameter(torch.empty(text_width))
        self.view_separator = nn.Parameter(torch.empty(text_width))

    @torch.no_grad()
    def reset_marks(self) -> None:
        """Initialise newline and separator as the published code does, with standard deviation `E**-0.5`."""
        for mark in (self.image_newline, self.view_separator):
            init.normal_(mark, mean=0.0, std=len(mark) ** -0.5)

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        """Project and assemble.

        Args:
            features: `(T, D)` tokens of all views.
            index: `(L,)` int64 of [`get_view_index`].

        Returns:
            `(L, E)`.
        """
        marks = torch.stack((self.image_newline, self.view_separator))
        projected = self.fc(features)
        return torch.cat((projected, marks.to(projected.dtype))).index_select(0, index)
