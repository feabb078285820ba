"""Two tasks with fewer vision tokens, with and without training for it.

`python tests/benchmarks/ablate_tokens.py [--task boxes|pages] [--steps N] [--seeds N ...] [--ways NAME ...]
[--method NAME] [--out FOLDER]` trains a small model from nothing with all vision tokens, and with 1/2, 1/4 and 1/8 of
them (merged by similarity unless another method is asked for), on the same images in the same order. The model with
all tokens is also asked with fewer, by each method that needs no training.

"boxes" is the demo's task, to locate a digit in a photograph: mean IoU on 200 held-out images. "pages" is that of
`ablate_compression.py`, to read digits by DeepSeek-OCR's encoder with 64 vision tokens: mean precision on held-out
pages of 16 and 36 digits. Tokens are those of a question's image; newlines and separators are always kept.
"""

import json
import statistics
from fractions import Fraction
from pathlib import Path
from typing import Any

from ablate_compression import precision, read, train_reader, write_pages
from ablation import arguments, run_all, spread
from PIL import Image
from timing import print_table
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from vlparts.demo.data import Task, write_dataset
from vlparts.demo.run import SETTINGS, TEXT
from vlparts.evaluation import evaluate_tokens, read_questions
from vlparts.training.config import TrainConfig
from vlparts.training.train import train

IMAGES, HELD_OUT, HELD_OUT_PAGES = 6000, 200, 32
WAYS = {
    "all tokens": Fraction(1),
    "trained 1/2": Fraction(1, 2),
    "trained 1/4": Fraction(1, 4),
    "trained 1/8": Fraction(1, 8),
}
METHODS = ("average_pool", "merge_similar", "prune_by_norm", "prune_by_attention", "prune_diverse")
SHARES = [Fraction(1, 2), Fraction(1, 4), Fraction(1, 8)]


def run_pages(way: str, seed: int, steps: int, out: Path, method: str) -> dict[str, Any]:
    """Train one model to read; its precision and tokens, and those with fewer tokens than it was trained with."""
    reduction = {} if WAYS[way] == 1 else {"token_reduction": method, "token_ratio": float(WAYS[way])}
    model, processor = train_reader(8, seed, steps, out, **reduction)
    pages = {
        lines: write_pages(out / "pages", f"held_out_{lines}", (lines,), HELD_OUT_PAGES, 10 * seed + 9)
        for lines in (4, 6)
    }

    def precise(reduction: dict[str, Any] | None = None) -> float:
        found = [read(model, processor, path, lines**2 + 8, reduction) for lines, path in pages.items()]
        return statistics.mean(
            precision(*pair) for answers, texts in found for pair in zip(answers, texts, strict=True)
        )

    blank = Image.new("RGB", (480, 480))
    figures = {
        "score": precise(),
        "tokens": processor.count_image_tokens(processor.process_image(blank), 0),
        "first": 0.0,
    }
    for name in METHODS[1:] if WAYS[way] == 1 else ():
        figures |= {f"{name} {share}": precise({"method": name, "ratio": float(share)}) for share in SHARES}
    return figures


def run_boxes(way: str, seed: int, steps: int, out: Path, method: str) -> dict[str, Any]:
    """Train one model to locate; its overlap and tokens, and those with fewer tokens than it was trained with."""
    training = write_dataset(out.parent / f"data-{seed}", "train", IMAGES, Task(), held_out=False, seed=seed)
    held_out = write_dataset(out.parent / f"data-{seed}", "held_out", HELD_OUT, Task(), held_out=True, seed=seed)
    reduction = {} if WAYS[way] == 1 else {"token_reduction": method, "token_ratio": float(WAYS[way])}
    quiet = {"disable_tqdm": True, "save_strategy": "no"}
    settings = {**SETTINGS, **reduction, "text": TEXT, "max_steps": steps, "trainer": quiet}
    set_seed(seed)
    train(TrainConfig(data=training, output=out / "model", seed=seed, **settings))
    model = AutoModelForImageTextToText.from_pretrained(out / "model").eval()
    processor = AutoProcessor.from_pretrained(out / "model")
    questions = read_questions(held_out, processor)
    options: dict[str, Any] = {"batch_size": 50, "max_new_tokens": 40}
    (plain,) = evaluate_tokens(model, processor, questions, **options)
    figures = {"score": plain.iou.mean, "tokens": plain.image_tokens, "first": 1e3 * plain.first_token_seconds}
    for name in METHODS if WAYS[way] == 1 else ():
        for share, found in zip(
            SHARES,
            evaluate_tokens(model, processor, questions, [*map(float, SHARES)], method=name, **options),
            strict=True,
        ):
            figures |= {f"{name} {share}": found.iou.mean, f"{name} {share} tokens": found.image_tokens}
    return figures


def main() -> None:
    """Print the tables."""
    options = arguments(str(__doc__), list(WAYS), "ways", "ablate-tokens", {"--method": str, "--task": str})
    method, pages = options.method or "merge_similar", options.task == "pages"
    run = run_pages if pages else run_boxes
    columns = {"precision" if pages else "IoU": "score", "tokens": "tokens", "first token, ms": "first"}
    found = run_all(lambda *args: run(*args, method=method), options, "tokens", columns)
    whole = found.get("all tokens")
    if whole:
        methods = METHODS[1:] if pages else METHODS
        rows = [[name, *(spread(whole, f"{name} {share}") for share in SHARES)] for name in methods]
        print_table(["without training for it", *map(str, SHARES)], rows)
    (options.out / "figures.json").write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
