"""Attention inside the segments of a packed sequence: a function, and an implementation for transformers.

Shapes: `Lq` queries and `Lk` keys of all segments; `H` query heads, `Hkv` key heads, `D` channels of a head;
`B` batch.
The kernels stand in `attention_ops.py`, the dense form in `attention_dense.py`.

The torch operation `vlparts::packed_attention` and its kernels.

PyTorch's dispatcher picks the kernel. Another package gives a device its own by registering one for
`vlparts::packed_attention` at the device's key and at its Autograd key, for example `PrivateUse1` and
`AutogradPrivateUse1`. Compiled code sees `vlparts::packed_attention_opaque`, which calls the same operation
at run time, so it needs no kernels of its own.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from ..kernels.cpu.attention import packed_attention_cpu
from .ops_attention_reference import block_mask, dense_attention_forward, packed_attention_reference
from .packed_index import get_max_seqlen

__all__ = [
    "PACKED_ATTENTION_FUNCTIONS",
    "PACKED_ATTENTION_NAME",
    "dense_attention_forward",
    "packed_attention",
    "packed_attention_forward",
]


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float? scale=None, bool causal=False"
)


def packed_attention_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention inside each segment on CUDA: flash attention where it applies, otherwise the reference.

    Arguments and result are those of `packed_attention_reference`. The contents of the boundaries are not
    checked on the fast path, because that would wait for the device.
    """
    arguments = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if not varlen_applies(query, key, value) or torch.cuda.get_device_capability(query.device) < (8, 0):
        return packed_attention_reference(*arguments, scale, causal)
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, output)  # a tuple only where more is asked for


def varlen_applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's flash attention takes these inputs: half precision, equal head sizes."""
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return False
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and min(query.shape[0], key.shape[0]) > 0
        and all(x.stride(-1) == 1 for x in (query, key, value))
    )


def _opaque(*arguments: Any) -> Tensor:
    return torch.ops.vlparts.packed_attention(*arguments).contiguous()


def _opaque_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _opaque_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _opaque_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.vlparts.packed_attention_opaque_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None, None, None


def _opaque_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    """Recompute the forward pass under autograd, so that every device's own backward kernel is used."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        output = torch.ops.vlparts.packed_attention(*inputs, *settings)
    grads = torch.autograd.grad(output, inputs, grad, allow_unused=True, materialize_grads=True)
    return tuple(x.contiguous() for x in grads)


def _opaque_backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def define_operations() -> None:
    """Define the operations once per process, also where several copies of this file are imported."""
    if hasattr(torch.ops.vlparts, "packed_attention"):
        return
    library = torch.library
    name, opaque = "vlparts::packed_attention", "vlparts::packed_attention_opaque"
    library.define(name, f"({_ARGUMENTS}) -> Tensor")
    library.impl(name, "CompositeImplicitAutograd", packed_attention_reference)
    # A kernel at CPU alone would hide the reference's autograd, so it is registered at both keys.
    library.impl(name, ("CPU", "AutogradCPU"), packed_attention_cpu)
    library.impl(name, ("CUDA", "AutogradCUDA"), packed_attention_cuda)
    library.define(opaque, f"({_ARGUMENTS}) -> Tensor")
    library.impl(opaque, "CompositeExplicitAutograd", _opaque)
    library.register_fake(opaque, _opaque_fake)
    library.define(f"{opaque}_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
    library.impl(f"{opaque}_backward", "CompositeExplicitAutograd", _opaque_backward)
    library.register_fake(f"{opaque}_backward", _opaque_backward_fake)
    library.register_autograd(opaque, _opaque_autograd, setup_context=_opaque_save)


PACKED_ATTENTION_NAME = "vlparts_packed"

define_operations()


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
) -> Tensor:
    """Attention in which a query sees the keys of its own segment only.

    Segments may be empty: a query whose segment holds no keys gives zeros. Under autocast the inputs are
    brought to autocast's type, as `scaled_dot_product_attention` does.

    Args:
        query: `(Lq, H, D)`.
        key: `(Lk, Hkv, D)`; `Hkv` divides `H`, and each key head serves `H / Hkv` query heads in a row.
        value: `(Lk, Hkv, Dv)`.
        cu_seqlens_q: `(segments + 1,)` int32 cumulative query counts, from 0 to `Lq`.
        cu_seqlens_k: the same for keys, from 0 to `Lk`; `None` if queries and keys have the same segments.
        max_seqlen_q: longest segment of queries. Give it where many layers share the segments: to compute it
            waits for the device. While compiling, the number of tokens serves as a bound instead.
        max_seqlen_k: longest segment of keys.
        scale: factor on the scores; `None` for `D ** -0.5`.
        causal: a query sees the keys up to its own place. Places count from the end of the segment, as in
            FlashAttention: the last query sees all keys, and of more queries than keys the first see none.

    Returns:
        `(Lq, H, Dv)` in the type of the inputs.

    Raises:
        ValueError: shapes, types or devices do not fit together, or (where the boundaries can be read without
            waiting for the device) they do not rise from 0 to the number of tokens.
    """
    same_segments = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (_autocast(x) for x in (query, key, value))
    _check_tensors(query, key, value)
    _check_boundaries(cu_seqlens_q, "cu_seqlens_q", query)
    _check_boundaries(cu_seqlens_k, "cu_seqlens_k", query)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must describe equally many segments, got "
            f"{cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
        )
    if max_seqlen_q is None:
        max_seqlen_q = _longest(cu_seqlens_q, query)
    if max_seqlen_k is None:
        max_seqlen_k = max_seqlen_q if same_segments else _longest(cu_seqlens_k, key)
    operations = torch.ops.vlparts
    attend = operations.packed_attention_opaque if torch.compiler.is_compiling() else operations.packed_attention
    return attend(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal)


def _autocast(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _longest(cu_seqlens: Tensor, tokens: Tensor) -> int:
    return tokens.shape[0] if torch.compiler.is_compiling() else get_max_seqlen(cu_seqlens)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 3:
            raise ValueError(f"{name} must have shape (tokens, heads, channels), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                "query, key and value must share one floating-point type and one device, got "
                f"{query.dtype} on {query.device} and, for {name}, {tensor.dtype} on {tensor.device}"
            )
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(
            "key and value must have equally many tokens and heads, got shapes "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query and key must have equally many channels per head, got {query.shape[2]} and {key.shape[2]}"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"the heads of key must divide the heads of query, got {key.shape[1]} and {query.shape[1]}")


def _check_boundaries(cu_seqlens: Tensor, name: str, query: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{name} must be an int32 tensor of shape (segments + 1,), got "
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != query.device:
        raise ValueError(f"{name} must be on {query.device} like query, got {cu_seqlens.device}")


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention implementation `vlparts_packed` of transformers.

    `cu_seq_lens_q` with a batch of one says who sees whom, and `attention_mask` is not looked at. What the
    packed kernels lack (dropout, a sliding window shorter than a segment, position biases) goes to
    transformers' `sdpa`, with the segments joined to the mask. Without `cu_seq_lens_q`, and when a cache
    holds earlier keys, it is `sdpa` with the given mask.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: `(B, H, Lq, D)`.
        key: `(B, Hkv, Lk, D)`.
        value: `(B, Hkv, Lk, Dv)`.
        attention_mask: mask for `sdpa`.
        scaling: factor on the scores.
        dropout: probability of dropping a weight.
        is_causal: whether a query sees only the keys up to its own place.
        cu_seq_lens_q: `(segments + 1,)` int32.
        cu_seq_lens_k: the same for keys; `None` for the segments of the queries.
        max_length_q: longest segment of queries.
        max_length_k: longest segment of keys.
        sliding_window: how many keys a query sees, itself included.
        **kwargs: passed on to `sdpa`.

    Returns:
        `(B, Lq, H, Dv)`, and None for the weights.

    Raises:
        ValueError: attention sinks (`s_aux`) or soft caps, which neither has.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{PACKED_ATTENTION_NAME} has no attention sinks (s_aux): choose another implementation")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if cu_seq_lens_q is not None and query.shape[0] == 1 and kwargs.get("cache") is None:
        cu_seq_lens_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        if _are_segments_of(cu_seq_lens_q, cu_seq_lens_k, query, key, causal):
            plain = dropout == 0.0 and all(kwargs.get(name) is None for name in ("softcap", "position_bias"))
            if plain and not _is_longer(cu_seq_lens_k, key, max_length_k, sliding_window):
                output = packed_attention(
                    query.squeeze(0).transpose(0, 1),  # whose gradient is a view, unlike that of query[0]
                    key.squeeze(0).transpose(0, 1),
                    value.squeeze(0).transpose(0, 1),
                    cu_seq_lens_q,
                    cu_seq_lens_k,
                    max_seqlen_q=max_length_q,
                    max_seqlen_k=max_length_k,
                    scale=scaling,
                    causal=causal,
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
    """Whether the boundaries are those of these queries and keys, not those of an earlier prompt."""
    length_q, length_k = query.shape[2], key.shape[2]
    if length_q == length_k:
        return True
    if causal or cu_k is cu_q:
        return False
    return torch.compiler.is_compiling() or (int(cu_q[-1]) == length_q and int(cu_k[-1]) == length_k)


def _is_longer(cu_seqlens_k: Tensor, key: Tensor, max_length_k: int | None, window: int | None) -> bool:
    """Whether some segment of the keys `(1, Hkv, Lk, D)` is longer than the window."""
    if window is None:
        return False
    return window < (_longest(cu_seqlens_k, key[0, 0]) if max_length_k is None else max_length_k)


def _restrict(mask: Tensor | None, block: Tensor) -> Tensor:
    """Hide from an attention mask all pairs that the `(Lq, Lk)` block mask hides."""
    if mask is None:
        return block[None, None]
    return mask & block if mask.dtype == torch.bool else mask.masked_fill(~block, torch.finfo(mask.dtype).min)


def _register_implementation() -> AttentionInterface:
    """Offer `vlparts_packed` to all models, and return the interface for packed models."""
    packed = AttentionInterface()
    if PACKED_ATTENTION_NAME not in packed:
        AttentionInterface.register(PACKED_ATTENTION_NAME, packed_attention_forward)
        AttentionMaskInterface.register(PACKED_ATTENTION_NAME, sdpa_mask)
    packed["sdpa"] = packed[PACKED_ATTENTION_NAME]
    return packed


# transformers' `ALL_ATTENTION_FUNCTIONS`, in which `sdpa` means the packed operation: its own would need a dense mask.
PACKED_ATTENTION_FUNCTIONS = _register_implementation()
