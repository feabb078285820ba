"""Training in three stages from nothing against training in one, with equal numbers of steps.

`python tests/benchmarks/ablate_recipe.py [--steps N] [--seeds N ...] [--ways NAME ...] [--out FOLDER]` trains the
model of the demo from nothing to find a digit in photographs, once for each way and seed, with the same images,
tokenizer and settings, and asks it about 200 held-out images:

- "one stage": the whole model, all steps;
- "stages, vision": a quarter of the steps a dual encoder of images and captions, which name the digit and the ninth
  of the image that it is in; a quarter projector and vision encoder, with the language model frozen; then the whole
  model;
- "stages, text": the same with projector and language model in the second stage, and the vision encoder frozen.

IoU is the mean over the images, 0 for malformed answers. `recipe.json` in the folder has all figures; a run that was
stopped continues with the next model.
"""

import json
from pathlib import Path
from typing import Any

from ablation import arguments, run_all
from PIL import Image

from vlparts.demo.data import Task, write_dataset
from vlparts.demo.run import SETTINGS, TEXT, ask_without_vlparts
from vlparts.demo.score import read_answers, score
from vlparts.training.building import conversation_texts
from vlparts.training.recipe import Recipe, run_recipe
from vlparts.training.records import read_records
from vlparts.training.tokenizer import train_tokenizer

IMAGES, HELD_OUT = 6000, 200
SECOND = {"one stage": [], "stages, vision": ["projector", "vision"], "stages, text": ["projector", "text"]}
"""What the second of three stages trains."""
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
FIGURES = {"IoU after the second stage": "second", "IoU": "iou", "right label": "label", "well-formed": "well_formed"}


def write_captions(path: Path) -> Path:
    """Write a record for each of the demo's, whose answer names the digit and the place of its middle."""
    captions = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        (wanted,) = record["messages"][-1]["content"]
        x1, y1, x2, y2 = wanted["box"]
        with Image.open(path.parent / record["image"]) as image:
            width, height = image.size
        place = f"{ROWS[int(1.5 * (y1 + y2) / height)]} {COLUMNS[int(1.5 * (x1 + x2) / width)]}"
        answer = {"role": "assistant", "content": f"{wanted['label']} {place}"}
        captions.append({"image": record["image"], "messages": [{"role": "user", "content": ""}, answer]})
    made = path.with_stem(f"{path.stem}_captions")
    made.write_text("".join(json.dumps(record) + "\n" for record in captions), encoding="utf-8")
    return made


def recipe_of(way: str, out: Path, training: Path, captions: Path, seed: int, steps: int) -> Recipe:
    """The stages of a way."""
    common = {name: value for name, value in SETTINGS.items() if name != "vision"}
    text = {"text": TEXT, "tokenizer": str(out / "tokenizer")}
    vision = {"vision": SETTINGS["vision"]}
    quarter, chats = max(1, steps // 4), {"data": str(training)}
    stages: dict[str, dict[str, Any]] = {"whole": {**vision, **text, **chats, "max_steps": steps}}
    if SECOND[way]:
        encoder = {"kind": "dual_encoder", "data": str(captions), "dual_encoder": {"projection_dim": 128}}
        stages = {
            "encoder": {**encoder, **vision, **text, "max_steps": quarter},
            "second": {**text, **chats, "train": SECOND[way], "max_steps": quarter},
            "whole": {**chats, "max_steps": max(1, steps - 2 * quarter)},
        }
    defaults = {**common, "seed": seed, "save_steps": steps, "trainer": {"disable_tqdm": True}}
    return Recipe(output=out / "model", stages=stages, defaults=defaults)


def run(way: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """Train one model in its stages, and ask it after each one in which it can answer."""
    training = write_dataset(out / "data", "train", IMAGES, Task(), held_out=False, seed=seed)
    held_out = write_dataset(out / "data", "held_out", HELD_OUT, Task(), held_out=True, seed=seed)
    captions = write_captions(training)
    texts = [text for path in (training, captions) for text in conversation_texts(read_records(path).lines)]
    train_tokenizer(texts).save_pretrained(out / "tokenizer")
    result = run_recipe(recipe_of(way, out, training, captions, seed, steps))
    scores = {
        stage.name: score(read_answers(held_out, ask_without_vlparts(stage.folder, held_out)))
        for stage in result.stages
        if stage.name != "encoder"
    }
    last = scores["whole"]
    return {
        "second": scores["second"].mean_iou if "second" in scores else float("nan"),
        "iou": last.mean_iou,
        "label": last.right_label,
        "well_formed": last.well_formed,
        "losses": {stage.name: [line["loss"] for line in stage.log if "loss" in line] for stage in result.stages},
    }


def main() -> None:
    """Print the table and write `recipe.json`."""
    options = arguments(str(__doc__), list(SECOND), "ways", "ablate-recipe")
    found = run_all(run, options, "way", FIGURES)
    runs = [
        {"way": way, "seed": seed, "steps": options.steps, **figures}
        for way, seeds in found.items()
        for seed, figures in zip(options.seeds, seeds, strict=True)
    ]
    (options.out / "recipe.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
