"""Activations whose kernel PyTorch's dispatcher picks: the torch operations `vlparts::gelu` and `vlparts::swiglu`.

Another package gives a device its own kernel by registering one at the device's key and at its Autograd key. GELU is
an operation because a device's own may be another function: there are some that always approximate by tanh.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .ops_library import define_operation


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of gates and inputs that stand one after the other (arXiv 2002.05202, equation 5).

    Args:
        gate_up: `(..., 2 * I)`, gates first.

    Returns:
        `(..., I)`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


define_operation("gelu(Tensor input) -> Tensor", F.gelu)
define_operation("swiglu(Tensor gate_up) -> Tensor", swiglu_reference)


class ExactGELU(nn.Module):
    """`x * P(X <= x)` for a standard normal X (arXiv 1606.08415), through `vlparts::gelu`.

    Exported programs hold PyTorch's own GELU; compiled ones the device's kernel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map each element."""
        if torch.compiler.is_exporting():
            return F.gelu(input)
        return torch.ops.vlparts.gelu(input)


def get_activation(name: str) -> nn.Module:
    """The activation that transformers calls so; "gelu" is [`ExactGELU`].

    Args:
        name: A key of `transformers.activations.ACT2FN`.
    """
    return ExactGELU() if name == "gelu" else ACT2FN[name]


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` through `vlparts::swiglu`; see [`swiglu_reference`]."""
    if torch.compiler.is_compiling():
        return swiglu_reference(gate_up)
    return torch.ops.vlparts.swiglu(gate_up)
