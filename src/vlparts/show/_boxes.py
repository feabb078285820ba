"""Plots of regions on images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..coordinates.regions import Region
from ..parts.image_files import read_image
from ..parts.utils import positive_integer
from ._figure import BLUE, import_matplotlib, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable with colour blindness, and dark enough for white text.
PREDICTED, TRUTH = "#b84a00", BLUE
ITEM_KEYS = ("image", "predicted", "truth", "title")
MARGIN = 0.06  # height of a label as a fraction of the image height


def _pixels(image: Any) -> NDArray[Any]:
    """Convert a Pillow image, which is turned upright, or an array to an array that Matplotlib draws unchanged."""
    pixels = np.asarray(read_image(image) if hasattr(image, "convert") else image)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)) or not pixels.size:
        raise ValueError(f"`image` must have shape (H, W) or (H, W, 1, 3 or 4), got {pixels.shape}.")
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"`image` of floats must be in [0, 1], got {low:g}..{high:g}.")
    elif pixels.dtype not in (np.uint8, np.bool_):
        raise ValueError(f"`image` must be uint8 or floats in [0, 1], got {pixels.dtype}.")
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


def _regions(regions: Iterable[Region] | None, name: str) -> list[Region]:
    """Return regions as a checked list."""
    if regions is not None and not isinstance(regions, Iterable):
        raise ValueError(f"`{name}` must be an iterable of Region, got {type(regions).__name__}.")
    listed = list(regions or ())
    for index, region in enumerate(listed):
        if not hasattr(region, "points"):
            raise ValueError(f"`{name}[{index}]` must be a Region, got {type(region).__name__}.")
    return listed


def _draw_region(ax: Axes, region: Region, colour: str, line: str, above: bool) -> None:
    """Draw a region and its label, above the region or below it."""
    halo = [import_matplotlib("patheffects").withStroke(linewidth=3.5, foreground="white")]
    if region.kind in ("point", "line", "track"):
        _draw_open(ax, region, colour, line, halo)
    else:
        _draw_outline(ax, region, colour, line, halo)
    score = None if region.score is None else f"{region.score:.2f}"
    text = " ".join(part for part in (region.label, score) if part)
    if text:
        _draw_label(ax, region, text, colour, above)


def _draw_open(ax: Axes, region: Region, colour: str, line: str, halo: list[Any]) -> None:
    """Draw a point as a dot, a line, or a track with a small dot per time and a large one at the end."""
    xs, ys = ([point[axis] for point in region.points] for axis in (0, 1))
    style: dict[str, Any] = dict(color=colour, path_effects=halo, markeredgewidth=1.6)
    if len(xs) > 1:
        dots: dict[str, Any] = dict(marker="o", markersize=3) if region.kind == "track" else {}
        ax.plot(xs, ys, linestyle=line, linewidth=1.8, **style, **dots)
    if region.kind != "line":
        (dot,) = ax.plot(xs[-1:], ys[-1:], marker="o", markersize=7, **style)
        dot.set(markerfacecolor="none" if line == "--" else colour)


def _draw_outline(ax: Axes, region: Region, colour: str, line: str, halo: list[Any]) -> None:
    """Draw the outline of a box, quad or polygon."""
    patches = import_matplotlib("patches")
    style = dict(fill=False, edgecolor=colour, linewidth=1.8, linestyle=line)
    x1, y1, x2, y2 = region.xyxy
    if region.kind == "box":
        patch = patches.Rectangle((x1, y1), x2 - x1, y2 - y1, **style)
    else:
        patch = patches.Polygon(region.points, closed=True, **style)
    patch.set_path_effects(halo)
    ax.add_patch(patch)


def _draw_label(ax: Axes, region: Region, text: str, colour: str, above: bool) -> None:
    """Write the label of a region at its edge, on the inner side if it would leave the image."""
    x1, y1, x2, y2 = region.xyxy
    width, height = ax.get_xlim()[1], ax.get_ylim()[0]
    inside = y1 < MARGIN * height if above else y2 > (1 - MARGIN) * height
    upwards = above != inside
    right_aligned = x1 > 0.75 * width
    offset = 7 if region.kind == "point" else 0
    ax.annotate(
        text,
        (min(x2, width) if right_aligned else max(x1, 0.0), y1 if above else y2),
        xytext=(-offset if right_aligned else offset, 3 if upwards else -3),
        textcoords="offset points",
        va="bottom" if upwards else "top",
        ha="right" if right_aligned else "left",
        color="white",
        fontsize=8,
        bbox=dict(facecolor=colour, edgecolor="none", pad=1.5),
        annotation_clip=True,
    )


def _draw(ax: Axes, image: Any, predicted: list[Region], truth: list[Region], title: str | None) -> None:
    """Draw an image with its regions into axes, without a legend."""
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    # With this extent pixel edges are at integers, as in the canonical form of regions.
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
    """Return the legend entries."""
    line = import_matplotlib("lines").Line2D
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
    """Draw regions on an image: predictions with solid lines, ground truth with dashed lines.

    Args:
        image: A Pillow image, or an array `(H, W)`, `(H, W, 3)` or `(H, W, 4)` of uint8 or of floats in [0, 1].
        regions: Predicted regions of any kind in pixels of the image, drawn with their labels and scores.
        truth: True regions; if given, a legend is added.
        title: Title of the axes.
        ax: Axes to draw into; None for a new figure.

    Returns:
        The axes; `axes.figure.savefig(path)` saves the figure.

    Raises:
        ValueError: If `image` has an invalid shape, type or range, or `regions` or `truth` has other than Regions.
        ImportError: If Matplotlib is not installed.
    """
    predicted, true = _regions(regions, "regions"), _regions(truth, "truth")
    if ax is None:
        height, width = _pixels(image).shape[:2]
        ax = new_figure(7.0, min(max(7.0 * height / width, 1.5), 14.0) + 0.3).subplots()
    _draw(ax, image, predicted, true, title)
    if truth is not None:
        style = dict(bbox_to_anchor=(0.5, -0.01), ncols=2, frameon=False, fontsize=9)
        ax.legend(handles=_handles(), loc="upper center", **style)
    return ax


def box_grid(items: Sequence[Mapping[str, Any]], path: str | Path | None = None, columns: int = 4) -> Figure:
    """Draw several images with their regions in a grid.

    Args:
        items: One mapping per image with the key "image" and optionally "predicted" and "truth" (iterables of Region)
            and "title".
        path: File to save the figure to, in the format of its extension.
        columns: Images per row.

    Returns:
        The figure, with one axes per item in order.

    Raises:
        ValueError: If there are no items, an item has no image or an unknown key, `columns` is not a positive integer,
            or an image or region is invalid as for [`boxes`].
        ImportError: If Matplotlib is not installed.
    """
    if not items:
        raise ValueError("`items` must have at least one entry, got none.")
    for index, item in enumerate(items):
        unknown = sorted(set(item) - set(ITEM_KEYS))
        if "image" not in item or unknown:
            raise ValueError(f"`items[{index}]` must have 'image' and may have {ITEM_KEYS[1:]}, got {sorted(item)}.")
    columns = min(positive_integer(columns, "columns"), len(items))
    rows = -(-len(items) // columns)
    aspects = [height / width for height, width, *_ in (_pixels(item["image"]).shape for item in items)]
    tallest = [max(aspects[row * columns : (row + 1) * columns]) for row in range(rows)]
    heights = [3.0 * min(max(aspect, 0.2), 3.0) + 0.35 for aspect in tallest]
    figure = new_figure(3.0 * columns, sum(heights) + 0.3)
    cells = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for ax, item in zip(cells, items, strict=False):
        predicted, truth = (_regions(item.get(key), key) for key in ("predicted", "truth"))
        _draw(ax, item["image"], predicted, truth, item.get("title"))
    for ax in cells[len(items) :]:
        ax.remove()
    if any(item.get("truth") is not None for item in items):
        figure.legend(handles=_handles(), loc="outside lower center", ncols=2, frameon=False)
    return save_figure(figure, path)
