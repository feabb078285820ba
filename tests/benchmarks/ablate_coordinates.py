"""One task, three ways to write its boxes: padded digits, plain digits, and a token for each code.

`python tests/benchmarks/ablate_coordinates.py [--steps N] [--seeds N ...] [--out FOLDER]` trains the model of the demo
from nothing to find a digit in photographs, once for each way and seed, with the same images, order of samples,
number of steps and settings, and asks it about 200 held-out images. All three have the codes 0 to 999 with 999 at the
far edge; a box is `(012,345),(678,901)`, `(12,345),(678,901)`, or four of a thousand added tokens, `<loc_12><loc_345>...`.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from timing import machine_line, print_table

from vlparts.coordinates import CoordinateFormat, Region, Shape, TaggedGrammar, encode, get_format, register_format
from vlparts.coordinates.answers import report
from vlparts.demo.data import Task, write_dataset
from vlparts.demo.run import SETTINGS, TEXT, ask_without_vlparts
from vlparts.demo.score import read_answers
from vlparts.parts.coordinate_tokens import LocationTokens
from vlparts.parts.tokenization_coordinates import PaddedCoordinateTokenizer
from vlparts.training.building import conversation_texts
from vlparts.training.config import TrainConfig
from vlparts.training.records import read_records
from vlparts.training.tokenizer import train_tokenizer
from vlparts.training.train import train

IMAGES, HELD_OUT = 6000, 200
PADDED = get_format("openpangu")


def same_numbers(name: str, grammar: TaggedGrammar) -> CoordinateFormat:
    """The padded format's numbers with another text."""
    return register_format(dataclasses.replace(PADDED, name=name, grammar=grammar, source="", date="", assumed=()))


FORMATS = {
    "padded digits": PADDED,
    "plain digits": same_numbers(
        "ablation_plain", TaggedGrammar(shapes=(Shape("box", "({},{})"),), label_close=" ", loose=False)
    ),
    "location tokens": same_numbers(
        "ablation_tokens",
        TaggedGrammar(shapes=(Shape("box", "<loc_{}><loc_{}>", join=""),), label_close=" ", loose=False),
    ),
}


def run(name: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """Train and ask one model; its figures."""
    training = write_dataset(out / "data", "train", IMAGES, Task(), held_out=False, seed=seed)
    held_out = write_dataset(out / "data", "held_out", HELD_OUT, Task(), held_out=True, seed=seed)
    tokenizer: Any = train_tokenizer(conversation_texts(read_records(training)))
    if name == "location tokens":
        tokenizer = PaddedCoordinateTokenizer.from_tokenizer(tokenizer, location_tokens=LocationTokens("<loc_{}>"))
    tokenizer.save_pretrained(out / "tokenizer")
    fmt = FORMATS[name]
    settings = {**SETTINGS, "coordinate_format": fmt.name, "tokenizer": out / "tokenizer"}
    train(
        TrainConfig(
            data=training, output=out / "model", seed=seed, text=TEXT, max_steps=steps, save_steps=steps, **settings
        )
    )
    answers = ask_without_vlparts(out / "model", held_out)
    items = read_answers(held_out, answers)
    truths = [[item["truth"]] for item in items]
    figures = report(answers, truths, [item["image"].size for item in items], fmt)
    boxes = [
        encode([Region.box(*truth[0].xyxy)], item["image"].size, fmt)
        for truth, item in zip(truths, items, strict=True)
    ]
    lengths = [len(tokenizer(box, add_special_tokens=False)["input_ids"]) for box in boxes]
    return {**figures.to_dict(), "tokens": statistics.mean(lengths), "spread": max(lengths) - min(lengths)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--out", type=Path, default=Path("ablate-coordinates"))
    options = parser.parse_args()
    print(machine_line(), flush=True)
    rows = []
    for seed in options.seeds:
        for name in options.formats:
            folder = options.out / f"{name.replace(' ', '-')}-{seed}"
            figures = run(name, seed, options.steps, folder)
            (folder / "figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
            shown = (figures["adherence"], figures["mean_iou"], figures["accuracy"], figures["tokens"])
            rows.append([name, seed, *(f"{value:.3f}" for value in shown), figures["spread"]])
            print_table(["boxes as", "seed", "adherence", "mean IoU", "IoU > 0.5", "tokens", "spread"], rows[-1:])
    print_table(["boxes as", "seed", "adherence", "mean IoU", "IoU > 0.5", "tokens", "spread"], sorted(rows))


if __name__ == "__main__":
    main()
