"""Qwen2-VL's vision encoder, which is also POINTS1.5's: ours against the native tower, at equal weights.

`python tests/benchmarks/bench_qwen2_vl.py` prints times of a few layers at full width (1,280 channels, 16 heads),
without mergers, in inference and in training; `--memory` also peaks of memory. Before anything is timed, the results
of two images are compared.
"""

import argparse
from collections.abc import Callable
from itertools import product

import torch
from bench_windows import DTYPES, mixed, pixels_of
from timing import compare, machine_line, peak_memory, print_table
from torch import Tensor, nn
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from vlparts import WindowFreeViTConfig, WindowFreeViTModel
from vlparts.checkpoints.qwen_vl.names import get_slices

Run = Callable[[], Tensor]


def encoders(layers: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The native tower and ours, with the same weights."""
    native = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(depth=layers)).to(dtype)
    native.merger = nn.Identity()
    ours = WindowFreeViTModel(WindowFreeViTConfig.from_preset("qwen2_vl_vit", num_hidden_layers=layers)).to(dtype)
    weights = native.state_dict()
    with torch.no_grad():
        for name, part in get_slices(ours, "qwen2_vl", prefix="").items():
            part.of(ours.state_dict()).copy_(weights[name])
    return {"native": native, "ours": ours}


def run_of(model: nn.Module, pixels: Tensor, grid: Tensor) -> Run:
    """A forward pass."""
    return lambda: model(pixels, grid).last_hidden_state


@torch.no_grad()
def check(built: dict[str, nn.Module], grid: Tensor, pixels: Tensor) -> None:
    """Both give the same features."""
    part = pixels[: int(grid.prod(-1).sum())]
    tolerance = 1e-4 if pixels.dtype == torch.float32 else 0.1
    found, expected = (run_of(built[rival], part, grid)() for rival in ("ours", "native"))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def with_gradients(run: Run) -> Callable[[], None]:
    """The forward pass with a loss and the backward pass."""
    return lambda: run().float().pow(2).mean().backward()


def main() -> None:
    """Print a row for each pass and type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of the 32")
    parser.add_argument("--images", type=int, default=32, help="images of a batch in inference")
    parser.add_argument("--training-images", type=int, default=8, help="images of a batch in training")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--memory", action="store_true", help="also the peaks of memory")
    parser.add_argument("--types", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--passes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(machine_line())
    for kind, name in product(arguments.passes, arguments.types):
        grid = mixed(arguments.images if kind == "inference" else arguments.training_images)
        pixels = pixels_of(grid, DTYPES[name])
        built = encoders(arguments.layers, DTYPES[name])
        check(built, grid[:2], pixels)
        runs = {rival: run_of(model, pixels, grid) for rival, model in built.items()}
        wrap = torch.no_grad() if kind == "inference" else with_gradients
        timed = {rival: wrap(run) for rival, run in runs.items()}
        seconds = compare(timed, arguments.repeats)
        label = f"{kind}, {len(grid)} images, {len(pixels)} patches, {name}"
        figures = {"seconds of ours": seconds["ours"], "native / ours": seconds["native"] / seconds["ours"]}
        if arguments.memory:
            figures |= {f"peak memory of {rival}, MiB": f"{peak_memory(run):.0f}" for rival, run in timed.items()}
        print_table(["setting", *figures], [[label, *figures.values()]])


if __name__ == "__main__":
    main()
