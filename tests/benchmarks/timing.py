"""Timing that benchmarks share: rivals interleaved in one process, medians, one line about the machine."""

import ctypes
import gc
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers


def compare(candidates: dict[str, Callable[[], Any]], repeats: int, *, warm: bool = True) -> dict[str, float]:
    """Time every candidate `repeats` times, in turn, so that all meet the same state of the machine.

    A call's time ends when the accelerator, if there is one, has done its work.

    Args:
        candidates: name to function.
        repeats: rounds. Every round starts with another candidate.
        warm: whether each is called once beforehand; not needed if it has been called.

    Returns:
        Name to median seconds for one call.

    Raises:
        ValueError: `repeats` is below one.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    names, synchronize = list(candidates), get_synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for function in candidates.values() if warm else ():
        function()
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            synchronize()
            begin = time.perf_counter()
            candidates[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def get_synchronize() -> Callable[[], None]:
    """What waits for the accelerator; a function that does nothing where there is none."""
    return torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None


def peak_memory(function: Callable[[], Any]) -> float:
    """MiB of memory that a call takes above what the process holds before it (sampled every 2 ms)."""
    process, samples, running = psutil.Process(), [], threading.Event()
    function()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is kept for later use would hide what the call needs
    before = process.memory_info().rss
    running.set()

    def watch() -> None:
        while running.is_set():
            samples.append(process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    running.clear()
    watcher.join()
    return (max(samples) - before) / 2**20


def ratios(seconds: dict[str, float], base: str) -> dict[str, float]:
    """Times as multiples of the time of `base`."""
    return {name: value / seconds[base] for name, value in seconds.items()}


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows as a Markdown table, each as soon as it is known; floats get two decimals."""
    for row in chain((header, ["---"] * len(header)), rows):
        cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        print("| " + " | ".join(cells) + " |", flush=True)


def processor() -> str:
    """Name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_line() -> str:
    """Processor, threads, versions and the command that runs: what a reader needs to repeat a measurement."""
    command = " ".join(["python", *sys.orig_argv[1:]])
    return (
        f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {command}"
    )
