"""Patches that repeat a neighbour, found in the pixels before any of them is encoded.

The prediction is that of PixelPrune (arXiv 2604.00886): a block of patches is expected to equal its left neighbour, or
the one above where the left one equals the upper left one but the one above does not (a vertical edge). A block that
equals its prediction is redundant.
"""

import numpy as np
from einops import rearrange

__all__ = ["check_redundancy_options", "count_within_budget", "find_redundant", "get_blocks", "get_kept_patches"]


def check_redundancy_options(tolerance: int, budget: int | None) -> None:
    """Check the options of [`find_redundant`].

    Raises:
        ValueError: If `tolerance` is not from 0 to 255, `budget` is no positive integer, or both are given.
    """
    if isinstance(tolerance, bool) or not 0 <= tolerance <= 255:
        raise ValueError(f"`redundancy_tolerance` must be from 0 to 255 levels, got {tolerance}.")
    if budget is not None and (isinstance(budget, bool) or budget < 1):
        raise ValueError(f"`token_budget` must be a positive integer or None, got {budget}.")
    if budget is not None and tolerance:
        raise ValueError(f"`redundancy_tolerance` must be 0 with a `token_budget`, got {tolerance} and {budget}.")


def count_within_budget(blocks: int, budget: int | None) -> int:
    """Number of blocks of an image that are kept within a budget.

    Raises:
        ValueError: If there is none, so that the pixels decide.
    """
    if budget is None:
        raise ValueError(
            "The number of tokens of an image depends on its pixels with `drop_redundant_patches`; expected a "
            "`token_budget` where it must be known from the size of the image, as for measuring records beforehand."
        )
    return min(blocks, budget)


def find_redundant(blocks: np.ndarray, tolerance: int = 0, budget: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Find the blocks of an image that its other blocks predict.

    Args:
        blocks: `(rows, columns, values)` levels of each block, uint8 or any real type.
        tolerance: Largest difference of a pixel between a dropped block and the kept block that replaces it. Each
            block is compared with a kept block, not with a dropped neighbour, so that differences do not add up.
        budget: Number of blocks to keep, those with the largest differences from their prediction, in place of a
            tolerance; all if there are fewer.

    Returns:
        `(rows, columns)` bool, whether a block is kept; `(rows, columns)` int64, the index `row * columns + column` of
        the kept block that replaces each (its own index if it is kept).
    """
    rows, columns, _ = blocks.shape
    if budget is not None:
        keep = np.zeros(rows * columns, dtype=bool)
        order = np.argsort(-_prediction_errors(blocks).ravel(), kind="stable")
        keep[order[:budget]] = True
        keep = keep.reshape(rows, columns)
        return keep, _stand_ins(keep, _uses_above(blocks))
    if tolerance == 0:
        keep = _prediction_errors(blocks) > 0
        return keep, _stand_ins(keep, _uses_above(blocks))
    return _find_within(blocks, tolerance)


def get_blocks(image: np.ndarray, side: int) -> np.ndarray:
    """Cut an image `(C, H, W)` into blocks of `side` x `side` pixels: `(rows, columns, C * side**2)`."""
    return rearrange(image, "c (rows h) (columns w) -> rows columns (c h w)", h=side, w=side)


def get_kept_patches(keep: np.ndarray, merge_size: int) -> np.ndarray:
    """Index of the patches of kept blocks of m x m patches in packed order, int64."""
    area = merge_size**2
    return (np.flatnonzero(keep)[:, None] * area + np.arange(area)).ravel()


def _difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Largest difference of levels in the last axis; float64."""
    return np.abs(first.astype(np.float64) - second).max(-1)


def _uses_above(blocks: np.ndarray) -> np.ndarray:
    """Whether the prediction of each block is the one above."""
    above = np.zeros(blocks.shape[:2], dtype=bool)
    above[1:, 0] = True
    left_equals = (blocks[:, 1:] == blocks[:, :-1]).all(-1)
    up_equals = (blocks[1:] == blocks[:-1]).all(-1)
    above[1:, 1:] = up_equals[:, :-1] & ~left_equals[:-1]
    return above


def _prediction_errors(blocks: np.ndarray) -> np.ndarray:
    """Largest difference of each block from its prediction; infinite for the first."""
    errors = np.full(blocks.shape[:2], np.inf)
    errors[:, 1:] = _difference(blocks[:, 1:], blocks[:, :-1])
    above = _uses_above(blocks)
    errors[1:][above[1:]] = _difference(blocks[1:], blocks[:-1])[above[1:]]
    return errors


def _stand_ins(keep: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Index of the kept block that replaces each block, found by following the predictions."""
    rows, columns = keep.shape
    source = np.arange(rows * columns).reshape(rows, columns)
    for row in range(rows):
        for column in range(columns):
            if not keep[row, column]:
                source[row, column] = source[row - 1, column] if above[row, column] else source[row, column - 1]
    return source


def _find_within(blocks: np.ndarray, tolerance: int) -> tuple[np.ndarray, np.ndarray]:
    """Find blocks that differ from the kept ones by at most a tolerance, in reading order."""
    rows, columns, values = blocks.shape
    flat = blocks.reshape(-1, values).astype(np.float64)
    keep = np.zeros((rows, columns), dtype=bool)
    source = np.arange(rows * columns).reshape(rows, columns)

    def same(first: int, second: int) -> bool:
        return first == second or bool(np.abs(flat[first] - flat[second]).max() <= tolerance)

    for row in range(rows):
        for column in range(columns):
            if row == column == 0:
                keep[0, 0] = True
                continue
            left = source[row, column - 1] if column else source[row - 1, 0]
            predicted = left
            if row and column:
                above, corner = source[row - 1, column], source[row - 1, column - 1]
                predicted = above if same(corner, left) and not same(corner, above) else left
            if same(source[row, column], predicted):
                source[row, column] = predicted
            else:
                keep[row, column] = True
    return keep, source
