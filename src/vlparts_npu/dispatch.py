"""Registration of kernels with PyTorch's dispatcher."""

import torch

from .self_check import Kernel, guarded

KEYS = ("PrivateUse1", "AutogradPrivateUse1")


def register_operation(kernel: Kernel) -> None:
    """Register a kernel for the operation of its name, once per process.

    Both keys get the same function: at the Autograd key the operations of torch_npu that it calls make their own part
    of the graph, and a kernel at the first key alone would be left without gradients.
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key(kernel.name, KEYS[1]):
        return
    torch.library.impl(kernel.name, KEYS, guarded(kernel))
