"""Precision of reading against text tokens per vision token, as in DeepSeek-OCR's paper (section 4.1), in small.

`python tests/benchmarks/ablate_compression.py [--steps N] [--seeds N ...] [--modes NAME ...] [--out FOLDER]` trains
small models from nothing to read pages of random digits, once for each mode and seed: DeepSeek-OCR's encoder with its
projector before a Qwen3. A page has as many lines as digits in a line, and fills its square, so that more text is
smaller. All modes read the same pages, each at its own resolution, in the same order, with the same number of steps
and settings; 32 x 32 pixels become one vision token. A digit is one text token. `compression.json` in the folder has
all figures; a run that was stopped continues with the next model.

Precision is 1 - d / max(n, m), where d is the edit distance (insertions, deletions and substitutions of digits) of an
answer of n digits and a page of m; the mean over held-out pages. "chance" is the precision of another page's text.
"""

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation import arguments, run_all
from PIL import Image, ImageDraw, ImageFont
from transformers import set_seed

from vlparts import reduce_tokens
from vlparts.parts.chat_templates import DEEPSEEK_OCR_CHAT_TEMPLATE
from vlparts.training.building import build
from vlparts.training.config import TrainConfig
from vlparts.training.tokenizer import train_tokenizer
from vlparts.training.train import train

MODES = {"16 tokens": 4, "36 tokens": 6, "64 tokens": 8}
"""Rows, and columns, of vision tokens."""
LINES = (4, 6, 8, 12)
"""Lines of a page, and digits of a line."""
SIDE = 480  # pixels of a page as drawn
PATCH = 8  # pixels; an image of 4 * PATCH * rows pixels has rows x rows vision tokens
PAGES_PER_STEP, EPOCHS = 32, 2
HELD_OUT = 32  # pages of each length
WIDTH = 96
TEXT = {
    "model_type": "qwen3",
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}
POSITIONS = 10  # times the initial position tables, which begin larger, as in the demo


def vision(rows: int) -> dict[str, Any]:
    """Configuration of the encoder for views of rows x rows tokens."""
    return {
        "preset": "deepencoder:deepencoder_tiny",
        "patch_size": PATCH,
        "sam_hidden_size": 32,
        "sam_intermediate_size": 64,
        "sam_num_hidden_layers": 1,
        "sam_position_size": 4 * rows,
        "sam_window_size": 4,
        "sam_global_layers": [],
        "neck_channels": 32,
        "compressor_channels": [64, WIDTH],
        "clip_hidden_size": WIDTH,
        "clip_intermediate_size": 2 * WIDTH,
        "clip_num_hidden_layers": 1,
        "clip_position_size": rows,
        "initializer_range": 0.08,
    }


@cache
def glyph(digit: str, side: int) -> Image.Image:
    """A digit in the middle of a white square."""
    image = Image.new("L", (side, side), 255)
    font = ImageFont.load_default(0.95 * side)
    ImageDraw.Draw(image).text((side / 2, side / 2), digit, 0, font, anchor="mm")
    return image


def draw(text: str, room: int) -> Image.Image:
    """A page with a text in lines of `room` digits, in a size that lets as many lines fill it."""
    image, side = Image.new("L", (SIDE, SIDE), 255), SIDE // room
    for index, digit in enumerate(text):
        image.paste(glyph(digit, side), (index % room * side, index // room * side))
    return image


def write_pages(folder: Path, name: str, lines: tuple[int, ...], count: int, seed: int) -> Path:
    """Draw pages and write a training record for each; the path of the records.

    Args:
        folder: Where to write.
        name: Of the records, and of the folder of the pages.
        lines: Numbers of lines of the pages, in turn.
        count: Number of pages.
        seed: Of all draws.
    """
    generator = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        room = lines[index % len(lines)]
        text = "".join(map(str, generator.integers(0, 10, room**2)))
        draw(text, room).save(folder / name / f"{index:05d}.png", compress_level=1)
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]
        records.append({"image": f"{name}/{index:05d}.png", "messages": turns})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def edit_distance(one: str, other: str) -> int:
    """Smallest number of insertions, deletions and substitutions of characters between two texts."""
    row = np.arange(len(other) + 1)
    codes = np.array(list(other))
    for count, character in enumerate(one, 1):
        # Without insertions first; then each place takes the cheapest insertion from the left.
        best = np.concatenate(([count], np.minimum(row[1:] + 1, row[:-1] + (codes != character))))
        row = np.minimum.accumulate(best - np.arange(len(best))) + np.arange(len(best))
    return int(row[-1])


def precision(answer: str, text: str) -> float:
    """1 minus the edit distance of the digits over the larger number of digits."""
    return 1 - edit_distance(answer, text) / max(len(answer), len(text))


def read(
    model: Any, processor: Any, path: Path, tokens: int, reduction: dict[str, Any] | None = None
) -> tuple[list[str], list[str]]:
    """Answers of a model to the pages of a file, perhaps with fewer vision tokens, and their texts."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pages = [[{"type": "image", "path": str(path.parent / record["image"])}] for record in records]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": page}] for page in pages],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    if reduction is not None:
        inputs = reduce_tokens(model.eval(), inputs, **reduction)
    with torch.inference_mode():
        generated = model.eval().generate(**inputs, max_new_tokens=tokens, do_sample=False)
    answers = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers, [record["messages"][-1]["content"] for record in records]


def train_reader(rows: int, seed: int, steps: int, out: Path, **settings: Any) -> tuple[Any, Any]:
    """Train one model to read pages with rows x rows vision tokens; the model and its processor.

    Args:
        rows: Rows, and columns, of vision tokens.
        seed: Of weights and pages.
        steps: Optimiser steps.
        out: Folder.
        **settings: Further fields of TrainConfig for the new model.
    """
    out = out.resolve()
    tokenizer = train_tokenizer([], 260)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(out / "tokenizer")
    (out / "template.jinja").write_text(DEEPSEEK_OCR_CHAT_TEMPLATE, encoding="utf-8")
    image = {"mode": None, "base_size": 4 * PATCH * rows, "do_pad": False, "do_tile": False, "patch_size": PATCH}
    parts = {"vision": vision(rows), "text": TEXT, "projector": "deepseek_ocr", "tokenizer": out / "tokenizer"}
    set_seed(seed)
    blank = TrainConfig(
        data=out, output=out, chat_template=out / "template.jinja", image_processor=image, **parts, **settings
    )
    model, processor = build(blank, [])
    model.model.vision_tower.clip.position_embedding.data *= POSITIONS
    for part in (model, processor):
        part.save_pretrained(out / "new")
    config = TrainConfig(
        data=write_pages(out / "pages", "training", LINES, steps * PAGES_PER_STEP // EPOCHS, 10 * seed),
        output=out / "model",
        model=out / "new",
        seed=seed,
        loss="sample",
        optimizer="muon",
        learning_rate=3e-3,
        max_steps=steps,
        capacity=16384,
        max_items=PAGES_PER_STEP,
        cache=True,
        logging_steps=20,
        trainer={"disable_tqdm": True, "save_strategy": "no"},
    )
    result = train(config)
    return result.model, result.processor


def run(mode: str, seed: int, steps: int, out: Path) -> dict[str, float]:
    """Train one model; its precision by the number of digits."""
    model, processor = train_reader(MODES[mode], seed, steps, out)
    figures = {}
    for lines in LINES:
        path = write_pages(out / "pages", f"held_out_{lines}", (lines,), HELD_OUT, 10 * seed + 9)
        answers, texts = read(model, processor, path, lines**2 + 8)
        figures[str(lines**2)] = statistics.mean(map(precision, answers, texts))
        figures[f"{lines**2} by chance"] = statistics.mean(map(precision, texts[1:] + texts[:1], texts))
    return figures


def main() -> None:
    """Print the table and write `compression.json`."""
    options = arguments(str(__doc__), list(MODES), "modes", "ablate-compression")
    columns = {f"{lines**2} digits": str(lines**2) for lines in LINES}
    found = run_all(run, options, "mode", columns)
    runs = [
        {
            "vision_tokens": MODES[mode] ** 2,
            "seed": seed,
            "precision": {length: figures[length] for length in columns.values()},
            "chance": {length: figures[f"{length} by chance"] for length in columns.values()},
        }
        for mode, seeds in found.items()
        for seed, figures in zip(options.seeds, seeds, strict=True)
    ]
    (options.out / "compression.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
