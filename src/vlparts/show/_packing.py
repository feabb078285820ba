"""Plot of a packing plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._figure import HATCHED, import_matplotlib, integer_ticks, new_figure, save_figure, thousands_separators

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR_HEIGHT = 0.82  # in rows
MAX_TICKS = 20
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)


def _check_plan(plan: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> list[int]:
    """Check a plan against the lengths; return the used length of each bin."""
    if not len(plan):
        raise ValueError("`plan` must have at least one bin, got none.")
    seen: set[int] = set()
    used = []
    for index, bin_ in enumerate(plan):
        for item in bin_:
            if not 0 <= item < len(lengths):
                raise ValueError(f"`plan[{index}]` must have items in 0..{len(lengths) - 1}, got {item}.")
            if item in seen:
                raise ValueError(f"`plan[{index}]` has item {item}, which is already in the plan.")
            seen.add(item)
        used.append(sum(int(lengths[item]) for item in bin_))
        if used[-1] > capacity and len(bin_) > 1:
            raise ValueError(f"`plan[{index}]` has length {used[-1]}, which exceeds `capacity`={capacity}.")
    return used


def _draw_items(figure: Figure, ax: Axes, plan: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """Draw the items of each bin end to end, coloured by length, with the length as text if it fits."""
    rows = [row for row, bin_ in enumerate(plan) for _ in bin_]
    sizes = np.array([int(lengths[item]) for bin_ in plan for item in bin_])
    starts = np.concatenate([np.cumsum([0, *(int(lengths[item]) for item in bin_)])[:-1] for bin_ in plan])
    # Without the ends of the colour map, which contrast too little with white text and the axes.
    colours = import_matplotlib("cm").viridis_r(0.1 + 0.8 * sizes / max(sizes, default=1))
    ax.barh(rows, sizes, left=starts, height=BAR_HEIGHT, color=colours, edgecolor="white", linewidth=0.8)
    width, height = figure.get_size_inches()
    inches_per_unit, bar_inches = 0.88 * width / ax.get_xlim()[1], BAR_HEIGHT * (height - 1.0) / len(plan)
    font = min(8.0, 0.7 * 72 * bar_inches)
    for row, size, start, colour in zip(rows, sizes, starts, colours, strict=True):
        text = f"{size:,}"
        if font >= 5 and size * inches_per_unit > (len(text) + 1) * 0.6 * font / 72:
            text_colour = "white" if colour[:3] @ LUMINANCE < 0.45 else "black"
            ax.text(start + size / 2, row, text, ha="center", va="center", fontsize=font, color=text_colour)


def packing_plan(
    plan: Sequence[Sequence[int]],
    lengths: Sequence[int],
    capacity: int,
    *,
    path: str | Path | None = None,
) -> Figure:
    """Draw the items of each bin with their lengths, and the padding.

    Args:
        plan: Item indices per bin, as `plan_packing` returns them; or a subset of the bins.
        lengths: Length of each item in patches or tokens.
        capacity: Length of a bin. A single item may exceed it and is drawn past the capacity line.
        path: File to save the figure to, in the format of its extension.

    Returns:
        The figure. Its axes have two bar containers: the items in the order of the plan, coloured by length, and the
        padding of the bins, hatched. The title has the percentage of padding.

    Raises:
        ValueError: If the plan is empty, has an item twice or one out of range, or several items of a bin exceed
            `capacity` together.
        ImportError: If Matplotlib is not installed.
    """
    used = np.array(_check_plan(plan, lengths, capacity))
    padding = np.maximum(capacity - used, 0)
    figure = new_figure(8.0, min(max(1.3 + 0.3 * len(plan), 2.2), 14.0))
    ax = figure.subplots()
    ax.set(xlim=(0, 1.004 * max(capacity, used.max())), ylim=(len(plan) - 0.5, -0.5))
    ax.set(xlabel="length", ylabel="bin")
    _draw_items(figure, ax, plan, lengths)
    empty = np.flatnonzero(padding)
    style = dict(HATCHED, edgecolor="#9a9a9a", label="padding")
    ax.barh(empty, padding[empty], left=used[empty], height=BAR_HEIGHT, **style)
    ax.axvline(capacity, color="black", linewidth=1, linestyle="--", label="capacity")
    integer_ticks(ax.yaxis, MAX_TICKS)
    thousands_separators(ax.xaxis)
    ax.spines[["top", "right", "left"]].set_visible(False)
    items, share = sum(len(bin_) for bin_ in plan), padding.sum() / (padding.sum() + used.sum())
    title = f"{items:,} items in {len(plan):,} bins of {capacity:,}: {share:.1%} padding"
    ax.set_title(title, fontsize=11, loc="left")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8)
    return save_figure(figure, path)
