"""Read and write published POINTS1.5 and POINTS-Reader folders."""

from .config import points15_config, points15_presets
from .conversion import model_from_points15, to_points15
from .processor import processor_from_points15, shrink_image

__all__ = [
    "model_from_points15",
    "points15_config",
    "points15_presets",
    "processor_from_points15",
    "shrink_image",
    "to_points15",
]
