"""Validation of arguments: image sizes, choices, and arrays of coordinates."""

import math
import operator
from typing import SupportsIndex, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "as_boxes",
    "check_boxes",
    "check_choice",
    "check_coordinates",
    "check_size",
    "integer",
    "is_size",
    "positive_integer",
    "shown",
]

MAX_SIDE = 10**9
"""Maximum side of an image in pixels: the largest number of a format has 9 digits."""


def is_size(value: object) -> TypeGuard[tuple[int, int]]:
    """Whether `value` is a tuple, list or array of two positive integers; bool is not an integer."""
    if not isinstance(value, (tuple, list, np.ndarray)) or len(value) != 2:
        return False
    return all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) and side >= 1 for side in value)


def check_size(size: object, name: str = "image_size") -> tuple[int, int]:
    """Return (width, height) as two ints.

    Args:
        size: A tuple, list or array of two positive integers of at most `MAX_SIDE`.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: If `size` is anything else.
    """
    if not is_size(size):
        raise ValueError(f"`{name}` must be (width, height), two positive integers, got {size!r}.")
    if max(size) > MAX_SIDE:
        magnitude = int(math.log10(max(size)))  # the number may have more digits than Python writes
        raise ValueError(f"`{name}` must have sides of at most {MAX_SIDE}, got one of about 10**{magnitude}.")
    return int(size[0]), int(size[1])


def check_choice(value: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def integer(value: object, name: str) -> int:
    """Return `value` as an int, or raise ValueError if it is not an integer; bool is not an integer."""
    if not isinstance(value, SupportsIndex) or isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be an integer, got {value!r}.")
    return operator.index(value)


def positive_integer(value: object, name: str) -> int:
    """Return `value` as an int, or raise ValueError if it is not an integer of at least 1."""
    number = integer(value, name)
    if number < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
    return number


def check_coordinates(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return finite coordinates x, y, x, y... as a float64 array.

    Args:
        values: `(n, 2)` points or `(n, 4)` boxes; an empty list means no points. Never modified.
        name: Name of the argument, for the error message.

    Returns:
        float64 of the same shape, a copy.

    Raises:
        ValueError: If `values` is not such an array, or a row is not finite; names the first such row.
    """
    expected = f"`{name}` must be an array of numbers, (n, 2) points or (n, 4) boxes"
    try:
        given = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{expected}: {error}.") from None
    if given.size == 0 and given.ndim in (1, 2) and given.shape[-1] in (0, 2, 4):
        return np.zeros((0, int(given.shape[-1]) or 2))
    if given.dtype.kind not in "iuf" or given.ndim != 2 or given.shape[1] not in (2, 4):
        raise ValueError(f"{expected}, got shape {given.shape}, dtype {given.dtype}.")
    array = given.astype(np.float64)
    _check_finite(array, name)
    return array


def as_boxes(boxes: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return `boxes` as a float64 array `(n, 4)`. Values are not checked; copied only if necessary.

    Args:
        boxes: `(n, 4)` numbers; an empty list means no boxes.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: If `boxes` is not such an array.
    """
    expected = f"`{name}` must be an (n, 4) array of numbers"
    try:
        given = np.asarray(boxes)
    except ValueError as error:
        raise ValueError(f"{expected}: {error}.") from None
    if given.size == 0 and given.ndim in (1, 2) and given.shape[-1] in (0, 4):
        return np.zeros((0, 4))
    if given.dtype.kind not in "iuf" or given.ndim != 2 or given.shape[1] != 4:
        raise ValueError(f"{expected}, got shape {given.shape}, dtype {given.dtype}.")
    return given.astype(np.float64, copy=False)


def check_boxes(boxes: ArrayLike, name: str, first: int = 0) -> NDArray[np.float64]:
    """Return `boxes` as a float64 array `(n, 4)` of finite x1, y1, x2, y2 with x1 <= x2 and y1 <= y2.

    Args:
        boxes: `(n, 4)` numbers; an empty list means no boxes. Never modified.
        name: Name of the argument, for the error message.
        first: Index of the first row, for the error message.

    Returns:
        float64, `(n, 4)`, a copy.

    Raises:
        ValueError: If `boxes` is not such an array; names the first invalid row.
    """
    array = as_boxes(boxes, name).copy()
    _check_finite(array, name, first)
    ordered = (array[:, 2:] >= array[:, :2]).all(axis=1)
    if not ordered.all():
        row = int(np.argmin(ordered))
        raise ValueError(f"`{name}[{first + row}]` must have x1 <= x2 and y1 <= y2, got {array[row].tolist()}.")
    return array


def _check_finite(array: NDArray[np.float64], name: str, first: int = 0) -> None:
    """Raise ValueError at the first row that is not finite."""
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"`{name}[{first + row}]` must be finite, got {array[row].tolist()}.")


def shown(value: object) -> str:
    """Return the text of a value for an error message, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integers of more than 4300 digits
        return "integers that are too large to print"
    return text if len(text) <= 200 else f"{text[:200]}..."
