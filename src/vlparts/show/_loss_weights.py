"""A picture of which tokens and samples carry the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlparts.losses.weights import IGNORE_INDEX, PRESETS, TokenWeights, weigh_tokens

from ._figure import import_matplotlib, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_COLOUR, LENGTH_COLOUR = "#0067a5", "#cfcfcf"
NO_LOSS = dict(facecolor="#e4e4e4", edgecolor="#b0b0b0", hatch="////", linewidth=0)
CELLS = 1200  # columns of a strip at most; more could not be told apart
MAX_TICKS = 16
LEAST_RANGE, MOST_RANGE = 2.0, 16.0  # the colours reach at least from 1/2 to 2, at most from 1/16 to 16


def loss_weights(
    labels: Tensor,
    presets: Sequence[str] | Mapping[str, Mapping[str, Any]] = tuple(PRESETS),
    *,
    token_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw for each preset what every token weighs, and what share of the loss every sample has.

    Args:
        labels: As for [`weigh_tokens`], as all arguments but `presets`; those of a language model as
            [`next_token_labels`] gives them.
        presets: Names of presets, or a mapping from titles to options of [`weigh_tokens`], such as
            `{"a quarter": {"mix": 0.25}}`.
        token_weights: b of each token.
        sample_weights: a of each sample.
        cu_seqlens: Where samples begin and end, in place of rows.
        sample_ids: The sample of each token, in place of rows.
        path: File to write the picture to, in the format of its ending.

    Returns:
        The figure, with two axes for each preset. The first holds a strip of all tokens, sample after sample, coloured
        by their weight divided by the mean over the labelled tokens, hatched where there is none; where there are very
        many tokens, a cell is the mean of some. The second holds two bar containers: each sample's share of the
        labelled tokens, and its share of the loss.

    Raises:
        ValueError: If there is no preset, no label or nothing has weight, and as for [`weigh_tokens`].
        ImportError: Without Matplotlib.
    """
    options = presets if isinstance(presets, Mapping) else {name: {"preset": name} for name in presets}
    if not options:
        raise ValueError("presets must hold at least one name, got none")
    if not bool((labels != IGNORE_INDEX).any()):
        raise ValueError("labels must hold at least one label, got none")
    given: dict[str, Any] = dict(
        token_weights=token_weights, sample_weights=sample_weights, cu_seqlens=cu_seqlens, sample_ids=sample_ids
    )
    rows = {
        title: _Row(labels, weigh_tokens(labels, dtype=torch.float64, **given, **o)) for title, o in options.items()
    }
    reach = min(max([LEAST_RANGE, *(row.reach for row in rows.values())]), MOST_RANGE)
    norm = import_matplotlib("colors").LogNorm(1 / reach, reach)
    figure = new_figure(10.0, min(1.1 + 1.25 * len(rows), 14.0))
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex="col", width_ratios=[3, 2])
    for (strip, bars), (title, row) in zip(grid, rows.items(), strict=True):
        image = _draw_strip(strip, row, norm)
        _draw_shares(bars, row)
        strip.set_title(title, fontsize=11, loc="left")
    _finish(figure, grid, list(rows.values()), image)
    return save_figure(figure, path)


class _Row:
    """What one preset makes of the tokens, sample after sample; tokens of no sample are left out."""

    def __init__(self, labels: Tensor, weights: TokenWeights) -> None:
        samples = weights.samples.cpu()
        order = samples.argsort(stable=True)
        order = order[samples[order] < len(weights.sizes)]
        each = weights.weights.detach().cpu()[order]
        if not bool(each.any()):
            raise ValueError("labels must hold a token with a weight above 0, got none")
        valid = (labels.cpu().reshape(-1) != IGNORE_INDEX)[order]
        self.samples = samples[order]
        self.count = len(weights.sizes)
        relative = torch.where(each > 0, each * (valid.sum() / each.sum()), torch.nan)
        self.relative: NDArray[np.float64] = relative.numpy()
        self.shares = self._of_samples(each / each.sum())
        self.lengths = self._of_samples(valid.double())
        self.tokens = self._of_samples(torch.ones_like(each))

    def _of_samples(self, values: Tensor) -> NDArray[np.float64]:
        totals: NDArray[np.float64] = torch.zeros(self.count).double().index_add(0, self.samples, values).numpy()
        return totals

    @property
    def reach(self) -> float:
        """How far weights lie from their mean, as a factor."""
        return float(max(np.nanmax(self.relative), 1 / np.nanmin(self.relative)))


def _draw_strip(ax: Axes, row: _Row, norm: Any) -> Any:
    """Draw all tokens side by side, with a line between samples, and return the image."""
    ax.patch.set(**NO_LOSS)  # seen where cells are NaN
    cells = _cells(row.relative)
    extent = (0, len(row.relative), 0, 1)
    image = ax.imshow(cells[None], cmap="PuOr_r", norm=norm, aspect="auto", extent=extent, interpolation="nearest")
    ax.vlines(row.tokens.cumsum()[:-1], 0, 1, color="black", linewidth=min(0.8, 24 / len(row.tokens)))
    ax.set_yticks([])
    return image


def _cells(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most `CELLS` means over neighbours; NaN where none has weight."""
    size = -(-len(values) // CELLS)
    padded = np.pad(values, (0, -len(values) % size), constant_values=np.nan).reshape(-1, size)
    known = ~np.isnan(padded)
    sums, counts = np.where(known, padded, 0).sum(1), known.sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _draw_shares(ax: Axes, row: _Row) -> None:
    """Draw two bars for each sample: of the labelled tokens, and in front of it of the loss."""
    places = np.arange(len(row.shares))
    ax.bar(places, row.lengths / row.lengths.sum(), width=0.86, color=LENGTH_COLOUR, label="share of labelled tokens")
    ax.bar(places, row.shares, width=0.4, color=LOSS_COLOUR, label="share of the loss")
    ax.yaxis.set_major_formatter(import_matplotlib("ticker").PercentFormatter(1, decimals=0))
    ax.spines[["top", "right"]].set_visible(False)


def _finish(figure: Figure, grid: NDArray[Any], rows: list[_Row], image: Any) -> None:
    """Write what stands once for all rows: labels of axes, legend and colours."""
    ticker, row = import_matplotlib("ticker"), rows[0]
    strip, bars = grid[-1]
    strip.set_xlabel("token")
    strip.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    bars.set(xlabel="sample", xlim=(-0.6, len(row.shares) - 0.4))
    bars.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=MAX_TICKS))
    highest = 1.05 * max(max(row.lengths / row.lengths.sum()), *(row.shares.max() for row in rows))
    for _, ax in grid:
        ax.set_ylim(0, highest)
    place = dict(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    grid[0, 1].legend(ncols=2, **place)
    empty = import_matplotlib("patches").Patch(**NO_LOSS, label="without loss")
    grid[0, 0].legend(handles=[empty], **place)
    extend = "both" if max(row.reach for row in rows) > MOST_RANGE else "neither"
    style: dict[str, Any] = dict(label="weight / mean", location="left", extend=extend, aspect=30, pad=0.02)
    bar = figure.colorbar(image, ax=grid[:, 0], **style)
    powers = np.arange(-4, 5)
    bar.set_ticks(2.0 ** powers[np.abs(powers) <= np.log2(image.norm.vmax) + 1e-9], minor=False)
    bar.ax.minorticks_off()
    bar.ax.yaxis.set_major_formatter(ticker.FuncFormatter(_factor))


def _factor(value: float, _: int) -> str:
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"
