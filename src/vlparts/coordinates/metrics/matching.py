"""Matching of predicted and true regions, one-to-one, greedy or optimal."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..regions import Region
from ..validation import check_choice
from .iou import box_iou, contains

__all__ = ["Match", "assign", "match", "match_regions", "similarity"]

METHODS = ("greedy", "optimal")


class Match(NamedTuple):
    """A pair: index of a predicted region, index of a true region, and their similarity."""

    predicted: int
    truth: int
    similarity: float


def _matrix(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return `values` as a finite float64 matrix."""
    given = np.asarray(values)
    if given.ndim != 2 or (given.size and given.dtype.kind not in "iuf"):
        raise ValueError(f"`{name}` must be an (n, m) array of numbers, got shape {given.shape}, dtype {given.dtype}.")
    matrix = given.astype(np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    return matrix


def assign(cost: ArrayLike) -> list[tuple[int, int]]:
    """Return the assignment of rows to columns with the smallest total cost.

    The Hungarian method with shortest augmenting paths (Jonker and Volgenant, 1987), in `O(n^2 m)` for n <= m.

    Args:
        cost: `(n, m)` finite numbers of any sign.

    Returns:
        `min(n, m)` pairs, by row.

    Raises:
        ValueError: If `cost` is not such an array.
    """
    matrix = _matrix(cost, "cost")
    if matrix.shape[0] > matrix.shape[1]:
        return sorted((row, column) for column, row in assign(matrix.T))
    rows, columns = matrix.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    row_of = np.full(columns, -1)
    for row in range(rows):
        _augment(matrix, row, row_price, column_price, row_of)
    return sorted((int(row_of[column]), int(column)) for column in np.flatnonzero(row_of >= 0))


def _augment(
    matrix: NDArray[np.float64],
    start: int,
    row_price: NDArray[np.float64],
    column_price: NDArray[np.float64],
    row_of: NDArray[np.int64],
) -> None:
    """Assign row `start` a column along a shortest augmenting path, and update the prices."""
    columns = matrix.shape[1]
    distance, came_from = np.full(columns, np.inf), np.full(columns, -1)
    done = np.zeros(columns, dtype=np.bool_)
    row, reached, column, visited = start, 0.0, -1, [start]
    while True:
        through = reached + matrix[row] - row_price[row] - column_price
        closer = ~done & (through < distance)
        distance[closer], came_from[closer] = through[closer], row
        column = int(np.argmin(np.where(done, np.inf, distance)))
        reached = float(distance[column])
        done[column] = True
        if row_of[column] < 0:
            break
        row = int(row_of[column])
        visited.append(row)
    column_of = {int(row_of[other]): other for other in np.flatnonzero(done) if row_of[other] >= 0}
    row_price[start] += reached
    for other in visited[1:]:
        row_price[other] += reached - distance[column_of[other]]
    column_price[done] -= reached - distance[done]
    while True:
        row = int(came_from[column])
        row_of[column] = row
        if row == start:
            return
        column = int(column_of[row])


def match(similarities: ArrayLike, threshold: float = 0.5, method: str = "greedy") -> list[Match]:
    """Pair predictions with truths one-to-one.

    Args:
        similarities: `(n, m)` finite numbers of at least 0, such as `box_iou(predicted, truth)`.
        threshold: Minimum similarity of a pair. A similarity of 0 never makes a pair.
        method: "greedy" repeatedly takes the most similar remaining pair (ties: the first row, then the first
            column). "optimal" makes the maximum number of pairs, with the largest sum of similarities.

    Returns:
        The pairs, sorted by prediction.

    Raises:
        ValueError: If the method is unknown, or a similarity is not a finite number of at least 0.
    """
    check_choice(method, "method", METHODS)
    if isinstance(threshold, bool) or not np.isfinite(threshold) or threshold < 0:
        raise ValueError(f"`threshold` must be a finite number of at least 0, got {threshold!r}.")
    matrix = _matrix(similarities, "similarities")
    if matrix.size and matrix.min() < 0:
        raise ValueError(f"`similarities` must be at least 0, got {matrix.min()}.")
    allowed = (matrix >= threshold) & (matrix > 0)
    if method == "greedy":
        chosen = _greedy(np.where(allowed, matrix, 0.0))
    else:
        # One more pair counts more than any change of the sum of similarities, which is scaled to less than 1.
        values = np.where(allowed, 1.0 + matrix / (matrix.sum() + 1.0), 0.0)
        chosen = [pair for pair in assign(-values) if allowed[pair]]
    return [Match(row, column, float(matrix[row, column])) for row, column in sorted(chosen)]


def _greedy(matrix: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return the pairs of the largest remaining entries above 0, one after another."""
    rows, columns = np.nonzero(matrix)
    order = np.argsort(-matrix[rows, columns], kind="stable")
    pairs, used_rows, used_columns = [], set(), set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in used_rows and column not in used_columns:
            pairs.append((row, column))
            used_rows.add(row)
            used_columns.add(column)
    return pairs


def similarity(predicted: Sequence[Region], truth: Sequence[Region], *, labels: bool = True) -> NDArray[np.float64]:
    """Return the similarities of regions, in [0, 1].

    The similarity of a predicted point is 1 with a true box, quad or polygon that contains it, and 0 otherwise. That
    of any other two regions is the IoU of their bounding boxes. Regions of different images have similarity 0.

    Args:
        predicted: n regions.
        truth: m regions, in the same pixels.
        labels: Whether regions with different labels have similarity 0.

    Returns:
        float64, `(n, m)`.
    """
    similarities = box_iou([region.xyxy for region in predicted], [region.xyxy for region in truth])
    for row, region in enumerate(predicted):
        if region.kind == "point":
            similarities[row] = [contains(other, *region.points[0]) for other in truth]
    unequal = _differ([region.image for region in predicted], [region.image for region in truth])
    if labels:
        unequal |= _differ([region.label for region in predicted], [region.label for region in truth])
    similarities[unequal] = 0.0
    return similarities


def _differ(first: Sequence[object], second: Sequence[object]) -> NDArray[np.bool_]:
    """Return which items of two lists differ, `(n, m)`."""
    numbers: dict[object, int] = {}
    rows, columns = (np.array([numbers.setdefault(item, len(numbers)) for item in items]) for items in (first, second))
    differ: NDArray[np.bool_] = rows[:, None] != columns[None]
    return differ


def match_regions(
    predicted: Sequence[Region],
    truth: Sequence[Region],
    threshold: float = 0.5,
    *,
    method: str = "greedy",
    labels: bool = True,
) -> list[Match]:
    """Pair predicted regions with true ones: `match` of their `similarity`.

    Args:
        predicted: n regions.
        truth: m regions, in the same pixels.
        threshold: Minimum similarity of a pair.
        method: "greedy" or "optimal", see `match`.
        labels: Whether regions with different labels have similarity 0.

    Returns:
        The pairs, sorted by prediction.

    Raises:
        ValueError: If the method is unknown or the threshold is not a finite number of at least 0.
    """
    return match(similarity(predicted, truth, labels=labels), threshold, method)
