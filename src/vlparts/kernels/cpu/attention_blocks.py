"""Attention on CPU with explicit weights, one head and one block of queries at a time.

The scores of a block stay in the processor's cache. They are computed by oneDNN in float32, for bfloat16 inputs too.
With scores rounded to bfloat16, the error of the output is twice that of fused attention for scores of order one,
seven times for keys with a large common component (centred keys: twice), and five times for scores up to 20. Here it
is 1.05, 1.05 and 1.3 times (root mean square against float64, 256 and 1,024 tokens).

Each key head, with the query heads that share it, runs on one thread of a pool. PyTorch would divide every operation
among its threads, which wait for each other after it; for many short operations that costs more than it gains, most of
all where other programs hold a core. The threads of the pool wait for each other once.

Shapes: `B` equal segments, `H` query heads, `Hkv` key heads, `Lq` queries and `Lk` keys of a segment, `D` channels of
queries and keys, `Dv` of values. A padded length `L'` is a multiple of `LENGTH_MULTIPLE`.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ...parts.utils import refuse_second_derivative
from .linear import has_onednn, is_allowed, is_plain, product

DTYPES = (torch.float32, torch.bfloat16)

# Shortest segment: shorter ones do not repay the many calls (table in `attention.py`).
MIN_LENGTH = 256

# With more threads, fused attention is used: each call holds Python's global lock for some ten microseconds of a
# millisecond. One and two threads were measured.
MAX_THREADS = 16

# Largest number of scores of a block, 4 MiB of float32. Half and a quarter of it are as fast but make more calls;
# twice as many leave the cache.
SCORES_PER_BLOCK = 2**20

# Lengths are padded to multiples of this, so that few shapes occur: oneDNN compiles each new one, which takes a
# millisecond and half a megabyte.
LENGTH_MULTIPLE = 32


def blocks_apply(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether [`attend_in_blocks`] supports these `(B, H, L, D)`, with enough work for each thread."""
    return (
        query.dtype in DTYPES
        and min(query.shape[2], key.shape[2]) >= MIN_LENGTH
        and torch.get_num_threads() <= min(MAX_THREADS, key.shape[0] * key.shape[1])
        and has_onednn()
        and is_allowed()
        and all(is_plain(x) for x in (query, key, value))
    )


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Full attention of `(B, H, Lq, D)` over `(B, Hkv, Lk, D)` and `(B, Hkv, Lk, Dv)`, differentiable once.

    Args:
        query: float32 or bfloat16.
        key: The same dtype.
        value: The same dtype.
        scale: Factor on the scores; None for `D ** -0.5`.

    Returns:
        `(B, H, Lq, Dv)` in the dtype of the inputs.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return _BlockAttention.apply(query, key, value, scale)
    return _forward(query, key, value, scale)


class _BlockAttention(torch.autograd.Function):
    """Attention in blocks; the backward pass recomputes the weights of each block."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        output = _forward(query, key, value, scale)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("Packed attention in blocks is")
        query, key, value, output = ctx.saved_tensors
        return *_backward(query, key, value, output, grad, ctx.scale), None


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute the output, `(B, H, Lq, Dv)`."""
    groups, block = query.shape[1] // key.shape[1], _block_length(query, key)
    keys, mask, values = key.flatten(0, 1), _padding_mask(key), value.flatten(0, 1)
    output = value.new_empty(*query.shape[:2], _round_up(query.shape[2]), value.shape[-1])

    def attend(key_head: int) -> None:
        k, v = _pad(keys[key_head], torch.float32), _pad(values[key_head], value.dtype)
        batch, first = divmod(key_head * groups, query.shape[1])
        for head in range(first, first + groups):
            q = _pad(query[batch, head], torch.float32).mul_(scale)
            for rows, target in zip(q.split(block), output[batch, head].split(block), strict=True):
                _matmul_out(product(rows, k, mask).softmax(-1).to(value.dtype), v, target)

    parallel_for(len(keys), attend)
    return output[:, :, : query.shape[2]]


def _backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Compute the gradients of query, key and value."""
    dtype, groups, block = query.dtype, query.shape[1] // key.shape[1], _block_length(query, key)
    keys, mask, values = key.flatten(0, 1), _padding_mask(key), value.flatten(0, 1)
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))

    def differentiate(key_head: int) -> None:
        k = _pad(keys[key_head], torch.float32)
        k_rounded, grad_k = k.to(dtype), torch.zeros_like(k)
        grad_v = k.new_zeros(len(k), value.shape[-1])
        batch, first = divmod(key_head * groups, query.shape[1])
        for head in range(first, first + groups):
            q = _pad(query[batch, head], torch.float32).mul_(scale)
            q_rounded, grad_output = q.to(dtype), _pad(grad[batch, head], dtype)
            extended = append_mean(grad[batch, head], output[batch, head], values[key_head])
            extended_grad, extended_v = (_pad(x, dtype) for x in extended)
            grad_q = torch.empty_like(q_rounded)
            for start in range(0, len(q), block):
                rows = slice(start, start + block)
                weights = product(q[rows], k, mask).softmax(-1).to(dtype)
                grad_scores = _matmul_nt(extended_grad[rows], extended_v).mul_(weights)
                _matmul_out(grad_scores, k_rounded, grad_q[rows])
                grad_k += _matmul_tn(grad_scores, q_rounded[rows])
                grad_v += _matmul_tn(weights, grad_output[rows])
            grad_query[batch, head] = grad_q.mul_(scale)[: query.shape[2]]
        index = divmod(key_head, key.shape[1])
        grad_key[index], grad_value[index] = grad_k[: key.shape[2]], grad_v[: key.shape[2]]

    parallel_for(len(keys), differentiate)
    return grad_query, grad_key, grad_value


def append_mean(grad: Tensor, output: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Append columns to gradients and values, such that their product is the weights' gradient minus its mean.

    The gradient of the scores is `weights * (grad @ value.T - mean)`, where `mean` weighs each row of `grad @ value.T`
    by the weights. With the columns the difference is rounded once. In bfloat16 the mean takes two columns: its
    rounded value and the remainder.

    Args:
        grad: `(..., Lq, Dv)`, gradient of the output.
        output: `(..., Lq, Dv)`.
        value: `(..., Lk, Dv)`.

    Returns:
        `(..., Lq, Dv + n)` and `(..., Lk, Dv + n)`.
    """
    mean = (grad.float() * output.float()).sum(-1, keepdim=True)
    columns = [mean.to(grad.dtype)]
    if grad.dtype != torch.float32:
        columns.append((mean - columns[0].float()).to(grad.dtype))
    minus_one = value.new_full((), -1.0).expand(*value.shape[:-1], len(columns))
    return torch.cat((grad, *columns), -1), torch.cat((value, minus_one), -1)


def _pad(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy `(L, D)` to a new matrix `(L', D)` with rows of zeros at the end."""
    length = len(matrix)
    padded = matrix.new_empty(_round_up(length), matrix.shape[1], dtype=dtype)
    padded[:length] = matrix
    padded[length:] = 0
    return padded


def _padding_mask(key: Tensor) -> Tensor | None:
    """Additive mask `(L',)` of the scores: -inf at padded keys; None if there are none."""
    length = key.shape[2]
    if length == _round_up(length):
        return None
    mask = key.new_zeros(_round_up(length), dtype=torch.float32)
    mask[length:] = float("-inf")
    return mask


def _block_length(query: Tensor, key: Tensor) -> int:
    """Queries per block; the blocks of a segment are of about equal length."""
    length_q, length_k = _round_up(query.shape[2]), _round_up(key.shape[2])
    blocks = -(-length_q * length_k // SCORES_PER_BLOCK)
    return _round_up(-(-length_q // blocks))


def _round_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _matmul_out(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write `left @ right` to `out`."""
    if left.dtype == torch.float32:
        out.copy_(product(left, right.t()))
    else:
        torch.mm(left, right, out=out)


def _matmul_nt(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T`."""
    return product(left, right) if left.dtype == torch.float32 else left @ right.t()


def _matmul_tn(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right`, such that oneDNN transposes the narrower of the two."""
    if left.dtype == torch.float32:
        return product(right.t(), left.t()).t()
    return left.t() @ right


_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def parallel_for(count: int, task: Callable[[int], None]) -> None:
    """Call `task(0)` to `task(count - 1)`, in any order, on as many threads as PyTorch uses.

    Inside a task, PyTorch uses one thread and records no gradients.

    Args:
        count: Number of calls.
        task: Function of the index. Calls must not write to the same memory.
    """
    threads = torch.get_num_threads()
    if threads == 1 or count == 1:
        with torch.no_grad():
            for index in range(count):
                task(index)
        return
    is_inference = torch.is_inference_mode_enabled()

    def run(index: int) -> None:
        with torch.inference_mode(is_inference), torch.no_grad():  # both are set per thread
            task(index)

    for _ in _get_pool(threads).map(run, range(count)):
        pass


def _get_pool(threads: int) -> ThreadPoolExecutor:
    with _pools_lock:
        if threads not in _pools:
            _pools[threads] = _new_pool(threads)
        return _pools[threads]


def _new_pool(threads: int) -> ThreadPoolExecutor:
    """Start a pool of threads in each of which PyTorch uses one thread."""
    pool, all_started = ThreadPoolExecutor(threads, "vlparts"), threading.Barrier(threads)

    def set_one_thread() -> None:
        torch.get_num_threads()  # the first call in a thread resets its number to the global one
        torch.set_num_threads(1)
        all_started.wait()

    for started in [pool.submit(set_one_thread) for _ in range(threads)]:
        started.result()
    torch.set_num_threads(threads)  # new threads start with the number that was set last
    return pool


def _forget_pools() -> None:
    """Drop the pools in a forked process, which has none of its parent's threads."""
    global _pools_lock
    _pools.clear()
    _pools_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
