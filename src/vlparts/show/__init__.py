"""Pictures: regions on an image, a packing plan, the load of routers, and which tokens carry the loss.

Figures are made with Matplotlib's object interface and an Agg canvas: nothing global is touched, no display
is needed, and a figure is freed with its last reference. Matplotlib is imported with the first picture.
"""

from ._boxes import box_grid, boxes
from ._loss_weights import loss_weights
from ._packing import packing_plan
from ._router import router_load

__all__ = ["box_grid", "boxes", "loss_weights", "packing_plan", "router_load"]
