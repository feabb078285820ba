"""Root-mean-square normalization (arXiv 1910.07467, equation 4): the torch operation `vlparts::rms_norm`.

Shapes: D channels.
"""

import torch
from torch import Tensor, nn

from .ops_library import define_operation


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


define_operation("rms_norm(Tensor hidden_states, Tensor weight, float eps) -> Tensor", rms_norm_reference)


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
