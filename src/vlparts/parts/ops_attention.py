"""Attention within the segments of a packed sequence: function, torch operation, and transformers implementation.

The reference form of the operation `vlparts::varlen_attention` is in `ops_attention_reference.py`. Compiled programs
call `vlparts::varlen_attention_opaque`, which is not traced into, since the lengths of segments are data; at run time
it calls the same operation, so it needs no kernels of its own.

Shapes: `Lq` queries and `Lk` keys of all segments; `H` query heads, `Hkv` key heads; `D` channels of a head, `Dv` of
values; `B` batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .ops_attention_reference import block_mask, dense_attention_forward, packed_attention_reference
from .ops_library import define_operation
from .packed_index import check_cu_seqlens_cpu, get_max_seqlen
from .utils import refuse_second_derivative

__all__ = [
    "PACKED_ATTENTION_FUNCTIONS",
    "PACKED_ATTENTION_NAME",
    "dense_attention_forward",
    "packed_attention",
    "packed_attention_forward",
]

PACKED_ATTENTION_NAME = "vlparts_packed"

_OPERATION = "varlen_attention"
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float? scale=None, bool causal=False"
)
_HOST_LENGTHS = "int[]? cu_seqlens_q_cpu=None, int[]? cu_seqlens_k_cpu=None"


def _opaque(*arguments: Any) -> Tensor:
    return torch.ops.vlparts.varlen_attention(*arguments).contiguous()


def _opaque_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _opaque_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _opaque_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("Compiled packed attention is")
    grads = torch.ops.vlparts.varlen_attention_opaque_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None, None, None


def _opaque_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    """Recompute the forward pass under autograd, so that each device's own backward kernel is used."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        output = torch.ops.vlparts.varlen_attention(*inputs, *settings)
    grads = torch.autograd.grad(output, inputs, grad, allow_unused=True, materialize_grads=True)
    return tuple(x.contiguous() for x in grads)


def _opaque_backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def _define_opaque() -> None:
    """Define the operation for compiled programs, unless it is defined already."""
    library, name = torch.library, f"vlparts::{_OPERATION}_opaque"
    if hasattr(torch.ops.vlparts, f"{_OPERATION}_opaque"):
        return
    library.define(name, f"({_ARGUMENTS}) -> Tensor")
    library.impl(name, "CompositeExplicitAutograd", _opaque)
    library.register_fake(name, _opaque_fake)
    library.define(f"{name}_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
    library.impl(f"{name}_backward", "CompositeExplicitAutograd", _opaque_backward)
    library.register_fake(f"{name}_backward", _opaque_backward_fake)
    library.register_autograd(name, _opaque_autograd, setup_context=_opaque_save)


define_operation(f"{_OPERATION}({_ARGUMENTS}, {_HOST_LENGTHS}) -> Tensor", packed_attention_reference)
_define_opaque()


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    cu_seqlens_q_cpu: Sequence[int] | None = None,
    cu_seqlens_k_cpu: Sequence[int] | None = None,
) -> Tensor:
    """Attention in which each query attends to the keys of its own segment.

    Segments may be empty: a query whose segment has no keys gives zeros. Under autocast the inputs are cast to
    autocast's dtype, as `scaled_dot_product_attention` does.

    Args:
        query: `(Lq, H, D)`.
        key: `(Lk, Hkv, D)`; `Hkv` divides `H`, and each key head serves `H / Hkv` consecutive query heads.
        value: `(Lk, Hkv, Dv)`.
        cu_seqlens_q: `(segments + 1,)` int32 cumulative query counts, from 0 to `Lq`.
        cu_seqlens_k: The same for keys, from 0 to `Lk`; None if queries and keys have the same segments.
        max_seqlen_q: Longest segment of queries, or an upper bound. Pass it where many layers share the segments:
            computing it synchronizes with the device. While compiling, the default is the number of tokens.
        max_seqlen_k: Longest segment of keys.
        scale: Factor on the scores; None for `D ** -0.5`.
        causal: Whether a query attends only to keys up to its own position, counted from the end of the segment as
            in FlashAttention: the last query attends to all keys. Where there are more queries than keys, the first
            attend to none.
        cu_seqlens_q_cpu: `cu_seqlens_q` as host integers, so that kernels which need lengths on the host do not copy
            them from the device. Ignored while compiling.
        cu_seqlens_k_cpu: The same for keys; None if queries and keys have the same segments.

    Returns:
        `(Lq, H, Dv)` in the dtype of the inputs.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or (where the boundaries are read on the host) they do
            not rise from 0 to the number of tokens.
        RuntimeError: In a backward pass with `create_graph=True`, or in that of the second derivative: most kernels
            are differentiable once.
    """
    same_segments = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    if same_segments and cu_seqlens_k_cpu is None:
        cu_seqlens_k_cpu = cu_seqlens_q_cpu
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (_autocast(x) for x in (query, key, value))
    _check_tensors(query, key, value)
    _check_boundaries(cu_seqlens_q, "cu_seqlens_q", query)
    _check_boundaries(cu_seqlens_k, "cu_seqlens_k", query)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "`cu_seqlens_q` and `cu_seqlens_k` must describe the same number of segments, got "
            f"{cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}."
        )
    if max_seqlen_q is None:
        max_seqlen_q = _longest(cu_seqlens_q, query)
    if max_seqlen_k is None:
        max_seqlen_k = max_seqlen_q if same_segments else _longest(cu_seqlens_k, key)
    arguments = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal)
    if torch.compiler.is_compiling():
        return torch.ops.vlparts.varlen_attention_opaque(*arguments)
    check_cu_seqlens_cpu(cu_seqlens_q_cpu, cu_seqlens_q, "cu_seqlens_q_cpu")
    check_cu_seqlens_cpu(cu_seqlens_k_cpu, cu_seqlens_k, "cu_seqlens_k_cpu")
    return torch.ops.vlparts.varlen_attention(*arguments, cu_seqlens_q_cpu, cu_seqlens_k_cpu)


def _autocast(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _longest(cu_seqlens: Tensor, tokens: Tensor) -> int:
    return tokens.shape[0] if torch.compiler.is_compiling() else get_max_seqlen(cu_seqlens)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 3:
            raise ValueError(f"`{name}` must have shape (tokens, heads, channels), got {tuple(tensor.shape)}.")
        if not tensor.is_floating_point() or tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                "`query`, `key` and `value` must have the same floating-point dtype and device, got "
                f"{query.dtype} on {query.device} and, for `{name}`, {tensor.dtype} on {tensor.device}."
            )
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(
            "`key` and `value` must have the same number of tokens and heads, got shapes "
            f"{tuple(key.shape)} and {tuple(value.shape)}."
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "`query` and `key` must have the same number of channels per head, got "
            f"{query.shape[2]} and {key.shape[2]}."
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"The heads of `key` must divide the heads of `query`, got {key.shape[1]} and {query.shape[1]}."
        )


def _check_boundaries(cu_seqlens: Tensor, name: str, query: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"`{name}` must be an int32 tensor of shape (segments + 1,), got "
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}."
        )
    if cu_seqlens.device != query.device:
        raise ValueError(f"`{name}` must be on {query.device} like `query`, got {cu_seqlens.device}.")


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    sliding_window: int | None = None,
    cu_seqlens_cpu: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention implementation `vlparts_packed` for transformers models.

    With a batch of one, `cu_seq_lens_q` defines the segments and `attention_mask` is ignored. Options that packed
    kernels do not support (dropout, a sliding window shorter than a segment, position biases) run in transformers'
    `sdpa`, with the segments merged into the mask. Without `cu_seq_lens_q`, or with earlier keys in a cache, it is
    `sdpa` with the given mask.

    Args:
        module: Attention layer; its `is_causal` is the default of the argument.
        query: `(B, H, Lq, D)`.
        key: `(B, Hkv, Lk, D)`.
        value: `(B, Hkv, Lk, Dv)`.
        attention_mask: Mask for `sdpa`.
        scaling: Factor on the scores.
        dropout: Probability of dropping a weight.
        is_causal: Whether a query attends only to keys up to its own position.
        cu_seq_lens_q: `(segments + 1,)` int32 cumulative lengths.
        cu_seq_lens_k: The same for keys; None for the segments of the queries.
        max_length_q: Longest segment of queries.
        max_length_k: Longest segment of keys.
        sliding_window: Number of keys a query attends to, itself included.
        cu_seqlens_cpu: `cu_seq_lens_q` as host integers, where queries and keys have the same segments.
        **kwargs: Passed on to `sdpa`.

    Returns:
        `(B, Lq, H, Dv)`, and None for the weights.

    Raises:
        ValueError: If `s_aux` (attention sinks) is given, which is not supported.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"`s_aux` (attention sinks) is not supported by {PACKED_ATTENTION_NAME!r}, got a tensor.")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if cu_seq_lens_q is not None and query.shape[0] == 1 and kwargs.get("cache") is None:
        if cu_seq_lens_k is None:
            cu_seq_lens_k = cu_seq_lens_q
        if _are_segments_of(cu_seq_lens_q, cu_seq_lens_k, query, key, causal):
            plain = dropout == 0.0 and all(kwargs.get(name) is None for name in ("softcap", "position_bias"))
            if plain and not _is_longer(cu_seq_lens_k, key, max_length_k, sliding_window):
                output = packed_attention(
                    query.squeeze(0).transpose(0, 1),  # unlike that of query[0], its gradient is a view
                    key.squeeze(0).transpose(0, 1),
                    value.squeeze(0).transpose(0, 1),
                    cu_seq_lens_q,
                    cu_seq_lens_k,
                    max_seqlen_q=max_length_q,
                    max_seqlen_k=max_length_k,
                    scale=scaling,
                    causal=causal,
                    cu_seqlens_q_cpu=cu_seqlens_cpu,
                )
                return output.unsqueeze(0), None
            block = block_mask(
                cu_seq_lens_q, cu_seq_lens_k, query.shape[2], key.shape[2], causal and attention_mask is None
            )
            attention_mask = _restrict(attention_mask, block)
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        sliding_window=sliding_window,
        **kwargs,
    )


def _are_segments_of(cu_q: Tensor, cu_k: Tensor, query: Tensor, key: Tensor, causal: bool) -> bool:
    """Whether the boundaries belong to these queries and keys, and not to an earlier prompt."""
    length_q, length_k = query.shape[2], key.shape[2]
    if length_q == length_k:
        return True
    if causal or cu_k is cu_q:
        return False
    return torch.compiler.is_compiling() or (int(cu_q[-1]) == length_q and int(cu_k[-1]) == length_k)


def _is_longer(cu_seqlens_k: Tensor, key: Tensor, max_length_k: int | None, window: int | None) -> bool:
    """Whether a segment of the keys `(1, Hkv, Lk, D)` is longer than the window."""
    if window is None:
        return False
    return window < (_longest(cu_seqlens_k, key[0, 0]) if max_length_k is None else max_length_k)


def _restrict(mask: Tensor | None, block: Tensor) -> Tensor:
    """Mask out of `mask` all pairs that the `(Lq, Lk)` block mask excludes."""
    if mask is None:
        return block[None, None]
    return mask & block if mask.dtype == torch.bool else mask.masked_fill(~block, torch.finfo(mask.dtype).min)


def _register_implementation() -> AttentionInterface:
    """Register `vlparts_packed` for all models; return the interface of packed models."""
    packed = AttentionInterface()
    if PACKED_ATTENTION_NAME not in packed:
        AttentionInterface.register(PACKED_ATTENTION_NAME, packed_attention_forward)
        AttentionMaskInterface.register(PACKED_ATTENTION_NAME, sdpa_mask)
    packed["sdpa"] = packed[PACKED_ATTENTION_NAME]
    return packed


# transformers' `ALL_ATTENTION_FUNCTIONS` with "sdpa" as the packed operation, since transformers' needs a dense mask.
PACKED_ATTENTION_FUNCTIONS = _register_implementation()
