"""Packed encoding of images of mixed sizes, against native towers of equal width and depth.

`python tests/benchmarks/bench_encoders.py [--quick] [--repeats N]` prints, for float32 and bfloat16, inference and
training, the time of each rival as a multiple of ours. Before anything is timed, NaViT is checked to give every image
what it gives alone.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from timing import compare, machine_line, print_table, ratios
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from vlparts import NaViTConfig, NaViTModel

PATCH = 16
WIDTH, DEPTH, HEADS, MLP = 384, 12, 6, 1536


def grids(images: int) -> Tensor:
    """Grids of images with sides of 64 to 512 pixels and aspect ratios of up to 1:4, in whole 2 x 2 blocks."""
    chance = np.random.default_rng(0)
    sides, aspects = chance.uniform(64, 512, images), np.exp(chance.uniform(-np.log(2), np.log(2), images))
    rows = np.maximum(1, np.rint(sides * aspects / (2 * PATCH))) * 2
    columns = np.maximum(1, np.rint(sides / aspects / (2 * PATCH))) * 2
    return torch.tensor(np.stack([np.ones(images), rows, columns], 1), dtype=torch.int64)


def packed(model: NaViTModel, grid: Tensor, pixels: Tensor) -> Callable[[], Tensor]:
    """Ours: all patches in one sequence."""
    return lambda: model(pixels, grid).last_hidden_state


def one_by_one(model: NaViTModel, grid: Tensor, pixels: Tensor) -> Callable[[], Tensor]:
    """Ours, image by image: the simplest way without packing."""
    parts = pixels.split(grid.prod(-1).tolist())
    return lambda: torch.cat([model(part, grid[i : i + 1]).last_hidden_state for i, part in enumerate(parts)])


def padded_siglip2(grid: Tensor, pixels: Tensor, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Native Siglip2: every image padded to the largest."""
    lengths = grid.prod(-1).tolist()
    config = Siglip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_patches=256,
        patch_size=PATCH,
        vision_use_head=False,
    )
    model = Siglip2VisionModel(config).to(dtype)
    rows = nn.utils.rnn.pad_sequence(pixels.split(lengths), batch_first=True)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return model, lambda: model(rows, mask, grid[:, 1:]).last_hidden_state[mask.bool()]


def qwen_tower(
    make: type[nn.Module], config: object, grid: Tensor, pixels: Tensor, dtype: torch.dtype
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A native tower of the Qwen-VL family: packed, one attention call for each image (or window)."""
    model = make._from_config(config, attn_implementation="sdpa").to(dtype)
    return model, lambda: model(pixels, grid_thw=grid).last_hidden_state


def rivals(
    grid: Tensor, pixels: Tensor, dtype: torch.dtype
) -> tuple[list[nn.Module], dict[str, Callable[[], Tensor]]]:
    """All candidates, ours first."""
    ours = NaViTModel(NaViTConfig.from_preset("small", pooling="none")).to(dtype)
    shared = {"depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH, "temporal_patch_size": 1}
    qwen2 = Qwen2VLConfig().vision_config.__class__(
        embed_dim=WIDTH, hidden_size=WIDTH, mlp_ratio=MLP // WIDTH, **shared
    )
    qwen25 = Qwen2_5_VLVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP * 2 // 3,  # three matrices in place of two: equal numbers of parameters
        out_hidden_size=WIDTH,
        window_size=8 * PATCH,
        fullatt_block_indexes=[2, 5, 8, 11],
        **shared,
    )
    siglip2, run_siglip2 = padded_siglip2(grid, pixels, dtype)
    tower2, run2 = qwen_tower(Qwen2VisionTransformerPretrainedModel, qwen2, grid, pixels, dtype)
    tower25, run25 = qwen_tower(Qwen2_5_VisionTransformerPretrainedModel, qwen25, grid, pixels, dtype)
    candidates = {
        "NaViT, packed": packed(ours, grid, pixels),
        "NaViT, image by image": one_by_one(ours, grid, pixels),
        "native Qwen2.5-VL tower (windows)": run25,
        "native Qwen2-VL tower": run2,
        "native Siglip2, padded": run_siglip2,
    }
    return [ours, siglip2, tower2, tower25], candidates


def check(candidates: dict[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Every image comes out of the packed encoder as it does alone, and every rival returns every patch."""
    with torch.no_grad():
        outputs = {name: run() for name, run in candidates.items()}
    expected = outputs["NaViT, image by image"]
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(outputs["NaViT, packed"], expected, atol=tolerance, rtol=tolerance)
    for name, output in outputs.items():
        if output.shape[0] != expected.shape[0]:
            raise RuntimeError(f"{name} returns {output.shape[0]} patches, expected {expected.shape[0]}")


def without_gradients(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The forward pass alone."""
    return torch.no_grad()(run)


def with_gradients(run: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward pass."""
    return lambda: run().float().pow(2).mean().backward()


def main() -> None:
    """Run all settings and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(machine_line())
    settings = [(8, "inference"), (4, "training")] if arguments.quick else [(32, "inference"), (8, "training")]
    for images, kind in settings:
        grid = grids(images)
        for dtype in (torch.float32, torch.bfloat16):
            pixels = torch.randn(int(grid.prod(-1).sum()), 3 * PATCH**2, dtype=dtype)
            models, candidates = rivals(grid, pixels, dtype)
            check(candidates, dtype)
            wrap = without_gradients if kind == "inference" else with_gradients
            seconds = compare({name: wrap(run) for name, run in candidates.items()}, arguments.repeats)
            label = f"{kind}, {images} images, {len(pixels)} patches, {str(dtype).removeprefix('torch.')}"
            row = [label, images / seconds["NaViT, packed"], *ratios(seconds, "NaViT, packed").values()]
            print_table(["setting", "images/s of ours", *seconds], [row])
            del models, candidates


if __name__ == "__main__":
    main()
