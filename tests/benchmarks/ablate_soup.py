"""Soups of three fine-tunes of one model against the best of them.

`python tests/benchmarks/ablate_soup.py [--steps N] [--seeds N ...] [--out FOLDER]` trains the model of the demo from
nothing for each seed, then three times further for half of the steps, with other orders of the samples and a third of
the learning rate. Best is the fine-tune with the largest mean IoU on 200 validation images, by which the greedy soup
is chosen too; all figures are mean IoUs on 200 other held-out images, 0 for malformed answers. `soup.json` in the
folder has them; a run that was stopped continues with the next seed.
"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from ablation import arguments, run_all

from vlparts.checkpoints.soup import average_folders, greedy_soup
from vlparts.demo.data import Task, write_dataset
from vlparts.demo.run import SETTINGS, TEXT, ask_without_vlparts
from vlparts.demo.score import read_answers, score
from vlparts.training.config import TrainConfig
from vlparts.training.train import train

IMAGES, HELD_OUT, FINE_TUNES = 6000, 200, 3
FIGURES = {
    "start": "start",
    "mean of the fine-tunes": "single",
    "best fine-tune": "best",
    "mean soup": "mean",
    "greedy soup": "greedy",
}


def run(way: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """Train a model, its fine-tunes and their soups; their figures."""
    training = write_dataset(out / "data", "train", IMAGES, Task(), held_out=False, seed=seed)
    validation, test = (
        write_dataset(out / "data", name, HELD_OUT, Task(), held_out=True, seed=1000 * seed + number)
        for number, name in enumerate(("validation", "test"))
    )

    def iou(folder: Path, questions: Path) -> float:
        return score(read_answers(questions, ask_without_vlparts(folder, questions))).mean_iou

    models = out / "model"
    for name in ("mean", "greedy", "greedy.work"):
        shutil.rmtree(models / name, ignore_errors=True)
    quiet = {"disable_tqdm": True, "save_strategy": "no"}
    first = {**SETTINGS, "text": TEXT, "max_steps": steps, "seed": seed, "trainer": quiet}
    train(TrainConfig(data=training, output=models / "start", **first))
    further = {
        **{name: value for name, value in SETTINGS.items() if name != "vision"},
        "model": models / "start",
        "learning_rate": SETTINGS["learning_rate"] / 3,
        "max_steps": max(1, steps // 2),
        "trainer": quiet,
    }
    folders = [models / f"fine-tune-{number}" for number in range(FINE_TUNES)]
    for number, folder in enumerate(folders):
        train(TrainConfig(data=training, output=folder, seed=100 + FINE_TUNES * seed + number, **further))
    average_folders(folders, models / "mean")
    chosen = greedy_soup(folders, models / "greedy", lambda folder: iou(folder, validation))
    single = {str(folder): iou(folder, test) for folder in folders}
    return {
        "start": iou(models / "start", test),
        "single": statistics.mean(single.values()),
        "singles": list(single.values()),
        "best": single[chosen.trials[0].folders[0]],
        "mean": iou(models / "mean", test),
        "greedy": iou(models / "greedy", test),
        "in the greedy soup": len(chosen.folders),
    }


def main() -> None:
    """Print the table and write `soup.json`."""
    options = arguments(str(__doc__), ["soup"], "ways", "ablate-soup")
    (found,) = run_all(run, options, "", FIGURES).values()
    runs = [{"seed": seed, "steps": options.steps, **one} for seed, one in zip(options.seeds, found, strict=True)]
    (options.out / "soup.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
