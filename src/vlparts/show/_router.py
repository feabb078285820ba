"""Plot of the load of the experts in each layer of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..moe.statistics import RouterLoad, RouterStatistics
from ._figure import BLUE, import_matplotlib, integer_ticks, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TICKS = 20


def router_load(
    statistics_per_layer: Sequence[RouterStatistics | RouterLoad], path: str | Path | None = None
) -> Figure:
    """Draw the load of each expert and the imbalance score of each layer.

    Args:
        statistics_per_layer: Statistics of each layer, or the loads computed from them. All layers must have the same
            numbers of experts and groups.
        path: File to save the figure to, in the format of its extension.

    Returns:
        The figure. Its first axes have a heatmap, layers by experts, of the load of an expert relative to the mean of
        its layer (1 is balanced), with a line between groups; the second have one bar per layer, its mean imbalance
        score over updates.

    Raises:
        ValueError: If there is no layer, an entry has another type, layers differ in experts or groups, or a layer has
            seen no token.
        ImportError: If Matplotlib is not installed.
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
    """Compute the loads, and check that the layers have equal sizes."""
    if not len(layers):
        raise ValueError("`statistics_per_layer` must have at least one layer, got none.")
    loads = []
    for index, layer in enumerate(layers):
        if not isinstance(layer, RouterStatistics | RouterLoad):
            raise ValueError(
                f"`statistics_per_layer[{index}]` must be RouterStatistics or RouterLoad, got {type(layer).__name__}."
            )
        load = layer.compute() if isinstance(layer, RouterStatistics) else layer
        sizes = len(load.tokens_per_expert), len(load.tokens_per_group)
        loads.append(load)
        expected = len(loads[0].tokens_per_expert), len(loads[0].tokens_per_group)
        if sizes != expected:
            raise ValueError(
                f"`statistics_per_layer[{index}]` must have {expected} experts and groups as the first, got {sizes}."
            )
        if not load.tokens:
            raise ValueError(f"`statistics_per_layer[{index}]` must have seen tokens, got none.")
    return loads


def _draw_heatmap(figure: Figure, ax: Axes, relative: NDArray[np.float64], groups: int) -> None:
    """Draw loads relative to their mean, white if balanced, and lines between groups."""
    layers, experts = relative.shape
    # The scale is symmetric around 1 and ends at twice the mean, so that one overloaded expert does not dominate it.
    norm = import_matplotlib("colors").Normalize(0, 2)
    image = ax.imshow(relative, cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
    for border in range(1, groups):
        ax.axvline(border * experts / groups - 0.5, color="black", linewidth=0.8)
    ax.set(xlabel="expert", ylabel="layer")
    for axis in (ax.xaxis, ax.yaxis):
        integer_ticks(axis, MAX_TICKS)
    extend = "max" if relative.max() > 2 else "neither"
    figure.colorbar(image, ax=ax, label="load / mean", extend=extend, pad=0.02)


def _draw_scores(ax: Axes, scores: list[float]) -> None:
    """Draw one bar per layer."""
    ax.barh(range(len(scores)), scores, height=0.8, color=BLUE)
    ax.set(xlabel="imbalance score", xlim=(0, 1.1 * max(*scores, 0.1)))
    ax.tick_params(labelleft=False)
    ax.spines[["top", "right"]].set_visible(False)
