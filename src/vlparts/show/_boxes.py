"""Regions drawn on images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlparts.coordinates.regions import Region

from ._figure import import_matplotlib as _matplotlib
from ._figure import new_figure as _figure
from ._figure import save_figure as _save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A pair that people with colour-blindness tell apart, dark enough for white letters.
PREDICTED, TRUTH = "#b84a00", "#0067a5"
ITEM_KEYS = ("image", "predicted", "truth", "title")
MARGIN = 0.06  # part of a picture's height that a label needs


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
