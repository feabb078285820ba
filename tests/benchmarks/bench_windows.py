"""Full against windowed attention in vision encoders, and our hybrid against the native tower.

`python tests/benchmarks/bench_windows.py` prints the time of one image through whole encoders of about 615 million
parameters, as multiples of the window-free one's, at several resolutions. It times stacks of two layers at full width
and multiplies by the number of layers of each kind; the patch embedding is left out. `--native` times ours against the
native Qwen2.5-VL tower at equal shape and weights. `--count` prints operations and bytes moved by permutations.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from timing import compare, machine_line, peak_memory, print_table, ratios
from torch import Tensor
from window_rivals import RIVALS, Depth, copy_weights, counting, in_reading_order, native, ours_as_native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rows and columns in patches of 14 pixels, as the published image processor makes them.
SIZES = {
    "224 x 224": (16, 16),
    "448 x 448": (32, 32),
    "672 x 672": (48, 48),
    "720p": (52, 92),
    "1080p": (78, 138),
}
STACK = 2


def pixels_of(grid: Tensor, dtype: torch.dtype) -> Tensor:
    """Random patches of two frames, which every rival takes."""
    return torch.randn(int(grid.prod(-1).sum()), 1176).to(dtype)


def mixed(images: int) -> Tensor:
    """Images with sides of 64 to 512 pixels and aspect ratios of 1:4 to 4:1, in whole 2 x 2 blocks of patches."""
    chance = np.random.default_rng(0)
    sides, aspects = chance.uniform(64, 512, images), np.exp(chance.uniform(-np.log(2), np.log(2), images))
    rows, columns = (np.maximum(1, np.rint(x / 28)) * 2 for x in (sides * aspects, sides / aspects))
    return torch.tensor(np.stack([np.ones(images), rows, columns], 1), dtype=torch.int64)


def run_of(model: torch.nn.Module, pixels: Tensor, grid: Tensor) -> Callable[[], Tensor]:
    """A forward pass without gradients."""
    return torch.no_grad()(lambda: model(pixels, grid).last_hidden_state)


def structures(arguments: argparse.Namespace) -> None:
    """Whole encoders of equal parameters at several resolutions."""
    for name in arguments.types:
        dtype = DTYPES[name]
        stacks = {
            (rival, kind): one.build(STACK, [] if kind == "windowed" else [*range(STACK)]).to(dtype)
            for rival, one in RIVALS.items()
            for kind in Depth._fields
            if getattr(one.depth, kind) and rival in arguments.rivals
        }
        for size in arguments.sizes:
            grid = torch.tensor([[1, *SIZES[size]]])
            pixels = pixels_of(grid, dtype)
            times = compare({key: run_of(model, pixels, grid) for key, model in stacks.items()}, arguments.repeats)
            seconds = {
                rival: sum(
                    times.get((rival, kind), 0.0) * getattr(RIVALS[rival].depth, kind) for kind in Depth._fields
                )
                / STACK
                for rival in arguments.rivals
            }
            label = f"{size}, {len(pixels)} patches, {name}"
            first = arguments.rivals[0]
            print_table(
                ["setting", f"seconds of {first}", *seconds],
                [[label, seconds[first], *ratios(seconds, first).values()]],
            )


def against_native(arguments: argparse.Namespace) -> None:
    """Ours and the native tower, equal in shape and weights: three layers with windows and one without."""
    for name in arguments.types:
        dtype = DTYPES[name]
        theirs, ours = native(4, [3]).to(dtype), ours_as_native(4, [3]).to(dtype)
        copy_weights(theirs, ours)
        batches = {"one 720p image": torch.tensor([[1, 52, 92]]), "32 mixed images": mixed(32)}
        for label, grid in batches.items():
            pixels = pixels_of(grid, dtype)
            runs = {"native": run_of(theirs, pixels, grid), "ours": run_of(ours, pixels, grid)}
            expected = ours.norm(in_reading_order(runs["native"](), grid))
            tolerance = 1e-3 if dtype == torch.float32 else 0.2
            torch.testing.assert_close(runs["ours"](), expected, atol=tolerance, rtol=tolerance)
            seconds = compare(runs, arguments.repeats)
            memory = {rival: peak_memory(run) for rival, run in runs.items()}
            print_table(
                ["setting", "seconds of ours", "native / ours", "peak memory, MiB: native", "ours"],
                [
                    [
                        f"{label}, {len(pixels)} patches, {name}",
                        seconds["ours"],
                        seconds["native"] / seconds["ours"],
                        f"{memory['native']:.0f}",
                        f"{memory['ours']:.0f}",
                    ]
                ],
            )


def counts(arguments: argparse.Namespace) -> None:
    """Operations of one layer of each kind, and what permutations move in the whole encoder."""
    table = []
    for size in arguments.sizes:
        grid = torch.tensor([[1, *SIZES[size]]])
        for rival, (depth, build) in RIVALS.items():
            pixels = pixels_of(grid, torch.bfloat16)
            if build is not native:  # which takes no raw pixels
                pixels = torch.zeros(len(pixels), 588, dtype=torch.uint8)
            found, permuted = {}, 0
            for kind in Depth._fields:
                launches = []
                for layers in (1, 2) if getattr(depth, kind) else ():
                    model = build(layers, [] if kind == "windowed" else [*range(layers)]).bfloat16()
                    with counting() as counter:
                        model(pixels, grid)
                    launches.append(counter.launches)
                    permuted = max(permuted, counter.permuted)
                found[kind] = launches[1] - launches[0] if launches else 0
            whole = sum(found[kind] * getattr(depth, kind) for kind in Depth._fields)
            table.append([size, rival, found["windowed"] or "-", found["full"], whole, permuted / 2**20])
    header = ["size", "encoder", "a layer with windows", "one without", "all layers", "permutations, MiB"]
    print_table(header, table)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--types", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), metavar="SIZE")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS), metavar="RIVAL")
    parser.add_argument("--native", action="store_true", help="only ours against the native tower")
    parser.add_argument("--count", action="store_true", help="only operations and bytes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(machine_line())
    chosen = against_native if arguments.native else counts if arguments.count else structures
    chosen(arguments)


if __name__ == "__main__":
    main()
