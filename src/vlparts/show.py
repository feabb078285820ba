"""Pictures: regions on an image, a packing plan, the load of routers, and which tokens carry the loss.

Figures are made with Matplotlib's object interface and an Agg canvas: nothing global is touched, no display
is needed, and a figure is freed with its last reference. Matplotlib is imported with the first picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlparts.coordinates.regions import Region
from vlparts.figures import import_matplotlib as _matplotlib
from vlparts.figures import new_figure as _figure
from vlparts.figures import save_figure as _save
from vlparts.loss_pictures import loss_weights
from vlparts.router_pictures import router_load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["box_grid", "boxes", "loss_weights", "packing_plan", "router_load"]

# A pair that people with colour-blindness tell apart, dark enough for white letters.
PREDICTED, TRUTH = "#b84a00", "#0067a5"
ITEM_KEYS = ("image", "predicted", "truth", "title")
BAR = 0.82  # height of a bar, in rows
MARGIN = 0.06  # part of a picture's height that a label needs
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)


def _pixels(image: Any) -> NDArray[Any]:
    """Return a PIL image or an array as an array that Matplotlib draws as it is."""
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)) or not pixels.size:
        raise ValueError(f"image must have shape (H, W) or (H, W, 1, 3 or 4), got {pixels.shape}")
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"image of floats must lie in [0, 1], got {low:g}..{high:g}")
    elif pixels.dtype not in (np.uint8, np.bool_):
        raise ValueError(f"image must hold uint8 or floats in [0, 1], got {pixels.dtype}")
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


def _regions(regions: Iterable[Region] | None, name: str) -> list[Region]:
    """Return regions as a list, after checking what they are."""
    if regions is not None and not isinstance(regions, Iterable):
        raise ValueError(f"{name} must be an iterable of Region, got {type(regions).__name__}")
    listed = list(regions or ())
    for index, region in enumerate(listed):
        if not hasattr(region, "points"):
            raise ValueError(f"{name}[{index}] must be a Region, got {type(region).__name__}")
    return listed


def _draw_region(ax: Axes, region: Region, colour: str, line: str, above: bool) -> None:
    """Draw one region and its label, above its top left or below its bottom left corner."""
    halo = [_matplotlib("patheffects").withStroke(linewidth=3.5, foreground="white")]
    if region.kind in ("point", "line", "track"):
        _draw_open(ax, region, colour, line, halo)
    else:
        _draw_outline(ax, region, colour, line, halo)
    words = [region.label, None if region.score is None else f"{region.score:.2f}"]
    text = " ".join(word for word in words if word)
    if text:
        _draw_label(ax, region, text, colour, above)


def _draw_open(ax: Axes, region: Region, colour: str, line: str, halo: list[Any]) -> None:
    """Draw a point as a dot, a line, and a track with a small dot at each time and a large one at the end."""
    xs, ys = ([point[axis] for point in region.points] for axis in (0, 1))
    style: dict[str, Any] = dict(color=colour, path_effects=halo, markeredgewidth=1.6)
    if len(xs) > 1:
        small: dict[str, Any] = dict(marker="o", markersize=3) if region.kind == "track" else {}
        ax.plot(xs, ys, linestyle=line, linewidth=1.8, **style, **small)
    if region.kind != "line":
        (dot,) = ax.plot(xs[-1:], ys[-1:], marker="o", markersize=7, **style)
        dot.set(markerfacecolor="none" if line == "--" else colour)


def _draw_outline(ax: Axes, region: Region, colour: str, line: str, halo: list[Any]) -> None:
    """Draw the edges of a box, quad or polygon."""
    patches = _matplotlib("patches")
    style = dict(fill=False, edgecolor=colour, linewidth=1.8, linestyle=line)
    x1, y1, x2, y2 = region.xyxy
    if region.kind == "box":
        patch = patches.Rectangle((x1, y1), x2 - x1, y2 - y1, **style)
    else:
        patch = patches.Polygon(region.points, closed=True, **style)
    patch.set_path_effects(halo)
    ax.add_patch(patch)


def _draw_label(ax: Axes, region: Region, text: str, colour: str, above: bool) -> None:
    """Write a region's label at its edge, turned inwards where it would leave the picture."""
    x1, y1, x2, y2 = region.xyxy
    width, height = ax.get_xlim()[1], ax.get_ylim()[0]
    inwards = y1 < MARGIN * height if above else y2 > (1 - MARGIN) * height
    upwards = above != inwards
    right = x1 > 0.75 * width
    aside = 7 if region.kind == "point" else 0
    ax.annotate(
        text,
        (min(x2, width) if right else max(x1, 0.0), y1 if above else y2),
        xytext=(-aside if right else aside, 3 if upwards else -3),
        textcoords="offset points",
        va="bottom" if upwards else "top",
        ha="right" if right else "left",
        color="white",
        fontsize=8,
        bbox=dict(facecolor=colour, edgecolor="none", pad=1.5),
        annotation_clip=True,
    )


def _draw(ax: Axes, image: Any, predicted: list[Region], truth: list[Region], title: str | None) -> None:
    """Draw one picture into existing axes, without a legend."""
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    # The extent puts pixel edges at whole numbers, as in the canonical form of regions.
    ax.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, extent=(0, width, height, 0))
    ax.set(xlim=(0, width), ylim=(height, 0))
    for region in truth:
        _draw_region(ax, region, TRUTH, "--", above=False)
    for region in predicted:
        _draw_region(ax, region, PREDICTED, "-", above=True)
    ax.set_axis_off()
    if title is not None:
        ax.set_title(title, fontsize=10)


def _handles() -> list[Any]:
    """Return the legend's two lines."""
    line = _matplotlib("lines").Line2D
    return [
        line([], [], color=PREDICTED, linewidth=1.8, label="predicted"),
        line([], [], color=TRUTH, linewidth=1.8, linestyle="--", label="truth"),
    ]


def boxes(
    image: Any,
    regions: Iterable[Region],
    *,
    truth: Iterable[Region] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw regions over an image: predicted ones with solid lines, true ones with dashed lines.

    Args:
        image: A PIL image, or an array `(H, W)`, `(H, W, 3)` or `(H, W, 4)` of uint8 or of floats in [0, 1].
        regions: Predicted regions in pixels of this image; all kinds, labels and scores are drawn.
        truth: True regions; with them comes a legend.
        title: Text above the picture.
        ax: Axes to draw into; a new figure where None.

    Returns:
        The axes; `axes.figure.savefig(path)` writes the picture.

    Raises:
        ValueError: If `image` has another shape or range, or something is no Region.
        ImportError: Without Matplotlib.
    """
    predicted, true = _regions(regions, "regions"), _regions(truth, "truth")
    if ax is None:
        height, width = _pixels(image).shape[:2]
        ax = _figure(7.0, min(max(7.0 * height / width, 1.5), 14.0) + 0.3).subplots()
    _draw(ax, image, predicted, true, title)
    if truth is not None:
        place = dict(bbox_to_anchor=(0.5, -0.01), ncols=2, frameon=False, fontsize=9)
        ax.legend(handles=_handles(), loc="upper center", **place)
    return ax


def box_grid(items: Sequence[Mapping[str, Any]], path: str | Path | None = None, columns: int = 4) -> Figure:
    """Draw several images with their regions in a grid.

    Args:
        items: For each picture a mapping with the key "image" and, where wanted, "predicted", "truth"
            (iterables of Region) and "title".
        path: File to write the grid to, in the format of its ending.
        columns: Pictures in a row.

    Returns:
        The figure, with one axes per item in order.

    Raises:
        ValueError: If there are no items, an item has no image or an unknown key, or `columns` is below 1;
            also as for `boxes`.
        ImportError: Without Matplotlib.
    """
    if not items:
        raise ValueError("items must hold at least one picture, got none")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    for index, item in enumerate(items):
        unknown = sorted(set(item) - set(ITEM_KEYS))
        if "image" not in item or unknown:
            raise ValueError(f"items[{index}] must have 'image' and may have {ITEM_KEYS[1:]}, got {sorted(item)}")
    columns = min(columns, len(items))
    rows = -(-len(items) // columns)
    aspects = [height / width for height, width, *_ in (_pixels(item["image"]).shape for item in items)]
    tallest = [max(aspects[row * columns : (row + 1) * columns]) for row in range(rows)]
    heights = [3.0 * min(max(aspect, 0.2), 3.0) + 0.35 for aspect in tallest]
    figure = _figure(3.0 * columns, sum(heights) + 0.3)
    cells = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for ax, item in zip(cells, items, strict=False):
        predicted, truth = (_regions(item.get(key), key) for key in ("predicted", "truth"))
        _draw(ax, item["image"], predicted, truth, item.get("title"))
    for ax in cells[len(items) :]:
        ax.remove()
    if any(item.get("truth") is not None for item in items):
        figure.legend(handles=_handles(), loc="outside lower center", ncols=2, frameon=False)
    return _save(figure, path)


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
