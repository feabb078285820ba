"""Errors and speed of the kernels on a card, as tables: for the owner of an Ascend NPU.

    python -m tests.npu_device.measure                  all kernels
    python -m tests.npu_device.measure rms_norm gelu    those with such names

Errors are relative, |found - exact| / (|exact| + 1e-7), against the reference in float64 on the CPU: their mean (MERE)
must stay below Ascend's threshold for the type, their maximum (MARE) below ten times that. Where results lie near zero
no arithmetic in the type stays below: the errors of the reference in the same type on the CPU stand beside.

Speed is that of the kernel and of its reference on the card, forward and backward, at sizes of published models.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vlparts  # noqa: F401 (loads the backends)
from tests.npu_device.sizes import REAL_SIZES
from vlparts.backends import backend_status
from vlparts_npu.comparison import copy_arguments, values_and_gradients
from vlparts_npu.self_check import KERNELS, Kernel

DEVICE = "npu"
THRESHOLDS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-13}
ROUNDS = 10


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Mean and maximum of the relative errors."""
    found, exact = found.double(), exact.double()
    relative = (found - exact).abs() / (exact.abs() + 1e-7)
    return (relative.mean().item(), relative.max().item()) if relative.numel() else (0.0, 0.0)


def print_errors(kernel: Kernel, case: str, arguments: tuple[Any, ...]) -> None:
    """Print a line for each result and each gradient."""
    found = values_and_gradients(kernel.run, copy_arguments(arguments, device=DEVICE))
    plain = values_and_gradients(kernel.reference, copy_arguments(arguments))
    exact = values_and_gradients(kernel.reference, copy_arguments(arguments, dtype=torch.float64))
    for place, (ours, usual, theirs) in enumerate(zip(found, plain, exact, strict=True)):
        if ours is None or usual is None or theirs is None or not ours.is_floating_point():
            continue
        (mean, largest), threshold = errors(ours, theirs), THRESHOLDS[ours.dtype]
        verdict = "within" if mean < threshold and largest < 10 * threshold else "beyond"
        kind = str(ours.dtype).removeprefix("torch.")
        numbers = " | ".join(f"{x:.1e}" for x in (mean, largest, threshold, *errors(usual, theirs)))
        print(f"| {kernel.name} | {case} | {place} | {kind} | {numbers} | {verdict} |")


def milliseconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Median time of a forward and backward pass."""
    times = []
    for _ in range(ROUNDS + 2):
        torch.accelerator.synchronize()
        begin = time.perf_counter()
        found = function(*arguments)
        outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        torch.accelerator.synchronize()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times[2:])


def print_speed(kernel: Kernel, arguments: tuple[Any, ...]) -> None:
    """Print a line with the times of a kernel and its reference."""
    reason = kernel.supports(*arguments)
    if reason is not None:
        print(f"| {kernel.name} | not supported: {reason} | | | |")
        return
    ours, theirs = (milliseconds(run, copy_arguments(arguments, DEVICE)) for run in (kernel.run, kernel.reference))
    tokens = next(x for x in arguments if isinstance(x, Tensor)).shape[0]  # rows
    print(f"| {kernel.name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} | {tokens / ours / 1000:.2f} |")


def main(wanted: list[str]) -> None:
    """Print both tables."""
    status = backend_status().get("npu")
    if status is None or not status.active:
        raise SystemExit(f"the backend for the NPU is not active: {status.reason if status else 'not installed'}")
    kernels = [one for one in KERNELS.values() if not wanted or any(name in one.name for name in wanted)]
    print(f"torch {torch.__version__}, {torch.npu.get_device_name()}\n")
    print("| kernel | case | tensor | type | MERE | MARE | threshold | PyTorch's MERE | PyTorch's MARE | verdict |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kernel in kernels:
        for case, arguments in enumerate(kernel.make_inputs()):
            print_errors(kernel, f"self-check {case}", arguments)
        print_errors(kernel, "real size", REAL_SIZES[kernel.name]())
    print("\n| kernel | ms | ms of the reference | ratio | million tokens/s |\n|---|---|---|---|---|")
    for kernel in kernels:
        torch.npu.empty_cache()
        print_speed(kernel, REAL_SIZES[kernel.name]())


if __name__ == "__main__":
    main(sys.argv[1:])
