"""Plot of the weights of tokens and samples in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..losses.weights import PRESETS, TokenWeights, weigh_tokens
from ..parts.utils import IGNORE_INDEX
from ._figure import (
    BLUE,
    HATCHED,
    import_matplotlib,
    integer_ticks,
    new_figure,
    save_figure,
    thousands_separators,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTH_COLOUR = "#cfcfcf"
NO_LOSS = dict(HATCHED, edgecolor="#b0b0b0")
MAX_CELLS = 1200  # columns of a strip; more are not distinguishable
MAX_TICKS = 16
MIN_RANGE, MAX_RANGE = 2.0, 16.0  # the colour scale ends between 1/2..2 and 1/16..16


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
    """Draw the loss weight of each token and the share of each sample in the loss, per preset.

    Args:
        labels: `(S,)` or `(B, S)`, see [`weigh_tokens`]; for a language model the output of [`next_token_labels`].
        presets: Names of presets, or a mapping from titles to options of [`weigh_tokens`], such as
            `{"a quarter": {"mix": 0.25}}`.
        token_weights: Weight of each token, see [`weigh_tokens`].
        sample_weights: Weight of each sample, see [`weigh_tokens`].
        cu_seqlens: Cumulative lengths of the samples; by default each row is a sample.
        sample_ids: Sample of each token; by default each row is a sample.
        path: File to save the figure to, in the format of its extension.

    Returns:
        The figure, with two axes per preset. The first is a strip of all tokens, sample by sample, coloured by weight
        relative to the mean over labelled tokens, and hatched where the weight is 0; with many tokens, a cell is a
        mean over adjacent tokens. The second has two bar containers: the share of each sample in the labelled tokens
        and in the loss.

    Raises:
        ValueError: If there is no preset, no label or no token with weight, or an argument is invalid for
            [`weigh_tokens`].
        ImportError: If Matplotlib is not installed.
    """
    options = presets if isinstance(presets, Mapping) else {name: {"preset": name} for name in presets}
    if not options:
        raise ValueError("`presets` must have at least one name, got none.")
    if not bool((labels != IGNORE_INDEX).any()):
        raise ValueError("`labels` must have at least one label, got none.")
    given: dict[str, Any] = dict(
        token_weights=token_weights, sample_weights=sample_weights, cu_seqlens=cu_seqlens, sample_ids=sample_ids
    )
    rows = {
        title: _Row(labels, weigh_tokens(labels, dtype=torch.float64, **given, **o)) for title, o in options.items()
    }
    limit = min(max([MIN_RANGE, *(row.weight_range for row in rows.values())]), MAX_RANGE)
    norm = import_matplotlib("colors").LogNorm(1 / limit, limit)
    figure = new_figure(10.0, min(1.1 + 1.25 * len(rows), 14.0))
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex="col", width_ratios=[3, 2])
    for (strip, bars), (title, row) in zip(grid, rows.items(), strict=True):
        image = _draw_strip(strip, row, norm)
        _draw_shares(bars, row)
        strip.set_title(title, fontsize=11, loc="left")
    _finish(figure, grid, list(rows.values()), image)
    return save_figure(figure, path)


class _Row:
    """Weights and shares of one preset, sample by sample; tokens of no sample are left out."""

    def __init__(self, labels: Tensor, weights: TokenWeights) -> None:
        samples = weights.samples.cpu()
        order = samples.argsort(stable=True)
        order = order[samples[order] < len(weights.sizes)]
        each = weights.weights.detach().cpu()[order]
        if not bool(each.any()):
            raise ValueError("`labels` must have a token with a weight above 0, got none.")
        valid = (labels.cpu().reshape(-1) != IGNORE_INDEX)[order]
        self.samples = samples[order]
        self.count = len(weights.sizes)
        relative = torch.where(each > 0, each * (valid.sum() / each.sum()), torch.nan)
        self.relative: NDArray[np.float64] = relative.numpy()
        self.shares = self._sum_by_sample(each / each.sum())
        self.lengths = self._sum_by_sample(valid.double())
        self.tokens = self._sum_by_sample(torch.ones_like(each))

    def _sum_by_sample(self, values: Tensor) -> NDArray[np.float64]:
        totals: NDArray[np.float64] = torch.zeros(self.count).double().index_add(0, self.samples, values).numpy()
        return totals

    @property
    def weight_range(self) -> float:
        """Largest factor between a weight and the mean."""
        return float(max(np.nanmax(self.relative), 1 / np.nanmin(self.relative)))


def _draw_strip(ax: Axes, row: _Row, norm: Any) -> Any:
    """Draw all tokens in a row, with a line between samples, and return the image."""
    ax.patch.set(**NO_LOSS)  # visible where cells are NaN
    cells = _cells(row.relative)
    extent = (0, len(row.relative), 0, 1)
    image = ax.imshow(cells[None], cmap="PuOr_r", norm=norm, aspect="auto", extent=extent, interpolation="nearest")
    ax.vlines(row.tokens.cumsum()[:-1], 0, 1, color="black", linewidth=min(0.8, 24 / len(row.tokens)))
    ax.set_yticks([])
    return image


def _cells(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over adjacent values, at most `MAX_CELLS`; NaN where all are NaN."""
    size = -(-len(values) // MAX_CELLS)
    padded = np.pad(values, (0, -len(values) % size), constant_values=np.nan).reshape(-1, size)
    known = ~np.isnan(padded)
    sums, counts = np.where(known, padded, 0).sum(1), known.sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _draw_shares(ax: Axes, row: _Row) -> None:
    """Draw two bars per sample: its share of the labelled tokens and, in front, of the loss."""
    positions = np.arange(len(row.shares))
    ax.bar(
        positions, row.lengths / row.lengths.sum(), width=0.86, color=LENGTH_COLOUR, label="share of labelled tokens"
    )
    ax.bar(positions, row.shares, width=0.4, color=BLUE, label="share of the loss")
    ax.yaxis.set_major_formatter(import_matplotlib("ticker").PercentFormatter(1, decimals=0))
    ax.spines[["top", "right"]].set_visible(False)


def _finish(figure: Figure, grid: NDArray[Any], rows: list[_Row], image: Any) -> None:
    """Add what all rows share: axis labels, legends and the colour bar."""
    row = rows[0]
    strip, bars = grid[-1]
    strip.set_xlabel("token")
    thousands_separators(strip.xaxis)
    bars.set(xlabel="sample", xlim=(-0.6, len(row.shares) - 0.4))
    integer_ticks(bars.xaxis, MAX_TICKS)
    highest = 1.05 * max(max(row.lengths / row.lengths.sum()), *(row.shares.max() for row in rows))
    for _, ax in grid:
        ax.set_ylim(0, highest)
    position = dict(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    grid[0, 1].legend(ncols=2, **position)
    empty = import_matplotlib("patches").Patch(**NO_LOSS, label="without loss")
    grid[0, 0].legend(handles=[empty], **position)
    extend = "both" if max(row.weight_range for row in rows) > MAX_RANGE else "neither"
    style: dict[str, Any] = dict(label="weight / mean", location="left", extend=extend, aspect=30, pad=0.02)
    bar = figure.colorbar(image, ax=grid[:, 0], **style)
    powers = np.arange(-4, 5)
    bar.set_ticks(2.0 ** powers[np.abs(powers) <= np.log2(image.norm.vmax) + 1e-9], minor=False)
    bar.ax.minorticks_off()
    bar.ax.yaxis.set_major_formatter(import_matplotlib("ticker").FuncFormatter(_factor))


def _factor(value: float, _: int) -> str:
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"
