"""Photographs with handwritten digits in them, as the JSON Lines file that users write.

Both sources ship inside scikit-learn: two photographs and 1,797 digits of 8 x 8 pixels. Training and held-out images
share no digit and no pixel of a photograph: the held-out ones come from the right part of each photograph.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

_TRAIN_SHARE = 0.75
# White digits stand where no more than this share of the photograph is brighter than this, or taken by another digit.
_BRIGHTEST, _MOST_TAKEN = 150, 0.05
_TRIES = 50

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Task:
    """What the images look like.

    Args:
        sides: Smallest and largest side of an image in pixels; width and height are drawn apart.
        digit_sides: Smallest and largest side of a digit in pixels.
        digits: Digits in an image, all of different values; one of them is asked for.
    """

    sides: tuple[int, int] = (72, 112)
    digit_sides: tuple[int, int] = (24, 48)
    digits: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 4:
            raise ValueError(f"`digits` must lie in 1..4, since more do not fit into an image, got {self.digits}.")


def load_sources(held_out: bool, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Photographs and digits of one side of the split.

    Args:
        held_out: Whether to return the held-out side.
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
    """Make images and the records that ask for a digit in each.

    Args:
        folder: Where `name`.jsonl and the folder `name` with the images go.
        name: Name of the set.
        count: Number of images.
        task: What they look like.
        held_out: Which side of the split they are made from.
        seed: Seed of everything that is drawn.

    Returns:
        Path of the JSON Lines file.
    """
    photographs, digits, values = load_sources(held_out)
    chance = np.random.default_rng((seed, int(held_out)))
    (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for index in tqdm(range(count), desc=f"making {name} images", leave=False):
            image, boxes = _make_image(photographs, digits, values, task, chance)
            file = f"{name}/{index:05d}.png"
            image.save(folder / file, compress_level=1)
            value, box = boxes[chance.integers(len(boxes))]
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
    photographs: list[np.ndarray], digits: np.ndarray, values: np.ndarray, task: Task, chance: np.random.Generator
) -> tuple[Image.Image, list[tuple[int, Box]]]:
    """A crop of a photograph with digits in it, and the value and box of each digit."""
    while True:
        photograph = photographs[chance.integers(len(photographs))]
        width, height = (int(chance.integers(task.sides[0], task.sides[1] + 1)) for _ in range(2))
        left = int(chance.integers(photograph.shape[1] - width + 1))
        top = int(chance.integers(photograph.shape[0] - height + 1))
        canvas = photograph[top : top + height, left : left + width].astype(np.float64)
        found = _place_digits(canvas, digits, values, task, chance)
        if len(found) == task.digits:
            return Image.fromarray(np.rint(canvas).astype(np.uint8)), found


def _place_digits(
    canvas: np.ndarray, digits: np.ndarray, values: np.ndarray, task: Task, chance: np.random.Generator
) -> list[tuple[int, Box]]:
    """Draw digits of different values where the photograph is dark enough to see them; fewer if there is no room."""
    height, width = canvas.shape[:2]
    taken = canvas.mean(-1) > _BRIGHTEST
    found: list[tuple[int, Box]] = []
    for _ in range(_TRIES):
        which = int(chance.integers(len(digits)))
        ink = _scaled_ink(digits[which], int(chance.integers(task.digit_sides[0], task.digit_sides[1] + 1)))
        rows, columns = ink.shape
        y, x = int(chance.integers(height - rows + 1)), int(chance.integers(width - columns + 1))
        place = (slice(y, y + rows), slice(x, x + columns))
        if taken[place].mean() > _MOST_TAKEN or int(values[which]) in [value for value, _ in found]:
            continue
        taken[place] = True
        canvas[place] += (255.0 - canvas[place]) * ink[..., None]
        found.append((int(values[which]), (float(x), float(y), float(x + columns), float(y + rows))))
        if len(found) == task.digits:
            break
    return found


def _scaled_ink(digit: np.ndarray, side: int) -> np.ndarray:
    """A digit enlarged to `side` pixels and cut to its ink, as opacity in [0, 1]."""
    grey = Image.fromarray(np.rint(digit * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    ink = np.asarray(grey) / 255.0
    rows, columns = np.where((ink > 0.25).any(1))[0], np.where((ink > 0.25).any(0))[0]
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
