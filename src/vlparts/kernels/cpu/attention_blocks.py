"""Attention on CPU with explicit weights, one head and a block of queries at a time.

The scores of a block stay in the processor's cache. Their product is oneDNN's in float32, for bfloat16 inputs too:
with scores rounded to bfloat16 the error of the output is twice that of fused attention for scores of order one, seven
times for keys with much in common (centred keys: twice), and five times for scores up to 20. Here it is 1.05, 1.05 and
1.3 times (root mean square against float64, 256 and 1,024 tokens).

Shapes: `B` equal segments, `H` query heads, `Hkv` key heads, `Lq` queries and `Lk` keys of a segment, `D` channels of
queries and keys, `Dv` of values.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import is_plain, onednn_is_faster, product

# Types and lengths that are computed here: shorter segments do not pay for the many calls.
TYPES = (torch.float32, torch.bfloat16)
LENGTH_FROM = 256

# Heads are computed side by side, each on one thread. With more threads than this, fused attention is used: every call
# holds the interpreter for some ten microseconds of a millisecond. One and two threads were measured.
THREADS_UP_TO = 16

# Largest number of scores that are computed at a time, 4 MiB of float32. Half and a quarter of it are as fast, but
# make more calls; twice as many leave the cache.
SCORES_AT_A_TIME = 2**20

# Lengths are rounded up to multiples of this, so that few shapes occur: oneDNN compiles each new one, which takes a
# millisecond and half a megabyte.
LENGTHS_IN_STEPS_OF = 32


def blocks_apply(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether [`attend_in_blocks`] takes these `(B, H, L, D)` and is faster than PyTorch's fused attention."""
    length_q, length_k = query.shape[2], key.shape[2]
    return (
        query.dtype in TYPES
        and min(length_q, length_k) >= LENGTH_FROM
        and torch.get_num_threads() <= min(THREADS_UP_TO, key.shape[0] * key.shape[1])
        and onednn_is_faster(length_q, query.shape[3], length_k)
        and all(is_plain(x) for x in (query, key, value))
    )


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Full attention of `(B, H, Lq, D)` over `(B, Hkv, Lk, D)` and `(B, Hkv, Lk, Dv)`, with a backward pass.

    Args:
        query: float32 or bfloat16.
        key: the same type.
        value: the same type.
        scale: factor on the scores; `None` for `D ** -0.5`.

    Returns:
        `(B, H, Lq, Dv)` in the type of the inputs.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return _BlockAttention.apply(query, key, value, scale)
    return _forward(query, key, value, scale)


class _BlockAttention(torch.autograd.Function):
    """Attention in blocks; the backward pass computes each block's weights again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        output = _forward(query, key, value, scale)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        return *_backward(query, key, value, output, grad, ctx.scale), None


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The output `(B, H, Lq, Dv)`."""
    groups, step = query.shape[1] // key.shape[1], _block_length(query, key)
    keys, hidden, values = key.flatten(0, 1), _hidden(key), value.flatten(0, 1)
    output = value.new_empty(*query.shape[:2], _round_up(query.shape[2]), value.shape[-1])

    def attend(head: int) -> None:
        """The heads that share a key head."""
        k, v = _padded(keys[head], torch.float32), _padded(values[head], value.dtype)
        batch, first = divmod(head * groups, query.shape[1])
        for i in range(first, first + groups):
            matrix, target = _padded(query[batch, i], torch.float32).mul_(scale), output[batch, i]
            for rows, attended in zip(matrix.split(step), target.split(step), strict=True):
                _times(product(rows, k, hidden).softmax(-1).to(value.dtype), v, attended)

    run_side_by_side(attend, len(keys))
    return output[:, :, : query.shape[2]]


def _backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value."""
    dtype, groups, step = query.dtype, query.shape[1] // key.shape[1], _block_length(query, key)
    keys, hidden, values = key.flatten(0, 1), _hidden(key), value.flatten(0, 1)
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))

    def differentiate(head: int) -> None:
        """The heads that share a key head."""
        k = _padded(keys[head], torch.float32)
        k_narrow, grad_k = k.to(dtype), torch.zeros_like(k)
        grad_v = k.new_zeros(len(k), value.shape[-1])
        batch, first = divmod(head * groups, query.shape[1])
        for i in range(first, first + groups):
            q = _padded(query[batch, i], torch.float32).mul_(scale)
            scaled, grads = q.to(dtype), _padded(grad[batch, i], dtype)
            extended, v = (_padded(x, dtype) for x in with_mean(grad[batch, i], output[batch, i], values[head]))
            grad_q = torch.empty_like(scaled)
            for start in range(0, len(q), step):
                rows = slice(start, start + step)
                weights = product(q[rows], k, hidden).softmax(-1).to(dtype)
                grad_scores = _times_turned(extended[rows], v).mul_(weights)
                _times(grad_scores, k_narrow, grad_q[rows])
                grad_k += _turned_times(grad_scores, scaled[rows])
                grad_v += _turned_times(weights, grads[rows])
            grad_query[batch, i] = grad_q.mul_(scale)[: query.shape[2]]
        place = divmod(head, key.shape[1])
        grad_key[place], grad_value[place] = grad_k[: key.shape[2]], grad_v[: key.shape[2]]

    run_side_by_side(differentiate, len(keys))
    return grad_query, grad_key, grad_value


def with_mean(grad: Tensor, output: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients and values with columns more, so that their product gives the weights' gradients less their mean.

    The difference is then rounded once. In bfloat16 the mean takes two columns: itself, and what its rounding left.

    Args:
        grad: `(..., Lq, Dv)`, the output's gradient.
        output: `(..., Lq, Dv)`.
        value: `(..., Lk, Dv)`.

    Returns:
        `(..., Lq, Dv + n)` and `(..., Lk, Dv + n)`.
    """
    mean = (grad.float() * output.float()).sum(-1, keepdim=True)
    columns = [mean.to(grad.dtype)]
    if grad.dtype != torch.float32:
        columns.append((mean - columns[0].float()).to(grad.dtype))
    minus = value.new_full((), -1.0).expand(*value.shape[:-1], len(columns))
    return torch.cat((grad, *columns), -1), torch.cat((value, minus), -1)


def _padded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """`(L, D)` as a new matrix `(L', D)`, with zeros from `L` on."""
    length = len(matrix)
    padded = matrix.new_empty(_round_up(length), matrix.shape[1], dtype=dtype)
    padded[:length] = matrix
    padded[length:] = 0
    return padded


def _hidden(key: Tensor) -> Tensor | None:
    """What is added to all scores `(L',)`, so that nobody sees the keys that fill up."""
    length = key.shape[2]
    if length == _round_up(length):
        return None
    hidden = key.new_zeros(_round_up(length), dtype=torch.float32)
    hidden[length:] = float("-inf")
    return hidden


def _block_length(query: Tensor, key: Tensor) -> int:
    """Queries of a block: all in blocks of about equal length."""
    length_q, length_k = _round_up(query.shape[2]), _round_up(key.shape[2])
    blocks = -(-length_q * length_k // SCORES_AT_A_TIME)
    return _round_up(-(-length_q // blocks))


def _round_up(length: int) -> int:
    return -(-length // LENGTHS_IN_STEPS_OF) * LENGTHS_IN_STEPS_OF


def _times(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`left @ right` into `out`."""
    if left.dtype == torch.float32:
        out.copy_(product(left, right.t()))
    else:
        torch.mm(left, right, out=out)


def _times_turned(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T`."""
    return product(left, right) if left.dtype == torch.float32 else left @ right.t()


def _turned_times(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right`; of the two, oneDNN has the narrower one turned over."""
    if left.dtype == torch.float32:
        return product(right.t(), left.t()).t()
    return left.t() @ right


# Heads side by side, each on one thread. PyTorch divides every operation among its threads, which wait for each other
# after it; for many short operations that costs more than it gains, most where other programs hold a core. Here each
# thread computes heads of its own, and they wait once.
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def run_side_by_side(work: Callable[[int], None], pieces: int) -> None:
    """Call `work(0)`, `work(1)`, ... `work(pieces - 1)` on as many threads as PyTorch uses, in any order.

    Inside a piece PyTorch runs one thread, and no gradients are recorded.

    Args:
        work: A piece of work; pieces must not write to the same memory.
        pieces: How many there are.
    """
    threads = torch.get_num_threads()
    if threads == 1 or pieces == 1:
        with torch.no_grad():
            for piece in range(pieces):
                work(piece)
        return
    is_inference = torch.is_inference_mode_enabled()

    def in_thread(piece: int) -> None:
        with torch.inference_mode(is_inference), torch.no_grad():  # these belong to a thread
            work(piece)

    for _ in _pool(threads).map(in_thread, range(pieces)):
        pass


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = _new_pool(threads)
        return _pools[threads]


def _new_pool(threads: int) -> ThreadPoolExecutor:
    """A pool in whose threads PyTorch runs one thread each."""
    pool, all_set = ThreadPoolExecutor(threads, "vlparts"), threading.Barrier(threads)

    def set_one_thread() -> None:
        torch.get_num_threads()  # The first question in a thread sets its number to everybody's.
        torch.set_num_threads(1)
        all_set.wait()

    for started in [pool.submit(set_one_thread) for _ in range(threads)]:
        started.result()
    torch.set_num_threads(threads)  # It is also what new threads begin with.
    return pool


def _forget_pools() -> None:
    """A forked process has none of its parent's threads."""
    global _lock
    _pools.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
