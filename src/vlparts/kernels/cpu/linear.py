"""Products in float32 on CPU by oneDNN, where MKL leaves half of the processor unused.

PyTorch multiplies float32 matrices with MKL, which keeps its AVX-512 code to Intel's processors. On others oneDNN,
which PyTorch brings as well, does the same sums 2.2 times as fast (one and two cores of a Zen 5, layers of a ViT-S and
a ViT-B); with AVX2 alone the two are equal. `torch.backends.mkldnn.flags(enabled=False)` gives MKL's results back.

Shapes: `M` rows, `K` input and `N` output channels.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

# From this many multiplications for each thread on oneDNN gains: it needs about 15 microseconds more for each call.
# Measured gains on one thread: 1.05 at 1 M, 1.2 at 2 M, 1.4 at 4 M, 2 at 30 M.
MULTIPLICATIONS_FROM = 2**20

# Rows of a weight gradient's terms that are turned over at a time. All at once, their copy leaves the cache and takes
# longer than the product from about 4,000 rows on.
ROWS_AT_A_TIME = 1024

# A weight gradient takes whole multiples of this many rows by oneDNN, so that few shapes occur: oneDNN compiles each
# new one, which takes a millisecond and half a megabyte.
ROWS_IN_STEPS_OF = 64


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` by oneDNN, without gradients and without checks.

    Args:
        x: `(..., K)` float32.
        weight: `(N, K)` float32, it or its transpose contiguous. With other strides oneDNN takes a path that is
            hundreds of times slower.
        bias: `(N,)` float32 contiguous.

    Returns:
        `(..., N)` float32.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_is_faster(rows: int, inner: int, columns: int) -> bool:
    """Whether [`product`] of `(rows, inner)` and `(columns, inner)` may be used now and is faster than MKL.

    It is not used where somebody follows the operations (dispatch modes such as the FLOP counter, function
    transforms), nor where float32 products were asked for in a lower precision.
    """
    return (
        rows * inner * columns >= MULTIPLICATIONS_FROM * torch.get_num_threads()
        and columns >= 8
        and mkl_is_slow()
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


@cache
def mkl_is_slow() -> bool:
    """Whether PyTorch has MKL and oneDNN, and the processor has AVX-512 but MKL does not use it."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    """What the system tells about its first processor."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    with info.open(encoding="utf-8", errors="replace") as file:
        return file.read(1000)


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The CPU kernel of `vlparts::linear`, without gradients.

    Args:
        x: `(..., K)`.
        weight: `(N, K)`.
        bias: `(N,)`.

    Returns:
        `(..., N)`.
    """
    return product(x, weight, bias) if _applies(x, weight, bias) else F.linear(x, weight, bias)


def linear_cpu_autograd(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The CPU kernel of `vlparts::linear` under autograd; arguments and result are those of [`linear_cpu`]."""
    if not _applies(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)


def _applies(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN computes this layer; what `F.linear` would refuse is left to it."""
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        return False
    columns, inner = weight.shape
    return (
        onednn_is_faster(x.numel() // max(inner, 1), inner, columns)
        and all(y is None or (is_plain(y) and y.dtype == torch.float32) for y in (x, weight, bias))
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and (bias is None or (bias.shape == (columns,) and bias.is_contiguous()))
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether it is no subclass and has no tangent of forward-mode differentiation, which kernels here know not."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and forward_ad.unpack_dual(tensor).tangent is None


class _Linear(torch.autograd.Function):
    """A linear layer whose products are oneDNN's, forward and backward."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        # As in PyTorch, a frozen weight does not keep the layer's input alive.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = linear_cpu_autograd(grad, weight.t())
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(x.reshape(-1, x.shape[-1]), rows)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


def weight_gradient(x: Tensor, grad: Tensor, out: Tensor | None = None) -> Tensor:
    """`grad.T @ x`, the gradient of a weight.

    Args:
        x: `(M, K)`, the layer's input.
        grad: `(M, N)`, the gradient of its output.
        out: `(N, K)` to write to, where no gradients are recorded; None for a new tensor.

    Returns:
        `(N, K)`.
    """
    columns, inner = grad.shape[1], x.shape[1]
    whole = len(x) - len(x) % ROWS_IN_STEPS_OF
    if (
        torch.is_grad_enabled()
        or x.dtype != torch.float32
        or not onednn_is_faster(columns, min(whole, ROWS_AT_A_TIME), inner)
    ):
        return grad.t() @ x if out is None else torch.mm(grad.t(), x, out=out)
    # oneDNN must have one of the factors turned over, so that is the narrower one.
    turned, other = (grad, x.contiguous()) if columns <= inner else (x, grad.contiguous())
    total = turned[whole:].t() @ other[whole:]
    for start in range(0, whole, ROWS_AT_A_TIME):
        rows = slice(start, min(start + ROWS_AT_A_TIME, whole))
        total += product(turned[rows].t(), other[rows].t())
    result = total if columns <= inner else total.t()
    return result if out is None else out.copy_(result)
