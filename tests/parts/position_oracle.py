"""Position embeddings of whole grids, one image at a time: PyTorch's own resampling, and formulas in loops."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vlparts.parts.pos_embed import PositionEmbedding
from vlparts.parts.pos_embed_options import check_position_options

Grid = tuple[int, int]
KINDS = ("learned", "sinusoidal", "fourier")
COORDINATES = ("absolute", "fractional", "fractional_aspect")
COMBINATIONS = ("add", "stack", "product", "joint", "flat")
INTERPOLATIONS = ("bilinear", "bilinear_antialias", "bicubic", "bicubic_antialias")


def all_options() -> Iterator[dict[str, Any]]:
    """Every set of options that gives a different result."""
    names = ("kind", "coordinates", "combination", "interpolation", "overflow")
    choices = (KINDS, COORDINATES, COMBINATIONS, INTERPOLATIONS, ("error", "interpolate"))
    for values in itertools.product(*choices):
        options = dict(zip(names, values, strict=True))
        table = options["kind"] == "learned" and options["coordinates"] == "absolute"
        resampled = options["overflow"] == "interpolate" if table else options["coordinates"] != "absolute"
        if options["overflow"] == "interpolate" and not table:
            continue
        if options["interpolation"] != "bilinear" and (not resampled or options["kind"] == "fourier"):
            continue
        try:
            check_position_options(8, 8, **options)
        except ValueError:
            continue
        yield options


def name_of(options: dict[str, Any]) -> str:
    return "-".join(options.values())


def place_patches(grids: list[Grid]) -> tuple[Tensor, Tensor]:
    """Positions and grid sizes of all patches of packed images."""
    places = [(y, x, height, width) for height, width in grids for y in range(height) for x in range(width)]
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 4).tensor_split(2, dim=1)


def resize(table: Tensor, size: Grid, interpolation: str) -> Tensor:
    """A table `(R, C, D)` at another size, by PyTorch."""
    mode = interpolation.removesuffix("_antialias")
    antialias = interpolation.endswith("_antialias")
    image = table.permute(2, 0, 1).unsqueeze(0)
    return interpolate(image, size=size, mode=mode, align_corners=False, antialias=antialias)[0].permute(1, 2, 0)


def resize_axis(table: Tensor, size: int, interpolation: str) -> Tensor:
    """A table `(N, D)` at another size, by PyTorch, whose antialiased result is wrong for a width of one."""
    return resize(table.unsqueeze(1).expand(-1, 2, -1), (size, 2), interpolation)[:, 0]


def sinusoid_table(rows: int, width: int) -> Tensor:
    angles = [[row / 10000 ** (2 * (channel // 2) / width) for channel in range(width)] for row in range(rows)]
    values = [[(math.cos if i % 2 else math.sin)(angle) for i, angle in enumerate(row)] for row in angles]
    return torch.tensor(values, dtype=torch.float64)


def fourier(frequencies: Tensor, *coordinates: float) -> Tensor:
    """[sin(W c), cos(W c)] for W `(D/2, axes)`."""
    angles = sum(frequencies[:, axis] * coordinate for axis, coordinate in enumerate(coordinates))
    return torch.cat([torch.sin(angles), torch.cos(angles)])


def axis_vectors(module: PositionEmbedding, axis: str, size: int, unit: int) -> Tensor:
    """Embeddings of the positions on one axis of `size` patches, with coordinates divided by `unit`."""
    rows = module.max_grid_size
    absolute = module.coordinates == "absolute"
    if module.kind == "fourier":
        frequencies = getattr(module, f"{axis}_frequencies").unsqueeze(1)
        return torch.stack([fourier(frequencies, i if absolute else (i + 0.5) / unit) for i in range(size)])
    if module.kind == "sinusoidal":
        table = sinusoid_table(max(size, rows) if absolute else rows, module.axis_width)
    else:
        table = getattr(module, axis)
    if absolute and size <= len(table):
        return table[:size]
    return resize_axis(table, size if absolute else unit, module.interpolation)[:size]


def embed_grid(module: PositionEmbedding, grid: Grid) -> Tensor:
    """Embeddings `(H * W, D)` of one image."""
    height, width = grid
    units = (max(grid), max(grid)) if module.coordinates == "fractional_aspect" else grid
    absolute, rows = module.coordinates == "absolute", module.max_grid_size
    places = list(itertools.product(range(height), range(width)))
    if module.combination == "flat":
        if height * width <= rows * rows:
            return module.table[: height * width]
        return resize_axis(module.table, height * width, module.interpolation)
    if module.combination == "joint" and module.kind == "fourier":
        shift, units = (0.0, (1, 1)) if absolute else (0.5, units)
        return torch.stack(
            [fourier(module.frequencies, (y + shift) / units[0], (x + shift) / units[1]) for y, x in places]
        )
    if module.combination == "joint":
        size = (max(height, rows), max(width, rows)) if absolute else units
        return resize(module.table, size, module.interpolation)[:height, :width].flatten(0, 1)
    row = axis_vectors(module, "row", height, units[0])
    column = axis_vectors(module, "column", width, units[1])
    if module.combination == "stack":
        return torch.stack([torch.cat([row[y], column[x]]) for y, x in places])
    if module.combination == "product":
        return torch.stack([row[y] * column[x] for y, x in places])
    return torch.stack([row[y] + column[x] for y, x in places])


def draw_order_one(module: PositionEmbedding) -> PositionEmbedding:
    """The module in float64 with parameters of order one."""
    module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module
