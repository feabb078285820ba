"""Linear layers: the torch operation `vlparts::linear`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .ops_library import define_operation

linear = define_operation("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", F.linear)


def linear_out_reference(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, add: bool) -> None:
    """Write a linear layer's output to `out`, or add it, without recording gradients of it.

    Args:
        out: `(M, N)`.
        x: `(M, K)` of the same type.
        weight: `(N, K)` of the same type.
        bias: `(N,)` or None; only without `add`.
        add: Whether to add to `out`.
    """
    if add:
        out.addmm_(x, weight.t())
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


linear_out = define_operation(
    "linear_out(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, bool add) -> ()", linear_out_reference
)


class _LinearOperation(TorchFunctionMode):
    """Replaces `torch.nn.functional.linear` of plain tensors by `vlparts::linear`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and all(type(one) in _PLAIN for one in args):
            return linear(*args)
        return func(*args, **(kwargs or {}))


_PLAIN = (Tensor, nn.Parameter, type(None))
_linear_operation = _LinearOperation()


def apply_linear(layer: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Apply a `torch.nn.Linear`, or what replaced it, or a module with several, by `vlparts::linear`.

    The layer is called, so its hooks run, and adapters and quantized layers in its place work. Only the product of
    plain tensors is computed by the operation, whose kernels may differ from PyTorch's by rounding; tensor subclasses,
    such as quantized weights, get `torch.nn.functional.linear`. Compiled and exported programs hold PyTorch's own
    linear layer.

    Args:
        layer: For a linear layer: maps `(..., in_features)` to `(..., out_features)`.
        *inputs: Its inputs; `(..., in_features)`.
        **options: Its named inputs.

    Returns:
        Its outputs; `(..., out_features)`.
    """
    if torch.compiler.is_compiling():
        return layer(*inputs, **options)
    with _linear_operation:
        return layer(*inputs, **options)
