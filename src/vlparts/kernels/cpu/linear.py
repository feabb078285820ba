"""Linear layers on CPU, each by the fastest of several exact forms of its product.

PyTorch multiplies float32 matrices with MKL. oneDNN, also part of PyTorch, is 2.2 times as fast on AMD processors with
AVX-512, which MKL does not use there, and slower by a tenth on Intel's. With few rows, as in decoding, it can be
faster to put the weight first. Without AVX-512, x86 has no instructions for products in bfloat16 and float16, which
then are a fourth to a seventh as fast as in float32; there the factors are converted, which is exact, and the float32
result is rounded once, as in PyTorch's own product. Which form is used is measured (`calibration.py`).
`torch.backends.mkldnn.flags(enabled=False)` restores PyTorch's own.

Shapes: `M` rows, `K` input and `N` output channels.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ...parts.ops_linear import linear_out_reference
from .calibration import Trial, fastest_form

# Fewest multiplications per thread for which another form than PyTorch's is used: a call of oneDNN costs about 15
# microseconds more than one of MKL. Measured speedups of oneDNN on one thread of a Zen 5: 1.05 at 1 M, 1.2 at 2 M, 1.4
# at 4 M, 2 at 30 M.
MULTIPLICATIONS_FROM = 2**20

# Most rows for which the choice depends on their number, in powers of two, and the fewest elements of their weight:
# smaller ones fit in the cache, and all forms take the same time.
MAX_FEW_ROWS = 32
FEW_ROWS_ELEMENTS = 2**19

# Rows per chunk of a weight gradient, whose factors are transposed by copying. All rows at once leave the cache, and
# from about 4,000 rows on the copy takes longer than the product.
ROWS_PER_CHUNK = 1024

# Rows of a weight gradient beyond the last multiple of this are left to MKL, so that few shapes occur: oneDNN compiles
# each new one, which takes a millisecond and half a megabyte.
ROW_MULTIPLE = 64

# What is measured: number of weights, input and output channels, for many and for few rows. The weights of the second
# leave the cache between two calls, as those of a model do between two tokens.
MANY_ROWS = 512
MANY = (1, 512, 512)
FEW = (8, 1280, 1792)

HALF = (torch.bfloat16, torch.float16)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


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


def _weight_first(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer as `(weight @ x.T).T`, for few rows; arguments and result are those of [`product`]."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1:
        output = torch.mv(weight, rows[0]) if bias is None else torch.addmv(bias, weight, rows[0])
    elif bias is None:
        output = torch.mm(weight, rows.t()).t()
    else:
        output = torch.addmm(bias[:, None], weight, rows.t()).t()
    return output.contiguous().view(*x.shape[:-1], len(weight))


def _in_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer in float32, rounded once, for factors of 16 bits."""
    return linear_cpu(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
FORMS: dict[str, Product] = {
    "pytorch": F.linear,
    "onednn": product,
    "weight_first": _weight_first,
    "float32": _in_float32,
}


def _forms_for(dtype: torch.dtype, few: bool, transposed: bool) -> tuple[str, ...]:
    """The forms that support such a layer, PyTorch's own first."""
    names = ["pytorch"]
    if dtype == torch.float32 and has_onednn():
        names.append("onednn")
    if dtype in HALF:
        names.append("float32")
    if few and not transposed:
        names.append("weight_first")
    return tuple(names)


@cache
def has_onednn() -> bool:
    """Whether [`product`] can be used: PyTorch has MKL and oneDNN."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def form_of(dtype: torch.dtype, rows: int, inner: int, columns: int, *, transposed: bool = False) -> str:
    """Return which of `FORMS` is the fastest for a layer without gradients.

    It is PyTorch's own for small products, under dispatch modes (such as the FLOP counter) and function transforms,
    and where `torch.backends.mkldnn` is disabled or set to a lower precision.

    Args:
        dtype: Of both factors.
        rows: Rows of the input, M.
        inner: Input channels, K.
        columns: Output channels, N.
        transposed: Whether the weight is stored as `(K, N)`.
    """
    if rows < 1 or columns < 8 or dtype not in NAMES:
        return "pytorch"
    if rows <= MAX_FEW_ROWS:
        rows = 1 << (rows - 1).bit_length()
        is_small = inner * columns < FEW_ROWS_ELEMENTS
    else:
        is_small = rows * inner * columns < MULTIPLICATIONS_FROM * torch.get_num_threads()
        rows = MANY_ROWS
    if is_small or not is_allowed(dtype):
        return "pytorch"
    forms = _forms_for(dtype, rows != MANY_ROWS, transposed)
    name = f"{NAMES[dtype]} layer, {rows} rows{', transposed' * transposed}"
    return fastest_form(name, forms, lambda: _make_trials(dtype, rows, transposed, forms))


def _make_trials(dtype: torch.dtype, rows: int, transposed: bool, forms: Sequence[str]) -> dict[str, Trial]:
    """A call of each form on a layer of the size that is measured."""
    count, inner, columns = MANY if rows == MANY_ROWS else FEW
    x = torch.ones(rows, inner, dtype=dtype)
    weights = torch.ones((count, inner, columns) if transposed else (count, columns, inner), dtype=dtype)
    if transposed:
        weights = weights.transpose(1, 2)

    def run(form: Product) -> None:
        for weight in weights:
            form(x, weight, None)

    return {name: partial(run, FORMS[name]) for name in forms}


def is_allowed(dtype: torch.dtype = torch.float32) -> bool:
    """Whether another form than PyTorch's may be used now; see [`form_of`]."""
    return (
        bool(torch.backends.mkldnn.enabled)
        and (dtype != torch.float32 or torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee"))  # type: ignore[attr-defined]
        and not _is_observed()
    )


def _is_observed() -> bool:
    """Whether dispatch modes or function transforms are active, which must see PyTorch's own operations."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """CPU kernel of `vlparts::linear`, without gradients.

    Args:
        x: `(..., K)`.
        weight: `(N, K)`.
        bias: `(N,)`.

    Returns:
        `(..., N)`.
    """
    return get_form(x, weight, bias)(x, weight, bias)


def linear_cpu_autograd(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """CPU kernel of `vlparts::linear` under autograd; arguments and result are those of [`linear_cpu`]."""
    form = get_form(x, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias))
    if needs_grad and form is not F.linear:
        return _Linear.apply(x, weight, bias)
    return form(x, weight, bias)


def linear_out_cpu(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, add: bool) -> None:
    """CPU kernel of `vlparts::linear_out`; arguments are those of [`linear_out_reference`]."""
    write_product(get_form(x, weight, bias), out, x, weight, bias, add)


def write_product(form: Product, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, add: bool) -> None:
    """As [`linear_out_cpu`], by the form that [`get_form`] has found for inputs of these shapes and strides."""
    if form is F.linear:
        linear_out_reference(out, x, weight, bias, add)
    elif form is _weight_first and len(x) == 1 and bias is None and not add:
        torch.mv(weight, x[0], out=out[0])
    elif add:
        out.add_(form(x, weight, bias))
    else:
        out.copy_(form(x, weight, bias))


def get_form(x: Tensor, weight: Tensor, bias: Tensor | None) -> Product:
    """The form that computes this layer. PyTorch's own for shapes that it refuses, so that its error is raised."""
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        return F.linear
    columns, inner = weight.shape
    rows, transposed = x.numel() // max(inner, 1), not weight.is_contiguous()
    name = form_of(x.dtype, rows, inner, columns, transposed=transposed)
    applies = (
        name != "pytorch"
        and all(y is None or (is_plain(y) and y.dtype == x.dtype) for y in (x, weight, bias))
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and (bias is None or (bias.shape == (columns,) and bias.is_contiguous()))
    )
    return FORMS[name] if applies else F.linear


def is_plain(tensor: Tensor) -> bool:
    """True for a plain Tensor or Parameter without a forward-mode tangent."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and forward_ad.unpack_dual(tensor).tangent is None


class _Linear(torch.autograd.Function):
    """Linear layer with the products of this file, forward and backward."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_cpu(x, weight, bias)

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
    whole = len(x) - len(x) % ROW_MULTIPLE
    depth = min(whole, ROWS_PER_CHUNK) if x.dtype == torch.float32 else len(x)
    form = "pytorch"
    if not torch.is_grad_enabled():
        form = form_of(x.dtype, columns, depth, inner, transposed=True)
    if form == "float32":
        result = weight_gradient(x.float(), grad.float())
        return result.to(x.dtype) if out is None else out.copy_(result)
    if form == "pytorch":
        return grad.t() @ x if out is None else torch.mm(grad.t(), x, out=out)
    # oneDNN transposes one of the factors by copying: the narrower one.
    narrow, wide = (grad, x.contiguous()) if columns <= inner else (x, grad.contiguous())
    total = narrow[whole:].t() @ wide[whole:]
    for start in range(0, whole, ROWS_PER_CHUNK):
        rows = slice(start, min(start + ROWS_PER_CHUNK, whole))
        total += product(narrow[rows].t(), wide[rows].t())
    result = total if columns <= inner else total.t()
    return result if out is None else out.copy_(result)
