"""The demo: makes data, trains, saves, generates answers without vlparts, scores and draws them."""

import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from ..parts.utils import positive_integer
from ..training.config import TrainConfig
from ..training.presets import preset_names
from ..training.train import train
from . import ask
from .data import Task, write_dataset
from .deadline import Deadline, progress_bar
from .isolation import environment_without, run_without
from .score import Score, read_answers, score

TRAINING_IMAGES = 10000
HELD_OUT_IMAGES = 200
TEXT = "qwen3:tiny"
SETTINGS: dict[str, Any] = {
    "vision": {"preset": "navit:tiny", "max_grid_size": 8, "position_initializer_range": 0.3},
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "capacity": 4096,
    "max_items": 32,
    "cache": True,
    "logging_steps": 20,
}
LEAST_MINUTES = 0.5
MOST_STEPS = 100_000  # of a training that ends by the clock


def run_demo(
    out: Path,
    minutes: float = 5.0,
    seed: int = 0,
    steps: int | None = None,
    console: Console | None = None,
    task: Task | None = None,
    images: tuple[int, int] = (TRAINING_IMAGES, HELD_OUT_IMAGES),
    text: str = TEXT,
) -> dict[str, Any]:
    """Train a composed model to locate digits in photographs, save it, and evaluate it in a process without vlparts.

    Args:
        out: Folder for the data, the checkpoint `model`, `predictions.png` and `metrics.json`, which are overwritten.
        minutes: Total time in minutes, whatever else the machine does: training ends in time for the evaluation.
        seed: Seed of the weights and the order of samples.
        steps: Number of training steps, instead of `minutes`.
        console: Console for progress messages; None for no output.
        task: Parameters of the images; by default one digit per image.
        images: Number of training images and of held-out images.
        text: Preset of the text model, such as "moge:small".

    Returns:
        The contents of `metrics.json`.

    Raises:
        ValueError: If `minutes` leaves no time for training, `steps` is not positive, or `text` is not a preset.
    """
    if text not in preset_names("text"):
        raise ValueError(f"`text` must be one of {', '.join(preset_names('text'))}, got {text!r}.")
    if steps is not None:
        positive_integer(steps, "steps")
    if steps is None and minutes <= LEAST_MINUTES:
        raise ValueError(f"`minutes` must be more than {LEAST_MINUTES:g}, got {minutes:g}.")
    console, task = console or Console(quiet=True), task or Task()
    began = time.perf_counter()
    for name in ("data", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    console.print(f"Making {images[0]} training and {images[1]} held-out images in {out / 'data'}")
    training = write_dataset(out / "data", "train", images[0], task, held_out=False, seed=seed)
    held_out = write_dataset(out / "data", "held_out", images[1], task, held_out=True, seed=seed)

    config = TrainConfig(data=training, output=out / "model", seed=seed, text=text, **SETTINGS)
    started = time.perf_counter()
    if steps is None:
        console.print(f"Training until {minutes:g} minutes have passed in all")
        quiet = {"disable_tqdm": True, "save_strategy": "no"}
        config = config.model_copy(update={"max_steps": MOST_STEPS, "trainer": quiet})
        with progress_bar(console) as bar:
            result = train(config, callbacks=[Deadline(began + 60 * minutes, _reserve, bar)])
    else:
        console.print(f"Training for {steps} steps")
        result = train(config.model_copy(update={"max_steps": steps, "save_steps": steps}))
    trained = time.perf_counter() - started

    console.print("Evaluating the saved model in a process where vlparts cannot be imported")
    answers = ask_without_vlparts(out / "model", held_out)
    items = read_answers(held_out, answers)
    scores = score(items)
    _draw(items, out / "predictions.png")
    metrics = {
        **scores.to_dict(),
        "text": text,
        "digits": task.digits,
        "steps": result.steps,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "training_seconds": round(trained, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _report(console, scores, metrics, out)
    return metrics


def ask_without_vlparts(folder: Path, questions: Path, tokens: int = 40) -> list[str]:
    """Generate answers with a saved model in a new process where vlparts cannot be imported.

    Args:
        folder: The checkpoint.
        questions: JSON Lines file of records.
        tokens: Maximum number of tokens per answer.

    Returns:
        One answer per record.
    """
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        python = environment_without(scratch / "environment")
        answers = scratch / "answers.json"
        script = Path(ask.__file__)
        arguments = (folder.resolve(), questions.resolve(), answers, str(tokens))
        run_without(python, script, *arguments, modules_cache=scratch / "code")
        return json.loads(answers.read_text(encoding="utf-8"))


def _reserve(step: float) -> float:
    """Seconds from the end of training to that of the demo: 9 were measured with 0.4 for a step, 70 with 5.

    Args:
        step: Seconds of a training step, which generation and the start of a process are compared with.
    """
    return 10.0 + 25.0 * step


def _draw(items: list[dict[str, Any]], path: Path) -> None:
    from ..show import box_grid

    pictures = [
        {
            "image": item["image"],
            "predicted": [item["predicted"]] if item["predicted"] is not None else [],
            "truth": [item["truth"]],
            "title": f"Where is the {item['truth'].label}?\n{item['answer']}",
        }
        for item in items[:16]
    ]
    box_grid(pictures, path)


def _report(console: Console, scores: Score, metrics: dict[str, Any], out: Path) -> None:
    table = Table("held-out images", "value")
    table.add_row("well-formed answers", f"{scores.well_formed:.1%}")
    table.add_row("correct label", f"{scores.right_label:.1%}")
    table.add_row("mean IoU", f"{scores.mean_iou:.3f}")
    table.add_row("IoU above 0.5", f"{scores.iou_above_half:.1%}")
    table.add_row("mean IoU of the best constant box", f"{scores.mean_iou_of_constant:.3f}")
    table.add_row("training steps", str(metrics["steps"]))
    table.add_row("total seconds", f"{metrics['seconds']:.0f}")
    console.print(table)
    console.print(f"Pictures in {out / 'predictions.png'}, checkpoint in {out / 'model'}")
