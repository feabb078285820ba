"""Attention within packed segments in plain PyTorch: the reference of the operation, and the dense oracle.

Shapes: `Lq` queries and `Lk` keys of all segments; `H` query heads, `Hkv` key heads; `D` channels of queries and keys,
`Dv` of values; `B` batch. `cu_seqlens_q` and `cu_seqlens_k` divide both into the same number of segments.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .packed_index import segment_ids


class SegmentRun(NamedTuple):
    """Consecutive segments of equal lengths."""

    segments: int
    length_q: int
    length_k: int


def packed_attention_reference(
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
) -> Tensor:
    """Scaled dot product attention of one segment after the other; consecutive segments of equal length are batched.

    Args:
        query: `(Lq, H, D)`.
        key: `(Lk, Hkv, D)`.
        value: `(Lk, Hkv, Dv)`.
        cu_seqlens_q: `(segments + 1,)` int32 cumulative lengths.
        cu_seqlens_k: `(segments + 1,)` int32.
        max_seqlen_q: Unused here; kernels for accelerators need it on the host.
        max_seqlen_k: Unused here.
        scale: Factor on the scores; None for `D ** -0.5`.
        causal: Whether a query attends only to keys up to its own position, counted from the end of both.
        cu_seqlens_q_cpu: `cu_seqlens_q` as host integers; None to copy it from the device.
        cu_seqlens_k_cpu: The same for keys.

    Returns:
        `(Lq, H, Dv)`.
    """
    lengths_q = segment_lengths(cu_seqlens_q, query.shape[0], "cu_seqlens_q", cu_seqlens_q_cpu)
    lengths_k = segment_lengths(cu_seqlens_k, key.shape[0], "cu_seqlens_k", cu_seqlens_k_cpu)
    runs = segment_runs(lengths_q, lengths_k)
    if not runs:
        return zeros_like_output(query, value)
    queries = query.split([run.segments * run.length_q for run in runs])
    keys, values = (x.split([run.segments * run.length_k for run in runs]) for x in (key, value))
    outputs = []
    for run, *qkv in zip(runs, queries, keys, values, strict=True):
        q, k, v = (rearrange(x, "(s l) h d -> s h l d", s=run.segments) for x in qkv)
        outputs.append(rearrange(attend(q, k, v, scale, causal), "s h l d -> (s l) h d"))
    return torch.cat(outputs)


def segment_lengths(
    cu_seqlens: Tensor, total: int, name: str, cu_seqlens_cpu: Sequence[int] | None = None
) -> list[int]:
    """Segment lengths as host integers.

    Args:
        cu_seqlens: `(segments + 1,)` cumulative lengths.
        total: Number of tokens that the segments must cover.
        name: Name of `cu_seqlens` in an error message.
        cu_seqlens_cpu: The same boundaries as host integers; None to copy them from the device.

    Returns:
        One length per segment.

    Raises:
        ValueError: If the boundaries do not start at zero, decrease, or do not end at `total`.
    """
    bounds = cu_seqlens.tolist() if cu_seqlens_cpu is None else cu_seqlens_cpu
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or any(length < 0 for length in lengths):
        raise ValueError(f"`{name}` must rise from 0 to the number of tokens, {total}, got {list(bounds)}.")
    return lengths


def segment_runs(lengths_q: list[int], lengths_k: list[int]) -> list[SegmentRun]:
    """Group consecutive segments with equal lengths of queries and of keys."""
    groups = groupby(zip(lengths_q, lengths_k, strict=True))
    return [SegmentRun(len(list(same)), *lengths) for lengths, same in groups]


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Attention of `(B, H, Lq, D)` over `(B, Hkv, Lk, D)`; queries that see no key give zeros."""
    length_q, length_k = query.shape[2], key.shape[2]
    if length_q == 0 or length_k == 0:
        return zeros_like_output(query, value)
    if causal and length_q > length_k:
        blind, seeing = query.split((length_q - length_k, length_k), dim=2)
        return torch.cat((zeros_like_output(blind, value), attend(seeing, key, value, scale, causal)), dim=2)
    mask = None
    if causal and length_q < length_k:
        mask = torch.ones(length_q, length_k, dtype=torch.bool, device=query.device).tril(length_k - length_q)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def zeros_like_output(query: Tensor, value: Tensor) -> Tensor:
    """Zeros of the output's shape which stay part of the autograd graph of `query`."""
    return query[..., :0].sum(-1, keepdim=True).expand(*query.shape[:-1], value.shape[-1])


def dense_attention_forward(
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
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with explicit weights over all pairs: slow, and the measure for every other implementation.

    Packed models use it as "eager". The softmax runs in float32 or better; rows without any key give zeros.

    Args:
        module: the attention layer; its `is_causal` (False if absent) counts where the argument is None.
        query: `(B, H, Lq, D)`.
        key: `(B, Hkv, Lk, D)`.
        value: `(B, Hkv, Lk, Dv)`.
        attention_mask: `(B or 1, 1 or H, Lq, >= Lk)`, bool (True for pairs that see each other) or additive.
        scaling: factor on the scores; `None` for `D ** -0.5`.
        dropout: probability of dropping a weight while `module` trains.
        is_causal: whether a query sees only the keys up to its own place, counted from the end. Ignored where
            only a mask is given, which then says it.
        cu_seq_lens_q: `(segments + 1,)`; needs a batch of one.
        cu_seq_lens_k: the same for keys; `None` for the segments of the queries.
        **kwargs: ignored.

    Returns:
        `(B, Lq, H, Dv)`, and the weights `(B, H, Lq, Lk)`, both in the type of `query`.

    Raises:
        ValueError: `cu_seq_lens_q` with a batch of more than one, or boundaries that do not rise from 0 to
            the number of tokens.
    """
    groups = query.shape[1] // key.shape[1]
    precise = torch.promote_types(query.dtype, torch.float32)
    keys, values = (x.to(precise).repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.to(precise) @ keys.transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if cu_seq_lens_q is None:
        causal = causal and attention_mask is None
        cu_q, cu_k = (_one_segment(x.shape[2], query.device) for x in (query, key))
    else:
        cu_q, cu_k = cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        _check_segments(query, key, cu_q, cu_k)
    seen = block_mask(cu_q, cu_k, query.shape[2], key.shape[2], causal)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        seen = seen & attention_mask[..., : key.shape[2]]
    elif attention_mask is not None:
        additive = attention_mask[..., : key.shape[2]]
        scores, seen = scores + additive, seen & ~torch.isneginf(additive)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ values).transpose(1, 2).to(query.dtype).contiguous(), weights.to(query.dtype)


def _one_segment(length: int, device: torch.device) -> Tensor:
    return torch.tensor([0, length], dtype=torch.int32, device=device)


def _check_segments(query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q needs a batch of 1, got a batch of {query.shape[0]}")
    if not torch.compiler.is_compiling():
        segment_lengths(cu_q, query.shape[2], "cu_seq_lens_q")
        segment_lengths(cu_k, key.shape[2], "cu_seq_lens_k")


def block_mask(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, length_q: int, length_k: int, causal: bool) -> Tensor:
    """Which query sees which key.

    Args:
        cu_seqlens_q: `(segments + 1,)` int32 cumulative query counts, from 0 to `length_q`.
        cu_seqlens_k: the same for keys.
        length_q: number of queries.
        length_k: number of keys.
        causal: a query sees the keys up to its own place, counted from the end of the segment.

    Returns:
        `(length_q, length_k)` bool, True where query and key are of one segment (and in causal order).
    """
    segment_q, segment_k = segment_ids(cu_seqlens_q, length_q), segment_ids(cu_seqlens_k, length_k)
    seen = segment_q[:, None] == segment_k[None, :]
    if causal:
        from_end_q = cu_seqlens_q[1:][segment_q] - torch.arange(length_q, device=seen.device)
        from_end_k = cu_seqlens_k[1:][segment_k] - torch.arange(length_k, device=seen.device)
        seen = seen & (from_end_q[:, None] <= from_end_k[None, :])
    return seen
