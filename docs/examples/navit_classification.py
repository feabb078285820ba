"""Compares a small NaViT with a ViT of one resolution, trained with equally many floating-point operations.

The task is to classify handwritten digits in crops of photographs of many sizes and aspect ratios. All images are made
from files of scikit-learn. `python docs/examples/navit_classification.py --help`
"""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, product, repeat
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from vlparts import NaViTConfig, NaViTForImageClassification, NaViTImageProcessor
from vlparts.demo.data import Task, write_dataset
from vlparts.parts.image_files import open_image
from vlparts.training.images.balance import encoder_work
from vlparts.training.images.collator import PackedImageCollator
from vlparts.training.images.packing import PackedImageDataset
from vlparts.training.images.plan import ResolutionPolicy
from vlparts.training.images.resolution import ResolutionSampler
from vlparts.training.images.sampler import PackedImageSampler
from vlparts.training.images.token_drop import BetaDrop
from vlparts.training.optimizers import muon_with_adamw

PATCH = 4
RESOLUTIONS = (16, 20, 24, 32, 40, 48)  # side in pixels of the square of equal area
VIT_RESOLUTION = 32  # training resolution of the ViT
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 0.05, 0.05


@dataclass(frozen=True)
class Scale:
    """Size of a comparison: task, training and test images, operations, patches per step, blocks."""

    task: Task
    images: tuple[int, int]
    budget: float
    capacity: int = 2048
    layers: int = 4


class Digits(Dataset):
    """Images and labels of a dataset of `write_dataset`."""

    def __init__(self, path: Path) -> None:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.files = [path.parent / record["image"] for record in records]
        self.labels = [int(record["messages"][1]["content"][0]["label"]) for record in records]
        self.sizes = [open_image(file).size[::-1] for file in self.files]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.files[index]), self.labels[index]


@dataclass(frozen=True)
class Square:
    """Resolution policy that resizes every image to a square, as a plain ViT requires."""

    side: int

    def grid(self, height: int, width: int, factor: int, generator: np.random.Generator) -> tuple[int, int]:
        """Return rows and columns of the square in units of `factor` pixels."""
        return self.side // factor, self.side // factor


@dataclass(frozen=True)
class Contender:
    """A model, the sampler options for its training images, and the resolution policy of its test images."""

    config: NaViTConfig
    training: dict[str, Any]
    testing: Callable[[int], ResolutionPolicy]


def contenders(layers: int) -> dict[str, Contender]:
    """Return the two models, which differ only in position embeddings, with their image options."""
    shape = {"num_hidden_layers": layers, "patch_size": PATCH, "num_labels": 10, "pooling": "mean"}
    low, high = RESOLUTIONS[0], RESOLUTIONS[-1]
    navit = NaViTConfig.from_preset("tiny", max_grid_size=high // PATCH, **shape)
    sampled = {
        "resolution": ResolutionSampler(low, high, distribution="truncated_normal", mean=-0.5),
        "token_drop": BetaDrop(mean=0.25, maximum=0.5),
    }
    # One embedding per position of the training grid, interpolated for other grids, as is usual for a ViT.
    table = {
        "max_grid_size": VIT_RESOLUTION // PATCH,
        "position_combination": "joint",
        "position_interpolation": "bicubic",
    }
    vit = NaViTConfig.from_preset("tiny", **table, **shape)
    return {
        "NaViT": Contender(navit, sampled, lambda side: ResolutionSampler(side, side)),
        "ViT": Contender(vit, {"resolution": Square(VIT_RESOLUTION)}, Square),
    }


def packs(data: Digits, capacity: int, workers: int = 0, **options: Any) -> DataLoader:
    """Return a loader of packs of at most `capacity` patches; `options` are those of `PackedImageSampler`."""
    return DataLoader(
        PackedImageDataset(data, NaViTImageProcessor(patch_size=PATCH), image_key=0, label_key=1),
        sampler=PackedImageSampler(data.sizes, PATCH, capacity, **options),
        batch_size=None,
        collate_fn=PackedImageCollator(pad=False),
        num_workers=workers,
    )


def training_flops(config: NaViTConfig, lengths: list[int]) -> int:
    """Return the operations of a training step, three times those of the forward pass of embedding and blocks."""
    embedding = 2 * config.num_channels * config.patch_size**2 * config.hidden_size
    blocks = config.num_hidden_layers * encoder_work(lengths, config.hidden_size)
    return 3 * (blocks + sum(lengths) * embedding)


def train(contender: Contender, loader: DataLoader, budget: float, title: str) -> tuple[Any, int]:
    """Train a model for a budget of operations; return it and the number of images seen."""
    model = NaViTForImageClassification(contender.config).train()
    optimizer = muon_with_adamw(model, LEARNING_RATE, WEIGHT_DECAY)
    spent = seen = 0
    columns = (*Progress.get_default_columns(), "loss {task.fields[loss]:.2f}")
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(title, total=budget, loss=math.nan)
        for batch in chain.from_iterable(repeat(loader)):  # resolutions and kept patches differ per epoch
            share = spent / budget
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, share / WARM_UP) * (1 + math.cos(math.pi * share)) / 2
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lengths = batch["cu_seqlens"].diff().tolist()
            spent, seen = spent + training_flops(contender.config, lengths), seen + len(lengths)
            progress.update(bar, completed=spent, loss=loss.item())
            if spent >= budget:
                break
    return model.eval(), seen


@torch.no_grad()
def accuracy(model: NaViTForImageClassification, loader: DataLoader) -> float:
    """Return the fraction of correctly classified images."""
    right = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in loader]
    return float(torch.cat(right).double().mean())


def compare(folder: Path, scale: Scale, seeds: int) -> dict[str, np.ndarray]:
    """Train both models with several seeds; return the `(seeds, resolutions)` accuracies of each.

    Training and test images share neither digits nor pixels.
    """
    files = [
        write_dataset(folder, name, count, scale.task, held_out=name == "test", seed=0)
        for name, count in zip(("train", "test"), scale.images, strict=True)
    ]
    training, test = map(Digits, files)
    scores: dict[str, list[list[float]]] = {"NaViT": [], "ViT": []}
    for seed, (name, contender) in product(range(seeds), contenders(scale.layers).items()):
        torch.manual_seed(seed)
        loader = packs(training, scale.capacity, workers=1, seed=seed, **contender.training)
        model, seen = train(contender, loader, scale.budget, f"{name}, seed {seed}")
        tests = [packs(test, 4096, resolution=contender.testing(side), carry_over=False) for side in RESOLUTIONS]
        scores[name].append([accuracy(model, loader) for loader in tests])
        print(f"{name}, seed {seed}: {seen:,} images seen with {scale.budget:.3g} operations", flush=True)
    return {name: np.array(runs) for name, runs in scores.items()}


def print_table(scores: dict[str, np.ndarray]) -> None:
    """Print mean and range over the seeds as a Markdown table."""
    print("\n| resolution | " + " | ".join(scores) + " |\n" + "|---" * (len(scores) + 1) + "|")
    for index, side in enumerate(RESOLUTIONS):
        cells = [runs[:, index] for runs in scores.values()]
        texts = [f"{one.mean():.1%} ({one.min():.1%} to {one.max():.1%})" for one in cells]
        print(f"| {side} | " + " | ".join(texts) + " |")


def draw(scores: dict[str, np.ndarray], path: Path) -> None:
    """Plot accuracy against resolution: the mean as a line, the range over the seeds as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, runs in scores.items():
        axes.plot(RESOLUTIONS, 100 * runs.mean(0), marker="o", label=name)
        axes.fill_between(RESOLUTIONS, 100 * runs.min(0), 100 * runs.max(0), alpha=0.2)
    axes.set(xlabel="resolution of the test images (pixels)", ylabel="accuracy (%)", xticks=RESOLUTIONS)
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each model, with the seeds 0, 1, ...")] = 3,
    teraflops: Annotated[float, typer.Option(help="Operations of each training run, in 10^12.")] = 5.0,
    picture: Annotated[Path | None, typer.Option(help="PNG file for the plot of accuracy against resolution.")] = None,
    quick: Annotated[bool, typer.Option(help="One short run with easier images, as a smoke test.")] = False,
) -> None:
    """Train NaViT and a ViT with equally many operations; print their accuracy at each resolution."""
    scale = Scale(Task(sides=(40, 80), digit_sides=(24, 40)), (10_000, 1_000), teraflops * 1e12)
    if quick:
        torch.set_num_threads(1)  # such small matrix products do not gain from more
        scale, seeds = Scale(Task((32, 34), (32, 32)), (600, 100), 0.12e12, capacity=256, layers=1), 1
    with tempfile.TemporaryDirectory() as folder:
        scores = compare(Path(folder), scale, seeds)
    print_table(scores)
    if picture is not None:
        draw(scores, picture)


if __name__ == "__main__":
    typer.run(main)
