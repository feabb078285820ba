"""Options of [`PositionEmbedding`], and which of them can be combined.

In a file without layers, since configurations use it too.
"""

from typing import Literal, get_args

PositionKind = Literal["learned", "sinusoidal", "fourier"]
PositionCoordinates = Literal["absolute", "fractional", "fractional_aspect"]
PositionCombination = Literal["add", "stack", "product", "joint", "flat"]
PositionInterpolation = Literal["bilinear", "bilinear_antialias", "bicubic", "bicubic_antialias"]
PositionOverflow = Literal["error", "interpolate"]

_COMBINATIONS: dict[str, tuple[str, ...]] = {
    "learned": get_args(PositionCombination),
    "sinusoidal": ("add", "stack", "product"),
    "fourier": ("add", "stack", "product", "joint"),
}


def check_position_options(
    hidden_size: int,
    max_grid_size: int,
    *,
    kind: str = "learned",
    coordinates: str = "fractional",
    combination: str = "add",
    interpolation: str = "bilinear",
    overflow: str = "error",
    prefix: str = "",
) -> None:
    """Check the options of a position embedding.

    Args:
        hidden_size: Width of the embedding.
        max_grid_size: Rows of a table.
        kind: Function from a coordinate to a vector.
        coordinates: Definition of coordinates.
        combination: How the two axes are combined.
        interpolation: How tables are resampled.
        overflow: What to do with grids that exceed a table.
        prefix: Prefix of the last five names in error messages, for example "position_".

    Raises:
        ValueError: If an option is unknown, options exclude each other, or a size is not positive or not a multiple of
            what `kind` and `combination` need.
    """
    options = (
        ("kind", kind, get_args(PositionKind)),
        ("coordinates", coordinates, get_args(PositionCoordinates)),
        ("interpolation", interpolation, get_args(PositionInterpolation)),
        ("overflow", overflow, get_args(PositionOverflow)),
        ("combination", combination, get_args(PositionCombination)),
    )
    for name, value, possible in options:
        if value not in possible:
            raise ValueError(f"`{prefix}{name}` must be one of {', '.join(possible)}, got {value!r}.")
    if combination not in _COMBINATIONS[kind]:
        raise ValueError(
            f"`{prefix}combination` must be one of {', '.join(_COMBINATIONS[kind])} with `{prefix}kind`={kind!r}, "
            f"got {combination!r}."
        )
    if combination == "flat" and coordinates != "absolute":
        raise ValueError(
            f"`{prefix}coordinates` must be 'absolute' with `{prefix}combination`='flat', got {coordinates!r}."
        )
    for name, size in (("hidden_size", hidden_size), ("max_grid_size", max_grid_size)):
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")
    multiple = (1 if kind == "learned" else 2) * (2 if combination == "stack" else 1)
    if hidden_size % multiple:
        raise ValueError(
            f"`hidden_size` must be a multiple of {multiple} with `{prefix}kind`={kind!r} and "
            f"`{prefix}combination`={combination!r}, got {hidden_size}."
        )
