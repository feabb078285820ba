"""What ablations share: the model of the demo, trained from nothing with some settings, and asked; one table."""

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timing import machine_line, print_table

from vlparts.demo.run import SETTINGS, TEXT, ask_without_vlparts
from vlparts.training.config import TrainConfig
from vlparts.training.train import train

Run = Callable[[str, int, int, Path], dict[str, Any]]
"""Takes the name of a way, a seed, a number of steps and a folder, and returns figures."""


def train_and_ask(
    out: Path, training: Path, held_out: Path, seed: int, steps: int, tokens: int = 40, **settings: Any
) -> list[str]:
    """Train the model of the demo with some settings changed, and return its answers to held-out questions.

    Args:
        out: Folder for the model.
        training: Records to learn.
        held_out: Records to ask.
        seed: Of weights and order.
        steps: Optimiser steps.
        tokens: Of an answer, at most.
        **settings: Fields of TrainConfig that differ from the demo's.
    """
    options = {**SETTINGS, "text": TEXT, "max_steps": steps, "save_steps": steps, **settings}
    train(TrainConfig(data=training, output=out / "model", seed=seed, **options))
    return ask_without_vlparts(out / "model", held_out, tokens)


def arguments(
    text: str, ways: Sequence[str], name: str, out: str, more: dict[str, Callable[[str], Any]] | None = None
) -> argparse.Namespace:
    """The command line of an ablation.

    Args:
        text: What its help says.
        ways: What is compared.
        name: The option that chooses some of them; they are under `ways`.
        out: Folder by default.
        more: Type of each further option.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(f"--{name}", dest="ways", nargs="+", default=list(ways), choices=list(ways))
    parser.add_argument("--out", type=Path, default=Path(out))
    for option, kind in (more or {}).items():
        parser.add_argument(option, type=kind)
    return parser.parse_args()


def run_all(
    run: Run, options: argparse.Namespace, title: str, columns: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Run every way with every seed, and print each run, then for each way the mean and the range over seeds.

    What was run already with the same settings is not run again.

    Args:
        run: Trains and asks one model; its figures are kept in its folder as `figures.json`.
        options: What [`arguments`] returned.
        title: Head of the column of ways.
        columns: Head to figure of the other columns.

    Returns:
        The figures of each way, one mapping per seed.
    """
    print(machine_line(), flush=True)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    for seed in options.seeds:
        for way in options.ways:
            folder = options.out / f"{way.replace(' ', '-')}-{seed}"
            kept, settings = folder / "figures.json", _settings(options)
            before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
            if before.get("settings") != settings:
                shutil.rmtree(folder / "model", ignore_errors=True)
                before = {"settings": settings, "figures": run(way, seed, options.steps, folder)}
                kept.write_text(json.dumps(before, indent=2), encoding="utf-8")
            figures = before["figures"]
            found[way].append(figures)
            print_table([title, "seed", *columns], [[way, seed, *(f"{figures[key]:.3f}" for key in columns.values())]])
    print_table(
        [title, *columns], [[way, *(spread(runs, key) for key in columns.values())] for way, runs in found.items()]
    )
    return found


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in ("seeds", "ways", "out")}


def spread(runs: list[dict[str, Any]], key: str) -> str:
    """Mean of a figure, and its range where there are several runs."""
    values = [float(figures[key]) for figures in runs]
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
