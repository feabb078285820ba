"""Draw the pictures of the pages: `python docs/make_images.py [name ...]` writes `docs/images/<name>.png`."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_image

from vlparts import show
from vlparts.parts.coordinates import Region, decode, encode
from vlparts.parts.packing import plan_packing

FOLDER = Path(__file__).parent / "images"


def coordinates(path: Path) -> None:
    """Draw regions on a photograph above the text that they became and were read from."""
    photo = load_sample_image("china.jpg")
    size = (photo.shape[1], photo.shape[0])
    regions = [
        Region.box(64, 30, 352, 427, "pavilion"),
        Region.box(424, 226, 502, 242, "island"),
        Region.box(546, 135, 640, 427, "tree"),
        Region.point(205, 38, "finial"),
    ]
    text = encode(regions, size)
    ax = show.boxes(photo, decode(text, size).regions)
    ax.text(0.01, -0.03, text, transform=ax.transAxes, family="monospace", fontsize=11, va="top")
    ax.figure.savefig(path, dpi=90)


def packing_plan(path: Path) -> None:
    """Draw a packing plan of images of mixed sizes."""
    sides = np.random.default_rng(0).integers(4, 33, (30, 2))
    lengths = [int(rows * columns) for rows, columns in sides]
    show.packing_plan(plan_packing(lengths, capacity=1024), lengths, 1024, path=path)


IMAGES: dict[str, Callable[[Path], None]] = {
    "coordinates": coordinates,
    "packing_plan": packing_plan,
}


def main(names: list[str]) -> None:
    """Draw the named pictures, or all."""
    unknown = sorted(set(names) - set(IMAGES))
    if unknown:
        raise SystemExit(f"unknown pictures {unknown}; there are {sorted(IMAGES)}")
    FOLDER.mkdir(exist_ok=True)
    for name in names or IMAGES:
        IMAGES[name](FOLDER / f"{name}.png")
        print(f"docs/images/{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
