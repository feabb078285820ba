"""Plots of regions on images, kept tokens, packing plans, loss weights, router load, training runs and evaluations.

Figures use Matplotlib's object interface with an Agg canvas: they change no global state, need no display, and are
freed with their last reference. Matplotlib is imported on first use.
"""

from ._boxes import box_grid, boxes
from ._loss_weights import loss_weights
from ._packing import packing_plan
from ._router import router_load
from ._run import run
from ._tokens import evaluations, kept_tokens

__all__ = ["box_grid", "boxes", "evaluations", "kept_tokens", "loss_weights", "packing_plan", "router_load", "run"]
