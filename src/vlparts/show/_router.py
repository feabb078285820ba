"""A picture of how evenly the layers of a model use their experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlparts.moe.statistics import RouterLoad, RouterStatistics

from ._figure import import_matplotlib, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR_COLOUR = "#0067a5"
MAX_TICKS = 20


def router_load(
    statistics_per_layer: Sequence[RouterStatistics | RouterLoad], path: str | Path | None = None
) -> Figure:
    """Draw the load of every expert in every layer, and each layer's imbalance score at the side.

    Args:
        statistics_per_layer: For each layer its statistics, or what they computed. All layers have the same numbers
            of experts and groups.
        path: File to write the picture to, in the format of its ending.

    Returns:
        The figure. Its first axes hold a heatmap, layers by experts, of an expert's choices divided by the layer's
        mean (1 is an even load), with a line between groups; the second a bar for every layer's imbalance score,
        the mean over its updates.

    Raises:
        ValueError: If there is no layer, a layer is something else, layers differ in experts or groups, or a layer
            has seen no token.
        ImportError: Without Matplotlib.
    """
    loads = _loads(statistics_per_layer)
    counts = np.stack([load.tokens_per_expert.numpy() for load in loads]).astype(np.float64)
    relative = counts / counts.mean(axis=1, keepdims=True)
    layers, experts = counts.shape
    figure = new_figure(min(max(3.5 + 0.09 * experts, 6.0), 16.0), min(max(1.6 + 0.28 * layers, 2.4), 14.0))
    grid, side = figure.subplots(1, 2, sharey=True, width_ratios=[5, 1])
    _draw_heatmap(figure, grid, relative, len(loads[0].tokens_per_group))
    _draw_scores(side, [load.batch_imbalance_score for load in loads])
    dead = sum(len(load.dead_experts) for load in loads)
    grid.set_title(f"{layers} layers, {experts} experts, {dead} of them dead", fontsize=11, loc="left")
    return save_figure(figure, path)


def _loads(layers: Sequence[RouterStatistics | RouterLoad]) -> list[RouterLoad]:
    """Compute what is not computed yet, and check that the layers fit together."""
    if not len(layers):
        raise ValueError("statistics_per_layer must hold at least one layer, got none")
    loads = []
    for index, layer in enumerate(layers):
        if not isinstance(layer, RouterStatistics | RouterLoad):
            raise ValueError(
                f"statistics_per_layer[{index}] must be RouterStatistics or RouterLoad, got {type(layer).__name__}"
            )
        load = layer.compute() if isinstance(layer, RouterStatistics) else layer
        sizes = len(load.tokens_per_expert), len(load.tokens_per_group)
        loads.append(load)
        expected = len(loads[0].tokens_per_expert), len(loads[0].tokens_per_group)
        if sizes != expected:
            raise ValueError(
                f"statistics_per_layer[{index}] must have {expected} experts and groups as the first, got {sizes}"
            )
        if not load.tokens:
            raise ValueError(f"statistics_per_layer[{index}] must have seen tokens, got none")
    return loads


def _draw_heatmap(figure: Figure, ax: Axes, relative: NDArray[np.float64], groups: int) -> None:
    """Draw loads relative to their mean, white where even, and lines between groups."""
    layers, experts = relative.shape
    # Up to twice the mean the colours are symmetric; a single hot expert would wash out all others.
    norm = import_matplotlib("colors").Normalize(0, 2)
    image = ax.imshow(relative, cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
    for border in range(1, groups):
        ax.axvline(border * experts / groups - 0.5, color="black", linewidth=0.8)
    ax.set(xlabel="expert", ylabel="layer")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(import_matplotlib("ticker").MaxNLocator(integer=True, nbins=MAX_TICKS))
    extend = "max" if relative.max() > 2 else "neither"
    figure.colorbar(image, ax=ax, label="load / mean", extend=extend, pad=0.02)


def _draw_scores(ax: Axes, scores: list[float]) -> None:
    """Draw a bar for each layer."""
    ax.barh(range(len(scores)), scores, height=0.8, color=BAR_COLOUR)
    ax.set(xlabel="imbalance score", xlim=(0, 1.1 * max(*scores, 0.1)))
    ax.tick_params(labelleft=False)
    ax.spines[["top", "right"]].set_visible(False)
