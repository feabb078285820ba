"""DeepSeek-OCR's encoder: ours against transformers' `UnlimitedOcrVisionModel` with the same weights, at full size.

`python tests/benchmarks/bench_deepencoder.py` prints the seconds of ours, and the times of the native model as
multiples of it, for views of the published sizes. `--train` does the same for forward and backward passes. `--memory`
prints peak memory beyond the model, of one process for each model. `--profile` prints the operations that take most
time.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import compare, machine_line, peak_memory, print_table
from torch import Tensor, nn
from torch.profiler import profile

sys.path.append(str(Path(__file__).parents[2]))

from tests.parity.unlimited_ocr import native_of, ours_of

from vlparts import DeepEncoderConfig, DeepEncoderModel
from vlparts.parts.image_pixels import patchify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Batches of square views of one size: (views, side in pixels).
INPUTS = {
    "512": [(1, 512)],
    "640": [(1, 640)],
    "1024": [(1, 1024)],
    "1280": [(1, 1280)],
    "gundam": [(6, 640), (1, 1024)],
    "4 x 640": [(4, 640)],
}
OURS, CHECKPOINTED = "ours", "ours, checkpointed"
NATIVE, EAGER, NATIVE_CHECKPOINTED = "native", "native, eager", "native, checkpointed"
INFERENCE, TRAINING = (OURS, NATIVE, EAGER), (OURS, CHECKPOINTED, NATIVE, NATIVE_CHECKPOINTED)
Run = Callable[[], Tensor]


def models(names: list[str], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Models with the same weights."""
    config = DeepEncoderConfig.from_preset("deepseek_ocr")
    with torch.no_grad():
        native = native_of(config).to(dtype)
    found: dict[str, nn.Module] = {}
    for name in names:
        if name.startswith(OURS):
            found[name] = ours_of(native, config)
            continue
        settings, attention = copy.deepcopy(native.config), "eager" if name == EAGER else "sdpa"
        found[name] = type(native)._from_config(settings, attn_implementation=attention).to(dtype).eval()
        found[name].load_state_dict(native.state_dict())
    for name in {CHECKPOINTED, NATIVE_CHECKPOINTED} & found.keys():
        found[name].train().gradient_checkpointing_enable()  # neither has dropout
    return found


def views_of(name: str) -> list[Tensor]:
    """Random normalized pixels `(views, 3, side, side)` of each size."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, 3, side, side, generator=generator) * 2 - 1 for count, side in INPUTS[name]]


def run_of(model: nn.Module, views: list[Tensor], dtype: torch.dtype) -> Run:
    """A forward pass; tokens of all views `(T, D)`. The native model is called once for each size."""
    if not isinstance(model, DeepEncoderModel):
        inputs = [batch.to(dtype) for batch in views]
        return lambda: torch.cat([model(batch).last_hidden_state.flatten(0, 1) for batch in inputs])
    packed = [patchify(view[None].numpy(), 16) for batch in views for view in batch]
    pixels = torch.cat([torch.from_numpy(patches) for patches, _ in packed]).to(dtype)
    grid = torch.tensor([one for _, one in packed])
    return lambda: model(pixels, grid).last_hidden_state


def step_of(model: nn.Module, run: Run) -> Run:
    """Forward and backward pass."""

    def step() -> Tensor:
        model.zero_grad()
        tokens = run()
        tokens.float().square().mean().backward()
        return tokens.detach()

    return step


def runs_of(found: dict[str, nn.Module], size: str, dtype: torch.dtype, train: bool) -> dict[str, Run]:
    """What is timed of each model; equal results are checked first."""
    views = views_of(size)
    runs = {name: run_of(model, views, dtype) for name, model in found.items()}
    if train:
        return {name: step_of(found[name], run) for name, run in runs.items()}
    return {name: torch.no_grad()(run) for name, run in runs.items()}


def check(runs: dict[str, Run], dtype: torch.dtype) -> None:
    """All models give the same tokens, to rounding."""
    results = {name: run().float() for name, run in runs.items()}
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for name, result in results.items():
        distance = (result - results[OURS]).norm() / results[OURS].norm()
        if not distance < tolerance:
            raise ValueError(f"{name!r} differs from {OURS!r} by {distance:.1e}")


def times(arguments: argparse.Namespace, names: list[str]) -> None:
    """Seconds of ours and ratios of the others."""
    table = []
    for kind in arguments.types:
        found = models(names, DTYPES[kind])
        for size in arguments.sizes:
            runs = runs_of(found, size, DTYPES[kind], arguments.train)
            check(runs, DTYPES[kind])
            if arguments.profile:
                for run in runs.values():
                    with profile() as profiler:
                        run()
                    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16))
                continue
            seconds = compare(runs, arguments.repeats, warm=False)
            table.append([f"{size}, {kind}", seconds[OURS], *(seconds[name] / seconds[OURS] for name in names[1:])])
            print(f"{table[-1][0]}: {seconds}", file=sys.stderr, flush=True)
    print_table(["views, dtype", "seconds of ours", *(f"{name} / ours" for name in names[1:])], table)


def memory(arguments: argparse.Namespace, names: list[str]) -> None:
    """Peak memory beyond the model, each measured in a process of its own."""
    table = []
    for kind in arguments.types:
        for size in arguments.sizes:
            command = [sys.executable, __file__, "--types", kind, "--sizes", size, *["--train"] * arguments.train]
            peaks = [
                float(subprocess.run([*command, "--peak", name], check=True, stdout=subprocess.PIPE, text=True).stdout)
                for name in names
            ]
            table.append(
                [f"{size}, {kind}", *(f"{peak:.0f}" for peak in peaks), peaks[0] / peaks[names.index(NATIVE)]]
            )
    print_table(["views, dtype", *(f"{name}, MiB" for name in names), "ours / native"], table)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--types", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--sizes", nargs="+", default=["512", "640"], choices=list(INPUTS), metavar="SIZE")
    parser.add_argument("--rivals", nargs="+", choices=INFERENCE + TRAINING, metavar="RIVAL", help="besides ours")
    parser.add_argument("--train", action="store_true", help="forward and backward passes")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times")
    parser.add_argument("--profile", action="store_true", help="operations instead of times")
    parser.add_argument("--peak", choices=INFERENCE + TRAINING, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        kind, name = DTYPES[arguments.types[0]], arguments.peak
        runs = runs_of(models([name], kind), arguments.sizes[0], kind, arguments.train)
        print(peak_memory(runs[name]))
        return
    print(machine_line())
    rivals = arguments.rivals or (TRAINING if arguments.train else INFERENCE)
    names = [OURS, *(name for name in rivals if name != OURS)]
    (memory if arguments.memory else times)(arguments, names)


if __name__ == "__main__":
    main()
