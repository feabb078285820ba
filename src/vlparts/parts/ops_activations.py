"""Activations: the torch operations `vlparts::gelu` and `vlparts::swiglu`.

GELU is an operation because some devices' own GELU always uses the tanh approximation.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .ops_library import define_operation


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of concatenated `gate` and `up` (arXiv 2002.05202, equation 5).

    Args:
        gate_up: `(..., 2 * I)`, gates first.

    Returns:
        `(..., I)`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


define_operation("gelu(Tensor input) -> Tensor", F.gelu)
swiglu = define_operation("swiglu(Tensor gate_up) -> Tensor", swiglu_reference)


class ExactGELU(nn.Module):
    """`x * P(X <= x)` for a standard normal X (arXiv 1606.08415), through `vlparts::gelu`.

    Compiled programs hold the device's kernel, exported programs PyTorch's own GELU.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply GELU to each element."""
        if torch.compiler.is_exporting():
            return F.gelu(input)
        return torch.ops.vlparts.gelu(input)


def get_activation(name: str) -> nn.Module:
    """Return the activation of this name; "gelu" is [`ExactGELU`].

    Args:
        name: A key of `transformers.activations.ACT2FN`.
    """
    return ExactGELU() if name == "gelu" else ACT2FN[name]
