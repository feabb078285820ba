"""Rotary position embedding of packed images by `npu_rotary_mul`.

Language models compute theirs in transformers' own code, which calls no operation of `vlparts`.

Shapes: `L` patches of all images, `H` heads, `D` channels of a head.
"""

from typing import Any

import torch
from torch import Tensor

from vlparts.parts.ops_rotary import axial_rotary, rotary_pair_reference, rotary_reference
from vlparts.parts.utils import refuse_second_derivative

from .self_check import Kernel, register_operation
from .support import is_joint_projection, supports_rotary, supports_rotary_pair


def rotary_npu(input: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation in float32; arguments are those of `rotary_reference`.

    The operation computes `x * cos + cat(-x2, x1) * sin` of the halves `x1, x2` of a head, in layout TND with cosines
    and sines T1D.
    """
    precise = input.to(torch.float32, memory_format=torch.contiguous_format)
    rotated = torch.ops.npu.npu_rotary_mul(
        input=precise, r1=cos.float().unsqueeze(1), r2=sin.float().unsqueeze(1), rotary_mode="half"
    )
    return rotated.to(input.dtype)


class JointRotary(torch.autograd.Function):
    """Rotation of queries and keys `(L, H, D)`, views of one projection, as one tensor `(2, L, H, D)`.

    In half precision a rotation casts before and after, so this takes three launches instead of six. Both results are
    contiguous, as attention needs them. Layout BSND with cosines and sines 1S1D.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments are those of `rotary_pair_reference`."""
        step = key.storage_offset() - query.storage_offset()
        both = query.as_strided((2, *query.shape), (step, *query.stride()), query.storage_offset())
        precise = both.to(torch.float32, memory_format=torch.contiguous_format)
        cos, sin = (x.float()[None, :, None] for x in (cos, sin))
        ctx.save_for_backward(cos, sin)
        rotated = torch.ops.npu.npu_rotary_mul(input=precise, r1=cos, r2=sin, rotary_mode="half").to(query.dtype)
        return rotated[0], rotated[1]

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries and keys."""
        refuse_second_derivative("The rotation by `npu_rotary_mul` is")
        cos, sin = ctx.saved_tensors
        grad = grad_query.new_empty(2, *grad_query.shape, dtype=torch.float32)
        grad[0].copy_(grad_query)
        grad[1].copy_(grad_key)
        # `input` matters only for the gradients of cosines and sines, which are not used.
        rotated = torch.ops.npu.npu_rotary_mul_backward(grad=grad, input=grad, r1=cos, r2=sin, rotary_mode="half")[0]
        rotated = rotated.to(grad_query.dtype)
        return rotated[0], rotated[1], None, None


def rotary_pair_npu(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation of queries and keys; arguments are those of `rotary_pair_reference`."""
    if is_joint_projection(query, key):
        return JointRotary.apply(query, key, cos, sin)
    return rotary_npu(query, cos, sin), rotary_npu(key, cos, sin)


def _inputs() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for heads, channels, dtype in ((3, 80, torch.float32), (2, 64, torch.bfloat16)):
        positions = torch.randint(0, 40, (7, 2), generator=generator)
        x = torch.randn(7, heads, channels, generator=generator).to(dtype).requires_grad_()
        cases.append((x, *axial_rotary(positions, channels)))
    return cases


def _pair_inputs() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for heads, channels, dtype in ((2, 64, torch.bfloat16), (3, 80, torch.bfloat16), (2, 64, torch.float32)):
        angles = axial_rotary(torch.randint(0, 40, (7, 2), generator=generator), channels)
        query, key, _ = torch.randn(7, 3, heads, channels, generator=generator).to(dtype).unbind(1)
        cases.append((query.requires_grad_(), key.requires_grad_(), *angles))
    return cases


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

KERNEL = Kernel(
    name="vlparts::rotary",
    run=rotary_npu,
    reference=rotary_reference,
    make_inputs=_inputs,
    supports=supports_rotary,
    tolerance=TOLERANCE,
)

PAIR = Kernel(
    name="vlparts::rotary_pair",
    run=rotary_pair_npu,
    reference=rotary_pair_reference,
    make_inputs=_pair_inputs,
    supports=supports_rotary_pair,
    tolerance=TOLERANCE,
)


def register_rotary() -> None:
    """Register the kernels of `vlparts::rotary` and `vlparts::rotary_pair`."""
    register_operation(KERNEL)
    register_operation(PAIR)
