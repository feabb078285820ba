"""The picture of a packing plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._figure import import_matplotlib as _matplotlib
from ._figure import new_figure as _figure
from ._figure import save_figure as _save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR = 0.82  # height of a bar, in rows
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)


def _check_plan(plan: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> list[int]:
    """Return the filled length of every bin, after checking that the plan fits the lengths."""
    if not len(plan):
        raise ValueError("plan must hold at least one bin, got none")
    seen: set[int] = set()
    used = []
    for number, bin_ in enumerate(plan):
        for item in bin_:
            if not 0 <= item < len(lengths):
                raise ValueError(f"plan[{number}] holds item {item}, expected 0..{len(lengths) - 1}")
            if item in seen:
                raise ValueError(f"plan[{number}] holds item {item}, which stands in the plan already")
            seen.add(item)
        used.append(sum(int(lengths[item]) for item in bin_))
        if used[-1] > capacity and len(bin_) > 1:
            raise ValueError(f"plan[{number}] holds {used[-1]}, expected at most capacity {capacity}")
    return used


def _draw_items(figure: Figure, ax: Axes, plan: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """Draw every bin's items end to end, coloured by length, with the length where there is room."""
    rows = [row for row, bin_ in enumerate(plan) for _ in bin_]
    sizes = np.array([int(lengths[item]) for bin_ in plan for item in bin_])
    starts = np.concatenate([np.cumsum([0, *(int(lengths[item]) for item in bin_)])[:-1] for bin_ in plan])
    # The ends of the map are left out: they are too close to white letters and to the axes.
    colours = _matplotlib("cm").viridis_r(0.1 + 0.8 * sizes / max(sizes, default=1))
    ax.barh(rows, sizes, left=starts, height=BAR, color=colours, edgecolor="white", linewidth=0.8)
    width, height = figure.get_size_inches()
    per_unit, bar = 0.88 * width / ax.get_xlim()[1], BAR * (height - 1.0) / len(plan)
    font = min(8.0, 0.7 * 72 * bar)
    for row, size, start, colour in zip(rows, sizes, starts, colours, strict=True):
        text = f"{size:,}"
        if font >= 5 and size * per_unit > (len(text) + 1) * 0.6 * font / 72:
            ink = "white" if colour[:3] @ LUMINANCE < 0.45 else "black"
            ax.text(start + size / 2, row, text, ha="center", va="center", fontsize=font, color=ink)


def packing_plan(
    plan: Sequence[Sequence[int]],
    lengths: Sequence[int],
    capacity: int,
    *,
    path: str | Path | None = None,
) -> Figure:
    """Draw which items share a bin, how long they are, and what is left empty.

    Args:
        plan: For each bin the indices of its items, as `plan_packing` returns; or some of its bins.
        lengths: The length of every item (patches or tokens).
        capacity: Length of a bin. A single item may exceed it; it is drawn past the line of the capacity.
        path: File to write the picture to, in the format of its ending.

    Returns:
        The figure. Its axes hold two bar containers: the items in the order of the plan, coloured by length,
        and the empty ends of the bins, hatched. The title states the share of padding.

    Raises:
        ValueError: If the plan is empty, names an item that does not exist or names one twice, or if several
            items together exceed `capacity`.
        ImportError: Without Matplotlib.
    """
    used = np.array(_check_plan(plan, lengths, capacity))
    waste = np.maximum(capacity - used, 0)
    figure = _figure(8.0, min(max(1.3 + 0.3 * len(plan), 2.2), 14.0))
    ax = figure.subplots()
    ax.set(xlim=(0, 1.004 * max(capacity, used.max())), ylim=(len(plan) - 0.5, -0.5))
    ax.set(xlabel="length", ylabel="bin")
    _draw_items(figure, ax, plan, lengths)
    empty = np.flatnonzero(waste)
    rest = ax.barh(empty, waste[empty], left=used[empty], height=BAR, color="#e4e4e4", label="padding")
    for patch in rest:
        patch.set(edgecolor="#9a9a9a", hatch="////", linewidth=0)
    ax.axvline(capacity, color="black", linewidth=1, linestyle="--", label="capacity")
    ax.yaxis.set_major_locator(_matplotlib("ticker").MaxNLocator(integer=True, nbins=20))
    ax.xaxis.set_major_formatter(_matplotlib("ticker").StrMethodFormatter("{x:,.0f}"))
    ax.spines[["top", "right", "left"]].set_visible(False)
    items, share = sum(len(bin_) for bin_ in plan), waste.sum() / (waste.sum() + used.sum())
    title = f"{items:,} items in {len(plan):,} bins of {capacity:,}: {share:.1%} padding"
    ax.set_title(title, fontsize=11, loc="left")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8)
    return _save(figure, path)
