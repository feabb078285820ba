"""Checks of sizes and of arrays of coordinates."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["as_boxes", "check_boxes", "check_coordinates", "check_size"]


def check_size(size: object, name: str = "image_size") -> tuple[int, int]:
    """Return (width, height) as two ints.

    Args:
        size: A tuple, list or array of two positive integers.
        name: The argument's name, for the message.

    Raises:
        ValueError: Naming the argument, for anything else.
    """
    if isinstance(size, (tuple, list, np.ndarray)) and len(size) == 2:
        integers = [isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in size]
        if all(integers) and min(size) >= 1:
            return int(size[0]), int(size[1])
    raise ValueError(f"{name} must be (width, height), two positive integers, got {size!r}")


def check_coordinates(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return finite coordinates x, y, x, y... as a float64 array.

    Args:
        values: `(n, 2)` points or `(n, 4)` boxes; an empty list stands for no points. Never written to.
        name: The argument's name, for the message.

    Returns:
        float64 of the same shape, a copy.

    Raises:
        ValueError: Naming the argument and the first bad row.
    """
    wanted = f"{name} must be (n, 2) points or (n, 4) boxes of numbers"
    try:
        given = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{wanted}: {error}") from None
    if given.size == 0 and given.ndim in (1, 2) and given.shape[-1] in (0, 2, 4):
        return np.zeros((0, int(given.shape[-1]) or 2))
    if given.dtype.kind not in "iuf" or given.ndim != 2 or given.shape[1] not in (2, 4):
        raise ValueError(f"{wanted}, got shape {given.shape}, dtype {given.dtype}")
    array = given.astype(np.float64)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"{name}[{row}] must be finite, got {array[row].tolist()}")
    return array


def as_boxes(boxes: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return `boxes` as a float64 array `(n, 4)`, without a look at the values; a copy only where it must be.

    Args:
        boxes: `(n, 4)` numbers; an empty list stands for no boxes.
        name: The argument's name, for the message.

    Raises:
        ValueError: Naming the argument.
    """
    try:
        given = np.asarray(boxes)
    except ValueError as error:
        raise ValueError(f"{name} must be an (n, 4) array of numbers: {error}") from None
    if given.size == 0 and given.ndim in (1, 2) and given.shape[-1] in (0, 4):
        return np.zeros((0, 4))
    if given.dtype.kind not in "iuf" or given.ndim != 2 or given.shape[1] != 4:
        raise ValueError(f"{name} must be an (n, 4) array of numbers, got shape {given.shape}, dtype {given.dtype}")
    return given.astype(np.float64, copy=False)


def check_boxes(boxes: ArrayLike, name: str, first: int = 0) -> NDArray[np.float64]:
    """Return `boxes` as a float64 array `(n, 4)` of finite x1, y1, x2, y2 in order.

    Args:
        boxes: `(n, 4)` numbers; an empty list stands for no boxes. Never written to.
        name: The argument's name, for the message.
        first: Number of the first row, for the message.

    Returns:
        float64, `(n, 4)`, a copy.

    Raises:
        ValueError: Naming the argument and the first bad row.
    """
    array = as_boxes(boxes, name).copy()
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"{name}[{first + row}] must be finite, got {array[row].tolist()}")
    ordered = (array[:, 2:] >= array[:, :2]).all(axis=1)
    if not ordered.all():
        row = int(np.argmin(ordered))
        raise ValueError(f"{name}[{first + row}] must have x1 <= x2 and y1 <= y2, got {array[row].tolist()}")
    return array
