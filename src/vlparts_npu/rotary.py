"""Rotary positions of packed images by `npu_rotary_mul`.

Rotary positions of language models are transformers' own code, and reach no operation of `vlparts`.
"""

import torch
from torch import Tensor

from vlparts.parts.rotary import axial_rotary, rotary_reference

from .dispatch import register_operation
from .predicates import supports_rotary
from .self_check import Kernel


def rotary_npu(input: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The kernel, in float32 like the reference; arguments are those of `rotary_reference`.

    The operation rotates halves of heads, `x * cos + cat(-x2, x1) * sin`, layout TND with angles T1D.
    """
    precise = input.to(torch.float32, memory_format=torch.contiguous_format)
    rotated = torch.ops.npu.npu_rotary_mul(
        input=precise, r1=cos.float().unsqueeze(1), r2=sin.float().unsqueeze(1), rotary_mode="half"
    )
    return rotated.to(input.dtype)


def _inputs() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for heads, channels, dtype in ((3, 80, torch.float32), (2, 64, torch.bfloat16)):
        positions = torch.randint(0, 40, (7, 2), generator=generator)
        x = torch.randn(7, heads, channels, generator=generator).to(dtype).requires_grad_()
        cases.append((x, *axial_rotary(positions, channels)))
    return cases


KERNEL = Kernel(
    name="vlparts::rotary",
    run=rotary_npu,
    reference=rotary_reference,
    make_inputs=_inputs,
    supports=supports_rotary,
    tolerance={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
)


def register_rotary() -> None:
    """Register the kernel of `vlparts::rotary`."""
    register_operation(KERNEL)
