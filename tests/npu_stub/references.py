"""CPU forms of torch_npu's operations in plain PyTorch, from their documentation.

The forms of `npu::` operations get all arguments of the schema by name, defaults included.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCES: dict[str, Callable[..., Any]] = {}


def reference(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function as the CPU form of an operation.

    It runs in a new thread, since autograd is disabled inside a dispatch mode.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            outcome: list[Any] = []

            def work() -> None:
                try:
                    outcome.extend([function(*args, **kwargs), None])
                except BaseException as error:  # raised again in the calling thread
                    outcome.extend([None, error])

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            if outcome[1] is not None:
                raise outcome[1]
            return outcome[0]

        REFERENCES[name] = run
        return function

    return add


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)`."""
    with torch.enable_grad():
        copies = [x.detach().clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*copies), copies, grad)


@reference("npu::npu_swiglu")
def swiglu(input: Tensor, dim: int) -> Tensor:
    gate, up = input.chunk(2, dim)
    return F.silu(gate) * up


@reference("npu::npu_swiglu_backward")
def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int) -> Tensor:
    return gradients(lambda x: swiglu(x, dim), [input], grad_output)[0]


@reference("npu::npu_gelu")
def gelu(input: Tensor, approximate: str) -> Tensor:
    return F.gelu(input, approximate=approximate)


@reference("npu::npu_gelu_backward")
def gelu_backward(grad_output: Tensor, input: Tensor, approximate: str) -> Tensor:
    return gradients(lambda x: F.gelu(x, approximate=approximate), [input], grad_output)[0]


@reference("npu::npu_rms_norm")
def rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(input.float().square().mean(-1, keepdim=True) + epsilon)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


@reference("npu::npu_rms_norm_backward")
def rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    normed = input.float() * rstd
    scaled = dy.float() * gamma.float()
    # d rstd / d x_i = -rstd^3 x_i / D
    to_input = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return to_input.to(input.dtype), (dy.float() * normed).flatten(0, -2).sum(0)


@reference("npu::npu_rotary_mul")
def rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None = None) -> Tensor:
    if rotary_mode != "half" or rotate is not None:
        raise NotImplementedError(rotary_mode)
    first, second = input.chunk(2, -1)
    return input * r1 + torch.cat((-second, first), -1) * r2


@reference("npu::npu_rotary_mul_backward")
def rotary_mul_backward(grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str) -> tuple[Tensor, ...]:
    return gradients(lambda *inputs: rotary_mul(*inputs, rotary_mode), [input, r1, r2], grad)


@reference("npu::npu_grouped_matmul")
def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    group_list: Tensor,
    split_item: int,
    group_type: int,
    group_list_type: int,
    **others: Any,
) -> list[Tensor]:
    if len(x) != 1 or len(weight) != 1 or split_item not in (2, 3) or any(others.values()):
        raise NotImplementedError("Only one grouped matmul with tensors of all groups is implemented.")
    ends = (group_list if group_list_type == 0 else group_list.cumsum(0)).tolist()
    pieces = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    rows, matrices = x[0], weight[0]
    if ends[-1] != rows.shape[0 if group_type == 0 else 1]:
        raise ValueError(f"`group_list` must end at the last row, got {ends}.")
    if group_type == 0:
        return [torch.cat([rows[piece] @ matrix for piece, matrix in zip(pieces, matrices, strict=True)])]
    return [torch.stack([rows[:, piece] @ matrices[piece] for piece in pieces])]


@reference("npu::npu_moe_token_permute")
def moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[Tensor, Tensor]:
    order = torch.sort(indices.flatten(), stable=True).indices
    sorted_indices = torch.empty_like(order)
    sorted_indices[order] = torch.arange(len(order))
    experts_per_token = indices.numel() // max(len(tokens), 1)
    return tokens[order // experts_per_token][: num_out_tokens or None], sorted_indices.int()


@reference("npu::npu_moe_token_permute_grad_v2")
def moe_token_permute_grad(
    grad_permuted_tokens: Tensor, sorted_indices: Tensor, tokens_size_0: int, tokens_dtype: Any, **others: Any
) -> Tensor:
    grad = grad_permuted_tokens[sorted_indices.long()].unflatten(0, (tokens_size_0, -1)).sum(1)
    return grad.to(grad_permuted_tokens.dtype)


def unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None) -> Tensor:
    rows = permuted_tokens[sorted_indices.long()]
    if probs is None:
        return rows
    return (rows.unflatten(0, tuple(probs.shape)) * probs.unsqueeze(-1)).sum(1).to(permuted_tokens.dtype)


@reference("npu::_npu_moe_token_unpermute")
def moe_token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None, **others: Any
) -> tuple[Tensor, Tensor]:
    return unpermute(permuted_tokens, sorted_indices, probs), permuted_tokens


@reference("npu::npu_moe_token_unpermute_grad_v2")
def moe_token_unpermute_grad(
    grad_unpermuted_tokens: Tensor, sorted_indices: Tensor, permuted_tokens: Tensor, probs: Tensor, **others: Any
) -> tuple[Tensor, ...]:
    inputs = [permuted_tokens, probs]
    return gradients(lambda rows, probs: unpermute(rows, sorted_indices, probs), inputs, grad_unpermuted_tokens)


@reference("aten::matmul_backward")
def matmul_backward(
    grad: Tensor, first: Tensor, second: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    found = gradients(torch.matmul, [first, second], grad)
    return tuple(x if wanted else None for x, wanted in zip(found, mask, strict=True))  # type: ignore[return-value]


@reference("aten::histc")
def histc(input: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    return torch.histc(input.float(), bins, min, max).to(input.dtype)  # not implemented for integers on the CPU


@reference("npu::npu_gather_backward")
def gather_backward(grad: Tensor, self_size: list[int], dim: int, index: Tensor, **others: Any) -> Tensor:
    return grad.new_zeros(self_size).scatter_add(dim, index, grad)


@reference("npu::_npu_dtype_cast")  # of `softmax` and `log_softmax` with a `dtype`
def dtype_cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    return input.to(dtype)


@reference("npu::_npu_dtype_cast_backward")
def dtype_cast_backward(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.to(dtype)


@reference("aten::native_layer_norm")
def layer_norm(
    input: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics are float32; the CPU's have the dtype of the input."""
    precise = [None if x is None else x.float() for x in (weight, bias)]
    output, mean, rstd = torch.native_layer_norm(input.float(), shape, *precise, eps)
    return output.to(input.dtype), mean, rstd


@reference("aten::native_layer_norm_backward")
def layer_norm_backward(
    grad: Tensor,
    input: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of weight and bias are float32."""
    precise = [None if x is None else x.float() for x in (weight, bias)]
    found = torch.ops.aten.native_layer_norm_backward(grad.float(), input.float(), shape, mean, rstd, *precise, mask)
    return None if found[0] is None else found[0].to(input.dtype), *found[1:]
