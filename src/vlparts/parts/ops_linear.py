"""Linear layers whose kernel PyTorch's dispatcher picks: the torch operation `vlparts::linear`.

Another package gives a device its own kernel by registering one at the device's key and at its Autograd key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.cpu.linear import linear_cpu, linear_cpu_autograd


def define_linear() -> None:
    """Define the operation once per process, also where several copies of this file are imported."""
    if hasattr(torch.ops.vlparts, "linear"):
        return
    library, name = torch.library, "vlparts::linear"
    library.define(name, "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
    library.impl(name, "CompositeImplicitAutograd", F.linear)
    library.impl(name, "CPU", linear_cpu)
    library.impl(name, "AutogradCPU", linear_cpu_autograd)
    library.impl(name, "AutocastCPU", F.linear)  # which brings the types together


define_linear()


class Linear(nn.Linear):
    """`torch.nn.Linear` through `vlparts::linear`.

    It differs in speed, and in float32 results by rounding. Compiled and exported programs hold PyTorch's own
    linear layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        if torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        return torch.ops.vlparts.linear(input, self.weight, self.bias)
