"""What the operations of torch_npu take: for each kernel, why it is not for given arguments.

The functions look at shapes, types and host integers only, so that they can be tested on meta tensors and never wait
for a device. Many limits are checked inside of CANN alone, or nowhere, so they are checked here. The limits are those
of the pages of Ascend's op-plugin, `docs/zh/custom_APIs/torch_npu/torch_npu-<operation>.md`, for Atlas A2 and A3.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)

# npu_fusion_attention: layout TND.
MOST_SEGMENTS = 1024
MOST_TOKENS = 2**20
MOST_HEADS = 256
MOST_HEAD_CHANNELS = 768
# npu_fused_infer_attention_score: layout TND without separate rotary parts takes this head size only.
INFERENCE_HEAD_CHANNELS = 128
MOST_QUERY_HEADS_OF_A_KEY_HEAD = 64
# npu_rotary_mul: mode "half".
ROTARY_CHANNELS_BELOW = 896
ROTARY_HEADS_BELOW = 1000
# npu_grouped_matmul, npu_moe_token_permute and npu_moe_token_unpermute.
MOST_EXPERTS = 1024
EXPERT_WIDTH_BELOW = 65_536
PAIRS_BELOW = 16_777_215
MOST_CHOICES = 512


def wrong_type(tensor: Tensor) -> str | None:
    """Why a tensor's type is not one of the three that the operations compute in."""
    return None if tensor.dtype in FLOATS else f"{tensor.dtype} is not one of float16, bfloat16 and float32"


def supports_rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> str | None:
    """`npu_rms_norm`: rank 2 to 8, the weight the last axis.

    Half precision with a float32 weight is computed in float32, since the operation would give half precision where
    the reference gives float32.
    """
    if hidden_states.dtype != weight.dtype and (hidden_states.dtype not in HALVES or weight.dtype != torch.float32):
        return f"the weight is {weight.dtype} and the input {hidden_states.dtype}"
    if not 2 <= hidden_states.ndim <= 8:
        return f"{hidden_states.ndim} axes are not 2 to 8"
    if weight.shape != hidden_states.shape[-1:] or weight.shape[0] == 0:
        return f"a weight {tuple(weight.shape)} is not that of the last axis of {tuple(hidden_states.shape)}"
    return wrong_type(hidden_states)


def supports_gelu(input: Tensor) -> str | None:
    """`npu_gelu`."""
    return "the input is empty" if input.numel() == 0 else wrong_type(input)


def supports_swiglu(gate_up: Tensor) -> str | None:
    """`npu_swiglu`: contiguous, not empty, an even last axis."""
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        return f"{tuple(gate_up.shape)} has no even last axis"
    if gate_up.numel() == 0:
        return "the input is empty"
    if not gate_up.is_contiguous():
        return "the input is not contiguous"
    return wrong_type(gate_up)


def supports_rotary(input: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """`npu_rotary_mul`: layout TND with angles T1D, mode "half".

    Angles with gradients are taken for few heads only, and no part has them.
    """
    _, heads, channels = input.shape
    if input.numel() == 0:
        return "the input is empty"
    if channels % 2 or channels >= ROTARY_CHANNELS_BELOW:
        return f"{channels} channels are not an even number below {ROTARY_CHANNELS_BELOW}"
    if heads >= ROTARY_HEADS_BELOW:
        return f"{heads} heads are not below {ROTARY_HEADS_BELOW}"
    if cos.requires_grad or sin.requires_grad:
        return "the angles require gradients"
    return wrong_type(input)


def supports_rotary_pair(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """What [`supports_rotary`] says of each."""
    return supports_rotary(query, cos, sin) or supports_rotary(key, cos, sin)


def is_rotary_joint(query: Tensor, key: Tensor) -> bool:
    """Whether half-precision queries and keys `(L, H, D)` are parts of one projection, the keys behind the queries.

    So they can be rotated as one tensor. In float32 there are no casts to save.
    """
    is_alike = (query.shape, query.stride(), query.dtype) == (key.shape, key.stride(), key.dtype)
    is_of_one = query.untyped_storage()._cdata == key.untyped_storage()._cdata
    return is_alike and is_of_one and query.dtype in HALVES and query.storage_offset() < key.storage_offset()


def supports_attention_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """`npu_fusion_attention`: layout TND, all but the lengths."""
    (_, heads, channels), (_, key_heads, value_channels) = query.shape, value.shape
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        return f"types differ: {query.dtype}, {key.dtype} and {value.dtype}"
    if heads > MOST_HEADS or key_heads == 0 or heads % key_heads:
        return f"{heads} query heads on {key_heads} key heads, not a multiple of at most {MOST_HEADS}"
    if not 1 <= value_channels <= channels <= MOST_HEAD_CHANNELS:
        return (
            f"{channels} channels of queries and {value_channels} of values: at most {MOST_HEAD_CHANNELS} and as many"
        )
    return wrong_type(query)


def supports_segments(
    bounds_q: Sequence[int], bounds_k: Sequence[int], tokens_q: int, tokens_k: int, causal: bool
) -> str | None:
    """`npu_fusion_attention`: no row of queries without keys; and what must hold for any kernel.

    Args:
        bounds_q: Cumulative query counts from 0.
        bounds_k: Cumulative key counts from 0.
        tokens_q: Rows of the queries.
        tokens_k: Rows of the keys.
        causal: Whether the last query sees all keys and each before it one less.
    """
    if tokens_q == 0 or tokens_k == 0:
        return "there are no queries or no keys"
    for bounds, tokens in ((bounds_q, tokens_q), (bounds_k, tokens_k)):
        if bounds[0] != 0 or bounds[-1] != tokens or any(start > end for start, end in pairwise(bounds)):
            return f"the boundaries do not rise from 0 to {tokens}"
    for (start_q, end_q), (start_k, end_k) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        queries, keys = end_q - start_q, end_k - start_k
        if max(queries, keys) > MOST_TOKENS:
            return f"a segment of {max(queries, keys)} tokens, more than {MOST_TOKENS}"
        if queries and keys < (queries if causal else 1):
            return f"a segment of {queries} queries and {keys} keys has queries that see no key"
    return None


def supports_inference_attention(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """`npu_fused_infer_attention_score`: layout TND, of what [`supports_attention_tensors`] takes."""
    if query.dtype not in HALVES:
        return f"{query.dtype} is not half precision"
    if {query.shape[-1], value.shape[-1]} != {INFERENCE_HEAD_CHANNELS}:
        return f"heads of {query.shape[-1]} and {value.shape[-1]} channels, not {INFERENCE_HEAD_CHANNELS}"
    if query.shape[1] // key.shape[1] > MOST_QUERY_HEADS_OF_A_KEY_HEAD:
        return f"more than {MOST_QUERY_HEADS_OF_A_KEY_HEAD} query heads of a key head"
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
        has_biases: Whether there are biases.
    """
    if has_biases:
        return "the experts have biases"
    if up.dtype != down.dtype:
        return f"types of weights differ: {up.dtype} and {down.dtype}"
    if not up.transpose(1, 2).is_contiguous() or not down.transpose(1, 2).is_contiguous():
        return "the weights do not stand as the kernel reads them: call `arrange_expert_weights`"
    if len(up) > MOST_EXPERTS:
        return f"{len(up)} experts, more than {MOST_EXPERTS}"
    if max(*up.shape[1:], *down.shape[1:]) >= EXPERT_WIDTH_BELOW:
        return f"experts of {tuple(up.shape[1:])} and {tuple(down.shape[1:])}, not below {EXPERT_WIDTH_BELOW}"
    if hidden_states.numel() == 0 or not 1 <= top_k_index.shape[1] <= MOST_CHOICES:
        return f"{tuple(top_k_index.shape)} choices: at least one token, and 1 to {MOST_CHOICES} of each"
    if top_k_index.numel() >= PAIRS_BELOW:
        return f"{top_k_index.numel()} pairs of tokens and experts are not below {PAIRS_BELOW}"
    return wrong_type(up)
