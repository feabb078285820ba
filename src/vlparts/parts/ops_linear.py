"""Linear layers: the torch operation `vlparts::linear`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops_library import define_operation

define_operation("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", F.linear)


class Linear(nn.Linear):
    """`torch.nn.Linear` through `vlparts::linear`.

    Kernels may differ from PyTorch's by rounding. Compiled and exported programs hold PyTorch's own linear layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        if torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        return torch.ops.vlparts.linear(input, self.weight, self.bias)
