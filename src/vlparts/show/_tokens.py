"""Pictures of which vision tokens of an image are kept, and of what a model answers with fewer of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._figure import BLUE, import_matplotlib, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

DROPPED = 0.88  # how much of a dropped cell is white
HIGH_CONTRAST = "#ffd400"
PANEL_WIDTH = 2.8  # inches
MARKED: dict[str, Any] = dict(marker="o", color=BLUE, linewidth=1.5, markersize=5)


def kept_tokens(
    image: Image.Image | ArrayLike,
    grid: Sequence[int],
    assignments: Mapping[str, ArrayLike],
    *,
    columns: int = 4,
    path: str | Path | None = None,
) -> Figure:
    """Draw an image with what becomes of its tokens, for several methods, shares or layers.

    A token that is kept alone shows its pixels. Tokens that were merged show their mean colour, with a line around
    each group. Dropped tokens are pale.

    Args:
        image: A Pillow image, or an array `(H, W, 3)` uint8, which the grid covers whole.
        grid: Rows and columns of tokens.
        assignments: Title to `(rows * columns,)` integers: the token that holds each, and -1 for one that was dropped,
            such as `ReducedTokens.assignment`.
        columns: Panels side by side.
        path: File to save the figure to, in the format of its extension.

    Returns:
        The figure; each title has the number of tokens that are left.

    Raises:
        ValueError: If there are no assignments, or one does not have an integer of at least -1 for each token.
        ImportError: If Matplotlib is not installed.
    """
    rows, width = (int(side) for side in grid)
    if not assignments:
        raise ValueError("`assignments` must hold at least one entry, got none.")
    pixels = np.asarray(image)[..., :3]
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"`image` must be an RGB image, got {pixels.dtype} of shape {pixels.shape}.")
    count = min(columns, len(assignments))
    lines = -(-len(assignments) // count)
    height = PANEL_WIDTH * pixels.shape[0] / pixels.shape[1] + 0.45
    figure = new_figure(PANEL_WIDTH * count, height * lines)
    axes = figure.subplots(lines, count, squeeze=False).ravel()
    for ax, (title, given) in zip(axes, assignments.items(), strict=False):
        groups = np.asarray(given)
        if groups.shape != (rows * width,) or groups.dtype.kind not in "iu" or groups.min() < -1:
            raise ValueError(
                f"`assignments[{title!r}]` must hold {rows * width} integers of at least -1, got {groups.dtype} of "
                f"shape {groups.shape}."
            )
        _draw(ax, pixels, groups.reshape(rows, width))
        left = len(np.unique(groups[groups >= 0]))
        ax.set_title(f"{title}: {left:,} of {rows * width:,}", fontsize=9, loc="left")
    for ax in axes[len(assignments) :]:
        ax.set_visible(False)
    return save_figure(figure, path)


def _draw(ax: Axes, pixels: NDArray[Any], groups: NDArray[Any]) -> None:
    """Draw one panel."""
    height, width = pixels.shape[:2]
    rows, columns = groups.shape
    down = np.minimum(np.arange(height) * rows // height, rows - 1)
    across = np.minimum(np.arange(width) * columns // width, columns - 1)
    of_pixel = groups[np.ix_(down, across)]
    shown = pixels.astype(np.float64)
    flat = of_pixel.ravel() + 1  # 0 for dropped ones
    totals = np.bincount(flat, minlength=2)
    sums = np.stack([np.bincount(flat, shown[..., c].ravel(), len(totals)) for c in range(3)], 1)
    means = sums / np.maximum(totals, 1)[:, None]
    sizes = np.bincount(groups.ravel() + 1, minlength=len(totals))
    merged = (sizes[flat] > 1).reshape(height, width) & (of_pixel >= 0)
    shown[merged] = means[flat].reshape(height, width, 3)[merged]
    dropped = of_pixel < 0
    shown[dropped] = shown[dropped] * (1 - DROPPED) + 255 * DROPPED
    ax.imshow(shown.round().astype(np.uint8), extent=(0, columns, rows, 0), aspect=height * columns / (width * rows))
    ax.add_collection(_borders(groups, sizes))
    ax.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))


def _borders(groups: NDArray[Any], sizes: NDArray[Any]) -> Any:
    """Lines between merged tokens and others."""
    merged = (sizes[groups + 1] > 1) & (groups >= 0)
    lines = []
    for row, column in zip(
        *np.nonzero((groups[:, 1:] != groups[:, :-1]) & (merged[:, 1:] | merged[:, :-1])), strict=True
    ):
        lines.append([(column + 1, row), (column + 1, row + 1)])
    for row, column in zip(*np.nonzero((groups[1:] != groups[:-1]) & (merged[1:] | merged[:-1])), strict=True):
        lines.append([(column, row + 1), (column + 1, row + 1)])
    return import_matplotlib("collections").LineCollection(lines, colors=HIGH_CONTRAST, linewidths=0.6)


def evaluations(results: Sequence[Mapping[str, Any]], *, path: str | Path | None = None) -> Figure:
    """Draw accuracy, intersection over union, time to the first token and memory over the tokens of an image.

    Args:
        results: `results` of an evaluation.json that `python -m vlparts evaluate` wrote, or of
            `vlparts.evaluation.evaluate_tokens` as dictionaries.
        path: File to save the figure to, in the format of its extension.

    Returns:
        The figure, with one axes for each quantity that the results have. Bars are 95 % confidence intervals.

    Raises:
        ValueError: If there are no results.
        ImportError: If Matplotlib is not installed.
    """
    if not results:
        raise ValueError("`results` must hold at least one evaluation, got none.")
    names = [name for name in ("accuracy", "iou") if any(one[name] is not None for one in results)]
    panels = [*names, "first_token_seconds", "peak_mib"]
    figure = new_figure(3.2 * len(panels), 3.0)
    tokens = [one["image_tokens"] for one in results]
    for ax, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if name in names:
            _draw_means(ax, results, name)
        else:
            scale = 1e3 if name == "first_token_seconds" else 1.0
            ax.plot(tokens, [scale * one[name] for one in results], **MARKED)
        titles = {"iou": "mean IoU", "first_token_seconds": "first token, ms", "peak_mib": "peak memory, MiB"}
        ax.set_title(titles.get(name, name), fontsize=10, loc="left")
        ax.set(xlabel="image tokens of a question", xlim=(0, 1.06 * max(tokens)))
        ax.set_ylim(0, max(ax.dataLim.y1, 1e-9) * 1.06)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
    return save_figure(figure, path)


def _draw_means(ax: Axes, results: Sequence[Mapping[str, Any]], name: str) -> None:
    found = [(one["image_tokens"], one[name]) for one in results if one[name] is not None]
    tokens = np.array([tokens for tokens, _ in found])
    means, lows, highs = (np.array([one[field] for _, one in found]) for field in ("mean", "low", "high"))
    ax.errorbar(tokens, means, yerr=[means - lows, highs - means], capsize=3, **MARKED)
