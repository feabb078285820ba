"""RMS normalization by `npu_rms_norm`: one device kernel where `rms_norm_reference` launches up to eight."""

import torch
from torch import Tensor

from vlparts.parts.ops_rms_norm import rms_norm_reference

from .self_check import Kernel, register_operation
from .support import supports_rms_norm


def rms_norm_npu(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS normalization; arguments are those of `rms_norm_reference`.

    The result is rounded once, after the weight; the reference rounds before and after it. With a float32 weight, as
    under autocast, it is float32 like the reference's. torch_npu computes the gradients.
    """
    normalized, _ = torch.ops.npu.npu_rms_norm(input=hidden_states.to(weight.dtype), gamma=weight, epsilon=eps)
    return normalized


def _inputs() -> list[tuple[Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    single, half = torch.float32, torch.bfloat16
    for shape, dtype, weight_dtype in (((5, 48), single, single), ((2, 3, 64), half, half), ((5, 64), half, single)):
        x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(shape[-1], generator=generator).to(weight_dtype).requires_grad_()
        cases.append((x, weight, 1e-3))
    return cases


KERNEL = Kernel(
    name="vlparts::rms_norm",
    run=rms_norm_npu,
    reference=rms_norm_reference,
    make_inputs=_inputs,
    supports=supports_rms_norm,
    tolerance={torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2},
)


def register_rms_norm() -> None:
    """Register the kernel of `vlparts::rms_norm`."""
    register_operation(KERNEL)
