"""Position tables of another size.

Shapes: h and w rows and columns of the source's tables, N of the part's, D width.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...parts.configuration_navit import NaViTConfig

_PREFIX = "embeddings.position_embedding."


def resample_tables(weights: dict[str, Tensor], config: NaViTConfig) -> dict[str, Tensor]:
    """Resample learned tables to `max_grid_size` rows and columns, where they have another size.

    It is done as `position_interpolation` says. Left as the source has it, an image of N x N patches gets the
    positions that the source itself would make for it.

    Args:
        weights: Tensors of a NaViT by name; a table is `(h, w, D)` if joint, `(h, D)` or `(w, D)` if not.
        config: The configuration, which has the size N and the interpolation.

    Returns:
        The tensors, with tables `(N, N, D)` and `(N, D)`. They are computed in float32 or better.
    """
    return {
        name: _resample(tensor, config.max_grid_size, config.position_interpolation)
        if name.startswith(_PREFIX)
        else tensor
        for name, tensor in weights.items()
    }


def _resample(table: Tensor, size: int, interpolation: str) -> Tensor:
    sizes = [size] * (table.ndim - 1)
    if list(table.shape[:-1]) == sizes:
        return table
    mode, _, antialias = interpolation.partition("_")
    image = table.to(torch.promote_types(table.dtype, torch.float32)).movedim(-1, 0)
    image = image.reshape(1, table.shape[-1], table.shape[0], -1)  # A table of one axis is an image of one column.
    shape = (size, sizes[1] if len(sizes) > 1 else 1)
    resized = interpolate(image, size=shape, mode=mode, antialias=bool(antialias))
    return resized[0].flatten(1).T.unflatten(0, sizes).to(table.dtype).contiguous()
