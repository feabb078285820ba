"""One task, three ways to write its boxes: padded digits, plain digits, and a token for each code.

`python tests/benchmarks/ablate_coordinates.py [--steps N] [--seeds N ...] [--out FOLDER]` trains the model of the demo
from nothing to find a digit in photographs, once for each way and seed, with the same images, order of samples,
number of steps and settings, and asks it about 200 held-out images. All three have the codes 0 to 999 with 999 at the
far edge; a box is `(012,345),(678,901)`, `(12,345),(678,901)`, or four of a thousand added tokens,
`<loc_12><loc_345>...`.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from ablation import arguments, run_all, train_and_ask

from vlparts.coordinates import CoordinateFormat, Region, Shape, TaggedGrammar, encode, get_format, register_format
from vlparts.coordinates.metrics.report import report
from vlparts.demo.data import Task, write_dataset
from vlparts.demo.score import read_answers
from vlparts.parts.coordinate_tokens import LocationTokens
from vlparts.parts.tokenization_coordinates import PaddedCoordinateTokenizer
from vlparts.training.building import conversation_texts
from vlparts.training.records import read_records
from vlparts.training.tokenizer import train_tokenizer

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
    tokenizer: Any = train_tokenizer(conversation_texts(read_records(training).lines))
    if name == "location tokens":
        tokenizer = PaddedCoordinateTokenizer.from_tokenizer(tokenizer, location_tokens=LocationTokens("<loc_{}>"))
    tokenizer.save_pretrained(out / "tokenizer")
    fmt = FORMATS[name]
    answers = train_and_ask(
        out, training, held_out, seed, steps, coordinate_format=fmt.name, tokenizer=out / "tokenizer"
    )
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
    options = arguments(str(__doc__), list(FORMATS), "formats", "ablate-coordinates")
    columns = {"mean IoU": "mean_iou", "IoU > 0.5": "accuracy", "tokens": "tokens", "spread": "spread"}
    run_all(run, options, "boxes as", {"adherence": "adherence", **columns})


if __name__ == "__main__":
    main()
