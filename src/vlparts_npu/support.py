"""Which arguments the operations of torch_npu support.

Each `supports_*` function returns None if an operation supports the arguments, otherwise the reason why it does not.
It reads shapes, dtypes and host integers only, so that it never synchronizes with the device and can be tested on meta
tensors. Many limits are checked only inside CANN or not at all, so they are checked here. They come from the pages
`docs/zh/custom_APIs/torch_npu/torch_npu-<operation>.md` of Ascend's op-plugin, for Atlas A2 and A3.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF_DTYPES = (torch.float16, torch.bfloat16)

# Values of MAX_* are inclusive, those of *_LIMIT exclusive.
# npu_fusion_attention, layout TND.
MAX_SEGMENTS = 1024
MAX_TOKENS = 2**20
MAX_HEADS = 256
MAX_HEAD_DIM = 768
# npu_fused_infer_attention_score, layout TND without separate rotary parts: the only head size.
INFERENCE_HEAD_DIM = 128
MAX_QUERY_HEADS_PER_KEY_HEAD = 64
# npu_rotary_mul, mode "half".
ROTARY_HEAD_DIM_LIMIT = 896
ROTARY_HEADS_LIMIT = 1000
# npu_grouped_matmul, npu_moe_token_permute and npu_moe_token_unpermute.
MAX_EXPERTS = 1024
EXPERT_WIDTH_LIMIT = 65_536
EXPERT_PAIRS_LIMIT = 16_777_215
MAX_EXPERTS_PER_TOKEN = 512


def supports_dtype(tensor: Tensor) -> str | None:
    """All operations: float16, bfloat16 or float32."""
    return None if tensor.dtype in FLOAT_DTYPES else f"{tensor.dtype} is not one of float16, bfloat16 and float32"


def supports_rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> str | None:
    """`npu_rms_norm`: 2 to 8 axes, a weight per channel.

    Half precision with a float32 weight is computed in float32, since the operation would return half precision where
    the reference returns float32.
    """
    if hidden_states.dtype != weight.dtype and (
        hidden_states.dtype not in HALF_DTYPES or weight.dtype != torch.float32
    ):
        return f"the weight is {weight.dtype} and the input {hidden_states.dtype}"
    if not 2 <= hidden_states.ndim <= 8:
        return f"the input has {hidden_states.ndim} axes, not 2 to 8"
    if weight.shape != hidden_states.shape[-1:] or weight.shape[0] == 0:
        return f"the weight {tuple(weight.shape)} does not match the last axis of {tuple(hidden_states.shape)}"
    return supports_dtype(hidden_states)


def supports_gelu(input: Tensor) -> str | None:
    """`npu_gelu`: not empty."""
    return "the input is empty" if input.numel() == 0 else supports_dtype(input)


def supports_swiglu(gate_up: Tensor) -> str | None:
    """`npu_swiglu`: contiguous, not empty, an even last axis."""
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        return f"{tuple(gate_up.shape)} has no even last axis"
    if gate_up.numel() == 0:
        return "the input is empty"
    if not gate_up.is_contiguous():
        return "the input is not contiguous"
    return supports_dtype(gate_up)


def supports_rotary(input: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """`npu_rotary_mul`: layout TND with cosines and sines T1D, mode "half".

    The operation differentiates cosines and sines for few heads only; no part needs these gradients.
    """
    _, heads, channels = input.shape
    if input.numel() == 0:
        return "the input is empty"
    if channels % 2 or channels >= ROTARY_HEAD_DIM_LIMIT:
        return f"{channels} channels are not an even number below {ROTARY_HEAD_DIM_LIMIT}"
    if heads >= ROTARY_HEADS_LIMIT:
        return f"{heads} heads are not below {ROTARY_HEADS_LIMIT}"
    if cos.requires_grad or sin.requires_grad:
        return "cosines or sines require gradients"
    return supports_dtype(input)


def supports_rotary_pair(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """`npu_rotary_mul` for queries and keys; see [`supports_rotary`]."""
    return supports_rotary(query, cos, sin) or supports_rotary(key, cos, sin)


def is_joint_projection(query: Tensor, key: Tensor) -> bool:
    """Whether half-precision queries and keys `(L, H, D)` are views of one tensor, the keys after the queries.

    They can then be rotated as one tensor. In float32 there are no casts to save.
    """
    same_layout = (query.shape, query.stride(), query.dtype) == (key.shape, key.stride(), key.dtype)
    same_storage = query.untyped_storage()._cdata == key.untyped_storage()._cdata
    in_order = query.storage_offset() < key.storage_offset()
    return same_layout and same_storage and in_order and query.dtype in HALF_DTYPES


def supports_attention_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """`npu_fusion_attention`, layout TND: heads, channels and dtypes."""
    (_, heads, channels), (_, key_heads, value_channels) = query.shape, value.shape
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        return f"dtypes differ: {query.dtype}, {key.dtype} and {value.dtype}"
    if heads > MAX_HEADS or key_heads == 0 or heads % key_heads:
        return f"{heads} query heads on {key_heads} key heads are not a multiple of at most {MAX_HEADS}"
    if not 1 <= value_channels <= channels <= MAX_HEAD_DIM:
        return (
            f"{channels} channels of queries and {value_channels} of values do not satisfy "
            f"1 <= values <= queries <= {MAX_HEAD_DIM}"
        )
    return supports_dtype(query)


def supports_segments(
    cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int], tokens_q: int, tokens_k: int, causal: bool
) -> str | None:
    """`npu_fusion_attention`, layout TND: valid boundaries, and no query without keys.

    Args:
        cu_seqlens_q: Cumulative query counts from 0.
        cu_seqlens_k: Cumulative key counts from 0.
        tokens_q: Number of queries.
        tokens_k: Number of keys.
        causal: Whether the last query of a segment attends to all its keys, and each earlier query to one less.
    """
    if tokens_q == 0 or tokens_k == 0:
        return "there are no queries or no keys"
    for bounds, tokens in ((cu_seqlens_q, tokens_q), (cu_seqlens_k, tokens_k)):
        if bounds[0] != 0 or bounds[-1] != tokens or any(start > end for start, end in pairwise(bounds)):
            return f"the boundaries do not rise from 0 to {tokens}"
    for (start_q, end_q), (start_k, end_k) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True):
        queries, keys = end_q - start_q, end_k - start_k
        if max(queries, keys) > MAX_TOKENS:
            return f"a segment has {max(queries, keys)} tokens, more than {MAX_TOKENS}"
        if queries and keys < (queries if causal else 1):
            return f"a segment of {queries} queries and {keys} keys has queries without keys"
    return None


def supports_inference_attention(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """`npu_fused_infer_attention_score`, layout TND, for arguments that [`supports_attention_tensors`] accepts."""
    if query.dtype not in HALF_DTYPES:
        return f"{query.dtype} is not half precision"
    if {query.shape[-1], value.shape[-1]} != {INFERENCE_HEAD_DIM}:
        return f"heads have {query.shape[-1]} and {value.shape[-1]} channels, not {INFERENCE_HEAD_DIM}"
    if query.shape[1] // key.shape[1] > MAX_QUERY_HEADS_PER_KEY_HEAD:
        return f"there are more than {MAX_QUERY_HEADS_PER_KEY_HEAD} query heads per key head"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "gradients are required"
    return None


def supports_experts(
    hidden_states: Tensor, top_k_index: Tensor, up: Tensor, down: Tensor, has_biases: bool
) -> str | None:
    """`npu_grouped_matmul` between `npu_moe_token_permute` and `npu_moe_token_unpermute`.

    Args:
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)`.
        up: `(E, N, H)`.
        down: `(E, H, I)`.
        has_biases: Whether the experts have biases.
    """
    if has_biases:
        return "the experts have biases"
    if up.dtype != down.dtype:
        return f"dtypes of the weights differ: {up.dtype} and {down.dtype}"
    if not up.transpose(1, 2).is_contiguous() or not down.transpose(1, 2).is_contiguous():
        return "the weights are not in the memory layout of the kernel; call `arrange_expert_weights`"
    if len(up) > MAX_EXPERTS:
        return f"there are {len(up)} experts, more than {MAX_EXPERTS}"
    if max(*up.shape[1:], *down.shape[1:]) >= EXPERT_WIDTH_LIMIT:
        return f"experts of {tuple(up.shape[1:])} and {tuple(down.shape[1:])} are not below {EXPERT_WIDTH_LIMIT}"
    if hidden_states.numel() == 0 or not 1 <= top_k_index.shape[1] <= MAX_EXPERTS_PER_TOKEN:
        return f"top-k indices {tuple(top_k_index.shape)} are not 1 to {MAX_EXPERTS_PER_TOKEN} of one or more tokens"
    if top_k_index.numel() >= EXPERT_PAIRS_LIMIT:
        return f"{top_k_index.numel()} pairs of tokens and experts are not below {EXPERT_PAIRS_LIMIT}"
    return supports_dtype(up)
