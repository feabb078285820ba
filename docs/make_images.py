"""Draw the pictures of the pages: `python docs/make_images.py [name ...]` writes `docs/images/<name>.png`."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image

from vlparts import NaViTImageProcessor, show
from vlparts.parts.attention import packed_attention
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


def navit(path: Path) -> None:
    """Draw a photograph and a crop, each at its own resolution, cut into patches."""
    photo = load_sample_image("flower.jpg")
    images = [photo[:416], photo[100:164, 80:400]]
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots(1, 2, width_ratios=[640, 320])
    for ax, image in zip(axes, images, strict=True):
        _, rows, columns = NaViTImageProcessor(patch_size=32).get_grid_thw(*image.shape[:2])
        ax.imshow(image)
        ax.set_xticks(np.arange(columns + 1) * 32 - 0.5, [])
        ax.set_yticks(np.arange(rows + 1) * 32 - 0.5, [])
        ax.grid(color="white", linewidth=0.8)
        ax.tick_params(length=0)
        ax.set_title(f"{rows} x {columns} = {rows * columns} patches", fontsize=10)
    figure.savefig(path, dpi=90, bbox_inches="tight")


def attention(path: Path) -> None:
    """Draw whom a query sees in a packed row of three samples, full and causal."""
    cu_seqlens = torch.tensor([0, 5, 7, 14], dtype=torch.int32)
    figure = Figure(figsize=(8, 4.2))
    for ax, causal in zip(figure.subplots(1, 2), (False, True), strict=True):
        tokens = torch.eye(14).unsqueeze(1)
        # Equal scores and one-hot values: the output is the weight of each key.
        weights = packed_attention(torch.zeros_like(tokens), tokens, tokens, cu_seqlens, causal=causal)[:, 0]
        ax.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=0.6)
        for edge in cu_seqlens[1:-1].tolist():
            ax.axhline(edge - 0.5, color="grey", linewidth=0.8)
            ax.axvline(edge - 0.5, color="grey", linewidth=0.8)
        ax.set(title="causal" if causal else "full", xlabel="key", ylabel="query", xticks=[], yticks=[])
    figure.savefig(path, dpi=90, bbox_inches="tight")


def vlm(path: Path) -> None:
    """Draw the way from images and text to an answer."""
    figure = Figure(figsize=(12, 2.6))
    ax = figure.subplots()
    stages = [
        ("images\nof any size", "#dddddd"),
        ("vision tower\nNaViT, Siglip2, CLIP, ...", "#9ecae1"),
        ("projector\nlinear, mlp2_gelu, ...", "#fdd0a2"),
        ("text model\nQwen3, Llama, ...", "#a1d99b"),
        ("answer", "#dddddd"),
    ]
    for place, (text, colour) in enumerate(stages):
        ax.text(place, 1, text, ha="center", va="center", fontsize=8, bbox={"boxstyle": "round,pad=0.7", "fc": colour})
    labels = ["patches of all images\nin one sequence", "(L, D)", "a token for each\nplaceholder", "token ids"]
    for place, label in enumerate(labels):
        ax.annotate("", (place + 0.62, 1), (place + 0.44, 1), arrowprops={"arrowstyle": "->"})
        ax.text(place + 0.5, 0.68, label, ha="center", va="top", fontsize=7, color="#444444")
    ax.text(3, 0.25, "text with <image> placeholders", ha="center", va="center", fontsize=9)
    ax.annotate("", (3, 0.82), (3, 0.34), arrowprops={"arrowstyle": "->"})
    ax.set(xlim=(-0.6, 4.5), ylim=(0.1, 1.4))
    ax.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")


IMAGES: dict[str, Callable[[Path], None]] = {
    "attention": attention,
    "coordinates": coordinates,
    "navit": navit,
    "packing_plan": packing_plan,
    "vlm": vlm,
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
