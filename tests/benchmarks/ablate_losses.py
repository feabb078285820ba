"""Training with four averages of the loss on answers of very different lengths.

`python tests/benchmarks/ablate_losses.py [--steps N] [--seeds N ...] [--presets NAME ...] [--mix M] [--out FOLDER]`
trains the demo model from scratch on photographs that contain a digit, once per preset and seed, with the same images,
order of samples, number of steps and settings. A third of the questions asks for the digit's name (one token), a third
for its box (17 tokens), and a third for a drawing of 13 x 13 cells, 1 where the digit's box touches a cell (181
tokens). All three are then asked of 200 held-out images. Malformed drawings and boxes have an IoU of 0.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from ablation import arguments, run_all, train_and_ask
from numpy.typing import NDArray
from PIL import Image

from vlparts.coordinates import Region, decode, encode
from vlparts.coordinates.metrics.iou import box_iou
from vlparts.demo.data import Task, write_dataset
from vlparts.losses.weights import PRESETS
from vlparts.training.building import conversation_texts
from vlparts.training.records import read_records
from vlparts.training.tokenizer import train_tokenizer

IMAGES, HELD_OUT = 6000, 200
CELLS = 13
QUESTIONS = {"name": "Which digit is it?", "box": "Where is it?", "drawing": "Which cells does it touch?"}
LONGEST = CELLS * (CELLS + 1) + 20  # tokens of an answer
COLUMNS = {
    "names well-formed": "name adherence",
    "names right": "name accuracy",
    "boxes well-formed": "box adherence",
    "box IoU": "box iou",
    "drawings well-formed": "drawing adherence",
    "cell IoU": "drawing iou",
    "cells right": "drawing accuracy",
}


def draw(box: tuple[float, ...], size: tuple[int, int]) -> str:
    """Rows of cells, 1 where the box touches a cell."""
    spans = []
    for start, end, length in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        edges = np.linspace(0, length, CELLS + 1)
        spans.append((edges[1:] > start) & (edges[:-1] < end))
    return "\n".join("".join(str(int(row and column)) for column in spans[0]) for row in spans[1])


def read_drawing(text: str) -> NDArray[np.bool_] | None:
    """The cells of a drawing, or None if it is not well-formed."""
    if not re.fullmatch(rf"[01]{{{CELLS}}}(\n[01]{{{CELLS}}}){{{CELLS - 1}}}", text):
        return None
    return np.array([[cell == "1" for cell in row] for row in text.split("\n")])


def ask_kinds(path: Path, every: bool) -> Path:
    """Convert the demo's records to the three kinds of question: all three per image, or one per image in turn."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kinds, found = list(QUESTIONS), []
    for index, record in enumerate(records):
        (wanted,) = record["messages"][-1]["content"]
        with Image.open(path.parent / record["image"]) as image:
            drawing = draw(wanted["box"], image.size)
        answers = {"name": wanted["label"], "box": [{"box": wanted["box"]}], "drawing": drawing}
        for place, kind in enumerate(kinds):
            if every or index % len(kinds) == place:
                turns = [("user", QUESTIONS[kind]), ("assistant", answers[kind])]
                messages = [{"role": role, "content": content} for role, content in turns]
                found.append((place, {"image": record["image"], "messages": messages}))
    if every:
        found.sort(key=lambda one: one[0])
    made = path.with_stem(f"{path.stem}_kinds")
    made.write_text("".join(json.dumps(record) + "\n" for _, record in found), encoding="utf-8")
    return made


def score(held_out: Path, answers: list[str]) -> dict[str, float]:
    """The scores of all kinds of question."""
    found: dict[str, list[float]] = {key: [] for key in COLUMNS.values()}
    for line, answer in zip(held_out.read_text(encoding="utf-8").splitlines(), answers, strict=True):
        record = json.loads(line)
        question, wanted = (message["content"] for message in record["messages"])
        with Image.open(held_out.parent / record["image"]) as image:
            size = image.size
        if question == QUESTIONS["name"]:
            found["name adherence"].append(re.fullmatch("[0-9]", answer) is not None)
            found["name accuracy"].append(answer == wanted)
        elif question == QUESTIONS["box"]:
            regions = decode(answer, size, on_error="collect").regions
            whole = [region.kind for region in regions] == ["box"] and encode(regions, size) == answer
            truth = Region.box(*wanted[0]["box"])
            found["box adherence"].append(whole)
            found["box iou"].append(float(box_iou([regions[0].xyxy], [truth.xyxy])[0, 0]) if whole else 0.0)
        else:
            cells, true = read_drawing(answer), read_drawing(wanted)
            found["drawing adherence"].append(cells is not None)
            found["drawing iou"].append(0.0 if cells is None else float((cells & true).sum() / (cells | true).sum()))
            found["drawing accuracy"].append(0.0 if cells is None else float((cells == true).mean()))
    return {key: statistics.mean(values) for key, values in found.items()}


def run(preset: str, seed: int, steps: int, out: Path, mix: float | None) -> dict[str, Any]:
    """Train and evaluate one model; return its scores."""
    folder = out / "data"
    training = ask_kinds(write_dataset(folder, "train", IMAGES, Task(), held_out=False, seed=seed), every=False)
    held_out = ask_kinds(write_dataset(folder, "held_out", HELD_OUT, Task(), held_out=True, seed=seed), every=True)
    tokenizer = train_tokenizer(conversation_texts(read_records(training).lines))
    tokenizer.save_pretrained(out / "tokenizer")
    settings = {"loss": preset, "tokenizer": out / "tokenizer"}
    if preset == "openpangu_mix":
        settings["mix"] = mix
    return score(held_out, train_and_ask(out, training, held_out, seed, steps, LONGEST, **settings))


def main() -> None:
    """Print the table."""
    options = arguments(str(__doc__), list(PRESETS), "presets", "ablate-losses", {"--mix": float})
    run_all(lambda *one: run(*one, mix=options.mix), options, "loss", COLUMNS)


if __name__ == "__main__":
    main()
