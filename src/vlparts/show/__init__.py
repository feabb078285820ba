"""Plots of regions on images, packing plans, loss weights, router load and training runs.

Figures use Matplotlib's object interface with an Agg canvas: they change no global state, need no display, and are
freed with their last reference. Matplotlib is imported on first use.
"""

from ._boxes import box_grid, boxes
from ._loss_weights import loss_weights
from ._packing import packing_plan
from ._router import router_load
from ._run import run

__all__ = ["box_grid", "boxes", "loss_weights", "packing_plan", "router_load", "run"]
