"""Root-mean-square normalisation (arXiv 1910.07467, equation 4): the torch operation `vlparts::rms_norm`.

PyTorch's dispatcher picks the kernel. Another package gives a device its own by registering one at the device's key
and at its Autograd key.

Shapes: D channels.
"""

import torch
from torch import Tensor, nn

# Rows that the CPU kernel takes at a time. Its float32 copies then stay in the cache and in reused memory: for 4,784
# rows of 1,280 channels it takes a seventh (float32) and a fifth (bfloat16) of the reference's time (2 cores of a
# Zen 5); 64 to 1,024 rows differ by a fifth.
ROWS_AT_A_TIME = 1024

# Up to so many numbers the reference is as fast or faster: they are in the cache, and it has fewer steps.
NUMBERS_FOR_THE_REFERENCE = 2**18


def rms_norm_reference(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)`, with statistics in float32 or better, rounded before the weight.

    The order of roundings is that of Llama and of the published vision towers.

    Args:
        hidden_states: `(..., D)`.
        weight: `(D,)`.
        eps: Added to the mean square.

    Returns:
        `(..., D)` in the type of `hidden_states`.
    """
    precise = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    precise = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)
    return weight * precise.to(hidden_states.dtype)


def rms_norm_cpu(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The CPU kernel; arguments and result are those of [`rms_norm_reference`]."""
    needs_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    plain = hidden_states.dtype == weight.dtype and hidden_states.dtype in (torch.float32, torch.bfloat16)
    few = hidden_states.numel() <= NUMBERS_FOR_THE_REFERENCE
    if few or needs_grad or not plain or not hidden_states.is_contiguous():
        return rms_norm_reference(hidden_states, weight, eps)
    output = torch.empty_like(hidden_states)
    norms = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
    factors = norms.square_().div_(hidden_states.shape[-1]).add_(eps).rsqrt_()
    pieces = (x.flatten(0, -2).split(ROWS_AT_A_TIME) for x in (hidden_states, factors, output))
    for rows, factor, target in zip(*pieces, strict=True):
        target.copy_(rows * factor).mul_(weight)
    return output


def _define_operation() -> None:
    """Define the operation once per process, also where several copies of this file are imported."""
    if hasattr(torch.ops.vlparts, "rms_norm"):
        return
    name = "vlparts::rms_norm"
    torch.library.define(name, "(Tensor hidden_states, Tensor weight, float eps) -> Tensor")
    torch.library.impl(name, "CompositeImplicitAutograd", rms_norm_reference)
    torch.library.impl(name, ("CPU", "AutogradCPU"), rms_norm_cpu)


_define_operation()


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis, with a weight.

    Args:
        hidden_size: D.
        eps: Added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `(..., D)`; statistics are computed in float32 or better."""
        if torch.compiler.is_compiling():
            return rms_norm_reference(hidden_states, self.weight, self.eps)
        return torch.ops.vlparts.rms_norm(hidden_states, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Size and epsilon, for printing."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
