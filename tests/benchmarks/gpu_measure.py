"""Measurements on one device: rivals in turn, peaks of memory, and the share of what the device can do.

A rival that fails has the reason in place of its figures. Everything is built under `torch.device`, so that the
functions of the other benchmarks make their tensors where they are measured; it is called outside of it.
"""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_experts import copy_speed
from timing import compare, machine_line, peak_memory

REASON = 90  # characters of the reason that a cell shows
Run = Callable[[], Any]


class Trial(NamedTuple):
    """Median seconds of a call, and MiB that it takes above what was held before it."""

    seconds: float
    mebibytes: float


class Machine(NamedTuple):
    """A device and what it reaches: operations per second of large products by type, bytes per second of copies."""

    device: torch.device
    products: dict[torch.dtype, float]
    copies: float

    def share(
        self,
        outcomes: dict[str, Trial | str],
        flops: float = 0,
        moved: float = 0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> str:
        """Share of the device's peak that the first rival reaches, in operations and in bytes, as far as given."""
        ours = next(iter(outcomes.values()))
        if isinstance(ours, str):
            return ""
        limits = {"products": flops / self.products[dtype], "copies": moved / self.copies}
        return ", ".join(f"{seconds / ours.seconds:.1%} of {name}" for name, seconds in limits.items() if seconds)


def measure_machine(device: torch.device, side: int, numbers: int) -> Machine:
    """Time products of square matrices of the given side in bfloat16 and float32, and copies of so many numbers."""
    products = {}
    with device:
        for dtype in (torch.bfloat16, torch.float32):
            left, right = torch.randn(2, side, side).to(dtype)
            products[dtype] = 2 * side**3 / compare({"product": partial(torch.mm, left, right)}, 10)["product"]
        return Machine(device, products, copy_speed(numbers))


def describe(machine: Machine) -> str:
    """The device, what it reaches in this run, versions and command."""
    cuda = machine.device.type == "cuda"
    name = f"{torch.cuda.get_device_name(machine.device)}, CUDA {torch.version.cuda}" if cuda else "no accelerator"
    rates = (f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in machine.products.items())
    return f"{name}; {', '.join(rates)}, copies {machine.copies / 1e12:.3g} TB/s; {machine_line()}"


def attempt(function: Callable[[], Any]) -> Any:
    """The result of a call, or the first line of its error, fit for a cell."""
    try:
        return function()
    except Exception as error:  # whatever a rival raises is shown in the table
        first = next(iter(str(error).splitlines()), "")
        return f"{type(error).__name__}: {first}".replace("|", "/")[:REASON]


def race(rivals: dict[str, Callable[[], Run]], repeats: int, device: torch.device) -> dict[str, Trial | str]:
    """Time rivals in turn.

    Args:
        rivals: name to function that builds a rival, under `device`, and checks it.
        repeats: rounds, of which the median counts.
        device: where they run.

    Returns:
        Name to figures, or to the reason why there are none.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    outcomes = {name: attempt(partial(_prepare, build, device)) for name, build in rivals.items()}
    runs = {name: run for name, run in outcomes.items() if not isinstance(run, str)}
    outcomes |= {name: attempt(partial(peak, run, device)) for name, run in runs.items()}
    runs = {name: run for name, run in runs.items() if not isinstance(outcomes[name], str)}
    seconds = compare(runs, repeats, warm=False) if runs else {}
    return outcomes | {name: Trial(seconds[name], outcomes[name]) for name in runs}


def _prepare(build: Callable[[], Run], device: torch.device) -> Run:
    """Build a rival and call it once."""
    with device:
        run = build()
    run()
    return run


def peak(run: Run, device: torch.device) -> float:
    """MiB that a call takes above what is held before it."""
    if device.type != "cuda":
        return peak_memory(run)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def milliseconds(one: Trial) -> float:
    """Milliseconds of a call."""
    return one.seconds * 1e3


def rows_of(
    label: str,
    outcomes: dict[str, Trial | str],
    share: str,
    unit: str = "ms",
    figure: Callable[[Trial], float] = milliseconds,
) -> Iterator[list[str]]:
    """One row with a figure of each rival, by default its time, and one with its peak of memory."""
    figures = {name: one if isinstance(one, str) else figure(one) for name, one in outcomes.items()}
    memory = {name: one if isinstance(one, str) else one.mebibytes for name, one in outcomes.items()}
    yield [f"{label}: {unit}", *cells(figures), share]
    yield [f"{label}: peak MiB", *cells(memory), ""]


def cells(figures: dict[str, float | str]) -> list[str]:
    """Ours, which comes first, and the others, each with its multiple of ours; reasons as they are."""
    ours, *others = figures.values()

    def cell(one: float | str) -> str:
        if isinstance(one, str):
            return one
        return f"{one:.4g}" if isinstance(ours, str) or not ours else f"{one:.4g} ({one / ours:.2f}x)"

    return [ours if isinstance(ours, str) else f"{ours:.4g}", *map(cell, others)]
