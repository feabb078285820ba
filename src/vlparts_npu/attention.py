"""Packed attention by `npu_fusion_attention`, or by the inference operation where that applies.

Both operations need the segment boundaries as host integers, and take at most 1,024 segments per call. transformers'
own implementation for the NPU ("flash_attention_2") copies the boundaries from the device twice per layer and does not
split calls; with `attn_implementation="vlparts_packed"` its models run these kernels instead.

Shapes: `Lq` queries and `Lk` keys of all segments; `H` query heads, `Hkv` key heads; `D` channels of queries and keys,
`Dv` of values.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlparts.parts import ops_attention  # noqa: F401 (defines the operation)
from vlparts.parts.ops_attention_reference import packed_attention_reference

from .self_check import Kernel, register_operation
from .support import (
    MAX_SEGMENTS,
    MAX_TOKENS,
    supports_attention_tensors,
    supports_inference_attention,
    supports_segments,
)

# The mask of the operations' causal modes, for any length; True is masked. Mode 3 aligns the ends of queries and keys.
CAUSAL_MASK_SIZE = 2048
CAUSAL_FROM_END = 3

_causal_masks: dict[torch.device, Tensor] = {}


class SegmentGroup(NamedTuple):
    """Consecutive segments that one call computes.

    Attributes:
        queries: Rows of the group's queries.
        keys: Rows of the group's keys.
        ends_q: Cumulative query counts of the group, without the leading 0.
        ends_k: Cumulative key counts of the group, without the leading 0.
    """

    queries: slice
    keys: slice
    ends_q: list[int]
    ends_k: list[int]


def group_segments(cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int]) -> list[SegmentGroup]:
    """Divide segments into groups that one call can compute; segments without queries are left out.

    Args:
        cu_seqlens_q: Cumulative query counts from 0.
        cu_seqlens_k: Cumulative key counts from 0.
    """
    groups: list[list[tuple[int, int, int, int]]] = []
    for (start_q, end_q), (start_k, end_k) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True):
        if start_q == end_q:
            continue
        first = groups[-1][0] if groups else None
        # A segment left out ends a group, unless it has no keys: the keys of a group are one slice.
        follows = first is not None and groups[-1][-1][3] == start_k and len(groups[-1]) < MAX_SEGMENTS
        if first is None or not follows or max(end_q - first[0], end_k - first[2]) > MAX_TOKENS:
            groups.append([])
        groups[-1].append((start_q, end_q, start_k, end_k))
    return [
        SegmentGroup(
            slice(group[0][0], group[-1][1]),
            slice(group[0][2], group[-1][3]),
            [segment[1] - group[0][0] for segment in group],
            [segment[3] - group[0][2] for segment in group],
        )
        for group in groups
    ]


def add_host_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
    cu_seqlens_q_cpu: Sequence[int] | None = None,
    cu_seqlens_k_cpu: Sequence[int] | None = None,
) -> tuple[Any, ...]:
    """Return all arguments of the operation, with host lengths copied from the device where they are None."""
    same_segments = cu_seqlens_k is cu_seqlens_q
    if cu_seqlens_q_cpu is None:
        cu_seqlens_q_cpu = cu_seqlens_k_cpu if same_segments else None
    if cu_seqlens_q_cpu is None:
        cu_seqlens_q_cpu = cu_seqlens_q.tolist()
    if cu_seqlens_k_cpu is None:
        cu_seqlens_k_cpu = cu_seqlens_q_cpu if same_segments else cu_seqlens_k.tolist()
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return query, key, value, *lengths, scale, causal, cu_seqlens_q_cpu, cu_seqlens_k_cpu


def supports_packed_attention(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> str | None:
    """Return why the kernel does not support these arguments, which are those of [`packed_attention_npu`]."""
    *_, causal, cu_seqlens_q_cpu, cu_seqlens_k_cpu = settings
    return supports_attention_tensors(query, key, value) or supports_segments(
        cu_seqlens_q_cpu, cu_seqlens_k_cpu, query.shape[0], key.shape[0], causal
    )


def packed_attention_npu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    causal: bool,
    cu_seqlens_q_cpu: Sequence[int],
    cu_seqlens_k_cpu: Sequence[int],
) -> Tensor:
    """Packed attention; arguments are those of `packed_attention_reference`, host lengths required."""
    groups = group_segments(cu_seqlens_q_cpu, cu_seqlens_k_cpu)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attend = _attend if supports_inference_attention(query, key, value) else _attend_without_grad
    outputs = [
        attend(_rows(query, group.queries), _rows(key, group.keys), _rows(value, group.keys), group, scale, causal)
        for group in groups
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    """Slice a tensor; all rows are the tensor itself, since the backward pass of a slice copies."""
    return tensor if rows == slice(0, tensor.shape[0]) else tensor[rows]


def _attend(query: Tensor, key: Tensor, value: Tensor, group: SegmentGroup, scale: float, causal: bool) -> Tensor:
    """`npu_fusion_attention`, which torch_npu differentiates."""
    return torch.ops.npu.npu_fusion_attention(
        query=query,
        key=key,
        value=value,
        head_num=query.shape[1],
        input_layout="TND",
        atten_mask=_causal_mask(query.device) if causal else None,
        scale=scale,
        actual_seq_qlen=group.ends_q,
        actual_seq_kvlen=group.ends_k,
        sparse_mode=CAUSAL_FROM_END if causal else 0,
    )[0]


def _attend_without_grad(
    query: Tensor, key: Tensor, value: Tensor, group: SegmentGroup, scale: float, causal: bool
) -> Tensor:
    """The operation for inference, which stores no statistics for a backward pass."""
    return torch.ops.npu.npu_fused_infer_attention_score(
        query=query.contiguous(),
        key=key.contiguous(),
        value=value.contiguous(),
        atten_mask=_causal_mask(query.device) if causal else None,
        actual_seq_lengths=group.ends_q,
        actual_seq_lengths_kv=group.ends_k,
        num_heads=query.shape[1],
        scale=scale,
        input_layout="TND",
        num_key_value_heads=key.shape[1],
        sparse_mode=CAUSAL_FROM_END if causal else 0,
    )[0]


def _causal_mask(device: torch.device) -> Tensor:
    """The mask of the causal modes, created once per device."""
    if device not in _causal_masks:
        # An inference tensor could not be saved for a backward pass later.
        with torch.inference_mode(False):
            mask = torch.ones(CAUSAL_MASK_SIZE, CAUSAL_MASK_SIZE, dtype=torch.bool, device=device).triu(1)
        if type(mask) is not Tensor:  # a fake tensor, while tracing
            return mask
        _causal_masks[device] = mask
    return _causal_masks[device]


def _case(
    ends_q: Sequence[int],
    ends_k: Sequence[int],
    heads: tuple[int, int],
    channels: tuple[int, int],
    dtype: torch.dtype,
    causal: bool,
    requires_grad: bool,
) -> tuple[Any, ...]:
    """Arguments with random queries, keys and values."""
    generator = torch.Generator().manual_seed(len(ends_q) + channels[0])
    shapes = (
        (ends_q[-1], heads[0], channels[0]),
        (ends_k[-1], heads[1], channels[0]),
        (ends_k[-1], heads[1], channels[1]),
    )
    query, key, value = (torch.randn(x, generator=generator).to(dtype).requires_grad_(requires_grad) for x in shapes)
    cu_seqlens_q, cu_seqlens_k = (torch.tensor([0, *ends], dtype=torch.int32) for ends in (ends_q, ends_k))
    max_seqlen_q, max_seqlen_k = (int(one.diff().max()) for one in (cu_seqlens_q, cu_seqlens_k))
    return add_host_lengths(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal)


def _inputs() -> list[tuple[Any, ...]]:
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
    name="vlparts::varlen_attention",
    run=packed_attention_npu,
    reference=packed_attention_reference,
    make_inputs=_inputs,
    supports=supports_packed_attention,
    tolerance={torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2},
    complete=add_host_lengths,
)


def register_attention() -> None:
    """Register the kernel of `vlparts::varlen_attention`, which the implementation `vlparts_packed` calls."""
    register_operation(KERNEL)
