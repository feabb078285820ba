"""Figures without Matplotlib's global state, and Matplotlib itself imported with the first picture."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def import_matplotlib(module: str) -> Any:
    """Import one of Matplotlib's modules, such as "figure"."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError("vlparts.show needs Matplotlib: pip install 'vlparts[show]'") from error


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of a size in inches, with a canvas of its own."""
    figure: Figure = import_matplotlib("figure").Figure(figsize=(width, height), layout="constrained")
    import_matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path | None) -> Figure:
    """Write the figure where a path is given."""
    if path is not None:
        figure.savefig(path, dpi=DPI)
    return figure
