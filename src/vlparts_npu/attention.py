"""Packed attention by `npu_fusion_attention`; without gradients, heads of 128 channels by the inference operation.

transformers' own implementation for the NPU ("flash_attention_2") copies the boundaries from the device twice in every
layer, and hands any number of segments to an operation that takes 1,024. Models of transformers, too, reach the kernel
here by `attn_implementation="vlparts_packed"`: their packed batches carry `cu_seq_lens_q`.

Shapes: `Lq` queries and `Lk` keys of all segments; `H` query heads, `Hkv` key heads; `D` channels of queries and keys,
`Dv` of values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlparts.parts.ops_attention import define_operations
from vlparts.parts.ops_attention_reference import packed_attention_reference
from vlparts.parts.packed_index import read_bounds, remember_bounds

from .attention_calls import Call, split_calls
from .dispatch import register_operation
from .self_check import Kernel
from .support import supports_attention_tensors, supports_inference_attention, supports_segments

# The operations' causal modes take this mask for any length; 1 is hidden. Mode 3 counts from the end of a segment.
MASK_SIZE = 2048
FROM_THE_END = 3

_masks: dict[torch.device, Tensor] = {}


def supports_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
) -> str | None:
    """Why the kernel is not for these arguments; it reads the boundaries, which waits unless they are remembered."""
    reason = supports_attention_tensors(query, key, value)
    if reason:
        return reason
    bounds = (read_bounds(cu_seqlens_q), read_bounds(cu_seqlens_k))
    return supports_segments(*bounds, query.shape[0], key.shape[0], causal)


def packed_attention_npu(
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
    """The kernel; arguments and result are those of `packed_attention_reference`."""
    calls = split_calls(read_bounds(cu_seqlens_q), read_bounds(cu_seqlens_k))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attend = _attend if supports_inference_attention(query, key, value) else _attend_without_gradients
    outputs = [
        attend(_take(query, one.queries), _take(key, one.keys), _take(value, one.keys), one, scale, causal)
        for one in calls
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _take(tokens: Tensor, part: slice) -> Tensor:
    """Some tokens; all of them without a view, whose backward pass would copy."""
    return tokens if part == slice(0, tokens.shape[0]) else tokens[part]


def _attend(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float, causal: bool) -> Tensor:
    """Differentiable by torch_npu's own derivative."""
    return torch.ops.npu.npu_fusion_attention(
        query=query,
        key=key,
        value=value,
        head_num=query.shape[1],
        input_layout="TND",
        atten_mask=_causal_mask(query.device) if causal else None,
        scale=scale,
        actual_seq_qlen=call.ends_q,
        actual_seq_kvlen=call.ends_k,
        sparse_mode=FROM_THE_END if causal else 0,
    )[0]


def _attend_without_gradients(
    query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float, causal: bool
) -> Tensor:
    """The operation for inference, which keeps no statistics for a backward pass."""
    return torch.ops.npu.npu_fused_infer_attention_score(
        query=query.contiguous(),
        key=key.contiguous(),
        value=value.contiguous(),
        atten_mask=_causal_mask(query.device) if causal else None,
        actual_seq_lengths=call.ends_q,
        actual_seq_lengths_kv=call.ends_k,
        num_heads=query.shape[1],
        scale=scale,
        input_layout="TND",
        num_key_value_heads=key.shape[1],
        sparse_mode=FROM_THE_END if causal else 0,
    )[0]


def _causal_mask(device: torch.device) -> Tensor:
    """The mask of the causal modes, made once for each device."""
    if device not in _masks:
        # A mask made under `inference_mode` could not be kept for a backward pass.
        with torch.inference_mode(False):
            mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device).triu(1)
        if type(mask) is not Tensor:  # made while something is traced
            return mask
        _masks[device] = mask
    return _masks[device]


def _case(
    ends_q: Sequence[int],
    ends_k: Sequence[int],
    heads: tuple[int, int],
    channels: tuple[int, int],
    dtype: torch.dtype,
    causal: bool,
    trains: bool,
) -> tuple[object, ...]:
    """Arguments with random queries, keys and values."""
    generator = torch.Generator().manual_seed(len(ends_q) + channels[0])
    shapes = (
        (ends_q[-1], heads[0], channels[0]),
        (ends_k[-1], heads[1], channels[0]),
        (ends_k[-1], heads[1], channels[1]),
    )
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_(trains) for shape in shapes]
    bounds = [remember_bounds(torch.tensor([0, *ends], dtype=torch.int32), (0, *ends)) for ends in (ends_q, ends_k)]
    longest = [int(one.diff().max()) for one in bounds]
    return *tensors, *bounds, *longest, None, causal


def _inputs() -> list[tuple[object, ...]]:
    single, half = torch.float32, torch.bfloat16
    return [
        _case((3, 3, 16), (3, 3, 16), (2, 2), (80, 80), single, False, True),
        _case((5, 12), (5, 12), (4, 2), (64, 64), half, True, True),
        _case((2, 7), (6, 15), (2, 1), (32, 16), single, True, True),
        _case((1, 2, 3), (4, 5, 11), (3, 3), (72, 72), half, False, True),
        _case((4, 20), (4, 20), (4, 2), (128, 128), half, True, False),
        _case((4, 20), (9, 21), (2, 2), (128, 128), half, False, False),
    ]


KERNEL = Kernel(
    name="vlparts::packed_attention",
    run=packed_attention_npu,
    reference=packed_attention_reference,
    make_inputs=_inputs,
    supports=supports_packed_attention,
    tolerance={torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2},
)


def register_attention() -> None:
    """Register the kernel of `vlparts::packed_attention`, which the implementation `vlparts_packed` calls."""
    define_operations()
    register_operation(KERNEL)
