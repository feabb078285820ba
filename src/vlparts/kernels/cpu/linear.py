"""Linear layers on CPU: float32 by oneDNN where it is faster than MKL, 16 bits by float32 where they are emulated.

PyTorch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors only. On AMD processors with
AVX-512, oneDNN, also part of PyTorch, is 2.2 times as fast (one and two cores of a Zen 5, layers of a ViT-S and a
ViT-B). On those with AVX2 alone it is faster where no factor is transposed, as in a layer, and slower in gradients of
weights; for the few rows of decoding see `MAX_FEW_ROWS`. `torch.backends.mkldnn.flags(enabled=False)` restores MKL.

Without AVX-512, x86 has no instructions for products in bfloat16 and float16, which then are a fourth to a seventh as
fast as in float32. There the factors are converted, which is exact, and the float32 result is rounded once, as in
PyTorch's own product.

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

from ...parts.ops_linear import linear_out_reference

# Fewest multiplications per thread for which oneDNN is used: a call costs about 15 microseconds more than with MKL.
# Measured speedups on one thread: 1.05 at 1 M, 1.2 at 2 M, 1.4 at 4 M, 2 at 30 M.
MULTIPLICATIONS_FROM = 2**20

# Rows per chunk of a weight gradient, whose factors are transposed by copying. All rows at once leave the cache, and
# from about 4,000 rows on the copy takes longer than the product.
ROWS_PER_CHUNK = 1024

# Rows of a weight gradient beyond the last multiple of this are left to MKL, so that few shapes occur: oneDNN compiles
# each new one, which takes a millisecond and half a megabyte.
ROW_MULTIPLE = 64

# Most rows for which the transposed product is faster on AMD processors with AVX2 alone. It takes 0.4 of MKL's time
# with 2 rows, 0.27 with 4, 0.4 with 8 and 0.6 with 16; oneDNN 0.6, 0.35, 0.4 and 1.1. With one row oneDNN is faster,
# which reads the weights at 16 GB/s, MKL at 10 (weights of 1 to 13 million elements, 2 cores of a Zen 3).
MAX_FEW_ROWS = 16

# Fewest rows for which products of 16 bits are computed in float32, since the weight is converted in each call. Their
# time in multiples of that in float32: 0.8 with 8 rows, 1.4 with 16, 2.1 with 32, 5.6 with 257 and 7.2 with 1,600
# (bfloat16, 1,024 to 4,096 channels, two cores of a Zen 3).
ROWS_TO_WIDEN_FROM = 32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` by oneDNN, without gradients and without checks.

    Args:
        x: `(..., K)` float32.
        weight: `(N, K)` float32; the matrix or its transpose is contiguous. For other strides oneDNN is hundreds of
            times slower.
        bias: `(N,)` float32, contiguous.

    Returns:
        `(..., N)` float32.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_is_faster(rows: int, inner: int, columns: int, *, transposed: bool = True) -> bool:
    """Whether [`product`] of `(rows, inner)` and `(columns, inner)` may be used and is faster than MKL.

    It is not used under dispatch modes (such as the FLOP counter) and function transforms, or where
    `torch.backends.mkldnn` is disabled or set to a lower precision.

    Args:
        rows: Rows of the first factor.
        inner: Columns of both.
        columns: Rows of the second.
        transposed: Whether the transpose of one of them is contiguous.
    """
    return (
        rows * inner * columns >= MULTIPLICATIONS_FROM * torch.get_num_threads()
        and columns >= 8
        and (mkl_is_slow() or (not transposed and mkl_is_slow_in_layers()))
        and _onednn_is_allowed()
    )


def _few_rows_are_faster(rows: int, inner: int, columns: int, transposed: bool) -> bool:
    """Whether [`_multiply_few_rows`], or [`product`] of one row, may be used and is faster than MKL."""
    return (
        1 <= rows <= MAX_FEW_ROWS
        and inner * columns >= MULTIPLICATIONS_FROM
        and not transposed
        and mkl_is_slow_in_layers()
        and _onednn_is_allowed()
    )


def is_faster(dtype: torch.dtype, rows: int, inner: int, columns: int, *, transposed: bool = False) -> bool:
    """Whether [`linear_cpu`] of `(rows, inner)` and `(columns, inner)` has a faster product than PyTorch's own.

    Args:
        dtype: Of both factors.
        rows: Rows of the input.
        inner: Input channels.
        columns: Output channels.
        transposed: Whether the weight is stored as `(inner, columns)`.
    """
    if dtype == torch.float32:
        return onednn_is_faster(rows, inner, columns, transposed=transposed) or _few_rows_are_faster(
            rows, inner, columns, transposed
        )
    return _widening_is_faster(dtype, rows)


def _onednn_is_allowed() -> bool:
    return (
        bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
        and not _is_observed()
    )


def _is_observed() -> bool:
    """Whether dispatch modes or function transforms are active, which must see PyTorch's own operations."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


@cache
def half_is_emulated() -> bool:
    """Whether the processor is one of x86 without AVX-512, and so without products of 16 bits."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


@cache
def mkl_is_slow() -> bool:
    """Whether PyTorch has MKL and oneDNN, and the processor has AVX-512 but MKL does not use it."""
    return _is_amd_with("AVX512")


@cache
def mkl_is_slow_in_layers() -> bool:
    """The same for AVX2, where this holds only if no factor is transposed.

    Times of MKL as multiples of oneDNN's (768 to 4,096 channels, two cores of a Zen 3): 0.7 to 2.6 with 8 to 101 rows,
    1.0 to 1.5 with 257 to 1,600, 1.0 to 1.2 with 4,096; for gradients of weights 0.4 to 1.0.
    """
    return _is_amd_with("AVX2")


def _is_amd_with(capability: str) -> bool:
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == capability
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    """Description of the first processor."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    with info.open(encoding="utf-8", errors="replace") as file:
        return file.read(1000)


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """CPU kernel of `vlparts::linear`, without gradients.

    Args:
        x: `(..., K)`.
        weight: `(N, K)`.
        bias: `(N,)`.

    Returns:
        `(..., N)`.
    """
    return _multiply(x, weight, bias) if _applies(x, weight, bias) else F.linear(x, weight, bias)


def linear_cpu_autograd(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """CPU kernel of `vlparts::linear` under autograd; arguments and result are those of [`linear_cpu`]."""
    if not _applies(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _multiply(x, weight, bias)


def linear_out_cpu(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, add: bool) -> None:
    """CPU kernel of `vlparts::linear_out`; arguments are those of [`linear_out_reference`]."""
    if not _applies(x, weight, bias):
        linear_out_reference(out, x, weight, bias, add)
    elif add:
        out.add_(_multiply(x, weight, bias))
    else:
        out.copy_(_multiply(x, weight, bias))


def _applies(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a kernel computes this layer. False for shapes that `F.linear` refuses, so that its error is raised."""
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        return False
    columns, inner = weight.shape
    rows, transposed = x.numel() // max(inner, 1), not weight.is_contiguous()
    return (
        is_faster(x.dtype, rows, inner, columns, transposed=transposed)
        and all(y is None or (is_plain(y) and y.dtype == x.dtype) for y in (x, weight, bias))
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and (bias is None or (bias.shape == (columns,) and bias.is_contiguous()))
    )


def _widening_is_faster(dtype: torch.dtype, rows: int) -> bool:
    """Whether products of this type with so many rows are computed in float32."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and rows >= ROWS_TO_WIDEN_FROM and half_is_emulated() and not _is_observed()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer without gradients, for inputs to which [`_applies`] applies."""
    if x.dtype == torch.float32:
        rows = x.numel() // x.shape[-1]
        few = rows > 1 and _few_rows_are_faster(rows, x.shape[-1], len(weight), not weight.is_contiguous())
        return _multiply_few_rows(x, weight, bias) if few else product(x, weight, bias)
    return linear_cpu(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _multiply_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer as `(weight @ x.T).T`; arguments and result are those of [`product`]."""
    output = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()
    return (output if bias is None else output + bias).contiguous().view(*x.shape[:-1], len(weight))


def is_plain(tensor: Tensor) -> bool:
    """True for a plain Tensor or Parameter without a forward-mode tangent."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and forward_ad.unpack_dual(tensor).tangent is None


class _Linear(torch.autograd.Function):
    """Linear layer with the products of this file, forward and backward."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        # As in PyTorch, the input of a frozen layer is not kept.
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
        out: `(N, K)` to write to; only without gradient recording. None for a new tensor.

    Returns:
        `(N, K)`.
    """
    columns, inner = grad.shape[1], x.shape[1]
    if _widening_is_faster(x.dtype, len(x)):
        result = weight_gradient(x.float(), grad.float())
        return result.to(x.dtype) if out is None else out.copy_(result)
    whole = len(x) - len(x) % ROW_MULTIPLE
    if (
        torch.is_grad_enabled()
        or x.dtype != torch.float32
        or not onednn_is_faster(columns, min(whole, ROWS_PER_CHUNK), inner)
    ):
        return grad.t() @ x if out is None else torch.mm(grad.t(), x, out=out)
    # oneDNN transposes one of the factors by copying: the narrower one.
    narrow, wide = (grad, x.contiguous()) if columns <= inner else (x, grad.contiguous())
    total = narrow[whole:].t() @ wide[whole:]
    for start in range(0, whole, ROWS_PER_CHUNK):
        rows = slice(start, min(start + ROWS_PER_CHUNK, whole))
        total += product(narrow[rows].t(), wide[rows].t())
    result = total if columns <= inner else total.t()
    return result if out is None else out.copy_(result)
