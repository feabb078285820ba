"""The readable reference forms, which a checkpoint carries, against the kernels of an installed vlparts.

`python tests/benchmarks/bench_references.py` prints the time of each workload with `VLPARTS_BACKENDS=none` as a
multiple of the time with kernels. `--source FOLDER` adds the library in another folder (`FOLDER/src`), to compare two
states of it. Every variant is a process of its own; they take turns, call by call, and the medians are compared.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from encoder_rivals import ours, setting
from timing import machine_line, print_table

from vlparts import WindowFreeViTConfig, WindowFreeViTModel, linear_weighted_cross_entropy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KERNELS, REFERENCES, OTHER = "kernels", "references", "other"
Run = Callable[[], object]


def with_gradients(run: Callable[[], torch.Tensor]) -> Run:
    """The forward pass with a loss and the backward pass."""
    return lambda: run().float().pow(2).mean().backward()


def window_free(images: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Four layers of the published encoder's width, without windows."""
    config = WindowFreeViTConfig(hidden_size=1280, intermediate_size=3456, num_attention_heads=16, num_hidden_layers=4)
    one = setting("ViT-S", images, dtype)
    model = WindowFreeViTModel(config).to(dtype)
    pixels = torch.randn(len(one.pixels), 3 * config.patch_size**2).to(dtype)
    return lambda: model(pixels, one.grid).last_hidden_state


def linear_loss(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Weighted cross-entropy of a linear head: 512 tokens, 896 channels, 32,768 classes."""
    hidden, head = (torch.randn(n, 896).to(dtype).requires_grad_() for n in (512, 32768))
    labels = torch.randint(0, 32768, (512,))
    return lambda: linear_weighted_cross_entropy(hidden, head, labels)


def workloads(name: str) -> Run:
    """Build a workload from its name, such as "ViT-S, inference, float32"."""
    torch.manual_seed(0)
    kind, mode, dtype_name = name.split(", ")
    dtype, images = DTYPES[dtype_name], 32 if mode == "inference" else 8
    if kind == "linear loss":
        return with_gradients(linear_loss(dtype))
    run = ours(setting(kind, images, dtype))[1] if kind.startswith("ViT") else window_free(images // 4, dtype)
    return torch.no_grad()(run) if mode == "inference" else with_gradients(run)


NAMES = [
    f"{kind}, {mode}, {dtype}"
    for kind in ("ViT-S", "window-free", "linear loss")
    for mode in (("training",) if kind == "linear loss" else ("inference", "training"))
    for dtype in DTYPES
]


def work() -> None:
    """A variant's process: build what is asked for, and time one call for each empty line."""
    run: Run = lambda: None  # noqa: E731
    for line in sys.stdin:
        if line.strip():
            run = workloads(line.strip())
        begin = time.perf_counter()
        run()
        print(time.perf_counter() - begin, flush=True)


class Variant:
    """A process with one set of kernels."""

    def __init__(self, source: Path | None, backends: str | None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "VLPARTS_BACKENDS"}
        if source is not None:
            environment["PYTHONPATH"] = str(source / "src")
        if backends is not None:
            environment["VLPARTS_BACKENDS"] = backends
        command = [sys.executable, __file__, "--work"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def call(self, name: str = "") -> float:
        """Seconds of one call, of a new workload where one is named."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(name, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def main() -> None:
    """Run all workloads and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--source", type=Path, help="folder of another state of the library")
    parser.add_argument("--only", default="", help="part of the name of a workload")
    arguments = parser.parse_args()
    if arguments.work:
        return work()
    print(machine_line())
    own = Path(__file__).parents[2]
    variants = {KERNELS: Variant(own, None), REFERENCES: Variant(own, "none")}
    if arguments.source is not None:
        variants[OTHER] = Variant(arguments.source, None)
    print_table(["workload", "seconds with kernels", *(f"{v}, times as long" for v in list(variants)[1:])], [])
    for name in (name for name in NAMES if arguments.only in name):
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for one in variants.values():
            one.call(name)
        for _ in range(arguments.repeats):
            for variant, one in variants.items():
                seconds[variant].append(one.call())
        medians = {variant: statistics.median(times) for variant, times in seconds.items()}
        figures = [medians[KERNELS], *(medians[v] / medians[KERNELS] for v in list(variants)[1:])]
        print(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
