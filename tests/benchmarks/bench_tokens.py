"""What fewer vision tokens save: a composed model of real size with random weights, and an encoder that merges.

`python tests/benchmarks/bench_tokens.py [--repeats N] [--types NAME ...] [--methods NAME ...] [--shares X ...]` prints
the time to the first token and its peak memory for a prompt of 64 words and one image of 1,024 x 1,024 pixels (4,096
patches): ViT-B before a text model of Qwen2.5-0.5B's shape. The encoder's part of it, and that of the reduction, stand
beside it. The second table is the encoder alone with `merge_layers`; the third, the whole model with a page of text of
which redundant patches are dropped.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from bench_gpu import LARGE
from PIL import Image, ImageDraw, ImageFont
from timing import compare, machine_line, peak_memory, print_table
from transformers import Qwen2Config

from vlparts import NaViTConfig, NaViTImageProcessor, NaViTModel, VisionTokenReducer, compose
from vlparts.parts.token_reduction_types import TokenReduction
from vlparts.parts.vlm_reduction import build_reducer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
METHODS = ("average_pool", "merge_similar", "prune_by_norm", "prune_by_attention", "prune_diverse")
GRID, WORDS, IMAGE = 64, 64, 7


def vision(**changes: Any) -> NaViTConfig:
    """ViT-B without pooling."""
    return NaViTConfig.from_preset("b16", pooling="none", max_grid_size=GRID, **changes)


def model_of(dtype: torch.dtype) -> Any:
    """A composed model with random weights."""
    torch.manual_seed(0)
    return (
        compose(vision(), Qwen2Config(**LARGE.shape.text, tie_word_embeddings=True), image_token_id=IMAGE)
        .to(dtype)
        .eval()
    )


def reduce_by(model: Any, method: str | None, share: float | None = None) -> None:
    """Make a model reduce its tokens, as if it had been composed so; methods without weights only."""
    stage = None if method is None else "encoder"
    for name, value in (("token_reduction", method), ("token_ratio", share), ("token_stage", stage)):
        setattr(model.config, name, value)
    model.model.token_reducer = build_reducer(model.config)


def inputs_of(tokens: int, pixels: torch.Tensor, grids: torch.Tensor, **more: Any) -> dict[str, Any]:
    """A prompt with one image that becomes `tokens` tokens."""
    ids = torch.randint(100, 1000, (1, WORDS), generator=torch.Generator().manual_seed(0))
    ids = torch.cat((ids[:, :1], torch.full((1, tokens), IMAGE), ids[:, 1:]), 1)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grids, **more}


def first_token(
    model: Any, inputs: dict[str, Any], method: str | None = None, share: float | None = None
) -> Callable[[], Any]:
    """The call that makes the logits of the first token."""

    def run() -> Any:
        reduce_by(model, method, share)
        return model(**inputs, logits_to_keep=1, use_cache=True)

    return torch.no_grad()(run)


def whole_models(options: argparse.Namespace) -> None:
    """Print the time to the first token by method and share."""
    grids, ways = torch.tensor([[1, GRID, GRID]]), [*product(options.methods, options.shares)]
    for name in options.types:
        model, pixels = model_of(DTYPES[name]), torch.randn(GRID**2, 768).to(DTYPES[name])
        encoder, features = model.model.vision_tower, torch.randn(GRID**2, 768).to(DTYPES[name])
        runs: dict[str, Callable[[], Any]] = {
            "encoder alone": torch.no_grad()(partial(encoder, pixels, grids)),
            "all tokens": first_token(model, inputs_of(GRID**2, pixels, grids)),
        }
        tokens, reducing = dict.fromkeys(runs, GRID**2), {}
        for method, share in ways:
            key, count = f"{method} {share:g}", TokenReduction(method, share).count_tokens(GRID, GRID)
            runs[key] = first_token(model, inputs_of(count, pixels, grids), method, share)
            reducing[key] = torch.no_grad()(partial(VisionTokenReducer(method, share), features, [(GRID, GRID)]))
            tokens[key] = count
        seconds, alone = compare(runs, options.repeats), compare(reducing, options.repeats)
        rows = []
        for key, run in runs.items():
            own = f"{1e3 * alone[key]:.1f}" if key in alone else ""
            ratio = seconds["all tokens"] / seconds[key]
            rows.append([name, key, tokens[key], 1e3 * seconds[key], ratio, own, f"{peak_memory(run):.0f}"])
        print_table(["dtype", "tokens", "number", "ms", "times faster", "reduction alone, ms", "peak MiB"], rows)


def encoders(options: argparse.Namespace) -> None:
    """Print the time of an encoder that merges."""
    pixels, grids = torch.randn(GRID**2, 768), torch.tensor([[1, GRID, GRID]])
    for name in options.types:
        runs = {}
        for layers in ([], [5], [2, 5], [1, 3, 5, 7]):
            torch.manual_seed(0)
            encoder = NaViTModel(vision(merge_layers=layers)).to(DTYPES[name]).eval()
            runs[str(layers)] = torch.no_grad()(partial(encoder, pixels.to(DTYPES[name]), grids))
        seconds = compare(runs, options.repeats)
        rows = [[name, key, 1e3 * one, seconds["[]"] / one] for key, one in seconds.items()]
        print_table(["dtype", "halved after layers", "ms", "times faster"], rows)


def pages(options: argparse.Namespace) -> None:
    """Print the time to the first token of a page of text, with and without its redundant patches."""
    page = Image.new("RGB", (GRID * 16, GRID * 16), "white")
    font = ImageFont.load_default(24)
    for line in range(20):
        text = "The quick brown fox jumps over the lazy dog, again and again. " * 2
        ImageDraw.Draw(page).text((80, 80 + 40 * line), text[: 30 + 7 * line % 40], "black", font)
    for name in options.types:
        model, runs, counts = model_of(DTYPES[name]), {}, {}
        for title, changes in {"all patches": {}, "redundant ones dropped": {"drop_redundant_patches": True}}.items():
            images = NaViTImageProcessor(patch_size=16, **changes)
            found = dict(images(page, return_tensors="pt"))
            keep = found.pop("keep_index", None)
            counts[title] = len(found["pixel_values"])
            found["pixel_values"] = found["pixel_values"].to(DTYPES[name])
            more = {} if keep is None else {"image_keep_index": keep}
            runs[title] = first_token(model, inputs_of(counts[title], *found.values(), **more))
        seconds = compare(runs, options.repeats)
        rows = [[name, key, counts[key], 1e3 * one, seconds["all patches"] / one] for key, one in seconds.items()]
        print_table(["dtype", "page of text", "patches", "ms", "times faster"], rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--types", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    options = parser.parse_args()
    print(machine_line())
    whole_models(options)
    encoders(options)
    pages(options)


if __name__ == "__main__":
    main()
