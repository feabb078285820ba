"""Plot of a training run: its losses, learning rate, speed, packing and router load by optimizer step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..run_log import StageLog, read_run
from ._figure import import_matplotlib, integer_ticks, new_figure, save_figure, thousands_separators

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable with colour blindness (Okabe and Ito), without yellow, which is too light on white.
COLOURS = ("#0067a5", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
STYLES = ("-", "--", ":")
COLUMNS = 3
LOG_SPAN = 20
MEAN_SHARE = 25  # a mean is over one of so many parts of the entries
EVALUATION = "evaluation"

Points = list[tuple[int, float]]
"""Steps and values."""


@dataclass(frozen=True)
class Panel:
    """What one of the axes shows.

    Args:
        title: Its title.
        lines: Labels and names of the entries of the log; a name that ends with "/" is the start of several names,
            whose ends are their labels.
        scale: "linear", "log" for values that span more than a factor of [`LOG_SPAN`], "from 0", or "share" for values
            from 0 to 1 in percent.
        smooth: Whether to draw a mean over single values.
    """

    title: str
    lines: dict[str, str]
    scale: str = "linear"
    smooth: bool = True


PANELS = (
    Panel("loss", {"training": "loss", EVALUATION: "eval_loss"}),
    Panel("loss by task", {"": "loss_by_task/"}),
    Panel("loss by answer length in tokens", {"": "loss_by_length/"}),
    Panel("learning rate", {"": "learning_rate"}, "from 0", smooth=False),
    Panel("gradient norm", {"": "grad_norm"}, "log"),
    Panel("samples per pack", {"": "packing/samples"}, "from 0"),
    Panel("tokens per second", {"": "speed/tokens_per_second"}, "from 0"),
    Panel("images per second", {"": "speed/images_per_second"}, "from 0"),
    Panel("packs filled, time waiting for data", {"fill": "packing/fill", "waiting": "speed/data_wait"}, "share"),
    Panel("router: entropy of the load, 100% if even", {"": "router/load_entropy"}, "share"),
    Panel("router: busiest expert, (max - mean) / mean", {"": "router/max_violation"}, "from 0"),
    Panel("router: experts without tokens", {"": "router/dead_experts"}, "from 0"),
)


def run(folder: str | Path, path: str | Path | None = None) -> Figure:
    """Draw the log of a training run, also of one that is still running, or of all stages of a recipe.

    Args:
        folder: `output` of the run or the recipe; or a folder with the `trainer_state.json` of transformers' Trainer,
            or with its checkpoints.
        path: File to save the figure to, in the format of its extension.

    Returns:
        The figure, with axes for what the log has: losses of training and evaluation, by task and by answer length,
        learning rate, gradient norm, speed, packing and router load. Stages follow one another, with a line between.

    Raises:
        ValueError: If the folder has no log.
        ImportError: If Matplotlib is not installed.
    """
    stages = read_run(Path(folder))
    starts = np.cumsum([0, *(stage.entries[-1]["step"] for stage in stages)]).tolist()
    panels = [(panel, found) for panel in PANELS if (found := _find_lines(panel, stages, starts))]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.4 * columns, 0.7 + 2.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (panel, found) in zip(axes, panels, strict=False):
        _draw(ax, panel, found)
        _draw_stages(ax, starts)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.supxlabel("optimizer step", fontsize=9)
    figure.suptitle(_title(Path(folder), stages, starts), fontsize=12, x=0.01, ha="left")
    return save_figure(figure, path)


def _find_lines(panel: Panel, stages: Sequence[StageLog], starts: Sequence[int]) -> dict[str, list[Points]]:
    """The points of each line of a panel that the log has, by label; a list per stage, since lines end with it.

    Steps are counted through all stages.
    """
    found: dict[str, list[Points]] = {}
    for label, name in panel.lines.items():
        keys = dict.fromkeys(key for stage in stages for entry in stage.entries for key in entry)
        for key in keys:
            if key == name or (name.endswith("/") and key.startswith(name)):
                found[key.removeprefix(name) or label] = [
                    [(start + entry["step"], entry[key]) for entry in stage.entries if key in entry]
                    for stage, start in zip(stages, starts, strict=False)
                ]
    return dict(sorted(found.items(), key=lambda pair: _first_number(pair[0])))


def _first_number(label: str) -> int:
    """The number that a label begins with, by which ranges are in order; 0 for others, which keep theirs."""
    number = re.match(r"\d+", label)
    return int(number[0]) if number else 0


def _draw(ax: Axes, panel: Panel, found: dict[str, list[Points]]) -> None:
    """Draw the lines of a panel: means over single values, which are lighter, if there are many."""
    for index, (label, segments) in enumerate(found.items()):
        cycle, colour = divmod(index, len(COLOURS))
        style: dict[str, Any] = {"color": COLOURS[colour], "linestyle": STYLES[cycle % len(STYLES)]}
        if label == EVALUATION:
            style |= {"marker": "o", "markersize": 3.5, "linewidth": 1}
        for points in filter(len, segments):
            steps, values = np.array(points, dtype=np.float64).T
            width = len(points) // MEAN_SHARE
            if width > 1 and panel.smooth and label != EVALUATION:
                ax.plot(steps, values, **style, linewidth=0.8, alpha=0.25)
                values = _running_mean(values, width)
            ax.plot(steps, values, **{"linewidth": 1.5, **style}, label=label)
            label = "_"  # one entry in the legend
    ax.set_title(panel.title, fontsize=10, loc="left")
    if any(found):
        ax.legend(fontsize=8, frameon=False, ncols=1 + len(found) // 5, handlelength=1.4)
    every = np.array([value for segments in found.values() for points in segments for _, value in points])
    least, most = every[np.isfinite(every)].min(initial=np.inf), every[np.isfinite(every)].max(initial=0.0)
    if panel.scale == "share":
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter(import_matplotlib("ticker").PercentFormatter(1.0))
    elif panel.scale == "log" and most > LOG_SPAN * least > 0:
        ax.set_yscale("log")
    elif panel.scale != "linear":
        ax.set_ylim(0, 1.08 * max(most, 1e-9))
        ax.yaxis.set_major_formatter(import_matplotlib("ticker").StrMethodFormatter("{x:g}"))
    integer_ticks(ax.xaxis, 6)
    thousands_separators(ax.xaxis)
    ax.grid(color="0.92", linewidth=0.8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean over a window around each value, which is cut off at the ends."""
    ones = np.ones(2 * (width // 2) + 1)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _draw_stages(ax: Axes, starts: Sequence[int]) -> None:
    """Draw a line where each further stage begins."""
    ax.set_xlim(0, starts[-1])
    for start in starts[1:-1]:
        ax.axvline(start, color="0.4", linewidth=0.8, linestyle="--")


def _title(folder: Path, stages: Sequence[StageLog], starts: Sequence[int]) -> str:
    """The name of the folder, the number of steps, and the names of stages with theirs."""
    steps = np.diff(starts)
    parts = [f"{stage.name} {count:,}" for stage, count in zip(stages, steps, strict=True) if stage.name]
    names = f" ({', '.join(parts)})" if parts else ""
    return f"{folder.resolve().name}: {starts[-1]:,} optimizer steps{names}"
