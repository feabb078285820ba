"""Packed patches in the layouts that other models take."""

from collections.abc import Iterator

from torch import Tensor


def channels_last(patches: Tensor) -> Tensor:
    """Patches `(L, 3*4*4)` as rows, columns, channels."""
    return patches.unflatten(1, (3, 4, 4)).permute(0, 2, 3, 1).flatten(1)


def pictures(patches: Tensor, grids: Tensor) -> Iterator[Tensor]:
    """The images `(1, 3, H, W)` that packed patches of 4 x 4 pixels were cut from."""
    for (_, rows, columns), own in zip(grids.tolist(), patches.split(grids.prod(-1).tolist()), strict=True):
        blocks = own.unflatten(1, (3, 4, 4)).unflatten(0, (rows, columns))
        yield blocks.permute(2, 0, 3, 1, 4).reshape(1, 3, 4 * rows, 4 * columns)
