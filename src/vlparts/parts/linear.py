"""Linear layers whose kernel PyTorch's dispatcher picks: the operation `vlparts::linear`.

It is `torch.nn.functional.linear` everywhere but in float32 on CPUs where that is slow. PyTorch multiplies float32
matrices by MKL, which does not use AVX-512 on processors of other makers than Intel; oneDNN, which PyTorch has too,
does. On 2 cores of an AMD Zen 5, oneDNN multiplies at 430 GFLOP/s and MKL at 190; with the backward pass, 350 and 188.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Products smaller than this stay with MKL: oneDNN first brings the weight into an order of its own.
LEAST_MULTIPLICATIONS = 2**21


class Linear(nn.Linear):
    """`torch.nn.Linear` by the operation `vlparts::linear`; nothing else differs.

    While compiling it is `torch.nn.functional.linear` itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        if torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        return torch.ops.vlparts.linear(input, self.weight, self.bias)


def linear_cpu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The CPU kernel: oneDNN where it is faster, else `torch.nn.functional.linear`; the arguments are the same."""
    if not onednn_applies(input, weight, bias):
        return F.linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    tensors = (rows, weight) if bias is None else (rows, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        output = _OneDnnLinear.apply(rows, weight, bias)
    else:
        output = _multiply(rows, weight, bias)
    return output.view(*input.shape[:-1], weight.shape[0])


def onednn_applies(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN takes a product and is the faster one for it."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    return (
        onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and all(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 for x in tensors)
        and weight.ndim == 2
        and input.ndim > 0
        and input.shape[-1] == weight.shape[1]
        and input.numel() * weight.shape[0] >= LEAST_MULTIPLICATIONS
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 that MKL leaves unused: one of another maker than Intel."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "GenuineIntel" not in _processor_maker()
    )


def _processor_maker() -> str:
    """The processor's maker; "GenuineIntel" where the system does not tell it, so that nothing changes there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "GenuineIntel"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "GenuineIntel")


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight.contiguous(), bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """A product by oneDNN whose backward pass consists of two more, so that it can be differentiated again."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(rows, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            linear_cpu(grad, weight.t()) if wants_rows else None,
            linear_cpu(grad.t().contiguous(), rows.t().contiguous()) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def _define_operation() -> None:
    """Define the operation once per process, also where several copies of this file are imported."""
    if hasattr(torch.ops.vlparts, "linear"):
        return
    name = "vlparts::linear"
    torch.library.define(name, "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
    torch.library.impl(name, "CompositeImplicitAutograd", F.linear)
    torch.library.impl(name, ("CPU", "AutogradCPU"), linear_cpu)


_define_operation()
