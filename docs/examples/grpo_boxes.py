"""Trains a small composed model by GRPO, with the IoU of its sampled answers as the reward.

The task is that of the demo: to locate a digit in a photograph. A model is first trained on written answers for some
steps, then by TRL's `GRPOTrainer` on the same images. `python docs/examples/grpo_boxes.py --help`; needs
`pip install trl datasets`.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import Dataset, Image
from rich.console import Console
from rich.table import Table
from trl import GRPOConfig, GRPOTrainer

from vlparts.demo.data import Task, write_dataset
from vlparts.demo.run import SETTINGS, TEXT, ask_without_vlparts
from vlparts.demo.score import Score, read_answers, score
from vlparts.parts.image_files import open_image
from vlparts.training.config import TrainConfig
from vlparts.training.rewards import format_reward, iou_reward
from vlparts.training.train import save, train

ANSWER_TOKENS = 32


def prompts(records: Path) -> Dataset:
    """The questions of a file of records as a dataset, with columns for the rewards."""
    rows: list[dict[str, Any]] = []
    for line in records.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question, answer = record["messages"]
        file = records.parent / record["image"]
        rows.append(
            {
                "prompt": [question],
                "image": str(file),
                "image_size": list(open_image(file).size),
                "boxes": [region["box"] for region in answer["content"]],
                "labels": [region["label"] for region in answer["content"]],
            }
        )
    return Dataset.from_list(rows).cast_column("image", Image())


def evaluate(model: Any, processor: Any, held_out: Path) -> Score:
    """Save the model and score its greedy answers, generated in a process without vlparts."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, processor, Path(folder))
        return score(read_answers(held_out, ask_without_vlparts(Path(folder), held_out, ANSWER_TOKENS)))


def run(folder: Path, seed: int, sft_steps: int, grpo_steps: int, images: tuple[int, int]) -> tuple[Score, Score]:
    """Train and return the scores before and after GRPO."""
    training = write_dataset(folder, "train", images[0], Task(), held_out=False, seed=seed)
    held_out = write_dataset(folder, "held_out", images[1], Task(), held_out=True, seed=seed)
    settings = {**SETTINGS, "max_steps": sft_steps, "save_steps": sft_steps, "trainer": {"use_cpu": True}}
    trained = train(TrainConfig(data=training, output=folder / "sft", seed=seed, text=TEXT, **settings))
    before = evaluate(trained.model, trained.processor, held_out)
    trained.model.model.vision_tower.requires_grad_(False)  # trained as well, it loses more by noise than it gains
    trainer = GRPOTrainer(
        model=trained.model,
        processing_class=trained.processor,
        reward_funcs=[iou_reward(labels="labels"), format_reward(kind="box")],
        train_dataset=prompts(training),
        args=GRPOConfig(
            output_dir=str(folder / "grpo"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=seed,
            max_steps=grpo_steps,
            per_device_train_batch_size=256,  # 16 questions
            num_generations=16,
            max_completion_length=ANSWER_TOKENS,
            learning_rate=2e-4,
            temperature=0.7,
            reward_weights=[1.0, 0.2],
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    return before, evaluate(trainer.model, trained.processor, held_out)


def main(
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seed of a run; may be repeated.")] = None,
    sft_steps: Annotated[int, typer.Option(min=1, help="Steps of training on written answers.")] = 200,
    grpo_steps: Annotated[int, typer.Option(min=1, help="Steps of GRPO.")] = 40,
    images: Annotated[tuple[int, int], typer.Option(help="Training and held-out images.")] = (4000, 400),
) -> None:
    """Train by GRPO and print the scores on held-out images before and after."""
    table = Table("seed", "mean IoU before", "after", "IoU above 0.5 before", "after", "well-formed before", "after")
    for seed in seeds or [0]:
        with tempfile.TemporaryDirectory() as folder:
            both = run(Path(folder), seed, sft_steps, grpo_steps, images)
        shares = [f"{one.mean_iou:.3f}" for one in both] + [f"{one.iou_above_half:.1%}" for one in both]
        table.add_row(str(seed), *shares, *(f"{one.well_formed:.1%}" for one in both))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
