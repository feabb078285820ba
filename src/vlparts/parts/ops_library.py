"""Definition of the operations of the torch library `vlparts`."""

from collections.abc import Callable
from typing import Any

import torch


def define_operation(schema: str, reference: Callable[..., Any]) -> None:
    """Define `vlparts::<schema>` with a reference form that runs on every device, unless it is defined already.

    The reference is composed of PyTorch operations, so that autograd, autocast and compilation follow from it. Another
    package gives a device its own kernel with `torch.library.impl` at the device's key and at its Autograd key, for
    example `"CUDA"` and `"AutogradCUDA"`.

    Remote code runs this once for each copy of its files in a process, and the code of a folder saved earlier calls
    operations by name: a changed schema needs a new name.

    Args:
        schema: Name, arguments and result, for example `"swiglu(Tensor gate_up) -> Tensor"`.
        reference: Computes the operation.
    """
    name = schema.partition("(")[0]
    if hasattr(torch.ops.vlparts, name):
        return
    torch.library.define(f"vlparts::{name}", schema.removeprefix(name))
    torch.library.impl(f"vlparts::{name}", "CompositeImplicitAutograd", reference)
