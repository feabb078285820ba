"""Lengths and image sizes of a file of records, for a plan."""

from pathlib import Path

import numpy as np

from ..config import TrainConfig
from ..train import prepare

SAMPLED_IMAGES = 256
"""Number of samples, evenly over the file, whose images are measured."""


def measure_records(data: Path, model: Path) -> tuple[float, float, float, tuple[int, int]]:
    """Encode all records as training does, and measure them.

    Args:
        data: JSON Lines file of training records.
        model: Folder of a composed model with its processor; needs no weights.

    Returns:
        Mean tokens of a sample, the number of samples, mean number of images of a sample, and the width and height in
        pixels of the mean image after resizing: a square root of the mean number of patches in its mean proportion.

    Raises:
        RecordError: If a record is invalid.
        ValueError: If the images have no grids, as of encoders of images of one size.
    """
    config = TrainConfig(data=data, output=Path("-"), model=model, capacity=2**31 - 1, trainer={"use_cpu": True})
    run = prepare(config, weights=False)
    lengths, total = run.data.lengths, len(run.data)
    step = max(1, total // SAMPLED_IMAGES)
    chosen = [run.data[index].images or {} for index in range(0, total, step)]
    grids = [one["image_grid_thw"].numpy() for one in chosen if "image_grid_thw" in one]
    if not grids and any(chosen):
        raise ValueError("`--data` requires an encoder whose images have grids; give --image-size instead.")
    mean = sum(lengths) / total
    if not grids:
        return mean, float(total), 0.0, (1, 1)
    sides = np.concatenate(grids)[:, 1:]
    area, (rows, columns) = sides.prod(1).mean(), sides.mean(0)
    scale = run.model.config.vision_config.patch_size * (area / (rows * columns)) ** 0.5
    return mean, float(total), len(sides) / len(chosen), (round(columns * scale), round(rows * scale))
