"""Data of the demo: photographs with handwritten digits, as images and a JSON Lines file of training records.

Both sources are part of scikit-learn: two photographs and 1,797 digits of 8 x 8 pixels. Training and held-out images
share neither digits nor pixels: held-out images are crops of the right part of each photograph.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

_TRAIN_SHARE = 0.75
# White digits are placed where at most `_MAX_BLOCKED` of the pixels are brighter than `_MAX_BRIGHTNESS` or covered by
# another digit.
_MAX_BRIGHTNESS, _MAX_BLOCKED = 150, 0.05
_MAX_ATTEMPTS = 50

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Task:
    """Parameters of the images.

    Args:
        sides: Smallest and largest side of an image in pixels; width and height are drawn independently.
        digit_sides: Smallest and largest side of a digit in pixels.
        digits: Digits per image, from 1 to 4, all of different values; the question is about one of them.

    Raises:
        ValueError: If `digits` is not in 1..4.
    """

    sides: tuple[int, int] = (72, 112)
    digit_sides: tuple[int, int] = (24, 48)
    digits: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 4:
            raise ValueError(f"`digits` must be in 1..4, got {self.digits}; more do not fit into an image.")


def load_sources(held_out: bool, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Load the photographs and digits of one split.

    Args:
        held_out: True for the held-out split, False for the training split.
        seed: Seed of the split of the digits.

    Returns:
        Parts of the photographs `(H, W, 3)` uint8, digits `(n, 8, 8)` in [0, 1], and their values `(n,)`.
    """
    from sklearn.datasets import load_digits, load_sample_images

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    cut = int(_TRAIN_SHARE * len(order))
    chosen = order[cut:] if held_out else order[:cut]
    photographs = []
    for photograph in load_sample_images().images:
        edge = int(_TRAIN_SHARE * photograph.shape[1])
        photographs.append(photograph[:, edge:] if held_out else photograph[:, :edge])
    return photographs, data.images[chosen] / 16.0, data.target[chosen]


def write_dataset(folder: Path, name: str, count: int, task: Task, *, held_out: bool, seed: int) -> Path:
    """Write images and one record per image that asks for a digit.

    Args:
        folder: Folder for `name`.jsonl and the folder `name` with the images.
        name: Name of the dataset.
        count: Number of images.
        task: Parameters of the images.
        held_out: True to use the held-out split.
        seed: Seed of all draws.

    Returns:
        Path of the JSON Lines file.
    """
    photographs, digits, values = load_sources(held_out)
    generator = np.random.default_rng((seed, int(held_out)))
    (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for index in tqdm(range(count), desc=f"making {name} images", leave=False):
            image, boxes = _make_image(photographs, digits, values, task, generator)
            file = f"{name}/{index:05d}.png"
            image.save(folder / file, compress_level=1)
            value, box = boxes[generator.integers(len(boxes))]
            lines.write(json.dumps(_record(file, value, box)) + "\n")
    return path


def _record(file: str, value: int, box: Box) -> dict:
    return {
        "image": file,
        "messages": [
            {"role": "user", "content": f"Where is the {value}?"},
            {"role": "assistant", "content": [{"label": str(value), "box": list(box)}]},
        ],
    }


def _make_image(
    photographs: list[np.ndarray], digits: np.ndarray, values: np.ndarray, task: Task, generator: np.random.Generator
) -> tuple[Image.Image, list[tuple[int, Box]]]:
    """Draw a crop of a photograph with digits; return it with the value and box of each digit."""
    while True:
        photograph = photographs[generator.integers(len(photographs))]
        width, height = (int(generator.integers(task.sides[0], task.sides[1] + 1)) for _ in range(2))
        left = int(generator.integers(photograph.shape[1] - width + 1))
        top = int(generator.integers(photograph.shape[0] - height + 1))
        canvas = photograph[top : top + height, left : left + width].astype(np.float64)
        placed = _place_digits(canvas, digits, values, task, generator)
        if len(placed) == task.digits:
            return Image.fromarray(np.rint(canvas).astype(np.uint8)), placed


def _place_digits(
    canvas: np.ndarray, digits: np.ndarray, values: np.ndarray, task: Task, generator: np.random.Generator
) -> list[tuple[int, Box]]:
    """Draw digits of different values on dark parts of the canvas, in place; fewer if there is no room."""
    height, width = canvas.shape[:2]
    blocked = canvas.mean(-1) > _MAX_BRIGHTNESS
    placed: list[tuple[int, Box]] = []
    for _ in range(_MAX_ATTEMPTS):
        index = int(generator.integers(len(digits)))
        ink = _scaled_ink(digits[index], int(generator.integers(task.digit_sides[0], task.digit_sides[1] + 1)))
        rows, columns = ink.shape
        y, x = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
        area = (slice(y, y + rows), slice(x, x + columns))
        if blocked[area].mean() > _MAX_BLOCKED or int(values[index]) in [value for value, _ in placed]:
            continue
        blocked[area] = True
        canvas[area] += (255.0 - canvas[area]) * ink[..., None]
        placed.append((int(values[index]), (float(x), float(y), float(x + columns), float(y + rows))))
        if len(placed) == task.digits:
            break
    return placed


def _scaled_ink(digit: np.ndarray, side: int) -> np.ndarray:
    """Resize a digit to `side` pixels and crop it to its ink; return the opacity in [0, 1]."""
    grey = Image.fromarray(np.rint(digit * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    ink = np.asarray(grey) / 255.0
    rows, columns = np.where((ink > 0.25).any(1))[0], np.where((ink > 0.25).any(0))[0]
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
