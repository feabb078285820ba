"""Errors and speed of the kernels on an Ascend NPU, as tables.

    python -m tests.npu_device.measure                  all kernels
    python -m tests.npu_device.measure rms_norm gelu    kernels whose names contain one of these

Errors are relative, |found - exact| / (|exact| + 1e-7), where exact is the reference in float64 on the CPU. Ascend
requires a mean (MERE) below the threshold of the dtype, and a maximum (MARE) below ten times the threshold. Results
near zero exceed both in any arithmetic of the dtype, so the errors of the reference in the same dtype on the CPU are
printed too.

Speed is that of the kernel and of its reference on the device, forward and backward, at the sizes of published models
in bfloat16.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vlparts.registration  # noqa: F401 (loads the backends)
from vlparts import MoGEConfig
from vlparts.backends import backend_status
from vlparts.parts.modeling_moge import MoGEExperts
from vlparts_npu.comparison import copy_arguments, values_and_gradients
from vlparts_npu.experts_layout import arrange_expert_weights
from vlparts_npu.self_check import KERNELS, Kernel

DEVICE = "npu"
THRESHOLDS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-13}
ROUNDS = 10

# The vision encoder of openPangu-VL-7B: 26 layers of width 1,280 with 16 heads of 80 channels.
TOKENS, WIDTH, HEADS, CHANNELS, INNER = 4784, 1280, 16, 80, 3456
SEGMENTS = 8
# 16 of the 64 experts of a layer of Pangu Pro MoE.
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_WIDTH, EXPERT_INNER, EXPERT_TOKENS = 16, 2, 5120, 1344, 512


def random(*shape: int) -> Tensor:
    """Return normally distributed numbers that require gradients."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).bfloat16().requires_grad_()


def attention() -> tuple[Any, ...]:
    """Arguments of attention within the segments of a pack."""
    cu_seqlens = torch.linspace(0, TOKENS, SEGMENTS + 1).int()
    longest, host = int(cu_seqlens.diff().max()), cu_seqlens.tolist()
    tensors = [random(TOKENS, HEADS, CHANNELS) for _ in range(3)]
    return *tensors, cu_seqlens, cu_seqlens, longest, longest, None, False, host, host


def cos_sin() -> tuple[Tensor, Tensor]:
    """Return cosines and sines for rotary position embedding."""
    angles = torch.linspace(0, 99, TOKENS)[:, None] * torch.linspace(1, 0, CHANNELS // 2)
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def rotary_pair() -> tuple[Any, ...]:
    """Arguments of the rotation of queries and keys that are views of one projection."""
    query, key, _ = random(TOKENS, 3, HEADS, CHANNELS).detach().unbind(1)
    return query.requires_grad_(), key.requires_grad_(), *cos_sin()


def experts() -> tuple[Any, ...]:
    """Arguments of routed experts, with random routing."""
    config = MoGEConfig(
        num_experts=EXPERTS,
        num_expert_groups=EXPERTS_PER_TOKEN,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        hidden_size=EXPERT_WIDTH,
        moe_intermediate_size=EXPERT_INNER,
    )
    module = MoGEExperts(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    arrange_expert_weights(module.bfloat16())
    scores = torch.rand(EXPERT_TOKENS, EXPERTS, generator=generator)
    weights, index = scores.topk(EXPERTS_PER_TOKEN)
    return module, random(EXPERT_TOKENS, EXPERT_WIDTH), index, weights.bfloat16().requires_grad_()


REAL_SIZES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "npu_grouped": experts,
    "vlparts::gelu": lambda: (random(TOKENS, INNER),),
    "vlparts::rms_norm": lambda: (random(TOKENS, WIDTH), random(WIDTH), 1e-6),
    "vlparts::rotary": lambda: (random(TOKENS, HEADS, CHANNELS), *cos_sin()),
    "vlparts::rotary_pair": rotary_pair,
    "vlparts::swiglu": lambda: (random(TOKENS, 2 * INNER),),
    "vlparts::varlen_attention": attention,
}


def relative_errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the mean and the maximum of the relative errors."""
    found, exact = found.double(), exact.double()
    relative = (found - exact).abs() / (exact.abs() + 1e-7)
    return (relative.mean().item(), relative.max().item()) if relative.numel() else (0.0, 0.0)


def print_errors(kernel: Kernel, case: str, arguments: tuple[Any, ...]) -> None:
    """Print a row per output and gradient."""
    found = values_and_gradients(kernel.run, copy_arguments(arguments, device=DEVICE))
    plain = values_and_gradients(kernel.reference, copy_arguments(arguments))
    exact = values_and_gradients(kernel.reference, copy_arguments(arguments, dtype=torch.float64))
    for index, (ours, usual, theirs) in enumerate(zip(found, plain, exact, strict=True)):
        if ours is None or usual is None or theirs is None or not ours.is_floating_point():
            continue
        (mean, largest), threshold = relative_errors(ours, theirs), THRESHOLDS[ours.dtype]
        verdict = "within" if mean < threshold and largest < 10 * threshold else "beyond"
        dtype = str(ours.dtype).removeprefix("torch.")
        numbers = " | ".join(f"{x:.1e}" for x in (mean, largest, threshold, *relative_errors(usual, theirs)))
        print(f"| {kernel.name} | {case} | {index} | {dtype} | {numbers} | {verdict} |")


def milliseconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Return the median time of a forward and backward pass."""
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
    """Print a row with the times of a kernel and its reference."""
    reason = kernel.supports(*arguments)
    if reason is not None:
        print(f"| {kernel.name} | not supported: {reason} | | | |")
        return
    ours, theirs = (milliseconds(run, copy_arguments(arguments, DEVICE)) for run in (kernel.run, kernel.reference))
    tokens = next(x for x in arguments if isinstance(x, Tensor)).shape[0]
    print(f"| {kernel.name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} | {tokens / ours / 1000:.2f} |")


def main(names: list[str]) -> None:
    """Print both tables, for the kernels whose names contain one of `names`, or for all."""
    status = backend_status().get("npu")
    if status is None or not status.active:
        raise SystemExit(f"The backend `npu` is not active: {status.reason if status else 'not installed'}")
    kernels = [one for one in KERNELS.values() if not names or any(name in one.name for name in names)]
    print(f"torch {torch.__version__}, {torch.npu.get_device_name()}\n")
    print("| kernel | case | tensor | dtype | MERE | MARE | threshold | PyTorch's MERE | PyTorch's MARE | verdict |")
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
