"""Exact GELU by `npu_gelu`, and SwiGLU by `npu_swiglu`."""

from math import sqrt

import torch
from torch import Tensor

from vlparts.parts.ops_activations import swiglu_reference

from .self_check import Kernel, register_operation
from .support import supports_gelu, supports_swiglu


def gelu_npu(input: Tensor) -> Tensor:
    """Exact GELU; `torch.nn.functional.gelu` computes the tanh approximation on the NPU."""
    return torch.ops.npu.npu_gelu(input=input, approximate="none")


def gelu_reference(input: Tensor) -> Tensor:
    """Exact GELU in float32 or better, without `torch.nn.functional.gelu`, which is not exact on the NPU."""
    precise = input.to(torch.promote_types(input.dtype, torch.float32))
    return (precise * 0.5 * (1.0 + torch.erf(precise / sqrt(2.0)))).to(input.dtype)


def swiglu_npu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `(..., 2 * I)`, gates first."""
    return torch.ops.npu.npu_swiglu(input=gate_up, dim=-1)


def _inputs() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    # The range holds 2 and -2, where the tanh approximation of GELU differs most from the exact form, by 5e-4.
    x = torch.cat((torch.linspace(-6, 6, 121), 3 * torch.randn(39, generator=generator))).view(10, 16)
    return [(x.clone().requires_grad_(),), (x.bfloat16().requires_grad_(),)]


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

GELU = Kernel(
    name="vlparts::gelu",
    run=gelu_npu,
    reference=gelu_reference,
    make_inputs=_inputs,
    supports=supports_gelu,
    tolerance=TOLERANCE,
)

SWIGLU = Kernel(
    name="vlparts::swiglu",
    run=swiglu_npu,
    reference=swiglu_reference,
    make_inputs=_inputs,
    supports=supports_swiglu,
    tolerance={**TOLERANCE, torch.float32: 1e-4},
)


def register_activations() -> None:
    """Register the kernels of `vlparts::gelu` and `vlparts::swiglu`."""
    register_operation(GELU)
    register_operation(SWIGLU)
