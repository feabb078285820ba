"""What the plots share: figures without global state, a lazy import of Matplotlib, colours and ticks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 150
BLUE = "#0067a5"
HATCHED: dict[str, Any] = dict(facecolor="#e4e4e4", hatch="////", linewidth=0)  # areas without data


def import_matplotlib(module: str) -> Any:
    """Import a module of Matplotlib, such as "figure".

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError("vlparts.show requires Matplotlib: pip install 'vlparts[show]'") from error


def new_figure(width: float, height: float) -> Figure:
    """Create a figure with its own canvas; the size is in inches."""
    figure: Figure = import_matplotlib("figure").Figure(figsize=(width, height), layout="constrained")
    import_matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def integer_ticks(axis: Axis, most: int) -> None:
    """Place at most about `most` ticks, at integers only."""
    axis.set_major_locator(import_matplotlib("ticker").MaxNLocator(integer=True, nbins=most))


def thousands_separators(axis: Axis) -> None:
    """Write the tick labels as integers with thousands separators."""
    axis.set_major_formatter(import_matplotlib("ticker").StrMethodFormatter("{x:,.0f}"))


def save_figure(figure: Figure, path: str | Path | None) -> Figure:
    """Save the figure if a path is given, and return it."""
    if path is not None:
        figure.savefig(path, dpi=DPI)
    return figure
