"""Packed encoding of images of mixed sizes, against other encoders of equal width and depth.

`python tests/benchmarks/bench_encoders.py` prints, for each width, type and pass, the time of each rival as a multiple
of ours, the share that the matrix products alone would take, and the peak of memory. Before anything is timed, NaViT
is checked to give every image what it gives alone. `--growth` prints how the cost grows with the number of images.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import product

import torch
from encoder_rivals import ONE_BY_ONE, OURS, PRESETS, RIVALS, Run, Setting, image_by_image, ours, setting
from timing import compare, machine_line, peak_memory, print_table, ratios
from torch.nn import functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS_AT_A_TIME = 4096  # for the matrix products alone: small enough that memory is used again


def check(candidates: dict[str, Run], dtype: torch.dtype) -> None:
    """Every image comes out of the packed encoder as it does alone, and every rival returns every patch."""
    with torch.no_grad():
        outputs = {name: run() for name, run in candidates.items()}
    expected = outputs[ONE_BY_ONE]
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(outputs[OURS], expected, atol=tolerance, rtol=tolerance)
    for name, output in outputs.items():
        if output.shape[0] < expected.shape[0]:
            raise RuntimeError(f"{name} returns {output.shape[0]} patches, expected {expected.shape[0]}")


def products_alone(one: Setting, training: bool) -> Callable[[], None]:
    """The matrix products of one layer, by plain PyTorch, on contiguous inputs: nothing else."""
    dtype, config = one.pixels.dtype, one.config
    width, mlp, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    weights = [
        torch.randn(o, i, dtype=dtype) for o, i in ((3 * width, width), (width, width), (mlp, width), (width, mlp))
    ]
    rows = [len(part) for part in one.pixels.split(TOKENS_AT_A_TIME)]
    inputs = {(n, i): torch.randn(n, i, dtype=dtype) for n in {*rows} for i in (width, mlp)}
    states = {n: torch.randn(heads, n, width // heads, dtype=dtype) for n in {*one.lengths}}
    repeats = 3 if training else 1  # the backward pass has two products for each of the forward pass

    def run() -> None:
        for _ in range(repeats):
            for weight, n in product(weights, rows):
                F.linear(inputs[n, weight.shape[1]], weight)
            for n in one.lengths:
                torch.bmm(torch.bmm(states[n], states[n].transpose(1, 2)), states[n])

    return torch.no_grad()(run)


def wrapped(candidates: dict[str, Run], training: bool) -> dict[str, Callable[[], object]]:
    """The forward pass alone, or with a loss and the backward pass."""

    def with_gradients(run: Run) -> Callable[[], None]:
        return lambda: run().float().pow(2).mean().backward()

    return {name: with_gradients(run) if training else torch.no_grad()(run) for name, run in candidates.items()}


def rows(arguments: argparse.Namespace) -> Iterator[None]:
    """Measure one setting after the other, and print each as soon as it is known."""
    passes = {"inference": arguments.images, "training": arguments.training_images}
    for size, (kind, images), name in product(arguments.sizes, passes.items(), arguments.types):
        if kind not in arguments.passes:
            continue
        one, training = setting(size, images, DTYPES[name]), kind == "training"
        built = {rival: make(one) for rival, make in RIVALS.items() if rival in (OURS, *arguments.rivals)}
        candidates = {rival: run for rival, (_, run) in built.items()}
        candidates[ONE_BY_ONE] = image_by_image(built[OURS][0], one)
        check(candidates, DTYPES[name])
        timed = wrapped(candidates, training)
        seconds = compare({**timed, "products": products_alone(one, training)}, arguments.repeats)
        share = one.config.num_hidden_layers * seconds.pop("products") / seconds[OURS]
        label = f"{size}, {kind}, {images} images, {len(one.pixels)} patches, {name}"
        header = ["setting", "images/s of ours", "products alone", *seconds]
        table = [[label, images / seconds[OURS], share, *ratios(seconds, OURS).values()]]
        if not training:
            memory = {rival: peak_memory(run) for rival, run in timed.items()}
            table.append(["peak memory, MiB", "", "", *(f"{memory[rival]:.0f}" for rival in seconds)])
        print_table(header, table)
        yield


def growth(arguments: argparse.Namespace) -> None:
    """Time for each patch as the batch grows, as a multiple of that of the smallest batch."""
    for size, name in product(arguments.sizes, arguments.types):
        runs = {}
        for images in (32, 128, 512):
            one = setting(size, images, DTYPES[name])
            runs[images, len(one.pixels)] = torch.no_grad()(ours(one)[1])
        seconds = compare(runs, arguments.repeats)
        cost = {key: value / key[1] for key, value in seconds.items()}
        table = [[f"{size}, {name}", *(value / next(iter(cost.values())) for value in cost.values())]]
        print_table(["time for each patch", *(f"{images} images, {n} patches" for images, n in cost)], table)


def main() -> None:
    """Run all settings and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32, help="images of a batch in inference")
    parser.add_argument("--training-images", type=int, default=8, help="images of a batch in training")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--sizes", nargs="+", default=["ViT-S", "ViT-B"], choices=list(PRESETS))
    parser.add_argument("--types", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--passes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS), metavar="RIVAL")
    parser.add_argument("--growth", action="store_true", help="only how the cost grows with the number of images")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(machine_line())
    if arguments.growth:
        growth(arguments)
    else:
        for _ in rows(arguments):
            pass


if __name__ == "__main__":
    main()
